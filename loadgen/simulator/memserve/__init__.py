"""MemServe's experiments in virtual time: instances that cache, the global scheduler before them, links between them.

The live classes decide, of ``common.policies.language``: ``routing`` where a request is computed, ``prompt_index`` what
the scheduler knows; ``common.mempool.pool.MemPool`` what an instance keeps and evicts. Only time is simulated.
"""

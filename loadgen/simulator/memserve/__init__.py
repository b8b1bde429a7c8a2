"""MemServe's experiments in virtual time: instances that cache, the global scheduler before them, links between them.

The live classes decide: ``common.policies.routing`` where a request is computed, ``common.policies.prompt_index`` what
the scheduler knows, ``common.mempool.pool.MemPool`` what an instance keeps and evicts. Only time is simulated.
"""

"""``triptych profile``: DDiT's offline profiler, which fills the RIB that the scheduler reads.

``command`` carries it out: it makes a ``plan``, starts a ``crew`` of processes, one for each slot, each of which
measures as a ``member``, and writes and prints what came of it (``table``). Beside it stands how fast a language model
prefills by chunk size (``prefill``), which the language instances go by.
"""

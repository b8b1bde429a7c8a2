"""MemServe's MemPool (arXiv 2406.17565, section 4): the memory of keys and values as a resource of its own."""

"""Language in virtual time: instances that prefill and decode, the links between them, and who sends what where.

Every part is replaceable: ``clock`` (the event heap), ``cost`` (how long a step takes), ``link`` (how long a transfer
takes), ``instance`` (one engine under ``ContinuousBatching``, the live class), ``router`` (which instances compute a
request) and ``cluster`` (a request's way through them).
"""

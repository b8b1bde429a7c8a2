"""Failures that cross a process: a typed value, never an exception on the wire."""

from enum import StrEnum

from common.messages.base import Message


class Stage(StrEnum):
    """Where in a request's way something went wrong."""

    GATEWAY = "gateway"
    SCHEDULER = "scheduler"
    ENCODER = "encoder"
    DIT = "dit"
    VAE = "vae"
    CACHE_STORE = "cache_store"
    TENSORS = "tensors"
    PREFILL = "prefill"
    DECODE = "decode"


class Failure(Message):
    """What went wrong, where, and whether trying again can help."""

    stage: Stage
    code: str
    message: str
    retryable: bool = False


class Acknowledged(Message):
    """The receiver has taken the message over; the sender may forget it."""

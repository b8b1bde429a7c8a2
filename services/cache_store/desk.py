"""What all that answers for a cache store has in common: what it works with, whom it answers, and how it refuses."""

import contextlib
from collections.abc import Iterator

from common.bus.errors import Refusal
from common.bus.port import Bus, RequestHandler, Subscription
from common.messages.failures import Failure, Stage
from common.messages.subjects import Reply, Request, RequestSubject
from common.tensors.errors import TensorError
from common.tensors.port import Tensors
from services.cache_store.replication import Replication
from services.cache_store.store import TensorStore
from services.cache_store.tier import TierFull

QUEUE_GROUP = "cache_store"
MAX_IN_FLIGHT = 64


class StoreDesk:
    """Answers over the bus for the cache store ``instance``; what can be asked is its subclasses' matter."""

    def __init__(
        self,
        bus: Bus,
        tensors: Tensors,
        store: TensorStore,
        others: Replication,
        instance: str,
        found_lease_s: float,
    ) -> None:
        self._bus = bus
        self._tensors = tensors
        self._store = store
        self._others = others
        self._instance = instance
        self._found_lease_s = found_lease_s

    async def _serve(
        self,
        subject: RequestSubject[Request, Reply],
        handler: RequestHandler[Request, Reply],
        max_in_flight: int = MAX_IN_FLIGHT,
    ) -> Subscription:
        """Answer anybody: of all cache stores, one is asked."""
        return await self._bus.serve(subject, handler, queue_group=QUEUE_GROUP, max_in_flight=max_in_flight)

    async def _serve_others(
        self,
        subject: RequestSubject[Request, Reply],
        handler: RequestHandler[Request, Reply],
        max_in_flight: int = MAX_IN_FLIGHT,
    ) -> Subscription:
        """Answer the other cache stores, which mean this one."""
        return await self._bus.serve(subject, handler, self._instance, max_in_flight=max_in_flight)


@contextlib.contextmanager
def refusing() -> Iterator[None]:
    """What cannot be kept or fetched inside is told to the asker, who may try again."""
    try:
        yield
    except TierFull as error:
        raise refusal("store_full", str(error)) from error
    except TensorError as error:
        raise refusal("tensor_not_fetched", str(error)) from error


def refusal(code: str, message: str, *, retryable: bool = True) -> Refusal:
    """What the asker is told."""
    return Refusal(Failure(stage=Stage.CACHE_STORE, code=code, message=message, retryable=retryable))

"""Step 5 of PD-Caching-3 (MemServe, figure 4): the answer's keys and values go back to who prefilled the prompt.

Behind the answer, one sequence at a time: what cannot be sent now is left out, and costs the next turn nothing but some
tokens more to prefill. While it waits its blocks may be evicted like any other's.
"""

import asyncio
from collections import Counter, deque

import structlog

from common.bus.errors import BusError
from common.language.prefixes import SendingPrefixes
from common.tensors.errors import TensorError

log = structlog.get_logger()

# Of so many sequences the newest: their next turn is the likeliest.
_MOST_WAITING = 64


class SendingBack:
    """``outcomes`` counts what became of the sequences."""

    def __init__(self, prefixes: SendingPrefixes) -> None:
        self._prefixes = prefixes
        self._waiting: deque[tuple[str, bytes]] = deque(maxlen=_MOST_WAITING)
        self._news = asyncio.Event()
        self.outcomes: Counter[str] = Counter()

    def later(self, tokens: bytes, prefill: str) -> None:
        """A sequence is at its end, and has been kept here."""
        self._waiting.append((prefill, tokens))
        self._news.set()

    async def run(self) -> None:
        """Work until cancelled."""
        while True:
            await self._news.wait()
            self._news.clear()
            while self._waiting:
                prefill, tokens = self._waiting.popleft()
                try:
                    outcome = "sent" if await self._prefixes.send(prefill, tokens) else "known"
                except (BusError, TensorError) as error:
                    log.info("not sent back", prefill=prefill, reason=str(error))
                    outcome = "failed"
                self.outcomes[outcome] += 1

"""A sequence's way into the engine of the instance that computes its prompt: what the cache stores have comes first."""

import asyncio
from functools import partial

from common.engine import Engine, Request
from common.language.finding import FindingPrefixes
from common.language.foretelling import Foretelling, told, told_already
from common.language.held import Held, Sequences
from common.language.stepper import Stepper
from common.language.tasks import SpawnFor


class Beginning:
    """Of one instance, any number at once. A sequence that is not wanted any more does not get there."""

    def __init__(
        self,
        engine: Engine,
        stepper: Stepper,
        sequences: Sequences,
        foretelling: Foretelling,
        finding: FindingPrefixes,
        spawn: SpawnFor,
    ) -> None:
        self._engine = engine
        self._stepper = stepper
        self._sequences = sequences
        self._foretelling = foretelling
        self._finding = finding
        self._spawn = spawn

    def soon(self, held: Held, asked: Request) -> None:
        """Have it computed, as one that has come now."""
        self._stepper.soon(partial(self._add, held, asked, asyncio.get_running_loop().time()))

    def _add(self, held: Held, asked: Request, now_s: float, looked: bool = False) -> None:
        if not self._sequences.has(held):
            return
        lacking = 0 if looked else self._finding.lacking(held.tokens)
        if lacking:
            self._spawn(held, partial(self._look, held, lacking, asked, now_s), "look for")
            return
        if asked.park:
            self._engine.add(held.key, asked, now_s)
            return
        said = told_already(held.expected)
        self._engine.add(held.key, asked, now_s, self._foretelling.expected_tokens(held, said))
        if held.expected is not None and said is None:
            self._spawn(held, partial(self._expect, held), "expect of")
        else:
            self._foretelling.count(said)

    async def _look(self, held: Held, lacking: int, asked: Request, now_s: float) -> None:
        """Compute it only when what the cache stores have of it is here, or does not come."""
        await self._finding.bring(held.tokens, lacking)
        self._stepper.soon(partial(self._add, held, asked, now_s, looked=True))

    async def _expect(self, held: Held) -> None:
        """Until the predictor has spoken, a sequence that is decoded here goes by the histogram."""
        said = await told(held.expected)
        self._foretelling.count(said)
        expected, now_s = self._foretelling.expected_tokens(held, said), asyncio.get_running_loop().time()
        self._stepper.soon(partial(self._engine.expect, held.key, expected, now_s))

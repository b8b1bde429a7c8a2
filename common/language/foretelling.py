"""How long answers will be, said beside the engine (TetriInfer, section 3.3.2).

A prefill instance goes by the model's predictor, and what it says leaves with the keys and values. Where none is
trained, the decode instance goes by its own histogram: only it sees where answers end.
"""

import asyncio
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import torch

from common.language.held import Held
from common.language.settings import LengthPrediction
from common.messages.chat import ExpectedAnswer, tokens_in
from common.models.length_predictor import AnswerLengths
from common.policies.language.decode_dispatch import HEAVY_ABOVE
from common.policies.language.length_prediction import LengthRange


class Foretelling:
    """Predicts in a thread of its own: neither the event loop nor the engine waits for it.

    ``sources`` counts, of sequences that are decoded here, who told their lengths.
    """

    def __init__(self, lengths: AnswerLengths, mode: LengthPrediction) -> None:
        self._lengths = lengths
        self._mode = mode
        # One thread, without a team of its own: the cores are the engine's, whose thread keeps the team it has.
        self._thread = ThreadPoolExecutor(1, "lengths", initializer=torch.set_num_threads, initargs=(1,))
        self.sources: Counter[str] = Counter()

    async def begin(self, held: Held) -> None:
        """Predict for a sequence whose prompt is computed here; in sequential mode, wait for it."""
        predictor = self._lengths.predictor
        if predictor is None or self._mode is LengthPrediction.OFF:
            return
        held.expected = asyncio.get_running_loop().run_in_executor(self._thread, predictor.range, held.prompt)
        if self._mode is LengthPrediction.SEQUENTIAL:
            await asyncio.shield(held.expected)

    def expected_tokens(self, held: Held, told: ExpectedAnswer | None) -> int:
        """How many tokens a sequence is expected to come to have that is decoded here; 0: nobody can say.

        As in the paper, by the lower end of the range (section 5.2.3), and no more than were asked for.
        """
        tokens = tokens_in(held.prompt)
        return min(tokens + held.request.sampling.max_tokens, self.likely_tokens(tokens, told))

    def likely_tokens(self, prompt_tokens: int, told: ExpectedAnswer | None) -> int:
        """The same where no more is known of a sequence than its prompt's length."""
        if self._mode is LengthPrediction.OFF:
            return 0
        return prompt_tokens + (self._lengths.counted(prompt_tokens).low if told is None else told.low)

    def count(self, told: ExpectedAnswer | None) -> None:
        """A sequence has come in with this."""
        if self._mode is not LengthPrediction.OFF:
            self.sources["histogram" if told is None else "predictor"] += 1

    def answer(self, held: Held, told: ExpectedAnswer | None = None) -> LengthRange:
        """How many tokens the whole answer will have: as was told, as is predicted here, or as answers were so far."""
        if told is not None:
            return LengthRange(told.low, told.high, told.source)
        return _found(held.expected) or self._lengths.counted(tokens_in(held.prompt))

    def is_heavy(self, held: Held, told: ExpectedAnswer | None = None) -> bool:
        """Whether the answer will be long, as far as anybody can say (TetriInfer, section 5.1)."""
        return self.answer(held, told).low > HEAVY_ABOVE

    def ended(self, held: Held) -> None:
        """An answer has come to its end here."""
        self._lengths.ended(held.prompt, held.generated)

    def close(self) -> None:
        """Predict no more."""
        self._thread.shutdown(wait=False, cancel_futures=True)


def told_already(expected: asyncio.Future[LengthRange] | None) -> ExpectedAnswer | None:
    """The prediction, if it is there. That it failed, ``told`` says."""
    found = _found(expected)
    return None if found is None else _message(found)


async def told(expected: asyncio.Future[LengthRange] | None) -> ExpectedAnswer | None:
    """What leaves with a sequence: the prediction, once it is there."""
    if expected is None:
        return None
    return _message(await asyncio.shield(expected))


def _found(expected: asyncio.Future[LengthRange] | None) -> LengthRange | None:
    if expected is None or not expected.done() or expected.cancelled() or expected.exception() is not None:
        return None
    return expected.result()


def _message(found: LengthRange) -> ExpectedAnswer:
    return ExpectedAnswer(low=found.low, high=found.high, source=found.source)

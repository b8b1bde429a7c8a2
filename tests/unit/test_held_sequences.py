"""Which attempts at a sequence an instance takes, and what it asks its engine for."""

import pytest

from common.engine import Finish, Output
from common.language.held import Held, Sequences
from common.messages.chat import FinishReason, Sampling, pack_tokens, unpack_tokens
from common.models.causal_lm.sampling import Sampled
from common.policies.fence import StaleEpoch
from tests.support.sequences import sequence


def _held(name: str = "a", epoch: int = 1, tokens: tuple[int, ...] = (5, 6, 7), generated: int = 0) -> Held:
    sampling = Sampling(seed=3, max_tokens=4, stop_token_ids=(9,), logprobs=1)
    return sequence(name, pack_tokens(tokens), epoch=epoch, generated=generated, sampling=sampling)


def test_a_newer_attempt_takes_the_place_of_an_older_one() -> None:
    sequences = Sequences(10)
    first, second = _held(epoch=1), _held(epoch=2)
    assert sequences.admit(first) is None
    assert sequences.admit(second) is first
    assert sequences.has(second) and not sequences.has(first)
    for stale in (first, _held(epoch=2)):
        with pytest.raises(StaleEpoch):
            sequences.admit(stale)
    assert sequences.find("a", 1) is None and sequences.find("a", 2) is second
    assert sequences.named(second.key) is second and sequences.named(first.key) is None
    sequences.remove(first)
    assert len(sequences) == 1 and not sequences.idle.is_set()
    sequences.remove(second)
    assert not len(sequences) and sequences.idle.is_set()


def test_a_cancellation_holds_whether_it_comes_before_or_after() -> None:
    sequences = Sequences(10)
    assert sequences.cancel("a", 2) is None
    with pytest.raises(StaleEpoch):
        sequences.admit(_held(epoch=2))
    newer = _held(epoch=3)
    sequences.admit(newer)
    assert sequences.cancel("a", 2) is None and sequences.holds("a")
    assert sequences.cancel("a", 3) is newer and not sequences.holds("a")


def test_there_is_a_bound() -> None:
    sequences = Sequences(1)
    assert not sequences.full
    sequences.admit(_held())
    assert sequences.full


def test_tokens_are_told_by_position_over_all_attempts() -> None:
    held = _held(tokens=(5, 6, 7), generated=1)
    assert (held.prompt, held.answered) == (pack_tokens((5, 6)), pack_tokens((7,)))
    asked = held.asked(park=True)
    assert (asked.prompt, asked.answered) == (held.prompt, held.answered)
    assert (asked.most_tokens, asked.stop_tokens) == (4, {9})
    told = held.take(Output(held.key, Sampled(8, -0.5, ((8, -0.5),)), "", None))
    assert (told.offset, told.tokens, told.finish, told.logprobs[0].logprob) == (1, (8,), None, -0.5)
    last = held.take(Output(held.key, Sampled(9), "", Finish.STOP))
    assert (last.offset, last.finish, last.logprobs) == (2, FinishReason.STOP, ())
    on = held.so_far()
    assert (unpack_tokens(on.tokens), on.generated) == ([5, 6, 7, 8, 9], 3)
    with pytest.raises(ValueError, match="no prompt"):
        _held(tokens=(5,), generated=1)


def test_another_instance_goes_on_from_what_is_there() -> None:
    held = _held(tokens=(5, 6, 7), generated=1)
    news = held.hand_to("decode-1")
    assert (news.request_id, news.epoch, news.offset, news.tokens, news.decode) == ("a", 1, 1, (), "decode-1")
    assert held.so_far().decode == "decode-1" and not held.unsaid
    held.goes_to("decode-2")
    assert held.so_far().decode == held.unsaid == "decode-2"
    told = [held.take(Output(held.key, Sampled(token), "", None)) for token in (8, 9)]
    assert [news.decode for news in told] == ["decode-2", ""]

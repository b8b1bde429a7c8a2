"""What a gateway makes of an attempt's messages: every token once and in order, or the news that it is broken."""

import pytest

from common.messages.chat import ChatRoute, FinishReason, SequenceTokens, TokenLogprobs
from common.messages.failures import Failure, Stage
from gateway.chat.line import Broken, Line

SOON = 0.01
LATE = 20.0


def line(expected: int = 0, max_tokens: int = 100, prefill: str = "p", decode: str = "d") -> Line:
    route = ChatRoute(request_id="a", epoch=1, prefill=prefill, decode=decode, reason="")
    return Line(route, expected, max_tokens)


def news(
    offset: int, *tokens: int, finish: FinishReason | None = None, failure: Failure | None = None, decode: str = ""
) -> SequenceTokens:
    logprobs = tuple(TokenLogprobs(logprob=-float(token)) for token in tokens)
    return SequenceTokens(
        request_id="a",
        epoch=1,
        offset=offset,
        tokens=tokens,
        logprobs=logprobs,
        finish=finish,
        failure=failure,
        decode=decode,
    )


async def test_what_came_since_the_last_look_comes_together() -> None:
    heard = line(expected=5)
    assert await heard.next(SOON) is None
    heard.hear("p", news(5, 50))
    heard.hear("d", news(6, 60, 70))
    step = await heard.next(LATE)
    assert step is not None
    assert (step.tokens, [known.logprob for known in step.logprobs]) == ([50, 60, 70], [-50.0, -60.0, -70.0])
    assert step.finish is None
    assert await heard.next(SOON) is None


async def test_repeated_tokens_count_once() -> None:
    heard = line()
    for offset, tokens in ((0, (1, 2)), (0, (1, 2)), (1, (2, 3)), (0, (1,))):
        heard.hear("d", news(offset, *tokens))
    step = await heard.next(LATE)
    assert step is not None
    assert (step.tokens, len(step.logprobs)) == ([1, 2, 3], 3)


async def test_a_gap_breaks_it_once_what_came_before_is_taken() -> None:
    heard = line()
    heard.hear("d", news(0, 1))
    heard.hear("d", news(2, 3, finish=FinishReason.STOP))
    heard.hear("d", news(1, 2))
    step = await heard.next(LATE)
    assert step is not None
    assert (step.tokens, step.finish) == ([1], None)
    for _ in range(2):
        with pytest.raises(Broken, match="tokens 1 to 1 from d never came"):
            await heard.next(LATE)


async def test_a_failure_says_whether_another_attempt_can_help() -> None:
    for retryable in (True, False):
        heard = line()
        heard.hear("d", news(0, failure=Failure(stage=Stage.DECODE, code="x", message="y", retryable=retryable)))
        with pytest.raises(Broken) as broken:
            await heard.next(LATE)
        assert (broken.value.why, broken.value.retryable, broken.value.avoid) == ("x", retryable, ("d",))


async def test_the_prefill_instance_may_speak_of_a_decode_instance_that_takes_nothing_over() -> None:
    for code, gone in (("nobody_there", ("d",)), ("overloaded", ())):
        heard = line()
        heard.hear("p", news(0, 1))
        heard.hear("p", news(1, failure=Failure(stage=Stage.DECODE, code=code, message="y", retryable=True)))
        step = await heard.next(LATE)
        assert step is not None and step.tokens == [1]
        with pytest.raises(Broken) as broken:
            await heard.next(LATE)
        assert (broken.value.avoid, broken.value.gone) == (("d",), gone)


async def test_only_who_may_have_it_can_lose_it() -> None:
    heard = line()
    heard.lose("another")
    assert heard.instances == ("p", "d")
    heard.hear("p", news(0, 1))
    heard.hear("d", news(1, 2))
    assert heard.instances == ("d",)
    # It was handed over long ago.
    heard.lose("p")
    assert await heard.next(LATE) is not None
    heard.lose("d")
    with pytest.raises(Broken, match="d is lost"):
        await heard.next(LATE)
    assert line(prefill="f", decode="f").instances == ("f",)


async def test_who_goes_on_may_be_told_and_told_late() -> None:
    heard = line(decode="")
    heard.hear("p", news(0, decode="d"))
    heard.hear("p", news(0, 1))
    assert (heard.instances, heard.decode) == (("p", "d"), "d")
    heard.hear("d", news(1, 2))
    heard.hear("d", news(2, decode="e"))
    assert (heard.instances, heard.decode) == (("d", "e"), "e")
    heard.hear("e", news(2, 3))
    for outdated in (news(0, 1, decode="d"), news(2, decode="d")):
        heard.hear("d", outdated)
    assert heard.instances == ("e",)
    heard.hear("f", news(3, 4))
    assert (heard.instances, heard.decode) == (("f",), "f")
    step = await heard.next(LATE)
    assert step is not None and step.tokens == [1, 2, 3, 4]
    heard.moved("f", "d")
    heard.lose("d")
    with pytest.raises(Broken, match="d is lost"):
        await heard.next(LATE)


async def test_who_refused_is_the_one_it_was_handed_to() -> None:
    heard = line(decode="")
    heard.hear("p", news(0, 1, decode="d"))
    heard.hear("p", news(1, failure=Failure(stage=Stage.DECODE, code="full", message="y", retryable=True)))
    await heard.next(LATE)
    with pytest.raises(Broken) as broken:
        await heard.next(LATE)
    assert broken.value.avoid == ("d",)


async def test_all_tokens_are_the_end_even_without_a_word() -> None:
    heard = line(expected=2, max_tokens=3)
    heard.hear("d", news(2, 1))
    heard.lose("d")
    step = await heard.next(LATE)
    assert step is not None
    assert step.finish is FinishReason.LENGTH

"""A running answer that one instance hands to another: the gateway follows it, told or not."""

import asyncio
from pathlib import Path

import pytest

from common.bus.nats_bus import NatsBus
from common.messages.chat import ChatPrefilled
from common.messages.subjects import CHAT_PREFILLED
from tests.component.chat_support import ANSWER, DECODE, MESSAGES, PREFILL, ChatStack, chat_stack
from tests.component.gateway_support import until
from tests.support.language import HandOn
from tests.support.nats_server import NatsServer

ROLES = {"prefill-0": PREFILL, "decode-0": DECODE, "decode-1": DECODE}
PLACE = 4
SOON = 0.1


def handing_on(stack: ChatStack, told: bool) -> None:
    """The first decode instance hands over; the other one waits until it is allowed to go on."""
    stack.workers["decode-0"].hand_on = HandOn(PLACE, "decode-1", told)
    stack.workers["decode-1"].allowed = asyncio.Semaphore(0)


async def handed_over(stack: ChatStack) -> None:
    """Return once the other one has it."""

    async def there() -> bool:
        return stack.workers["decode-1"].busy == 1

    await until(there)


def go_on(stack: ChatStack) -> None:
    for _ in ANSWER * 4:
        stack.workers["decode-1"].allowed.release()


@pytest.mark.parametrize("told", [True, False])
async def test_the_answer_goes_on_and_only_who_has_it_can_lose_it(
    nats_server: NatsServer, tmp_path: Path, told: bool
) -> None:
    reports: asyncio.Queue[ChatPrefilled] = asyncio.Queue(100)
    async with (
        chat_stack(nats_server, tmp_path, roles=ROLES) as stack,
        await NatsBus.connect(nats_server.url, name="listener") as bus,
    ):
        await bus.subscribe(CHAT_PREFILLED, reports.put_nowait)
        handing_on(stack, told)
        asking = asyncio.create_task(stack.chat())
        await handed_over(stack)
        other = stack.workers["decode-1"]
        other.allowed.release()
        while (await asyncio.wait_for(reports.get(), 60)).decode != "decode-1":
            pass
        await stack.workers["decode-0"].leave()
        go_on(stack)
        assert (await asking)["choices"][0]["message"]["content"] == ANSWER
        assert stack.workers["prefill-0"].requests.qsize() == 1


async def test_whoever_is_lost_with_it_is_made_up_for(nats_server: NatsServer, tmp_path: Path) -> None:
    async with chat_stack(nats_server, tmp_path, roles=ROLES) as stack:
        handing_on(stack, told=True)
        asking = asyncio.create_task(stack.chat())
        await handed_over(stack)
        stack.workers["decode-0"].hand_on = None
        await stack.workers["decode-1"].leave()
        assert (await asking)["choices"][0]["message"]["content"] == ANSWER
        assert stack.workers["prefill-0"].requests.qsize() == 2


@pytest.mark.parametrize("told", [True, False])
async def test_a_cancel_reaches_whoever_has_it(nats_server: NatsServer, tmp_path: Path, told: bool) -> None:
    async with chat_stack(nats_server, tmp_path, roles=ROLES) as stack:
        handing_on(stack, told)
        streaming = await stack.http.post("/v1/chat/completions", json=MESSAGES | {"stream": True})
        await handed_over(stack)
        streaming.close()
        await stack.workers["decode-1"].next_cancelled()

        async def idle() -> bool:
            return not any(worker.busy for worker in stack.workers.values())

        await until(idle)


async def test_in_silence_whoever_had_it_says_who_has_it(nats_server: NatsServer, tmp_path: Path) -> None:
    async with chat_stack(nats_server, tmp_path, roles=ROLES, silence_s=SOON) as stack:
        handing_on(stack, told=False)
        asking = asyncio.create_task(stack.chat())
        other = stack.workers["decode-1"]

        async def asked_twice() -> bool:
            return other.finds >= 2

        await until(asked_twice)
        go_on(stack)
        assert (await asking)["choices"][0]["message"]["content"] == ANSWER
        assert stack.workers["prefill-0"].requests.qsize() == 1

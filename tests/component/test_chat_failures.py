"""Instances that die, hang, refuse and lose messages in mid-stream: the client sees no seam."""

import asyncio
import contextlib
import json
from pathlib import Path
from typing import Any

import pytest

from common.bus.nats_bus import NatsBus
from common.messages.chat import CancelGeneration, ChatsUnderWay, SequenceTokens, TokensGenerated
from common.messages.failures import Failure, Stage
from common.messages.subjects import CHATS_UNDER_WAY, TOKENS_GENERATED
from gateway.chat.generation import MAX_ATTEMPTS
from tests.component.chat_support import (
    ANSWER,
    DECODE,
    MESSAGES,
    PREFILL,
    ChatStack,
    always,
    chat_stack,
    events,
    scheduler,
)
from tests.component.gateway_support import until
from tests.support.language import FUSED, WAIT_S, PlayedLanguageWorker, ids_of, played_language_worker
from tests.support.nats_server import NatsServer

TWO = {"fused-0": FUSED, "fused-1": FUSED}
# No sequence comes to its end by itself in these tests, so the instances are asked soon.
SOON = {"silence_s": 0.2}
# What is said when there is no instance; the second, where the scheduler was slow to say so.
NOBODY = ("no_instance", "no_scheduler")


async def streamed(stack: ChatStack, **fields: Any) -> tuple[str, list[dict[str, Any]]]:
    """A streamed chat's text, and its events."""
    async with stack.http.post("/v1/chat/completions", json=MESSAGES | {"stream": True} | fields) as response:
        assert response.status == 200, await response.text()
        told = [event async for event in events(response)]
    return shown(told), told


def shown(told: list[dict[str, Any]]) -> str:
    """The text of these events; several tokens may have come with one."""
    return "".join(choice["delta"].get("content", "") for event in told for choice in event.get("choices", ()))


async def test_a_message_that_never_came_is_made_up_for(nats_server: NatsServer, tmp_path: Path) -> None:
    async with chat_stack(nats_server, tmp_path, **SOON) as stack:
        worker = stack.workers["fused-0"]
        # One in the middle is seen by the next one's offset, the last one by nothing but silence.
        for missed in (3, len(ids_of(ANSWER))):
            worker.faults.drop = {missed}
            text, told = await streamed(stack)
            assert text == ANSWER
            assert sum("role" in event["choices"][0]["delta"] for event in told) == 1
            first, second = [await worker.next_request() for _ in range(2)]
            assert (first.generated, second.generated) == (0, missed)
            assert first.epoch < second.epoch
            assert first.sampling == second.sampling
        async with stack.http.get("/metrics") as response:
            metrics = await response.text()
        assert 'triptych_sequence_reroutes_total{why="gap"} 1.0' in metrics


async def test_an_answer_that_gets_on_may_change_its_instance_as_often_as_it_has_to(
    nats_server: NatsServer, tmp_path: Path
) -> None:
    async with chat_stack(nats_server, tmp_path, **SOON) as stack:
        worker = stack.workers["fused-0"]
        worker.allowed = asyncio.Semaphore(0)
        worker.faults.forget = True
        streaming = asyncio.create_task(streamed(stack))
        # Every attempt brings one token, and is forgotten then.
        for generated in range(MAX_ATTEMPTS + 1):
            assert (await worker.next_request()).generated == generated
            worker.allowed.release()
        worker.faults.forget = False
        for _ in ANSWER * 4:
            worker.allowed.release()
        assert (await streaming)[0] == ANSWER


async def test_an_instance_that_forgets_a_sequence_loses_it(nats_server: NatsServer, tmp_path: Path) -> None:
    async with chat_stack(nats_server, tmp_path, roles=TWO, **SOON) as stack:
        for worker in stack.workers.values():
            worker.faults.silent_after = 5
        streaming = asyncio.create_task(streamed(stack))
        first = await asyncio.wait_for(_busy(stack), 60)
        other = next(name for name in TWO if name != first)
        stack.workers[other].faults.silent_after = None
        stack.workers[first].faults.forget = True
        assert (await streaming)[0] == ANSWER


async def _busy(stack: ChatStack) -> str:
    while True:
        for name, worker in stack.workers.items():
            if worker.messages:
                return name
        await asyncio.sleep(0.01)


async def test_what_has_come_and_is_not_heard_yet_is_not_lost(nats_server: NatsServer, tmp_path: Path) -> None:
    """The gateway is behind with its tokens, and is told meanwhile that nobody has the sequence any more."""
    held_up, free = asyncio.Event(), asyncio.Event()

    class HeldUp(NatsBus):
        async def publish(self, subject: Any, body: Any, *tokens: str) -> None:
            if isinstance(body, CancelGeneration) and body.request_id == "nobody":
                held_up.set()
                await free.wait()
            await super().publish(subject, body, *tokens)

    async with (
        chat_stack(nats_server, tmp_path, bus_type=HeldUp, **SOON) as stack,
        await NatsBus.connect(nats_server.url, name="stray") as bus,
        asyncio.timeout(WAIT_S),
    ):
        worker = stack.workers["fused-0"]
        worker.allowed = asyncio.Semaphore(0)
        asking = asyncio.create_task(stack.chat())
        await worker.next_request()
        stray = SequenceTokens(request_id="nobody", epoch=5, offset=0, tokens=tuple(ids_of("wrong")))
        await bus.publish(TOKENS_GENERATED, TokensGenerated(instance="fused-0", sequences=(stray,)), "gateway-0")
        await held_up.wait()
        for _ in ANSWER * 4:
            worker.allowed.release()
        await until(lambda: _at_its_end(worker))
        finds = worker.finds
        await until(lambda: _found(worker, finds + 1))
        # Whoever does not wait for what has come begins anew now.
        await asyncio.sleep(0.5)
        free.set()
        assert (await asking)["choices"][0]["message"]["content"] == ANSWER
        assert worker.requests.empty()


async def _at_its_end(worker: PlayedLanguageWorker) -> bool:
    return not worker.busy


async def _found(worker: PlayedLanguageWorker, times: int) -> bool:
    return worker.finds >= times


async def test_an_instance_that_is_silent_but_at_it_is_waited_for(nats_server: NatsServer, tmp_path: Path) -> None:
    async with chat_stack(nats_server, tmp_path, roles=TWO, silence_s=0.05) as stack:
        for worker in stack.workers.values():
            worker.allowed = asyncio.Semaphore(4)
        streaming = asyncio.create_task(streamed(stack))
        first = await asyncio.wait_for(_busy(stack), 60)
        await asyncio.sleep(0.5)
        for _ in ANSWER * 4:
            stack.workers[first].allowed.release()
        assert (await streaming)[0] == ANSWER
        assert sum(worker.requests.qsize() for worker in stack.workers.values()) == 1


@pytest.mark.parametrize("roles", [TWO, {"prefill-0": PREFILL, "decode-0": DECODE, "decode-1": DECODE}])
async def test_a_dead_instance_is_not_seen_by_the_client(
    nats_server: NatsServer, tmp_path: Path, roles: dict[str, Any]
) -> None:
    async with chat_stack(nats_server, tmp_path, roles=roles) as stack:
        for worker in stack.workers.values():
            worker.faults.silent_after = 7
        async with stack.http.post(
            "/v1/chat/completions", json=MESSAGES | {"stream": True, "stream_options": {"include_usage": True}}
        ) as response:
            told = []
            lost = ""
            async for event in events(response):
                told.append(event)
                if not lost and shown(told) == "hello world,":
                    lost = next(name for name, worker in stack.workers.items() if worker.messages >= 5)
                    for worker in stack.workers.values():
                        worker.faults.silent_after = None
                    await stack.workers[lost].leave()
        assert shown(told) == ANSWER
        assert lost != "prefill-0"
        assert told[-1]["usage"]["completion_tokens"] == len(ids_of(ANSWER)) + 1
        assert len({event["id"] for event in told}) == 1


async def test_a_chat_waits_for_an_instance_to_come(nats_server: NatsServer, tmp_path: Path) -> None:
    async with chat_stack(nats_server, tmp_path) as stack:
        await stack.workers["fused-0"].leave()
        asking = asyncio.create_task(stack.chat())
        async with played_language_worker(nats_server.url, "fused-1", always):
            body = await asking
        assert body["choices"][0]["message"]["content"] == ANSWER


async def test_without_an_instance_it_is_refused_for_now(nats_server: NatsServer, tmp_path: Path) -> None:
    async with chat_stack(nats_server, tmp_path, route_s=0.3) as stack:
        await stack.workers["fused-0"].leave()
        for stream in (False, True):
            async with stack.http.post("/v1/chat/completions", json=MESSAGES | {"stream": stream}) as response:
                assert response.status == 503
                assert response.headers["Retry-After"]
                assert (await response.json())["error"]["code"] in NOBODY


REFUSALS = [
    (Failure(stage=Stage.PREFILL, code="busy", message="no blocks", retryable=True), 503, "busy", MAX_ATTEMPTS),
    (Failure(stage=Stage.PREFILL, code="context_length_exceeded", message="too long"), 400, None, 1),
    (Failure(stage=Stage.PREFILL, code="internal", message="secret details"), 500, "internal", 1),
]


async def test_what_an_instance_refuses(nats_server: NatsServer, tmp_path: Path) -> None:
    async with chat_stack(nats_server, tmp_path) as stack:
        worker = stack.workers["fused-0"]
        for failure, status, code, attempts in REFUSALS:
            worker.faults.refuse = failure
            found, body = await stack.call("/v1/chat/completions", **MESSAGES)
            assert (found, body["error"]["code"]) == (status, code or failure.code)
            assert "secret" not in json.dumps(body)
            assert worker.requests.qsize() == attempts
            while not worker.requests.empty():
                worker.requests.get_nowait()
        worker.faults.refuse = None
        assert (await stack.chat())["choices"][0]["message"]["content"] == ANSWER


async def test_a_stream_that_cannot_go_on_ends_with_an_error(nats_server: NatsServer, tmp_path: Path) -> None:
    async with chat_stack(nats_server, tmp_path, route_s=3.0) as stack:
        worker = stack.workers["fused-0"]
        worker.faults.silent_after = 3
        async with stack.http.post("/v1/chat/completions", json=MESSAGES | {"stream": True}) as response:
            told = []
            async for event in events(response):
                told.append(event)
                if shown(told) == "hello wo":
                    await worker.leave()
        assert shown(told) == "hello wo"
        assert told[-1]["error"]["code"] in NOBODY


async def test_tokens_of_nobody_are_cancelled_and_old_epochs_ignored(nats_server: NatsServer, tmp_path: Path) -> None:
    async with chat_stack(nats_server, tmp_path) as stack, await NatsBus.connect(nats_server.url, name="old") as bus:
        worker = stack.workers["fused-0"]
        worker.allowed = asyncio.Semaphore(0)
        asking = asyncio.create_task(stack.chat())
        request = await worker.next_request()
        for name, epoch in (("nobody", 5), (request.request_id, request.epoch - 1)):
            stray = SequenceTokens(request_id=name, epoch=epoch, offset=0, tokens=tuple(ids_of("wrong")))
            news = TokensGenerated(instance="fused-0", sequences=(stray,))
            await bus.publish(TOKENS_GENERATED, news, "gateway-0")
            cancelled = await worker.next_cancelled()
            assert (cancelled.request_id, cancelled.epoch) == (name, epoch)
        # The same tokens twice count once.
        again = SequenceTokens(
            request_id=request.request_id, epoch=request.epoch, offset=0, tokens=tuple(ids_of(ANSWER)[:4])
        )
        for _ in range(2):
            await bus.publish(TOKENS_GENERATED, TokensGenerated(instance="fused-0", sequences=(again,)), "gateway-0")
        for _ in ANSWER * 4:
            worker.allowed.release()
        assert (await asking)["choices"][0]["message"]["content"] == ANSWER


async def test_the_scheduler_is_told_what_is_under_way_again_and_again(
    nats_server: NatsServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.chat.switchboard._TELL_S", 0.05)
    async with (
        chat_stack(nats_server, tmp_path, silence_s=60.0) as stack,
        await NatsBus.connect(nats_server.url, name="listener") as bus,
    ):
        told: asyncio.Queue[ChatsUnderWay] = asyncio.Queue(10_000)
        await bus.subscribe(CHATS_UNDER_WAY, told.put_nowait)
        worker = stack.workers["fused-0"]
        worker.faults.silent_after = 2
        async with asyncio.timeout(60.0):
            async with stack.http.post("/v1/chat/completions", json=MESSAGES | {"stream": True}):
                request = await worker.next_request()
                while await told.get() != ChatsUnderWay(gateway="gateway-0", epochs=(request.epoch,)):
                    pass
            while (await told.get()).epochs:
                pass


async def test_streams_outlive_the_scheduler(nats_server: NatsServer, tmp_path: Path) -> None:
    """What runs needs none; what comes waits for the next one."""
    async with contextlib.AsyncExitStack() as first, chat_stack(nats_server, tmp_path, scheduled=False) as stack:
        await first.enter_async_context(scheduler(nats_server.url))
        worker = stack.workers["fused-0"]
        worker.allowed = asyncio.Semaphore(1)
        running = asyncio.create_task(stack.chat())
        epoch = (await worker.next_request()).epoch
        await first.aclose()
        waiting = asyncio.create_task(stack.chat())
        for _ in ANSWER * 4:
            worker.allowed.release()
        assert (await running)["choices"][0]["message"]["content"] == ANSWER
        async with scheduler(nats_server.url):
            assert (await waiting)["choices"][0]["message"]["content"] == ANSWER
        assert (await worker.next_request()).epoch > epoch + 1000

"""The bus's contract, part one: request and reply, events, connecting, draining. Against a real broker."""

import asyncio

import pytest

from common.bus.errors import (
    BadAddress,
    BadReply,
    BusUnavailable,
    DeadlineExceeded,
    NobodyThere,
    NotPrepared,
    Refusal,
    RemoteFailure,
)
from common.bus.nats_bus import NatsBus
from common.bus.port import RequestHandler
from common.messages.failures import Failure, Stage
from common.messages.subjects import Bucket, RequestSubject
from common.messages.video import EncodePrompt, PromptEncoded, StepFinished
from tests.support.bus import ECHO, RECORDS, STEPS, LogLines, connected_bus, eventually, life, prompt, step, stranger
from tests.support.nats_server import NatsServer, free_port


async def echo(request: EncodePrompt) -> EncodePrompt:
    return request


async def test_a_request_is_answered_by_the_instance_it_names(nats_server: NatsServer) -> None:
    async with connected_bus(nats_server) as asker, connected_bus(nats_server) as answerer:

        async def shout(request: EncodePrompt) -> EncodePrompt:
            return prompt(request.prompt.upper())

        await answerer.serve(ECHO, echo, "encoder-0")
        await answerer.serve(ECHO, shout, "encoder-1")
        assert await asker.request(ECHO, prompt("Füchse 狐"), "encoder-0") == prompt("Füchse 狐")
        assert await asker.request(ECHO, prompt("fox"), "encoder-1") == prompt("FOX")


async def test_many_requests_at_once_each_get_their_own_answer(nats_server: NatsServer) -> None:
    async with connected_bus(nats_server) as asker, connected_bus(nats_server) as answerer:
        await answerer.serve(ECHO, echo, "a")
        answers = await asyncio.gather(*(asker.request(ECHO, prompt(str(i)), "a") for i in range(300)))
        assert [answer.prompt for answer in answers] == [str(i) for i in range(300)]


async def test_nobody_there_is_known_at_once(nats_server: NatsServer) -> None:
    async with connected_bus(nats_server) as bus:
        with pytest.raises(NobodyThere, match=r"test\.absent\.echo"):
            await bus.request(ECHO, prompt(), "absent", deadline_s=60.0)


async def test_a_slow_answer_misses_its_deadline_and_the_next_is_not_confused_with_it(
    nats_server: NatsServer,
) -> None:
    release = asyncio.Event()

    async def slow_first(request: EncodePrompt) -> EncodePrompt:
        if request.prompt == "slow":
            await release.wait()
        return request

    async with connected_bus(nats_server) as bus:
        await bus.serve(ECHO, slow_first, "a")
        with pytest.raises(DeadlineExceeded, match=r"0\.05 s"):
            await bus.request(ECHO, prompt("slow"), "a", deadline_s=0.05)
        release.set()
        assert (await bus.request(ECHO, prompt("quick"), "a")).prompt == "quick"


async def test_a_refusal_arrives_as_the_same_typed_failure(nats_server: NatsServer) -> None:
    failure = Failure(stage=Stage.DIT, code="stale_epoch", message="epoch 3 is older than 5", retryable=True)

    async def refuse(request: EncodePrompt) -> EncodePrompt:
        raise Refusal(failure)

    async with connected_bus(nats_server) as bus:
        await bus.serve(ECHO, refuse, "a")
        with pytest.raises(RemoteFailure) as caught:
            await bus.request(ECHO, prompt(), "a")
        assert caught.value.failure == failure


async def test_a_broken_handler_answers_internal_with_its_stage_and_is_logged(nats_server: NatsServer) -> None:
    log = LogLines()

    async def broken(request: EncodePrompt) -> EncodePrompt:
        raise ZeroDivisionError("by zero")

    async with connected_bus(nats_server, "dit-1", log=log) as bus:
        await bus.serve(ECHO, broken, "a")
        with pytest.raises(RemoteFailure) as caught:
            await bus.request(ECHO, prompt(), "a")
        assert caught.value.failure.code == "internal"
        assert caught.value.failure.stage is Stage.DIT
        assert "by zero" in caught.value.failure.message
        [(event, details)] = log.lines
        assert event == "handler failed"
        assert isinstance(details["exc_info"], ZeroDivisionError)


async def test_bytes_that_are_no_request_are_answered_with_a_failure(nats_server: NatsServer) -> None:
    async with connected_bus(nats_server) as bus:
        await bus.serve(ECHO, echo, "a")
        other = RequestSubject("test.{}.echo", StepFinished, EncodePrompt)
        with pytest.raises(RemoteFailure) as caught:
            await bus.request(other, step(1), "a")
        assert caught.value.failure.code == "bad_message"
        assert "expected a EncodePrompt, got a StepFinished" in caught.value.failure.message
        async with stranger(nats_server) as other_client:
            answer = await other_client.request("test.a.echo", b"\x00garbage", timeout=60)
        assert Failure.unpack(answer.data).code == "bad_message"
        assert await bus.request(ECHO, prompt(), "a") == prompt()


async def test_an_answer_of_another_kind_is_a_bad_reply(nats_server: NatsServer) -> None:
    async with connected_bus(nats_server) as bus:
        await bus.serve(ECHO, echo, "a")
        expecting = RequestSubject("test.{}.echo", EncodePrompt, PromptEncoded)
        with pytest.raises(BadReply, match="expected a PromptEncoded, got a EncodePrompt"):
            await bus.request(expecting, prompt(), "a")


async def test_no_more_handlers_run_than_may(nats_server: NatsServer) -> None:
    running, most, gate = 0, 0, asyncio.Event()

    async def counting(request: EncodePrompt) -> EncodePrompt:
        nonlocal running, most
        running += 1
        most = max(most, running)
        if running == 3:
            gate.set()
        await gate.wait()
        await asyncio.sleep(0.01)
        running -= 1
        return request

    async with connected_bus(nats_server) as bus:
        await bus.serve(ECHO, counting, "a", max_in_flight=3)
        await asyncio.gather(*(bus.request(ECHO, prompt(str(i)), "a") for i in range(20)))
        assert most == 3


async def test_a_queue_group_hands_each_request_to_one_member(nats_server: NatsServer) -> None:
    seen: list[str] = []

    def member(name: str) -> RequestHandler[EncodePrompt, EncodePrompt]:
        async def handle(request: EncodePrompt) -> EncodePrompt:
            seen.append(name)
            return request

        return handle

    async with connected_bus(nats_server) as one, connected_bus(nats_server) as two:
        await one.serve(ECHO, member("one"), "a", queue_group="group")
        await two.serve(ECHO, member("two"), "a", queue_group="group")
        await asyncio.gather(*(one.request(ECHO, prompt(), "a") for _ in range(100)))
        assert len(seen) == 100
        assert set(seen) == {"one", "two"}


@pytest.mark.parametrize("tokens", [(), ("a", "b"), ("a.b",), ("*",), (">",), ("",), ("a b",), ("a\r\nPUB x 0",)])
async def test_tokens_that_cannot_stand_in_a_subject_are_refused(
    nats_server: NatsServer, tokens: tuple[str, ...]
) -> None:
    async with connected_bus(nats_server) as bus:
        with pytest.raises(BadAddress):
            await bus.request(ECHO, prompt(), *tokens)


async def test_events_come_in_order_about_one_or_about_all(nats_server: NatsServer) -> None:
    one: list[int] = []
    everyone: list[tuple[str, int]] = []

    async def hear_all(event: StepFinished) -> None:
        await asyncio.sleep(0)
        everyone.append((event.instance, event.step))

    async with connected_bus(nats_server) as listener, connected_bus(nats_server) as speaker:
        await listener.subscribe(STEPS, lambda event: one.append(event.step), "dit-0")
        await listener.subscribe(STEPS, hear_all)
        for i in range(50):
            await speaker.publish(STEPS, step(i, "dit-0"), "dit-0")
            await speaker.publish(STEPS, step(i, "dit-1"), "dit-1")
        await eventually(lambda: len(everyone) == 100 and len(one) == 50)
        assert one == list(range(50))
        assert [number for name, number in everyone if name == "dit-1"] == list(range(50))


async def test_what_was_published_before_an_answer_can_be_waited_for(nats_server: NatsServer) -> None:
    heard: list[int] = []
    gate = asyncio.Event()

    async def hear(event: StepFinished) -> None:
        await gate.wait()
        # Others come meanwhile, for which nobody waits.
        await speaker.publish(STEPS, step(1000), "dit-0")
        heard.append(event.step)

    async with connected_bus(nats_server) as listener, connected_bus(nats_server) as speaker:

        async def tell(request: EncodePrompt) -> EncodePrompt:
            for i in range(50):
                await speaker.publish(STEPS, step(i), "dit-0")
            return request

        await speaker.serve(ECHO, tell, "encoder-0")
        hearing = await listener.subscribe(STEPS, hear)
        await hearing.caught_up()
        await listener.request(ECHO, prompt("fox"), "encoder-0")
        with pytest.raises(DeadlineExceeded, match="50 events"):
            await hearing.caught_up(0.01)
        gate.set()
        await hearing.caught_up()
        assert heard[:50] == list(range(50))
        await hearing.stop()
        await hearing.caught_up()


async def test_one_bad_event_does_not_cost_the_next(nats_server: NatsServer) -> None:
    log, heard, done = LogLines(), [], asyncio.Event()

    def hear(event: StepFinished) -> None:
        heard.append(event.step)
        if event.step == 1:
            raise LookupError("no such job")
        done.set()

    async with connected_bus(nats_server, log=log) as bus:
        await bus.subscribe(STEPS, hear)
        async with stranger(nats_server) as other_client:
            await other_client.publish("test.step.dit-0", b"garbage")
            await other_client.flush(60)
        # Nothing orders the events of two connections: the bad one is to be the first.
        await eventually(lambda: bool(log.events))
        await bus.publish(STEPS, step(1), "dit-0")
        await bus.publish(STEPS, step(2), "dit-0")
        await asyncio.wait_for(done.wait(), 60)
        assert heard == [1, 2]
        assert log.events == ["unreadable event left out", "event handler failed"]


async def test_a_handler_that_is_too_slow_loses_events_and_says_so(nats_server: NatsServer) -> None:
    log, gate, heard, done = LogLines(), asyncio.Event(), [], asyncio.Event()

    async def stuck(event: StepFinished) -> None:
        await gate.wait()
        heard.append(event.step)
        if event.step == 1000:
            done.set()

    async with connected_bus(nats_server, log=log) as listener, connected_bus(nats_server) as speaker:
        await listener.subscribe(STEPS, stuck, max_pending=10)
        for i in range(100):
            await speaker.publish(STEPS, step(i), "dit-0")
        await eventually(lambda: log.lines)
        gate.set()
        await eventually(lambda: len(heard) >= 10)
        # The last of the hundred may still be on their way, and this one be dropped with them.
        async with asyncio.timeout(60):
            while not done.is_set():
                await speaker.publish(STEPS, step(1000), "dit-0")
                await asyncio.sleep(0.01)
        assert heard[:10] == list(range(10))
        assert sum(number < 1000 for number in heard) < 100
        assert set(log.events) == {"events dropped: their handler is too slow"}


async def test_stop_lets_running_handlers_end_and_hears_nothing_new(nats_server: NatsServer) -> None:
    started, release = asyncio.Event(), asyncio.Event()

    async def slow(request: EncodePrompt) -> EncodePrompt:
        started.set()
        await release.wait()
        return request

    async with connected_bus(nats_server) as asker, connected_bus(nats_server) as answerer:
        serving = await answerer.serve(ECHO, slow, "a")
        asking = asyncio.create_task(asker.request(ECHO, prompt(), "a"))
        await started.wait()
        stopping = asyncio.create_task(serving.stop())
        while True:
            try:
                await asker.request(ECHO, prompt(), "a", deadline_s=0.05)
            except NobodyThere:
                break
            except DeadlineExceeded:
                continue
        release.set()
        assert await asking == prompt()
        await stopping


async def test_stop_cancels_what_runs_past_the_deadline(nats_server: NatsServer) -> None:
    started, cancelled = asyncio.Event(), asyncio.Event()

    async def endless(request: EncodePrompt) -> EncodePrompt:
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()
        return request

    async with connected_bus(nats_server) as bus:
        serving = await bus.serve(ECHO, endless, "a")
        asking = asyncio.create_task(bus.request(ECHO, prompt(), "a", deadline_s=1.0))
        await started.wait()
        await serving.stop(deadline_s=0.05)
        assert cancelled.is_set()
        with pytest.raises(DeadlineExceeded):
            await asking


async def test_drain_answers_what_was_asked_and_then_closes(nats_server: NatsServer) -> None:
    started = asyncio.Event()

    async def slow(request: EncodePrompt) -> EncodePrompt:
        started.set()
        await asyncio.sleep(0.1)
        return request

    async with connected_bus(nats_server) as asker, connected_bus(nats_server) as answerer:
        await answerer.serve(ECHO, slow, "a")
        asking = asyncio.create_task(asker.request(ECHO, prompt(), "a"))
        await started.wait()
        await answerer.drain()
        assert await asking == prompt()
        assert not answerer.connected
        with pytest.raises(BusUnavailable, match="closed"):
            await answerer.put(RECORDS, "a", life("a"))


async def test_nothing_runs_on_after_close(nats_server: NatsServer) -> None:
    async with connected_bus(nats_server) as bus:
        await bus.serve(ECHO, echo, "a")
        await bus.subscribe(STEPS, lambda event: None)
        await bus.request(ECHO, prompt(), "a")
    await eventually(lambda: not asyncio.all_tasks() - {asyncio.current_task()})


async def test_no_broker_is_one_clear_line_per_attempt_until_it_comes(nats_server: NatsServer) -> None:
    await nats_server.kill()
    log = LogLines()
    connecting = asyncio.create_task(NatsBus.connect(nats_server.url, "test", on_log=log))
    await eventually(lambda: len(log.lines) >= 2)
    assert not connecting.done()
    await nats_server.start()
    bus = await asyncio.wait_for(connecting, 60)
    assert bus.connected
    await bus.close()
    assert set(log.events) == {"broker not reachable, trying again"}
    assert [details["attempt"] for _, details in log.lines] == list(range(1, len(log.lines) + 1))
    assert all("exc_info" not in details and details["url"] == nats_server.url for _, details in log.lines)


async def test_connecting_gives_up_at_its_deadline() -> None:
    url = f"nats://127.0.0.1:{free_port()}"
    with pytest.raises(BusUnavailable, match=url):
        await NatsBus.connect(url, "test", connect_deadline_s=0.1, on_log=LogLines())


async def test_a_bucket_that_was_not_prepared_is_named(nats_server: NatsServer) -> None:
    unknown = Bucket("unknown", type(life("a")), max_bytes=1024)
    async with connected_bus(nats_server) as bus:
        with pytest.raises(NotPrepared, match="KV_unknown"):
            await bus.get(unknown, "a")
        with pytest.raises(NotPrepared):
            await bus.entries(unknown)
        # Where nobody answers, that may still come until the deadline; a broker that stands still says nothing by then.
        for deadline_s in (0.5, 60.0):
            with pytest.raises((BusUnavailable, DeadlineExceeded)) as refused:
                await bus.put(unknown, "a", life("a"), deadline_s=deadline_s)
            if isinstance(refused.value, BusUnavailable):
                break
        assert "not prepared" in str(refused.value)


async def test_prepare_by_several_at_once_and_again_with_other_bounds(nats_server: NatsServer) -> None:
    async with connected_bus(nats_server) as bus:
        larger = Bucket(RECORDS.name, RECORDS.body, max_bytes=RECORDS.max_bytes * 2)
        await asyncio.gather(*(bus.prepare(buckets=[RECORDS]) for _ in range(5)))
        await bus.put(RECORDS, "a", life("a"))
        await bus.prepare(buckets=[larger])
        assert (await bus.get(larger, "a")).value == life("a")

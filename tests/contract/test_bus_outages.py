"""The bus's contract, part five: the broker is killed, stopped, frozen and started again on the same store."""

import asyncio
import itertools

import pytest

from common.bus.errors import BusUnavailable, DeadlineExceeded, ObjectMissing
from common.bus.nats_bus import NatsBus
from common.bus.port import CaughtUp, Change
from common.messages.video import EncodePrompt, VideoQueued
from tests.support.bus import (
    ECHO,
    FILES,
    JOBS,
    RECORDS,
    STEPS,
    LogLines,
    connected_bus,
    eventually,
    life,
    prompt,
    relay,
    step,
)
from tests.support.nats_server import NatsServer


@pytest.mark.parametrize("how", ["kill", "stop"])
async def test_what_was_acknowledged_is_there_after_a_restart(nats_server: NatsServer, how: str) -> None:
    async with connected_bus(nats_server) as bus:
        revision = await bus.put(RECORDS, "a", life("a"))
        await bus.enqueue(JOBS, VideoQueued(job_id="job"), "job")
        await bus.put_object(FILES, "clip", b"x" * 1_000_000)
        await (nats_server.kill() if how == "kill" else nats_server.stop())
        await eventually(lambda: not bus.connected)
        await nats_server.start()
        await eventually(lambda: bus.connected)
        assert (await bus.get(RECORDS, "a")).revision == revision
        await bus.replace(RECORDS, "a", life("a", "2"), revision)
        assert b"".join([chunk async for chunk in bus.get_object(FILES, "clip")]) == b"x" * 1_000_000
        assert await bus.enqueue(JOBS, VideoQueued(job_id="job"), "job") is False
        taken = await bus.take(JOBS, 60.0)
        assert taken is not None
        assert taken.job_id == "job"


async def test_an_outage_ends_every_wait_at_its_deadline(nats_server: NatsServer) -> None:
    async with connected_bus(nats_server, deadline_s=0.3) as bus:
        await nats_server.kill()
        await eventually(lambda: not bus.connected)
        with pytest.raises(BusUnavailable):
            await bus.get(RECORDS, "a")
        with pytest.raises(BusUnavailable):
            await bus.put(RECORDS, "a", life("a"))
        with pytest.raises(BusUnavailable):
            await bus.enqueue(JOBS, VideoQueued(job_id="job"), "job")
        with pytest.raises(BusUnavailable):
            await bus.take(JOBS)
        with pytest.raises(BusUnavailable):
            await bus.entries(RECORDS)
        with pytest.raises(BusUnavailable):
            await bus.put_object(FILES, "clip", b"x" * 1_000_000)
        with pytest.raises(BusUnavailable):
            await bus.request(ECHO, prompt(), "a")


async def test_a_write_refused_in_an_outage_is_not_made_after_it(nats_server: NatsServer) -> None:
    async with connected_bus(nats_server) as bus:
        await bus.put(RECORDS, "a", life("a", "before"))
        await nats_server.kill()
        await eventually(lambda: not bus.connected)
        with pytest.raises(BusUnavailable):
            await bus.put(RECORDS, "a", life("a", "refused"), deadline_s=0.3)
        await nats_server.start()
        await eventually(lambda: bus.connected)
        assert (await bus.get(RECORDS, "a")).value.incarnation == "before"


async def test_an_operation_within_its_deadline_waits_for_the_broker(nats_server: NatsServer) -> None:
    async with connected_bus(nats_server) as bus:
        await nats_server.kill()
        await eventually(lambda: not bus.connected)
        putting = asyncio.create_task(bus.put(RECORDS, "a", life("a"), deadline_s=120.0))
        await asyncio.sleep(0.05)
        await nats_server.start()
        await putting
        assert (await bus.get(RECORDS, "a")).value == life("a")


async def test_handlers_and_listeners_work_on_after_a_restart(nats_server: NatsServer) -> None:
    heard: list[int] = []

    async def echo(request: EncodePrompt) -> EncodePrompt:
        return request

    async with connected_bus(nats_server) as asker, connected_bus(nats_server) as answerer:
        await answerer.serve(ECHO, echo, "a")
        await answerer.subscribe(STEPS, lambda event: heard.append(event.step))
        await nats_server.kill()
        await eventually(lambda: not asker.connected and not answerer.connected)
        await nats_server.start()
        await eventually(lambda: asker.connected and answerer.connected)
        # On the answerer's own connection, behind its subscriptions: with the answer the new server knows them.
        assert await answerer.request(ECHO, prompt(), "a") == prompt()
        assert await asker.request(ECHO, prompt(), "a") == prompt()
        await asker.publish(STEPS, step(1), "dit-0")
        await eventually(lambda: heard == [1])


async def test_events_published_in_an_outage_come_after_it(nats_server: NatsServer) -> None:
    heard: list[int] = []
    async with connected_bus(nats_server) as bus:
        await bus.subscribe(STEPS, lambda event: heard.append(event.step))
        await nats_server.kill()
        await eventually(lambda: not bus.connected)
        for number in range(10):
            await bus.publish(STEPS, step(number), "dit-0")
        await nats_server.start()
        await eventually(lambda: len(heard) == 10)
        assert heard == list(range(10))


async def test_what_overflows_the_send_buffer_in_an_outage_is_dropped_with_one_line(
    nats_server: NatsServer,
) -> None:
    log = LogLines()
    async with connected_bus(nats_server, log=log) as bus:
        await nats_server.kill()
        await eventually(lambda: not bus.connected)
        for _ in range(60):
            await bus.publish(STEPS, step(1, "x" * 100_000), "dit-0")
        assert [event for event in log.events if "dropping events" in event] == [
            "cut off from the broker and the send buffer is full: dropping events"
        ]


async def test_a_watch_goes_on_through_a_restart(nats_server: NatsServer) -> None:
    async with connected_bus(nats_server) as watcher, connected_bus(nats_server) as writer:
        await writer.put(RECORDS, "kept", life("kept"))
        await writer.put(RECORDS, "deleted", life("deleted"))
        seen: list[Change[object] | CaughtUp] = []

        async def watching() -> None:
            async for change in watcher.watch(RECORDS):
                seen.append(change)

        task = asyncio.create_task(watching())
        await eventually(lambda: CaughtUp() in seen)
        await nats_server.kill()
        await nats_server.start()
        # Written by one that is back while the watch may still be cut off.
        await eventually(lambda: writer.connected)
        await writer.delete(RECORDS, "deleted")
        await writer.put(RECORDS, "new", life("new"))
        await eventually(lambda: any(isinstance(change, Change) and change.key == "new" for change in seen))
        after = [change for change in seen[3:] if isinstance(change, Change)]
        assert {(change.key, change.value) for change in after} == {("deleted", None), ("new", life("new"))}
        assert seen.count(CaughtUp()) == 1
        task.cancel()


async def test_a_waiting_taker_is_served_after_a_restart(nats_server: NatsServer) -> None:
    async with connected_bus(nats_server) as taker, connected_bus(nats_server) as giver:
        taking = asyncio.create_task(taker.take(JOBS, 120.0))
        await asyncio.sleep(0.05)
        await nats_server.kill()
        await eventually(lambda: not giver.connected)
        await nats_server.start()
        await giver.enqueue(JOBS, VideoQueued(job_id="job"), "job")
        taken = await taking
        assert taken is not None
        assert taken.job_id == "job"


async def test_reading_an_object_goes_on_through_a_restart(nats_server: NatsServer) -> None:
    data = bytes(range(256)) * 60_000
    async with connected_bus(nats_server) as bus:
        await bus.put_object(FILES, "clip", data)
        read = b""
        async for chunk in bus.get_object(FILES, "clip"):
            if not read:
                await nats_server.kill()
                await nats_server.start()
            read += chunk
        assert read == data


async def test_a_put_cut_short_by_an_outage_leaves_nothing_visible(nats_server: NatsServer) -> None:
    killed = asyncio.Event()

    async def chunks() -> object:
        yield b"x" * 1_000_000
        await nats_server.kill()
        killed.set()
        yield b"y" * 1_000_000

    async with connected_bus(nats_server, deadline_s=1.0) as bus:
        while not killed.is_set():
            # Where this machine stands still for a second, the first chunk is late already.
            with pytest.raises((BusUnavailable, DeadlineExceeded)):
                await bus.put_object(FILES, "clip", chunks())  # type: ignore[arg-type]
        await nats_server.start()
        await eventually(lambda: bus.connected)
        with pytest.raises(ObjectMissing):
            await bus.object_info(FILES, "clip", deadline_s=60.0)


async def test_a_frozen_broker_is_a_missed_deadline_and_recovers(nats_server: NatsServer) -> None:
    async with connected_bus(nats_server) as bus:
        await bus.put(RECORDS, "a", life("a"))
        nats_server.pause()
        with pytest.raises(DeadlineExceeded):
            await bus.get(RECORDS, "a", deadline_s=0.2)
        nats_server.resume()
        assert (await bus.get(RECORDS, "a")).value == life("a")


async def test_an_outage_is_a_line_at_its_start_and_one_at_its_end(nats_server: NatsServer) -> None:
    log = LogLines()
    async with connected_bus(nats_server, log=log) as bus:
        await nats_server.kill()
        await eventually(lambda: not bus.connected)
        await nats_server.start()
        await eventually(lambda: bus.connected and "connected to the broker again" in log.events)
        assert log.events[0] == "connection to the broker lost, reconnecting"
        assert log.events[-1] == "connected to the broker again"
        assert all("exc_info" not in details for _, details in log.lines)


async def test_a_ping_before_the_first_answer_is_not_taken_for_it(nats_server: NatsServer) -> None:
    """The broker sends one as soon as a client has been silent for a second, be it in the midst of connecting."""
    async with (
        relay(nats_server, itertools.repeat(b"PING\r\n")) as url,
        await NatsBus.connect(url, "test", deadline_s=20.0, on_log=LogLines()) as bus,
    ):
        assert bus.connected
        await bus.prepare(buckets=[RECORDS])
        await bus.put(RECORDS, "a", life("a"))


async def test_close_and_drain_end_in_an_outage(nats_server: NatsServer) -> None:
    async def echo(request: EncodePrompt) -> EncodePrompt:
        return request

    async with connected_bus(nats_server) as draining, connected_bus(nats_server) as closing:
        await draining.serve(ECHO, echo, "a")
        await closing.serve(ECHO, echo, "b")
        await nats_server.kill()
        await eventually(lambda: not draining.connected and not closing.connected)
        async with asyncio.timeout(60):
            await draining.drain()
            await closing.close()

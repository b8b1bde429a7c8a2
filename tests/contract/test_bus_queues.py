"""The bus's contract, part two: work queues. Against a real broker."""

import asyncio
import time

import pytest

from common.bus.errors import NotPrepared, QueueFull
from common.bus.nats_bus import NatsBus
from common.bus.queues import TakenJob
from common.messages.subjects import WorkQueue
from common.messages.video import VideoQueued
from tests.support.bus import JOBS, LogLines, connected_bus, stranger
from tests.support.nats_server import NatsServer


async def add(bus: NatsBus, *job_ids: str) -> list[bool]:
    return [await bus.enqueue(JOBS, VideoQueued(job_id=job_id), job_id) for job_id in job_ids]


async def take(bus: NatsBus, deadline_s: float = 60.0) -> TakenJob[VideoQueued]:
    taken = await bus.take(JOBS, deadline_s)
    assert taken is not None
    return taken


async def test_jobs_are_taken_in_order_and_gone_once_acknowledged(nats_server: NatsServer) -> None:
    async with connected_bus(nats_server) as bus:
        assert await add(bus, "a", "b", "c") == [True, True, True]
        assert await bus.queue_depth(JOBS) == 3
        for expected in "abc":
            taken = await take(bus)
            assert (taken.job_id, taken.body, taken.attempt) == (expected, VideoQueued(job_id=expected), 1)
            assert await bus.queued(JOBS, expected)
            await taken.ack()
            assert not await bus.queued(JOBS, expected)
        assert await bus.queue_depth(JOBS) == 0
        assert await bus.take(JOBS, 0.05) is None
        assert await bus.take(JOBS, 0.0) is None


async def test_a_waiting_taker_gets_what_comes(nats_server: NatsServer) -> None:
    async with connected_bus(nats_server) as giver, connected_bus(nats_server) as taker:
        waiting = asyncio.create_task(take(taker))
        await asyncio.sleep(0.05)
        await add(giver, "a")
        assert (await waiting).job_id == "a"


async def test_each_job_goes_to_one_of_many_takers(nats_server: NatsServer) -> None:
    async with connected_bus(nats_server) as one, connected_bus(nats_server) as two:
        await add(one, "a", "b", "c", "d")
        taken = await asyncio.gather(take(one), take(two), take(one), take(two))
        assert sorted(job.job_id for job in taken) == ["a", "b", "c", "d"]
        assert await one.take(JOBS, 0.05) is None


async def test_what_is_given_back_comes_again_before_the_younger(nats_server: NatsServer) -> None:
    async with connected_bus(nats_server) as bus:
        await add(bus, "a", "b")
        await (await take(bus)).nak()
        again = await take(bus)
        assert (again.job_id, again.attempt) == ("a", 2)


async def test_what_is_given_back_with_a_delay_comes_after_it(nats_server: NatsServer) -> None:
    async with connected_bus(nats_server) as bus:
        await add(bus, "a")
        taken = await take(bus)
        before_s = time.monotonic()
        await taken.nak(delay_s=0.4)
        assert (await take(bus)).attempt == 2
        # Where this machine stands still it is later, never sooner; the broker's clock is another.
        assert time.monotonic() - before_s > 0.35


async def test_a_taker_that_dies_loses_the_job_to_the_next(nats_server: NatsServer) -> None:
    async with connected_bus(nats_server, ack_wait_s=0.5) as survivor:
        async with connected_bus(nats_server, ack_wait_s=0.5) as dying:
            await add(dying, "a")
            await take(dying)
        again = await take(survivor)
        assert (again.job_id, again.attempt) == ("a", 2)


async def test_who_reports_progress_keeps_the_job(nats_server: NatsServer) -> None:
    async with connected_bus(nats_server, ack_wait_s=1.0) as bus:
        # Where this machine stood still for so long that a report came too late, once more.
        for attempt in range(20):
            job_id = f"job-{attempt}"
            await add(bus, job_id)
            heard_s, silent_s = time.monotonic(), 0.0
            taken = await take(bus)
            others = []
            for _ in range(6):
                others.append(await bus.take(JOBS, 0.25))
                reported_s = time.monotonic()
                await taken.in_progress()
                silent_s, heard_s = max(silent_s, time.monotonic() - heard_s), reported_s
            for job in filter(None, (taken, *others)):
                await job.ack()
            assert not await bus.queued(JOBS, job_id)
            if silent_s < 0.9:
                assert others == [None] * 6
                break
        else:
            pytest.fail("this machine stands still too often")


async def test_what_cannot_be_done_leaves_the_queue(nats_server: NatsServer) -> None:
    async with connected_bus(nats_server) as bus:
        await add(bus, "a")
        taken = await take(bus)
        await taken.term()
        await taken.nak()
        assert await bus.queue_depth(JOBS) == 0
        assert await bus.take(JOBS, 0.05) is None


async def test_a_cancelled_taker_gives_back_what_it_was_handed(nats_server: NatsServer) -> None:
    async with connected_bus(nats_server) as bus:
        for round_number in range(20):
            job_id = f"job-{round_number}"
            waiting = asyncio.create_task(bus.take(JOBS, 60.0))
            await asyncio.sleep(0.005)
            adding = asyncio.create_task(add(bus, job_id))
            # Somewhere between before and after the job is on its way to the taker.
            await asyncio.sleep(0.0002 * round_number)
            waiting.cancel()
            await asyncio.wait({waiting})
            await adding
            again = await take(bus) if waiting.cancelled() else waiting.result()
            assert again is not None
            assert again.job_id == job_id
            await again.ack()


async def test_what_a_slow_broker_hands_to_one_taker_at_once_is_not_lost(
    nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("common.bus.queues._PULL_S", 0.1)
    monkeypatch.setattr("common.bus.queues._ANSWER_SLACK_S", 0.05)
    async with connected_bus(nats_server, ack_wait_s=600.0) as bus:
        await add(bus, "a", "b", "c", "d")
        nats_server.pause()
        taking = asyncio.create_task(take(bus))
        # It asks again and again, and all of it is answered together.
        await asyncio.sleep(1.0)
        nats_server.resume()
        taken = [await taking, *[await take(bus) for _ in range(3)]]
        assert sorted(job.job_id for job in taken) == ["a", "b", "c", "d"]


async def test_the_same_job_is_stored_once(nats_server: NatsServer) -> None:
    async with connected_bus(nats_server) as bus:
        assert await add(bus, "a", "a") == [True, False]
        assert await bus.queue_depth(JOBS) == 1
        await (await take(bus)).ack()
        assert await add(bus, "a") == [False]
        assert await bus.queue_depth(JOBS) == 0


async def test_a_full_queue_refuses_and_takes_again_when_there_is_room(nats_server: NatsServer) -> None:
    async with connected_bus(nats_server) as bus:
        await add(bus, "a", "b", "c", "d")
        with pytest.raises(QueueFull, match="4 jobs"):
            await add(bus, "e")
        await (await take(bus)).ack()
        assert await add(bus, "e") == [True]
        assert [(await take(bus)).job_id for _ in range(4)] == ["b", "c", "d", "e"]


async def test_a_removed_job_is_never_taken(nats_server: NatsServer) -> None:
    async with connected_bus(nats_server) as bus:
        await add(bus, "a", "b", "c")
        assert await bus.remove(JOBS, "b")
        assert not await bus.remove(JOBS, "b")
        assert [(await take(bus)).job_id for _ in range(2)] == ["a", "c"]


async def test_a_taken_job_can_be_removed_and_its_settling_is_harmless(nats_server: NatsServer) -> None:
    async with connected_bus(nats_server) as bus:
        await add(bus, "a")
        taken = await take(bus)
        assert await bus.remove(JOBS, "a")
        await taken.nak()
        assert await bus.take(JOBS, 0.05) is None


async def test_an_unreadable_job_is_removed_and_logged(nats_server: NatsServer) -> None:
    log = LogLines()
    async with connected_bus(nats_server, log=log) as bus:
        async with stranger(nats_server) as client:
            await client.jetstream(timeout=60).publish("test.jobs.bad", b"garbage")
        await add(bus, "good")
        assert (await take(bus)).job_id == "good"
        assert log.events == ["unreadable job removed"]
        # That it cannot be done was said, and not waited for.
        async with asyncio.timeout(60):
            while await bus.queue_depth(JOBS) != 1:  # noqa: ASYNC110 - the broker's own affair
                await asyncio.sleep(0.01)


async def test_a_queue_that_was_not_prepared_is_named(nats_server: NatsServer) -> None:
    unknown = WorkQueue("UNKNOWN", "test.unknown.{}", VideoQueued, max_messages=1)
    async with connected_bus(nats_server) as bus:
        with pytest.raises(NotPrepared, match="UNKNOWN"):
            await bus.queue_depth(unknown)

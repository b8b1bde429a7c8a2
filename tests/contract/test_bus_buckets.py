"""The bus's contract, part three: buckets and watches. Against a real broker."""

import asyncio

import pytest

from common.bus.errors import BadAddress, BadReply, KeyExists, KeyMissing, StorageFull, WrongRevision
from common.bus.port import CaughtUp, Change, Watch
from common.messages.cluster import Heartbeat
from common.messages.subjects import Bucket
from tests.support.bus import RECORDS, LogLines, connected_bus, eventually, life, stranger
from tests.support.nats_server import NatsServer


async def following(watch: Watch[Heartbeat], count: int) -> list[Change[Heartbeat] | CaughtUp]:
    """The next ``count`` things the watch sees."""
    async with asyncio.timeout(120):
        return [await anext(watch) for _ in range(count)]


async def test_a_key_lives_from_create_to_delete(nats_server: NatsServer) -> None:
    async with connected_bus(nats_server) as bus:
        with pytest.raises(KeyMissing, match="'a'"):
            await bus.get(RECORDS, "a")
        first = await bus.create(RECORDS, "a", life("a", "1"))
        with pytest.raises(KeyExists, match="'a'"):
            await bus.create(RECORDS, "a", life("a", "other"))
        second = await bus.replace(RECORDS, "a", life("a", "2"), first)
        assert second > first
        entry = await bus.get(RECORDS, "a")
        assert (entry.key, entry.value, entry.revision) == ("a", life("a", "2"), second)
        with pytest.raises(WrongRevision) as caught:
            await bus.replace(RECORDS, "a", life("a", "3"), first)
        assert (caught.value.key, caught.value.expected) == ("a", first)
        third = await bus.put(RECORDS, "a", life("a", "3"))
        with pytest.raises(WrongRevision):
            await bus.delete(RECORDS, "a", second)
        await bus.delete(RECORDS, "a", third)
        with pytest.raises(KeyMissing):
            await bus.get(RECORDS, "a")
        with pytest.raises(WrongRevision):
            await bus.replace(RECORDS, "a", life("a", "4"), third)
        await bus.delete(RECORDS, "a")


async def test_a_deleted_key_can_be_created_again(nats_server: NatsServer) -> None:
    async with connected_bus(nats_server) as bus:
        for incarnation in "123":
            await bus.create(RECORDS, "a", life("a", incarnation))
            assert (await bus.get(RECORDS, "a")).value == life("a", incarnation)
            await bus.delete(RECORDS, "a")


async def test_replacing_what_never_was_is_a_lost_race(nats_server: NatsServer) -> None:
    async with connected_bus(nats_server) as bus:
        with pytest.raises(WrongRevision):
            await bus.replace(RECORDS, "a", life("a"), 7)
        with pytest.raises(WrongRevision):
            await bus.replace(RECORDS, "a", life("a"), 0)
        with pytest.raises(KeyMissing):
            await bus.get(RECORDS, "a")


async def test_of_fifty_replacers_exactly_one_wins_each_revision(nats_server: NatsServer) -> None:
    async with connected_bus(nats_server) as one, connected_bus(nats_server) as two:
        revision = await one.create(RECORDS, "a", life("a", "start"))
        for _ in range(5):
            outcomes = await asyncio.gather(
                *((one, two)[i % 2].replace(RECORDS, "a", life("a", str(i)), revision) for i in range(50)),
                return_exceptions=True,
            )
            [winner] = [i for i, outcome in enumerate(outcomes) if isinstance(outcome, int)]
            assert all(isinstance(outcome, WrongRevision) for i, outcome in enumerate(outcomes) if i != winner)
            entry = await one.get(RECORDS, "a")
            assert (entry.value.incarnation, entry.revision) == (str(winner), outcomes[winner])
            revision = entry.revision


async def test_of_fifty_creators_exactly_one_wins(nats_server: NatsServer) -> None:
    async with connected_bus(nats_server) as bus:
        await bus.put(RECORDS, "a", life("a", "former"))
        await bus.delete(RECORDS, "a")
        outcomes = await asyncio.gather(
            *(bus.create(RECORDS, "a", life("a", str(i))) for i in range(50)), return_exceptions=True
        )
        [winner] = [i for i, outcome in enumerate(outcomes) if isinstance(outcome, int)]
        assert all(isinstance(outcome, KeyExists) for i, outcome in enumerate(outcomes) if i != winner)
        assert (await bus.get(RECORDS, "a")).value.incarnation == str(winner)


async def test_entries_and_keys_of_thousands(nats_server: NatsServer) -> None:
    async with connected_bus(nats_server) as bus:
        assert await bus.entries(RECORDS) == []
        assert await bus.keys(RECORDS) == []
        for start in range(0, 3000, 100):
            await asyncio.gather(*(bus.put(RECORDS, f"k.{i}", life(str(i))) for i in range(start, start + 100)))
        await bus.delete(RECORDS, "k.7")
        await bus.put(RECORDS, "k.8", life("again"))
        entries = await bus.entries(RECORDS)
        assert {entry.key: entry.value.instance for entry in entries} == {
            f"k.{i}": "again" if i == 8 else str(i) for i in range(3000) if i != 7
        }
        assert [entry.revision for entry in entries] == sorted(entry.revision for entry in entries)
        assert await bus.keys(RECORDS) == [entry.key for entry in entries]
        assert entries[-1].key == "k.8"


@pytest.mark.parametrize("key", ["", "a b", "*", ">", "a.", ".a", "a..b", "a\r\nb"])
async def test_a_bad_key_is_refused(nats_server: NatsServer, key: str) -> None:
    async with connected_bus(nats_server) as bus:
        with pytest.raises(BadAddress):
            await bus.put(RECORDS, key, life("a"))


async def test_a_value_that_is_no_message_is_named(nats_server: NatsServer) -> None:
    log = LogLines()
    async with connected_bus(nats_server, log=log) as bus:
        async with stranger(nats_server) as other_client:
            await other_client.jetstream(timeout=60).publish("$KV.test_records.bad", b"garbage")
        await bus.put(RECORDS, "good", life("good"))
        with pytest.raises(BadReply, match="test_records, key bad"):
            await bus.get(RECORDS, "bad")
        assert [entry.key for entry in await bus.entries(RECORDS)] == ["good"]
        assert log.events == ["unreadable value left out"]


async def test_a_full_bucket_refuses(nats_server: NatsServer) -> None:
    small = Bucket("small", Heartbeat, max_bytes=2000)
    async with connected_bus(nats_server) as bus:
        await bus.prepare(buckets=[small])
        await bus.put(small, "a", life("a" * 500))
        with pytest.raises(StorageFull, match="small"):
            await bus.put(small, "b", life("b" * 1800))
        assert await bus.keys(small) == ["a"]


async def test_a_watch_shows_what_is_there_then_what_happens(nats_server: NatsServer) -> None:
    async with connected_bus(nats_server) as watcher, connected_bus(nats_server) as writer:
        first = await writer.put(RECORDS, "a", life("a"))
        second = await writer.put(RECORDS, "b", life("b"))
        await writer.put(RECORDS, "gone", life("gone"))
        await writer.delete(RECORDS, "gone")
        async with watcher.watch(RECORDS) as watch:
            assert await following(watch, 3) == [
                Change("a", life("a"), first),
                Change("b", life("b"), second),
                CaughtUp(),
            ]
            third = await writer.replace(RECORDS, "a", life("a", "2"), first)
            await writer.delete(RECORDS, "b")
            assert await following(watch, 2) == [Change("a", life("a", "2"), third), Change("b", None, third + 1)]
            # Written before the deletion was seen, it might be all that is seen of the two.
            fourth = await writer.create(RECORDS, "b", life("b", "2"))
            assert await following(watch, 1) == [Change("b", life("b", "2"), fourth)]


async def test_a_watch_of_an_empty_bucket_has_caught_up_at_once(nats_server: NatsServer) -> None:
    async with connected_bus(nats_server) as bus, bus.watch(RECORDS) as watch:
        assert await following(watch, 1) == [CaughtUp()]
        await bus.create(RECORDS, "a", life("a"))
        assert await following(watch, 1) == [Change("a", life("a"), 1)]


async def test_a_watch_of_one_key_sees_no_other(nats_server: NatsServer) -> None:
    async with connected_bus(nats_server) as bus:
        await bus.put(RECORDS, "a", life("a"))
        async with bus.watch(RECORDS, "b") as watch:
            assert await following(watch, 1) == [CaughtUp()]
            await bus.put(RECORDS, "a", life("a", "2"))
            revision = await bus.create(RECORDS, "b", life("b"))
            assert await following(watch, 1) == [Change("b", life("b"), revision)]


async def test_a_watch_of_thousands_misses_none(nats_server: NatsServer) -> None:
    async with connected_bus(nats_server) as watcher, connected_bus(nats_server) as writer:
        for start in range(0, 1000, 100):
            await asyncio.gather(*(writer.put(RECORDS, f"k{i}", life(str(i))) for i in range(start, start + 100)))
        async with watcher.watch(RECORDS) as watch:
            writing = asyncio.create_task(_write(writer.create(RECORDS, f"n{i}", life(str(i))) for i in range(1000)))
            seen = await following(watch, 2001)
            await writing
            assert CaughtUp() in seen
            keys = [change.key for change in seen if isinstance(change, Change)]
            assert sorted(keys) == sorted([f"k{i}" for i in range(1000)] + [f"n{i}" for i in range(1000)])


async def _write(creates: object) -> None:
    for create in creates:  # type: ignore[attr-defined]
        await create


async def test_a_stopped_watch_ends_and_leaves_nothing_at_the_broker(nats_server: NatsServer) -> None:
    async with connected_bus(nats_server) as bus:
        watch = bus.watch(RECORDS)
        assert await following(watch, 1) == [CaughtUp()]
        await watch.stop()
        with pytest.raises(StopAsyncIteration):
            await anext(watch)
        await bus.entries(RECORDS)
        consumers = ["unknown"]
        async with stranger(nats_server) as other_client, asyncio.timeout(60):
            while consumers:
                stream = other_client.jetstream(timeout=60)
                consumers = [info.name for info in await stream.consumers_info("KV_test_records")]


async def test_a_watch_ends_with_its_bus(nats_server: NatsServer) -> None:
    seen: list[object] = []

    async with connected_bus(nats_server) as bus:

        async def watching() -> None:
            async for change in bus.watch(RECORDS):
                seen.append(change)

        task = asyncio.create_task(watching())
        await eventually(lambda: seen)
    await asyncio.wait_for(task, 60)

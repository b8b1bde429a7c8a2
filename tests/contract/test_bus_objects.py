"""The bus's contract, part four: finished files. Against a real broker."""

import asyncio
import hashlib
import random
from collections.abc import AsyncIterator

import pytest

from common.bus.errors import BadAddress, ObjectDamaged, ObjectMissing, StorageFull
from common.bus.nats_bus import NatsBus
from common.messages.subjects import ObjectBucket
from tests.support.bus import FILES, connected_bus, stranger
from tests.support.nats_server import NatsServer


def content(size_bytes: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size_bytes)


async def read(bus: NatsBus, name: str) -> bytes:
    return b"".join([chunk async for chunk in bus.get_object(FILES, name)])


async def in_pieces(data: bytes, piece_bytes: int) -> AsyncIterator[bytes]:
    for start in range(0, len(data), piece_bytes):
        yield data[start : start + piece_bytes]
        await asyncio.sleep(0)


async def stored_bytes(server: NatsServer) -> int:
    async with stranger(server) as client:
        return (await client.jetstream(timeout=60).stream_info("OBJ_test_files")).state.bytes


async def settled_bytes(server: NatsServer, at_most: int) -> int:
    """What lies in the store once clean-up has brought it down to ``at_most``."""
    async with asyncio.timeout(60):
        while True:
            if (there := await stored_bytes(server)) <= at_most:
                return there
            await asyncio.sleep(0.02)


@pytest.mark.parametrize("piece_bytes", [1000, 256 * 1024, 3_000_000])
async def test_a_file_of_megabytes_comes_back_as_it_was(nats_server: NatsServer, piece_bytes: int) -> None:
    data = content(7_654_321)
    async with connected_bus(nats_server) as writer, connected_bus(nats_server) as reader:
        info = await writer.put_object(FILES, "clip.mp4", in_pieces(data, piece_bytes))
        assert info.sha256 == hashlib.sha256(data).hexdigest()
        assert info.size_bytes == len(data)
        assert await reader.object_info(FILES, "clip.mp4") == info
        assert await read(reader, "clip.mp4") == data


@pytest.mark.parametrize("size_bytes", [0, 1, 256 * 1024, 256 * 1024 + 1])
async def test_sizes_at_the_edges(nats_server: NatsServer, size_bytes: int) -> None:
    data = content(size_bytes)
    async with connected_bus(nats_server) as bus:
        info = await bus.put_object(FILES, "näme with spaces/*.mp4", data)
        assert info.size_bytes == size_bytes
        assert await read(bus, "näme with spaces/*.mp4") == data


async def test_what_others_wrote_with_the_broker_s_own_client_can_be_read(nats_server: NatsServer) -> None:
    data = content(1_000_000)
    async with connected_bus(nats_server) as bus, stranger(nats_server) as client:
        store = await client.jetstream(timeout=60).object_store("test_files")
        await store.put("theirs", data)
        assert await read(bus, "theirs") == data
        await bus.put_object(FILES, "ours", data)
        assert (await store.get("ours")).data == data


async def test_a_missing_object_is_named(nats_server: NatsServer) -> None:
    async with connected_bus(nats_server) as bus:
        with pytest.raises(ObjectMissing, match=r"'absent\.mp4'"):
            await read(bus, "absent.mp4")
        with pytest.raises(ObjectMissing):
            await bus.object_info(FILES, "absent.mp4")
        with pytest.raises(ObjectMissing):
            await bus.delete_object(FILES, "absent.mp4")
        with pytest.raises(BadAddress):
            await bus.put_object(FILES, "", b"data")


async def test_a_deleted_object_is_gone_with_its_bytes_and_its_name_can_be_used_again(
    nats_server: NatsServer,
) -> None:
    async with connected_bus(nats_server) as bus:
        await bus.put_object(FILES, "a", content(2_000_000))
        await bus.delete_object(FILES, "a")
        with pytest.raises(ObjectMissing):
            await read(bus, "a")
        assert await stored_bytes(nats_server) < 1000
        await bus.put_object(FILES, "a", b"new")
        assert await read(bus, "a") == b"new"


async def test_a_replaced_object_gives_its_room_back(nats_server: NatsServer) -> None:
    async with connected_bus(nats_server) as bus:
        for seed in range(3):
            await bus.put_object(FILES, "a", content(2_000_000, seed))
        assert await read(bus, "a") == content(2_000_000, 2)
        assert await settled_bytes(nats_server, 2_100_000) > 2_000_000


async def test_writers_at_once_leave_one_whole_object(nats_server: NatsServer) -> None:
    async with connected_bus(nats_server) as one, connected_bus(nats_server) as two:
        versions = [content(600_000, seed) for seed in range(6)]
        await asyncio.gather(*((one, two)[i % 2].put_object(FILES, "a", version) for i, version in enumerate(versions)))
        assert await read(one, "a") in versions
        await settled_bytes(nats_server, 700_000)


async def test_a_failed_put_leaves_the_former_object_and_no_bytes(nats_server: NatsServer) -> None:
    async def breaking() -> AsyncIterator[bytes]:
        yield content(3_000_000)
        raise LookupError("the decoder broke")

    async with connected_bus(nats_server) as bus:
        await bus.put_object(FILES, "a", b"former")
        with pytest.raises(LookupError, match="the decoder broke"):
            await bus.put_object(FILES, "a", breaking())
        assert await read(bus, "a") == b"former"
        await settled_bytes(nats_server, 1000)


async def test_a_cancelled_put_leaves_nothing(nats_server: NatsServer) -> None:
    sent = asyncio.Event()

    async def endless() -> AsyncIterator[bytes]:
        yield content(3_000_000)
        sent.set()
        await asyncio.Event().wait()

    async with connected_bus(nats_server) as bus:
        putting = asyncio.create_task(bus.put_object(FILES, "a", endless()))
        await sent.wait()
        putting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await putting
        with pytest.raises(ObjectMissing):
            await bus.object_info(FILES, "a")
        await settled_bytes(nats_server, 0)


async def test_a_full_store_refuses_and_keeps_nothing_of_it(nats_server: NatsServer) -> None:
    small = ObjectBucket("small", max_bytes=1_000_000)
    async with connected_bus(nats_server) as bus:
        await bus.prepare(object_buckets=[small])
        with pytest.raises(StorageFull, match="small"):
            await bus.put_object(small, "a", content(2_000_000))
        with pytest.raises(ObjectMissing):
            await bus.object_info(small, "a")
        # Room again as soon as the refused one's chunks are removed.
        async with asyncio.timeout(60):
            while True:
                try:
                    await bus.put_object(small, "b", content(700_000))
                    break
                except StorageFull:
                    await asyncio.sleep(0.02)


async def test_an_object_that_lost_bytes_is_not_taken_for_whole(nats_server: NatsServer) -> None:
    async with connected_bus(nats_server) as bus:
        await bus.put_object(FILES, "a", content(2_000_000))
        async with stranger(nats_server) as client:
            await client.jetstream(timeout=60).delete_msg("OBJ_test_files", 3)
        with pytest.raises(ObjectDamaged):
            await read(bus, "a")


async def test_reading_may_end_early(nats_server: NatsServer) -> None:
    data = content(5_000_000)
    async with connected_bus(nats_server) as bus:
        await bus.put_object(FILES, "a", data)
        chunks = bus.get_object(FILES, "a")
        first = await anext(chunks)
        await chunks.aclose()
        assert data.startswith(first)
        assert await read(bus, "a") == data

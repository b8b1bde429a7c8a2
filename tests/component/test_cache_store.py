"""The cache store over real NATS, UCX and files: the newest version stays, the rest goes in order, damage is found."""

import asyncio
import contextlib
import os
import random
import sys
from pathlib import Path

import pytest
import torch

from common.bus.errors import RemoteFailure
from common.messages.cache import StoreTensor
from common.messages.subjects import STORE_TENSOR
from common.messages.tensors import TensorRef
from tests.support.cache_store import WAIT_S, CacheClient, cache_client, running_store
from tests.support.nats_server import NatsServer
from tests.support.tensor_peer import patterned, same_bytes

KB = 1024


def files(folder: Path) -> list[Path]:
    return sorted((folder / "cache_store-0").iterdir())


async def loads(client: CacheClient, key: str, version: int, tensor: torch.Tensor) -> bool:
    """Whether exactly this is kept under the key."""
    loaded = await client.load(key)
    return loaded is not None and loaded[0] == version and same_bytes(loaded[1], tensor)


async def test_the_newest_version_is_kept_and_no_older_one_replaces_it(nats_server: NatsServer, tmp_path: Path) -> None:
    url = nats_server.url
    async with cache_client(url) as client, running_store(client, url, tmp_path):
        assert (await client.find("a")).tensor_version is None
        for offered, stored, kept in ((3, True, 3), (2, False, 3), (3, False, 3), (7, True, 7), (5, False, 7)):
            answer = await client.store("a", offered, patterned((8, KB), seed=offered))
            assert (answer.stored, answer.tensor_version) == (stored, kept)
        assert await loads(client, "a", 7, patterned((8, KB), seed=7))
        assert await client.version("a") == 7
        versions = random.Random(1).sample(range(1, 25), 24)
        await asyncio.gather(*(client.store("b", each, patterned((KB,), seed=each)) for each in versions))
        assert await loads(client, "b", 24, patterned((KB,), seed=24))
        assert len(files(tmp_path)) == 2


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((), torch.float32),
        ((0,), torch.int64),
        ((3, 5, 7), torch.bfloat16),
        ((2, 3), torch.bool),
        ((9,), torch.complex64),
    ],
    ids=str,
)
async def test_every_kind_of_tensor_comes_back_from_disk_as_it_was(
    nats_server: NatsServer, tmp_path: Path, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    tensor = patterned(shape, dtype, seed=3)
    url = nats_server.url
    async with cache_client(url) as client, running_store(client, url, tmp_path, memory_bytes=0):
        await client.store("odd", 1, tensor)
        assert await loads(client, "odd", 1, tensor)


async def test_the_least_recently_used_goes_from_memory_then_from_disk(nats_server: NatsServer, tmp_path: Path) -> None:
    url, size = nats_server.url, 4 * KB
    tensors = {f"t{number}": patterned((size,), seed=number) for number in range(6)}
    async with (
        cache_client(url) as client,
        running_store(client, url, tmp_path, memory_bytes=2 * size, disk_bytes=4 * size),
    ):
        for key in ("t0", "t1", "t2", "t3"):
            await client.store(key, 1, tensors[key])
        # Memory has the last two; all four are found.
        for key in ("t1", "t2", "t3", "t0"):
            assert await loads(client, key, 1, tensors[key])
        await client.store("t4", 1, tensors["t4"], pin_s=WAIT_S)
        # t1 was not asked for since.
        assert [await client.version(key) for key in tensors] == [1, None, 1, 1, 1, None]
        await client.store("t5", 1, tensors["t5"])
        assert await loads(client, "t4", 1, tensors["t4"])
        assert len(files(tmp_path)) == 4


async def test_what_is_pinned_stays_and_what_then_does_not_fit_is_refused(nats_server: NatsServer) -> None:
    url, size = nats_server.url, 4 * KB
    async with cache_client(url) as client, running_store(client, url, None, memory_bytes=2 * size):
        await client.store("pinned", 1, patterned((size,), seed=1), pin_s=WAIT_S)
        await client.store("briefly", 1, patterned((size,), seed=2), pin_s=WAIT_S)
        with pytest.raises(RemoteFailure) as refused:
            await client.store("third", 1, patterned((size,), seed=3))
        assert (refused.value.failure.code, refused.value.failure.retryable) == ("store_full", True)
        await client.store("briefly", 2, patterned((size,), seed=2), pin_s=0.3)
        async with asyncio.timeout(WAIT_S):
            while True:
                with contextlib.suppress(RemoteFailure):
                    await client.store("third", 1, patterned((size,), seed=3))
                    break
                await asyncio.sleep(0.05)
        assert [await client.version(key) for key in ("pinned", "briefly", "third")] == [1, None, 1]


async def test_a_tensor_that_cannot_be_fetched_changes_nothing(nats_server: NatsServer, tmp_path: Path) -> None:
    url = nats_server.url
    async with cache_client(url) as client, running_store(client, url, tmp_path):
        await client.store("a", 1, patterned((KB,), seed=1))
        gone = TensorRef(
            owner="asker", tensor_id=1, address=client.tensors.address, shape=(KB,), dtype="uint8", size_bytes=KB
        )
        with pytest.raises(RemoteFailure) as refused:
            await client.bus.request(
                STORE_TENSOR, StoreTensor(key="a", tensor_version=2, tensor=gone), deadline_s=WAIT_S
            )
        assert refused.value.failure.code == "tensor_not_fetched"
        assert await loads(client, "a", 1, patterned((KB,), seed=1))


async def test_dropping_forgets_on_disk_too(nats_server: NatsServer, tmp_path: Path) -> None:
    url = nats_server.url
    async with cache_client(url) as client:
        async with running_store(client, url, tmp_path):
            await client.store("a", 1, patterned((KB,)))
            await client.store("b", 1, patterned((KB,)))
            await client.drop("a")
            await client.drop("a")
            assert await client.version("a") is None
        async with running_store(client, url, tmp_path):
            assert [await client.version(key) for key in ("a", "b")] == [None, 1]


async def test_damaged_files_are_dropped_and_the_others_stay(
    nats_server: NatsServer, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    url = nats_server.url
    async with cache_client(url) as client:
        async with running_store(client, url, tmp_path):
            places = {}
            for key in ("whole", "bytes", "header", "cut", "moved"):
                before = set(files(tmp_path)) if places else set()
                await client.store(key, 1, patterned((4 * KB,), seed=5))
                (places[key],) = set(files(tmp_path)) - before
        flipped = bytearray(places["bytes"].read_bytes())
        flipped[-1] ^= 1
        places["bytes"].write_bytes(flipped)
        places["header"].write_bytes(places["header"].read_bytes().replace(b'"version": 1', b'"version": 9'))
        places["cut"].write_bytes(places["cut"].read_bytes()[:-1])
        places["moved"].rename(places["moved"].with_stem("0" * 40))
        (places["whole"].parent / "half.part").write_bytes(b"triptych")
        (places["whole"].parent / "foreign.tensor").write_bytes(b"something else")
        async with running_store(client, url, tmp_path):
            assert set(files(tmp_path)) == {places["whole"], places["bytes"]}
            assert [await client.version(key) for key in ("header", "cut", "moved")] == [None] * 3
            assert await loads(client, "whole", 1, patterned((4 * KB,), seed=5))
            assert await client.load("bytes") is None
            assert await client.version("bytes") is None
            assert files(tmp_path) == [places["whole"]]
            # Any version is newer than none.
            assert (await client.store("bytes", 1, patterned((4 * KB,), seed=6))).stored
            assert await loads(client, "bytes", 1, patterned((4 * KB,), seed=6))
    assert capfd.readouterr().out.count("damaged tensor dropped") == 5


async def test_a_killed_cache_store_comes_back_with_all_it_had(nats_server: NatsServer, tmp_path: Path) -> None:
    environment = os.environ | {
        "TRIPTYCH_NATS_URL": nats_server.url,
        "TRIPTYCH_INSTANCE": "cache_store-0",
        "TRIPTYCH_CACHE_DIR": str(tmp_path),
    }
    command = (sys.executable, "-m", "services.cache_store")
    tensors = {f"video/{number}/latent": patterned((number + 1, KB), seed=number) for number in range(5)}
    async with cache_client(nats_server.url) as client:
        process = await asyncio.create_subprocess_exec(*command, env=environment)
        try:
            await client.answered()
            for version, (key, tensor) in enumerate(tensors.items(), 1):
                await client.store(key, version, tensor)
            process.kill()
            await process.wait()
            process = await asyncio.create_subprocess_exec(*command, env=environment)
            await client.answered()
            for version, (key, tensor) in enumerate(tensors.items(), 1):
                assert await loads(client, key, version, tensor)
                assert not (await client.store(key, version - 1, tensor)).stored
            process.terminate()
            assert await asyncio.wait_for(process.wait(), WAIT_S) == 0
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()

"""Two cache stores are copies of each other: over real NATS, UCX and files, whichever is asked, away, or back again."""

import asyncio
import contextlib
import os
import random
import signal
import time
import zlib
from pathlib import Path

import pytest
import torch

from common.bus.errors import BusError, DeadlineExceeded, NobodyThere, RemoteFailure
from common.mempool.store_client import StoreClient, prefix_keys
from common.messages.cache import (
    AskDigests,
    BucketListed,
    CopyTensor,
    Digests,
    FindTensors,
    ListBucket,
    TensorStored,
)
from common.messages.subjects import ASK_DIGESTS, COPY_TENSOR, FIND_TENSORS, LIST_BUCKET, MEMBERS
from common.tensors.errors import TensorError, TensorUnknown
from services.cache_store.catalogue import BUCKETS
from services.cache_store.replica import Replica
from services.cache_store.store import TensorStore
from tests.support.bus import eventually
from tests.support.cache_store import WAIT_S, CacheClient, cache_client, running_store
from tests.support.nats_server import NatsServer
from tests.support.processes import Processes
from tests.support.tensor_peer import patterned, same_bytes

KB = 1024
FIRST, SECOND = "cache_store-0", "cache_store-1"
KILLS = int(os.environ.get("TRIPTYCH_TEST_KILLS", "4"))
SEED = int(os.environ["TRIPTYCH_TEST_SEED"])


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A store answers another, or whoever asks it, however slow this machine is just now."""
    for wait in ("ASK_DEADLINE_S", "FIND_DEADLINE_S"):
        monkeypatch.setattr(f"services.cache_store.replication.{wait}", WAIT_S)
    for wait in ("COPY_DEADLINE_S", "COMPARE_DEADLINE_S"):
        monkeypatch.setattr(f"services.cache_store.replica.{wait}", WAIT_S)
    monkeypatch.setattr("common.mempool.store_client.CONTROL_DEADLINE_S", WAIT_S)


def tensor(key: str, version: int) -> torch.Tensor:
    return patterned((2, KB), seed=zlib.crc32(f"{key} {version}".encode()))


async def store_all(client: CacheClient, **versions: int) -> None:
    for key, version in versions.items():
        await client.store(key, version, tensor(key, version), copies=2)


async def has_all(client: CacheClient, instance: str, versions: dict[str, int]) -> None:
    """Looks whether one store has exactly these, every byte of them."""
    assert await client.versions_at(instance) == versions
    for key, version in versions.items():
        assert same_bytes(await client.load_from(instance, key), tensor(key, version))


async def test_what_is_put_into_either_lies_in_both(
    nats_server: NatsServer, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    url = nats_server.url
    versions = {f"key{number}": number % 3 + 1 for number in range(12)}
    async with cache_client(url) as client, running_store(client, url, tmp_path):
        async with running_store(client, url, tmp_path, instance=SECOND):
            # The second one knows of the first from its start on, the first one a moment after that.
            await until_logged(capfd, f"other={SECOND}")
            for key, version in versions.items():
                for each in range(version + 1):
                    # Whoever is asked next answers with nothing older.
                    await client.store(key, each, tensor(key, each))
                    assert (await client.find(key)).tensor_version == each
            assert await client.agreed(FIRST, SECOND) == versions
            await has_all(client, FIRST, versions)
            await has_all(client, SECOND, versions)
            for key in list(versions)[::2]:
                await client.drop(key)
                del versions[key]
            assert await client.agreed(FIRST, SECOND) == versions
        # The one that is left has it all.
        assert {key: await client.version(key) for key in versions} == versions


async def test_a_store_that_was_away_is_brought_up_to_date(
    nats_server: NatsServer, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    url = nats_server.url
    async with cache_client(url) as client, running_store(client, url, tmp_path):
        async with running_store(client, url, tmp_path, instance=SECOND):
            await store_all(client, **{f"same{number}": 1 for number in range(20)}, newer=1, gone=1)
            await client.agreed(FIRST, SECOND)
        await store_all(client, newer=2, new=1)
        await client.drop("gone")
        capfd.readouterr()
        async with running_store(client, url, tmp_path, instance=SECOND):
            # As soon as it answers, and before it has been told anything.
            for _ in range(20):
                assert [await client.version(key) for key in ("newer", "new")] == [2, 1]
            versions = {f"same{number}": 1 for number in range(20)} | {"newer": 2, "new": 1}
            assert await client.agreed(FIRST, SECOND) == versions
            await has_all(client, SECOND, versions)
            await until_logged(capfd, "copied=2")


async def until_logged(capfd: pytest.CaptureFixture[str], text: str) -> None:
    """Return once something was logged; what was copied must not have been more."""
    said = ""
    async with asyncio.timeout(WAIT_S):
        while text not in (said := said + capfd.readouterr().out):  # noqa: ASYNC110 - a log has no event
            await asyncio.sleep(0.02)


async def test_an_empty_store_gets_everything_and_what_was_dropped_stays_so(
    nats_server: NatsServer, tmp_path: Path
) -> None:
    url = nats_server.url
    async with cache_client(url) as client:
        async with running_store(client, url, tmp_path), running_store(client, url, tmp_path, instance=SECOND):
            await store_all(client, a=3, b=5, c=7)
            await client.agreed(FIRST, SECOND)
        async with running_store(client, url, tmp_path):
            await client.drop("b")
        # The one that knows of the drop has had another life since, and the other one has had none.
        async with running_store(client, url, tmp_path), running_store(client, url, tmp_path, instance=SECOND):
            assert await client.agreed(FIRST, SECOND) == {"a": 3, "c": 7}
            # What is stored after a drop stays.
            await store_all(client, b=2)
            assert await client.agreed(FIRST, SECOND) == {"a": 3, "b": 2, "c": 7}
        async with (
            running_store(client, url, tmp_path / "elsewhere"),
            running_store(client, url, tmp_path, instance=SECOND),
        ):
            await client.agreed(FIRST, SECOND)
            await has_all(client, FIRST, {"a": 3, "b": 2, "c": 7})


async def test_what_was_missed_evicts_nothing_unless_it_is_pinned(nats_server: NatsServer) -> None:
    url, size = nats_server.url, 2 * KB
    async with cache_client(url) as client, running_store(client, url, None):
        for number in range(4):
            await client.store(f"old{number}", 1, tensor(f"old{number}", 1))
        await client.store("pinned", 1, tensor("pinned", 1), pin_s=60.0)
        async with running_store(client, url, None, memory_bytes=3 * size, instance=SECOND):
            async with asyncio.timeout(WAIT_S):
                while "pinned" not in await client.versions_at(SECOND):  # noqa: ASYNC110
                    await asyncio.sleep(0.02)
            await client.store("fresh", 1, tensor("fresh", 1))
            kept: dict[str, int] = {}
            async with asyncio.timeout(WAIT_S):
                while "fresh" not in kept or len(kept) < 3:
                    kept = await client.versions_at(SECOND)
            # Bucket by bucket: what was evicted meanwhile may have been listed before.
            kept = await client.versions_at(SECOND)
            assert {"pinned", "fresh"} < set(kept) and len(kept) == 3


async def test_batches_of_blocks_go_to_both_and_are_found_wherever_they_are(
    nats_server: NatsServer, tmp_path: Path
) -> None:
    url = nats_server.url
    keys = prefix_keys("kv/small", bytes(range(256)) * 2)
    assert len(set(keys)) == 8 and keys[:4] == prefix_keys("kv/small", bytes(range(256)))
    assert not set(keys) & set(prefix_keys("kv/other", bytes(range(256)) * 2))
    checksums = list(range(8))
    blocks = torch.stack([patterned((4, KB), torch.bfloat16, seed=number) for number in range(8)])
    async with cache_client(url) as client, running_store(client, url, tmp_path):
        blocks_at = StoreClient(client.bus, client.tensors)
        assert await blocks_at.put(keys[:3], blocks[:3], checksums[:3]) == 3
        with pytest.raises(BusError, match="3 keys, 2 checksums"):
            await blocks_at.put(keys[:3], blocks[:3], checksums[:2])
        async with running_store(client, url, None, instance=SECOND):
            await client.agreed(FIRST, SECOND)
            assert await blocks_at.put(keys[2:6], blocks[2:6], checksums[2:6]) == 3
            assert await blocks_at.have_many(keys) == [True] * 6 + [False] * 2
            assert await found(blocks_at, client, keys, blocks) == checksums[:6]
            assert await found(blocks_at, client, ["nothing", *keys], blocks) == []
            await client.agreed(FIRST, SECOND)
            await blocks_at.delete(keys[:2])
            assert sorted(await client.agreed(FIRST, SECOND)) == sorted(keys[2:6])
        await client.store("other", 0, torch.zeros(3))
        with pytest.raises(BusError, match="another shape"):
            await found(blocks_at, client, [keys[2], "other"], blocks)
        assert await found(blocks_at, client, keys[2:6], blocks[2:], most_bytes=2 * blocks[0].nbytes) == [2, 3]
        assert client.tensors.exported_count == 0


async def test_what_was_found_for_who_has_given_up_is_not_kept_for_long(nats_server: NatsServer) -> None:
    blocks = torch.stack([patterned((KB,), seed=number) for number in range(4)])
    keys = prefix_keys("kv", bytes(256))
    async with cache_client(nats_server.url) as client, running_store(client, nats_server.url, None):
        blocks_at = StoreClient(client.bus, client.tensors)
        await blocks_at.put(keys, blocks)
        asked = FindTensors(keys=tuple(keys), most_bytes=1 << 20, leading=True, wait_s=0.01)
        (part,) = (await client.bus.request(FIND_TENSORS, asked, deadline_s=WAIT_S)).parts
        await asyncio.sleep(1.5)
        with pytest.raises(TensorUnknown):
            await client.tensors.fetch(part.tensor, deadline_s=WAIT_S)
        assert await found(blocks_at, client, keys, blocks) == [None] * 4


async def found(
    blocks_at: StoreClient, client: CacheClient, keys: list[str], blocks: torch.Tensor, most_bytes: int = 1 << 20
) -> list[int | None]:
    """The checksums of what is found; looks whether these are the first of the blocks."""
    said: list[int | None] = []
    for ref, checksums in await blocks_at.find(keys, most_bytes, WAIT_S):
        part = await client.tensors.fetch(ref, deadline_s=WAIT_S)
        assert same_bytes(part, blocks[len(said) : len(said) + len(part)])
        said += checksums
    return said


async def test_of_a_prefix_the_end_is_evicted_first_whoever_had_used_it(nats_server: NatsServer) -> None:
    url = nats_server.url
    blocks = torch.stack([patterned((KB,), seed=number) for number in range(4)])
    one, other = (prefix_keys(name, bytes(256)) for name in ("one", "other"))
    async with cache_client(url) as client, running_store(client, url, None, memory_bytes=6 * blocks[0].nbytes):
        blocks_at = StoreClient(client.bus, client.tensors)
        await blocks_at.put(one, blocks)
        await blocks_at.put(other, blocks)
        assert await blocks_at.have_many(one) == [True] * 2 + [False] * 2
        # Asked for last; and again there is room for two less.
        await blocks_at.put(prefix_keys("new", bytes(128)), blocks[:2])
        assert await blocks_at.have_many(one) == [True] * 2 + [False] * 2
        assert await blocks_at.have_many(other) == [True] * 2 + [False] * 2


async def test_what_two_stores_have_of_a_prefix_is_put_together(nats_server: NatsServer) -> None:
    url = nats_server.url
    blocks = torch.stack([patterned((KB,), seed=number) for number in range(4)])
    keys = prefix_keys("kv", bytes(256))
    size = blocks[0].nbytes
    async with cache_client(url) as client, running_store(client, url, None):
        blocks_at = StoreClient(client.bus, client.tensors)
        await blocks_at.put(keys, blocks)
        # It has room for some of them only.
        async with running_store(client, url, None, memory_bytes=2 * size, instance=SECOND):
            async with asyncio.timeout(WAIT_S):
                while len(await client.versions_at(SECOND)) < 2:  # noqa: ASYNC110
                    await asyncio.sleep(0.02)
            for _ in range(6):
                said = await found(blocks_at, client, keys, blocks)
                assert len(said) == 4
        assert client.tensors.exported_count == 0


async def test_what_changes_while_a_store_that_failed_is_compared_is_told_to_it(nats_server: NatsServer) -> None:
    """The other one is played: it answers only once it has been asked in vain."""
    copied: list[str] = []
    async with cache_client(nats_server.url) as client:
        store = TensorStore(1 << 20, None, time.time)
        replica = Replica(client.bus, client.tensors, store, SECOND)
        await store.put("early", 1, tensor("early", 1))

        async def digests(_: AskDigests) -> Digests:
            return Digests(digests=(0,) * BUCKETS)

        async def listed(_: ListBucket) -> BucketListed:
            if await store.put("late", 1, tensor("late", 1)):
                replica.changed("late")
            return BucketListed(versions={})

        async def copy(asked: CopyTensor) -> TensorStored:
            copied.append(asked.key)
            return TensorStored(key=asked.key, tensor_version=asked.tensor_version, stored=True)

        async with asyncio.TaskGroup() as tasks:
            running = tasks.create_task(replica.run())
            await eventually(lambda: replica.failing)
            await client.bus.serve(COPY_TENSOR, copy, SECOND)
            await client.bus.serve(LIST_BUCKET, listed, SECOND)
            await client.bus.serve(ASK_DIGESTS, digests, SECOND)
            await eventually(lambda: set(copied) == {"early", "late"})
            running.cancel()


async def test_nothing_that_two_stores_have_is_lost_with_either_of_them(
    nats_server: NatsServer, tmp_path: Path
) -> None:
    """Either is killed, or stopped for a while, at random moments, while versions are stored and keys dropped."""
    chance = random.Random(SEED)
    async with cache_client(nats_server.url) as client:
        await client.bus.prepare(buckets=(MEMBERS,))
        processes = Processes(nats_server, client.bus, tmp_path, tmp_path)
        async with processes.running(), asyncio.TaskGroup() as tasks:
            for instance in (FIRST, SECOND):
                await processes.start(instance)
            await processes.ready(FIRST, SECOND)
            writer = Writer(client, chance)
            writing = tasks.create_task(writer.run())
            for _ in range(KILLS):
                victim = chance.choice((FIRST, SECOND))
                await asyncio.sleep(chance.random())
                if chance.random() < 0.3:
                    processes.signal(victim, signal.SIGSTOP)
                    await asyncio.sleep(chance.random() * 2)
                    processes.signal(victim, signal.SIGCONT)
                else:
                    await processes.kill(victim)
                    await asyncio.sleep(chance.random() * 0.5)
                    await processes.start(victim)
                    await processes.ready(victim)
                # Only of one at a time is it promised that nothing is lost.
                async with writer.still:
                    kept = await client.agreed(FIRST, SECOND)
                    assert not writer.dropped & set(kept), f"seed {SEED}"
            await eventually(lambda: writer.looked > 5 * KILLS, WAIT_S)
            writing.cancel()


class Writer:
    """Stores ever newer versions of a few keys, drops some, and looks whether what is found is as new as it must be."""

    def __init__(self, client: CacheClient, chance: random.Random) -> None:
        self._client = client
        self._chance = chance
        self._keys = 0
        # By key, the version that was offered last, and the one that lies in both stores for certain.
        self._offered: dict[str, int] = {}
        self._certain: dict[str, int] = {}
        self.dropped: set[str] = set()
        self.looked = 0
        self.still = asyncio.Lock()

    async def run(self) -> None:
        while True:
            async with self.still:
                # Whoever is asked may die over it; what it has done then is not known.
                with contextlib.suppress(DeadlineExceeded, NobodyThere, RemoteFailure, TensorError):
                    await self._chance.choice((self._store, self._store, self._look, self._drop))()
            await asyncio.sleep(0.002)

    def _key(self) -> str:
        if len(self._offered) < 6:
            self._keys += 1
            self._offered[f"key{self._keys}"] = 0
        return self._chance.choice(list(self._offered))

    async def _store(self) -> None:
        key = self._key()
        self._offered[key] = version = self._offered[key] + 1
        stored = await self._client.store(key, version, tensor(key, version), copies=2, deadline_s=1.0)
        if stored.copies == 2:
            self._certain[key] = stored.tensor_version

    async def _look(self) -> None:
        key = self._key()
        certain = self._certain.get(key, 0)
        found = await self._client.find(key, deadline_s=1.0)
        version = found.tensor_version or 0
        assert version >= certain, f"seed {SEED}: version {version} of {key} was found after {certain} was stored twice"
        if found.tensor is not None:
            assert same_bytes(await self._client.tensors.fetch(found.tensor, deadline_s=1.0), tensor(key, version))
        self.looked += 1

    async def _drop(self) -> None:
        if len(self._certain) < 4 or self._chance.random() < 0.5:
            return
        key = self._chance.choice(list(self._certain))
        del self._offered[key], self._certain[key]
        await self._client.drop(key, deadline_s=1.0)
        self.dropped.add(key)

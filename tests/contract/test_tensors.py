"""The tensor transport's contract, part one: what comes is what was sent, and who keeps what for how long."""

import asyncio
import contextlib
import gc
import signal
import subprocess
import sys
import weakref

import psutil
import pytest
import torch

from common.messages.tensors import TensorRef
from common.tensors import (
    TensorFetchTimeout,
    TensorMismatch,
    TensorsClosed,
    TensorsFull,
    TensorUnknown,
    UcxTensors,
)
from common.tensors.memory import _DTYPES
from tests.support.bus import eventually
from tests.support.tensor_peer import WAIT_S, open_descriptors, patterned, peers, same_bytes, threads

MB = 1 << 20
DTYPES = sorted(name for name in _DTYPES if not name.startswith(("qint", "quint")))
SHAPES = [(), (0,), (3, 0, 2), (1,), (3, 5, 7), (2, 1, 64, 33), (1000, 17)]
SIZES = [1, 8191, 8192, 8193, 65_536, MB - 1, MB, MB + 1, 3 * MB - 7, 16 * MB + 5, 100_000_001, 128 * MB]


@pytest.mark.filterwarnings("ignore:ComplexHalf:UserWarning")
async def test_every_dtype_and_shape_comes_as_it_was_sent() -> None:
    async with peers() as [peer], await UcxTensors.open("test") as tensors:
        for name in DTYPES:
            for seed, shape in enumerate(SHAPES):
                ref = await peer.export(shape, name, seed)
                fetched = await tensors.fetch(ref)
                assert same_bytes(fetched, patterned(shape, _DTYPES[name], seed)), (name, shape)


@pytest.mark.parametrize("stripe_bytes", [MB, 32 * MB])
async def test_every_size_comes_whole_whatever_the_stripe(stripe_bytes: int) -> None:
    async with peers() as [peer], await UcxTensors.open("test", stripe_bytes=stripe_bytes) as tensors:
        for size in SIZES:
            ref = await peer.export((size,), seed=size % 1000)
            fetched = await tensors.fetch(ref, deadline_s=WAIT_S)
            assert same_bytes(fetched, patterned((size,), seed=size % 1000)), size


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
async def test_works_in_spawned_and_in_forked_processes_both_ways(method: str) -> None:
    async with peers(method=method) as [peer], await UcxTensors.open("test") as tensors:
        theirs = await peer.export((5 * MB,), seed=1)
        ours = tensors.export(patterned((5 * MB,), seed=2))
        fetched, equal = await asyncio.gather(tensors.fetch(theirs), peer.ask("fetch", ref=ours.pack(), seed=2))
        assert same_bytes(fetched, patterned((5 * MB,), seed=1))
        assert equal


async def test_lands_in_the_memory_given() -> None:
    async with peers() as [peer], await UcxTensors.open("test") as tensors:
        ref = await peer.export((300, 1000), "bfloat16", seed=4)
        home = torch.zeros(500, 1000, dtype=torch.bfloat16)
        fetched = await tensors.fetch(ref, home[100:400])
        assert fetched.data_ptr() == home[100].data_ptr()
        assert same_bytes(home[100:400], patterned((300, 1000), torch.bfloat16, 4))
        assert not home[:100].any()
        assert not home[400:].any()


async def test_memory_that_does_not_fit_is_refused_before_anything_is_sent() -> None:
    async with peers() as [peer], await UcxTensors.open("test") as tensors:
        ref = await peer.export((4, 6), "float32", uses=1)
        with pytest.raises(TensorMismatch, match="float16"):
            await tensors.fetch(ref, torch.zeros(4, 6, dtype=torch.float16))
        with pytest.raises(TensorMismatch, match=r"\(6, 4\)"):
            await tensors.fetch(ref, torch.zeros(6, 4))
        with pytest.raises(TensorMismatch, match="contiguous"):
            await tensors.fetch(ref, torch.zeros(6, 4).t())
        with pytest.raises(TensorMismatch, match="damaged"):
            await tensors.fetch(ref.model_copy(update={"size_bytes": 95}))
        with pytest.raises(TensorMismatch, match="float3"):
            await tensors.fetch(ref.model_copy(update={"dtype": "float3"}))
        assert same_bytes(await tensors.fetch(ref), patterned((4, 6), torch.float32))


@pytest.mark.filterwarnings("ignore:torch.quantize:UserWarning")
async def test_what_cannot_be_sent_in_place_is_refused() -> None:
    async with await UcxTensors.open("test", max_exported_bytes=1000) as tensors:
        with pytest.raises(TensorMismatch, match="contiguous"):
            tensors.export(torch.zeros(3, 4).t())
        with pytest.raises(TensorMismatch, match="contiguous"):
            tensors.export(torch.eye(3).to_sparse())
        with pytest.raises(TensorMismatch, match="meta"):
            tensors.export(torch.zeros(3, device="meta"))
        with pytest.raises(TensorMismatch, match="quantized"):
            tensors.export(torch.empty(3, dtype=torch.qint8))
        with pytest.raises(TensorMismatch, match="conjugate"):
            tensors.export(torch.zeros(3, dtype=torch.complex64).conj())
        with pytest.raises(ValueError, match="uses=0"):
            tensors.export(torch.zeros(3), uses=0)
        tensors.export(torch.zeros(200))
        with pytest.raises(TensorsFull, match="1000"):
            tensors.export(torch.zeros(51))
        assert (tensors.exported_count, tensors.exported_bytes) == (1, 800)


async def test_a_counted_tensor_is_forgotten_after_its_last_use() -> None:
    async with peers(2) as [one, two], await UcxTensors.open("test") as tensors:
        tensor = patterned((3 * MB,), seed=1)
        ref = tensors.export(tensor, uses=3)
        gone = weakref.ref(tensor)
        del tensor
        assert await one.ask("fetch", ref=ref.pack(), seed=1)
        assert await two.ask("fetch", ref=ref.pack(), seed=1)
        assert tensors.exported_count == 1
        assert await one.ask("fetch", ref=ref.pack(), seed=1)
        await eventually(lambda: tensors.exported_count == 0 and tensors.in_flight == 0)
        assert tensors.exported_bytes == 0
        with pytest.raises(RuntimeError, match="TensorUnknown"):
            await two.ask("fetch", ref=ref.pack())
        gc.collect()
        assert gone() is None


async def test_an_uncounted_tensor_stays_until_released_by_its_owner() -> None:
    async with peers() as [peer], await UcxTensors.open("test") as tensors:
        ref = tensors.export(patterned((1000,)), uses=None)
        for _ in range(5):
            assert await peer.ask("fetch", ref=ref.pack())
        await tensors.release(ref)
        await tensors.release(ref)
        assert tensors.exported_count == 0
        with pytest.raises(RuntimeError, match="TensorUnknown"):
            await peer.ask("fetch", ref=ref.pack())


async def test_anybody_may_release_and_more_than_once() -> None:
    async with peers(2) as [owner, other], await UcxTensors.open("test") as tensors:
        ref = await owner.export((1000,), uses=None)
        kept = await owner.export((10,), uses=None)
        await other.ask("release", ref=ref.pack())
        await tensors.release(ref)
        with pytest.raises(TensorUnknown):
            await tensors.fetch(ref)
        await owner.counts_become(1, 10, 0)
        assert same_bytes(await tensors.fetch(kept), patterned((10,)))


async def test_a_lease_ends_and_a_renewed_one_ends_later() -> None:
    async with peers() as [peer], await UcxTensors.open("test") as tensors:
        while True:
            renewed = await peer.export((MB,), uses=None, lease_s=0.5)
            # Too late, where this machine stood still.
            with contextlib.suppress(RuntimeError):
                await peer.ask("renew", ref=renewed.pack(), lease_s=600.0)
                break
        # It ends when the other one would have ended by then.
        short = await peer.export((MB,), uses=None, lease_s=0.5)
        await peer.counts_become(1, MB, 0)
        with pytest.raises(TensorUnknown) as raised:
            await tensors.fetch(short)
        assert raised.value.ref == short
        assert same_bytes(await tensors.fetch(renewed), patterned((MB,)))
        with pytest.raises(TensorUnknown):
            tensors.renew(renewed, 1.0)


async def test_an_id_never_exported_is_unknown_here_and_there() -> None:
    async with peers() as [peer], await UcxTensors.open("test") as tensors:
        ref = await peer.export((10,), uses=None)
        with pytest.raises(TensorUnknown):
            await tensors.fetch(ref.model_copy(update={"tensor_id": ref.tensor_id + 1}))
        own = tensors.export(torch.zeros(10), uses=None)
        with pytest.raises(TensorUnknown):
            await tensors.fetch(own.model_copy(update={"tensor_id": own.tensor_id + 1}))
        with pytest.raises(TensorUnknown):
            await tensors.fetch(ref.model_copy(update={"shape": (9,), "size_bytes": 9}))


async def test_an_own_tensor_is_copied_and_counted() -> None:
    async with await UcxTensors.open("test") as tensors:
        tensor = patterned((5 * MB + 3,), seed=3)
        ref = tensors.export(tensor, uses=2)
        into = torch.zeros_like(tensor)
        assert await tensors.fetch(ref, into) is into
        copy = await tensors.fetch(ref)
        assert same_bytes(into, tensor)
        assert same_bytes(copy, tensor)
        assert copy.data_ptr() != tensor.data_ptr()
        with pytest.raises(TensorUnknown):
            await tensors.fetch(ref)


async def test_many_fetches_at_once_of_one_and_of_many_tensors() -> None:
    async with peers(2) as [one, two], await UcxTensors.open("test", stripe_bytes=MB) as tensors:
        sizes = [(seed * 37_123) % (4 * MB) for seed in range(32)]
        refs = [await (one, two)[seed % 2].export((size,), seed=seed, uses=2) for seed, size in enumerate(sizes)]
        fetched = await asyncio.gather(*(tensors.fetch(ref, deadline_s=60.0) for ref in refs + refs))
        for number, tensor in enumerate(fetched):
            seed = number % 32
            assert same_bytes(tensor, patterned((sizes[seed],), seed=seed)), seed
        for peer in (one, two):
            await peer.counts_become(0, 0, 0)


async def test_a_fetched_tensor_keeps_its_memory_while_any_view_of_it_lives() -> None:
    async with peers() as [peer], await UcxTensors.open("test") as tensors:
        first = await tensors.fetch(await peer.export((2 * MB,), seed=1))
        view = first[MB:].view(torch.int32).reshape(2, -1)
        del first
        second = await tensors.fetch(await peer.export((2 * MB,), seed=2))
        assert same_bytes(view.reshape(-1).view(torch.uint8), patterned((2 * MB,), seed=1)[MB:])
        memory = second.data_ptr()
        del second
        gc.collect()
        third = await tensors.fetch(await peer.export((2 * MB,), seed=3))
        assert third.data_ptr() == memory, "a dead tensor's memory is used again"
        assert same_bytes(third, patterned((2 * MB,), seed=3))


async def test_a_cancelled_fetch_leaves_its_memory_alone_and_the_next_one_works() -> None:
    async with peers() as [peer], await UcxTensors.open("test", stripe_bytes=MB) as tensors:
        ref = await peer.export((128 * MB,), seed=7, uses=1)
        into = torch.zeros(128 * MB, dtype=torch.uint8)
        for _ in range(3):
            into[0] = 0
            fetch = asyncio.create_task(tensors.fetch(ref, into))
            await eventually(lambda fetch=fetch: into[0] != 0 or fetch.done())
            fetch.cancel()
            await asyncio.gather(fetch, return_exceptions=True)
            into.fill_(1)
            other = await peer.export((10 * MB,), seed=8)
            assert same_bytes(await tensors.fetch(other, deadline_s=WAIT_S), patterned((10 * MB,), seed=8))
            if fetch.cancelled():
                assert bool((into == 1).all())
        ref = await peer.export((128 * MB,), seed=7)
        assert same_bytes(await tensors.fetch(ref, into, deadline_s=WAIT_S), patterned((128 * MB,), seed=7))


async def test_closing_fails_what_is_under_way_and_what_comes_after() -> None:
    async with peers() as [peer]:
        tensors = await UcxTensors.open("test")
        ref = await peer.export((300 * MB,), uses=None)
        own = tensors.export(torch.zeros(10))
        fetch = asyncio.create_task(tensors.fetch(ref, deadline_s=60.0))
        await eventually(lambda: tensors.in_flight > 0)
        await tensors.close()
        await tensors.close()
        with pytest.raises(TensorsClosed):
            await fetch
        assert tensors.exported_count == 0
        with pytest.raises(TensorsClosed):
            await tensors.fetch(own)
        with pytest.raises(TensorsClosed):
            tensors.export(torch.zeros(10))
        async with await UcxTensors.open("again") as again:
            small = await peer.export((MB,), seed=1)
            assert same_bytes(await again.fetch(small), patterned((MB,), seed=1))


async def test_ten_processes_open_at_once_and_fetch_from_each_other() -> None:
    async with peers(10) as children:
        refs = [await child.export((MB + number,), seed=number, uses=None) for number, child in enumerate(children)]
        asked = [
            children[(number + distance) % 10].ask("fetch", ref=ref.pack(), seed=number, deadline_s=100.0)
            for number, ref in enumerate(refs)
            for distance in (1, 3)
        ]
        assert all(await asyncio.gather(*asked))


async def test_five_hundred_fetches_leak_nothing() -> None:
    async with peers() as [peer], await UcxTensors.open("test", stripe_bytes=MB) as tensors:

        async def fetch_some(count: int) -> None:
            for number in range(count):
                size = (number % 10) * 100_000
                ref = await peer.export((size,), seed=number % 7)
                assert same_bytes(await tensors.fetch(ref), patterned((size,), seed=number % 7))
            with pytest.raises(TensorUnknown):
                await tensors.fetch(ref)

        await fetch_some(100)
        before = open_descriptors(), threads()
        memory = psutil.Process().memory_info().rss
        theirs = psutil.Process(peer.pid).memory_info().rss
        await fetch_some(500)
        gc.collect()
        assert open_descriptors() <= before[0]
        assert threads() <= before[1]
        await peer.counts_become(0, 0, 0)
        # 500 fetches moved 225 MB: a leak of a tenth of them would show.
        assert psutil.Process().memory_info().rss - memory < 20 * MB
        assert psutil.Process(peer.pid).memory_info().rss - theirs < 20 * MB


async def test_opening_and_closing_leaks_no_descriptor_and_no_thread() -> None:
    async with peers() as [peer]:
        ref = await peer.export((MB,), uses=None)
        counts = []
        for _ in range(6):
            async with await UcxTensors.open("test") as tensors:
                await tensors.fetch(ref)
            del tensors
            gc.collect()
            counts.append((open_descriptors(), threads()))
        descriptors, running = counts[1]
        # What ends by itself ends a moment later.
        await eventually(lambda: open_descriptors() <= descriptors and threads() <= running)


async def test_an_idle_process_uses_no_cpu() -> None:
    async with peers() as [peer], await UcxTensors.open("test") as tensors:
        await tensors.fetch(await peer.export((20 * MB,)))
        kept = tensors.export(torch.zeros(10), uses=None)
        await asyncio.sleep(0.3)
        before = peer.cpu_s
        await asyncio.sleep(3.0)
        assert peer.cpu_s - before < 0.15
        await tensors.release(kept)


async def test_a_fetch_that_waits_for_a_silent_owner_sleeps() -> None:
    async with peers() as [owner], peers() as [fetcher]:
        ref = await owner.export((MB,), uses=None)
        assert await fetcher.ask("fetch", ref=ref.pack())
        owner.stop()
        before = fetcher.cpu_s
        with pytest.raises(RuntimeError, match="TensorFetchTimeout"):
            await fetcher.ask("fetch", ref=ref.pack(), deadline_s=3.0)
        assert fetcher.cpu_s - before < 0.3
        owner.signal(signal.SIGCONT)


def test_importing_the_package_loads_no_ucx() -> None:
    code = "import sys, common.tensors; sys.exit(any(name.startswith(('ucxx', 'libucx')) for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=120).returncode == 0


def test_a_reference_crosses_the_wire() -> None:
    ref = TensorRef(
        owner="a", tensor_id=2**62 + 5, address=bytes(range(256)), shape=(2, 3), dtype="bfloat16", size_bytes=12
    )
    assert TensorRef.unpack(ref.pack()) == ref
    assert str(2**62 + 5) in str(TensorFetchTimeout(ref, "x"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(("source", "target"), [("cuda", "cuda"), ("cuda", "cpu"), ("cpu", "cuda")])
async def test_tensors_travel_between_devices(source: str, target: str) -> None:
    async with peers() as [peer], await UcxTensors.open("test", device=target) as tensors:
        for size in (0, 5, 70_000, 3 * MB + 1, 128 * MB):
            theirs = await peer.export((size,), seed=5)
            assert same_bytes(await tensors.fetch(theirs, device=target), patterned((size,), seed=5))
            ours = tensors.export(patterned((size,), seed=6).to(source))
            assert await peer.ask("fetch", ref=ours.pack(), seed=6)

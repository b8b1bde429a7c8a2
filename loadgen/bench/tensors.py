"""Tensors between two processes: our fetch against bare UCX with the same bytes, and against memcpy.

Bare UCX is ``ucxx`` as its manual shows it, at its best: endpoints over worker addresses with our settings, buffers
made and touched once, the receive posted before the sender is told to send. So both sides of the comparison are one
small message there and the bytes back. Ours adds the request's meaning, the lease, the count and the receive pool.
Both run between the same two processes, in turn; while one is measured, the other sleeps.

Messages are many small tensors, as blocks of keys and values are: fetched together, against some at a time, and against
bare UCX with all receives posted.
"""

import argparse
import asyncio
import contextlib
import multiprocessing
from collections.abc import AsyncIterator
from multiprocessing.connection import Connection

import numpy as np
import torch

from common.messages.tensors import TensorRef
from common.runtime.tether import tether_to_starter
from common.tensors import UcxTensors
from common.tensors.ucx import DEFAULT_STRIPE_BYTES
from loadgen.bench.bare_tensors import Bare, touched
from loadgen.bench.compare import Comparison, compare_async
from loadgen.counts import count, several

_SIZES = {64 << 10: 200, 1 << 20: 100, 16 << 20: 8, 128 << 20: 2}  # bytes: operations in one reading
_STOP, _BARE, _BARE_TOGETHER, _OURS = "stop", "bare", "bare together", "ours"
# How many are fetched together, and of those some at a time.
_MESSAGES, _AT_A_TIME = 128, 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sizes", type=count, nargs="+", default=list(_SIZES), metavar="BYTES")
    parser.add_argument(
        "--messages", type=count, nargs="*", default=[8 << 10, 32 << 10, 128 << 10], metavar="BYTES", help="of each"
    )
    parser.add_argument("--pairs", type=several, default=25, help="readings of each side (default 25)")
    parser.add_argument("--stripe", type=count, default=DEFAULT_STRIPE_BYTES, metavar="BYTES", help="our stripe_bytes")


def run(arguments: argparse.Namespace) -> dict[str, object]:
    torch.set_num_threads(1)
    return asyncio.run(_run(arguments))


async def _run(arguments: argparse.Namespace) -> dict[str, object]:
    comparisons: list[dict[str, object]] = []
    async with _opened(arguments.sizes, arguments.messages, arguments.stripe) as bench:
        for size in arguments.sizes:
            for comparison in (
                await bench.against_bare(size, arguments.pairs),
                await bench.against_memcpy(size, arguments.pairs),
            ):
                print(_text(comparison, size))
                comparisons.append({**comparison.as_dict(), "size_bytes": size})
        for size in arguments.messages:
            for comparison in (
                await bench.together_against_some(size, arguments.pairs),
                await bench.together_against_bare(size, arguments.pairs),
            ):
                print(f"{comparison.text()}\n")
                comparisons.append({**comparison.as_dict(), "size_bytes": size})
    return {"benchmark": "tensors", "comparisons": comparisons}


def _text(comparison: Comparison, size: int) -> str:
    ours, theirs = (size / side.median_s / 1e9 for side in (comparison.ours, comparison.theirs))
    share = 1 / comparison.median_ratio
    return f"{comparison.text()}\n  {ours:.2f} GB/s against {theirs:.2f} GB/s: {share:.2f} of its bandwidth\n"


class _Bench:
    """The receiving process: both ways of getting the same bytes."""

    def __init__(
        self,
        tensors: UcxTensors,
        bare: Bare,
        pipe: Connection,
        refs: dict[int, TensorRef],
        messages: dict[int, list[TensorRef]],
    ) -> None:
        self._tensors = tensors
        self._bare = bare
        self._pipe = pipe
        self._refs = refs
        self._messages = messages

    async def against_bare(self, size: int, pairs: int) -> Comparison:
        operations = _operations(size)

        async def ours() -> None:
            await self._tell(_OURS, size, operations)
            for _ in range(operations):
                await self._tensors.fetch(self._refs[size])

        async def theirs() -> None:
            await self._tell(_BARE, size, operations)
            for _ in range(operations):
                await self._bare.receive(size)

        return await compare_async(
            ours,
            theirs,
            title=f"{size} bytes from another process",
            names=("fetch", "bare UCX"),
            pairs=pairs,
            operations=operations,
        )

    async def against_memcpy(self, size: int, pairs: int) -> Comparison:
        source, target = touched(size), touched(size)

        async def ours() -> None:
            for _ in range(_operations(size)):
                await self._tensors.fetch(self._refs[size])

        async def theirs() -> None:
            for _ in range(_operations(size)):
                np.copyto(target, source)

        return await compare_async(
            ours,
            theirs,
            title=f"{size} bytes from another process, and within one",
            names=("fetch", "memcpy"),
            pairs=pairs,
            operations=_operations(size),
        )

    async def together_against_some(self, size: int, pairs: int) -> Comparison:
        refs, places = self._messages[size], _small(size)

        async def theirs() -> None:
            left = iter(zip(refs, places, strict=True))

            async def fetch_some() -> None:
                for ref, place in left:
                    await self._tensors.fetch(ref, place)

            await asyncio.gather(*(fetch_some() for _ in range(_AT_A_TIME)))

        return await compare_async(
            lambda: self._tensors.fetch_all(refs, places),
            theirs,
            title=f"{size} bytes {_MESSAGES} times, each",
            names=("together", f"{_AT_A_TIME} fetches at a time"),
            pairs=pairs,
            operations=_MESSAGES,
        )

    async def together_against_bare(self, size: int, pairs: int) -> Comparison:
        refs, places = self._messages[size], _small(size)

        async def ours() -> None:
            await self._tell(_OURS, size, 1)
            await self._tensors.fetch_all(refs, places)

        async def theirs() -> None:
            await self._tell(_BARE_TOGETHER, size, 1)
            await self._bare.receive_together([place.numpy() for place in places])

        return await compare_async(
            ours,
            theirs,
            title=f"{size} bytes {_MESSAGES} times, each",
            names=("together", "bare UCX, all posted"),
            pairs=pairs,
            operations=_MESSAGES,
        )

    async def _tell(self, what: str, size: int, operations: int) -> None:
        """Said before either side's readings, so that it costs both the same."""
        self._pipe.send((what, size, operations))
        await _until_readable(self._pipe)
        self._pipe.recv()


@contextlib.asynccontextmanager
async def _opened(sizes: list[int], messages: list[int], stripe_bytes: int) -> AsyncIterator[_Bench]:
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    process = context.Process(target=_sender, args=(theirs, sizes, messages), daemon=True)
    process.start()
    theirs.close()
    async with await UcxTensors.open("receiver", stripe_bytes=stripe_bytes) as tensors:
        bare = Bare(sizes)
        pipe.send(bare.address)
        await _until_readable(pipe)
        address, *packed = pipe.recv()
        await bare.connect(address)
        refs, many = ([TensorRef.unpack(ref) for ref in some] for some in packed)
        grouped = {size: [ref for ref in many if ref.size_bytes == size] for size in messages}
        try:
            yield _Bench(tensors, bare, pipe, {ref.size_bytes: ref for ref in refs}, grouped)
            pipe.send((_STOP, 0, 0))
            await asyncio.to_thread(process.join, 10)
        finally:
            process.kill()
            await bare.close()


def _sender(pipe: Connection, sizes: list[int], messages: list[int]) -> None:
    tether_to_starter()
    torch.set_num_threads(1)
    asyncio.run(_send(pipe, sizes, messages))


async def _send(pipe: Connection, sizes: list[int], messages: list[int]) -> None:
    async with await UcxTensors.open("sender") as tensors:
        bare = Bare(sizes)
        tensors_kept = [torch.from_numpy(touched(size)) for size in sizes]
        refs = [tensors.export(tensor, uses=None, lease_s=3600.0).pack() for tensor in tensors_kept]
        small = {size: _small(size) for size in messages}
        many = [tensors.export(one, uses=None, lease_s=3600.0).pack() for some in small.values() for one in some]
        await _until_readable(pipe)
        await bare.connect(pipe.recv())
        pipe.send((bare.address, refs, many))
        while True:
            await _until_readable(pipe)
            what, size, operations = pipe.recv()
            if what == _STOP:
                break
            pipe.send(what)
            if what == _BARE_TOGETHER:
                await bare.send_together([one.numpy() for one in small[size]])
            for _ in range(operations if what == _BARE else 0):
                await bare.send(size)
        await bare.close()


async def _until_readable(pipe: Connection) -> None:
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_reader(pipe.fileno(), ready.set)
    try:
        async with asyncio.timeout(600):
            await ready.wait()
    finally:
        loop.remove_reader(pipe.fileno())


def _operations(size: int) -> int:
    """So many that one reading takes a few tens of milliseconds."""
    return _SIZES.get(size, max(2, min(200, (128 << 20) // max(size, 1))))


def _small(size: int) -> list[torch.Tensor]:
    """As many as are fetched together."""
    return list(torch.from_numpy(touched(_MESSAGES * size)).view(_MESSAGES, size))

"""Tensors between two processes: our fetch against bare UCX with the same bytes, and against memcpy.

Bare UCX is ``ucxx`` as its manual shows it, at its best: endpoints over worker addresses with our settings, buffers
made and touched once, the receive posted before the sender is told to send. So both sides of the comparison are one
small message there and the bytes back. Ours adds the request's meaning, the lease, the count and the receive pool.
Both run between the same two processes, in turn; while one is measured, the other sleeps.
"""

import argparse
import asyncio
import contextlib
import multiprocessing
import os
from collections.abc import AsyncIterator
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch

from common.messages.tensors import TensorRef
from common.tensors import UcxTensors
from common.tensors.settings import context_options
from common.tensors.ucx import DEFAULT_STRIPE_BYTES
from loadgen.bench.compare import Comparison, compare_async
from loadgen.counts import count, several

_SIZES = {64 << 10: 200, 1 << 20: 100, 16 << 20: 8, 128 << 20: 2}  # bytes: operations in one reading
_GO_TAG, _BYTES_TAG = 1, 2
_STOP, _BARE, _OURS = "stop", "bare", "ours"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sizes", type=count, nargs="+", default=list(_SIZES), metavar="BYTES")
    parser.add_argument("--pairs", type=several, default=25, help="readings of each side (default 25)")
    parser.add_argument("--stripe", type=count, default=DEFAULT_STRIPE_BYTES, metavar="BYTES", help="our stripe_bytes")


def run(arguments: argparse.Namespace) -> dict[str, object]:
    torch.set_num_threads(1)
    return asyncio.run(_run(arguments))


async def _run(arguments: argparse.Namespace) -> dict[str, object]:
    comparisons: list[dict[str, object]] = []
    async with _opened(arguments.sizes, arguments.stripe) as bench:
        for size in arguments.sizes:
            for comparison in (
                await bench.against_bare(size, arguments.pairs),
                await bench.against_memcpy(size, arguments.pairs),
            ):
                print(_text(comparison, size))
                comparisons.append({**comparison.as_dict(), "size_bytes": size})
    return {"benchmark": "tensors", "comparisons": comparisons}


def _text(comparison: Comparison, size: int) -> str:
    ours, theirs = (size / side.median_s / 1e9 for side in (comparison.ours, comparison.theirs))
    share = 1 / comparison.median_ratio
    return f"{comparison.text()}\n  {ours:.2f} GB/s against {theirs:.2f} GB/s: {share:.2f} of its bandwidth\n"


class _Bench:
    """The receiving process: both ways of getting the same bytes."""

    def __init__(self, tensors: UcxTensors, bare: "_Bare", pipe: Connection, refs: dict[int, TensorRef]) -> None:
        self._tensors = tensors
        self._bare = bare
        self._pipe = pipe
        self._refs = refs

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
        source, target = _touched(size), _touched(size)

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

    async def _tell(self, what: str, size: int, operations: int) -> None:
        """Said before either side's readings, so that it costs both the same."""
        self._pipe.send((what, size, operations))
        await _until_readable(self._pipe)
        self._pipe.recv()


class _Bare:
    """Plain ``ucxx``. In its blocking mode it spins while it waits for a request, and sleeps otherwise."""

    def __init__(self, sizes: list[int]) -> None:
        import ucxx
        from ucxx.types import Tag

        ucxx.init(options=context_options(os.environ), progress_mode="blocking")
        self._ucxx, self._tag = ucxx, Tag
        self._buffers = {size: _touched(size) for size in sizes}
        self._go = np.zeros(1, dtype=np.uint8)
        self._endpoint: Any = None
        self.address = bytes(ucxx.get_worker_address())

    async def connect(self, address: bytes) -> None:
        target = self._ucxx.get_ucx_address_from_buffer(address)
        self._endpoint = await self._ucxx.create_endpoint_from_worker_address(target, endpoint_error_handling=True)

    async def receive(self, size: int) -> None:
        posted = asyncio.ensure_future(self._ucxx.recv(self._buffers[size], tag=self._tag(_BYTES_TAG)))
        await asyncio.sleep(0)
        await self._endpoint.send(self._go, tag=self._tag(_GO_TAG), force_tag=True)
        await posted

    async def send(self, size: int) -> None:
        await self._ucxx.recv(self._go, tag=self._tag(_GO_TAG))
        await self._endpoint.send(self._buffers[size], tag=self._tag(_BYTES_TAG), force_tag=True)

    async def close(self) -> None:
        await self._endpoint.close()
        self._endpoint = None


@contextlib.asynccontextmanager
async def _opened(sizes: list[int], stripe_bytes: int) -> AsyncIterator[_Bench]:
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    process = context.Process(target=_sender, args=(theirs, sizes), daemon=True)
    process.start()
    theirs.close()
    async with await UcxTensors.open("receiver", stripe_bytes=stripe_bytes) as tensors:
        bare = _Bare(sizes)
        pipe.send(bare.address)
        await _until_readable(pipe)
        address, refs = pipe.recv()
        await bare.connect(address)
        try:
            yield _Bench(tensors, bare, pipe, {ref.size_bytes: ref for ref in map(TensorRef.unpack, refs)})
            pipe.send((_STOP, 0, 0))
            await asyncio.to_thread(process.join, 10)
        finally:
            process.kill()
            await bare.close()


def _sender(pipe: Connection, sizes: list[int]) -> None:
    torch.set_num_threads(1)
    asyncio.run(_send(pipe, sizes))


async def _send(pipe: Connection, sizes: list[int]) -> None:
    async with await UcxTensors.open("sender") as tensors:
        bare = _Bare(sizes)
        tensors_kept = [torch.from_numpy(_touched(size)) for size in sizes]
        refs = [tensors.export(tensor, uses=None, lease_s=3600.0).pack() for tensor in tensors_kept]
        await _until_readable(pipe)
        await bare.connect(pipe.recv())
        pipe.send((bare.address, refs))
        while True:
            await _until_readable(pipe)
            what, size, operations = pipe.recv()
            if what == _STOP:
                break
            pipe.send(what)
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


def _touched(size: int) -> "np.ndarray[tuple[int], np.dtype[np.uint8]]":
    return np.ones(size, dtype=np.uint8)

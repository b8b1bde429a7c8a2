"""How long keys and values take from one process of this machine to another over UCX, by their bytes."""

import asyncio
import json
import os
import statistics
import sys
import time
from asyncio.subprocess import PIPE

import torch

from common.messages.tensors import TensorRef
from common.models.causal_lm import KVPool
from common.runtime.tether import tether_to
from common.tensors.ucx import UcxTensors
from compose.launch import PACKAGE_ROOT

_START_S = 60.0
_FETCH_S = 30.0
_STOP_S = 10.0
_MOST_BYTES = 256 << 20
_MOST_BLOCKS = 1024


async def measure_transfer(pool: KVPool, repeats: int, warm_up: int) -> list[tuple[int, float]]:
    """(bytes, median seconds) of runs of neighbouring blocks, from one block up, each twice the one before."""
    blocks = pool.blocks
    most = max(1, min(_MOST_BLOCKS, _MOST_BYTES // pool.layout.block_bytes, blocks.shape[0]))
    # Of another element type they are as many bytes in other numbers.
    shape = torch.empty((1, *blocks.shape[1:]), dtype=blocks.dtype).view(torch.uint8).shape[1:]
    peer = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "compose.profiling.transfer_member", str(blocks.device), str(most)),
        *map(str, shape),
        cwd=PACKAGE_ROOT,
        stdin=PIPE,
        stdout=PIPE,
        preexec_fn=tether_to(os.getpid()),
    )
    assert peer.stdin is not None and peer.stdout is not None
    tensors = await UcxTensors.open(owner="measuring", device=blocks.device)
    try:
        said = await asyncio.wait_for(peer.stdout.readline(), _START_S)
        refs = [TensorRef.unpack(bytes.fromhex(packed)) for packed in json.loads(said)]
        into = torch.empty((most, *shape), dtype=torch.uint8, device=blocks.device)
        return [(ref.size_bytes, await _fetched(tensors, ref, into, repeats, warm_up)) for ref in refs]
    finally:
        await tensors.close()
        peer.stdin.close()
        try:
            await asyncio.wait_for(peer.wait(), _STOP_S)
        except TimeoutError:
            peer.kill()
            await peer.wait()


async def _fetched(tensors: UcxTensors, ref: TensorRef, into: torch.Tensor, repeats: int, warm_up: int) -> float:
    seconds = []
    for _ in range(warm_up + repeats):
        began_s = time.perf_counter()
        await tensors.fetch(ref, into=into[: ref.shape[0]], deadline_s=_FETCH_S)
        seconds.append(time.perf_counter() - began_s)
    return statistics.median(seconds[warm_up:])

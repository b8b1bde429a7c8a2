"""The process whose keys and values are fetched, with arguments DEVICE, BLOCKS and the SHAPE of a block in bytes.

It exports runs of 1, 2, 4, ... blocks of that shape, says so in one line of JSON, and keeps them until its standard
input ends.
"""

import asyncio
import json
import sys

import torch

from common.tensors.ucx import UcxTensors

_LEASE_S = 3600.0


async def export(device: str, most_blocks: int, shape: tuple[int, ...]) -> None:
    """Export until standard input ends."""
    blocks = torch.zeros((most_blocks, *shape), dtype=torch.uint8, device=device)
    tensors = await UcxTensors.open(owner="transfer", device=device)
    try:
        refs, count = [], 1
        while count <= most_blocks:
            refs.append(tensors.export(blocks[:count], uses=None, lease_s=_LEASE_S).pack().hex())
            count *= 2
        sys.stdout.write(json.dumps(refs) + "\n")
        sys.stdout.flush()
        await asyncio.to_thread(sys.stdin.read)
    finally:
        await tensors.close()


if __name__ == "__main__":
    asyncio.run(export(sys.argv[1], int(sys.argv[2]), tuple(map(int, sys.argv[3:]))))

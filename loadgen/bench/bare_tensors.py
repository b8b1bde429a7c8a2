"""Tensors over bare ``ucxx``, as its manual shows it: what ours is compared with (see ``tensors``)."""

import asyncio
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from common.tensors.memory import Bytes
from common.tensors.settings import context_options

_GO_TAG, _BYTES_TAG = 1, 2


class Bare:
    """Plain ``ucxx``. In its blocking mode it spins while it waits for a request, and sleeps otherwise."""

    def __init__(self, sizes: list[int]) -> None:
        import ucxx
        from ucxx.types import Tag

        ucxx.init(options=context_options(os.environ), progress_mode="blocking")
        self._ucxx, self._tag = ucxx, Tag
        self._buffers = {size: touched(size) for size in sizes}
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

    async def receive_together(self, buffers: Sequence[Bytes]) -> None:
        posted = [asyncio.ensure_future(self._ucxx.recv(one, tag=self._tag(_BYTES_TAG))) for one in buffers]
        await asyncio.sleep(0)
        await self._endpoint.send(self._go, tag=self._tag(_GO_TAG), force_tag=True)
        await asyncio.gather(*posted)

    async def send_together(self, buffers: Sequence[Bytes]) -> None:
        await self._ucxx.recv(self._go, tag=self._tag(_GO_TAG))
        tag = self._tag(_BYTES_TAG)
        await asyncio.gather(*(self._endpoint.send(one, tag=tag, force_tag=True) for one in buffers))

    async def send(self, size: int) -> None:
        await self._ucxx.recv(self._go, tag=self._tag(_GO_TAG))
        await self._endpoint.send(self._buffers[size], tag=self._tag(_BYTES_TAG), force_tag=True)

    async def close(self) -> None:
        await self._endpoint.close()
        self._endpoint = None


def touched(size: int) -> Bytes:
    """So many bytes in memory that is there."""
    return np.ones(size, dtype=np.uint8)

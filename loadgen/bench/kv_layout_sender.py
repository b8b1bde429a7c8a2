"""The sending side of ``kv-transfer``'s comparison of layouts: computes layers, has their keys and values fetched."""

import asyncio
import json
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection

import torch
from torch import Tensor

from common.bus.nats_bus import NatsBus
from common.mempool.address import BLOCK_TOKENS
from common.messages.mempool import MoveBlocks
from common.messages.subjects import MOVE_BLOCKS
from common.runtime.tether import tether_to_starter
from common.tensors import UcxTensors
from loadgen.bench.kv_layouts import Pool, Shape, Way

RECEIVER = "receiver"
# References that fit a message.
AT_ONCE = 512
_DEADLINE_S = 60.0
_STOP = ""


@dataclass(frozen=True)
class Timed:
    """Of one prompt, by the clock that all processes share: computed, and all there, after so many ``requests``."""

    computed_s: float
    there_s: float
    requests: int


class LayerWork:
    """The matrix products of one layer over a prompt, which is nearly all of its work."""

    def __init__(self, shape: Shape) -> None:
        hidden = shape.heads * shape.head_dim
        wide = hidden * 5 // 2
        generator = torch.Generator(shape.device).manual_seed(1)

        def random(rows: int, columns: int) -> Tensor:
            return torch.randn(rows, columns, generator=generator, device=shape.device)

        self._rows = random(shape.prompt_tokens, hidden)
        self._square = random(hidden, hidden)
        self._wide = random(hidden, wide)
        self._narrow = random(wide, hidden)

    def run(self) -> None:
        """Queries, keys, values, what comes of them, and the three of the feed-forward part; return once they are
        there."""
        for _ in range(4):
            torch.mm(self._rows, self._square)
        for _ in range(2):
            wide = torch.mm(self._rows, self._wide)
        done = torch.mm(wide, self._narrow)
        if done.is_cuda:
            torch.cuda.current_stream(done.device).synchronize()


class Sender:
    """Prompts in turn; each one's transfer goes on while the next is computed."""

    def __init__(self, bus: NatsBus, tensors: UcxTensors, shape: Shape, prompts: int) -> None:
        self._bus = bus
        self._tensors = tensors
        self._shape = shape
        self._memory = [Pool.memory_for(shape) for _ in range(prompts)]
        self._work = LayerWork(shape)
        self._thread = ThreadPoolExecutor(1, "compute")

    async def round(self, way: Way, prompts: int, fill: bool) -> list[Timed]:
        """Compute and send so many prompts in one way."""
        pools = [Pool(way, self._shape, memory, reversed_order=False) for memory in self._memory[:prompts]]
        if fill:
            for pool in pools:
                pool.fill()
        loop = asyncio.get_running_loop()
        async with asyncio.TaskGroup() as tasks:
            sending = []
            for prompt, pool in enumerate(pools):
                ready: asyncio.Queue[tuple[int | None, Tensor | None]] = asyncio.Queue()
                sent = tasks.create_task(self._send(way, prompt, pool, ready), name=f"send {prompt}")
                for layer in range(self._shape.layers):
                    await loop.run_in_executor(self._thread, self._work.run)
                    if way is Way.AGGREGATED_BY_LAYER:
                        ready.put_nowait((layer, await loop.run_in_executor(self._thread, pool.copy_out, layer)))
                    elif way is Way.DISCRETE_BY_LAYER:
                        ready.put_nowait((layer, None))
                if not way.by_layer:
                    ready.put_nowait((None, None))
                sending.append((time.perf_counter(), sent))
        return [Timed(computed_s, *task.result()) for computed_s, task in sending]

    async def _send(
        self, way: Way, prompt: int, pool: Pool, ready: "asyncio.Queue[tuple[int | None, Tensor | None]]"
    ) -> tuple[float, int]:
        """Have each layer fetched once it is ready, or all of them together; when all is there, and in how many
        requests."""
        requests = 0
        times = self._shape.layers if way.by_layer else 1
        count = self._shape.messages(way) // times
        for _ in range(times):
            layer, copied = await ready.get()
            for first in range(0, count, AT_ONCE):
                pieces = pool.pieces(layer, first, AT_ONCE) if copied is None else [copied]
                await self._offer(prompt, way, layer, first, pieces)
                requests += 1
        return time.perf_counter(), requests

    async def _offer(self, prompt: int, way: Way, layer: int | None, first: int, pieces: Sequence[Tensor]) -> None:
        refs = tuple(self._tensors.export_all(pieces, lease_s=_DEADLINE_S))
        place = json.dumps({"prompt": prompt, "way": way, "layer": layer, "first": first})
        offer = MoveBlocks(source="sender", block_tokens=BLOCK_TOKENS, kv=refs, private=place.encode())
        await self._bus.request(MOVE_BLOCKS, offer, RECEIVER, deadline_s=_DEADLINE_S)

    def close(self) -> None:
        self._thread.shutdown(wait=True)


def run_sender(pipe: Connection, url: str, shape: Shape, prompts: int) -> None:
    """A process's whole life: rounds as the pipe asks for them, until it says stop."""
    tether_to_starter()
    torch.set_num_threads(1)
    asyncio.run(_serve(pipe, url, shape, prompts))


async def _serve(pipe: Connection, url: str, shape: Shape, prompts: int) -> None:
    bus = await NatsBus.connect(url, name="sender")
    async with await UcxTensors.open("sender", device=shape.device) as tensors:
        sender = Sender(bus, tensors, shape, prompts)
        pipe.send("ready")
        while (asked := await asyncio.to_thread(pipe.recv))[0] != _STOP:
            way, count, fill = asked
            pipe.send(await sender.round(Way(way), count, fill))
        sender.close()
    await bus.close()

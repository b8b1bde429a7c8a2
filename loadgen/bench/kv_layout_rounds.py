"""Discrete against aggregated blocks, by request against by layer, between two processes (MemServe, section 4).

A sending process computes the matrix products of a prompt's layers and offers keys and values over the control bus;
this one fetches them over UCX, as instances do. A round does that in each way, in changing order; alone, with one
prompt, and under load, with several in turn and this process computing too, as one that decodes would.
"""

import asyncio
import contextlib
import dataclasses
import json
import multiprocessing
import statistics
import threading
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection

from common.bus.nats_bus import NatsBus
from common.messages.mempool import BlocksMoved, MoveBlocks
from common.messages.subjects import MOVE_BLOCKS
from common.tensors import UcxTensors
from loadgen.bench.kv_layout_sender import RECEIVER, LayerWork, Timed, run_sender
from loadgen.bench.kv_layouts import Pool, Shape, Way
from loadgen.bench.process import BenchmarkError
from loadgen.bench.rounds import Ratio, spread

_DEADLINE_S = 60.0
_STOP = ""


@dataclass(frozen=True)
class Reading:
    """Of one round, in seconds: until a prompt is computed, from then until all of it is there (medians), and until
    all prompts are. ``requests``: of a prompt, over the control bus."""

    computed_s: float
    after_s: float
    all_s: float
    requests: int

    @classmethod
    def of(cls, began_s: float, timed: Sequence[Timed]) -> "Reading":
        """From the prompts of a round."""
        # Each is computed when the one before it has been.
        begins = [began_s, *(one.computed_s for one in timed)]
        return cls(
            statistics.median(one.computed_s - begin for begin, one in zip(begins, timed, strict=False)),
            statistics.median(one.there_s - one.computed_s for one in timed),
            max(one.there_s for one in timed) - began_s,
            timed[0].requests,
        )


Readings = Mapping[Way, Sequence[Reading]]


class Receiver:
    """Fetches what is offered to its place."""

    def __init__(self, tensors: UcxTensors, shape: Shape, prompts: int) -> None:
        self._tensors = tensors
        self._shape = shape
        self._memory = [Pool.memory_for(shape) for _ in range(prompts)]

    def pool(self, prompt: int, way: Way) -> Pool:
        """Where that prompt's blocks are."""
        return Pool(way, self._shape, self._memory[prompt], reversed_order=True)

    def forget(self) -> None:
        """What came before is gone."""
        for memory in self._memory:
            memory.zero_()

    async def move(self, offer: MoveBlocks) -> BlocksMoved:
        place = json.loads(offer.private)
        way, layer, first = Way(place["way"]), place["layer"], place["first"]
        pool = self.pool(place["prompt"], way)
        if way is Way.AGGREGATED_BY_LAYER:
            copied = await self._tensors.fetch(offer.kv[0], deadline_s=_DEADLINE_S)
            await asyncio.to_thread(pool.copy_in, layer, copied)
            return BlocksMoved()
        targets = pool.pieces(layer, first, len(offer.kv))
        await self._tensors.fetch_all(offer.kv, targets, deadline_s=_DEADLINE_S)
        return BlocksMoved()


async def measured(url: str, shape: Shape, rounds: int, prompts: int) -> dict[str, Readings]:
    """Rounds alone and under load.

    Raises:
        BenchmarkError: something came to the wrong place.
    """
    bus = await NatsBus.connect(url, name=RECEIVER)
    try:
        async with (
            await UcxTensors.open(RECEIVER, device=shape.device) as tensors,
            _sending(url, shape, prompts) as pipe,
        ):
            receiver = Receiver(tensors, shape, prompts)
            serving = await bus.serve(MOVE_BLOCKS, receiver.move, RECEIVER)
            try:
                await _proved(pipe, receiver, prompts)
                alone = await _rounds(pipe, rounds, 1)
                with _computing(shape):
                    loaded = await _rounds(pipe, rounds, prompts)
                return {"alone": alone, "loaded": loaded}
            finally:
                await serving.stop(deadline_s=1.0)
    finally:
        await bus.close()


async def _proved(pipe: Connection, receiver: Receiver, prompts: int) -> None:
    """Once in every way, not timed: connections are made, pages touched, and what comes is looked at."""
    for way in Way:
        receiver.forget()
        await _asked(pipe, way, prompts, fill=True)
        if not all(receiver.pool(prompt, way).holds_what_was_filled() for prompt in range(prompts)):
            raise BenchmarkError(f"{way}: not all came to its place")


async def _rounds(pipe: Connection, rounds: int, prompts: int) -> Readings:
    ways = list(Way)
    found: dict[Way, list[Reading]] = {way: [] for way in ways}
    for number in range(rounds):
        first = number % len(ways)
        for way in ways[first:] + ways[:first]:
            began_s = time.perf_counter()
            found[way].append(Reading.of(began_s, await _asked(pipe, way, prompts, fill=False)))
    return found


async def _asked(pipe: Connection, way: Way, prompts: int, *, fill: bool) -> list[Timed]:
    pipe.send((str(way), prompts, fill))
    timed: list[Timed] = await _heard(pipe)
    return timed


async def _heard(pipe: Connection) -> "list[Timed]":
    ready = asyncio.Event()
    asyncio.get_running_loop().add_reader(pipe.fileno(), ready.set)
    try:
        async with asyncio.timeout(_DEADLINE_S):
            await ready.wait()
        return pipe.recv()  # type: ignore[no-any-return]
    except (TimeoutError, EOFError):
        raise BenchmarkError("the sending process does not answer") from None
    finally:
        asyncio.get_running_loop().remove_reader(pipe.fileno())


@contextlib.asynccontextmanager
async def _sending(url: str, shape: Shape, prompts: int) -> AsyncIterator[Connection]:
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    process = context.Process(target=run_sender, args=(theirs, url, shape, prompts), daemon=True)
    process.start()
    theirs.close()
    try:
        await _heard(pipe)
        yield pipe
        with contextlib.suppress(OSError):
            pipe.send((_STOP, 0, False))
        await asyncio.to_thread(process.join, 10)
    finally:
        process.kill()


@contextlib.contextmanager
def _computing(shape: Shape) -> Iterator[None]:
    """A thread of this process computes while the block runs, as an instance with a full batch does."""
    stop = threading.Event()
    work = LayerWork(dataclasses.replace(shape, prompt_tokens=64))

    def compute() -> None:
        while not stop.is_set():
            work.run()

    thread = threading.Thread(target=compute, name="decoding")
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def ratio(readings: Readings, ours: Way, theirs: Way, measure: str) -> Ratio:
    """Our measure over theirs, round by round."""
    pairs = zip(readings[ours], readings[theirs], strict=True)
    return spread([getattr(mine, measure) / getattr(other, measure) for mine, other in pairs])

"""The control bus against bare ``nats-py``: what typed messages, deadlines and typed failures cost per round trip.

Both sides ask the same second process over the same broker. Ours packs, validates and unpacks real messages on both
ends; the bare side sends and gets back ready bytes, as many as ours.
"""

import argparse
import asyncio
import os
import subprocess
import sys
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any

import nats
import nats.errors
import uvloop
from nats.aio.client import Client
from nats.aio.msg import Msg

from common.bus.errors import BusError
from common.bus.nats_bus import NatsBus
from common.messages.base import Message
from common.messages.failures import Acknowledged
from common.messages.subjects import RequestSubject
from common.messages.tensors import TensorRef
from common.messages.video import DenoisingFinished, Lease, VideoRequest
from common.runtime.tether import tether_to
from loadgen.bench.broker import broker
from loadgen.bench.compare import Comparison, compare_async
from loadgen.bench.process import BenchmarkError
from loadgen.counts import count, several

_OURS_LEASE = RequestSubject("bench.{}.lease", Lease, Acknowledged)
_OURS_FINISHED = RequestSubject("bench.{}.finished", DenoisingFinished, DenoisingFinished)
_BARE_LEASE = "bare.lease"
_BARE_FINISHED = "bare.finished"
_RESPONDER = "responder-0"
_CONNECT_S = 30.0
_STOP_S = 20.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--pairs", type=several, default=61, help="readings of each side")
    parser.add_argument("--operations", type=count, default=100, help="round trips per reading")
    parser.add_argument("--uvloop", action="store_true", help="run all processes on uvloop")


def run(arguments: argparse.Namespace) -> dict[str, object]:
    """Measure, print, and return what ``--json`` writes.

    Raises:
        BenchmarkError: the other process did not come up, or something was not answered.
    """
    with broker() as url:
        responder = subprocess.Popen(
            [sys.executable, "-m", "loadgen.bench.bus", url, *(["--uvloop"] if arguments.uvloop else [])],
            stdout=subprocess.PIPE,
            process_group=0,
            preexec_fn=tether_to(os.getpid()),
        )
        try:
            if responder.stdout is None or not responder.stdout.readline():
                raise BenchmarkError("the responder did not come up; what it said stands above")
            comparisons = _run(_measure(url, arguments.pairs, arguments.operations), arguments.uvloop)
        except (BusError, nats.errors.Error, TimeoutError) as error:
            raise BenchmarkError(f"not all was answered ({type(error).__name__}: {error})") from None
        finally:
            responder.terminate()
            try:
                responder.communicate(timeout=_STOP_S)
            finally:
                responder.kill()
    for comparison in comparisons:
        print(comparison.text())
    return {"benchmark": "bus", "comparisons": [comparison.as_dict() for comparison in comparisons]}


def lease() -> Lease:
    """A lease as the scheduler grants it: with the whole request and the reference of its text embedding."""
    request = VideoRequest(
        model="demo",
        prompt="a red fox runs through fresh snow at dawn, the camera follows it slowly",
        width=512,
        height=288,
        frames=51,
        fps=24,
        steps=30,
        guidance_scale=7.0,
        seed=42,
    )
    text = TensorRef(
        owner="encoder-0", tensor_id=17, address=bytes(100), shape=(24, 512), dtype="bfloat16", size_bytes=24576
    )
    return Lease(
        job_id="video_0123456789abcdef",
        epoch=12,
        members=("dit-0", "dit-1"),
        leader="dit-0",
        request=request,
        text=text,
    )


def finished() -> DenoisingFinished:
    """The report that ends a denoising."""
    latent = TensorRef(
        owner="dit-0", tensor_id=3, address=bytes(100), shape=(1, 4, 15, 36, 64), dtype="bfloat16", size_bytes=276480
    )
    return DenoisingFinished(job_id="video_0123456789abcdef", epoch=12, instance="dit-0", latent=latent)


@dataclass(frozen=True)
class _Case:
    title: str
    subject: RequestSubject[Any, Any]
    request: Message
    reply: Message
    bare: str


def _cases() -> tuple[_Case, ...]:
    return (
        _Case("request/reply, Lease -> Acknowledged", _OURS_LEASE, lease(), Acknowledged(), _BARE_LEASE),
        _Case("request/reply, DenoisingFinished echoed", _OURS_FINISHED, finished(), finished(), _BARE_FINISHED),
    )


async def _measure(url: str, pairs: int, operations: int) -> list[Comparison]:
    bare = await bare_client(url)
    async with await NatsBus.connect(url, "bench", connect_deadline_s=_CONNECT_S) as bus:
        comparisons = [await _compare(bus, bare, case, pairs, operations) for case in _cases()]
    await bare.close()
    return comparisons


async def bare_client(url: str) -> Client:
    """A connection of ``nats-py`` itself.

    Raises:
        TimeoutError: there is none in time.
    """
    async with asyncio.timeout(_CONNECT_S):
        while True:
            client = await nats.connect(url)
            if client.is_connected:
                return client
            # It took the broker's first ping for the answer to its own, and would send nothing: see ``Link.open``.
            await client.close()


async def _compare(bus: NatsBus, bare: Client, case: _Case, pairs: int, operations: int) -> Comparison:
    payload = case.request.pack()

    async def ours() -> None:
        for _ in range(operations):
            await bus.request(case.subject, case.request, _RESPONDER)

    async def theirs() -> None:
        for _ in range(operations):
            await bare.request(case.bare, payload, timeout=5.0)

    sizes = f"{len(payload)} B there, {len(case.reply.pack())} B back"
    return await compare_async(
        ours,
        theirs,
        title=f"{case.title} ({sizes})",
        names=("common.bus", "nats-py"),
        pairs=pairs,
        operations=operations,
    )


async def _respond(url: str) -> None:
    """The second process: answers both sides until it is ended."""
    bare = await bare_client(url)
    bus = await NatsBus.connect(url, _RESPONDER, connect_deadline_s=_CONNECT_S)
    for case in _cases():
        await _answer(bus, bare, case)
    await bare.flush()
    print("ready", flush=True)
    await asyncio.Event().wait()


async def _answer(bus: NatsBus, bare: Client, case: _Case) -> None:
    reply = case.reply.pack()

    async def ours(request: Message) -> Message:
        return request if type(request) is case.subject.reply else case.reply

    async def theirs(message: Msg) -> None:
        await message.respond(reply)

    await bus.serve(case.subject, ours, _RESPONDER)
    await bare.subscribe(case.bare, cb=theirs)


def _run(main: Coroutine[Any, Any, Any], on_uvloop: bool) -> Any:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop if on_uvloop else None) as runner:
        return runner.run(main)


if __name__ == "__main__":
    _run(_respond(sys.argv[1]), "--uvloop" in sys.argv)

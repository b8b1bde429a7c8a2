"""One video through the whole stack, over the same video made by one process that holds all three models.

The stack's time runs from the POST until the file is downloaded: HTTP, queue, scheduler, three services, the
broker's records and the tensors between them. The other side only computes. Both get the same number of threads,
one slot, and must come to the same bytes.
"""

import argparse
import asyncio
import hashlib
import json
import os
import sys
from asyncio.subprocess import Process
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

import aiohttp

from loadgen.bench.answering import answering
from loadgen.bench.compare import compare_async
from loadgen.bench.process import BenchmarkError, line_of, located, started
from loadgen.counts import count, several
from loadgen.refusal import WrongArgument

_VIDEO_TIMEOUT_S = 600.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The benchmark's own options."""
    parser.add_argument("--pairs", type=several, default=7, help="videos of each side (default %(default)s)")
    parser.add_argument("--video-model", default="demo", metavar="PATH|NAME")
    parser.add_argument("--prompt", default="a red circle moving right")
    parser.add_argument("--steps", type=count, help="denoising steps (default: the model's)")
    parser.add_argument("--threads", type=count, default=1, help="torch threads of each process (default %(default)s)")


def run(options: argparse.Namespace) -> dict[str, object]:
    """Start both sides, compare them, stop them.

    Raises:
        BenchmarkError: one of them did not answer, or they made different files.
        WrongArgument: the stack refuses what was asked for.
    """
    with answering():
        return asyncio.run(_run(options))


@dataclass
class _Hashes:
    """What each side's files came to, by seed; both must agree."""

    of_stack: dict[int, str] = field(default_factory=dict)
    of_process: dict[int, str] = field(default_factory=dict)

    def check(self) -> None:
        differing = [seed for seed, sha256 in self.of_stack.items() if self.of_process.get(seed) != sha256]
        if differing:
            raise BenchmarkError(f"the two sides made different files for the seeds {differing}")


async def _run(options: argparse.Namespace) -> dict[str, object]:
    threads = str(options.threads)
    environment = {**os.environ, "TRIPTYCH_THREADS": threads, "OMP_NUM_THREADS": threads, "TQDM_DISABLE": "1"}
    stack = [sys.executable, "-m", "compose.cli", "up", "--port", "0", "--set", "dit=1", "--set", "vae=1"]
    location = located(options.video_model, "--video-model")
    stack += ["--video-model", location, "--language-model", "none", "--log-level", "warning"]
    process = [sys.executable, "-m", "loadgen.in_process", location, str(options.threads)]
    hashes = _Hashes()
    async with (
        started(stack, environment) as (_, stack_ready),
        started(process, environment) as (pipeline, _),
        aiohttp.ClientSession(stack_ready.split()[1]) as session,
    ):
        model = await _model(session)
        fields = _fields(model, options)
        seeds = {"ours": 0, "theirs": 0}

        async def through_the_stack() -> None:
            seeds["ours"] += 1
            data = await _video(session, {**fields, "seed": seeds["ours"]})
            hashes.of_stack[seeds["ours"]] = hashlib.sha256(data).hexdigest()

        async def in_one_process() -> None:
            seeds["theirs"] += 1
            arguments = _arguments(fields, seeds["theirs"])
            hashes.of_process[seeds["theirs"]] = (await _ask(pipeline, arguments))["sha256"]

        comparison = await compare_async(
            through_the_stack,
            in_one_process,
            title=f"one video: {fields['size']}, {fields['frames']} frames, {fields['steps']} steps",
            names=("through the stack", "in one process"),
            pairs=options.pairs,
        )
    hashes.check()
    print(comparison.text())
    return comparison.as_dict() | {"request": fields, "threads": options.threads}


async def _ask(process: Process, arguments: dict[str, Any]) -> dict[str, Any]:
    if process.stdin is None:
        raise BenchmarkError("the process has no input to write to")
    process.stdin.write(json.dumps(arguments).encode() + b"\n")
    await process.stdin.drain()
    answer: dict[str, Any] = json.loads(await line_of(process, _VIDEO_TIMEOUT_S))
    return answer


async def _model(session: aiohttp.ClientSession) -> dict[str, Any]:
    async with session.get("/v1/models", raise_for_status=True) as response:
        models: list[dict[str, Any]] = (await response.json())["data"]
    return next(model for model in models if model["kind"] == "video")


def _fields(model: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """The request, with the model's defaults written out."""
    limits = model["video"]
    return {
        "model": model["id"],
        "prompt": options.prompt,
        "size": limits["default_size"],
        "frames": limits["default_frames"],
        "fps": limits["default_fps"],
        "steps": options.steps or limits["default_steps"],
        "guidance_scale": limits["default_guidance_scale"],
    }


def _arguments(fields: dict[str, Any], seed: int) -> dict[str, Any]:
    """The same request for ``OpenSoraPipeline.generate``."""
    width, height = map(int, fields["size"].split("x"))
    same = {name: fields[name] for name in ("prompt", "frames", "fps", "steps", "guidance_scale")}
    return same | {"seed": seed, "width": width, "height": height}


async def _video(session: aiohttp.ClientSession, fields: dict[str, Any]) -> bytes:
    """Order, wait for the end by the event stream, download."""
    async with asyncio.timeout(_VIDEO_TIMEOUT_S):
        async with session.post("/v1/videos", json=fields) as response:
            told = await response.json()
            if response.status == HTTPStatus.BAD_REQUEST:
                raise WrongArgument(told["error"]["message"])
            response.raise_for_status()
            video_id = told["id"]
        async with session.get(f"/v1/videos/{video_id}/events", raise_for_status=True) as events:
            async for line in events.content:
                if line.startswith(b"data:") and b'"completed"' in line:
                    break
        async with session.get(f"/v1/videos/{video_id}/content", raise_for_status=True) as content:
            return await content.read()

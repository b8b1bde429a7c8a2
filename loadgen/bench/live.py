"""A stack of its own under one policy, and the videos that are asked of it at the times of a workload."""

import asyncio
import contextlib
import json
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp

from common.policies.video.rib import VideoKind
from loadgen.bench.process import BenchmarkError, started
from loadgen.workloads import Workload

_VIDEO_TIMEOUT_S = 900.0
_WARM_UP_STEPS = 4
_TERMINAL = ("completed", "failed", "cancelled")


def warm_up_steps(workload: Workload) -> int:
    """How many steps each of the short videos has that come before those of the workload."""
    return min(_WARM_UP_STEPS, *workload.steps)


class LiveStack:
    """A running stack, by its address."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self._session = session

    async def warm_up(self, workload: Workload, slots: int) -> None:
        """A short video of every kind on every slot: what is done once in a process's life is done."""
        steps = warm_up_steps(workload)
        for kind in workload.kinds:
            await asyncio.gather(*(self._video(kind, steps, slot, "warming up") for slot in range(slots)))

    async def run(self, workload: Workload) -> list[float]:
        """Ask for all videos, each at its time, whatever became of the others; seconds from that time to its end."""
        # A little later, so that the first one is not late already.
        begin_s = time.monotonic() + 0.2

        async def one(number: int) -> float:
            due_s = begin_s + float(workload.arrival_s[number])
            await asyncio.sleep(max(0.0, due_s - time.monotonic()))
            kind = workload.kinds[int(workload.kind[number])]
            await self._video(kind, workload.steps[number], number, "a red circle moving right")
            return time.monotonic() - due_s

        return list(await asyncio.gather(*map(one, range(len(workload)))))

    async def _video(self, kind: VideoKind, steps: int, number: int, prompt: str) -> None:
        """Order one and wait for its end. No two prompts are alike, so that none is encoded already.

        Raises:
            BenchmarkError: it was not made.
        """
        fields = {
            "prompt": f"{prompt} {number}",
            "size": f"{kind.width}x{kind.height}",
            "frames": kind.frames,
            "steps": steps,
            "seed": number,
        }
        async with asyncio.timeout(_VIDEO_TIMEOUT_S):
            async with self._session.post("/v1/videos", json=fields) as response:
                body = await response.json()
                if response.status != 200:
                    raise BenchmarkError(f"a video was refused: {body['error']['message']}")
            async with self._session.get(f"/v1/videos/{body['id']}/events", raise_for_status=True) as events:
                async for line in events.content:
                    if not line.startswith(b"data:"):
                        continue
                    told = json.loads(line.removeprefix(b"data:"))
                    if told["state"] == "completed":
                        return
                    if told["state"] in _TERMINAL:
                        raise BenchmarkError(f"a video is {told['state']}: {told['error']}")
        raise BenchmarkError("a video's events ended before it did")


@contextlib.asynccontextmanager
async def live_stack(
    policy: str, rib: Path, model: str, slots: int, environment: dict[str, str]
) -> AsyncIterator[LiveStack]:
    """The stack under ``policy`` with so many slots; stopped at the end."""
    command = [sys.executable, "-m", "compose.cli", "up", "--port", "0", "--log-level", "warning"]
    command += ["--policy", policy, "--rib", str(rib), "--video-model", model, "--language-model", "none"]
    command += ["--set", f"dit={slots}", "--set", f"vae={slots}"]
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=10.0, sock_read=60.0)
    async with (
        started(command, environment) as (_, ready),
        aiohttp.ClientSession(ready.split()[1], timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session,
    ):
        yield LiveStack(session)

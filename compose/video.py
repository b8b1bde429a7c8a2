"""``triptych video``: orders one video, shows how it comes along, brings it home."""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from compose.client import StackClient
from compose.environment import set_aside, unknown
from compose.errors import ServerError, StackError
from compose.files import prepare_file
from compose.local import StackOptions, running_stack
from compose.sheet import write_sheet
from compose.timeline.page import write_page
from compose.timeline.story import Story
from compose.timeline.trace import write_trace
from compose.up import Interruption, report

_INTERRUPTED = 130
_CANCEL_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class VideoOrder:
    """What is to be made and where it goes. What is None is the server's choice."""

    prompt: str
    output: Path
    sheet: Path | None = None
    timeline: Path | None = None
    trace: Path | None = None
    size: tuple[int, int] | None = None
    frames: int | None = None
    fps: int | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    negative_prompt: str | None = None
    seed: int | None = None
    model: str | None = None
    priority: int | None = None
    deadline_s: float | None = None
    expand: bool = False

    @property
    def files(self) -> tuple[Path, ...]:
        """All that is to be written."""
        return tuple(path for path in (self.output, self.sheet, self.timeline, self.trace) if path is not None)

    def fields(self) -> dict[str, object]:
        """The body of the request."""
        fields: dict[str, object | None] = {
            "prompt": self.prompt,
            "size": None if self.size is None else f"{self.size[0]}x{self.size[1]}",
            "frames": self.frames,
            "fps": self.fps,
            "steps": self.steps,
            "guidance_scale": self.guidance_scale,
            "negative_prompt": self.negative_prompt,
            "seed": self.seed,
            "model": self.model,
            "priority": self.priority,
            "deadline": self.deadline_s,
            "expand_prompt": self.expand or None,
        }
        return {name: value for name, value in fields.items() if value is not None}


def run_video(order: VideoOrder, base_url: str, private_stack: StackOptions | None) -> int:
    """Make one video on the server at ``base_url``, or on a stack started for it; returns the exit code."""
    return asyncio.run(_video(order, base_url, private_stack))


async def _video(order: VideoOrder, base_url: str, private_stack: StackOptions | None) -> int:
    interruption = Interruption()
    console = Console(stderr=True)
    try:
        for path in order.files:
            prepare_file(path)
        async with _server(base_url, private_stack, interruption, console) as url, StackClient(url) as client:
            job = await client.create(order.fields())
            if order.expand:
                report(_expansion(order.prompt, job))
            await _follow(client, str(job["id"]), console)
            await _bring_home(client, job, order)
    except asyncio.CancelledError:
        if not interruption.asked:
            raise
        return _INTERRUPTED
    except StackError as error:
        report(f"triptych: {error}")
        return error.status
    for path in order.files:
        report(str(path))
    return 0


@contextlib.asynccontextmanager
async def _server(
    base_url: str, private_stack: StackOptions | None, interruption: Interruption, console: Console
) -> AsyncIterator[str]:
    if private_stack is None:
        yield base_url
        return
    for line in (*unknown(os.environ, private_stack), *set_aside(os.environ, private_stack)):
        report(line)
    async with contextlib.AsyncExitStack() as held:
        with console.status("starting the stack"):
            stack = await held.enter_async_context(running_stack(private_stack, report, interruption.hurries))
        yield stack.base_url


async def _follow(client: StackClient, video_id: str, console: Console) -> None:
    """Show the job's progress until it is completed.

    Raises:
        ServerError: it failed or was cancelled.
    """
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[detail]}"))
    try:
        with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
            task = progress.add_task("queued", total=None, detail="")
            async for state in client.progress(video_id):
                progress.update(
                    task,
                    description=f"{state['state']:<9}",
                    completed=state.get("step") or 0,
                    total=state.get("steps") or None,
                    detail=detail_of(state),
                )
    except asyncio.CancelledError:
        with contextlib.suppress(ServerError, TimeoutError):
            async with asyncio.timeout(_CANCEL_TIMEOUT_S):
                await client.cancel(video_id)
        raise
    job = await client.retrieve(video_id)
    if job["status"] != "completed":
        reason = (job.get("error") or {}).get("message", "no reason given")
        raise ServerError(f"the video is {job['state']}, not completed: {reason}")


def detail_of(state: dict[str, Any]) -> str:
    """Queue place, step, degree of parallelism and estimate, as far as a progress report has them."""
    parts = []
    if state.get("queue_place"):
        parts.append(f"place {state['queue_place']} in the queue")
    if state.get("step"):
        parts.append(f"step {state['step']}/{state['steps']}")
    slots = state.get("degree_of_parallelism") or 0
    if slots:
        parts.append(f"on {slots} slot{'s' if slots > 1 else ''}")
    if state.get("estimate_s") is not None:
        parts.append(f"about {max(0.0, state['estimate_s']):.0f} s left")
    return ", ".join(parts)


def _expansion(idea: str, job: dict[str, Any]) -> str:
    """What became of the idea, for the terminal."""
    caption = job.get("expanded_prompt")
    if caption is None:
        return f'"{idea}" stays as it is: the language model has no caption for it'
    return f'"{idea}" becomes "{caption}"'


async def _bring_home(client: StackClient, job: dict[str, Any], order: VideoOrder) -> None:
    video_id = str(job["id"])
    # What the video model read; without an expansion it is the prompt itself.
    title = job.get("expanded_prompt") or order.prompt
    await client.download(video_id, order.output)
    if order.timeline is not None or order.trace is not None:
        stories = [Story(title, await client.timeline(video_id))]
        if order.timeline is not None:
            write_page(order.timeline, stories)
        if order.trace is not None:
            write_trace(order.trace, stories)
    if order.sheet is not None:
        await asyncio.to_thread(write_sheet, order.output, order.sheet, title)

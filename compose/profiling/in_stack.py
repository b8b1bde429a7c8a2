"""Measuring in a stack that runs: what steps and decoding take with everything around them.

On a machine whose slots are its cores, scheduler, broker, cache store and gateway take their time from the steps, and a
step under way waits for nobody but is followed by a report, a look at the lease and sometimes a checkpoint. So videos
are made, as many at once as keep all slots busy, under a policy of one fixed degree (SDoP), and their timelines read.
"""

import asyncio
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from common.messages.video import VideoTimeline
from common.policies.video.rib import KindProfile, VideoKind
from compose.client import StackClient
from compose.errors import OptionError, StartError
from compose.local import StackOptions, running_stack
from compose.profiling.measure import Measured, Watch
from compose.profiling.plan import Plan, ProfileOptions, degrees_of
from compose.spec import read_stack
from compose.up import report

# What is done once in a process's life is done in these.
_FIRST_STEPS = 4


@dataclass(frozen=True)
class Readings:
    """Of one video, in seconds: from one step's end to the next's; from the last step to the stored file; the rest.

    The rest is what the client waits for while no slot is held: until the first step begins, and after the decoding.
    """

    step_s: tuple[float, ...]
    decode_s: float
    rest_s: float


def check_in_stack(options: ProfileOptions) -> None:
    """Raises OptionError for what only lone processes can be told."""
    other = (options.alone, options.sequence != "dsp", not options.guidance_parallel, options.device != "auto")
    if any(other) or options.threads != 1:
        raise OptionError("--in-stack measures what triptych up starts: it takes no --alone, --sequence, --device, ...")


async def measure_in_stack(plan: Plan, watch: Watch) -> Measured:
    """Measure all of the plan, a stack for each degree.

    Raises:
        StackError: a stack did not start, or a video was not made.
    """
    slots = plan.options.slots or read_stack({}).services["dit"].replicas
    step_s: dict[VideoKind, dict[int, float]] = {kind: {} for kind in plan.kinds}
    others: dict[VideoKind, list[Readings]] = {kind: [] for kind in plan.kinds}
    degrees = degrees_of(slots)
    for done, degree in enumerate(degrees):
        options = StackOptions(
            port=0,
            replicas={"dit": slots, "vae": slots},
            video_model=plan.model,
            language_model="none",
            policy=f"sdop:{degree}",
            log_level="warning",
        )
        watch(f"degree {degree}", done * len(plan.kinds) // len(degrees), len(plan.kinds))
        async with running_stack(options, report) as stack, StackClient(stack.base_url) as client:
            for kind in plan.kinds:
                await _make(client, kind, _FIRST_STEPS, slots // degree)
                steps = plan.options.warm_up + plan.options.repeats
                made = await _make(client, kind, max(2, steps), slots // degree)
                # The mean, not the median: a video pays for its slow steps too.
                counted = [reading for video in made for reading in video.step_s[-plan.options.repeats :]]
                step_s[kind][degree] = statistics.fmean(counted)
                # Decoding is measured where all slots do it, at degree 1.
                others[kind] += made if degree == 1 else []
    rest_s = statistics.median(video.rest_s for videos in others.values() for video in videos)
    profiles = {
        kind: KindProfile(step_s[kind], statistics.median(video.decode_s for video in others[kind]), rest_s)
        for kind in plan.kinds
    }
    return Measured(profiles, {}, "a stack", slots)


async def _make(client: StackClient, kind: VideoKind, steps: int, count: int) -> Sequence[Readings]:
    """Make so many videos at once."""
    return await asyncio.gather(*(make_one(client, kind, steps, number) for number in range(count)))


async def make_one(client: StackClient, kind: VideoKind, steps: int, number: int) -> Readings:
    """Make one video and read its timeline. Raises StackError: it was not made."""
    heard_at_s: float | None = None
    asked_at_s = time.time()
    size = f"{kind.width}x{kind.height}"
    fields = {"prompt": f"a red circle moving right, {number} of {steps}", "size": size, "frames": kind.frames}
    video_id = str((await client.create({**fields, "steps": steps, "seed": number}))["id"])
    async for progress in client.progress(video_id):
        if progress["state"] == "completed":
            heard_at_s = time.time()
    if heard_at_s is None:
        # A stream that broke off just before its last event is not taken up again: the record has it too.
        heard_at_s = time.time()
        job = await client.retrieve(video_id)
        if job["state"] != "completed":
            raise StartError(f"a video of {size} was not made: {job['error']}")
    return readings_of(await client.timeline(video_id), asked_at_s, heard_at_s)


def readings_of(timeline: VideoTimeline, asked_at_s: float, heard_at_s: float) -> Readings:
    """What a finished video of two steps or more shows."""
    steps = {span.step: span for span in timeline.spans if span.step is not None}
    ends_s = [steps[step].ended_at_s for step in sorted(steps)]
    (decoding,) = [span for span in timeline.spans if span.phase == "decode"]
    began_s = min(span.started_at_s for span in steps.values())
    return Readings(
        step_s=tuple(later - earlier for earlier, later in pairwise(ends_s)),
        decode_s=decoding.ended_at_s - ends_s[-1],
        rest_s=(began_s - asked_at_s) + (heard_at_s - decoding.ended_at_s),
    )

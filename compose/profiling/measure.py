"""Carries out a plan with a crew: what to ask whom, and what the answers come to."""

import asyncio
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.policies.video.rib import KindProfile, VideoKind
from compose.profiling.crew import Crew, MeasuringProcess
from compose.profiling.plan import Plan, degrees_of, slots_of, teams_of

# Told what has just begun, and how much of the whole is done.
Watch = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Measured:
    """What came of it: times by kind, tokens by kind, the device, and the slots."""

    profiles: dict[VideoKind, KindProfile]
    tokens: dict[VideoKind, int]
    device: str
    slots: int


async def measure(plan: Plan, crew: Crew, folder: Path, watch: Watch) -> Measured:
    """Measure all of it. ``folder`` holds what the processes hand to each other.

    Raises:
        OptionError: more slots than GPUs, or no GPU where one was asked for.
        StartError: a process could not measure.
    """
    return await _Measuring(plan, crew, folder, watch).run()


class _Measuring:
    def __init__(self, plan: Plan, crew: Crew, folder: Path, watch: Watch) -> None:
        self._plan = plan
        self._crew = crew
        self._text = str(folder / "text.safetensors")
        self._watch = watch
        self._often = {"repeats": plan.options.repeats, "warm_up": plan.options.warm_up}
        self._token = 0
        self._tokens: dict[VideoKind, int] = {}
        self._done = 0
        self._slots = 0

    async def run(self) -> Measured:
        options = self._plan.options
        await self._crew.grow(1)
        first = self._crew.members[0]
        self._slots = slots_of(options, first.gpus)
        await self._crew.grow(degrees_of(self._slots)[-1] if options.alone else self._slots)
        self._watch("text encoder", 0, len(self._plan.kinds))
        encoded = await first.ask("encode", path=self._text, **self._often)
        encode_s = float(statistics.median(encoded["seconds"]))
        await asyncio.gather(*(member.ask("load") for member in self._crew.members))
        profiles = {kind: await self._kind(kind, encode_s) for kind in self._plan.kinds}
        return Measured(profiles, self._tokens, first.device, self._slots)

    async def _kind(self, kind: VideoKind, encode_s: float) -> KindProfile:
        self._watch(f"{kind.width}x{kind.height}, {kind.frames} frames", self._done, len(self._plan.kinds))
        # The widest first, so that what is decoded afterwards is one process's own video.
        degrees = degrees_of(self._slots)
        step_s = {degree: await self._step_s(kind, degree) for degree in reversed(degrees)}
        decode_s = await self._decode_s(kind)
        self._done += 1
        return KindProfile({degree: step_s[degree] for degree in degrees}, decode_s, encode_s)

    async def _step_s(self, kind: VideoKind, degree: int) -> float:
        """The median over all steps of all groups at work, as their leaders see it."""
        asked = []
        for slots in teams_of(degree, self._slots, self._plan.options.alone):
            team = [self._crew.members[slot] for slot in slots]
            self._token += 1
            asked.append(self._step_of(team, kind, self._token))
        answers = await asyncio.gather(*asked)
        self._tokens[kind] = int(answers[0]["tokens"])
        return float(statistics.median(reading for answer in answers for reading in answer["seconds"]))

    async def _step_of(self, team: list[MeasuringProcess], kind: VideoKind, token: int) -> dict[str, Any]:
        """The leader's answer."""
        request = {
            "kind": (kind.width, kind.height, kind.frames),
            "path": self._text,
            "members": [member.name for member in team],
            "address": team[0].address,
            "token": token,
            "sequence": self._plan.options.sequence,
            "guidance_parallel": self._plan.options.guidance_parallel,
            **self._often,
        }
        answers = await asyncio.gather(*(member.ask("step", **request) for member in team))
        return answers[0]

    async def _decode_s(self, kind: VideoKind) -> float:
        members = self._crew.members[:1] if self._plan.options.alone else self._crew.members[: self._slots]
        size = (kind.width, kind.height, kind.frames)
        answers = await asyncio.gather(*(member.ask("decode", kind=size, **self._often) for member in members))
        return float(statistics.median(reading for answer in answers for reading in answer["seconds"]))

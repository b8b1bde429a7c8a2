"""DDiT's RIB: what the offline profile knows of every kind of video, and the optimal degree of parallelism from it.

Source: DDiT (arXiv 2506.13497), the offline profiler's store and the rule for the optimal degree.
Departures: the store keeps step times by degree and not only the optimum, because the starvation time needs them;
gains too small to be told from noise count as none; a kind that was not profiled is scaled from the nearest one.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import lru_cache
from typing import Any, NamedTuple

NOISE = 0.03
DEFAULT_THRESHOLD = 0.4


class WrongRib(ValueError):
    """The text of a RIB file is not one; the message names the field."""


class UnknownDegree(ValueError):
    """A degree of parallelism that was not profiled."""


class DegreeRule(StrEnum):
    """How the optimal degree follows from the profile. Both give 1, 2 and 4 for the paper's table."""

    LARGEST_GAIN = "largest_gain"
    THRESHOLD = "threshold"


class VideoKind(NamedTuple):
    """What decides how long a video takes, apart from its number of steps. Pixels, pixels, frames.

    A tuple, as it is a key of many dictionaries and a tuple's hash costs least.
    """

    width: int
    height: int
    frames: int

    @property
    def volume(self) -> int:
        """Pixels times frames: proportional to the number of tokens."""
        return self.width * self.height * self.frames


@lru_cache(maxsize=4096)
def video_kind(width: int, height: int, frames: int) -> VideoKind:
    """The kind; the same object for the same numbers, so that look-ups by kind need not compare fields."""
    return VideoKind(width, height, frames)


@dataclass(frozen=True, slots=True)
class KindProfile:
    """Measured seconds for one kind: a denoising step by degree of parallelism, decoding and encoding on one GPU."""

    step_s: Mapping[int, float]
    decode_s: float
    encode_s: float = 0.0

    def scaled(self, factor: float) -> "KindProfile":
        steps = {degree: seconds * factor for degree, seconds in self.step_s.items()}
        return KindProfile(steps, self.decode_s * factor, self.encode_s)


class _Resolved(dict[VideoKind, KindProfile]):
    """The profiles, to which those of other kinds are added when they are first asked for."""

    def __init__(self, profiles: Mapping[VideoKind, KindProfile]) -> None:
        super().__init__(profiles)
        self._profiled = profiles

    def __missing__(self, kind: VideoKind) -> KindProfile:
        nearest = _nearest(self._profiled, kind)
        profile = self[kind] = self._profiled[nearest].scaled(kind.volume / nearest.volume)
        return profile


@dataclass(slots=True)
class Rib:
    """Step, decode and encode times by kind of video, and the optimal degree of each.

    All kinds are profiled at the same ``degrees``: 1, 2, 4 and so on, without gaps. A kind that is not in the store
    takes the times of the one nearest in pixels times frames (by ratio), multiplied by that ratio; its optimal degree
    is that kind's. Each look-up after the first of its kind costs one dictionary access.

    Raises:
        WrongRib: no kind, or degrees that are not 1, 2, 4, ... or not the same for all kinds, or a time below zero.
    """

    profiles: Mapping[VideoKind, KindProfile]
    rule: DegreeRule = DegreeRule.LARGEST_GAIN
    threshold: float = DEFAULT_THRESHOLD
    degrees: tuple[int, ...] = field(init=False)
    # All times of a kind, scaled where it was not profiled; a look-up in a dictionary, as it is asked for often.
    profile: Callable[[VideoKind], KindProfile] = field(init=False, repr=False, compare=False)
    _optimal: dict[VideoKind, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.profiles:
            raise WrongRib("kinds: there is none")
        self.degrees = tuple(sorted(next(iter(self.profiles.values())).step_s))
        if self.degrees != tuple(1 << order for order in range(len(self.degrees))) or not self.degrees:
            raise WrongRib(f"step_s: the degrees must be 1, 2, 4, ... without a gap, not {self.degrees}")
        for kind, profile in self.profiles.items():
            if tuple(sorted(profile.step_s)) != self.degrees:
                raise WrongRib(f"step_s: {kind} has the degrees {sorted(profile.step_s)}, others {self.degrees}")
            if min(profile.step_s.values()) <= 0 or profile.decode_s < 0 or profile.encode_s < 0:
                raise WrongRib(f"step_s, decode_s, encode_s: {kind} has a time that cannot be")
        self.profile = _Resolved(self.profiles).__getitem__
        self._optimal = {}

    def step_s(self, kind: VideoKind, degree: int) -> float:
        """Seconds of one denoising step on ``degree`` GPUs.

        Raises:
            UnknownDegree: not one of ``degrees``.
        """
        try:
            return self.profile(kind).step_s[degree]
        except KeyError:
            raise UnknownDegree(f"{degree} is not among the profiled degrees {self.degrees}") from None

    def decode_s(self, kind: VideoKind) -> float:
        """Seconds of decoding, on any number of GPUs (the VAE does not scale: DDiT, figure 5)."""
        return self.profile(kind).decode_s

    def encode_s(self, kind: VideoKind) -> float:
        """Seconds of text encoding."""
        return self.profile(kind).encode_s

    def optimal_degree(self, kind: VideoKind) -> int:
        """DDiT's B: beyond it, more GPUs do not pay off."""
        optimal = self._optimal.get(kind)
        if optimal is None:
            optimal = optimal_degree(self.profile(kind).step_s, self.rule, self.threshold)
            self._optimal[kind] = optimal
        return optimal

    def nearest(self, kind: VideoKind) -> VideoKind:
        """The profiled kind whose pixels times frames are nearest by ratio; of two equally near ones the smaller."""
        return _nearest(self.profiles, kind)

    def to_json(self) -> str:
        """The store as text, for a file."""
        kinds = [
            {
                "width": kind.width,
                "height": kind.height,
                "frames": kind.frames,
                "step_s": {str(degree): profile.step_s[degree] for degree in self.degrees},
                "decode_s": profile.decode_s,
                "encode_s": profile.encode_s,
            }
            for kind, profile in self.profiles.items()
        ]
        return json.dumps({"rule": self.rule.value, "threshold": self.threshold, "kinds": kinds}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> "Rib":
        """Read what ``to_json`` wrote; ``rule``, ``threshold`` and ``encode_s`` may be left out.

        Raises:
            WrongRib: the text is not a RIB; names the field.
        """
        try:
            content = json.loads(text)
        except ValueError as error:
            raise WrongRib(f"not JSON: {error}") from None
        if not isinstance(content, dict):
            raise WrongRib("not a JSON object")
        rule = content.get("rule", DegreeRule.LARGEST_GAIN.value)
        if rule not in set(DegreeRule):
            raise WrongRib(f"rule: {rule!r} is not one of {', '.join(DegreeRule)}")
        threshold = _number(content.get("threshold", DEFAULT_THRESHOLD), "threshold")
        entries = content.get("kinds")
        if not isinstance(entries, list):
            raise WrongRib("kinds: not a list")
        return cls(dict(_entry(entry, f"kinds[{at}]") for at, entry in enumerate(entries)), DegreeRule(rule), threshold)


def paper_rib(base_240p_s: float = 0.25) -> Rib:
    """The paper's three resolutions at 51 frames, up to 8 GPUs.

    Relative step times follow from the gains by doubling that are reported of its figures 5 and 8; absolute ones are
    known for 360p alone, with the text encoder counted into the steps. ``base_240p_s`` is the 240p step on one GPU,
    between 0.15 and 0.27 s.
    """
    table = (
        (VideoKind(256, 144, 51), 0.10, (1.0, 1.00, 1.07, 1.09), 0.14),
        (VideoKind(426, 240, 51), base_240p_s, (1.0, 0.55, 0.44, 0.47), 0.39),
        (VideoKind(640, 360, 51), 0.615, (1.0, 0.54, 0.286, 0.189), 0.87),
    )
    return Rib(
        {
            kind: KindProfile({1 << order: base_s * ratio for order, ratio in enumerate(ratios)}, decode_s)
            for kind, base_s, ratios, decode_s in table
        }
    )


def doubling_gains(step_s: Mapping[int, float]) -> dict[int, float]:
    """DDiT's z by degree: the share of the step time that doubling up to it saves.

    Less than 3 % either way is noise and counts as 0.
    """
    gains = {}
    for degree in sorted(step_s):
        if degree > 1:
            gain = 1.0 - step_s[degree] / step_s[degree // 2]
            gains[degree] = gain if abs(gain) >= NOISE else 0.0
    return gains


def optimal_degree(
    step_s: Mapping[int, float], rule: DegreeRule = DegreeRule.LARGEST_GAIN, threshold: float = DEFAULT_THRESHOLD
) -> int:
    """The degree whose doubling gains most, or the largest whose doubling gains at least ``threshold``; else 1."""
    gains = doubling_gains(step_s)
    if rule is DegreeRule.THRESHOLD:
        return max((degree for degree, gain in gains.items() if gain >= threshold and gain > 0), default=1)
    best = max(gains, key=lambda degree: gains[degree], default=1)
    return best if gains.get(best, 0.0) > 0 else 1


def powers_of_two(most: int) -> Iterable[int]:
    """1, 2, 4, ... up to ``most``."""
    degree = 1
    while degree <= most:
        yield degree
        degree *= 2


def _nearest(profiles: Mapping[VideoKind, KindProfile], kind: VideoKind) -> VideoKind:
    if kind in profiles:
        return kind
    return min(profiles, key=lambda known: (_ratio(known.volume, kind.volume), known.volume))


def _ratio(one: int, other: int) -> float:
    return max(one / other, other / one)


def _entry(entry: Any, where: str) -> tuple[VideoKind, KindProfile]:
    if not isinstance(entry, dict):
        raise WrongRib(f"{where}: not an object")
    width, height, frames = (_whole(entry.get(name), f"{where}.{name}") for name in ("width", "height", "frames"))
    steps = entry.get("step_s")
    if not isinstance(steps, dict):
        raise WrongRib(f"{where}.step_s: not an object")
    step_s = {
        _whole(int(degree) if degree.isdecimal() else degree, f"{where}.step_s"): _number(
            seconds, f"{where}.step_s[{degree}]"
        )
        for degree, seconds in steps.items()
    }
    decode_s = _number(entry.get("decode_s"), f"{where}.decode_s")
    encode_s = _number(entry.get("encode_s", 0.0), f"{where}.encode_s")
    return VideoKind(width, height, frames), KindProfile(step_s, decode_s, encode_s)


def _whole(value: Any, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise WrongRib(f"{where}: {value!r} is not a whole number above 0")
    return value


def _number(value: Any, where: str) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or value < 0 or value != value:
        raise WrongRib(f"{where}: {value!r} is not a number of at least 0")
    return float(value)

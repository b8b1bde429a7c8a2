"""The measuring core of every micro-benchmark: two things, run in turn, and the ratio of their times.

A busy machine makes single readings worthless, so nothing here quotes one. The two sides run in pairs, each pair
within one short stretch of time and in changing order (ours first, then theirs first), and what is reported is the
median of the pairs' ratios with its quartiles.
"""

import json
import statistics
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

Clock = Callable[[], float]

_SCALES = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"))


@dataclass(frozen=True)
class Side:
    """The readings of one of the two things, in seconds per operation."""

    name: str
    seconds: tuple[float, ...]

    @property
    def median_s(self) -> float:
        return statistics.median(self.seconds)

    @property
    def best_s(self) -> float:
        return min(self.seconds)


@dataclass(frozen=True)
class Comparison:
    """Readings of ``ours`` and ``theirs``; reading i of both was taken as pair i. A ratio below 1: ours is faster."""

    title: str
    ours: Side
    theirs: Side

    @property
    def ratios(self) -> tuple[float, ...]:
        """Our time over theirs, pair by pair."""
        return tuple(mine / other for mine, other in zip(self.ours.seconds, self.theirs.seconds, strict=True))

    @property
    def median_ratio(self) -> float:
        return statistics.median(self.ratios)

    @property
    def quartiles(self) -> tuple[float, float]:
        """First and third quartile of the ratios: half of all pairs lie between them."""
        first, _, third = statistics.quantiles(self.ratios, n=4, method="inclusive")
        return first, third

    def as_dict(self) -> dict[str, object]:
        """For ``--json``: names, median seconds, median ratio, spread, and every reading."""
        first, third = self.quartiles
        return {
            "title": self.title,
            "pairs": len(self.ratios),
            "ours": _side_dict(self.ours),
            "theirs": _side_dict(self.theirs),
            "median_ratio": self.median_ratio,
            "spread": {"first_quartile": first, "third_quartile": third},
        }

    def text(self) -> str:
        """Three lines for people: the two things, their median ratio and its spread."""
        first, third = self.quartiles
        width = max(len(self.ours.name), len(self.theirs.name))
        return "\n".join(
            [
                self.title,
                *(
                    f"  {side.name:<{width}}  median {_duration(side.median_s)}  best {_duration(side.best_s)}"
                    for side in (self.ours, self.theirs)
                ),
                f"  ratio {self.median_ratio:.3f}  (quartiles {first:.3f} to {third:.3f}, {len(self.ratios)} pairs)",
            ]
        )


def compare(
    ours: Callable[[], object],
    theirs: Callable[[], object],
    *,
    title: str,
    names: tuple[str, str] = ("ours", "theirs"),
    pairs: int = 15,
    warmup: int = 2,
    operations: int = 1,
    clock: Clock = time.perf_counter,
) -> Comparison:
    """Run the two in turn and compare their times.

    ``warmup`` pairs are run first and thrown away. ``operations`` is how many operations one call of either does: the
    readings are divided by it.

    Raises:
        ValueError: fewer than two pairs (no spread could be given), or no operation.
    """
    _check(pairs, operations)
    readings: tuple[list[float], list[float]] = ([], [])
    for pair in range(-warmup, pairs):
        for which in _order(pair):
            started = clock()
            (ours, theirs)[which]()
            elapsed = clock() - started
            if pair >= 0:
                readings[which].append(elapsed / operations)
    return _comparison(title, names, readings)


async def compare_async(
    ours: Callable[[], Awaitable[object]],
    theirs: Callable[[], Awaitable[object]],
    *,
    title: str,
    names: tuple[str, str] = ("ours", "theirs"),
    pairs: int = 15,
    warmup: int = 2,
    operations: int = 1,
    clock: Clock = time.perf_counter,
) -> Comparison:
    """``compare`` for coroutine functions; never more than one of the two runs at a time."""
    _check(pairs, operations)
    readings: tuple[list[float], list[float]] = ([], [])
    for pair in range(-warmup, pairs):
        for which in _order(pair):
            started = clock()
            await (ours, theirs)[which]()
            elapsed = clock() - started
            if pair >= 0:
                readings[which].append(elapsed / operations)
    return _comparison(title, names, readings)


def write_json(path: Path, result: dict[str, object]) -> None:
    """Write what a benchmark's ``run`` returned."""
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def keep_rows(result: dict[str, object], rows: Iterable[dict[str, object]], path: Path | None) -> dict[str, object]:
    """The result with its rows; written after each, so that a run that is cut off leaves what it has."""
    runs: list[dict[str, object]] = []
    result["runs"] = runs
    for row in rows:
        runs.append(row)
        if path is not None:
            write_json(path, result)
    return result


def _order(pair: int) -> tuple[int, int]:
    """Who goes first changes from pair to pair, so that neither always finds the caches as the other left them."""
    return (0, 1) if pair % 2 == 0 else (1, 0)


def _check(pairs: int, operations: int) -> None:
    if pairs < 2:
        raise ValueError(f"{pairs} pairs give no spread: ask for 2 or more")
    if operations < 1:
        raise ValueError(f"a reading of {operations} operations has no time per operation: ask for 1 or more")


def _comparison(title: str, names: tuple[str, str], readings: tuple[list[float], list[float]]) -> Comparison:
    return Comparison(title, Side(names[0], tuple(readings[0])), Side(names[1], tuple(readings[1])))


def _side_dict(side: Side) -> dict[str, object]:
    return {"name": side.name, "median_s": side.median_s, "best_s": side.best_s, "seconds": list(side.seconds)}


def _duration(seconds: float) -> str:
    for scale, unit in _SCALES:
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"

"""Rounds that belong together though they were run at different times: what they have in common, kept in ``--json``."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.policies.video.rib import Rib, WrongRib
from loadgen.bench.rounds import Readings
from loadgen.workloads import Mix, Pattern, Workload, make_workload, mix_named, saturation_rate


class WrongSeries(ValueError):
    """A file from which no rounds can be gone on with; the message says why."""


@dataclass(frozen=True)
class Series:
    """Round i is the requests of seed ``first_seed`` + i; ``load`` is a share of saturation by ``rib``."""

    policies: tuple[str, ...]
    rib: Rib
    model: str
    slots: int
    steps: int
    requests: int
    load: float
    mix: str
    first_seed: int

    @property
    def rate(self) -> float:
        """Requests a second."""
        kinds = tuple(self.rib.profiles)
        return self.load * saturation_rate(self.rib, kinds, self._mix, self.slots, self.steps)

    @property
    def _mix(self) -> Mix:
        # An even mix is one of any number of kinds.
        return Mix("even", (1.0,) * len(self.rib.profiles)) if self.mix == "even" else mix_named(self.mix)

    def workload(self, number: int) -> Workload:
        """The requests of one round."""
        seed = self.first_seed + number
        kinds = tuple(self.rib.profiles)
        return make_workload(kinds, self._mix, Pattern.POISSON, self.rate, self.requests, seed, self.steps)

    def turn(self, number: int) -> list[str]:
        """Who begins changes from round to round."""
        first = number % len(self.policies)
        return [*self.policies[first:], *self.policies[:first]]

    def as_dict(self) -> dict[str, object]:
        return {**vars(self), "policies": list(self.policies), "rib": json.loads(self.rib.to_json())}


def read_series(file: Path) -> tuple[Series, Readings]:
    """The series that an earlier run wrote, and its rounds so far.

    Raises:
        WrongSeries: it is not such a file.
    """
    try:
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        kept = content["series"]
        rib = Rib.from_json(json.dumps(kept["rib"]))
        series = Series(**{**kept, "policies": tuple(kept["policies"]), "rib": rib})
        rounds: dict[str, list[list[float]]] = {policy: [] for policy in series.policies}
        for run in sorted(content["runs"], key=lambda run: int(run["seed"])):
            rounds[run["policy"]].append([float(latency) for latency in run["latencies_s"]])
    except OSError as error:
        raise WrongSeries(f"{file}: {error.strerror}") from error
    except (KeyError, TypeError, ValueError, WrongRib) as error:
        raise WrongSeries(f"{file} was not written by ddit-live --json: {error!r}") from error
    if len({len(latencies) for latencies in rounds.values()}) != 1:
        raise WrongSeries(f"{file}: not all policies have the same rounds")
    return series, Readings(rounds)

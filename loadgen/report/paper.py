"""DDiT's published figures (arXiv 2506.13497) and the runs that stand beside them, with what makes them differ.

The paper's body could not be read: the figures other than the two headline ones come from third parties' accounts.
"""

from dataclasses import dataclass

from loadgen.simulator.verdicts import STATIC, Place, Table, Verdict, against_best


@dataclass(frozen=True, slots=True)
class Case:
    """One reported figure. ``reduction`` is the paper's, in per cent, of ``measure`` by DDiT.

    ``point`` None: the paper says "up to", so that ours is the largest reduction over all points with this many GPUs.
    ``others``: against the best of these at the point.
    """

    name: str
    gpus: int
    point: str | None
    others: tuple[str, ...]
    measure: str
    reduction: float
    against: str
    why: str


@dataclass(frozen=True, slots=True)
class Reading:
    """A case with what our runs give; ``reduction`` in per cent with the ends of its interval."""

    case: Case
    verdict: Verdict

    @property
    def reduction(self) -> tuple[float, float, float]:
        ratio = self.verdict.ratio
        return 100 * (1 - ratio.value), 100 * (1 - ratio.high), 100 * (1 - ratio.low)


_BEST_STATIC = "the best static policy"
_NO_DECOUPLING = ("ddit-no-decoupling",)
_NO_PROMOTION = ("ddit-no-promotion",)
_MULTI = (
    "Neither rate nor mix of the paper's 64-GPU run is known; ours has the even mix and eight times the rate of "
    "its single node, 0.63 of saturation. Here the static policies still carry the load, so that what ddit can "
    "gain is mostly the time of the steps themselves; with more load it gains more (next rows)."
)
_UP_TO = "The headline figures are the paper's best case; this is ours over all loads, mixes and patterns."
_SATURATED = (
    "Two groups of four carry about 0.45 requests/s in our cost model, so that at 0.5 the queue of sdop:4 grows "
    "for as long as the run lasts. The paper's run must have been lighter or shorter: the figure depends on that "
    "more than on ddit."
)
_BURST = (
    "The paper's burst trace is not known. Ours is the hardest there is, everything at once: then one GPU a video "
    "wastes nothing, every wider group costs GPU-seconds, and hungry videos come before waiting ones. An "
    "independent simulation of the same system shows it too."
)
_GENTLE = "A gentler burst on a base load: a quarter of every four minutes at saturation, the rest at a fifth of it."
_WAVE = (
    "A burst on top of a base load: a quarter of every four minutes at 1.5 of saturation, the rest at 0.3. One "
    "server then spends much of its time past saturation, as in the burst at once."
)
_HELD = (
    "Ours is largest at saturation: the GPUs held during the decoding are capacity lost, and queues multiply it. "
    "With the even mix it passes the paper's figure at about 0.8 of saturation, and is under a tenth up to half "
    "of it."
)
_PROMOTED = (
    "Ours is largest at light load: a large video that came at a bad moment and stays on one GPU makes the p99 "
    "there. With the even mix it is the paper's figure at 0.6 of saturation, gone at 0.9 and a loss beyond: the "
    "paper too reports that promotion gains little in overload, as it delays later videos."
)

CASES = (
    Case("multi node, rate 0.5 a server", 64, "rate 0.5", STATIC, "p99", 30.4, _BEST_STATIC, _MULTI),
    Case("multi node, rate 0.5 a server", 64, "rate 0.5", STATIC, "mean", 30.0, _BEST_STATIC, _MULTI),
    Case("multi node, up to", 64, None, STATIC, "p99", 30.4, _BEST_STATIC, _UP_TO),
    Case("multi node, up to", 64, None, STATIC, "mean", 30.0, _BEST_STATIC, _UP_TO),
    Case(
        "single node, rate 0.25",
        8,
        "rate 0.25",
        STATIC,
        "p99",
        12.88,
        _BEST_STATIC,
        "The paper's baseline is not named.",
    ),
    Case("single node, rate 0.5", 8, "rate 0.5", ("sdop:4",), "p99", 36.6, "sdop:4", _SATURATED),
    Case("single node, rate 0.5", 8, "rate 0.5", ("sdop:4",), "mean", 44.4, "sdop:4", _SATURATED),
    Case("single node, burst", 8, "burst", STATIC, "p99", 20.7, _BEST_STATIC, _BURST),
    Case("single node, burst", 8, "burst", STATIC, "mean", 21.7, _BEST_STATIC, _BURST),
    Case("single node, gentle square wave", 8, "gentle square", STATIC, "p99", 20.7, _BEST_STATIC, _GENTLE),
    Case("single node, gentle square wave", 8, "gentle square", STATIC, "mean", 21.7, _BEST_STATIC, _GENTLE),
    Case("single node, square wave", 8, "square", STATIC, "p99", 20.7, _BEST_STATIC, _WAVE),
    Case("single node, square wave", 8, "square", STATIC, "mean", 21.7, _BEST_STATIC, _WAVE),
    Case("without DiT/VAE decoupling, up to", 8, None, _NO_DECOUPLING, "p99", 26.1, _NO_DECOUPLING[0], _HELD),
    Case("without DoP promotion, up to", 8, None, _NO_PROMOTION, "p99", 35.2, _NO_PROMOTION[0], _PROMOTED),
    Case(
        "without DoP promotion, gentle square wave",
        8,
        "gentle square",
        _NO_PROMOTION,
        "p99",
        35.2,
        _NO_PROMOTION[0],
        _GENTLE,
    ),
    Case("without DoP promotion, square wave", 8, "square", _NO_PROMOTION, "p99", 35.2, _NO_PROMOTION[0], _WAVE),
)
PAPER_COST = (("ddit", 1.39), ("best baseline", 2.08))


def readings(table: Table) -> list[Reading]:
    """The cases for which there are runs."""
    found = []
    for case in CASES:
        verdict = _verdict(table, case)
        if verdict is not None:
            found.append(Reading(case, verdict))
    return found


def _verdict(table: Table, case: Case) -> Verdict | None:
    verdicts = [
        verdict for verdict in against_best(_at(table, case), "ddit", case.others) if verdict.measure == case.measure
    ]
    return min(verdicts, key=lambda verdict: verdict.ratio.value, default=None)


def _at(table: Table, case: Case) -> Table:
    def fits(place: Place) -> bool:
        if place.gpus != case.gpus:
            return False
        return case.point is None or (place.point == case.point and place.mix == "even")

    return {place: by_policy for place, by_policy in table.items() if fits(place)}

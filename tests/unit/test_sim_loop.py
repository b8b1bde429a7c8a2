"""The simulator's loop: what a lease change costs and when it happens, and that steps left out change nothing."""

import dataclasses
import itertools
from collections.abc import Callable

import numpy as np
import pytest

from common.policies.video.decisions import Decision, GrantLease, ParkJob
from common.policies.video.events import DenoisingFinished, JobParked, StepFinished
from common.policies.video.policy import Policy
from common.policies.video.registry import make_policy, policy_names
from common.policies.video.rib import paper_rib
from common.policies.video.state import Job, Phase
from loadgen.simulator.cost import CostModel, Noise, Overheads
from loadgen.simulator.loop import Cluster, Simulation, Stuck, Watch
from loadgen.simulator.outcome import Outcome, Span, SpanKind, summary
from loadgen.simulator.recorded import recorded_cluster, recorded_workload
from loadgen.simulator.replay import WrongRecord, from_lines, replay, to_lines
from loadgen.workloads import MIXES, Pattern, Workload, make_workload, saturation_rate

RIB = paper_rib()
KINDS = tuple(RIB.profiles)
SMALL, MEDIUM, LARGE = range(3)


def _workload(*requests: tuple[float, int]) -> Workload:
    """Requests as (arrival, kind)."""
    kinds, times = np.array([kind for _, kind in requests]), np.array([at_s for at_s, _ in requests])
    return Workload(KINDS, kinds, times, (30,) * len(requests))


def _mixed(load: float, count: int, gpus: int = 8, seed: int = 1, mix: str = "even") -> Workload:
    rate = load * saturation_rate(RIB, KINDS, MIXES[mix], gpus)
    return make_workload(KINDS, MIXES[mix], Pattern.POISSON, rate, count, seed)


class Scripted(Policy):
    """Does what the test says whenever a policy may schedule. Encodes everything at once."""

    name = "scripted"

    def __init__(self, script: Callable[["Scripted", float], list[Decision]]) -> None:
        super().__init__(rib=RIB)
        self.script = script

    def schedule(self, now_s: float) -> list[Decision]:
        return self.script(self, now_s)

    def job(self, number: int) -> Job | None:
        return self.state.jobs.get(f"video-{number:07d}")


def _run(
    script: Callable[[Scripted, float], list[Decision]], workload: Workload, overheads: Overheads | None = None
) -> tuple[Outcome, Watch]:
    watch = Watch(events=[], decisions=[], degrees=[], spans=[])
    cost = CostModel(RIB, overheads or Overheads.none())
    return Simulation(Scripted(script), Cluster(1, 4), workload, cost, watch=watch).run(), watch


def _start(policy: Scripted, number: int, slots: tuple[int, ...], now_s: float) -> list[Decision]:
    job = policy.job(number)
    ready = job is not None and job.phase in (Phase.ENCODED, Phase.PARKED)
    return [policy.grant_lease(job, slots, now_s, "script")] if job is not None and ready else []


def test_a_lone_video_takes_its_steps_and_its_decoding() -> None:
    outcome, watch = _run(lambda policy, now_s: _start(policy, 0, (0, 1), now_s), _workload((2.0, LARGE)))
    assert outcome.latency_s()[0] == pytest.approx(30 * RIB.step_s(KINDS[LARGE], 2) + 0.87)
    assert outcome.start_s == [2.0]
    # Two GPUs for the steps, the master alone for the decoding.
    assert outcome.gpu_seconds[0] == pytest.approx(2 * 30 * RIB.step_s(KINDS[LARGE], 2) + 0.87)
    assert watch.degrees == [(2.0, 0, 2)]


def test_a_video_grows_at_its_next_step_boundary_and_holds_the_joiners_until_then() -> None:
    grown: list[float] = []

    def script(policy: Scripted, now_s: float) -> list[Decision]:
        decisions = _start(policy, 0, (0,), now_s)
        first = policy.job(0)
        if now_s >= 1.0 and not grown and first is not None and first.phase is Phase.DENOISING:
            grown.append(now_s)
            decisions.append(policy.change_lease(first, (0, 1, 2, 3), "script"))
        return decisions + (_start(policy, 1, (0,), now_s) if first is None else [])

    one, four = RIB.step_s(KINDS[LARGE], 1), RIB.step_s(KINDS[LARGE], 4)
    outcome, watch = _run(script, _workload((0.0, LARGE), (1.0, SMALL)), Overheads(0.01, 0.02, 0.0, 0.0))
    # The second request comes during the second step (0.615 to 1.23 s); the 28 others run four wide.
    assert grown == [1.0]
    boundary = 2 * one
    assert watch.degrees is not None and watch.degrees[1] == (pytest.approx(boundary), 0, 4)
    end_of_steps = boundary + 0.03 + 28 * four
    assert outcome.end_s[0] == pytest.approx(end_of_steps + 0.87)
    assert outcome.gpu_seconds[0] == pytest.approx(1.0 + 4 * (end_of_steps - 1.0) + 0.87)
    assert watch.events is not None
    boundaries = [event for _, event in watch.events if isinstance(event, StepFinished)]
    assert [(event.step, event.next_epoch) for event in boundaries] == [(2, boundaries[0].epoch + 1)]


def test_a_change_in_the_last_step_never_happens() -> None:
    asked: list[GrantLease] = []
    one = RIB.step_s(KINDS[SMALL], 1)

    def script(policy: Scripted, now_s: float) -> list[Decision]:
        decisions = _start(policy, 0, (0,), now_s) + _start(policy, 1, (3,), now_s)
        first = policy.job(0)
        if now_s >= 29.5 * one and not asked and first is not None and first.phase is Phase.DENOISING:
            asked.append(policy.change_lease(first, (0, 1), "script"))
            decisions.append(asked[0])
        return decisions

    outcome, watch = _run(script, _workload((0.0, SMALL), (29.5 * one, SMALL)))
    assert asked and outcome.end_s[0] == pytest.approx(30 * one + 0.14)
    assert watch.events is not None
    finished = next(event for _, event in watch.events if isinstance(event, DenoisingFinished))
    assert finished.epoch < asked[0].epoch


def test_a_parked_video_resumes_where_it_stopped() -> None:
    one, four = RIB.step_s(KINDS[LARGE], 1), RIB.step_s(KINDS[SMALL], 1)
    parked: list[Decision] = []

    def script(policy: Scripted, now_s: float) -> list[Decision]:
        first, second = policy.job(0), policy.job(1)
        decisions: list[Decision] = []
        if second is not None and first is not None and first.phase is Phase.DENOISING and not parked:
            parked.append(policy.park_job(first, "script"))
            decisions += parked
        if first is not None and first.phase is Phase.PARKED and second is not None and second.phase is Phase.ENCODED:
            decisions += _start(policy, 1, (0,), now_s)
        elif second is None:
            decisions += _start(policy, 0, (0,), now_s)
        return decisions

    outcome, watch = _run(script, _workload((0.0, LARGE), (1.0, SMALL)), Overheads(0.0, 0.0, 0.1, 0.2))
    at_parked = 2 * one + 0.1
    assert outcome.end_s[1] == pytest.approx(at_parked + 30 * four + 0.14)
    assert outcome.end_s[0] == pytest.approx(outcome.end_s[1] + 0.2 + 28 * one + 0.87)
    assert outcome.start_s == [0.0, pytest.approx(at_parked)]
    assert outcome.gpu_seconds[0] == pytest.approx(at_parked + 0.2 + 28 * one + 0.87)
    assert watch.decisions is not None and watch.events is not None
    assert [event.step for _, event in watch.events if isinstance(event, JobParked)] == [2]
    assert [type(decision) for _, decision in watch.decisions if isinstance(decision, ParkJob)] == [ParkJob]
    assert [d.from_step for _, d in watch.decisions if isinstance(d, GrantLease)] == [0, 0, 2]


def test_a_policy_that_forgets_a_video_is_found_out() -> None:
    with pytest.raises(Stuck, match="scripted left 1 videos lying"):
        _run(lambda policy, now_s: [], _workload((0.0, SMALL)))


def _essence(decisions: list[tuple[float, Decision]]) -> list[object]:
    """What is decided, without the words: a reason may quote a step that a policy does not need to know."""
    return [
        (at_s, dataclasses.replace(decision, reason="", **({"from_step": 0} if type(decision) is GrantLease else {})))
        for at_s, decision in decisions
    ]


@pytest.mark.parametrize("name", policy_names())
@pytest.mark.parametrize(("load", "noise"), [(0.5, 0.0), (0.9, 0.1), (1.1, 0.0)])
def test_leaving_out_steps_changes_no_decision(name: str, load: float, noise: float) -> None:
    workload = _mixed(load, 120)
    seen: list[tuple[list[object], list[float], list[float]]] = []
    for exact in (False, True):
        watch = Watch(decisions=[])
        policy = make_policy(name, rib=RIB)
        cost = CostModel(RIB, noise=Noise(noise, 3))
        outcome = Simulation(policy, Cluster(1, 8), workload, cost, exact=exact, watch=watch).run()
        assert watch.decisions is not None
        seen.append((_essence(watch.decisions), outcome.end_s, outcome.gpu_seconds))
    assert seen[0][0] == seen[1][0]
    assert seen[0][1:] == seen[1][1:]


@pytest.mark.parametrize("name", policy_names())
def test_the_books_of_the_slots_balance(name: str) -> None:
    spans: list[Span] = []
    watch = Watch(spans=spans)
    workload = _mixed(0.9, 150, gpus=16)
    outcome = Simulation(make_policy(name, rib=RIB), Cluster(2, 8), workload, CostModel(RIB), watch=watch).run()
    assert outcome.completed == len(workload)
    held = sorted(span for span in spans if span.kind is SpanKind.HELD)
    assert sum(span.end_s - span.start_s for span in held) == pytest.approx(outcome.total_gpu_seconds())
    for before, after in itertools.pairwise(held):
        assert before.slot != after.slot or before.end_s <= after.start_s + 1e-9
    assert outcome.total_gpu_seconds() <= 16 * outcome.makespan_s()
    # Nobody is served before he came, nor faster than at the best degree there is.
    fastest = [min(30 * RIB.step_s(kind, degree) for degree in (1, 2, 4, 8)) + RIB.decode_s(kind) for kind in KINDS]
    assert all(
        latency >= fastest[kind] - 1e-9 for latency, kind in zip(outcome.latency_s(), workload.kind, strict=True)
    )
    assert all(start >= at for start, at in zip(outcome.start_s, workload.arrival_s, strict=True))


@pytest.mark.parametrize("name", policy_names())
def test_recorded_events_replayed_give_the_same_decisions(name: str) -> None:
    watch = Watch(events=[], decisions=[])
    workload = _mixed(0.8, 80)
    Simulation(make_policy(name, rib=RIB), Cluster(1, 8), workload, CostModel(RIB), watch=watch).run()
    assert watch.events is not None
    text = to_lines(watch.events)
    assert from_lines(text) == watch.events
    assert replay(from_lines(text), make_policy(name, rib=RIB)) == watch.decisions


def test_a_broken_record_names_its_line() -> None:
    with pytest.raises(WrongRecord, match="line 2"):
        from_lines('{"at_s":1.0,"event":"JobCancelled","job_id":"a"}\n{"at_s":1.0,"event":"Nonsense"}\n')


def test_a_seed_gives_one_run() -> None:
    runs = [
        Simulation(make_policy("fifo"), Cluster(1, 8), _mixed(0.7, 60), CostModel(RIB, noise=Noise(0.2, 5))).run()
        for _ in range(2)
    ]
    assert runs[0].end_s == runs[1].end_s


def test_noise_has_mean_one() -> None:
    factors = Noise(0.2, 1).factors(20_000)
    assert factors.mean() == pytest.approx(1.0, abs=0.01)
    assert factors.std() == pytest.approx(0.2, abs=0.01)


def test_a_summary_names_what_the_readings_need() -> None:
    assert list(summary(np.arange(101.0))) == ["mean", "p50", "p90", "p99", "max"]
    assert summary(np.arange(101.0))["p99"] == pytest.approx(99.0)


def test_a_recorded_run_can_be_simulated_again() -> None:
    watch = Watch(events=[])
    workload = _mixed(0.8, 40, gpus=16)
    before = Simulation(make_policy("ddit", rib=RIB), Cluster(2, 8), workload, CostModel(RIB), watch=watch).run()
    recorded = from_lines(to_lines(watch.events or []))
    again = recorded_workload(recorded)
    assert recorded_cluster(recorded) == Cluster(2, 8)
    after = Simulation(make_policy("ddit", rib=RIB), recorded_cluster(recorded), again, CostModel(RIB)).run()
    assert after.latency_s() == pytest.approx(before.latency_s())
    with pytest.raises(WrongRecord, match="JobArrived"):
        recorded_workload([])


def test_fifo_is_sdop_1() -> None:
    """Why the experiment leaves it out."""
    workload = _mixed(0.9, 200)
    fifo, sdop = (
        Simulation(make_policy(name, rib=RIB), Cluster(1, 8), workload, CostModel(RIB)).run().end_s
        for name in ("fifo", "sdop:1")
    )
    assert fifo == sdop

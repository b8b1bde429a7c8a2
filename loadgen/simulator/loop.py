"""The event loop: workers that cost nothing to run, under a policy that cannot tell them from real ones.

Steps are not events. Between two changes of its lease a video's steps form an arithmetic progression, so that the step
it has reached is computed when somebody asks: before every other event the policy hears the latest step of the videos
it watches (of all, where noise lets them be slower or faster than the profile that a policy predicts by). Only a step
boundary at which a lease changes is an event of its own. ``exact`` delivers every step of every video instead; the
decisions are the same, which a test holds.
"""

import gc
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import Any

from common.messages.cluster import Service
from common.policies.video.decisions import (
    CancelDecoding,
    CompleteJob,
    Decision,
    FailJob,
    GrantLease,
    ParkJob,
    RequeueJob,
    RevokeLease,
    StartDecoding,
    StartEncoding,
)
from common.policies.video.events import (
    DecodingFinished,
    DenoisingFinished,
    Event,
    JobArrived,
    JobParked,
    PromptEncoded,
    StepFinished,
    WorkerJoined,
)
from common.policies.video.policy import Policy
from loadgen.simulator.cost import CostModel
from loadgen.simulator.outcome import Outcome, Span, SpanKind
from loadgen.simulator.video import Video
from loadgen.workloads import Workload

# At one moment: plain steps first, then the boundaries at which leases change, then everything else. So a policy
# always knows every step that has ended by the time it decides.
_STEP, _BOUNDARY, _OTHER = 0, 1, 2


class Stuck(RuntimeError):
    """The policy left videos lying: nothing will happen any more, and they are not done."""


@dataclass(frozen=True, slots=True)
class Cluster:
    """``servers`` of ``slots`` GPUs each, every one with a DiT and a VAE worker; the encoder is never short."""

    servers: int
    slots: int

    @property
    def gpus(self) -> int:
        return self.servers * self.slots

    def joining(self) -> Iterable[WorkerJoined]:
        yield WorkerJoined("encoder-0", Service.ENCODER)
        for slot in range(self.gpus):
            server = f"server-{slot // self.slots:03d}"
            yield WorkerJoined(f"dit-{slot:04d}", Service.DIT, slot, server)
            yield WorkerJoined(f"vae-{slot:04d}", Service.VAE, slot, server)


@dataclass(slots=True)
class Watch:
    """What a run writes down beside its outcome. ``spans_until_s``: the slots' timeline up to this time."""

    events: list[tuple[float, Event]] | None = None
    decisions: list[tuple[float, Decision]] | None = None
    degrees: list[tuple[float, int, int]] | None = None  # (time, video, degree from then on)
    spans: list[Span] | None = None
    spans_until_s: float = float("inf")


class Simulation:
    """One run of one workload under one policy."""

    def __init__(
        self,
        policy: Policy,
        cluster: Cluster,
        workload: Workload,
        cost: CostModel,
        *,
        exact: bool = False,
        watch: Watch | None = None,
    ) -> None:
        self._policy = policy
        self._jobs = policy.state.jobs
        self._cluster = cluster
        self._workload = workload
        self._cost = cost
        self._overheads = cost.overheads
        self._exact = exact
        self._watch = watch or Watch()
        self._heap: list[tuple[float, int, int, Callable[[float, Any], None], Any, int]] = []
        self._sequence = 0
        self._videos: dict[str, Video] = {}
        self._live: dict[str, Video] = {}
        self._denoising: dict[str, Video] = {}
        self._predictable = cost.noise.spread == 0.0
        self._told = 0
        self._outcome = Outcome.empty(policy.name, cluster.gpus, workload)
        self._carry_out: dict[type[Any], Callable[[Any, float], None]] = {
            StartEncoding: self._start_encoding,
            GrantLease: self._grant_lease,
            ParkJob: self._change_later,
            RevokeLease: self._stop_denoising,
            StartDecoding: self._start_decoding,
            CancelDecoding: self._stop_decoding,
            RequeueJob: self._requeue,
            CompleteJob: self._complete,
            FailJob: self._fail,
        }

    def run(self) -> Outcome:
        """To the last video's end.

        Raises:
            Stuck: the policy has forgotten videos.
        """
        collecting = gc.isenabled()
        gc.disable()  # millions of small tuples, none in a cycle
        try:
            self._run()
        finally:
            if collecting:
                gc.enable()
        return self._outcome

    def _run(self) -> None:
        for event in self._cluster.joining():
            self._tell(event, 0.0, None)
        self._factors = self._cost.noise.factors(len(self._workload)).tolist()
        self._arrivals: list[float] = self._workload.arrival_s.tolist()
        self._kinds: list[int] = self._workload.kind.tolist()
        self._push(self._arrivals[0], _OTHER, self._arrive, 0, 0)
        heap = self._heap
        while heap:
            now_s, _, _, what, subject, version = heappop(heap)
            if type(subject) is Video and subject.version != version:
                continue  # overtaken by a change of the video's lease
            what(now_s, subject)
        self._outcome.events = self._told
        if self._live:
            raise Stuck(
                f"{self._policy.name} left {len(self._live)} videos lying, the first is {next(iter(self._live))}"
            )

    def _push(self, time_s: float, rank: int, what: Callable[[float, Any], None], subject: Any, version: int) -> None:
        self._sequence += 1
        heappush(self._heap, (time_s, rank, self._sequence, what, subject, version))

    # --- the policy -----------------------------------------------------------------------------------------------

    def _tell(self, event: Event, now_s: float, video: Video | None) -> None:
        """Bring the watched videos up to date, hand over one event, carry out what is decided."""
        if not self._exact:
            self._catch_up(now_s)
        decisions = self._hand_over(event, now_s)
        carry_out = self._carry_out
        for decision in decisions:
            carry_out[type(decision)](decision, now_s)
        if video is not None:
            self._book(video, now_s)
        for decision in decisions:
            other = self._videos[decision.job_id]
            if other is not video:
                self._book(other, now_s)

    def _hand_over(self, event: Event, now_s: float) -> list[Decision]:
        self._told += 1
        decisions = self._policy.handle(event, now_s)
        if self._watch.events is not None:
            self._watch.events.append((now_s, event))
        if self._watch.decisions is not None:
            self._watch.decisions += [(now_s, decision) for decision in decisions]
        return decisions

    def _catch_up(self, now_s: float) -> None:
        """The latest step of every watched video, if it is news, as of the moment it ended."""
        denoising = self._denoising
        for job_id in list(self._policy.watched() if self._predictable else denoising):
            video = denoising.get(job_id)
            if video is None or now_s < video.next_news_s:
                continue
            step = video.step_at(now_s)
            if step > video.told:
                video.told = step
                self._hand_over(StepFinished(job_id, video.epoch, step), video.end_of_step(step))
            video.next_news_s = video.end_of_step(step + 1)

    def _book(self, video: Video, now_s: float) -> None:
        """Charge the video for the slots the policy says it holds, from now on."""
        job = self._jobs.get(video.job_id)
        slots = job.slots if job is not None else ()
        if slots != video.slots:
            video.gpu_seconds += len(video.slots) * (now_s - video.slots_since_s)
            if self._watch.spans is not None and video.slots_since_s < self._watch.spans_until_s:
                for slot in video.slots:
                    self._watch.spans.append(Span(slot, video.slots_since_s, now_s, video.number, SpanKind.HELD, 0))
            video.slots = slots
            video.slots_since_s = now_s
        if job is None:
            self._outcome.gpu_seconds[video.number] = video.gpu_seconds

    # --- what happens ---------------------------------------------------------------------------------------------

    def _arrive(self, now_s: float, number: int) -> None:
        workload = self._workload
        kind = workload.kinds[self._kinds[number]]
        video = Video(number, f"video-{number:07d}", kind, workload.steps[number], *self._factors[number])
        self._videos[video.job_id] = self._live[video.job_id] = video
        if number + 1 < len(self._arrivals):
            self._push(self._arrivals[number + 1], _OTHER, self._arrive, number + 1, 0)
        priority = workload.priority[number] if workload.priority else 0
        deadline_s = workload.deadline_s[number] if workload.deadline_s else None
        arrived = JobArrived(
            video.job_id, now_s, kind.width, kind.height, kind.frames, video.steps, 0, priority, deadline_s
        )
        self._tell(arrived, now_s, video)

    def _encoded(self, now_s: float, subject: tuple[Video, int]) -> None:
        video, attempt = subject
        self._tell(PromptEncoded(video.job_id, attempt), now_s, video)

    def _stepped(self, now_s: float, video: Video) -> None:
        """One plain step, in exact mode."""
        step = video.step_at(now_s)
        video.told = step
        if step < video.steps:
            self._push(video.end_of_step(step + 1), _STEP, self._stepped, video, video.version)
        self._tell(StepFinished(video.job_id, video.epoch, step), now_s, None)

    def _boundary(self, now_s: float, video: Video) -> None:
        """The step has ended at which the video's lease changes."""
        change, video.pending = video.pending, None
        before = video.epoch
        step = video.step_at(now_s)
        self._span(video, now_s)
        video.told = video.step = step
        if type(change) is GrantLease:
            grown = not set(change.members) <= set(video.members)
            wait_s = self._overheads.regroup_s if len(change.members) > 1 else 0.0
            self._start_segment(video, change, now_s, wait_s + (self._overheads.broadcast_s if grown else 0.0))
            self._tell(StepFinished(video.job_id, before, step, change.epoch), now_s, video)
            return
        self._leave_dit(video)
        self._push(now_s + self._overheads.park_s, _OTHER, self._parked, video, video.version)

    def _parked(self, now_s: float, video: Video) -> None:
        self._degree(video, now_s, 0)
        self._tell(JobParked(video.job_id, video.epoch, video.step), now_s, video)

    def _denoised(self, now_s: float, video: Video) -> None:
        self._span(video, now_s)
        self._leave_dit(video)
        video.step = video.steps
        self._tell(DenoisingFinished(video.job_id, video.epoch), now_s, video)

    def _decoded(self, now_s: float, video: Video) -> None:
        self._span(video, now_s)
        self._tell(DecodingFinished(video.job_id, video.epoch), now_s, video)

    # --- what is decided ------------------------------------------------------------------------------------------

    def _start_encoding(self, decision: StartEncoding, now_s: float) -> None:
        video = self._videos[decision.job_id]
        takes_s = self._cost.rib.encode_s(video.kind)
        self._push(now_s + takes_s, _OTHER, self._encoded, (video, decision.attempt), 0)

    def _grant_lease(self, decision: GrantLease, now_s: float) -> None:
        video = self._videos[decision.job_id]
        if video.running:
            self._change_later(decision, now_s)
            return
        number = video.number
        if video.step == 0:
            self._outcome.start_s[number] = min(now_s, self._outcome.start_s[number])
        wait_s = self._overheads.regroup_s if len(decision.members) > 1 else 0.0
        if video.step > 0:
            wait_s += self._overheads.resume_s
        self._start_segment(video, decision, now_s, wait_s)

    def _start_segment(self, video: Video, lease: GrantLease, now_s: float, wait_s: float) -> None:
        """Steps of equal length from here on, until the lease changes."""
        degree = len(lease.members)
        video.running = True
        self._denoising[video.job_id] = video
        video.epoch = lease.epoch
        video.members = lease.members
        video.worked_on = lease.slots
        video.base = video.step
        video.start_s = now_s + wait_s
        video.step_s = self._cost.step_s(video.kind, degree) * video.step_factor
        video.next_news_s = video.start_s
        video.version += 1
        if self._exact:
            self._push(video.end_of_step(video.base + 1), _STEP, self._stepped, video, video.version)
        self._push(video.end_of_step(video.steps), _OTHER, self._denoised, video, video.version)
        self._degree(video, now_s, degree)

    def _leave_dit(self, video: Video) -> None:
        """It takes no more steps, and what the heap holds of it is void."""
        video.running = False
        video.pending = None
        video.version += 1
        self._denoising.pop(video.job_id, None)

    def _change_later(self, decision: GrantLease | ParkJob, now_s: float) -> None:
        """At the end of the step under way; where that is the video's last one, never."""
        video = self._videos[decision.job_id]
        if not video.running:
            raise Stuck(f"{self._policy.name} changed the lease of {decision.job_id}, which has none")
        step = video.step_at(now_s) + 1
        if step >= video.steps:
            return
        if video.pending is None:
            video.version += 1
            self._push(video.end_of_step(step), _BOUNDARY, self._boundary, video, video.version)
        video.pending = decision

    def _stop_denoising(self, decision: RevokeLease, now_s: float) -> None:
        video = self._videos[decision.job_id]
        video.step = video.step_at(now_s) if video.running else video.step
        self._leave_dit(video)

    def _start_decoding(self, decision: StartDecoding, now_s: float) -> None:
        video = self._videos[decision.job_id]
        video.worked_on = (decision.slot,)
        video.start_s = now_s
        takes_s = self._cost.rib.decode_s(video.kind) * video.decode_factor
        self._push(now_s + takes_s, _OTHER, self._decoded, video, video.version)

    def _stop_decoding(self, decision: CancelDecoding, now_s: float) -> None:
        self._videos[decision.job_id].version += 1

    def _requeue(self, decision: RequeueJob, now_s: float) -> None:
        """The policy starts the video again by itself."""

    def _complete(self, decision: CompleteJob, now_s: float) -> None:
        video = self._live.pop(decision.job_id)
        self._outcome.end_s[video.number] = now_s
        self._outcome.completed += 1

    def _fail(self, decision: FailJob, now_s: float) -> None:
        raise Stuck(f"{self._policy.name} gave up {decision.job_id}: {decision.reason}")

    # --- what is written down -------------------------------------------------------------------------------------

    def _degree(self, video: Video, now_s: float, degree: int) -> None:
        if self._watch.degrees is not None:
            self._watch.degrees.append((now_s, video.number, degree))

    def _span(self, video: Video, now_s: float) -> None:
        spans = self._watch.spans
        if spans is not None and video.start_s < self._watch.spans_until_s:
            kind = SpanKind.DENOISE if video.running else SpanKind.DECODE
            for slot in video.worked_on:
                spans.append(Span(slot, video.start_s, now_s, video.number, kind, len(video.worked_on)))


def simulate(policy: Policy, cluster: Cluster, workload: Workload, cost: CostModel) -> Outcome:
    """One run, nothing written down beside its outcome."""
    return Simulation(policy, cluster, workload, cost).run()

"""Whatever happens in whatever order: the books balance, nothing is lost, and every job ends exactly once."""

from dataclasses import dataclass

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from common.messages.cluster import Service
from common.policies.video import decisions as decide
from common.policies.video import events as event
from common.policies.video.registry import make_policy, policy_names
from common.policies.video.state import Phase

SERVERS = {"left": range(4), "right": range(4, 6)}
SLOTS = {slot: server for server, slots in SERVERS.items() for slot in slots}
EVERYONE = ("encoder-0", *(f"{kind}-{slot}" for kind in ("dit", "vae") for slot in SLOTS))
STEPS = 4
SIZES = ((256, 144), (426, 240), (640, 360))
# These leave a ready job waiting beside a free slot: their groups are cut in advance.
CUT_IN_ADVANCE = ("sdop:", "spci", "dpci")


@dataclass
class Run:
    """A job's workers, as they are: what the step under way runs on, and what they were told for the next."""

    epoch: int
    members: tuple[str, ...]
    step: int
    told: decide.GrantLease | decide.ParkJob | None = None


class Cluster(RuleBasedStateMachine):
    """Plays the workers: does what the policy decides, at any time, with workers dying and coming back."""

    @initialize(policy=st.sampled_from(sorted(policy_names())))
    def build(self, policy: str) -> None:
        self.now_s = 0.0
        self.name = policy
        self.policy = make_policy(policy, first_epoch=1)
        self.alive: set[str] = set()
        self.runs: dict[str, Run] = {}
        self.decodings: dict[str, decide.StartDecoding] = {}
        self.encodings: dict[str, decide.StartEncoding] = {}
        self.arrived: list[str] = []
        self.ended: dict[str, str] = {}
        self.epochs: list[int] = []
        for instance in EVERYONE:
            self.join(instance)

    def join(self, instance: str) -> None:
        service, slot = instance.split("-")
        self.alive.add(instance)
        number = None if service == "encoder" else int(slot)
        self.tell(event.WorkerJoined(instance, Service(service), number, SLOTS.get(number, "")))

    def tell(self, happened: event.Event) -> list[decide.Decision]:
        self.now_s += 0.5
        decisions = self.policy.handle(happened, self.now_s)
        for decision in decisions:
            assert decision.reason
            assert decision.job_id not in self.ended, f"{decision} after the end"
            self.obey(decision)
        return decisions

    def obey(self, decision: decide.Decision) -> None:
        job = decision.job_id
        match decision:
            case decide.StartEncoding(encoder=encoder):
                assert encoder in self.alive
                self.encodings[job] = decision
            case decide.GrantLease():
                self.obey_lease(decision)
            case decide.ParkJob(epoch=epoch, members=members):
                run = self.runs[job]
                assert not isinstance(run.told, decide.ParkJob)
                assert set(members) >= set(run.members) & self.alive
                assert epoch == (run.told.epoch if run.told else run.epoch)
                run.told = decision
            case decide.StartDecoding(instance=instance):
                assert instance in self.alive
                assert job not in self.runs
                self.decodings[job] = decision
            case decide.RevokeLease():
                self.runs.pop(job, None)
            case decide.CancelDecoding():
                self.decodings.pop(job)
            case decide.RequeueJob():
                self.forget(job)
            case decide.CompleteJob() | decide.FailJob():
                self.ended[job] = type(decision).__name__
                self.forget(job)

    def obey_lease(self, lease: decide.GrantLease) -> None:
        assert len(set(lease.members)) == len(lease.members) == len(lease.slots) > 0
        assert len({SLOTS[slot] for slot in lease.slots}) == 1, "a group spans servers"
        assert len(lease.slots).bit_count() == 1
        assert lease.leader == lease.members[0]
        assert set(lease.members) <= self.alive
        assert 0 <= lease.from_step < STEPS
        self.epochs.append(lease.epoch)
        run = self.runs.get(lease.job_id)
        if run is None:
            self.encodings.pop(lease.job_id, None)
            self.runs[lease.job_id] = Run(lease.epoch, lease.members, lease.from_step)
        elif not set(run.members) <= self.alive:
            # The step under way is lost with a member; those left go on at once.
            assert set(lease.members) <= set(run.members)
            assert lease.from_step == run.step
            run.epoch, run.members, run.told = lease.epoch, lease.members, None
        else:
            assert lease.leader == run.members[0], "the master must stay"
            run.told = lease

    def forget(self, job: str) -> None:
        for held in (self.encodings, self.runs, self.decodings):
            held.pop(job, None)

    @rule(size=st.sampled_from(SIZES), priority=st.integers(0, 1), deadline=st.none() | st.integers(1, 90))
    def a_job_arrives(self, size: tuple[int, int], priority: int, deadline: int | None) -> None:
        job_id = f"job-{len(self.arrived)}"
        self.arrived.append(job_id)
        due_s = None if deadline is None else self.now_s + deadline
        arrival = event.JobArrived(job_id, self.now_s, *size, 51, STEPS, priority=priority, deadline_s=due_s)
        self.tell(arrival)

    @rule()
    def an_unfinished_job_comes_with_its_checkpoint(self) -> None:
        job_id = f"job-{len(self.arrived)}"
        self.arrived.append(job_id)
        self.tell(event.JobArrived(job_id, self.now_s, *SIZES[2], 51, STEPS, step=2))

    @precondition(lambda self: self.encodings)
    @rule(data=st.data())
    def a_prompt_is_encoded(self, data: st.DataObject) -> None:
        job = data.draw(st.sampled_from(sorted(self.encodings)))
        self.tell(event.PromptEncoded(job, self.encodings.pop(job).attempt))

    @precondition(lambda self: self.runs)
    @rule(data=st.data(), heard=st.booleans())
    def a_step_ends(self, data: st.DataObject, heard: bool) -> None:
        """``heard``: the leader has the newest word of the policy before the boundary."""
        job = data.draw(st.sampled_from(sorted(self.runs)))
        self.end_of_step(job, heard)

    def end_of_step(self, job: str, heard: bool) -> None:
        run = self.runs[job]
        if run.step + 1 >= STEPS:
            self.denoised(job)
            return
        run.step += 1
        before = run.epoch
        if heard and isinstance(run.told, decide.ParkJob):
            self.tell(event.StepFinished(job, before, run.step))
            del self.runs[job]
            self.tell(event.JobParked(job, before, run.step))
        elif heard and isinstance(run.told, decide.GrantLease):
            lease, run.told = run.told, None
            run.epoch, run.members = lease.epoch, lease.members
            self.tell(event.StepFinished(job, before, run.step, lease.epoch))
        else:
            self.tell(event.StepFinished(job, before, run.step))

    @precondition(lambda self: self.runs)
    @rule(data=st.data())
    def denoising_ends(self, data: st.DataObject) -> None:
        self.denoised(data.draw(st.sampled_from(sorted(self.runs))))

    def denoised(self, job: str) -> None:
        epoch = self.runs.pop(job).epoch
        decisions = self.tell(event.DenoisingFinished(job, epoch))
        assert [one.epoch for one in decisions if isinstance(one, decide.StartDecoding) and one.job_id == job] in (
            [],
            [epoch],
        )

    @precondition(lambda self: self.runs)
    @rule(data=st.data())
    def a_checkpoint_is_stored(self, data: st.DataObject) -> None:
        job = data.draw(st.sampled_from(sorted(self.runs)))
        self.tell(event.CheckpointStored(job, self.runs[job].step))

    @precondition(lambda self: self.decodings)
    @rule(data=st.data())
    def decoding_ends(self, data: st.DataObject) -> None:
        work = self.decodings[data.draw(st.sampled_from(sorted(self.decodings)))]
        self.tell(event.DecodingFinished(work.job_id, work.epoch))

    @rule(data=st.data())
    def a_worker_dies(self, data: st.DataObject) -> None:
        if self.alive:
            instance = data.draw(st.sampled_from(sorted(self.alive)))
            self.alive.discard(instance)
            self.tell(event.WorkerLost(instance))

    @rule(data=st.data())
    def a_worker_comes_back(self, data: st.DataObject) -> None:
        gone = sorted(set(EVERYONE) - self.alive)
        if gone:
            self.join(data.draw(st.sampled_from(gone)))

    @rule(data=st.data())
    def somebody_cancels(self, data: st.DataObject) -> None:
        open_jobs = [job for job in self.arrived if job not in self.ended]
        if open_jobs:
            job = data.draw(st.sampled_from(open_jobs))
            self.tell(event.JobCancelled(job))
            self.ended[job] = "cancelled"
            self.forget(job)

    @invariant()
    def every_open_job_is_known_and_every_ended_one_is_not(self) -> None:
        if hasattr(self, "policy"):
            assert set(self.policy.state.jobs) == set(self.arrived) - set(self.ended)

    @invariant()
    def a_slot_is_held_by_one_job_or_none(self) -> None:
        if hasattr(self, "policy"):
            state = self.policy.state
            holders = [(number, job.job_id) for job in state.jobs.values() for number in job.slots]
            assert len({number for number, _ in holders}) == len(holders)
            books = {(number, slot.job_id) for number, slot in state.slots.items() if slot.job_id}
            assert books == set(holders)
            free = [number for number, slot in sorted(state.slots.items()) if slot.dit and not slot.job_id]
            assert [slot.number for slot in state.free_for_denoising()] == free
            assert state.placement.free_count == len(free)

    @invariant()
    def what_a_step_or_a_decoding_runs_on_is_held_by_its_job(self) -> None:
        if hasattr(self, "policy"):
            for job_id, run in self.runs.items():
                used = {int(name.split("-")[1]) for name in run.members if name in self.alive}
                assert used <= set(self.policy.state.jobs[job_id].slots), job_id
            for job_id, work in self.decodings.items():
                assert work.slot in self.policy.state.jobs[job_id].slots

    @invariant()
    def phases_are_what_the_workers_do(self) -> None:
        if hasattr(self, "policy"):
            state = self.policy.state
            by_phase = {phase: {job.job_id for job in state.jobs.values() if job.phase is phase} for phase in Phase}
            assert {phase: set(jobs) for phase, jobs in state.by_phase.items()} == by_phase
            assert by_phase[Phase.DENOISING] == set(self.runs)
            assert by_phase[Phase.DECODING] == set(self.decodings)
            assert by_phase[Phase.ENCODING] == set(self.encodings)
            waiting = (Phase.WAITING, Phase.ENCODING, Phase.ENCODED, Phase.PARKED)
            assert not [job.job_id for job in state.jobs.values() if job.phase in waiting and job.slots]
            places = self.policy.queue_places()
            assert set(places) == {job for phase in waiting for job in by_phase[phase]}
            assert sorted(places.values()) == list(range(1, len(places) + 1))

    @invariant()
    def epochs_only_grow(self) -> None:
        if hasattr(self, "policy"):
            assert self.epochs == sorted(set(self.epochs))

    @invariant()
    def what_is_watched_runs(self) -> None:
        if hasattr(self, "policy"):
            assert set(self.policy.watched()) <= set(self.runs)

    @invariant()
    def no_slot_idles_while_a_job_is_ready_for_it(self) -> None:
        if hasattr(self, "policy") and not self.name.startswith(CUT_IN_ADVANCE):
            state = self.policy.state
            ready = [*state.in_phase(Phase.ENCODED), *state.in_phase(Phase.PARKED)]
            assert not (ready and state.free_for_denoising())

    def teardown(self) -> None:
        """With every worker back, everything open comes to its end."""
        if not hasattr(self, "policy"):
            return
        for instance in EVERYONE:
            if instance not in self.alive:
                self.join(instance)
        for _ in range(20 * len(self.arrived) + 20):
            for job, work in list(self.encodings.items()):
                del self.encodings[job]
                self.tell(event.PromptEncoded(job, work.attempt))
            for job in list(self.runs):
                if job in self.runs:
                    self.end_of_step(job, heard=True)
            for decoding in list(self.decodings.values()):
                self.tell(event.DecodingFinished(decoding.job_id, decoding.epoch))
        assert set(self.ended) == set(self.arrived)
        assert self.policy.state.placement.free_count == len(SLOTS)


Cluster.TestCase.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
TestPolicyInvariants = Cluster.TestCase

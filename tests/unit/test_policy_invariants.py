"""Whatever happens in whatever order: the books balance, nothing is lost, and every job ends exactly once."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from common.messages.cluster import Service
from common.policies import decisions as decide
from common.policies import events as event
from common.policies.registry import POLICIES, make_policy
from common.policies.state import Phase

SLOTS = 3


class Cluster(RuleBasedStateMachine):
    """Plays the workers: does what the policy decides, at any time, with workers dying and coming back."""

    @initialize(policy=st.sampled_from(sorted(POLICIES)))
    def build(self, policy: str) -> None:
        self.now_s = 0.0
        self.policy = make_policy(policy, first_epoch=1)
        self.alive: set[str] = set()
        self.leases: dict[str, decide.GrantLease] = {}
        self.decodings: dict[str, decide.StartDecoding] = {}
        self.encodings: dict[str, decide.StartEncoding] = {}
        self.arrived: list[str] = []
        self.ended: dict[str, str] = {}
        self.epochs: list[int] = []
        self.join("encoder-0")
        for slot in range(SLOTS):
            self.join(f"dit-{slot}")
            self.join(f"vae-{slot}")

    def join(self, instance: str) -> None:
        service, slot = instance.split("-")
        self.alive.add(instance)
        number = None if service == "encoder" else int(slot)
        self.tell(event.WorkerJoined(instance, Service(service), number))

    def tell(self, happened: event.Event) -> None:
        self.now_s += 1.0
        for decision in self.policy.handle(happened, self.now_s):
            assert decision.reason
            assert decision.job_id not in self.ended, f"{decision} after the end"
            self.obey(decision)

    def obey(self, decision: decide.Decision) -> None:
        job = decision.job_id
        match decision:
            case decide.StartEncoding(encoder=encoder):
                assert encoder in self.alive
                self.encodings[job] = decision
            case decide.GrantLease(members=members, slots=slots):
                assert set(members) <= self.alive
                assert len(set(members)) == len(members) == len(slots) > 0
                self.epochs.append(decision.epoch)
                self.encodings.pop(job, None)
                self.leases[job] = decision
            case decide.StartDecoding(instance=instance):
                assert instance in self.alive
                self.leases.pop(job)
                self.decodings[job] = decision
            case decide.RevokeLease():
                self.leases.pop(job, None)
            case decide.CancelDecoding():
                self.decodings.pop(job)
            case decide.RequeueJob():
                self.forget(job)
            case decide.CompleteJob() | decide.FailJob():
                self.ended[job] = type(decision).__name__
                self.forget(job)

    def forget(self, job: str) -> None:
        for held in (self.encodings, self.leases, self.decodings):
            held.pop(job, None)

    @rule()
    def a_job_arrives(self) -> None:
        job_id = f"job-{len(self.arrived)}"
        self.arrived.append(job_id)
        self.tell(event.JobArrived(job_id, self.now_s, 64, 64, 16, steps=2))

    @precondition(lambda self: self.encodings)
    @rule(data=st.data())
    def a_prompt_is_encoded(self, data: st.DataObject) -> None:
        job = data.draw(st.sampled_from(sorted(self.encodings)))
        self.tell(event.PromptEncoded(job, self.encodings.pop(job).attempt))

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), step=st.integers(1, 2))
    def a_step_ends(self, data: st.DataObject, step: int) -> None:
        lease = self.leases[data.draw(st.sampled_from(sorted(self.leases)))]
        self.tell(event.StepFinished(lease.job_id, lease.epoch, step))

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def denoising_ends(self, data: st.DataObject) -> None:
        lease = self.leases[data.draw(st.sampled_from(sorted(self.leases)))]
        self.tell(event.DenoisingFinished(lease.job_id, lease.epoch))

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
        everyone = {"encoder-0", *(f"{kind}-{slot}" for kind in ("dit", "vae") for slot in range(SLOTS))}
        gone = sorted(everyone - self.alive)
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
            holders = [(number, job.job_id) for job in self.policy.state.jobs.values() for number in job.slots]
            assert len({number for number, _ in holders}) == len(holders)
            books = {(number, slot.job_id) for number, slot in self.policy.state.slots.items() if slot.job_id}
            assert books == set(holders)

    @invariant()
    def a_job_without_gpus_to_use_holds_none(self) -> None:
        if hasattr(self, "policy"):
            idle = (Phase.WAITING, Phase.ENCODING, Phase.ENCODED)
            assert not [job.job_id for job in self.policy.state.jobs.values() if job.phase in idle and job.slots]

    @invariant()
    def epochs_only_grow(self) -> None:
        if hasattr(self, "policy"):
            assert self.epochs == sorted(set(self.epochs))

    @invariant()
    def no_slot_idles_while_a_job_is_ready_for_it(self) -> None:
        if hasattr(self, "policy"):
            ready = list(self.policy.state.in_phase(Phase.ENCODED))
            assert not (ready and self.policy.state.free_for_denoising())

    def teardown(self) -> None:
        """With every worker back, everything open comes to its end."""
        if not hasattr(self, "policy"):
            return
        for instance in ("encoder-0", *(f"{kind}-{slot}" for kind in ("dit", "vae") for slot in range(SLOTS))):
            if instance not in self.alive:
                self.join(instance)
        for _ in range(20 * len(self.arrived) + 20):
            for job, work in list(self.encodings.items()):
                del self.encodings[job]
                self.tell(event.PromptEncoded(job, work.attempt))
            for lease in list(self.leases.values()):
                self.tell(event.DenoisingFinished(lease.job_id, lease.epoch))
            for decoding in list(self.decodings.values()):
                self.tell(event.DecodingFinished(decoding.job_id, decoding.epoch))
        assert set(self.ended) == set(self.arrived)


Cluster.TestCase.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)
TestPolicyInvariants = Cluster.TestCase

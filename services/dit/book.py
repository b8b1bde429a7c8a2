"""What a DiT worker was granted, called to and told to let go, and what follows from it between two steps. Pure."""

from dataclasses import dataclass, field

from common.messages.video import Lease
from common.policies.fence import Fence


@dataclass(frozen=True, slots=True)
class GoOn:
    """The next step runs under the same lease."""


@dataclass(frozen=True, slots=True)
class Switch:
    """The next step runs under a newer lease."""

    lease: Lease


@dataclass(frozen=True, slots=True)
class Park:
    """The latent goes to the cache store, and the group is free."""


@dataclass(frozen=True, slots=True)
class Stop:
    """The job was taken away."""


Verdict = GoOn | Switch | Park | Stop


@dataclass(slots=True)
class LeaseBook:
    """The leases of one worker, ``instance``.

    Leases that follow each other without an interruption of the job form a line; a lease of another job, or one with
    which the same job starts anew, begins the next line and overtakes all before it. Of a line the newest counts, but
    a group may still switch to an older one that its leader has heard of first, so all of them are kept.
    """

    instance: str
    _fence: Fence = field(default_factory=Fence)
    _last: Lease | None = None
    _granted: dict[int, Lease] = field(default_factory=dict)
    _line: tuple[str, int] = ("", 0)  # the newest line's job, and its first epoch
    _concluded: bool = False  # whether the newest line's job is done here
    _begun: int = 0
    _called: tuple[str, int] = ("", 0)
    _parking: tuple[str, int] = ("", 0)

    # --- what is heard --------------------------------------------------------------------------------------------

    def grant(self, lease: Lease) -> None:
        """Note a lease. One that comes again, its answer having been lost, changes nothing.

        Raises:
            StaleEpoch: it is older than something seen already, or was revoked before it came.
        """
        if lease in (self._last, self._granted.get(lease.epoch)):
            return
        self._fence.admit(lease.job_id, lease.epoch)
        self._last = lease
        elsewhere = self._concluded and lease.leader != self.instance
        if lease.text is not None or lease.job_id != self._line[0] or elsewhere:
            self._line, self._concluded = (lease.job_id, lease.epoch), False
            self._granted.clear()
        if not self._concluded:
            self._granted[lease.epoch] = lease

    def revoke(self, job_id: str | None, epoch: int) -> None:
        """Leases of the job (None: of any) up to ``epoch`` are void."""
        self._fence.revoke(job_id, epoch)

    def park(self, job_id: str, epoch: int) -> None:
        """The job is to be parked at the next boundary of any lease up to ``epoch``."""
        self._parking = (job_id, epoch)

    def call(self, job_id: str, epoch: int) -> None:
        """The leader of lease ``epoch`` waits for its group now."""
        self._called = (job_id, epoch)

    # --- what is done ---------------------------------------------------------------------------------------------

    def begin(self, lease: Lease) -> None:
        """This worker takes part under ``lease`` from now on: it and those before it are used up."""
        self._begun = max(self._begun, lease.epoch)
        for epoch in [epoch for epoch in self._granted if epoch <= self._begun]:
            del self._granted[epoch]

    def conclude(self) -> None:
        """This worker has led the job to an end: changes of the lease that are on their way come too late."""
        if self._line[1] <= self._begun:
            self._concluded = True
            self._granted.clear()

    # --- what follows ---------------------------------------------------------------------------------------------

    def void(self, lease: Lease) -> bool:
        """Whether the lease was revoked, or overtaken by another line; one that was merely changed is not void."""
        return lease.epoch < self._line[1] or self._fence.void(lease.job_id, lease.epoch)

    def taken_back(self, lease: Lease) -> bool:
        """Whether the lease was revoked together with all others: its job has not ended, and is granted again."""
        return self._fence.swept(lease.job_id, lease.epoch)

    def change(self, job_id: str, epoch: int) -> Lease | None:
        """The lease ``epoch`` of that job, if this worker is in it."""
        lease = self._granted.get(epoch)
        return lease if lease is not None and lease.job_id == job_id else None

    def at_boundary(self, lease: Lease) -> Verdict:
        """What comes after the step that ``lease``'s leader has just finished (DDiT). Waits for nobody."""
        if self.void(lease):
            return Stop()
        job_id, epoch = self._parking
        if job_id == lease.job_id and epoch >= lease.epoch:
            return Park()
        newest = max(self._granted, default=0)
        if newest <= lease.epoch:
            return GoOn()
        change = self._granted[newest]
        # Another leader means that this one was taken for dead: whoever follows has what it needs.
        return Switch(change) if change.leader == self.instance else Stop()

    def waiting(self, broken: Lease | None = None) -> Lease | None:
        """The lease to begin with now: one that this worker leads, or to whose group it was called.

        After a break of ``broken``'s group, a change that was decided before it is of no use, as it may count on the
        dead: one that heals leaves somebody of the group out.
        """
        for epoch in sorted(self._granted, reverse=True):
            lease = self._granted[epoch]
            if self._fence.void(lease.job_id, epoch):
                continue
            if lease.leader == self.instance:
                if broken is None or lease.text is not None or set(broken.members) - set(lease.members):
                    return lease
            elif self._called == (lease.job_id, epoch):
                return lease
        return None

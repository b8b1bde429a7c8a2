"""The worker's side of leases: which grants it may still accept. Epochs are fencing tokens."""

from dataclasses import dataclass, field

_REMEMBERED = 1024


class StaleEpoch(ValueError):
    """The grant is older than something this worker has seen already."""


@dataclass(slots=True)
class Fence:
    """Refuses every epoch that is not above all granted before, or that was revoked before it came."""

    _granted: int = 0
    _floor: int = 0
    _revoked: dict[str, int] = field(default_factory=dict)

    def admit(self, job_id: str, epoch: int) -> None:
        """Note a grant.

        Raises:
            StaleEpoch: the sender has been overtaken; the grant must be ignored.
        """
        newest = max(self._granted, self._floor, self._revoked.get(job_id, 0))
        if epoch <= newest:
            raise StaleEpoch(f"epoch {epoch} of {job_id} is not above {newest}")
        self._granted = epoch

    def revoke(self, job_id: str | None, epoch: int) -> None:
        """Note that grants of the job (None: of every job) up to ``epoch`` are void, come they before or after."""
        if job_id is None:
            self._floor = max(self._floor, epoch)
            return
        self._revoked[job_id] = max(epoch, self._revoked.pop(job_id, 0))
        while len(self._revoked) > _REMEMBERED:
            # What is forgotten here was revoked a thousand jobs ago; its messages are long delivered or lost.
            del self._revoked[next(iter(self._revoked))]

    def void(self, job_id: str, epoch: int) -> bool:
        """Whether this grant was revoked; one that was merely followed by a newer one was not."""
        return epoch <= max(self._floor, self._revoked.get(job_id, 0))

    def swept(self, job_id: str, epoch: int) -> bool:
        """Whether this grant is void because those of every job were revoked, and not its own job's in particular."""
        return self._revoked.get(job_id, 0) < epoch <= self._floor

    def holds(self, job_id: str, epoch: int) -> bool:
        """Whether this grant is the newest and not revoked."""
        return epoch == self._granted and epoch > max(self._floor, self._revoked.get(job_id, 0))

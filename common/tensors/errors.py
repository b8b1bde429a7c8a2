"""What can go wrong with a tensor that is kept for somebody else."""

from common.messages.tensors import TensorRef


class TensorError(Exception):
    """Base of everything this package raises."""


class TensorUnknown(TensorError):
    """The owner lives and has no such tensor: its lease ran out, it was released, or it was another life's."""

    def __init__(self, ref: TensorRef) -> None:
        super().__init__(
            f"{ref.owner} has no tensor {ref.tensor_id}: its lease ran out, it was released, or it was exported by an "
            "earlier life of that process; ask for it to be made again, or export it with a longer lease_s"
        )
        self.ref = ref


class TensorFetchTimeout(TensorError):
    """The bytes were not here by the deadline. The owner may be dead, stopped, busy or unreachable."""

    def __init__(self, ref: TensorRef, reason: str) -> None:
        super().__init__(f"tensor {ref.tensor_id} of {ref.owner} ({ref.size_bytes} bytes): {reason}")
        self.ref = ref


class TensorOwnerLost(TensorFetchTimeout):
    """The owner is gone, and UCX noticed before the deadline did."""


class TensorMismatch(TensorError, ValueError):
    """A tensor that does not fit: ``into`` of another shape or dtype, memory that is not contiguous, an odd dtype."""


class TensorsFull(TensorError):
    """One more export would exceed ``max_exported_bytes``."""


class TensorsClosed(TensorError):
    """Used after ``close``, or closed meanwhile."""

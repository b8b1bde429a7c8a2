"""What a service may expect of the tensor transport."""

from collections.abc import Sequence
from typing import Protocol

import torch

from common.messages.tensors import TensorRef


class Tensors(Protocol):
    """Keeps tensors for others, and fetches theirs. One per process; all calls from one event loop."""

    @property
    def exported_count(self) -> int:
        """How many tensors are kept for others."""
        ...

    @property
    def exported_bytes(self) -> int:
        """How many bytes they hold."""
        ...

    def export(self, tensor: torch.Tensor, *, uses: int | None = 1, lease_s: float = 60.0) -> TensorRef:
        """Keep ``tensor`` for whoever has the reference, until ``uses`` fetches took it or the lease ran out.

        The tensor is shared, not copied: do not write to it while it is exported. ``uses=None`` counts nothing. A use
        counts once its receiver has all bytes, so a fetch that failed may be tried again.

        Raises:
            TensorMismatch: not contiguous, not dense, or not on a device UCX reaches.
            TensorsFull: ``max_exported_bytes`` would be exceeded.
            TensorsClosed: after ``close``.
        """
        ...

    def export_all(
        self, tensors: Sequence[torch.Tensor], *, uses: int | None = 1, lease_s: float = 60.0
    ) -> list[TensorRef]:
        """The same for several: references in order. All of them are exported, or none is.

        Raises: see ``export``.
        """
        ...

    async def fetch(
        self,
        ref: TensorRef,
        into: torch.Tensor | None = None,
        *,
        deadline_s: float = 10.0,
        device: torch.device | str | None = None,
    ) -> torch.Tensor:
        """The tensor behind ``ref``, in ``into`` or in new memory on ``device``.

        After an error, ``into`` holds anything, and nothing writes to it any more.

        Raises:
            TensorUnknown: expired, released, never exported, or of an earlier life of its owner.
            TensorFetchTimeout: not here within ``deadline_s``; ``TensorOwnerLost`` where the owner is known to be gone.
            TensorMismatch: ``into`` has another shape or dtype or is not contiguous, or ``ref`` contradicts itself.
            TensorsClosed: after ``close``.
        """
        ...

    async def fetch_all(
        self,
        refs: Sequence[TensorRef],
        into: Sequence[torch.Tensor | None],
        *,
        deadline_s: float = 10.0,
        device: torch.device | str | None = None,
    ) -> list[torch.Tensor]:
        """The tensors behind ``refs``, all of one owner, in order; ``into`` has a place, or None, for each.

        They are asked for and answered together, so that many small ones cost little more than their bytes. All come
        and are counted, or none is.

        Raises: see ``fetch``; ``TensorMismatch`` also where they are not of one owner.
        """
        ...

    async def release(self, ref: TensorRef) -> None:
        """Let the owner forget the tensor now. By the owner or by anybody else; once more does nothing."""
        ...

    def renew(self, ref: TensorRef, lease_s: float) -> None:
        """The owner's: let the lease end ``lease_s`` from now.

        Raises:
            TensorUnknown: not exported here, or no longer.
        """
        ...

    async def close(self) -> None:
        """Forget all exports, fail what is under way, give everything back. Once more does nothing."""
        ...

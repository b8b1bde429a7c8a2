"""How long a video still takes, from what steps and decodes of its kind have taken so far."""

from dataclasses import dataclass, field

_SMOOTHING = 0.3


@dataclass(slots=True)
class RemainingTime:
    """Running averages by kind of video; ``kind`` is any hashable description of size, frames and parallelism."""

    _step_s: dict[object, float] = field(default_factory=dict)
    _decode_s: dict[object, float] = field(default_factory=dict)

    def step_took(self, kind: object, seconds: float) -> None:
        self._step_s[kind] = _smoothed(self._step_s.get(kind), seconds)

    def decode_took(self, kind: object, seconds: float) -> None:
        self._decode_s[kind] = _smoothed(self._decode_s.get(kind), seconds)

    def remaining_s(self, kind: object, steps_left: int) -> float | None:
        """Seconds until done for a running video; None while nothing of its kind has been seen."""
        step_s = self._step_s.get(kind)
        if step_s is None:
            return None
        return steps_left * step_s + self._decode_s.get(kind, 0.0)


def _smoothed(before: float | None, value: float) -> float:
    return value if before is None else before + _SMOOTHING * (value - before)

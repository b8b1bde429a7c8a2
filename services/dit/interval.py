"""How often a latent is copied for a checkpoint: as often as it costs next to nothing. Pure."""

import math

COST_SHARE = 0.01
"""Of the steps' own time, at most so much goes into copies."""

STORE_SHARE = 0.05
"""Of the steps' time, at most so much goes into bringing copies away, where that is taken from the steps."""


class CheckpointInterval:
    """Decides after each step of one lease whether its latent is kept: every K steps.

    K is the smallest number of steps whose time ``copy_s`` is at most a hundredth of, by the mean of the steps so far,
    in whose time a checkpoint comes to lie in the cache store, and of which what that takes from them is at most a
    twentieth.
    The design asks for no fixed K (DDiT has no checkpoints), only that a lost worker costs little and the undisturbed
    video nothing that could be measured.

    Args:
        copy_s: what one copy takes on the compute path, in seconds.
        store_s: what it takes to bring one to the cache store, in seconds, beside the steps.
        store_cost_s: what of that is taken from the steps, in seconds. On a CPU, whose cores all processes share, a
            checkpoint after each step of 28 ms made the steps a fifth longer.
        fixed: K, where it is set rather than found.
    """

    def __init__(
        self, copy_s: float, store_s: float = 0.0, fixed: int | None = None, store_cost_s: float = 0.0
    ) -> None:
        self._least_s = max(copy_s / COST_SHARE, store_s, store_cost_s / STORE_SHARE)
        self._fixed = fixed
        self._steps = 0
        self._steps_s = 0.0
        self._since_last = 0

    @property
    def every(self) -> int:
        """K, as far as is known."""
        if self._fixed is not None:
            return self._fixed
        if self._steps_s <= 0:
            return 1
        exact = self._least_s * self._steps / self._steps_s
        # A sum of times is off in its last bits, which must not cost a step.
        return max(1, math.ceil(exact - 1e-9))

    def step_took(self, seconds: float) -> bool:
        """Count a step; whether the latent after it is to be kept."""
        self._steps += 1
        self._steps_s += seconds
        self._since_last += 1
        if self._since_last < self.every:
            return False
        self._since_last = 0
        return True

"""What was measured, as lines of a table and as JSON values."""

import platform
from dataclasses import dataclass

import torch

from loadgen.gpu.flops import StepFlops, step_flops
from loadgen.gpu.measure import Failed, Reading
from loadgen.gpu.setups import GUIDED_ROWS, Setup


@dataclass(frozen=True)
class Rates:
    """What the device could do at best, in operations a second; None: not known."""

    measured: float
    data_sheet: float | None

    def shares(self, flops_per_s: float) -> tuple[float, float | None]:
        """Of the measured rate and of the data sheet's."""
        return flops_per_s / self.measured, None if self.data_sheet is None else flops_per_s / self.data_sheet

    def text(self) -> str:
        """Both, for people."""
        sheet = "not known" if self.data_sheet is None else f"{self.data_sheet / 1e12:.0f} TFLOP/s"
        return f"matrix rate: measured {self.measured / 1e12:.3g} TFLOP/s, by the data sheet {sheet}"


@dataclass(frozen=True)
class Step:
    """One guided step. tokens: of the video; the step passes each of them twice."""

    setup: Setup
    size: str
    compiled: bool
    outcome: Reading | Failed
    rates: Rates

    HEAD = (
        f"{'size':>5} {'tokens':>7} {'way':>9} {'step':>10} {'tokens/s':>9} {'TFLOP/s':>8} "
        f"{'of rate':>8} {'of sheet':>8} {'peak':>9} {'first call':>10}"
    )

    @property
    def tokens(self) -> int:
        frames, patches = self.setup.grid(self.size)
        return frames * patches

    @property
    def flops(self) -> StepFlops:
        frames, patches = self.setup.grid(self.size)
        return step_flops(self.setup.transformer, GUIDED_ROWS, frames, patches, self.setup.text_tokens)

    def line(self) -> str:
        """A line under ``HEAD``."""
        start = f"{self.size:>5} {self.tokens:>7} {_way(self.compiled):>9} "
        match self.outcome:
            case Failed(reason):
                return start + reason
            case Reading() as reading:
                rate = self.flops.total / reading.median_s
                measured, sheet = self.rates.shares(rate)
                return start + (
                    f"{duration(reading.median_s):>10} {self.tokens / reading.median_s:>9,.0f} {rate / 1e12:>8.3g} "
                    f"{measured:>8.1%} {'-' if sheet is None else f'{sheet:.1%}':>8} "
                    f"{memory(reading):>9} {duration(reading.first_s):>10}"
                )

    def as_dict(self) -> dict[str, object]:
        """For ``--json``."""
        row = {**_about("step", self.setup, self.size, self.compiled), "tokens": self.tokens, "flops": vars(self.flops)}
        if isinstance(self.outcome, Failed):
            return {**row, "error": self.outcome.reason}
        rate = self.flops.total / self.outcome.median_s
        measured, sheet = self.rates.shares(rate)
        return {
            **row,
            **self.outcome.as_dict(),
            "tokens_per_s": self.tokens / self.outcome.median_s,
            "flops_per_s": rate,
            "share_of_matrix_rate": {"measured": measured, "data_sheet": sheet},
        }


@dataclass(frozen=True)
class Decode:
    """One video decoded, chunk by chunk, to pixels in main memory. flops: see ``decode_flops``."""

    setup: Setup
    size: str
    compiled: bool
    outcome: Reading | Failed
    rates: Rates
    flops: int

    HEAD = (
        f"{'size':>5} {'frames':>7} {'way':>9} {'video':>10} {'frames/s':>9} {'TFLOP/s':>8} "
        f"{'of rate':>8} {'of sheet':>8} {'peak':>9} {'first call':>10}"
    )

    def line(self) -> str:
        """A line under ``HEAD``."""
        start = f"{self.size:>5} {self.setup.frames:>7} {_way(self.compiled):>9} "
        match self.outcome:
            case Failed(reason):
                return start + reason
            case Reading() as reading:
                rate = self.flops / reading.median_s
                measured, sheet = self.rates.shares(rate)
                return start + (
                    f"{duration(reading.median_s):>10} {self.setup.frames / reading.median_s:>9,.1f} "
                    f"{rate / 1e12:>8.3g} {measured:>8.1%} {'-' if sheet is None else f'{sheet:.1%}':>8} "
                    f"{memory(reading):>9} {duration(reading.first_s):>10}"
                )

    def as_dict(self) -> dict[str, object]:
        """For ``--json``."""
        row = {**_about("decode", self.setup, self.size, self.compiled), "flops": self.flops}
        if isinstance(self.outcome, Failed):
            return {**row, "error": self.outcome.reason}
        rate = self.flops / self.outcome.median_s
        measured, sheet = self.rates.shares(rate)
        return {
            **row,
            **self.outcome.as_dict(),
            "frames_per_s": self.setup.frames / self.outcome.median_s,
            "flops_per_s": rate,
            "share_of_matrix_rate": {"measured": measured, "data_sheet": sheet},
        }


def _way(compiled: bool) -> str:
    return "compiled" if compiled else "as it is"


def duration(seconds: float) -> str:
    """For people."""
    return f"{seconds:.2f} s" if seconds >= 10 else f"{1000 * seconds:.4g} ms"


def memory(reading: Reading) -> str:
    """The most that was held, for people."""
    return "-" if reading.peak_bytes is None else f"{reading.peak_bytes / 2**30:.2f} GiB"


def _about(phase: str, setup: Setup, size: str, compiled: bool) -> dict[str, object]:
    width, height = setup.sizes[size]
    return {
        "phase": phase,
        "size": size,
        "width": width,
        "height": height,
        "frames": setup.frames,
        "compiled": compiled,
    }


def name_of(dtype: torch.dtype) -> str:
    """As people write it."""
    return str(dtype).removeprefix("torch.")


def device_name(device: torch.device) -> str:
    """For people."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({platform.machine()})"

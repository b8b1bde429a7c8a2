"""One piece of work, timed on the device that does it, and the most memory it held."""

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

_LOST = "the device was lost"


@dataclass(frozen=True)
class Reading:
    """seconds: of each repetition; first_s: of the very first call, which compiles; peak_bytes: None on a CPU."""

    seconds: tuple[float, ...]
    first_s: float
    peak_bytes: int | None

    @property
    def median_s(self) -> float:
        return statistics.median(self.seconds)

    def as_dict(self) -> dict[str, object]:
        """For ``--json``."""
        return {
            "median_s": self.median_s,
            "seconds": list(self.seconds),
            "first_call_s": self.first_s,
            "peak_bytes": self.peak_bytes,
        }


@dataclass(frozen=True)
class Failed:
    """There is no reading; what stands in its place."""

    reason: str

    @property
    def device_lost(self) -> bool:
        """Whether this process can measure nothing more."""
        return self.reason.startswith(_LOST)


def measure(work: Callable[[], object], device: torch.device, warm_up: int, repeats: int) -> Reading | Failed:
    """Call it once, ``warm_up`` times more, and ``repeats`` times that count."""
    out_of_memory = False
    try:
        first_s = timed(work, device)
        for _ in range(warm_up):
            timed(work, device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        seconds = tuple(timed(work, device) for _ in range(repeats))
        peak_bytes = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
        return Reading(seconds, first_s, peak_bytes)
    except torch.OutOfMemoryError:
        # The error's traceback holds what was allocated until this block is left.
        out_of_memory = True
    except torch._dynamo.exc.TorchDynamoException as error:
        return Failed(f"not compiled: {_first_line(error)}")
    except torch.AcceleratorError as error:
        # Nothing more can be computed on this device in this process.
        return Failed(f"{_LOST}: {_first_line(error)}")
    if out_of_memory and device.type == "cuda":
        torch.cuda.empty_cache()
    return Failed("out of memory")


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds until the device has done it, by the device's own clock where it has one."""
    if device.type != "cuda":
        started_s = time.perf_counter()
        work()
        return time.perf_counter() - started_s
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    work()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1000


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0].strip() if lines else type(error).__name__


def free_memory(device: torch.device) -> None:
    """Nothing that is left of what was measured before shall count as the next one's memory."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()

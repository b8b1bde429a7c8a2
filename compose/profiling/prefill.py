"""Prefill throughput by chunk size, measured by a process with an instance's environment: ``prefill_member``."""

import asyncio
import json
import os
import sys
from asyncio.subprocess import PIPE

from common.policies.prefill_profile import SATURATED, PrefillProfile, WrongPrefillProfile
from compose.errors import StartError
from compose.launch import PACKAGE_ROOT
from compose.profiling.plan import ProfileOptions
from compose.profiling.table import aligned
from compose.spec import read_stack
from compose.tether import tether_to

_TIMEOUT_S = 3600.0


async def measure_prefill(model: str, options: ProfileOptions) -> PrefillProfile:
    """Measure on this machine, in a process of its own.

    Raises:
        StartError: it could not.
    """
    asked = {
        "TRIPTYCH_LANGUAGE_MODEL": model,
        "TRIPTYCH_THREADS": str(options.threads),
        "TRIPTYCH_DEVICE": options.device,
    }
    environment = read_stack({**os.environ, **asked}).services["prefill"].environment
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "compose.profiling.prefill_member", str(options.repeats), str(options.warm_up)),
        cwd=PACKAGE_ROOT,
        env={**os.environ, **environment},
        stdout=PIPE,
        stderr=PIPE,
        process_group=0,
        preexec_fn=tether_to(os.getpid()),
    )
    try:
        said, complaints = await asyncio.wait_for(process.communicate(), _TIMEOUT_S)
    except TimeoutError as error:
        raise StartError(f"prefill was not measured within {_TIMEOUT_S:g} s") from error
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode:
        last = complaints.decode(errors="replace").strip().splitlines()[-1:] or ["it left no message"]
        raise StartError(f"the process that measures prefill: {last[0]}")
    answer = json.loads(said)
    try:
        return PrefillProfile(answer["model"], {int(size): rate for size, rate in answer["tokens_per_s"].items()})
    except WrongPrefillProfile as error:
        raise StartError(f"what was measured of {model} makes no profile: {error}") from error


def prefill_table(profile: PrefillProfile) -> str:
    """Lines of equal columns, the chosen size marked."""
    rows = [["chunk", "tokens/s", "of the best", ""]]
    for size, rate in sorted(profile.tokens_per_s.items()):
        chosen = "chosen" if size == profile.chunk_tokens else ""
        rows.append([str(size), f"{rate:,.0f}", f"{100 * rate / profile.best:.0f} %", chosen])
    note = f"prefill of {profile.model}: the smallest chunk within {100 * (1 - SATURATED):.0f} % of the best"
    return "\n".join([*aligned(rows), "", note])

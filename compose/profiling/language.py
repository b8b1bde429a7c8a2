"""What a language model costs on this machine, measured by a process with an instance's environment.

See ``language_member``: prefill throughput by chunk size, and costs fitted to passes and transfers.
"""

import asyncio
import os
import sys
from asyncio.subprocess import PIPE
from dataclasses import dataclass
from typing import Any

from common.policies.language.language_costs import LanguageCosts, WrongLanguageCosts
from common.policies.language.prefill_profile import SATURATED, PrefillProfile, WrongPrefillProfile
from common.runtime.tether import tether_to
from compose.errors import StartError
from compose.launch import PACKAGE_ROOT
from compose.profiling.plan import ProfileOptions
from compose.profiling.table import aligned
from compose.spec import read_stack

_TIMEOUT_S = 3600.0


@dataclass(frozen=True)
class LanguageProfile:
    """Both are of one model."""

    prefill: PrefillProfile
    costs: LanguageCosts

    def to_content(self) -> dict[str, Any]:
        """What stands in the file that ``triptych profile`` writes, beside the RIB."""
        return {"prefill": self.prefill.to_content(), **self.costs.to_content()}


async def measure_language(model: str, options: ProfileOptions) -> LanguageProfile:
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
        *("-m", "compose.profiling.language_member", str(options.repeats), str(options.warm_up)),
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
        raise StartError(f"the language model was not measured within {_TIMEOUT_S:g} s") from error
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode:
        last = complaints.decode(errors="replace").strip().splitlines()[-1:] or ["it left no message"]
        raise StartError(f"the process that measures the language model: {last[0]}")
    try:
        prefill, costs = PrefillProfile.from_json(text := said.decode()), LanguageCosts.from_json(text)
    except (WrongPrefillProfile, WrongLanguageCosts) as error:
        raise StartError(f"what was measured of {model} makes no profile: {error}") from error
    assert prefill is not None and costs is not None
    return LanguageProfile(prefill, costs)


def prefill_table(profile: PrefillProfile) -> str:
    """Lines of equal columns, the chosen size marked."""
    rows = [["chunk", "tokens/s", "of the best", ""]]
    for size, rate in sorted(profile.tokens_per_s.items()):
        chosen = "chosen" if size == profile.chunk_tokens else ""
        rows.append([str(size), f"{rate:,.0f}", f"{100 * rate / profile.best:.0f} %", chosen])
    note = f"prefill of {profile.model}: the smallest chunk within {100 * (1 - SATURATED):.0f} % of the best"
    return "\n".join([*aligned(rows), "", note])


def costs_table(costs: LanguageCosts) -> str:
    """What was fitted, and how far off it is where the fit has not looked."""
    prefill, decode, link = costs.prefill, costs.decode, costs.link
    fitted = {
        "prefill": (
            f"{_micro(prefill.pass_s)} a pass of {prefill.chunk_tokens}, {_micro(prefill.token_s)} a token, "
            f"{_micro(prefill.pair_s)} for each that it looks back at; at least {_micro(prefill.floor_s)}"
        ),
        "decode": (
            f"{_micro(decode.floor_s)} a step, {_micro(decode.sequence_s)} a sequence, "
            f"{_micro(decode.context_token_s)} for each token looked back at"
        ),
        "transfer": f"{_micro(link.once_s)} a message, {link.bytes_per_s / 1e9:.2f} GB/s",
    }
    rows = [["", "mean error", "worst", "points"]]
    for name, error in costs.errors.items():
        rows.append([name, f"{100 * error.mean:.1f} %", f"{100 * error.worst:.1f} %", str(error.points)])
    head, *lines = aligned(rows)
    said = [f"{line}   {fitted[name]}" for line, name in zip(lines, costs.errors, strict=True)]
    return "\n".join([head, *said, "", f"costs of {costs.model}, with errors at points that the fit has not seen"])


def _micro(seconds: float) -> str:
    return f"{1e6 * seconds:.4g} us"

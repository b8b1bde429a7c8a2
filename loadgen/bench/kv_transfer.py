"""When keys and values leave the prefill instance, by request, by chunk or by layer, and in which layout of blocks.

Modes, through real instances: one prefill process for each mode, one decode process, and this one as their gateway. A
round asks each mode for the same prompts; the penalty that a client sees is the time from the first token to the second
(MemServe, section 6). Layouts, of which the instances have one: see ``kv_layout_rounds``.
"""

import argparse
import asyncio
import contextlib
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from common.bus.nats_bus import NatsBus
from common.language.settings import TransferMode
from common.messages.subjects import MEMBERS
from loadgen.bench import kv_layout_report
from loadgen.bench.broker import broker
from loadgen.bench.instances import VOCABULARY, Asking, answered, ready, running_service, save_model
from loadgen.bench.rounds import spread
from loadgen.counts import count, width_of_heads
from loadgen.gpu.options import chosen_device

_DECODE = "decode-0"
_ANSWER = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The benchmark's own options."""
    parser.add_argument(
        "--compare", nargs="+", choices=("modes", "layouts"), default=["modes", "layouts"], help="(default: both)"
    )
    parser.add_argument("--rounds", type=count, default=9, help="of each mode (default %(default)s)")
    parser.add_argument("--prompt-tokens", type=count, default=1024, help="of each prompt (default %(default)s)")
    parser.add_argument("--chunk-tokens", type=count, default=256, help="of one pass (default %(default)s)")
    parser.add_argument("--at-once", type=count, default=1, help="prompts at a time (default %(default)s)")
    parser.add_argument(
        "--hidden", type=width_of_heads, default=512, help="width of the random model (default %(default)s)"
    )
    parser.add_argument("--layers", type=count, default=8, help="its depth (default %(default)s)")
    parser.add_argument("--no-checksum", action="store_true", help="modes: do not compare the bytes at both ends")
    kv_layout_report.add_arguments(parser)


def run(options: argparse.Namespace) -> dict[str, object]:
    """Start the processes, measure, stop them."""
    if "layouts" in options.compare:
        chosen_device(options.device)  # a wrong one is told before the modes are measured
    result: dict[str, object] = {
        "options": {name: value for name, value in vars(options).items() if isinstance(value, int | bool)}
    }
    if "modes" in options.compare:
        result["modes"] = _run_modes(options)
    if "layouts" in options.compare:
        result["layouts"] = kv_layout_report.run_layouts(options)
    return result


def _run_modes(options: argparse.Namespace) -> dict[str, object]:
    with tempfile.TemporaryDirectory(prefix="triptych-kv-") as folder, broker() as url:
        model = save_model(Path(folder) / "model", options.hidden, options.layers, options.prompt_tokens + 64)
        readings = asyncio.run(_run(url, model, options))
    print("\n".join(_told(readings, options)))
    return {mode: [vars(reading) for reading in rounds] for mode, rounds in readings.items()}


@dataclass(frozen=True)
class Reading:
    """Medians of one round in seconds: to the first token, from it to the second, and until all have their second."""

    first_s: float
    second_s: float
    all_s: float


async def _run(url: str, model: Path, options: argparse.Namespace) -> dict[str, list[Reading]]:
    async with contextlib.AsyncExitStack() as opened:
        bus = await opened.enter_async_context(await NatsBus.connect(url, name="bench"))
        await bus.prepare(buckets=(MEMBERS,))
        await opened.enter_async_context(_instance(url, model, "decode", _DECODE, TransferMode.BY_REQUEST, options))
        for mode in TransferMode:
            await opened.enter_async_context(_instance(url, model, "prefill", f"prefill-{mode}", mode, options))
        for name in (_DECODE, *(f"prefill-{mode}" for mode in TransferMode)):
            await ready(bus, name)
        return await _measured(bus, options)


def _instance(
    url: str, model: Path, service: str, name: str, mode: TransferMode, options: argparse.Namespace
) -> contextlib.AbstractAsyncContextManager[None]:
    settings = {
        "TRIPTYCH_LANGUAGE_MODEL": str(model),
        "TRIPTYCH_ROLE": "decode",
        "TRIPTYCH_KV_BYTES": str(1 << 30),
        "TRIPTYCH_CHUNK_TOKENS": str(options.chunk_tokens),
        "TRIPTYCH_TRANSFER_MODE": mode,
        "TRIPTYCH_KV_CHECKSUM": "false" if options.no_checksum else "true",
        "TRIPTYCH_TRANSFER_S": "60",
    }
    return running_service(url, service, name, settings)


async def _measured(bus: NatsBus, options: argparse.Namespace) -> dict[str, list[Reading]]:
    asking = Asking(bus)
    await asking.listen()
    readings: dict[str, list[Reading]] = {mode: [] for mode in TransferMode}
    modes = list(TransferMode)
    # The first round is not counted: pages are touched, connections made.
    for number in range(options.rounds + 1):
        for mode in modes[number % len(modes) :] + modes[: number % len(modes)]:
            reading = await _round(asking, mode, number, options)
            if number:
                readings[mode].append(reading)
    return readings


async def _round(asking: Asking, mode: str, number: int, options: argparse.Namespace) -> Reading:
    chance = random.Random(number)
    began_s = time.perf_counter()
    asked = []
    for _ in range(options.at_once):
        prompt = [chance.randrange(VOCABULARY) for _ in range(options.prompt_tokens)]
        asked.append(await asking.ask(prompt, _ANSWER, f"prefill-{mode}", _DECODE))
    await answered(asked)
    came = [one.came_s for one in asked]
    return Reading(
        first_s=statistics.median(one[0] for one in came) - began_s,
        second_s=statistics.median(one[1] - one[0] for one in came),
        all_s=max(one[1] for one in came) - began_s,
    )


def _told(readings: dict[str, list[Reading]], options: argparse.Namespace) -> Sequence[str]:
    head = f"{options.at_once} prompts of {options.prompt_tokens} tokens at once, chunks of {options.chunk_tokens}"
    lines = [f"{head}; medians of {options.rounds} rounds, and ratios to by_request with quartiles"]
    base = readings[TransferMode.BY_REQUEST]
    for mode, rounds in readings.items():
        parts = []
        for name, title in (("first_s", "first token"), ("second_s", "second after it"), ("all_s", "all")):
            own = [getattr(reading, name) for reading in rounds]
            ratio = spread([mine / getattr(other, name) for mine, other in zip(own, base, strict=True)])
            parts.append(f"{title} {1000 * statistics.median(own):7.1f} ms, {ratio.text}")
        lines.append(f"{mode:<10}  {';  '.join(parts)}")
    return lines

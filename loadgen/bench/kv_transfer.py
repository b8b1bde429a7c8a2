"""When keys and values leave the prefill instance, by request, by chunk or by layer, and in which layout of blocks.

Modes, through real instances: one prefill process for each mode, one decode process, and this one as their gateway. A
round asks each mode for the same prompts; the penalty that a client sees is the time from the first token to the second
(MemServe, section 6). Layouts, of which the instances have one: see ``kv_layout_rounds``.
"""

import argparse
import asyncio
import contextlib
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from common.bus.nats_bus import NatsBus
from common.language.settings import TransferMode
from common.messages.chat import GenerateTokens, Sampling, TokensGenerated, pack_tokens
from common.messages.cluster import MemberState
from common.messages.subjects import GENERATE_TOKENS, MEMBERS, TOKENS_GENERATED
from loadgen.bench import kv_layout_report
from loadgen.bench.broker import broker
from loadgen.bench.process import ROOT, BenchmarkError
from loadgen.bench.rounds import spread
from loadgen.counts import count, width

_GATEWAY = "gateway-bench"
_DECODE = "decode-0"
_WAIT_S = 120.0
_ANSWER = 3
_VOCABULARY = 1024


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The benchmark's own options."""
    parser.add_argument(
        "--compare", nargs="+", choices=("modes", "layouts"), default=["modes", "layouts"], help="(default: both)"
    )
    parser.add_argument("--rounds", type=count, default=9, help="of each mode (default %(default)s)")
    parser.add_argument("--prompt-tokens", type=count, default=1024, help="of each prompt (default %(default)s)")
    parser.add_argument("--chunk-tokens", type=count, default=256, help="of one pass (default %(default)s)")
    parser.add_argument("--at-once", type=count, default=1, help="prompts at a time (default %(default)s)")
    parser.add_argument("--hidden", type=width, default=512, help="width of the random model (default %(default)s)")
    parser.add_argument("--layers", type=count, default=8, help="its depth (default %(default)s)")
    parser.add_argument("--no-checksum", action="store_true", help="modes: do not compare the bytes at both ends")
    kv_layout_report.add_arguments(parser)


def run(options: argparse.Namespace) -> dict[str, object]:
    """Start the processes, measure, stop them."""
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
        model = _save_model(Path(folder) / "model", options)
        readings = asyncio.run(_run(url, model, options))
    print("\n".join(_told(readings, options)))
    return {mode: [vars(reading) for reading in rounds] for mode, rounds in readings.items()}


@dataclass(frozen=True)
class Reading:
    """Medians of one round in seconds: to the first token, from it to the second, and until all have their second."""

    first_s: float
    second_s: float
    all_s: float


@dataclass
class _Asked:
    """One sequence: when its first two tokens came."""

    came_s: list[float] = field(default_factory=list)
    done: asyncio.Event = field(default_factory=asyncio.Event)


def _save_model(folder: Path, options: argparse.Namespace) -> Path:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=_VOCABULARY,
        hidden_size=options.hidden,
        intermediate_size=options.hidden * 5 // 2,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden // 64,
        num_key_value_heads=options.hidden // 64,
        max_position_embeddings=options.prompt_tokens + 64,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


async def _run(url: str, model: Path, options: argparse.Namespace) -> dict[str, list[Reading]]:
    bus = await NatsBus.connect(url, name=_GATEWAY)
    try:
        await bus.prepare(buckets=(MEMBERS,))
        async with contextlib.AsyncExitStack() as opened:
            await opened.enter_async_context(_instance(url, model, "decode", _DECODE, TransferMode.BY_REQUEST, options))
            for mode in TransferMode:
                await opened.enter_async_context(_instance(url, model, "prefill", f"prefill-{mode}", mode, options))
            for name in (_DECODE, *(f"prefill-{mode}" for mode in TransferMode)):
                await _ready(bus, name)
            return await _measured(bus, options)
    finally:
        await bus.close()


@contextlib.asynccontextmanager
async def _instance(
    url: str, model: Path, service: str, name: str, mode: TransferMode, options: argparse.Namespace
) -> AsyncIterator[None]:
    environment = {
        **os.environ,
        "TRIPTYCH_NATS_URL": url,
        "TRIPTYCH_INSTANCE": name,
        "TRIPTYCH_LANGUAGE_MODEL": str(model),
        "TRIPTYCH_ROLE": "decode",
        "TRIPTYCH_KV_BYTES": str(1 << 30),
        "TRIPTYCH_CHUNK_TOKENS": str(options.chunk_tokens),
        "TRIPTYCH_TRANSFER_MODE": mode,
        "TRIPTYCH_KV_CHECKSUM": "false" if options.no_checksum else "true",
        "TRIPTYCH_TRANSFER_S": "60",
        "TRIPTYCH_LOG_LEVEL": "warning",
        "OMP_NUM_THREADS": "1",
        "UCX_NET_DEVICES": "lo",
        "UCX_WARN_UNUSED_ENV_VARS": "n",
    }
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", f"services.{service}", env=environment, cwd=ROOT
    )
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        try:
            await asyncio.wait_for(process.wait(), _WAIT_S)
        except TimeoutError:
            process.kill()


async def _ready(bus: NatsBus, name: str) -> None:
    async with asyncio.timeout(_WAIT_S):
        while True:
            with contextlib.suppress(Exception):
                if (await bus.get(MEMBERS, name)).value.state is MemberState.READY:
                    return
            await asyncio.sleep(0.1)


async def _measured(bus: NatsBus, options: argparse.Namespace) -> dict[str, list[Reading]]:
    asked: dict[str, _Asked] = {}

    def hear(news: TokensGenerated) -> None:
        now_s = time.perf_counter()
        for sequence in news.sequences:
            one = asked[sequence.request_id]
            if sequence.failure is not None:
                raise BenchmarkError(sequence.failure.message)
            one.came_s += [now_s] * len(sequence.tokens)
            if sequence.finish is not None:
                one.done.set()

    await bus.subscribe(TOKENS_GENERATED, hear, _GATEWAY)
    readings: dict[str, list[Reading]] = {mode: [] for mode in TransferMode}
    modes = list(TransferMode)
    # The first round is not counted: pages are touched, connections made.
    for number in range(options.rounds + 1):
        for mode in modes[number % len(modes) :] + modes[: number % len(modes)]:
            reading = await _round(bus, mode, number, asked, options)
            if number:
                readings[mode].append(reading)
    return readings


async def _round(
    bus: NatsBus, mode: str, number: int, asked: dict[str, _Asked], options: argparse.Namespace
) -> Reading:
    chance = random.Random(number)
    names = [f"{mode}-{number}-{place}" for place in range(options.at_once)]
    asked |= {name: _Asked() for name in names}
    began_s = time.perf_counter()
    for name in names:
        prompt = [chance.randrange(_VOCABULARY) for _ in range(options.prompt_tokens)]
        request = GenerateTokens(
            request_id=name,
            epoch=1,
            tokens=pack_tokens(prompt),
            sampling=Sampling(temperature=0.0, seed=0, max_tokens=_ANSWER, ignore_end=True),
            gateway=_GATEWAY,
            decode=_DECODE,
            created_at_s=time.time(),
        )
        await bus.request(GENERATE_TOKENS, request, f"prefill-{mode}", deadline_s=_WAIT_S)
    async with asyncio.timeout(_WAIT_S):
        await asyncio.gather(*(asked[name].done.wait() for name in names))
    came = [asked[name].came_s for name in names]
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

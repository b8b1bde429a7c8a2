"""A long prompt at an instance that has nothing of it: found in the cache store, against computed; and what that costs.

Three instances and a cache store as processes, and this one as their gateway. Another instance has computed the prompt
before. Then prompts that nobody has seen: what it costs that the cache store is asked in vain and is given all of them.
"""

import argparse
import asyncio
import contextlib
import random
import statistics
import tempfile
import time
from pathlib import Path

from common.bus.nats_bus import NatsBus
from common.messages.cache import AskDigests
from common.messages.subjects import ASK_DIGESTS, MEMBERS
from loadgen.bench.broker import broker
from loadgen.bench.compare import Comparison, Side
from loadgen.bench.instances import VOCABULARY, Asked, Asking, answered, ready, running_service, save_model
from loadgen.bench.process import BenchmarkError
from loadgen.counts import count, width_of_heads
from loadgen.refusal import WrongArgument

_STORE = "cache_store-0"
_SOURCE, _WITH, _WITHOUT = "decode-0", "decode-1", "decode-2"
_QUIET_S = 0.5
# Beginnings of 256 tokens and more are kept (TRIPTYCH_KV_STORE_TOKENS), in whole blocks and never all of a prompt.
_LEAST_TOKENS = 272
_WAIT_S = 120.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The benchmark's own options."""
    parser.add_argument("--rounds", type=count, default=9, help="of either way (default %(default)s)")
    parser.add_argument("--prompt-tokens", type=count, default=1024, help="of each prompt (default %(default)s)")
    parser.add_argument(
        "--at-once", type=count, default=4, help="prompts nobody has seen, at a time (default %(default)s)"
    )
    parser.add_argument(
        "--answer-tokens", type=count, default=64, help="of each of their answers (default %(default)s)"
    )
    parser.add_argument(
        "--hidden", type=width_of_heads, default=512, help="width of the random model (default %(default)s)"
    )
    parser.add_argument("--layers", type=count, default=8, help="its depth (default %(default)s)")
    parser.add_argument("--threads", type=count, default=1, help="of each instance (default %(default)s)")
    parser.add_argument("--disk", action="store_true", help="the cache store keeps nothing in memory")


def run(options: argparse.Namespace) -> dict[str, object]:
    """Start the processes, measure, stop them."""
    if options.prompt_tokens < _LEAST_TOKENS:
        raise WrongArgument(f"--prompt-tokens {options.prompt_tokens}: give {_LEAST_TOKENS} or more")
    with tempfile.TemporaryDirectory(prefix="triptych-kv-") as folder, broker() as url:
        context = options.prompt_tokens + options.answer_tokens
        model = save_model(Path(folder) / "model", options.hidden, options.layers, context)
        comparisons = asyncio.run(_run(url, model, Path(folder) / "cache", options))
    for one in comparisons:
        print(one.text())
    return {"comparisons": [one.as_dict() for one in comparisons]}


async def _run(url: str, model: Path, folder: Path, options: argparse.Namespace) -> list[Comparison]:
    async with contextlib.AsyncExitStack() as opened:
        bus = await opened.enter_async_context(await NatsBus.connect(url, name="bench"))
        await bus.prepare(buckets=(MEMBERS,))
        store = {
            "TRIPTYCH_CACHE_DIR": str(folder),
            "TRIPTYCH_CACHE_MEMORY_BYTES": "0" if options.disk else str(4 << 30),
        }
        await opened.enter_async_context(running_service(url, "cache_store", _STORE, store))
        for name, mode in ((_SOURCE, "on"), (_WITH, "on"), (_WITHOUT, "off")):
            settings = {
                "TRIPTYCH_LANGUAGE_MODEL": str(model),
                "TRIPTYCH_KV_BYTES": str(1 << 30),
                "TRIPTYCH_KV_STORE": mode,
                "TRIPTYCH_THREADS": str(options.threads),
                "OMP_NUM_THREADS": str(options.threads),
                "OMP_WAIT_POLICY": "PASSIVE",
            }
            await opened.enter_async_context(running_service(url, "decode", name, settings))
        for name in (_STORE, _SOURCE, _WITH, _WITHOUT):
            await ready(bus, name)
        asking = Asking(bus)
        await asking.listen()
        return [await _found(bus, asking, options), *await _unseen(bus, asking, options)]


async def _found(bus: NatsBus, asking: Asking, options: argparse.Namespace) -> Comparison:
    """The time to the first token, of prompts that lie in the cache store, at instances that have none of them."""
    readings: dict[str, list[float]] = {_WITH: [], _WITHOUT: []}
    # The first is not counted: pages are touched, connections made.
    for number in range(-1, options.rounds):
        prompt = _prompt(number + 1, options.prompt_tokens)
        await answered([await asking.ask(prompt, 2, _SOURCE, _SOURCE)])
        await _stored(bus)
        for name in _order(number):
            asked = await asking.ask(prompt, 2, name, name)
            await answered([asked])
            least = options.prompt_tokens - 16 if name == _WITH else 0
            if number >= 0 and not least <= asked.cached_tokens <= least + 15:
                raise BenchmarkError(f"{name} had found {asked.cached_tokens} of {options.prompt_tokens} tokens")
            if number >= 0:
                readings[name].append(asked.first_s)
    title = f"first token of {options.prompt_tokens}, which another instance has computed"
    return _comparison(title, ("found in the store", "computed"), readings)


async def _unseen(bus: NatsBus, asking: Asking, options: argparse.Namespace) -> list[Comparison]:
    """What prompts that nobody has seen pay for the cache store: to the first token, and a token of the answer."""
    first: dict[str, list[float]] = {_WITH: [], _WITHOUT: []}
    each: dict[str, list[float]] = {_WITH: [], _WITHOUT: []}
    for number in range(-1, options.rounds):
        for name in _order(number):
            prompts = [_prompt(1000 * (number + 2) + place, options.prompt_tokens) for place in range(options.at_once)]
            if name == _WITH:
                prompts = [prompt[::-1] for prompt in prompts]
            asked = [await asking.ask(prompt, options.answer_tokens, name, name) for prompt in prompts]
            await answered(asked)
            if number >= 0:
                first[name].append(statistics.median(one.first_s for one in asked))
                each[name].append(statistics.median(_token_s(one) for one in asked))
            await _stored(bus)
    title = f"{options.at_once} prompts of {options.prompt_tokens} tokens at once that nobody has seen"
    names = ("with the store", "without")
    return [
        _comparison(f"{title}: first token", names, first),
        _comparison(f"{title}: each later one", names, each),
    ]


async def _stored(bus: NatsBus) -> None:
    """Return once nothing new has come to the cache store for a while."""
    before: tuple[int, ...] = ()
    since_s = time.monotonic()
    async with asyncio.timeout(_WAIT_S):
        while time.monotonic() - since_s < _QUIET_S:
            now = (await bus.request(ASK_DIGESTS, AskDigests(), _STORE, deadline_s=_WAIT_S)).digests
            if now != before:
                before, since_s = now, time.monotonic()
            await asyncio.sleep(0.05)


def _prompt(seed: int, tokens: int) -> list[int]:
    chance = random.Random(seed)
    return [chance.randrange(VOCABULARY) for _ in range(tokens)]


def _order(number: int) -> tuple[str, str]:
    return (_WITH, _WITHOUT) if number % 2 else (_WITHOUT, _WITH)


def _token_s(asked: Asked) -> float:
    return (asked.came_s[-1] - asked.came_s[0]) / (len(asked.came_s) - 1)


def _comparison(title: str, names: tuple[str, str], readings: dict[str, list[float]]) -> Comparison:
    ours, theirs = names
    return Comparison(title, Side(ours, tuple(readings[_WITH])), Side(theirs, tuple(readings[_WITHOUT])))

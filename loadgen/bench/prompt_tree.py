"""The global prompt tree against public prefix indexes, in one run: tokens in, cached blocks of every worker out.

Prompts of 4,096 tokens, each cached at one of 8 workers, in groups that share their first 2,048 tokens; blocks of 16
tokens. All are inserted, then looked up in another order: as they are (full hits), and with another second half
(partial hits). Ours is given packed tokens, as they come from the gateway. Peers that cannot be imported are skipped
and named: to measure against them, run this with the interpreter of a virtual environment that has them.

Before that, one size beyond a node's: 1,000 instances, 10 million blocks. Memory by block and the time of a match are
printed.
"""

import argparse
import gc
import os
import random
import statistics
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from common.policies.language.prompt_tree import PromptTree
from loadgen.bench.compare import Comparison, compare
from loadgen.bench.prompt_tree_peers import PEERS, Ask
from loadgen.counts import count, not_negative, several

WORKERS = 8
TOKENS, SHARED_TOKENS, BLOCK_TOKENS = 4096, 2048, 16
TOKEN_BYTES = 4
# How many times as fast ours is to be as the fastest peer whose name begins so.
TARGETS = {"dynamo RadixTree, ready hashes": 3.0, "sglang": 1.5}


@dataclass(frozen=True)
class Workload:
    """Prompts as token lists. ``owners``: where each is cached; ``fresh``: the same first halves, other second ones;
    ``holders``: of each group's first half; ``order``: in which they are looked up."""

    prompts: list[list[int]]
    fresh: list[list[int]]
    owners: list[int]
    holders: list[set[int]]
    order: list[int]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prompts", type=count, default=1000, help="how many (default: 1000)")
    parser.add_argument("--groups", type=count, default=20, help="how many first halves there are (default: 20)")
    parser.add_argument("--pairs", type=several, default=15, help="readings of each comparison (default: 15)")
    parser.add_argument("--instances", type=count, default=1000, help="at the large size (default: 1000)")
    parser.add_argument("--blocks", type=not_negative, default=10_000_000, help="at the large size, 0: without it")


def run(arguments: argparse.Namespace) -> dict[str, object]:
    """Measure, print, and return what ``--json`` writes."""
    # First: what others left free would hide what the tree takes.
    large = measure_large(arguments.instances, arguments.blocks) if arguments.blocks else None
    work = make_workload(arguments.prompts, arguments.groups)
    compared: dict[str, list[Comparison]] = {}
    skipped: dict[str, str] = {}
    for peer in PEERS:
        try:
            found = {name: _against(ask, name, work, arguments.pairs) for name, ask in peer(work.prompts, work.owners)}
        except Exception as error:  # noqa: BLE001 - whatever a peer's own import or call fails with
            skipped[peer.__name__] = f"{type(error).__name__}: {error}"[:200]
            print(f"{peer.__name__} is left out: {skipped[peer.__name__]}")
        else:
            compared |= found
    if not compared:
        _print_ours(work)
    return {
        "benchmark": "prompt-tree",
        "comparisons": [one.as_dict() for pair in compared.values() for one in pair],
        "skipped": skipped,
        "verdicts": _verdicts(compared),
        "large": large,
    }


def make_workload(prompts: int, groups: int, seed: int = 7) -> Workload:
    """The same for the same numbers."""
    chance = random.Random(seed)
    heads = [[chance.randrange(32_000) for _ in range(SHARED_TOKENS)] for _ in range(groups)]
    rest = TOKENS - SHARED_TOKENS
    full = [heads[i % groups] + [chance.randrange(32_000) for _ in range(rest)] for i in range(prompts)]
    owners = [chance.randrange(WORKERS) for _ in range(prompts)]
    fresh = [heads[i % groups] + [32_000 + chance.randrange(9) for _ in range(rest)] for i in range(prompts)]
    order = list(range(prompts))
    chance.shuffle(order)
    return Workload(full, fresh, owners, [set(owners[group::groups]) for group in range(groups)], order)


def build_tree(work: Workload) -> PromptTree:
    """Ours, with all prompts where they are cached."""
    tree = PromptTree(BLOCK_TOKENS * TOKEN_BYTES)
    for prompt, owner in zip(work.prompts, work.owners, strict=True):
        tree.insert(str(owner), pack(prompt))
    return tree


def pack(tokens: Sequence[int]) -> bytes:
    """As a gateway packs them: four bytes a token, the least significant first (as this machine's, in a benchmark)."""
    return array("I", tokens).tobytes()


def check(match: Callable[[int, bool], dict[int, int]], work: Workload, exact: bool) -> int:
    """How many answers are wrong. ``match(i, hit)``: blocks by worker. Not ``exact``: only the most blocks count."""
    wrong = 0
    for number in work.order[:200]:
        for hit in (True, False):
            shared = SHARED_TOKENS // BLOCK_TOKENS
            want = dict.fromkeys(work.holders[number % len(work.holders)], shared)
            if hit:
                want[work.owners[number]] = TOKENS // BLOCK_TOKENS
            got = match(number, hit)
            wrong += got != want if exact else max(got.values(), default=0) != max(want.values())
    return wrong


def _against(ask: Ask, name: str, work: Workload, pairs: int) -> list[Comparison]:
    """Full hits and partial hits, ours and theirs in turn; the inputs of both are ready before."""
    tree = build_tree(work)
    packed = [pack(prompt) for prompt in work.prompts], [pack(prompt) for prompt in work.fresh]
    theirs = [ask.prepare(prompt) for prompt in work.prompts], [ask.prepare(prompt) for prompt in work.fresh]
    wrong = check(lambda number, hit: _numbered(tree.match(packed[not hit][number])), work, exact=True)
    wrong += check(lambda number, hit: ask.scores(theirs[not hit][number]), work, ask.names_workers)
    if wrong:
        raise AssertionError(f"{wrong} wrong answers of ours or of {name}")
    found = []
    for which, what in enumerate(("full hits", "partial hits")):
        mine, other = [packed[which][i] for i in work.order], [theirs[which][i] for i in work.order]
        found.append(
            compare(
                lambda mine=mine: [tree.match(tokens) for tokens in mine],  # type: ignore[misc]
                lambda other=other: [ask.match(prompt) for prompt in other],  # type: ignore[misc]
                title=f"a match of {TOKENS} tokens among {WORKERS} workers, {what}",
                names=("ours, packed tokens", name),
                pairs=pairs,
                operations=len(work.order),
            )
        )
        print(found[-1].text(), flush=True)
    return found


def _numbered(scores: dict[str, int]) -> dict[int, int]:
    return {int(name): blocks for name, blocks in scores.items()}


def _print_ours(work: Workload) -> None:
    tree, packed = build_tree(work), [pack(work.prompts[i]) for i in work.order]
    print(f"no peer could be imported; ours: {_match_us(tree, packed):.2f} µs a match of {TOKENS} tokens, full hits")


def _verdicts(compared: dict[str, list[Comparison]]) -> list[dict[str, object]]:
    """How many times as fast as the peers that were named beforehand; the less fast of full and partial hits."""
    found: list[dict[str, object]] = []
    for target, least in TARGETS.items():
        names = [name for name in compared if name.startswith(target)]
        if names:
            times = min(1 / one.median_ratio for name in names for one in compared[name])
            found.append({"against": target, "times_as_fast": times, "target": least, "met": times >= least})
            print(f"{times:.2f} times as fast as {target} (asked: {least:g}): {'met' if times >= least else 'missed'}")
    return found


def measure_large(instances: int, blocks: int) -> dict[str, object]:
    """The tree of a large cluster: groups of 20 prompts as above, each at some instance."""
    chance = random.Random(11)
    half = SHARED_TOKENS * TOKEN_BYTES
    tree = PromptTree(BLOCK_TOKENS * TOKEN_BYTES)
    names = [f"instance-{number}" for number in range(instances)]
    asked: list[bytes] = []
    prompts = stored = 0
    gc.collect()
    before_bytes, began_s = _resident_bytes(), time.perf_counter()
    while stored < blocks:
        head = chance.randbytes(half)
        stored += half // tree.block_bytes
        for _ in range(20):
            prompt = head + chance.randbytes(half)
            tree.insert(chance.choice(names), prompt)
            stored += half // tree.block_bytes
            prompts += 1
        asked.append(prompt)
    took_s = time.perf_counter() - began_s
    gc.collect()
    grown = _resident_bytes() - before_bytes - sum(len(prompt) for prompt in asked)
    chance.shuffle(asked)
    match_us = _match_us(tree, asked)
    print(
        f"{instances} instances, {stored} blocks ({tree.nodes} edges): {grown / stored:.1f} bytes a block, of which "
        f"{tree.block_bytes} are its tokens; {match_us:.2f} µs a match of {TOKENS} tokens; "
        f"{1e6 * took_s / prompts:.0f} µs an insertion, the making of its prompt included"
    )
    return {
        "instances": instances,
        "blocks": stored,
        "edges": tree.nodes,
        "bytes_per_block": grown / stored,
        "match_us": match_us,
        "insert_us": 1e6 * took_s / prompts,
    }


def _match_us(tree: PromptTree, asked: Sequence[bytes]) -> float:
    """The median of nine passes."""
    readings = []
    for _ in range(9):
        began_s = time.perf_counter()
        for tokens in asked:
            tree.match(tokens)
        readings.append(time.perf_counter() - began_s)
    return 1e6 * statistics.median(readings) / len(asked)


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")

"""Public prefix indexes, each asked the same: NVIDIA Dynamo's ``RadixTree``, SGLang's Python and Rust trees, vLLM's
block pool. None is a dependency of ours; each peer here raises whatever its import raises.

SGLang's trees do not know workers: asked as one tree for all they only tell the longest match, and for an answer by
worker there must be a tree for each. vLLM's pool is that of one engine.
"""

import hashlib
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import sys
import types
import warnings
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

BLOCK_TOKENS = 16


@dataclass(frozen=True)
class Ask:
    """How to ask one index.

    Attributes:
        prepare: token list to what it takes; not timed.
        match: the timed call.
        scores: what ``match`` found, as blocks by worker; not timed.
        names_workers: whether the answer tells workers apart. If not, the one answer stands under worker 0.
    """

    prepare: Callable[[list[int]], Any]
    match: Callable[[Any], Any]
    scores: Callable[[Any], dict[int, int]]
    names_workers: bool = True


Peer = Callable[[Sequence[list[int]], Sequence[int]], Iterator[tuple[str, Ask]]]


def dynamo(prompts: Sequence[list[int]], owners: Sequence[int]) -> Iterator[tuple[str, Ask]]:
    """From hashes that are ready, and from tokens, which it hashes first."""
    os.environ.setdefault("DYN_LOG", "error")
    module = importlib.import_module("dynamo.llm")
    tree = module.RadixTree()

    def hashes_of(prompt: list[int]) -> Any:
        return module.compute_block_hash_for_seq(prompt, BLOCK_TOKENS)

    for number, (prompt, owner) in enumerate(zip(prompts, owners, strict=True)):
        hashes = hashes_of(prompt)
        blocks = [
            {"block_hash": own, "tokens_hash": of_tokens}
            for own, of_tokens in zip(_chained(hashes), hashes, strict=True)
        ]
        event = {"event_id": number, "data": {"stored": {"parent_hash": None, "blocks": blocks}}}
        tree.apply_event(owner, json.dumps(event).encode())

    def folded(found: Any) -> dict[int, int]:
        return {worker[0]: blocks for worker, blocks in found.scores.items()}

    yield (
        "dynamo RadixTree, ready hashes",
        Ask(hashes_of, tree.find_matches, lambda hashes: folded(tree.find_matches(hashes))),
    )
    yield (
        "dynamo RadixTree, tokens",
        Ask(
            lambda prompt: prompt,
            lambda prompt: tree.find_matches(hashes_of(prompt)),
            lambda prompt: folded(tree.find_matches(hashes_of(prompt))),
        ),
    )


def sglang_python(prompts: Sequence[list[int]], owners: Sequence[int]) -> Iterator[tuple[str, Ask]]:
    """SGLang's ``RadixCache``."""
    base, radix = _sglang()

    def make() -> Any:
        return radix.RadixCache.create_simulated(page_size=BLOCK_TOKENS)

    def insert(tree: Any, prompt: list[int], slots: Any) -> None:
        tree.insert(base.InsertParams(key=radix.RadixKey(array("q", prompt)), value=slots))

    yield from _trees("sglang RadixCache", make, insert, prompts, owners)


def sglang_rust(prompts: Sequence[list[int]], owners: Sequence[int]) -> Iterator[tuple[str, Ask]]:
    """SGLang's tree in Rust."""
    base, radix = _sglang()
    adapter = importlib.import_module("sglang.srt.mem_cache.rust_tree_core.adapter")
    components = importlib.import_module("sglang.srt.mem_cache.unified_cache.component_type")
    parameters = importlib.import_module("sglang.srt.mem_cache.cache_init_params")

    def make() -> Any:
        return adapter.RustUnifiedTreeCore(
            parameters.CacheInitParams(
                disable=False,
                req_to_token_pool=None,
                token_to_kv_pool_allocator=None,
                page_size=BLOCK_TOKENS,
                tree_components=(components.ComponentType.FULL,),
            )
        )

    def insert(tree: Any, prompt: list[int], slots: Any) -> None:
        tree.begin_insert(base.InsertParams(key=radix.RadixKey(array("q", prompt)), value=slots))
        while tree.has_ongoing_insert():
            tree.resume_insert()

    yield from _trees("sglang RustTreeCore", make, insert, prompts, owners)


def vllm(prompts: Sequence[list[int]], owners: Sequence[int]) -> Iterator[tuple[str, Ask]]:
    """vLLM's prefix cache: a hash map of blocks, walked from the first one on; hashes are ready."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    importlib.import_module("vllm")
    warnings.simplefilter("ignore")
    os.environ.setdefault("PYTHONHASHSEED", "0")
    utils = importlib.import_module("vllm.v1.core.kv_cache_utils")
    hash_of = importlib.import_module("vllm.utils.hashing").get_hash_fn_by_name("xxhash")
    utils.init_none_hash(hash_of)
    blocks = sum(len(prompt) for prompt in prompts) // BLOCK_TOKENS
    pool = importlib.import_module("vllm.v1.core.block_pool").BlockPool(blocks + 2, True, BLOCK_TOKENS)

    def hashes_of(prompt: list[int]) -> list[Any]:
        found: list[Any] = []
        for start in range(0, len(prompt), BLOCK_TOKENS):
            before = found[-1] if found else None
            found.append(utils.hash_block_tokens(hash_of, before, prompt[start : start + BLOCK_TOKENS]))
        return found

    for prompt in prompts:
        for block_hash in hashes_of(prompt):
            if pool.get_cached_block(block_hash, [0]) is None:
                (block,) = pool.get_new_blocks(1)
                pool.cached_block_hash_to_block.insert(utils.make_block_hash_with_group_id(block_hash, 0), block)

    def match(hashes: list[Any]) -> int:
        count = 0
        for block_hash in hashes:
            if pool.get_cached_block(block_hash, [0]) is None:
                break
            count += 1
        return count

    yield "vllm BlockPool, ready hashes", Ask(hashes_of, match, lambda hashes: {0: match(hashes)}, names_workers=False)


PEERS: tuple[Peer, ...] = (dynamo, sglang_rust, sglang_python, vllm)


def _trees(
    name: str,
    make: Callable[[], Any],
    insert: Callable[[Any, list[int], Any], None],
    prompts: Sequence[list[int]],
    owners: Sequence[int],
) -> Iterator[tuple[str, Ask]]:
    """One tree for all workers, and one tree for each."""
    base, radix = _sglang()
    slots = importlib.import_module("torch").arange(max(len(prompt) for prompt in prompts))

    def find(tree: Any, key: Any) -> int:
        return int(tree.match_prefix(base.MatchPrefixParams(key=radix.RadixKey(key))).device_prefix_len) // BLOCK_TOKENS

    def prepare(prompt: list[int]) -> Any:
        return array("q", prompt)

    one, many = make(), {owner: make() for owner in sorted(set(owners))}
    for prompt, owner in zip(prompts, owners, strict=True):
        insert(one, prompt, slots)
        insert(many[owner], prompt, slots)

    def ask_all(key: Any) -> dict[int, int]:
        return {owner: blocks for owner, tree in many.items() if (blocks := find(tree, key))}

    yield (
        f"{name}, one tree for all",
        Ask(prepare, lambda key: find(one, key), lambda key: {0: find(one, key)}, names_workers=False),
    )
    yield f"{name}, a tree for each worker", Ask(prepare, ask_all, ask_all)


def _sglang() -> tuple[Any, Any]:
    importlib.import_module("sglang")  # where there is none, nothing else is loaded for it
    warnings.simplefilter("ignore")
    _stand_in_for_torchvision()
    base = importlib.import_module("sglang.srt.mem_cache.base_prefix_cache")
    return base, importlib.import_module("sglang.srt.mem_cache.radix_cache")


def _chained(hashes: Sequence[int]) -> list[int]:
    """Of each block together with all before it."""
    chained: list[int] = []
    before = b""
    for one in hashes:
        before = hashlib.blake2b(before + one.to_bytes(8, "little"), digest_size=8).digest()
        chained.append(int.from_bytes(before, "little") >> 1)
    return chained


class _Named(type):
    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return hash(name)


class _StandIn(types.ModuleType):
    __path__: list[str] = []  # noqa: RUF012 - a module's, by the protocol of imports

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Named(name, (), {})


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, fullname: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if fullname.split(".")[0] != "torchvision":
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def _stand_in_for_torchvision() -> None:
    """SGLang names torchvision where it loads; its trees never use it, and torch for CPUs has none that fits."""
    importlib.import_module("transformers.utils.import_utils").is_torchvision_available()
    if importlib.util.find_spec("torchvision") is None and not any(isinstance(one, _Finder) for one in sys.meta_path):
        sys.meta_path.insert(0, _Finder())

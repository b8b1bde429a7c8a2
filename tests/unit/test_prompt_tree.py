"""The prompt tree beside the plainest model of it: for every instance, the set of beginnings that it has."""

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.policies.language.prompt_tree import Holding, PromptTree

BLOCK = 4
INSTANCES = ("a", "b", "c")


class Beginnings:
    """Every beginning in whole blocks that an instance has, one by one."""

    def __init__(self) -> None:
        self.of: dict[str, set[bytes]] = {name: set() for name in INSTANCES}
        self.fresh: dict[str, set[bytes]] = {name: set() for name in INSTANCES}

    def insert(self, instance: str, tokens: bytes) -> None:
        begun = {tokens[:end] for end in range(BLOCK, len(tokens) + 1, BLOCK)}
        self.of[instance] |= begun
        self.fresh[instance] |= begun

    def remove(self, instance: str, tokens: bytes, kept_blocks: int) -> None:
        gone = tokens[: (kept_blocks + 1) * BLOCK]
        for known in (self.of, self.fresh):
            known[instance] = {one for one in known[instance] if not one.startswith(gone)}

    def expire(self) -> None:
        for name in INSTANCES:
            self.of[name] &= self.fresh[name]
            self.fresh[name] = set()

    def forget(self, instance: str) -> None:
        self.of[instance], self.fresh[instance] = set(), set()

    def match(self, tokens: bytes) -> dict[str, int]:
        found = {name: sum(tokens.startswith(one) for one in self.of[name]) for name in INSTANCES}
        return {name: blocks for name, blocks in found.items() if blocks}


def prompt(blocks: list[int], rest: int = 0) -> bytes:
    return b"".join(bytes([block]) * BLOCK for block in blocks) + b"\xff" * rest


prompts = st.builds(prompt, st.lists(st.integers(0, 2), max_size=6), st.integers(0, BLOCK - 1))
instances = st.sampled_from(INSTANCES)
Tree = PromptTree | Beginnings
steps: st.SearchStrategy[Callable[[Tree], None]] = st.one_of(
    st.builds(lambda name, tokens: lambda tree: tree.insert(name, tokens), instances, prompts),
    st.builds(lambda name, tokens: lambda tree: tree.insert(name, tokens), instances, prompts),
    st.builds(
        lambda name, tokens, kept: (
            lambda tree: tree.remove(name, tokens, kept % (len(tokens) // BLOCK)) if len(tokens) >= BLOCK else None
        ),
        instances,
        prompts,
        st.integers(0, 5),
    ),
    st.builds(lambda name: lambda tree: tree.forget(name), instances),
    st.just(lambda tree: tree.expire()),
)


@settings(deadline=None)
@given(st.lists(steps, max_size=25), st.lists(prompts, min_size=1, max_size=8))
def test_any_history_gives_the_answers_of_the_plain_model(
    history: list[Callable[[Tree], None]], asked: list[bytes]
) -> None:
    tree, plain = PromptTree(BLOCK), Beginnings()
    for step in history:
        step(tree)
        step(plain)
    for tokens in asked:
        assert tree.match(tokens) == plain.match(tokens)
    for name in INSTANCES:
        assert tree.holding(name).blocks == len(plain.of[name])
        told = PromptTree(BLOCK)
        for sequence in tree.sequences(name):
            told.insert(name, sequence)
        assert told.holding(name) == tree.holding(name)
    if not any(plain.of.values()):
        assert tree.nodes == 0


def test_what_differs_in_a_block_has_another_digest() -> None:
    tree = PromptTree(BLOCK)
    tree.insert("a", prompt([1, 2, 3]))
    tree.insert("b", prompt([1, 2, 4]))
    tree.insert("c", prompt([1, 2]))
    tree.insert("c", prompt([1, 2, 3]))
    assert tree.holding("a") == tree.holding("c") != tree.holding("b")
    assert tree.holding("unknown") == Holding(0, 0)


def test_a_chat_that_goes_on_stays_one_edge() -> None:
    tree = PromptTree(BLOCK)
    for turns in range(1, 6):
        tree.insert("a", prompt([1] * turns))
    assert tree.nodes == 1


def test_edges_are_joined_when_a_branch_is_gone() -> None:
    tree = PromptTree(BLOCK)
    tree.insert("a", prompt([1, 2, 3]))
    tree.insert("a", prompt([1, 2, 4]))
    assert tree.nodes == 3
    tree.remove("a", prompt([1, 2, 4]), 2)
    assert tree.nodes == 1
    assert tree.match(prompt([1, 2, 3])) == {"a": 3}


def test_a_name_that_left_may_come_again_with_nothing() -> None:
    tree = PromptTree(BLOCK)
    tree.insert("a", prompt([1, 2]))
    tree.forget("a")
    tree.insert("b", prompt([1]))
    assert tree.match(prompt([1, 2])) == {"b": 1}
    tree.insert("a", prompt([2]))
    assert tree.holding("a").blocks == 1


def test_a_block_without_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="holds no token"):
        PromptTree(0)

"""Text as it comes: no character is split, no part of a stop string is shown, nothing is lost."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from common.models.causal_lm import ModelLoadError, load_tokenizer
from common.models.causal_lm.text import Detokenizer, StopStrings


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token for each byte, and some longer ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the")]
    tokens = ["<end>", *alphabet, *("".join(merge) for merge in merges)]
    whole = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, merges))
    whole.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    whole.decoder = decoders.ByteLevel()
    whole.add_special_tokens(["<end>"])
    return PreTrainedTokenizerFast(tokenizer_object=whole, eos_token="<end>")


@settings(max_examples=60, deadline=None)
@given(text=st.text(alphabet="the é漢🦊\n�", max_size=20))
def test_the_pieces_are_the_text_and_whole_characters(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.add(token) for token in tokenizer.encode(text, add_special_tokens=False)]
    whole = "".join(pieces)
    assert text.startswith(whole)
    assert whole + detokenizer.finish() == text
    assert "�" in text or whole == text


def test_a_character_cut_off_at_the_end_is_shown_as_such(tokenizer: PreTrainedTokenizerFast) -> None:
    detokenizer = Detokenizer(tokenizer)
    first, *_ = tokenizer.encode("🦊", add_special_tokens=False)
    assert detokenizer.add(first) == ""
    assert detokenizer.finish() == "�"


def test_special_tokens_have_no_text(tokenizer: PreTrainedTokenizerFast) -> None:
    assert Detokenizer(tokenizer).add(tokenizer.eos_token_id) == ""
    assert Detokenizer(tokenizer, skip_special_tokens=False).add(tokenizer.eos_token_id) == "<end>"


def test_a_published_tokenizer_is_loaded(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="no tokenizer"):
        load_tokenizer(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.encode("the é") == tokenizer.encode("the é")
    assert loaded.eos_token == "<end>"


@settings(max_examples=200, deadline=None)
@given(
    pieces=st.lists(st.text(alphabet="abc", max_size=3), max_size=12),
    stops=st.lists(st.text(alphabet="abc", min_size=1, max_size=4), max_size=3),
)
def test_text_ends_before_the_stop_string_that_is_complete_first(pieces: list[str], stops: list[str]) -> None:
    whole = "".join(pieces)
    ends = [(whole.find(stop) + len(stop), whole.find(stop)) for stop in stops if stop in whole]
    holding = StopStrings(stops)
    shown = ""
    for piece in pieces:
        shown += holding.add(piece)
        assert whole.startswith(shown)
        assert not any(stop in shown for stop in stops)
    shown += holding.finish()
    assert (holding.stopped is not None) == bool(ends)
    assert shown == (whole[: min(ends)[1]] if ends else whole)


def test_only_what_may_become_a_stop_string_is_held_back() -> None:
    holding = StopStrings(("\n\nUser:",))
    assert holding.add("yes\n") == "yes"
    assert holding.add("no") == "\nno"
    assert holding.add("\n\nUse") == ""
    assert holding.add("r") == ""
    assert holding.add(": and") == ""
    assert holding.stopped == "\n\nUser:" and holding.finish() == ""
    with pytest.raises(ValueError, match="empty"):
        StopStrings(("",))

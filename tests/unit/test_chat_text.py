"""Text out of tokens: no character split, stop strings found wherever tokens end, special tokens silent."""

from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from common.messages.chat import FinishReason, TokenLogprobs
from gateway.chat.line import Step
from gateway.chat.pieces import Detokenizer, TokenPieces, UnknownDecoder
from gateway.chat.stops import StopStrings
from gateway.chat.template import ChatTemplate, TemplateRefusal, WrongTemplate
from gateway.chat.text import AnswerText, Piece
from gateway.chat.tokenizer import TokenizerError, load_tokenizer
from tests.support.tiny_tokenizer import END, TEMPLATE, tiny_tokenizer, write_tokenizer

TOKENIZER = tiny_tokenizer()
PIECES = TokenPieces(TOKENIZER)
END_ID = TOKENIZER.token_to_id(END)


def tokens_of(text: str) -> list[int]:
    ids: list[int] = TOKENIZER.encode(text).ids
    return ids


@settings(deadline=None)
@given(text=st.text(max_size=30), cuts=st.lists(st.integers(0, 100), max_size=8))
def test_text_comes_back_whole_however_its_tokens_come(text: str, cuts: list[int]) -> None:
    tokens = tokens_of(text)
    places = sorted({0, len(tokens), *(cut for cut in cuts if cut < len(tokens))})
    detokenizer = Detokenizer(PIECES)
    parts = [detokenizer.feed(tokens[start:end]) for start, end in pairwise(places)]
    assert "".join(parts) + detokenizer.flush() == text
    assert all("\ufffd" not in part for part in parts) or "\ufffd" in text


@settings(deadline=None)
@given(noise=st.binary(max_size=20))
def test_bytes_that_are_no_text_read_as_the_tokenizer_reads_them(noise: bytes) -> None:
    letters = {PIECES.name(token): token for token in range(256)}
    tokens = [letters[bytes((byte,))] for byte in noise]
    detokenizer = Detokenizer(PIECES)
    text = "".join(detokenizer.feed((token,)) for token in tokens) + detokenizer.flush()
    assert text == TOKENIZER.decode(tokens)


def test_an_emoji_shows_with_its_last_token() -> None:
    detokenizer = Detokenizer(PIECES)
    assert [detokenizer.feed((token,)) for token in tokens_of("a😀b")] == ["a", "", "", "", "😀", "b"]


def test_special_tokens_have_a_name_but_no_text() -> None:
    assert (PIECES.name(END_ID), PIECES.text(END_ID)) == (END.encode(), b"")
    assert PIECES.text(10**6) == b""


def test_sentence_pieces_have_spaces_and_single_bytes() -> None:
    vocabulary = [("<unk>", 0.0), ("▁hello", 0.0), *((f"<0x{byte:02X}>", 0.0) for byte in "é".encode())]
    tokenizer = Tokenizer(models.Unigram(vocabulary, 0, byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    detokenizer = Detokenizer(TokenPieces(tokenizer))
    assert [detokenizer.feed((token,)) for token in (1, 2, 3)] == [" hello", "", "é"]


def test_another_kind_of_decoder_is_refused_by_name() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.decoder = decoders.WordPiece()
    with pytest.raises(UnknownDecoder, match="WordPiece"):
        TokenPieces(tokenizer)


@settings(deadline=None)
@given(
    text=st.text("abc", max_size=30),
    stops=st.lists(st.text("abc", min_size=1, max_size=4), max_size=4),
    cuts=st.lists(st.integers(0, 30), max_size=6),
)
def test_what_shows_ends_before_the_first_stop_string(text: str, stops: list[str], cuts: list[int]) -> None:
    finder, shown = StopStrings(stops), ""
    places = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    for start, end in pairwise(places):
        shown += finder.feed(text[start:end])
        if finder.found:
            break
    assert finder.found == any(stop in text for stop in stops)
    if finder.found:
        assert any(text.startswith(shown + stop) for stop in stops)
        assert not any(stop in shown for stop in stops)
    else:
        assert shown + finder.flush() == text


def feed_each(answer: AnswerText, tokens: list[int], finish: FinishReason | None) -> list[Piece]:
    """Tokens one a step; the last has ``finish``."""
    logprobs = [TokenLogprobs(logprob=-1.0)]
    last = len(tokens) - 1
    return [
        answer.feed(Step([token], list(logprobs), finish if place == last else None))
        for place, token in enumerate(tokens)
    ]


def test_the_ending_token_counts_but_does_not_show() -> None:
    pieces = feed_each(AnswerText(PIECES, ()), [*tokens_of("hi"), tokens_of("x")[0]], FinishReason.STOP)
    assert [piece.text for piece in pieces] == ["h", "i", ""]
    assert sum(piece.tokens for piece in pieces) == 3
    assert [report.offset for piece in pieces for report in piece.reports] == [0, 1, 2]
    assert pieces[-1].finish is FinishReason.STOP


def test_half_a_character_at_the_end_shows_as_a_replacement() -> None:
    pieces = feed_each(AnswerText(PIECES, ()), tokens_of("é")[:1], FinishReason.LENGTH)
    assert [(piece.text, piece.finish) for piece in pieces] == [("\ufffd", FinishReason.LENGTH)]


def test_tokens_behind_a_stop_string_do_not_count() -> None:
    piece = AnswerText(PIECES, ("b",)).feed(Step(tokens_of("abcd")))
    assert (piece.text, piece.tokens, piece.finish) == ("a", 2, FinishReason.STOP)


def test_a_template_that_cannot_be_used_is_refused() -> None:
    with pytest.raises(WrongTemplate, match="no Jinja"):
        ChatTemplate("{% for %}", {})
    # A template comes from whoever made the weights.
    for reach in ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ messages.append(1) }}"):
        with pytest.raises(TemplateRefusal):
            ChatTemplate(reach, {}).render([{"role": "user", "content": "x"}], {})
    with pytest.raises(TemplateRefusal, match="surrogates"):
        ChatTemplate("{{ style }}", {}).render([], {"style": "\ud800"})
    template = ChatTemplate("{{ bos_token }}{{ messages | tojson }}{{ deep | default('no') }}", {"bos_token": "<s>"})
    assert template.render([{"role": "user", "content": "é"}], {"deep": 1}) == '<s>[{"role": "user", "content": "é"}]1'


@pytest.mark.parametrize(
    "source",
    [
        TEMPLATE,
        "{{ bos_token }}{%- if tools is none %}none{% endif %}\n  {% for message in messages %}\n    "
        "{% if loop.index > 2 %}{% break %}{% endif %}\n[{{ message | tojson(indent=1) }}]{% generation %}"
        "{{ message['content'] | trim }}{% endgeneration %}\n  {% endfor %}\n{{ style | default('plain') }}",
    ],
)
def test_prompts_are_those_of_transformers(tmp_path: Path, source: str) -> None:
    """The library that published templates are written for, of which only this test needs to be sure."""
    from transformers import PreTrainedTokenizerFast

    (write_tokenizer(tmp_path) / "chat_template.jinja").write_text(source)
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"), eos_token=END)
    messages = [{"role": role, "content": f" {role} \n😀 <b>'"} for role in ("system", "user", "assistant", "user")]
    wanted = theirs.apply_chat_template(messages, chat_template=source, add_generation_prompt=True, tokenize=False)
    assert load_tokenizer(str(tmp_path)).encode_chat(messages, {}) == tokens_of(wanted)


def test_a_tokenizer_is_read_from_a_folder(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(write_tokenizer(tmp_path / "model")))
    assert tokenizer.size == TOKENIZER.get_vocab_size()
    prompt = tokenizer.encode_chat([{"role": "user", "content": "hi"}], {})
    assert TOKENIZER.decode(prompt, skip_special_tokens=False) == f"<|user|>hi{END}<|assistant|>"
    (tmp_path / "model" / "chat_template.jinja").write_text("{{ messages[0].content }}!")
    assert load_tokenizer(str(tmp_path / "model")).encode_chat([{"content": "hi"}], {}) == tokens_of("hi!")


def test_what_is_no_tokenizer_says_so(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"no tokenizer\.json"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(TokenizerError, match="no such folder"):
        load_tokenizer(str(tmp_path / "nothing"))
    (write_tokenizer(tmp_path / "model") / "tokenizer_config.json").write_text("{")
    with pytest.raises(TokenizerError, match="no JSON"):
        load_tokenizer(str(tmp_path / "model"))

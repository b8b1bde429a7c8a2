"""The shipped demo language model keeps its promise: odd ideas become captions that the demo video model understands.

The floors lie a little under the figures of the model card, because processors round differently.
"""

import json

import pytest

from common.models.demo.clips import Action, Shape, Subject
from common.models.demo.export import folder_bytes
from common.models.demo.loop import generator_of
from common.models.demo.reading import read_caption
from common.models.demo_language.answering import LanguageModel, load_language_model
from common.models.demo_language.batches import draw_conversation, encode
from common.models.demo_language.card import CARD, FIGURES
from common.models.demo_language.evaluate import (
    FILMED,
    Written,
    held_out_ideas,
    odd_ideas,
    small_talk,
    write_captions,
)
from common.models.demo_language.settings import WEIGHTS
from common.models.demo_language.talk import TALKS

_IDEAS = 200


@pytest.fixture(scope="module")
def language_model() -> LanguageModel:
    return load_language_model(WEIGHTS)


@pytest.fixture(scope="module")
def odd(language_model: LanguageModel) -> list[Written]:
    return write_captions(language_model, odd_ideas())


def _share_right(written: list[Written]) -> float:
    return sum(item.right for item in written) / len(written)


def _wrong(written: list[Written]) -> str:
    return "\n".join(f"{item.idea!r}: {item.caption!r}" for item in written if not item.right)


def test_ideas_that_training_never_saw_become_right_captions(language_model: LanguageModel) -> None:
    written = write_captions(language_model, [(idea.text, idea.stated) for idea in held_out_ideas(_IDEAS, seed=11)])
    assert _share_right(written) >= 0.78, _wrong(written)
    assert sum(item.well_formed for item in written) >= 0.96 * _IDEAS, _wrong(written)


def test_odd_ideas_written_by_hand_become_right_captions(odd: list[Written]) -> None:
    assert len(odd) >= 60
    assert _share_right(odd) >= 0.92, _wrong(odd)


def test_the_demo_idea_becomes_its_caption(language_model: LanguageModel) -> None:
    assert language_model.answers(["ball go right, red"]) == ["a red ball going right"]


def test_capitals_and_space_around_an_idea_change_nothing(language_model: LanguageModel) -> None:
    plain, *others = language_model.answers(["blue star up", "BLUE STAR UP", "  Blue Star up \n"])
    assert read_caption(plain) == Subject("blue", Shape.STAR, Action.UP)
    assert others == [plain, plain]


def test_messages_that_are_no_ideas_get_an_answer_that_suits_them(language_model: LanguageModel) -> None:
    answered = small_talk(language_model)
    wrong = [item for item in answered if not item.right]
    assert len(wrong) <= 0.2 * len(answered), wrong
    answers = language_model.answers(["hello", "Who are you?", "What can you do?"])
    assert answers == [TALKS[kind].answer for kind in ("greeting", "identity", "ability")]


def test_a_later_idea_of_a_conversation_is_the_one_that_counts(language_model: LanguageModel) -> None:
    tokenizer = language_model.tokenizer
    conversation = [
        {"role": "system", "content": "Answer in French."},
        {"role": "user", "content": "red ball up"},
        {"role": "assistant", "content": "a red ball moving up"},
        {"role": "user", "content": "box left, green"},
    ]
    asked = tokenizer.apply_chat_template(
        conversation, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    tokens = language_model.model.generate(**asked, do_sample=False, max_new_tokens=32)
    answer = tokenizer.decode(tokens[0, asked["input_ids"].shape[1] :], skip_special_tokens=True)
    assert read_caption(answer) == Subject("green", Shape.SQUARE, Action.LEFT)


def test_the_chat_template_gives_the_tokens_that_training_used(language_model: LanguageModel) -> None:
    rng = generator_of(3)
    for _ in range(50):
        exchanges = draw_conversation(rng)
        turns = [
            {"role": role, "content": content}
            for exchange in exchanges
            for role, content in zip(("user", "assistant"), exchange, strict=True)
        ]
        templated = language_model.tokenizer.apply_chat_template(turns, return_dict=True)["input_ids"]
        assert templated == encode(language_model.tokenizer, exchanges)[0]


def test_text_survives_the_tokenizer(language_model: LanguageModel) -> None:
    tokenizer = language_model.tokenizer
    for text in ("a red circle moving right", "Größe: 7 → 🟦!", "  two  spaces ", "日本語"):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_the_model_folder_is_complete_and_small() -> None:
    assert folder_bytes(WEIGHTS) <= 8_000_000
    names = {path.name for path in WEIGHTS.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", CARD, FIGURES} <= names
    # Other kinds of files would be missing from an installed package.
    assert {path.suffix for path in WEIGHTS.rglob("*") if path.is_file()} <= {".json", ".safetensors", ".md"}
    assert "chat_template" in json.loads((WEIGHTS / "tokenizer_config.json").read_text(encoding="utf-8"))


def test_the_model_card_tells_the_measured_figures() -> None:
    card = (WEIGHTS / CARD).read_text(encoding="utf-8")
    figures = json.loads((WEIGHTS / FIGURES).read_text(encoding="utf-8"))
    assert figures["ideas"] >= 500
    assert figures["odd_ideas"] == len(odd_ideas())
    for name in ("generated_right", "odd_right", "talk_right"):
        assert f"{figures['shares'][name]:.1%}" in card


def test_films_of_the_card_are_of_odd_ideas_with_the_captions_of_today(odd: list[Written]) -> None:
    captions = {item.idea: item.caption for item in odd}
    films = json.loads((WEIGHTS / FIGURES).read_text(encoding="utf-8"))["films"]
    assert [film["idea"] for film in films] == list(FILMED)
    for film in films:
        assert read_caption(captions[film["idea"]]) == read_caption(film["caption"])

"""The demo language model's training text: ideas and captions belong together, and what is held out stays out."""

import numpy as np
import torch
from transformers import AutoTokenizer

from common.models.demo.captions import held_out_caption, training_caption
from common.models.demo.clips import COLOURS, Action, Scale, Shape, Subject, sample_subject
from common.models.demo.reading import read_caption
from common.models.demo_language import words
from common.models.demo_language.batches import draw_batch, draw_conversation, encode
from common.models.demo_language.evaluate import odd_ideas
from common.models.demo_language.ideas import Stated, draw_idea
from common.models.demo_language.motions import draw_motion
from common.models.demo_language.settings import TRAINED_TOKENS, WEIGHTS
from common.models.demo_language.spoiling import mistyped
from common.models.demo_language.talk import TALKS, draw_talk

_DRAWN = 3000


def test_every_caption_is_read_back_as_its_subject() -> None:
    rng = np.random.default_rng(0)
    for _ in range(1000):
        subject = sample_subject(rng)
        assert read_caption(held_out_caption(subject, rng)) == subject
        # Words without meaning, which training captions have at times, are not in the grammar.
        assert read_caption(training_caption(subject, rng)) in (subject, None)
    assert read_caption("An animation of a tiny violet disc hopping.") == Subject(
        "purple", Shape.CIRCLE, Action.BOUNCE, Scale.SMALL
    )


def test_what_is_no_caption_is_told() -> None:
    for text in ("", "a red circle", "red circle moving right", "a pink circle moving right", "a red circle moving"):
        assert read_caption(text) is None
    for talk in TALKS.values():
        assert read_caption(talk.answer) is None


def test_every_idea_has_a_caption_that_says_what_it_states() -> None:
    rng = np.random.default_rng(1)
    for held_out in (False, True):
        for _ in range(_DRAWN):
            idea = draw_idea(rng, held_out)
            assert idea.stated.agrees(read_caption(idea.caption)), idea
            assert idea.text == idea.text.lower()


def test_ideas_cover_everything_and_are_deterministic() -> None:
    def draw(seed: int) -> list[str]:
        rng = np.random.default_rng(seed)
        return [draw_idea(rng).caption for _ in range(_DRAWN)]

    captions = draw(2)
    assert captions == draw(2)
    subjects = [read_caption(caption) for caption in captions]
    assert {subject.colour for subject in subjects if subject} == set(COLOURS)
    assert {(subject.shape, subject.action) for subject in subjects if subject} >= {
        (shape, action) for shape in Shape for action in Action if (shape, action) != (Shape.CIRCLE, Action.SPIN)
    }
    assert not any(subject.shape is Shape.CIRCLE and subject.action is Action.SPIN for subject in subjects if subject)
    assert len(set(captions)) > _DRAWN / 5


def test_held_out_ideas_never_occur_in_training() -> None:
    rng = np.random.default_rng(3)

    def texts(held_out: bool, count: int) -> set[str]:
        ideas = [draw_idea(rng, held_out) for _ in range(count)]
        facts = [(idea.text, idea.stated) for idea in ideas]
        return {text for text, stated in facts if None not in (stated.colour, stated.shape, stated.action)}

    reserved = texts(held_out=True, count=3000)
    assert len(reserved) > 1000
    assert not reserved & texts(held_out=False, count=20_000)
    assert not reserved & {text for text, _ in odd_ideas()}


def test_a_motion_means_its_action() -> None:
    rng = np.random.default_rng(4)
    for action in Action:
        drawn = [draw_motion(action, rng) for _ in range(300)]
        assert {motion.action for motion in drawn} == {action}
        assert len({motion.text for motion in drawn}) > 20
        assert len({motion.verb for motion in drawn}) > 1


def test_no_word_means_two_things() -> None:
    for table in (words.COLOURS, words.SHAPES, words.SCALES):
        meanings: dict[str, object] = {}
        for meaning, names in table.items():
            for name in names:
                assert meanings.setdefault(name, meaning) == meaning, name


def test_a_mistyped_word_stays_near() -> None:
    rng = np.random.default_rng(5)
    for word in ("blue", "circle", "triangle"):
        drawn = {mistyped(word, rng) for _ in range(200)}
        assert len(drawn) > 10
        for spoilt in drawn:
            assert spoilt[0] == word[0] or len(word) > 5
            assert abs(len(spoilt) - len(word)) <= 3


def test_small_talk_is_drawn_with_its_answer() -> None:
    rng = np.random.default_rng(6)
    drawn = [draw_talk(rng) for _ in range(500)]
    assert {talk.kind for talk in drawn} == set(TALKS)
    assert all(talk.answer == TALKS[talk.kind].answer and "{" not in talk.message for talk in drawn)


def test_an_open_fact_agrees_with_any() -> None:
    subject = Subject("red", Shape.STAR, Action.UP)
    assert Stated().agrees(subject)
    assert Stated(colour="red", action=Action.UP).agrees(subject)
    assert not Stated(shape=Shape.SQUARE).agrees(subject)
    assert not Stated().agrees(None)


def test_packed_conversations_see_only_themselves() -> None:
    tokenizer = AutoTokenizer.from_pretrained(WEIGHTS, local_files_only=True)
    batch = draw_batch(tokenizer, 4, TRAINED_TOKENS, np.random.default_rng(7))
    first, answers = encode(tokenizer, draw_conversation(np.random.default_rng(7)))
    length = len(first)
    assert batch.tokens[0, :length].tolist() == first
    assert batch.answers[0, :length].tolist() == answers
    assert answers[-1]
    visible = batch.attention[0, 0] == 0
    assert torch.equal(visible[:length, :length], torch.ones(length, length, dtype=torch.bool).tril())
    assert not visible[length:, :length].any()
    assert not visible[:length, length:].any()
    assert bool(visible.any(dim=-1).all())
    filled = sum(int((row != 0).sum()) for row in batch.tokens)
    assert filled > 0.75 * batch.tokens.numel()

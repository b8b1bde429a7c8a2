"""The demo model's clips, captions and measurement: real clips pass it, spoilt ones do not."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from common.models.demo.captions import (
    caption,
    held_out_caption,
    plain_caption,
    training_caption,
    wordings,
)
from common.models.demo.clips import (
    COLOURS,
    FRAME_COUNTS,
    MOVES,
    SIZES,
    Action,
    ClipSpec,
    Frames,
    Scale,
    Shape,
    Subject,
    draw,
    pose_at,
    sample_clip,
    sample_subject,
    shapes_for,
)
from common.models.demo.measure import measure


def every_subject() -> list[Subject]:
    return [Subject(colour, shape, action) for colour in COLOURS for action in Action for shape in shapes_for(action)]


def drawn(subject: Subject, seed: int, size: tuple[int, int] = (64, 64), frames: int = 16) -> tuple[ClipSpec, Frames]:
    spec = sample_clip(np.random.default_rng(seed), subject, *size, frames)
    return spec, draw(spec)


def test_every_real_clip_is_measured_right() -> None:
    wrong = []
    for index, subject in enumerate(every_subject()):
        size = SIZES[index % len(SIZES)]
        frames = FRAME_COUNTS[(index // len(SIZES)) % len(FRAME_COUNTS)]
        scale = list(Scale)[index % 3] if subject.action not in (Action.GROW, Action.SHRINK) else Scale.NORMAL
        subject = replace(subject, scale=scale)
        measured = measure(drawn(subject, index, size, frames)[1])
        if not measured.all_right(subject):
            wrong.append((subject, size, frames, measured))
    assert wrong == []


def test_clips_are_deterministic_and_shaped_as_asked() -> None:
    subject = Subject("red", Shape.STAR, Action.SPIN)
    first, second = drawn(subject, 5, (96, 64), 24)[1], drawn(subject, 5, (96, 64), 24)[1]
    assert first.shape == (24, 64, 96, 3)
    assert np.array_equal(first, second)
    assert not np.array_equal(first, drawn(subject, 6, (96, 64), 24)[1])


def test_objects_stay_inside_the_picture() -> None:
    rng = np.random.default_rng(3)
    for index in range(300):
        width, height = SIZES[index % len(SIZES)]
        spec = sample_clip(rng, sample_subject(rng), width, height, 16)
        for frame in range(16):
            pose = pose_at(spec, frame)
            # A star and a triangle reach past their radius, a square's sides do not reach it.
            assert pose.radius - 1 <= pose.x <= width - pose.radius + 1, (spec, frame)
            assert pose.radius - 1 <= pose.y <= height - pose.radius + 1, (spec, frame)


@pytest.mark.parametrize(("width", "height", "frames"), [(32, 64, 16), (64, 40, 16), (64, 64, 4)])
def test_too_small_a_clip_is_refused(width: int, height: int, frames: int) -> None:
    with pytest.raises(ValueError, match="at least"):
        sample_clip(np.random.default_rng(0), Subject("red", Shape.STAR, Action.UP), width, height, frames)


def test_shuffled_frames_fail() -> None:
    for action in Action:
        subject = Subject("green", Shape.SQUARE, action)
        frames = drawn(subject, 21)[1]
        shuffled = frames[np.random.default_rng(1).permutation(len(frames))]
        assert measure(frames).motion_right(subject)
        assert not measure(shuffled).motion_right(subject), action


def test_reversed_movement_fails() -> None:
    for action in (*MOVES, Action.GROW, Action.SHRINK):
        subject = Subject("blue", Shape.CIRCLE, action)
        assert not measure(drawn(subject, 8)[1][::-1]).motion_right(subject), action


def test_wrong_colour_fails() -> None:
    for wanted in COLOURS:
        for shown in COLOURS:
            measured = measure(drawn(Subject(shown, Shape.STAR, Action.LEFT), 2)[1])
            assert measured.colour_right(Subject(wanted, Shape.STAR, Action.LEFT)) == (wanted == shown)


def test_two_coloured_object_fails() -> None:
    subject = Subject("red", Shape.SQUARE, Action.RIGHT)
    spec, frames = drawn(subject, 4)
    other = draw(replace(spec, subject=replace(subject, colour="green")))
    mixed = frames.copy()
    rows = np.arange(64) > spec.centre_y
    mixed[:, rows] = other[:, rows]
    assert not measure(mixed).colour_right(subject)


def test_wrong_shape_is_told() -> None:
    for action in (Action.DOWN, Action.SPIN):
        for shown in shapes_for(action):
            measured = measure(drawn(Subject("cyan", shown, action), 9)[1])
            assert [shape for shape in Shape if measured.shape_right(Subject("cyan", shape, action))] == [shown]


def test_jumping_object_fails() -> None:
    subject = Subject("yellow", Shape.CIRCLE, Action.RIGHT)
    frames = drawn(subject, 13)[1]
    jumped = frames.copy()
    jumped[8:] = np.roll(frames[8:], 8, axis=1)
    assert measure(frames).motion_right(subject)
    assert not measure(jumped).smooth


def test_object_at_rest_and_no_object_fail() -> None:
    subject = Subject("white", Shape.SQUARE, Action.SPIN)
    still = np.repeat(drawn(subject, 1)[1][:1], 16, axis=0)
    assert measure(still).action is None
    assert measure(np.full((16, 64, 64, 3), 40, dtype=np.uint8)).colour is None
    with pytest.raises(ValueError, match="uint8"):
        measure(np.zeros((16, 64, 64), dtype=np.uint8))


def test_held_out_wordings_never_occur_in_training() -> None:
    def texts(action: Action, held_out: bool) -> set[str]:
        subject = Subject("red", Shape.TRIANGLE, action)
        choices = wordings(action, held_out)
        return {caption(subject, wording, np.random.default_rng(seed)) for wording in choices for seed in range(8)}

    for action in Action:
        assert texts(action, held_out=True)
        assert not texts(action, held_out=True) & texts(action, held_out=False)
    rng = np.random.default_rng(0)
    trained = {training_caption(sample_subject(rng), rng).lower().rstrip(".") for _ in range(20_000)}
    reserved = {held_out_caption(sample_subject(rng), rng) for _ in range(5_000)}
    assert len(trained) > 5_000
    assert not trained & reserved


def test_captions_are_plain_english_and_deterministic() -> None:
    assert plain_caption(Subject("red", Shape.CIRCLE, Action.RIGHT)) == "a red circle moving right"
    assert plain_caption(Subject("orange", Shape.STAR, Action.SPIN)) == "an orange star spinning"
    big = Subject("blue", Shape.SQUARE, Action.BOUNCE, scale=Scale.BIG)
    assert plain_caption(big) == "a big blue square bouncing"
    subject = Subject("green", Shape.STAR, Action.UP)
    drawn_once = [training_caption(subject, np.random.default_rng(seed)) for seed in range(50)]
    assert drawn_once == [training_caption(subject, np.random.default_rng(seed)) for seed in range(50)]
    assert len(set(drawn_once)) > 25
    assert plain_caption(subject) in {training_caption(subject, np.random.default_rng(seed)) for seed in range(300)}


def test_subjects_are_balanced() -> None:
    rng = np.random.default_rng(7)
    subjects = [sample_subject(rng) for _ in range(4_000)]
    for counts, kinds in (
        (Counter(subject.colour for subject in subjects), len(COLOURS)),
        (Counter(subject.shape for subject in subjects), len(Shape)),
        (Counter(subject.action for subject in subjects), len(Action)),
    ):
        assert len(counts) == kinds
        assert min(counts.values()) > 0.75 * 4_000 / kinds

"""The RIB: the paper's table, the rule for the optimal degree, unknown kinds, and its text form."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.policies.video.rib import (
    DegreeRule,
    KindProfile,
    Rib,
    UnknownDegree,
    VideoKind,
    WrongRib,
    optimal_degree,
    paper_rib,
)

SMALL, MIDDLE, LARGE = VideoKind(256, 144, 51), VideoKind(426, 240, 51), VideoKind(640, 360, 51)


@pytest.mark.parametrize("rule", list(DegreeRule))
def test_both_rules_give_one_two_and_four_for_the_papers_table(rule: DegreeRule) -> None:
    rib = Rib(paper_rib().profiles, rule)
    assert [rib.optimal_degree(kind) for kind in (SMALL, MIDDLE, LARGE)] == [1, 2, 4]


def test_the_papers_times_are_those_of_the_brief() -> None:
    rib = paper_rib()
    assert [round(rib.step_s(LARGE, degree), 3) for degree in rib.degrees] == [0.615, 0.332, 0.176, 0.116]
    totals = [round(30 * rib.step_s(LARGE, degree) + rib.decode_s(LARGE), 1) for degree in rib.degrees]
    assert totals == [19.3, 10.8, 6.1, 4.4]
    assert [rib.decode_s(kind) for kind in (SMALL, MIDDLE, LARGE)] == [0.14, 0.39, 0.87]
    assert paper_rib(0.15).step_s(MIDDLE, 2) == pytest.approx(0.0825)
    assert rib.encode_s(LARGE) == 0.0


def test_a_gain_within_noise_is_none_and_a_loss_everywhere_gives_one() -> None:
    assert optimal_degree({1: 1.0, 2: 0.98, 4: 0.97}) == 1
    assert optimal_degree({1: 1.0, 2: 1.1, 4: 1.2}) == 1
    assert optimal_degree({1: 1.0}) == 1
    assert optimal_degree({1: 1.0, 2: 0.96, 4: 0.95}) == 2


def test_the_two_rules_differ_where_the_gains_fall_slowly() -> None:
    steps = {1: 1.0, 2: 0.52, 4: 0.28, 8: 0.16}
    assert optimal_degree(steps) == 2
    assert optimal_degree(steps, DegreeRule.THRESHOLD) == 8
    assert optimal_degree(steps, DegreeRule.THRESHOLD, threshold=0.47) == 2
    assert optimal_degree(steps, DegreeRule.THRESHOLD, threshold=0.9) == 1


def test_an_unknown_kind_is_scaled_from_the_nearest_by_pixels_and_frames() -> None:
    rib = paper_rib()
    longer = VideoKind(640, 360, 102)
    assert rib.nearest(longer) == LARGE
    assert rib.step_s(longer, 4) == pytest.approx(2 * rib.step_s(LARGE, 4))
    assert rib.decode_s(longer) == pytest.approx(1.74)
    assert rib.optimal_degree(longer) == 4
    assert rib.step_s(VideoKind(360, 640, 51), 1) == pytest.approx(rib.step_s(LARGE, 1)), "upright is as large"


def test_a_degree_that_was_not_profiled_is_refused() -> None:
    with pytest.raises(UnknownDegree, match="16"):
        paper_rib().step_s(SMALL, 16)


def test_the_text_form_gives_the_same_store() -> None:
    rib = Rib(paper_rib().profiles, DegreeRule.THRESHOLD, 0.37)
    again = Rib.from_json(rib.to_json())
    assert again == rib
    assert (again.rule, again.threshold, again.degrees) == (DegreeRule.THRESHOLD, 0.37, (1, 2, 4, 8))


@given(
    st.lists(
        st.tuples(st.integers(1, 4000), st.integers(1, 300), st.floats(1e-4, 50), st.floats(0.1, 2.0)),
        min_size=1,
        max_size=5,
        unique_by=lambda row: row[:2],
    )
)
def test_any_store_survives_its_text_form(rows: list[tuple[int, int, float, float]]) -> None:
    profiles = {
        VideoKind(width, 2 * width, frames): KindProfile({1: step_s, 2: step_s * ratio}, step_s * 3, 0.1)
        for width, frames, step_s, ratio in rows
    }
    rib = Rib.from_json(Rib(profiles).to_json())
    for kind, profile in profiles.items():
        assert rib.profile(kind) == profile
        assert math.isfinite(rib.step_s(kind, rib.optimal_degree(kind)))


def entry(**changes: object) -> str:
    kind = {"width": 64, "height": 64, "frames": 16, "step_s": {"1": 0.1, "2": 0.06}, "decode_s": 0.2, **changes}
    return json.dumps({"kinds": [kind]})


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("{", "not JSON"),
        ("[]", "not a JSON object"),
        ("{}", "kinds"),
        ('{"kinds": []}', "kinds"),
        ('{"kinds": [3]}', r"kinds\[0\]"),
        (json.dumps({"kinds": [], "rule": "best"}), "rule"),
        (json.dumps({"kinds": [], "threshold": "high"}), "threshold"),
        (entry(width=0), r"kinds\[0\].width"),
        (entry(frames="16"), r"kinds\[0\].frames"),
        (entry(step_s=[0.1]), r"kinds\[0\].step_s"),
        (entry(step_s={"one": 0.1}), r"kinds\[0\].step_s"),
        (entry(step_s={"1": None}), r"kinds\[0\].step_s\[1\]"),
        (entry(step_s={"1": 0.1, "3": 0.1}), "degrees"),
        (entry(step_s={"2": 0.1}), "degrees"),
        (entry(step_s={}), "degrees"),
        (entry(step_s={"1": 0.0}), "step_s"),
        (entry(decode_s=-1), r"kinds\[0\].decode_s"),
        (entry(decode_s=float("nan")), r"kinds\[0\].decode_s"),
        (entry(encode_s="quick"), r"kinds\[0\].encode_s"),
    ],
)
def test_wrong_text_is_refused_with_the_name_of_the_field(text: str, field: str) -> None:
    with pytest.raises(WrongRib, match=field):
        Rib.from_json(text)


def test_kinds_with_unlike_degrees_are_refused() -> None:
    profiles = {SMALL: KindProfile({1: 0.1}, 0.1), LARGE: KindProfile({1: 0.1, 2: 0.1}, 0.1)}
    with pytest.raises(WrongRib, match="step_s"):
        Rib(profiles)

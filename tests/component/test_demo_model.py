"""The shipped demo model keeps its promise: held-out wordings give the right colour and a smooth, right motion."""

import json
from pathlib import Path

import pytest

from common.models.demo.evaluate import Outcome, contact_sheet, make_cases, run_cases, shares, table
from common.models.demo.export import WEIGHTS, folder_bytes
from common.models.opensora.pipeline import OpenSoraPipeline
from common.models.opensora.spec import load_spec

_VIDEOS = 96


@pytest.fixture(scope="module")
def outcomes() -> list[Outcome]:
    pipeline = OpenSoraPipeline(load_spec(WEIGHTS))
    return run_cases(pipeline, make_cases(_VIDEOS, seed=7))


@pytest.mark.timeout(900)
def test_videos_show_what_was_asked_for(outcomes: list[Outcome], tmp_path: Path) -> None:
    contact_sheet(outcomes).save(tmp_path / "sheet.png")
    measured = shares(outcomes)
    report = f"{table(outcomes)}\ncontact sheet: {tmp_path / 'sheet.png'}"
    assert len(outcomes) == _VIDEOS
    assert measured["colour"] >= 0.95, report
    assert measured["motion_smooth"] >= 0.90, report


def test_videos_have_the_format_asked_for(outcomes: list[Outcome]) -> None:
    for item in outcomes:
        assert item.video.shape == (item.case.frames, item.case.height, item.case.width, 3)


def test_same_seed_same_video() -> None:
    pipeline = OpenSoraPipeline(load_spec(WEIGHTS))
    case = make_cases(1, seed=5, formats=[(64, 64, 16)])
    first, second = (run_cases(pipeline, case, steps=4)[0].video for _ in range(2))
    assert (first == second).all()


def test_the_model_folder_is_complete_and_small() -> None:
    assert folder_bytes(WEIGHTS) <= 16_000_000
    for part in ("text_encoder", "transformer", "vae"):
        assert (WEIGHTS / part / "config.json").is_file()
        assert (WEIGHTS / part / "model.safetensors").is_file()
    assert (WEIGHTS / "text_encoder" / "tokenizer.json").is_file()


def test_the_model_card_tells_the_measured_figures() -> None:
    card = (WEIGHTS / "MODEL_CARD.md").read_text()
    figures = json.loads((WEIGHTS / "figures.json").read_text())
    assert figures["videos"] >= 48
    for name in ("colour", "motion_smooth", "all"):
        assert f"{figures['shares'][name]:.1%}" in card

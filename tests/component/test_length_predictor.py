"""The length predictor: trained, saved and loaded; and the shipped one keeps what its card promises."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from common.messages.chat import pack_tokens
from common.models.causal_lm import load_tokenizer
from common.models.demo_language.settings import WEIGHTS
from common.models.length_predictor import AnswerLengths, LengthPredictor, PredictorLoadError
from common.models.length_predictor.answers import Answered, Answering
from common.models.length_predictor.card import CARD, FIGURES
from common.models.length_predictor.measure import Figures, Row, counted, histogram_quality
from common.models.length_predictor.network import LengthNetwork, NetworkShape
from common.models.length_predictor.prompts import Prompts, demo_prompts, prompts_in
from common.models.length_predictor.quality import quality
from common.models.length_predictor.training import aligned, best_temperature, train
from common.policies.language.length_prediction import LengthBuckets

_PROMPTS = 300
_SEED = 77
"""Not the one that the shipped predictor was trained with."""
_SHAPE = NetworkShape(rows=32, window=12, classes=3, width=8, channels=16, hidden=16)


@pytest.fixture(scope="module")
def shipped() -> LengthPredictor:
    return LengthPredictor.load(WEIGHTS)


@pytest.fixture(scope="module")
def prompts() -> Prompts:
    return demo_prompts(load_tokenizer(WEIGHTS), training=_PROMPTS, held_out=_PROMPTS, seed=_SEED)


@pytest.fixture(scope="module")
def answers(prompts: Prompts) -> dict[str, list[Answered]]:
    answering = Answering(WEIGHTS)
    held_out = answering.answer(prompts.held_out["drawn"], (0.0, 1.0), most_tokens=64, seed=1)
    return {"held out": held_out, "training": answering.answer(prompts.training, (0.0,), most_tokens=64, seed=2)}


def _figures() -> Figures:
    figures: Figures = json.loads((LengthPredictor.folder(WEIGHTS) / FIGURES).read_text(encoding="utf-8"))
    return figures


def _row(of: str, granularity: int) -> Row:
    return next(row for row in _figures()["rows"] if (row["of"], row["granularity"]) == (of, granularity))


# --- the shipped one ---------------------------------------------------------------------------------------------


def test_the_shipped_predictor_is_as_good_as_its_card_says(
    shipped: LengthPredictor, answers: dict[str, list[Answered]]
) -> None:
    labels = [shipped.buckets.bucket(one.tokens) for one in answers["held out"]]
    measured = quality([shipped.predict(one.prompt) for one in answers["held out"]], labels)
    card = _row("drawn", shipped.buckets.granularity)
    for share, promised in ((measured.exact, card["exact"]), (measured.within_one, card["within_one"])):
        # Two answers to one prompt are hardly more than one: the error is that of so many prompts.
        assert share >= promised - 4 * math.sqrt(promised * (1 - promised) / _PROMPTS)
    assert card["calibration_error"] is not None and measured.calibration_error is not None
    assert measured.calibration_error <= card["calibration_error"] + 4 * 0.5 / math.sqrt(_PROMPTS)


def test_the_shipped_predictor_beats_the_histogram(
    shipped: LengthPredictor, answers: dict[str, list[Answered]]
) -> None:
    held_out = answers["held out"]
    labels = [shipped.buckets.bucket(one.tokens) for one in held_out]
    predicted = quality([shipped.predict(one.prompt) for one in held_out], labels)
    instead = histogram_quality(counted(answers["training"], shipped.buckets), shipped.buckets, held_out)
    assert predicted.exact > instead.exact + 0.1
    assert predicted.within_one > instead.within_one


def test_the_card_tells_the_measured_figures(shipped: LengthPredictor) -> None:
    card = (LengthPredictor.folder(WEIGHTS) / CARD).read_text(encoding="utf-8")
    row = _row("drawn", shipped.buckets.granularity)
    assert row["count"] >= 2000
    assert f"| {row['exact']:.1%} | {row['within_one']:.1%} | {row['calibration_error']:.3f} |" in card
    assert f"{shipped.parameters:,} parameters" in card


def test_the_shipped_folder_is_small() -> None:
    assert sum(path.stat().st_size for path in LengthPredictor.folder(WEIGHTS).iterdir()) < 300_000


def test_of_a_long_prompt_the_end_is_read(shipped: LengthPredictor, prompts: Prompts) -> None:
    window = pack_tokens(range(4, 4 + shipped.window))
    assert shipped.predict(pack_tokens([9] * 500) + window) == shipped.predict(window)
    assert sum(shipped.predict(prompts.training[0])) == pytest.approx(1)
    with pytest.raises(ValueError, match="at least one token"):
        shipped.predict(b"")


def test_prompts_held_out_are_none_of_those_trained_on(prompts: Prompts) -> None:
    seen = {*prompts.training, *prompts.tuning}
    assert len(seen) == _PROMPTS
    assert seen.isdisjoint(prompts.held_out["drawn"])
    assert len(prompts.held_out["written by hand"]) >= 100


# --- any one -----------------------------------------------------------------------------------------------------


def test_a_rule_is_learnt_and_survives_its_file(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    examples = []
    for _ in range(600):
        tokens = [int(token) for token in rng.integers(3, 32, size=int(rng.integers(2, 20)))]
        label = int(rng.integers(3))
        examples.append((pack_tokens([*tokens, label, 31]), label))
    network = train(examples[:500], _SHAPE, epochs=20, seed=1)
    made = LengthPredictor(network, LengthBuckets(10, 3), best_temperature(network, examples[500:]))
    made.save(tmp_path)
    read = LengthPredictor.load(tmp_path)
    judged = quality([read.predict(prompt) for prompt, _ in examples[500:]], [label for _, label in examples[500:]])
    assert judged.exact > 0.9
    assert (read.buckets, read.temperature) == (made.buckets, made.temperature)
    assert read.predict(examples[0][0]) == pytest.approx(made.predict(examples[0][0]), abs=0.02)
    assert read.range(examples[0][0]).source == "predictor"


def test_a_prompt_is_judged_alike_whoever_is_beside_it() -> None:
    torch.manual_seed(0)
    network = LengthNetwork(_SHAPE).eval()
    prompts = [pack_tokens([5, 6]), pack_tokens(range(3, 30)), pack_tokens([7] * 6)]
    with torch.inference_mode():
        together = network(*aligned(prompts, _SHAPE.window))
        alone = torch.cat([network(*aligned([prompt], _SHAPE.window)) for prompt in prompts])
    torch.testing.assert_close(together, alone)


def test_without_a_predictor_a_histogram_answers_and_says_so(tmp_path: Path) -> None:
    lengths = AnswerLengths.of_model(tmp_path, LengthBuckets(100, 10), first_guess=250)
    prompt = pack_tokens(range(20))
    assert (lengths.expect(prompt).low, lengths.expect(prompt).source) == (200, "histogram, still empty")
    for _ in range(8):
        lengths.ended(prompt, 520)
    assert lengths.expect(prompt).low == 500
    assert lengths.expect(prompt).source == "histogram of 8 answers to prompts of this class"


def test_where_there_is_a_predictor_it_answers() -> None:
    lengths = AnswerLengths.of_model(WEIGHTS, LengthBuckets(100, 10))
    assert lengths.expect(pack_tokens([2, 300, 3])).source == "predictor"


def test_a_damaged_predictor_is_an_error_and_no_histogram(tmp_path: Path) -> None:
    LengthPredictor(LengthNetwork(_SHAPE), LengthBuckets(10, 3)).save(tmp_path)
    (LengthPredictor.folder(tmp_path) / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(PredictorLoadError, match=r"python -m common\.models\.length_predictor\.train"):
        AnswerLengths.of_model(tmp_path, LengthBuckets(10, 3))
    with pytest.raises(ValueError, match="does not fit"):
        LengthPredictor(LengthNetwork(_SHAPE), LengthBuckets(10, 4))


def test_prompts_of_a_file_are_split(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("".join(f"prompt {number}\n" for number in range(40)) + "prompt 1\n\n", encoding="utf-8")
    split = prompts_in(file, load_tokenizer(WEIGHTS))
    assert (len(split.training), len(split.tuning), len(split.held_out["every tenth"])) == (32, 4, 4)
    file.write_text("only one\n", encoding="utf-8")
    with pytest.raises(ValueError, match="too few"):
        prompts_in(file, load_tokenizer(WEIGHTS))

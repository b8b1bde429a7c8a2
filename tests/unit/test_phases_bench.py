"""``loadgen bench phases`` without its stacks: workloads made small, the paper's arithmetic, mistakes in one line."""

import json
import re
from pathlib import Path

import pytest

from loadgen.__main__ import main
from loadgen.bench.instance_use import Use, language_processes, use_of
from loadgen.bench.language_stack import Answer
from loadgen.bench.phases_readings import Burst, Readings, against
from loadgen.bench.phases_systems import common_settings, systems
from loadgen.bench.phases_workload import TOKENS, Scale, kv_token_bytes, mean_lengths, requests_of
from loadgen.bench.process import ROOT
from loadgen.refusal import WrongArgument
from loadgen.simulator.language.workloads import CLASSES, class_requests

QUARTER = Scale(0.25)


# --- workloads ---------------------------------------------------------------------------------------------------


def test_one_factor_scales_whatever_is_counted_in_tokens() -> None:
    assert (QUARTER.chunk_tokens, QUARTER.budget_tokens, QUARTER.kv_tokens) == (128, 1024, 9750)
    assert (QUARTER.buckets.granularity, QUARTER.buckets.buckets) == (50, 11)
    assert QUARTER.tokens(5, least=4) == 4 and Scale(0.001).tokens(7) == 1


@pytest.mark.parametrize("name", CLASSES)
def test_requests_are_the_simulators_made_smaller(name: str) -> None:
    small = requests_of(name, QUARTER, 3, 1.0)
    whole = class_requests(CLASSES[name], 3)
    assert [len(one.tokens) for one in small] == [max(4, round(one.prompt_tokens / 4)) for one in whole]
    assert [one.answer_tokens for one in small] == [max(2, round(one.answer_tokens / 4)) for one in whole]
    assert all(one.due_s == 0 and all(0 <= token < TOKENS for token in one.tokens) for one in small)
    # With accuracy 1, the last token names the range of the answer.
    assert [one.tokens[-1] for one in small] == [min(one.answer_tokens // 50, 10) for one in small]
    assert len({one.tokens[:-1] for one in small}) == len(small)
    assert requests_of(name, QUARTER, 3, 1.0) == small != requests_of(name, QUARTER, 4, 1.0)


def test_as_many_predictions_are_wrong_as_is_asked_for() -> None:
    requests = requests_of("Mixed", QUARTER, 0, 0.749, 2000)
    right = sum(one.tokens[-1] == min(one.answer_tokens // 50, 10) for one in requests)
    assert right / 2000 == pytest.approx(0.749, abs=0.03)
    assert mean_lengths(requests[:1]) == (len(requests[0].tokens), requests[0].answer_tokens)


def test_the_size_of_keys_and_values_is_read_from_the_models_configuration(tmp_path: Path) -> None:
    config = {"num_attention_heads": 8, "hidden_size": 512, "num_hidden_layers": 8, "num_key_value_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert kv_token_bytes(tmp_path, 2) == 2 * 8 * 4 * 64 * 2
    (tmp_path / "config.json").write_text(
        json.dumps({"num_attention_heads": 8, "head_dim": 32, "num_hidden_layers": 1})
    )
    assert kv_token_bytes(tmp_path, 4) == 2 * 1 * 8 * 32 * 4
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(WrongArgument, match="does not say how large"):
        kv_token_bytes(tmp_path, 2)


def test_every_setting_of_every_system_reaches_the_stack() -> None:
    passed_on = set(re.findall(r"\$\{(TRIPTYCH_\w+)", (ROOT / "compose" / "compose.yaml").read_text(encoding="utf-8")))
    for system in systems(QUARTER).values():
        assert set(common_settings(QUARTER, 1, "float32")) | set(system.settings) <= passed_on, system.name
        assert system.instances == (1 if system.name == "coupled-16" else 2)


# --- arithmetic --------------------------------------------------------------------------------------------------


def base() -> Burst:
    """As the paper's LPHD at its baseline, in small."""
    uses = {"decode-0": Use(0.0, 10.0, 8.0), "decode-1": Use(1.0, 8.0, 6.0)}
    return Burst([2.0, 6.0], [8.0, 10.0], [5, 9], uses)


def ours() -> Burst:
    uses = {"prefill-0": Use(0.0, 2.0, 1.0), "decode-0": Use(0.5, 7.0, 5.0)}
    return Burst([1.0, 2.0], [4.0, 5.0], [4, 6], uses)


def test_resources_are_counted_from_the_beginning_or_from_the_first_use() -> None:
    assert (base().resource_s, base().used_s, base().cpu_s) == (18.0, 17.0, 14.0)
    assert (ours().resource_s, ours().used_s, ours().cpu_s) == (9.0, 8.5, 6.0)
    assert ours().tokens_s == 2.0 and ours().tpot_s == [1.0, 0.6]


def test_both_formulas_of_performance_for_its_price() -> None:
    found = against(ours(), base())
    # Means 1.5 of 4 and 4.5 of 9; resources 9 of 18.
    assert (found.ttft_cut, found.jct_cut, found.resources) == (0.625, 0.5, 0.5)
    assert found.perf_per_dollar == 3.0 and found.usual == 4.0


def test_ratios_are_taken_round_by_round() -> None:
    readings = Readings()
    for _ in range(2):
        readings.add("LPHD", "coupled-fixed", base())
        readings.add("LPHD", "split", ours())
    readings.add("LPHD", "coupled-fixed", ours())
    readings.add("LPHD", "split", ours())
    jct = readings.ratio("LPHD", "split", "coupled-fixed", "JCT mean")
    assert (jct.median, jct.first, jct.third, jct.rounds) == (0.5, 0.5, 0.75, 3)
    assert readings.ratio("LPHD", "split", "coupled-fixed", "TTFT p99").first == pytest.approx(1.99 / 5.96)
    assert readings.ratio("LPHD", "split", "coupled-fixed", "perf/$").median == 3.0
    text = readings.lines("LPHD", ["coupled-fixed", "coupled"])
    assert len(text) == 5 and text[-1].split()[:2] == ["split", "0.38"] and "over coupled-fixed" in text[-2]
    (comparison,) = readings.comparisons(["coupled-fixed", "coupled"])
    assert (comparison["class"], comparison["ours"], comparison["theirs"]) == ("LPHD", "split", "coupled-fixed")


def test_a_burst_is_written_with_what_every_run_of_loadgen_has() -> None:
    written = ours().as_dict()
    assert (written["requests"], written["completed"], written["makespan_s"]) == (2, 2, 5.0)
    for name in ("ttft_s", "jct_s", "tpot_s"):
        assert set(written[name]) == {"mean", "p50", "p90", "p99", "max"}
    assert json.loads(json.dumps(written))["uses"]["prefill-0"] == {"first_s": 0.0, "last_s": 2.0, "cpu_s": 1.0}


def test_an_instance_is_in_use_while_it_computes() -> None:
    looks = [(9.9, 3.0), (10.1, 3.0), (10.2, 3.08), (10.3, 3.17), (10.4, 3.18), (10.5, 3.28), (10.6, 3.28)]
    used = use_of(looks, 10.0)
    assert (used.first_s, used.last_s, used.cpu_s) == pytest.approx((0.1, 0.5, 0.28))
    assert use_of([(9.9, 3.0), (10.1, 3.0)], 10.0) == Use()
    # Too little at each look, yet it worked.
    little = use_of([(9.5, 3.0), (10.5, 3.01), (11.5, 3.02)], 10.0)
    assert (little.first_s, little.last_s, little.cpu_s) == pytest.approx((0.0, 1.5, 0.02))
    assert use_of([(9.9, 3.0), (10.1, 3.2)], 10.0).first_s == 0.0
    assert language_processes(1 << 22) == {}


def test_an_answers_last_token_is_noted() -> None:
    answer = Answer(10.0)
    for now_s in (10.5, 10.75, 11.5):
        answer.take(b'data: {"choices": [{"index": 0, "text": ""}]}\n', now_s)
    usage = {"prompt_tokens": 4, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 0}}
    answer.take(f"data: {json.dumps({'choices': [], 'usage': usage})}\n".encode(), 12.0)
    answer.take(b"data: [DONE]\n", 12.0)
    assert (answer.ttft_s, answer.jct_s, answer.answer_tokens) == (0.5, 1.5, 3)


# --- mistakes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--classes", "LPLD", "XPXD"], "--classes XPXD: there are LPLD, LPHD, HPLD, HPHD, Mixed"),
        (["--systems", "vllm"], "--systems vllm: there are coupled-fixed, coupled, split"),
        (["--systems", "split", "split"], "--systems: name each once"),
        (["--rounds", "0"], "--rounds 0: give 1 or more"),
        (["--requests", "0"], "--requests 0: give 1 or more"),
        (["--first-seed", "-1"], "--first-seed -1: give 0 or more"),
        (["--scale", "0"], "--scale 0: give more than 0"),
        (["--accuracy", "1.5"], "--accuracy 1.5: give a share from 0 to 1"),
        (["--model", "nowhere"], "--model nowhere: no such folder"),
    ],
)
def test_mistakes_are_named_in_one_line(arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as refusal:
        main(["bench", "phases", *arguments])
    assert str(refusal.value).startswith(f"loadgen bench phases: {message}")

"""``loadgen bench llm`` without its servers: ratios, the table, and one clear line for mistakes."""

from pathlib import Path

import pytest

from loadgen.__main__ import main
from loadgen.bench.llm_readings import Readings, Workload

WORKLOAD = Workload(prompt_tokens=256, output_tokens=64, concurrency=4, requests=20)


def result(throughput: float, milliseconds: float) -> dict[str, float]:
    times = dict.fromkeys(("median_ttft_ms", "p99_ttft_ms", "median_tpot_ms", "p99_tpot_ms"), milliseconds)
    return {"output_throughput": throughput, **times, "completed": 20}


def readings() -> Readings:
    found = Readings()
    for ours, theirs in ((200.0, 100.0), (300.0, 100.0), (100.0, 100.0)):
        found.add(WORKLOAD, "fused", result(ours, 10.0))
        found.add(WORKLOAD, "other", result(theirs, 8.0))
    return found


def test_below_one_is_better_for_rates_as_for_times() -> None:
    rate = readings().ratio(WORKLOAD, "fused", "other", "output_throughput")
    assert rate.median == 0.5 and rate.verdict == "better"
    time = readings().ratio(WORKLOAD, "fused", "other", "p99_ttft_ms")
    assert time.median == 1.25 and time.verdict == "WORSE"


def test_the_table_names_every_measure_and_the_losses() -> None:
    table = "\n".join(readings().lines(["other", "fused"], "other"))
    assert "256 in, 64 out, 4 at a time, 20 requests, 3 rounds" in table
    assert "fused/other 0.500" in table and table.count("WORSE") == 4 and "TTFT p99 ms" in table
    assert "fused/other" not in "\n".join(readings().lines(["other", "fused"], None))


def test_the_written_form_has_every_reading() -> None:
    (written,) = readings().as_dicts(["other", "fused"], "other")
    rounds, ratios = written["rounds"], written["ratios"]
    assert isinstance(rounds, dict) and len(rounds["fused"]) == 3
    assert isinstance(ratios, dict) and set(ratios) == {"fused"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--client", "nowhere/vllm"], "no Python beside it"),
        (["--client", "{python}", "--running", "somewhere"], "give a name, '='"),
        (["--client", "{python}", "--running", "it=http://127.0.0.1:9"], "nothing at http://127.0.0.1:9"),
        (["--client", "{python}", "--reference", "it"], "none is it"),
    ],
)
def test_what_cannot_be_measured_is_said_in_one_line(arguments: list[str], said: str, tmp_path: Path) -> None:
    # Something that has a Python beside it, which is not started before the servers are there.
    (tmp_path / "python").touch()
    words = [word.format(python=tmp_path / "vllm") for word in arguments]
    with pytest.raises(SystemExit, match=said) as stopped:
        main(["bench", "llm", "--model", str(tmp_path), "--modes", *words])
    assert "\n" not in str(stopped.value)

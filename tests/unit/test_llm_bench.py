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
        (["--client", "nowhere/vllm"], "--client nowhere/vllm: there is no Python beside it"),
        (["--running", "somewhere"], "--running somewhere: give a name, '='"),
        (["--running", "it=somewhere"], "it=somewhere: give an address such as"),
        (["--running", "it=http://a", "--running", "it=http://b"], "two servers are called it"),
        (["--running", "it=http://a", "--reference", "other"], "--reference other: there are it"),
        ([], "there is no server to measure: give --modes, --peer or --running"),
        (["--peer", "it="], "it=: this cannot be run"),
        (["--peer", "it=nowhere/server {port}"], "it=nowhere/server {port}: this cannot be run"),
        (["--peer", "it=server {place}"], "it=server {place}: this cannot be run"),
        (["--peer", "it=server '"], "it=server ': this cannot be run"),
        (["--model", "./nowhere"], "--model ./nowhere: no such folder"),
    ],
)
def test_mistakes_are_said_in_one_line_with_status_2(
    capsys: pytest.CaptureFixture[str], arguments: list[str], said: str, tmp_path: Path
) -> None:
    assert _ended(tmp_path, arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"loadgen bench llm: {said}")


def test_a_server_that_is_not_there_is_no_mistake_of_the_command_line(tmp_path: Path) -> None:
    told = _ended(tmp_path, ["--running", "it=http://127.0.0.1:9"])
    assert isinstance(told, str) and "nothing at http://127.0.0.1:9" in told and "\n" not in told


def _ended(folder: Path, arguments: list[str]) -> int | str | None:
    # Something that has a Python beside it, which is not started before the servers are there.
    (folder / "python").touch()
    client = ["--client", str(folder / "vllm")]
    with pytest.raises(SystemExit) as stopped:
        main(["bench", "llm", "--model", str(folder), *client, "--modes", *arguments])
    return stopped.value.code

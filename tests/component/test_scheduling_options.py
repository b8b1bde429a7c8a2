"""How the scheduler's policy, profile and record reach it: ``triptych up`` and the compose file."""

from pathlib import Path

import pytest

from common.policies.video.rib import paper_rib
from compose.cli import main
from compose.local import StackOptions, check_scheduling, scheduling_variables
from compose.spec import read_stack


def test_the_compose_file_hands_them_to_the_scheduler_alone() -> None:
    given = {"TRIPTYCH_POLICY": "ddit", "TRIPTYCH_RIB": "/rib.json", "TRIPTYCH_RECORD": "/record.jsonl"}
    services = read_stack(given).services
    assert given.items() <= services["scheduler"].environment.items()
    for name, spec in services.items():
        assert name == "scheduler" or not set(given) & set(spec.environment)
    silent = read_stack({}).services["scheduler"].environment
    assert silent["TRIPTYCH_POLICY"] and silent["TRIPTYCH_RIB"] == silent["TRIPTYCH_RECORD"] == ""


def test_what_was_asked_for_is_handed_on_with_full_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rib.json").write_text(paper_rib().to_json())
    options = StackOptions(policy="sdop:2", rib=Path("rib.json"), record=Path("record.jsonl"))
    check_scheduling(options)
    assert scheduling_variables(options) == {
        "TRIPTYCH_POLICY": "sdop:2",
        "TRIPTYCH_RIB": str(tmp_path / "rib.json"),
        "TRIPTYCH_RECORD": str(tmp_path / "record.jsonl"),
    }
    assert scheduling_variables(StackOptions()) == {}, "the environment's own stays"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--policy", "fair"], "--policy: no policy is called 'fair'; there are: "),
        (["--policy", "sdop:3"], "--policy: no policy is called 'sdop:3'"),
        (["--rib", "nowhere.json"], "--rib nowhere.json: No such file or directory; triptych profile writes one"),
        (["--rib", "wrong.json"], "--rib wrong.json is no profile (kinds: not a list); triptych profile writes one"),
        (["--rib", "bytes.json"], "--rib bytes.json is no profile ("),
        (["--record", "nowhere/record.jsonl"], "--record nowhere/record.jsonl: the folder does not exist"),
        (["--record", "."], "--record .: this is a folder; name a file"),
    ],
)
def test_mistakes_are_named_in_one_line(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    complaint: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("wrong.json").write_text("{}")
    Path("bytes.json").write_bytes(b"\xff\xfe{}")
    assert main(["up", "--port", "0", *arguments]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith(f"triptych: {complaint}") and said.err.count("\n") == 1


@pytest.mark.parametrize("option", ["--deadline", "--guidance-scale"])
@pytest.mark.parametrize("value", ["nan", "inf", "1e999", "soon"])
def test_a_number_that_json_cannot_say_is_refused_before_it_is_sent(
    capsys: pytest.CaptureFixture[str], option: str, value: str
) -> None:
    with pytest.raises(SystemExit):
        main(["video", "a red circle", "-o", "out.mp4", option, value])
    assert f"argument {option}: '{value}' is not a number, such as 2.5" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["chat", "hello", "--temperature", value])
    assert f"argument --temperature: '{value}' is not a number" in capsys.readouterr().err

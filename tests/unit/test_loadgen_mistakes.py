"""What ``loadgen`` says of arguments that it can do nothing with: one line that says what to change, and status 2."""

from pathlib import Path

import pytest

from loadgen.__main__ import main


@pytest.mark.parametrize("name", ["kv-store", "kv-transfer"])
@pytest.mark.parametrize("hidden", ["16", "32", "48", "208"])
def test_a_model_is_as_wide_as_its_heads(capsys: pytest.CaptureFixture[str], name: str, hidden: str) -> None:
    assert refused(capsys, f"bench {name} --hidden {hidden}") == f"argument --hidden: {hidden}: give a multiple of 64"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("bench ddit-live --load nan", "--load nan: give a share of saturation above 0"),
        ("bench ddit-live --first-seed -1", "argument --first-seed: -1: give 0 or more"),
        ("bench flip --seconds inf", "rounds, tokens and room are 1 or more, seconds, load and cost above 0"),
        ("bench flip --cost nan", "rounds, tokens and room are 1 or more, seconds, load and cost above 0"),
        ("bench flip --layers 0", "argument --layers: 0: give 1 or more"),
        ("bench memserve-live none.jsonl --rate nan", "--rate nan: give more than 0"),
        ("bench memserve-live none.jsonl --first-seed -1", "argument --first-seed: -1: give 0 or more"),
        ("bench memserve-kills none.jsonl --rate inf", "--rate inf: give more than 0"),
        ("bench memserve-kills none.jsonl --seed -1", "argument --seed: -1: give 0 or more"),
        ("bench engine-rules --seed -1", "argument --seed: -1: give 0 or more"),
        ("bench prompt-tree --blocks -1", "argument --blocks: -1: give 0 or more"),
        ("sim --noise nan", "--noise nan: give 0 or more"),
        ("sim --day --load inf", "--load inf: give a share of saturation above 0"),
        ("sim --speed nan", "--speed nan: give a number above 0"),
        ("sim --step-240p inf", "--step-240p inf: give seconds above 0"),
        # More than there are addresses, so that no machine gives it.
        ("sim --day --load 1e9", "this takes more memory than there is"),
    ],
)
def test_numbers_that_make_no_sense(capsys: pytest.CaptureFixture[str], arguments: str, said: str) -> None:
    assert refused(capsys, arguments).startswith(said)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("bench bus --json .", "--json .: this is a folder; name a file"),
        ("sim --json .", "--json .: this is a folder; name a file"),
        ("bench ddit-live --rib bytes", "--rib bytes: this is no text"),
        ("bench flip --model ./nowhere", "--model ./nowhere: no such folder"),
        ("bench flip --model text", "--model text: no such folder"),
        ("bench flip --model folder", "{here}/folder: its config.json does not say how large"),
        ("bench phases --model somebody/something", "--model somebody/something: no such folder"),
        ("bench pipeline --video-model ./nowhere", "--video-model ./nowhere: no such folder"),
        ("bench memserve-live text", "text is no Mooncake trace: "),
        ("bench memserve-live empty", "empty: there is no request in it"),
        ("bench memserve-live trace --profile bytes", "--profile bytes: this is no text"),
        ("bench memserve-live trace --profile folder", "--profile folder: Is a directory"),
        ("bench memserve-live trace --profile object", "--profile object: no language model was measured"),
        ("sim --trace wide --format mooncake", "wide is no Mooncake trace: "),
        ("sim --rib bytes", "--rib bytes: this is no text"),
        ("sim --record bytes", "--record bytes: this is no text"),
        ("sim --trace bytes", "--trace bytes: this is no text"),
        ("sim --trace empty --format mooncake", "empty: there is no request in it"),
        ("report bytes", "bytes is not JSON"),
        ("report object -o .", "object has no 'environment'"),
    ],
)
def test_files_that_are_not_what_is_meant(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: str, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    row = '{"timestamp": 0, "input_length": 512, "output_length": 2, "hash_ids": [%d]}\n'
    Path("folder").mkdir()
    Path("bytes").write_bytes(b"\xff\xfe{}")
    for name, text in {"empty": "", "text": "hello\n", "object": "{}", "trace": row % 1, "wide": row % 10**200}.items():
        Path(name).write_text(text)
    assert refused(capsys, arguments).startswith(said.format(here=tmp_path))


def refused(capsys: pytest.CaptureFixture[str], arguments: str) -> str:
    """The one line, without the command's name."""
    with pytest.raises(SystemExit) as ended:
        main(arguments.split())
    assert ended.value.code == 2
    said = capsys.readouterr()
    *usage, line = said.err.splitlines()
    assert not usage or usage[0].startswith("usage: ")
    assert said.out == "" and line.startswith("loadgen ")
    return line.partition(": ")[2].removeprefix("error: ")

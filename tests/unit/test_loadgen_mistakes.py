"""What ``loadgen`` says of arguments that it can do nothing with: one line that says what to change, and status 2."""

import pytest

from loadgen.__main__ import main


@pytest.mark.parametrize("name", ["kv-store", "kv-transfer"])
@pytest.mark.parametrize("hidden", ["16", "32", "48", "208"])
def test_a_model_is_as_wide_as_its_heads(capsys: pytest.CaptureFixture[str], name: str, hidden: str) -> None:
    assert refused(capsys, ["bench", name, "--hidden", hidden]) == f"argument --hidden: {hidden}: give a multiple of 64"


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    """The one line, without the command's name."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    said = capsys.readouterr()
    *usage, line = said.err.splitlines()
    assert not usage or usage[0].startswith("usage: ")
    assert said.out == "" and line.startswith("loadgen ")
    return line.partition(": ")[2].removeprefix("error: ")

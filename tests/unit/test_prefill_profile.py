"""The chunk to prefill with: where throughput stops rising; and how it reaches the stack."""

import json
from pathlib import Path

import pytest

from common.policies.language.prefill_profile import PrefillProfile, WrongPrefillProfile
from common.policies.video.rib import paper_rib
from compose.errors import OptionError
from compose.local import StackOptions, check_scheduling, scheduling_variables, variable_values
from compose.profiling.language import prefill_table
from compose.rundir import run_directory

PROFILE = PrefillProfile("triptych-demo-language", {64: 1000.0, 128: 1800.0, 256: 1910.0, 512: 2000.0, 1024: 1980.0})


def test_the_smallest_chunk_near_the_best_is_chosen() -> None:
    assert PROFILE.chunk_tokens == 256
    assert PrefillProfile("m", {64: 1000.0}).chunk_tokens == 64
    lines = prefill_table(PROFILE).splitlines()
    assert [line.split()[0] for line in lines if line.endswith("chosen")] == ["256"]
    assert lines[-1] == "prefill of triptych-demo-language: the smallest chunk within 5 % of the best"


@pytest.mark.parametrize(
    "text",
    [
        "{",
        '{"prefill": {}}',
        '{"prefill": []}',
        '{"prefill": {"model": "m", "tokens_per_s": {}}}',
        '{"prefill": {"model": "m", "tokens_per_s": {"0": 1.0}}}',
        '{"prefill": {"model": "m", "tokens_per_s": {"16": 0}}}',
        '{"prefill": {"model": "m", "tokens_per_s": {"many": 5}}}',
    ],
)
def test_what_is_no_profile_is_refused(text: str) -> None:
    with pytest.raises(WrongPrefillProfile):
        PrefillProfile.from_json(text)


def test_it_reaches_the_instances_of_its_model_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRIPTYCH_CHUNK_TOKENS", raising=False)
    file = tmp_path / "profile.json"
    file.write_text(json.dumps({"prefill": PROFILE.to_content()}))
    assert PrefillProfile.from_json(file.read_text()) == PROFILE

    def chunk(options: StackOptions) -> str | None:
        check_scheduling(options)
        with run_directory(None) as directory:
            return variable_values(options, directory, 1).get("TRIPTYCH_CHUNK_TOKENS")

    assert chunk(StackOptions(rib=file)) == "256"
    assert chunk(StackOptions(rib=file, language_model=str(tmp_path))) is None
    assert chunk(StackOptions()) is None
    # Of video it says nothing, so the scheduler goes by what it has.
    assert "TRIPTYCH_RIB" not in scheduling_variables(StackOptions(rib=file))
    monkeypatch.setenv("TRIPTYCH_CHUNK_TOKENS", "77")
    assert chunk(StackOptions(rib=file)) == "77"
    file.write_text(paper_rib().to_json())
    assert PrefillProfile.from_json(file.read_text()) is None
    file.write_text('{"prefill": {}}')
    with pytest.raises(OptionError, match="is no profile"):
        check_scheduling(StackOptions(rib=file))

"""The page of ``loadgen bench phases``: live figures beside the paper's and the simulation's."""

import json
from pathlib import Path
from typing import Any

import pytest

from loadgen.__main__ import main
from loadgen.bench.instance_use import Use
from loadgen.bench.phases_readings import Burst
from tests.unit.test_report_page import Balance

ENVIRONMENT = {
    "simulated": False,
    "python": "3.11",
    "machine": "x86_64, 2 cores",
    "model": {"hidden": 512, "layers": 8},
    "precision": "bfloat16",
    "scale": 0.25,
    "accuracy": 0.749,
}
BASE = Burst([2.0, 6.0], [8.0, 10.0], [5, 9], {"decode-0": Use(0.0, 18.0, 8.0)})
OURS = Burst([1.0, 2.0], [4.0, 5.0], [5, 9], {"prefill-0": Use(0.0, 2.0, 1.0), "decode-0": Use(0.5, 7.0, 5.0)})


def _file(path: Path, bursts: dict[str, Burst], seed: int = 0, **environment: object) -> Path:
    runs = [
        {"policy": name, "point": "live", "class": "LPHD", "rate": None, "gpus": 2, "seed": seed, **burst.as_dict()}
        for name, burst in bursts.items()
    ]
    content: dict[str, Any] = {"benchmark": "phases", "environment": ENVIRONMENT | environment, "runs": runs}
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def test_live_figures_stand_beside_the_papers_and_the_simulations(tmp_path: Path) -> None:
    one = _file(tmp_path / "0.json", {"coupled-16": BASE, "split-predicting": OURS})
    other = _file(tmp_path / "1.json", {"coupled-16": BASE, "split-predicting": OURS}, seed=1)
    simulated = tmp_path / "sim.json"
    arguments = [
        "--experiment",
        "tetriinfer",
        "--point",
        "burst",
        "--seeds",
        "1",
        "--policy",
        "coupled-16",
        "tetriinfer",
    ]
    assert main(["sim", *arguments, "--json", str(simulated)]) == 0
    main(["report", str(one), str(other), str(simulated), "-o", str(tmp_path / "page.html")])
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    balance = Balance()
    balance.feed(page)
    assert not balance.wrong and not balance.open
    (row,) = [line for line in page.split("<tr>") if line.startswith("<td>LPHD</td>") and "-97 %" in line]
    # Means 1.5 of 4 and 4.5 of 9 seconds, resources 9 of 18.
    for live in ("-62 %", "-50 %", "0.50", "3.00", "4.00"):
        assert f"<b>{live}</b>" in row
    assert row.count('<td class="number"></td>') == 1  # the paper has no usual speed-up over cost
    assert "over continuous batching" not in page and "4 bursts, 8 requests" in page


def test_files_that_cannot_stand_side_by_side_are_refused(tmp_path: Path) -> None:
    one = _file(tmp_path / "0.json", {"coupled-16": BASE})
    other = _file(tmp_path / "1.json", {"coupled-16": BASE}, scale=0.5)
    with pytest.raises(SystemExit, match="different machines, models or scales"):
        main(["report", str(one), str(other), "-o", str(tmp_path / "page.html")])

"""Without a C++ compiler, or with one that fails: the same tokens, and a line of the log that says why it is slower."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from compose.launch import PACKAGE_ROOT
from tests.component.language_support import known_prompts

TOKENS = 24
_PROGRAM = """
import json, sys
import torch
from common.engine import Engine, Request
from common.models.causal_lm import KVPool, load
from common.models.causal_lm.sampling import SamplingParameters

model = load(sys.argv[1], "cpu", torch.float32)
engine = Engine(model, KVPool(model.layout, 64), chunk_tokens=32)
prompts = json.loads(sys.argv[2])
for name, prompt in enumerate(prompts):
    engine.add(str(name), Request(tuple(prompt), int(sys.argv[3]), SamplingParameters(temperature=0)), 0.0)
answers = [[] for _ in prompts]
while engine.busy:
    for output in engine.step(0.0):
        answers[int(output.sequence)].append(output.sampled.token)
print(json.dumps(answers))
"""


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [("", "no program is called c++"), ("echo no such option >&2; exit 1", "failed: no such option")],
    ids=["none", "broken"],
)
def test_the_same_tokens_and_a_line_that_says_so(
    language_model: Path, tmp_path: Path, compiler: str, reason: str
) -> None:
    prompts = known_prompts(language_model)
    if compiler:
        (tmp_path / "c++").write_text(f"#!/bin/sh\n{compiler}\n")
        (tmp_path / "c++").chmod(0o755)
    asked = [str(language_model), json.dumps(list(prompts)), str(TOKENS)]
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, *asked],
        cwd=PACKAGE_ROOT,
        env={**os.environ, "PATH": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    *said, answers = done.stdout.strip().splitlines()
    assert json.loads(answers) == [expected[:TOKENS] for expected in prompts.values()]
    (line,) = [line for line in said if "no kernels of our own" in line]
    assert reason in line and "install a C++ compiler" in line

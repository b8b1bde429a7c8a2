"""The JSON of an experiment: readable by line (one run, curve, bound or timeline each), as tens of thousands come."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_experiment(path: Path, result: Mapping[str, Any]) -> None:
    """Lists of objects one object a line; everything else as it is."""
    parts = []
    for name, value in result.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            rows = ",\n".join(json.dumps(row, separators=(",", ":")) for row in value)
            parts.append(f"{json.dumps(name)}: [\n{rows}\n]")
        else:
            parts.append(f"{json.dumps(name)}: {json.dumps(value)}")
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")

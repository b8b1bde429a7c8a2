"""``loadgen report``: one self-contained page from the JSON files of ``loadgen sim`` or ``loadgen bench phases``."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loadgen.refusal import Refused
from loadgen.report.page import page as ddit_page
from loadgen.report.phases import page as live_page
from loadgen.report.tetriinfer import page as tetriinfer_page

_LISTS = ("runs", "curves", "bounds", "timelines")
_LANGUAGE = ("tetriinfer", "trace")
_LIVE = "phases"


class WrongFile(ValueError):
    """A file that is no experiment's; the message names it."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = "what loadgen sim --json wrote, or loadgen bench phases --json, of which the former then stands beside"
    parser.add_argument("files", nargs="+", type=Path, metavar="OUT", help=what)
    parser.add_argument("-o", dest="page", type=Path, default=Path("report.html"), help="default: report.html")


def run(options: argparse.Namespace) -> dict[str, object]:
    try:
        files = [read(file) for file in options.files]
        live = [file for file in files if _is_live(file)]
        simulated = [file for file in files if not _is_live(file)]
        if live:
            if any(file.get("experiment") not in _LANGUAGE for file in simulated):
                raise WrongFile("the files are of different experiments: make a page for each")
            data = join_live(live)
            text = live_page(data, join(simulated)["runs"] if simulated else ())
        else:
            data = join(simulated)
            text = (tetriinfer_page if data.get("experiment") in _LANGUAGE else ddit_page)(data)
        options.page.write_text(text, encoding="utf-8")
    except (WrongFile, OSError) as error:
        raise Refused(f"loadgen report: {error}") from None
    print(f"wrote {options.page}: {len(data['runs']):,} runs")
    return {}


def read(file: Path) -> dict[str, Any]:
    """One experiment's file.

    Raises:
        WrongFile: it is not there, no JSON, or neither an experiment of ``loadgen sim`` nor of ``bench phases``.
    """
    try:
        data: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise WrongFile(f"{file} cannot be read: {error.strerror}") from None
    except ValueError:
        raise WrongFile(f"{file} is not JSON; give a file that loadgen sim --json wrote") from None
    language = isinstance(data, dict) and (data.get("experiment") in _LANGUAGE or _is_live(data))
    needed = ("environment", "runs") if language else ("environment", *_LISTS, "levels")
    missing = [name for name in needed if not isinstance(data, dict) or name not in data]
    if missing:
        raise WrongFile(f"{file} has no {missing[0]!r}; give a file that loadgen sim --experiment ddit --json wrote")
    if not data["runs"]:
        raise WrongFile(f"{file} has no runs")
    return data


def join(files: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Several files as one experiment: the same profile, each its own policies or sizes.

    Raises:
        WrongFile: they were made from different profiles, so that their numbers cannot stand side by side.
    """
    first = files[0]
    of_language = [file.get("experiment") in _LANGUAGE for file in files]
    if all(of_language):
        return _join_language(files)
    if any(of_language):
        raise WrongFile("the files are of different experiments: make a page for each")
    if any(other["environment"]["rib"] != first["environment"]["rib"] for other in files):
        raise WrongFile("the files were made from different profiles: make a page for each")
    joined = dict(first)
    for name in _LISTS:
        joined[name] = [entry for file in files for entry in file[name]]
    # Files of different points hold the same timelines.
    joined["timelines"] = list({(line["policy"], line["gpus"]): line for line in joined["timelines"]}.values())
    wall_s = sum(file["environment"].get("wall_s", 0.0) for file in files)
    joined["environment"] = first["environment"] | {"wall_s": wall_s}
    return joined


def join_live(files: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Several runs of the benchmark as one: each its own classes or rounds.

    Raises:
        WrongFile: they were made in different ways, so that their numbers cannot stand side by side.
    """
    first = files[0]
    if any(other["environment"] != first["environment"] for other in files):
        raise WrongFile("the files are of different machines, models or scales: make a page for each")
    return {"environment": first["environment"], "runs": [run for file in files for run in file["runs"]]}


def _is_live(file: dict[str, Any]) -> bool:
    return file.get("benchmark") == _LIVE


def _join_language(files: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The points of an experiment, and traces, each from its own file."""
    first = files[0]
    if any(other["environment"]["cost_s"] != first["environment"]["cost_s"] for other in files):
        raise WrongFile("the files were made from different cost models: make a page for each")
    environment = dict(first["environment"])
    environment["wall_s"] = sum(file["environment"].get("wall_s", 0.0) for file in files)
    traces = [file["environment"]["trace"] for file in files if "trace" in file["environment"]]
    if traces:
        environment["trace"] = "; ".join(traces)
    return {
        "experiment": first["experiment"],
        "environment": environment,
        "runs": [run for file in files for run in file["runs"]],
        "series": [point for file in files for point in file.get("series", ())],
    }

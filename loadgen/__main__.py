"""The ``loadgen`` command: ``bench NAME`` runs a micro-benchmark, ``sim`` a simulation, ``report`` makes its page.

A benchmark is a module in ``loadgen/bench`` with ``add_arguments(parser)`` and ``run(options)``; ``run`` prints the two
things it compares and returns what ``--json`` writes. A ``WrongArgument`` or ``BenchmarkError`` of its is said here, in
one line. The other commands are modules of the same form.
"""

import argparse
import ast
import importlib
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from loadgen.bench.compare import write_json
from loadgen.bench.process import BenchmarkError
from loadgen.interruption import ended_in_order
from loadgen.refusal import Refused, WrongArgument, check_written

_BENCHMARKS = Path(__file__).with_name("bench")
_COMMANDS = {
    "sim": ("loadgen.sim", "simulate scheduling policies in virtual time"),
    "report": ("loadgen.report.command", "one page from the JSON of simulations"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = _parser(_chosen(words), words[0] if words else None).parse_args(words)
    try:
        if options.json is not None:
            check_written(options.json, "--json")
        with ended_in_order():
            result: dict[str, object] = options.run(options)
    except Refused as refused:
        raise _told(refused) from None
    except WrongArgument as error:
        raise _told(Refused(f"loadgen {' '.join(words[:2])}: {error}")) from None
    except MemoryError as error:
        what = f"this takes more memory than there is ({error}): give smaller numbers"
        raise _told(Refused(f"loadgen {' '.join(words[:2])}: {what}")) from None
    except BenchmarkError as error:
        raise SystemExit(f"loadgen {' '.join(words[:2])}: {error}") from None
    if options.json is not None:
        write_json(options.json, result)
    return 0


def _told(refused: Refused) -> Refused:
    sys.stderr.write(f"{refused}\n")
    return refused


@cache
def benchmarks() -> dict[str, str]:
    """Every benchmark's name with the first line of its description, found without importing any."""
    found = {}
    for file in sorted(_BENCHMARKS.glob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        if {"add_arguments", "run"} <= functions:
            found[file.stem.replace("_", "-")] = (ast.get_docstring(tree) or "").partition("\n")[0]
    return found


def _chosen(words: Sequence[str]) -> str | None:
    """The benchmark that is to be run: only that one is imported."""
    match words:
        case ["bench", name, *_] if name in benchmarks():
            return name
    return None


def _parser(chosen: str | None, first: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="loadgen", description="Load, and measures of what it does.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    bench = commands.add_parser("bench", help="run a micro-benchmark")
    names = bench.add_subparsers(required=True, metavar="NAME")
    for name, summary in benchmarks().items():
        command = names.add_parser(name, help=summary, description=summary)
        command.add_argument("--json", type=Path, metavar="OUT", help="write the readings here")
        if name == chosen:
            module = importlib.import_module(f"loadgen.bench.{name.replace('-', '_')}")
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    for name, (where, summary) in _COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary)
        if name == first:
            module = importlib.import_module(where)
            module.add_arguments(command)
            command.set_defaults(run=module.run, json=None)
    return parser


if __name__ == "__main__":
    sys.exit(main())

"""The page of ``loadgen bench phases``: what was measured live beside the paper's figures and the simulation's."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from loadgen.report.style import STYLE
from loadgen.report.tetriinfer_paper import CLASSES, ClassResult
from loadgen.simulator.language.verdicts import Against, Place, Runs, against_baseline, mean, places

_PARTS = ("mean", "p50", "p90", "p99")


@dataclass(frozen=True, slots=True)
class _Comparison:
    """``live``, ``simulated``: a system and what it is held against; nobody simulated some. ``published``: by the
    paper too."""

    title: str
    live: tuple[str, str]
    simulated: tuple[str, str] | None = None
    published: bool = False


_COMPARISONS = (
    _Comparison(
        "Split with prediction over the paper's baseline: one instance of 16 slots, half the hardware",
        ("split-predicting", "coupled-16"),
        ("tetriinfer", "coupled-16"),
        published=True,
    ),
    _Comparison(
        "Split with prediction over 16 slots on as much hardware",
        ("split-predicting", "coupled-16x2"),
        ("tetriinfer", "coupled-16x2"),
    ),
    _Comparison("Split with prediction over fixed batches on as much hardware", ("split-predicting", "coupled-fixed")),
    _Comparison(
        "Split with prediction over continuous batching on as much hardware",
        ("split-predicting", "coupled"),
        ("tetriinfer", "coupled-chunked-x2"),
    ),
    _Comparison("Split without prediction over continuous batching on as much hardware", ("split", "coupled")),
    _Comparison(
        "Ours over continuous batching on as much hardware", ("ours", "coupled"), ("fluid", "coupled-chunked-x2")
    ),
)


def page(live: Mapping[str, Any], simulated: Sequence[Mapping[str, Any]]) -> str:
    """The page of one or more joined files of the benchmark; ``simulated``: runs of ``loadgen sim``, or none."""
    measured = places(live["runs"])
    beside = places(simulated)
    parts = [_head(live)]
    for comparison in _COMPARISONS:
        rows = [row for name in CLASSES for row in _compared(name, comparison, measured, beside)]
        if rows:
            head = "".join(
                f"<th>{name}{', ' if name else ''}{source}</th>"
                for name in ("TTFT", "JCT", "resources", "perf/$", "speed-up over cost")
                for source in ("paper", "simulated", "live")
            )
            parts.append(f"<h2>{escape(comparison.title)}</h2>{_table(f'<tr><th>class</th>{head}</tr>', rows)}")
    parts += ["<h2>All systems, live</h2>", _systems(measured), "<h2>How this was made</h2>", _method(live)]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Coupled and split serving, live</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style></head><body><main>{''.join(parts)}</main></body></html>\n"
    )


def _head(live: Mapping[str, Any]) -> str:
    requests = sum(run["requests"] for run in live["runs"])
    return (
        '<header><h1>Coupled and split serving, live <span class="badge">measured</span></h1>'
        "<p>TetriInfer's five classes of requests, each asked all at once, of real instances. Means over rounds first, "
        "then their ratios, as the paper has them; perf/$ is (1 + JCT reduction) over resources, which is what all "
        "five published rows are. Resources are how long each instance is needed from the burst's beginning. "
        f"{len(live['runs']):,} bursts, {requests:,} requests.</p></header>"
    )


def _compared(
    name: str, comparison: _Comparison, measured: Mapping[Place, Runs], beside: Mapping[Place, Runs]
) -> list[str]:
    live = _against(measured.get(("live", name, None), {}), comparison.live)
    if live is None:
        return []
    simulated = _against(beside.get(("burst", name, None), {}), comparison.simulated)
    figures = zip(
        _published(CLASSES[name] if comparison.published else None), _cells(simulated), _cells(live), strict=True
    )
    cells = "".join(
        f'<td class="number">{paper}</td><td class="number">{then}</td><td class="number"><b>{now}</b></td>'
        for paper, then, now in figures
    )
    return [f"<tr><td>{name}</td>{cells}</tr>"]


def _against(by_policy: Runs, pair: tuple[str, str] | None) -> Against | None:
    if pair is None or not set(pair) <= set(by_policy):
        return None
    return against_baseline(by_policy, *pair)


def _published(paper: ClassResult | None) -> tuple[str, ...]:
    if paper is None:
        return ("",) * 5
    return f"{paper.ttft:+g} %", f"{paper.jct:+g} %", f"{paper.resources:.2f}", f"{paper.perf:.2f}", ""


def _cells(found: Against | None) -> tuple[str, ...]:
    if found is None:
        return ("",) * 5
    return (
        f"{-100 * found.ttft_cut:+.0f} %",
        f"{-100 * found.jct_cut:+.0f} %",
        f"{found.resources:.2f}",
        f"{found.perf_per_dollar:.2f}",
        f"{found.usual:.2f}",
    )


def _systems(measured: Mapping[Place, Runs]) -> str:
    rows = []
    for (_, name, _), by_policy in measured.items():
        for number, (policy, runs) in enumerate(by_policy.items()):
            figures = (
                *(f"{mean(runs, times, part):.3f}" for times in ("ttft_s", "jct_s") for part in _PARTS),
                *(f"{mean(runs, resource):.2f}" for resource in ("resource_s", "used_s", "cpu_s")),
                f"{mean(runs, 'tokens_s'):,.0f}",
                f"{len(runs)}",
            )
            cells = "".join(f'<td class="number">{figure}</td>' for figure in figures)
            rows.append(f"<tr><td>{name if not number else ''}</td><td>{escape(policy)}</td>{cells}</tr>")
    times = (f"{part} {name} (s)" for name in ("TTFT", "JCT") for part in _PARTS)
    names = ("class", "system", *times, "resources (s)", "from first use (s)", "processor (s)", "tokens/s", "rounds")
    return _table(f"<tr>{''.join(f'<th>{name}</th>' for name in names)}</tr>", rows)


def _table(head: str, rows: Sequence[str]) -> str:
    return f'<div class="scroll"><table>{head}{"".join(rows)}</table></div>'


def _method(live: Mapping[str, Any]) -> str:
    environment = live["environment"]
    items = (
        f"Whatever is counted in tokens is {environment['scale']:g} of the paper's; lengths of answers are exact.",
        f"Model: {escape(str(environment['model']))}, {escape(environment['precision'])}, one thread an instance.",
        f"Predictions are right in {environment['accuracy']:.1%}.",
        f"Python {escape(environment['python'])}, {escape(environment['machine'])}; all systems ran at once and took "
        "turns.",
    )
    return "<ul>" + "".join(f"<li>{item}</li>" for item in items) + "</ul>"

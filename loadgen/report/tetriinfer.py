"""The page of ``loadgen sim --experiment tetriinfer`` and of traces under the same clusters."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import Any

from loadgen.report import tetriinfer_words as words
from loadgen.report.charts import Line, bar_chart, cdf_chart, policy_class
from loadgen.report.style import SCRIPT, STYLE, policy_colours
from loadgen.report.tetriinfer_paper import CLASSES, DISPATCH, PREFILL, RESERVE
from loadgen.simulator.language.verdicts import (
    BASELINE,
    SWAPPING,
    Place,
    Verdict,
    against_baseline,
    mean,
    ours_against_best,
    places,
)

_CURVES = ("coupled-16", "coupled-x2", "tetriinfer", "fluid")
By = Mapping[str, list[Mapping[str, Any]]]


def page(data: Mapping[str, Any]) -> str:
    """The page of one experiment; several files of it are joined before."""
    found = places(data["runs"])
    verdicts = ours_against_best(run for run in data["runs"] if run["point"] in ("burst", "steady", "flip", "trace"))
    names = list(dict.fromkeys(run["policy"] for run in data["runs"]))
    parts = [_head(data), _glance(found, verdicts)]
    for title, explained, body in (
        ("Ours beside the paper's: bursts", words.BURST, _bursts(found)),
        ("First tokens over time", words.CURVES, _curves(found)),
        ("Orders of prefill", words.PREFILL, _prefill(found)),
        ("How requests slow each other", words.SERIES, _series(data.get("series", ()))),
        ("Dispatch to decode instances", words.DISPATCH, _dispatch(found)),
        ("Admission under memory pressure", words.RESERVE, _reserve(found)),
        ("fluid against the best of all others", words.FLUID, _fluid(verdicts)),
        ("Flips", words.FLIP, _table(found, "flip")),
        ("Bursts, all clusters", words.ALL, _table(found, "burst")),
        ("Steady loads", words.STEADY, _table(found, "steady")),
        ("A trace of production", words.TRACE, _table(found, "trace")),
    ):
        if body:
            parts += [f"<h2>{escape(title)}</h2>", f"<p>{explained}</p>", body]
    parts += ["<h2>How this was made</h2>", _method(data["environment"])]
    style = STYLE + policy_colours([(name, policy_class(name)) for name in names])
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>TetriInfer in virtual time</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{style}</style></head><body><main>{''.join(parts)}</main><script>{SCRIPT}</script></body></html>\n"
    )


def _head(data: Mapping[str, Any]) -> str:
    runs = data["runs"]
    requests = sum(run["requests"] for run in runs)
    return (
        '<header><h1>TetriInfer in virtual time <span class="badge">simulated</span></h1>'
        f"<p>{words.HEAD} {len(runs):,} runs, {requests:,} requests.</p></header>"
    )


def _glance(found: Mapping[Place, By], verdicts: Sequence[Verdict]) -> str:
    cards = []
    burst = found.get(("burst", "LPHD", None), {})
    if {"tetriinfer", BASELINE} <= set(burst):
        against = against_baseline(burst)
        cards.append((f"−{against.ttft_cut:.0%}", "LPHD's mean time to the first token, TetriInfer's (paper: −97 %)"))
        cards.append((f"{against.perf_per_dollar:.2f}×", "LPHD's perf/$ by the paper's formula (paper: 2.4×)"))
    if verdicts:
        fine = sum(not verdict.worse for verdict in verdicts)
        cards.append((f"{fine} of {len(verdicts)}", "means at which fluid is no worse than the best other cluster"))
        better = sum(verdict.better for verdict in verdicts)
        cards.append((f"{better} of {len(verdicts)}", "of these, where it is better beyond the interval"))
    return f'<div class="cards">{"".join(f"<div class=card><b>{a}</b><span>{b}</span></div>" for a, b in cards)}</div>'


def _bursts(found: Mapping[Place, By]) -> str:
    rows = []
    for name, paper in CLASSES.items():
        by_policy = found.get(("burst", name, None), {})
        if not {"tetriinfer", BASELINE} <= set(by_policy):
            continue
        ours = against_baseline(by_policy)
        cells = (
            (f"{paper.ttft:+g} %", f"{-100 * ours.ttft_cut:+.0f} %"),
            (f"{paper.jct:+g} %", f"{-100 * ours.jct_cut:+.0f} %"),
            (f"{paper.resources:.2f}", f"{ours.resources:.2f}"),
            (f"{paper.perf:.2f}", f"{ours.perf_per_dollar:.2f}"),
            ("", f"{ours.usual:.2f}"),
        )
        numbers = "".join(f'<td class="number">{a}</td><td class="number"><b>{b}</b></td>' for a, b in cells[:4])
        rows.append(
            f'<tr><td>{name}</td>{numbers}<td class="number">{cells[4][1]}</td><td>{escape(paper.why)}</td></tr>'
        )
    head = "".join(f"<th>{name}, paper</th><th>ours</th>" for name in ("TTFT", "JCT", "resources", "perf/$"))
    return _scroll(f"<tr><th>class</th>{head}<th>speed-up over cost</th><th>why they differ</th></tr>", rows)


def _curves(found: Mapping[Place, By]) -> str:
    charts = []
    for name in CLASSES:
        by_policy = found.get(("burst", name, None), {})
        lines = [
            Line(policy, [(max(0.05, x), level) for x, level in zip(_curve(by_policy[policy]), _levels(), strict=True)])
            for policy in _CURVES
            if policy in by_policy
        ]
        if lines:
            charts.append(cdf_chart(name, lines, "time to the first token (s)"))
    keys = "".join(
        f'<button class="key {policy_class(name)}" data-policy="{name}" aria-pressed="true"><i></i>{name}</button>'
        for name in _CURVES
    )
    return f'<div class="legend">{keys}</div>{_grid(charts)}' if charts else ""


def _curve(runs: Sequence[Mapping[str, Any]]) -> list[float]:
    """Percentiles, each the mean over seeds."""
    return [sum(values) / len(values) for values in zip(*(run["ttft_curve_s"] for run in runs), strict=True)]


def _levels() -> range:
    return range(0, 101, 2)


def _prefill(found: Mapping[Place, By]) -> str:
    by_policy = found.get(("prefill", "Mixed", None), {})
    bars = [(name, mean(runs, "ttft_s")) for name, runs in by_policy.items() if name != "coupled-16"]
    if not bars:
        return ""
    rows = _beside(by_policy, PREFILL, lambda runs: mean(runs, "ttft_s"))
    chart = bar_chart("mean time to the first token (s)", bars, "s")
    return _grid([chart]) + _scroll("<tr><th>order</th><th>paper (s)</th><th>ours (s)</th></tr>", rows)


def _series(series: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for figure in dict.fromkeys(point["figure"] for point in series):
        points = [point for point in series if point["figure"] == figure]
        ratios = [point["model_ms"] / point["paper_ms"] for point in points]
        inside = sum(abs(ratio - 1) <= 0.25 for ratio in ratios)
        what = ", ".join(dict.fromkeys(point["what"] for point in points))
        rows.append(
            f'<tr><td>{figure}</td><td>{escape(what)}</td><td class="number">{inside} of {len(points)}</td>'
            f'<td class="number">{min(ratios):.2f} to {max(ratios):.2f}</td></tr>'
        )
    head = "<tr><th>figure</th><th>what</th><th>points within 25 %</th><th>model over paper</th></tr>"
    return _scroll(head, rows) if rows else ""


def _dispatch(found: Mapping[Place, By]) -> str:
    rows = []
    for (point, of, _), by_policy in found.items():
        if point != "dispatch":
            continue
        for number, (name, runs) in enumerate(by_policy.items()):
            paper = DISPATCH.get(name)
            place = ("2 instances", "4 instances", "8 instances").index(of)
            published = f"{paper[place]:.1f}" if paper is not None else ""
            rows.append(
                f'<tr><td>{of if not number else ""}</td><td>{name}</td><td class="number">{published}</td>'
                f'<td class="number">{mean(runs, "makespan_s"):.1f}</td>'
                f'<td class="number">{mean(runs, "slowest_heavy"):.1f} / {mean(runs, "slowest_light"):.1f}</td></tr>'
            )
    head = "<tr><th></th><th>rule</th><th>paper (s)</th><th>ours (s)</th><th>heavy / light on the slowest</th></tr>"
    return _scroll(head, rows) if rows else ""


def _reserve(found: Mapping[Place, By]) -> str:
    by_policy = found.get(("reserve", "ShareGPT", None), {})
    if "greedy" not in by_policy:
        return ""
    rows = []
    for name, runs in by_policy.items():
        own = mean(runs, "jct_s")
        rule, swapping, _ = name.partition(SWAPPING)
        greedy = mean(by_policy.get("greedy" + swapping, runs), "jct_s")
        paper = RESERVE.get(rule)
        published = f"{paper:.1f} ({100 * (paper / RESERVE['greedy'] - 1):+.1f} %)" if paper is not None else ""
        rows.append(
            f'<tr><td>{name}</td><td class="number">{published}</td>'
            f'<td class="number">{own:.1f} ({100 * (own / greedy - 1):+.1f} %)</td>'
            f'<td class="number">{mean(runs, "preempted"):.0f}</td></tr>'
        )
    return _scroll("<tr><th>rule, accuracy</th><th>paper (s)</th><th>ours (s)</th><th>preempted</th></tr>", rows)


def _fluid(verdicts: Sequence[Verdict]) -> str:
    rows = []
    for verdict in verdicts:
        colour = "worse" if verdict.worse else "better" if verdict.better else "even"
        at = f"{verdict.point}, {verdict.of}" + (f", {verdict.rate:.2f}/s" if verdict.rate is not None else "")
        rows.append(
            f"<tr><td>{escape(at)}</td><td>{'TTFT' if verdict.measure == 'ttft_s' else 'JCT'}</td>"
            f'<td>{escape(verdict.rival)}</td><td class="number {colour}">{verdict.ratio.text}</td></tr>'
        )
    head = "<tr><th>where</th><th>mean</th><th>best other</th><th>fluid over it</th></tr>"
    return f'<div class="heat">{_scroll(head, rows)}</div>' if rows else ""


def _table(found: Mapping[Place, By], point: str) -> str:
    """Every cluster at every place of a point, means over seeds."""
    rows = []
    for (at, of, rate), by_policy in found.items():
        if at != point:
            continue
        for number, (name, runs) in enumerate(by_policy.items()):
            where = (of + (f", {rate:.2f}/s" if rate is not None else "")) if not number else ""
            figures = (
                *(f"{mean(runs, 'ttft_s', part):.2f}" for part in ("mean", "p99")),
                *(f"{mean(runs, 'jct_s', part):.2f}" for part in ("mean", "p99")),
                f"{1000 * mean(runs, 'tpot_s'):.0f}",
                f"{mean(runs, 'gpu_seconds'):,.0f}",
                f"{mean(runs, 'preempted'):.0f}",
                f"{mean(runs, 'flips'):.0f}",
            )
            cells = "".join(f'<td class="number">{figure}</td>' for figure in figures)
            rows.append(f"<tr><td>{escape(where)}</td><td>{escape(name)}</td>{cells}</tr>")
    head = "".join(
        f"<th>{name}</th>"
        for name in (
            "",
            "cluster",
            "TTFT (s)",
            "p99",
            "JCT (s)",
            "p99",
            "TPOT (ms)",
            "GPU-seconds",
            "preempted",
            "flips",
        )
    )
    return _scroll(f"<tr>{head}</tr>", rows) if rows else ""


def _beside(by_policy: By, paper: Mapping[str, float], own: Callable[[list[Mapping[str, Any]]], float]) -> list[str]:
    return [
        f'<tr><td>{escape(name)}</td><td class="number">{paper.get(name, "")}</td>'
        f'<td class="number">{own(runs):.2f}</td></tr>'
        for name, runs in by_policy.items()
    ]


def _scroll(head: str, rows: Iterable[str]) -> str:
    return f'<div class="scroll"><table>{head}{"".join(rows)}</table></div>'


def _grid(charts: Sequence[str]) -> str:
    return f'<div class="grid2">{"".join(f"<figure>{chart}</figure>" for chart in charts)}</div>'


def _method(environment: Mapping[str, Any]) -> str:
    cost = ", ".join(f"{name} {seconds:g}" for name, seconds in environment["cost_s"].items())
    links = ", ".join(
        f"{name}: {link['message_s'] * 1e6:g} µs a message" for name, link in environment["links"].items()
    )
    items = [
        f"{escape(environment['model'])}: room for {environment['kv_tokens']:,} tokens, "
        f"{environment['kv_token_bytes']:,} bytes each. Cost model (s): {escape(cost)}.",
        f"Links, shared fairly: {escape(links)}.",
        *words.METHOD,
        f"Python {escape(environment['python'])}, numpy {escape(environment['numpy'])}, "
        f"{escape(environment['machine'])}; {environment.get('wall_s', 0):,.0f} s of computing.",
    ]
    if "trace" in environment:
        items.insert(0, f"Trace: {escape(environment['trace'])}.")
    return "<ul>" + "".join(f"<li>{item}</li>" for item in items) + "</ul>"

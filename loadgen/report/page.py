"""The whole page: head, style, sections in their order, and the words between them."""

from collections.abc import Mapping
from html import escape
from typing import Any

from common.policies.video.rib import Rib
from loadgen.report import sections, words
from loadgen.report.charts import policy_class
from loadgen.report.style import SCRIPT, STYLE, policy_colours
from loadgen.simulator.verdicts import STATIC, Table, table_of
from loadgen.workloads import MIXES, STEPS


def page(data: Mapping[str, Any]) -> str:
    """The page of one experiment (several files of one experiment are joined before)."""
    table = table_of(data["runs"])
    environment = data["environment"]
    rib = Rib.from_json(environment["rib"])
    names = sections.policies(table)
    parts = [_head(data, table), sections.glance(table)]
    parts += _section("Ours beside the paper", words.PAPER, sections.paper_table(table))
    parts += _section("Latency over load", words.SWEEPS, sections.legend(names))
    for gpus in sections.sizes(table):
        parts += [f"<h3>{gpus} GPUs</h3>", sections.sweeps(table, gpus)]
    if "elastic" in names:
        parts += _section("elastic against the best of all others", words.ELASTIC, "")
        for gpus in sections.sizes(table):
            parts += [f"<h3>{gpus} GPUs</h3>", sections.heatmap(table, "elastic", None, gpus)]
        parts.append(sections.losses(table))
    if "ddit" in names:
        parts += _section("ddit against the best static policy", words.STATIC, "")
        for gpus in sections.sizes(table):
            parts += [f"<h3>{gpus} GPUs</h3>", sections.heatmap(table, "ddit", STATIC, gpus)]
    parts += _section("Distributions", words.DISTRIBUTIONS, sections.distributions(data))
    parts += _section("Slots over time", words.SLOTS, sections.timelines(data, sections.class_names(rib)))
    parts += _section("Cost over the lower bound", words.COST, sections.costs(table, data))
    parts += _section("How this was made", "", _method(environment, rib))
    style = STYLE + policy_colours([(name, policy_class(name)) for name in names])
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>DDiT in virtual time</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{style}</style></head><body><main>{''.join(parts)}</main><script>{SCRIPT}</script></body></html>\n"
    )


def _head(data: Mapping[str, Any], table: Table) -> str:
    runs = data["runs"]
    counts = {len(series.runs) for by_policy in table.values() for series in by_policy.values()}
    seeds = f"{min(counts)} to {max(counts)}" if len(counts) > 1 else f"{min(counts)}"
    videos = sum(run["requests"] for run in runs)
    return (
        '<header><h1>DDiT in virtual time <span class="badge">simulated</span></h1>'
        f"<p>{words.HEAD} {len(runs):,} runs, {seeds} seeds a point, {videos:,} videos.</p></header>"
    )


def _section(title: str, words: str, body: str) -> list[str]:
    return [f"<h2>{escape(title)}</h2>", f"<p>{words}</p>" if words else "", body]


def _method(environment: Mapping[str, Any], rib: Rib) -> str:
    names = sections.class_names(rib)
    degrees = "".join(f"<th>step on {degree} (s)</th>" for degree in rib.degrees)
    head = f"<tr><th>kind</th>{degrees}<th>decode (s)</th><th>optimal degree</th></tr>"
    rows = "".join(
        f"<tr><td>{name}</td>"
        + "".join(f'<td class="number">{rib.step_s(kind, degree):.3f}</td>' for degree in rib.degrees)
        + f'<td class="number">{rib.decode_s(kind):.2f}</td><td class="number">{rib.optimal_degree(kind)}</td></tr>'
        for name, kind in zip(names, rib.profiles, strict=True)
    )
    overheads = ", ".join(
        f"{name.removesuffix('_s')} {1000 * seconds:g} ms" for name, seconds in environment["overheads_s"].items()
    )
    mixes = ", ".join(f"{mix.name} {':'.join(f'{weight:g}' for weight in mix.weights)}" for mix in MIXES.values())
    items = [
        f"Profile: {escape(environment['rib_from'])}; {STEPS} steps a video.",
        f"Changing a lease costs: {escape(overheads)}. The paper reports less than 1 ms each.",
        f"Saturation (load 1) is {escape(environment['saturation'])}. The text encoder has machines of its own.",
        f"Mixes of 144p, 240p and 360p: {mixes}.",
        *words.METHOD,
        f"Python {escape(environment['python'])}, numpy {escape(environment['numpy'])}, "
        f"{escape(environment['machine'])}; {environment.get('wall_s', 0):,.0f} s of computing.",
    ]
    listed = "".join(f"<li>{item}</li>" for item in items)
    return f'<div class="scroll"><table>{head}{rows}</table></div><ul>{listed}</ul>'

"""The whole page: head, style, sections in their order, and the words between them."""

from collections.abc import Mapping
from html import escape
from typing import Any

from common.policies.rib import Rib
from loadgen.report import sections
from loadgen.report.charts import policy_class
from loadgen.report.style import SCRIPT, STYLE, policy_colours
from loadgen.simulator.verdicts import STATIC, table_of


def page(data: Mapping[str, Any]) -> str:
    """The page of one experiment (several files of one experiment are joined before)."""
    table = table_of(data["runs"])
    environment = data["environment"]
    rib = Rib.from_json(environment["rib"])
    names = sections.policies(table)
    parts = [_head(data), sections.glance(table)]
    parts += _section("Ours beside the paper", _PAPER, sections.paper_table(table))
    parts += _section("Latency over load", _SWEEPS, sections.legend(names))
    for gpus in sections.sizes(table):
        parts += [f"<h3>{gpus} GPUs</h3>", sections.sweeps(table, gpus)]
    if "elastic" in names:
        parts += _section("elastic against the best of all others", _ELASTIC, sections.losses(table))
        for gpus in sections.sizes(table):
            parts += [f"<h3>{gpus} GPUs</h3>", sections.heatmap(table, "elastic", None, gpus)]
    if "ddit" in names:
        parts += _section("ddit against the best static policy", _STATIC, "")
        for gpus in sections.sizes(table):
            parts += [f"<h3>{gpus} GPUs</h3>", sections.heatmap(table, "ddit", STATIC, gpus)]
    parts += _section("Distributions", _DISTRIBUTIONS, sections.distributions(data))
    parts += _section("Slots over time", _SLOTS, sections.timelines(data, sections.class_names(rib)))
    parts += _section("Cost over the lower bound", _COST, sections.costs(table, data))
    parts += _section("How this was made", "", _method(environment, data, rib))
    style = STYLE + policy_colours([(name, policy_class(name)) for name in names])
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>DDiT in virtual time</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{style}</style></head><body><main>{''.join(parts)}</main><script>{SCRIPT}</script></body></html>\n"
    )


def _head(data: Mapping[str, Any]) -> str:
    runs = data["runs"]
    seeds = len({run["seed"] for run in runs})
    videos = sum(run["requests"] for run in runs)
    return (
        '<header><h1>DDiT in virtual time <span class="badge">simulated</span></h1>'
        "<p>Every number on this page comes from a discrete-event simulation: the live scheduler's policy classes under "
        "virtual time, with step and decode times from a profile. No GPU ran. "
        f"{len(runs):,} runs, {seeds} seeds, {videos:,} videos.</p></header>"
    )


def _section(title: str, words: str, body: str) -> list[str]:
    return [f"<h2>{escape(title)}</h2>", f"<p>{words}</p>" if words else "", body]


def _method(environment: Mapping[str, Any], data: Mapping[str, Any], rib: Rib) -> str:
    names = sections.class_names(rib)
    head = "".join(f"<th>step on {degree} (s)</th>" for degree in rib.degrees)
    rows = "".join(
        f"<tr><td>{name}</td>"
        + "".join(f'<td class="number">{rib.step_s(kind, degree):.3f}</td>' for degree in rib.degrees)
        + f'<td class="number">{rib.decode_s(kind):.2f}</td><td class="number">{rib.optimal_degree(kind)}</td></tr>'
        for name, kind in zip(names, rib.profiles, strict=True)
    )
    overheads = ", ".join(
        f"{name.removesuffix('_s')} {1000 * seconds:g} ms" for name, seconds in environment["overheads_s"].items()
    )
    mixes = "even 1:1:1, small-heavy 6:3:1, large-heavy 1:3:6, bimodal 1:0:1"
    return (
        f'<div class="scroll"><table><tr><th>kind</th>{head}<th>decode (s)</th><th>optimal degree</th></tr>{rows}</table>'
        f"</div><ul><li>Profile: {escape(environment['rib_from'])}; 30 steps a video.</li>"
        f"<li>Changing a lease costs: {escape(overheads)}. The paper reports less than 1 ms each.</li>"
        f"<li>Saturation (load 1) is {escape(environment['saturation'])}. The text encoder has machines of its own.</li>"
        f"<li>Mixes of 144p, 240p and 360p: {mixes}.</li>"
        "<li>Latency is from arrival to the stored file. Every policy meets the same requests, seed by seed; ratios are "
        "paired by seed, and intervals are 95 %.</li>"
        "<li>Runs end when their last video does. Past saturation the queue therefore grows with the length of the run, "
        "and its latencies say who is ahead, not what a user would see in the long run.</li>"
        "<li>Square: Poisson arrivals whose rate jumps, a quarter of every 240 s at 1.5 of saturation, the rest at 0.3. "
        "Burst: all videos at once.</li>"
        f"<li>Python {escape(environment['python'])}, numpy {escape(environment['numpy'])}, "
        f"{escape(environment['machine'])}; {environment.get('wall_s', 0):,.0f} s of computing.</li></ul>"
    )


_PAPER = (
    "Reduction of latency by ddit. The body of the paper could not be read: beyond its two headline figures (p99 1.44×, "
    "mean 1.43×, which are −30.4 % and −30 %) the numbers come from other people's accounts of it, and rates, mixes and "
    "traces are partly guesses. In brackets: the static policy that was best at the point."
)
_SWEEPS = (
    "Logarithmic; lines leave the frame where a policy's queue runs away. Point at a name to bring it out, press it to "
    "hide it."
)
_ELASTIC = (
    "Each cell is elastic's latency over that of whichever other policy is best at that very point, so below 1 it is "
    "ahead of all of them. Green: better; grey: the 95 % interval holds 1; red: worse."
)
_STATIC = (
    "ddit over the best of sdop:1, sdop:2, sdop:4, spci and dpci at each point. ddit gains between light load and "
    "saturation; past saturation every GPU-second counts, one GPU a video wastes none, and serving the hungry first lets "
    "new videos wait."
)
_DISTRIBUTIONS = "Share of the videos that were done within so many seconds; all seeds together."
_SLOTS = (
    "The same requests under three policies. A row is a GPU; the number is how many work together on the video; the "
    "master's decoding follows its steps on one slot."
)
_COST = (
    "The bound is the paper's dynamic programme (section 7.2): every class has a block of GPUs and one degree of its own, "
    "the mix being known. For a burst it counts GPU-seconds; a policy is charged what its videos held, or, as a bill "
    "would be, all GPUs until the last video is done. For Poisson arrivals the bound is the sum of block size times mean "
    "latency by M/D/c (only the waiting halved; with the whole halved, as reported, it falls below the service time), and "
    "a policy is charged its own mean latency of each class times the same block sizes. The plan may leave GPUs unused "
    "and isolates the classes; a policy that shares all GPUs can therefore be below 1."
)

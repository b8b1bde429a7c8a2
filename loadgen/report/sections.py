"""The parts of the page, each a function from the experiment's data to HTML."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from common.policies.video.rib import Rib
from loadgen.report.charts import Line, bar_chart, cdf_chart, line_chart, policy_class, slot_chart
from loadgen.report.paper import PAPER_COST, readings
from loadgen.simulator.bounds import cost_over
from loadgen.simulator.verdicts import STATIC, Place, Result, Table, Verdict, against_best, compare

MEASURE_TEXT = {"mean": "mean latency", "p99": "p99 latency"}


def class_names(rib: Rib) -> list[str]:
    return [f"{min(kind.width, kind.height)}p" for kind in rib.profiles]


def glance(table: Table) -> str:
    """The few figures that sum it up."""
    cards = []
    for gpus in sizes(table):
        for measure in ("p99", "mean"):
            best = _largest_gain(table, gpus, measure)
            if best is not None:
                cards.append(
                    _card(
                        f"{1 / best.ratio.value:.2f}×",
                        f"ddit's best {MEASURE_TEXT[measure]} against the best static policy on {gpus} GPUs "
                        f"({best.place.mix}, {_where(best.place)})",
                    )
                )
    verdicts = against_best(table, "elastic")
    if verdicts:
        fine = sum(verdict.result is not Result.WORSE for verdict in verdicts)
        cards.append(
            _card(f"{fine} of {len(verdicts)}", "means and p99s where elastic is no worse than the best other policy")
        )
    return f'<div class="cards">{"".join(cards)}</div>'


def paper_table(table: Table) -> str:
    """Ours beside the paper's."""
    rows = []
    before = ""
    for reading in readings(table):
        case, verdict = reading.case, reading.verdict
        value, low, high = reading.reduction
        other = case.against if verdict.other == case.against else f"{case.against} ({verdict.other})"
        where = "" if case.point else f'<br><span class="quiet">at {escape(verdict.place.text)}</span>'
        rows.append(
            f"<tr><td>{escape(case.name)}{where}</td><td>{case.measure}</td><td>{escape(other)}</td>"
            f'<td class="number">−{case.reduction:g} %</td>'
            f'<td class="number"><b>{_signed(-value)} %</b><br>'
            f'<span class="quiet">{_signed(-high)} to {_signed(-low)}</span></td>'
            f"<td>{'As above.' if case.why == before else escape(case.why)}</td></tr>"
        )
        before = case.why
    head = (
        "<tr><th>case</th><th>measure</th><th>ddit against</th><th>paper</th><th>ours, simulated</th><th>why</th></tr>"
    )
    return f'<div class="scroll"><table>{head}{"".join(rows)}</table></div>'


def legend(policies: Iterable[str]) -> str:
    """Buttons: pointing at one brings its lines out everywhere, pressing it hides them."""
    buttons = "".join(
        f'<button class="key {policy_class(policy)}" data-policy="{escape(policy)}" aria-pressed="true">'
        f"<i></i>{escape(policy)}</button>"
        for policy in policies
    )
    return f'<div class="legend sticky">{buttons}</div>'


def sweeps(table: Table, gpus: int) -> str:
    """Mean and p99 over the load, a row of two charts for every mix."""
    charts = []
    for mix in mixes(table):
        places = sorted((place for place in _of(table, gpus, "sweep") if place.mix == mix), key=lambda p: p.load)
        for measure in ("mean", "p99"):
            lines = _sweep_lines(table, places, measure)
            if lines:
                title = f"{mix}: {MEASURE_TEXT[measure]}"
                charts.append(line_chart(title, lines, "load (share of saturation)", f"{MEASURE_TEXT[measure]} (s)"))
    return _grid(charts)


def heatmap(table: Table, policy: str, others: Sequence[str] | None, gpus: int) -> str:
    """The ratio to the best other policy, by mix, measure and load; the rival is named in each cell's hint."""
    verdicts = [verdict for verdict in against_best(table, policy, others) if verdict.place.gpus == gpus]
    columns = sorted({(_column(verdict.place)) for verdict in verdicts})
    by_cell = {(verdict.place.mix, verdict.measure, _column(verdict.place)): verdict for verdict in verdicts}
    rows = []
    for mix in dict.fromkeys(verdict.place.mix for verdict in verdicts):
        for measure in ("mean", "p99"):
            cells = "".join(_cell(by_cell.get((mix, measure, column))) for column in columns)
            rows.append(f"<tr><th>{escape(mix)}, {measure}</th>{cells}</tr>")
    head = "".join(f"<th>{escape(name)}</th>" for _, _, name in columns)
    return f'<div class="scroll"><table class="heat"><tr><th></th>{head}</tr>{"".join(rows)}</table></div>'


def losses(table: Table) -> str:
    """Where elastic is worse than the best other, in words; says so if nowhere."""
    worse = [verdict for verdict in against_best(table, "elastic") if verdict.result is Result.WORSE]
    if not worse:
        return "<p>At no point is elastic worse than the best other policy beyond the confidence interval.</p>"
    items = "".join(
        f"<li>{escape(verdict.place.text)}: {verdict.measure} {verdict.own_s:.2f} s against {verdict.other_s:.2f} s of "
        f"{escape(verdict.other)}, ratio {verdict.ratio.text}; {_other_side(table, verdict)}</li>"
        for verdict in sorted(worse, key=lambda verdict: -verdict.ratio.value)
    )
    places = list(dict.fromkeys(verdict.place for verdict in worse))
    split = sum(len({_best(table, place, measure) for measure in MEASURE_TEXT}) > 1 for place in places)
    return (
        f"<p>elastic does not reach its aim: it is worse than the best other policy in {len(worse)} means and p99s, "
        f"at {len(places)} points. At {split} of these no other policy has both the best mean and the best p99: the "
        "rivals are two, one that lets short videos overtake and one that keeps to the order of arrival. Some single "
        f"policy is better than elastic in both at {_dominated(table)} points; the list gives for each loss what the "
        "policy that is ahead comes to by the other measure. Its p99 has a price: one video in a "
        f"hundred may be late, and at the median point the slowest video of a run takes {_slowest(table):.2f} times as "
        "long as under the policy with the best p99.</p>"
        f"<details><summary>All {len(worse)}, the largest first</summary><ul>{items}</ul></details>"
    )


def _other_side(table: Table, verdict: Verdict) -> str:
    """What the policy that is better by one measure comes to by the other."""
    other = next(measure for measure in MEASURE_TEXT if measure != verdict.measure)
    found = compare(table, verdict.place, verdict.other, verdict.policy, other)
    ratio = "not known" if found is None else f"{found.ratio.text} times {escape(verdict.policy)}'s"
    return f"the {other} of {escape(verdict.other)} is {ratio}"


def _best(table: Table, place: Place, measure: str) -> str:
    """The best policy but elastic."""
    others = [name for name in table[place] if name != "elastic"]
    return min(others, key=lambda name: table[place][name].estimate(measure).value)


def _slowest(table: Table) -> float:
    """The longest latency of a run under elastic, over that under the policy with the best p99; the median point."""
    ratios = []
    for place, by_policy in table.items():
        if "elastic" in by_policy and len(by_policy) > 1:
            other = by_policy[_best(table, place, "p99")]
            ratios.append(by_policy["elastic"].estimate("max").value / other.estimate("max").value)
    return statistics.median(ratios)


def _dominated(table: Table) -> int:
    """At how many points some one policy has a better mean and a better p99 than elastic, beyond the intervals."""
    found = 0
    for place, by_policy in table.items():
        for other in by_policy:
            verdicts = [compare(table, place, "elastic", other, measure) for measure in MEASURE_TEXT]
            if all(verdict is not None and verdict.result is Result.WORSE for verdict in verdicts):
                found += 1
                break
    return found


def distributions(data: Mapping[str, Any]) -> str:
    """The latency distribution of every policy at a few points, all seeds together."""
    charts = []
    wanted = [("sweep", 0.5), ("sweep", 0.8), ("rate 0.5", None), ("burst", None), ("gentle square", None)]
    for gpus in sorted({curve["gpus"] for curve in data["curves"]}):
        for point, load in wanted:
            curves = [
                curve
                for curve in data["curves"]
                if curve["gpus"] == gpus
                and curve["point"] == point
                and curve["mix"] == "even"
                and (load is None or curve["load"] == load)
            ]
            if curves:
                lines = [
                    Line(curve["policy"], list(zip(curve["latency_s"], data["levels"], strict=True)))
                    for curve in curves
                ]
                name = f"load {load:g}" if load is not None else point
                charts.append(cdf_chart(f"{gpus} GPUs, even mix, {name}", lines, "latency (s)"))
    return _grid(charts)


def timelines(data: Mapping[str, Any], classes: Sequence[str]) -> str:
    keys = "".join(f'<span class="swatch kind{number}"><i></i>{name}</span>' for number, name in enumerate(classes))
    keys += '<span class="swatch decode"><i></i>decoding</span><span class="swatch held"><i></i>held, idle</span>'
    charts = "".join(f'<figure class="wide">{slot_chart(line, classes)}</figure>' for line in data["timelines"])
    return f'<div class="legend">{keys}</div>{charts}'


def costs(table: Table, data: Mapping[str, Any]) -> str:
    """Bars for the burst, in the bound's own unit, and lines for Poisson arrivals."""
    charts = []
    for bound in data["bounds"]:
        place = Place(bound["point"], bound["gpus"], bound["mix"], bound["load"], bound["rate"])
        if "batch" in bound and place in table:
            found = {policy: cost_over(series, bound) for policy, series in table[place].items()}
            for name, text in (("held", "GPU-seconds held"), ("rented", "all GPUs, until the last video is done")):
                bars = sorted(((policy, cost[name]) for policy, cost in found.items()), key=lambda bar: bar[1])
                charts.append(bar_chart(f"{place.gpus} GPUs, burst: {text}", bars, "cost over the bound", 1.0))
    for gpus in sizes(table):
        lines = _cost_lines(table, data["bounds"], gpus)
        if lines:
            charts.append(
                line_chart(
                    f"{gpus} GPUs, even mix, Poisson", lines, "load (share of saturation)", "cost over the bound"
                )
            )
    papers = ", ".join(f"{name} {value:g}" for name, value in PAPER_COST)
    words = f"<p>The paper reports, for its 64 GPUs: {papers} times the bound.</p>"
    return words + _grid(charts) + _cost_table(table, data["bounds"])


def _cost_table(table: Table, bounds: Iterable[Mapping[str, Any]]) -> str:
    """The paper's rate of 0.5 a server under both forms of the bound's formula."""
    at = [bound for bound in bounds if bound["point"] == "rate 0.5" and "online_usual" in bound]
    columns: dict[str, list[float]] = {}
    for bound in at:
        place = Place(bound["point"], bound["gpus"], bound["mix"], bound["load"], bound["rate"])
        for policy, series in table.get(place, {}).items():
            cost = cost_over(series, bound)
            columns.setdefault(policy, []).extend([cost["online_usual"], cost["online_reported"]])
    if not columns:
        return ""
    head = "".join(f"<th>{bound['gpus']} GPUs, {form}</th>" for bound in at for form in ("usual", "as reported"))
    rows = ""
    for policy, values in sorted(columns.items(), key=lambda column: column[1][-1]):
        cells = "".join(f'<td class="number">{value:.2f}</td>' for value in values)
        rows += f"<tr><td>{escape(policy)}</td>{cells}</tr>"
    return (
        "<p>At the paper's rate of 0.5 a server, even mix, with the bound's waiting alone halved (usual) and with all "
        f'of it halved (as reported):</p><div class="scroll"><table><tr><th>policy</th>{head}</tr>{rows}</table></div>'
    )


def sizes(table: Table) -> list[int]:
    return sorted({place.gpus for place in table})


def mixes(table: Table) -> list[str]:
    return list(dict.fromkeys(place.mix for place in table))


def policies(table: Table) -> list[str]:
    return list(dict.fromkeys(policy for by_policy in table.values() for policy in by_policy))


def _sweep_lines(table: Table, places: Sequence[Place], measure: str) -> list[Line]:
    lines = []
    for policy in policies(table):
        there = [place for place in places if policy in table[place]]
        estimates = [table[place][policy].estimate(measure) for place in there]
        if estimates:
            points = [(place.load, estimate.value) for place, estimate in zip(there, estimates, strict=True)]
            ends = [(max(estimate.low, 1e-3), estimate.high) for estimate in estimates]
            lines.append(Line(policy, points, ends))
    return lines


def _cost_lines(table: Table, bounds: Iterable[Mapping[str, Any]], gpus: int) -> list[Line]:
    points: dict[str, list[tuple[float, float]]] = {}
    for bound in bounds:
        place = Place(bound["point"], bound["gpus"], bound["mix"], bound["load"], bound["rate"])
        if place.gpus == gpus and place.point == "sweep" and place.mix == "even" and "online_usual" in bound:
            for policy, series in table.get(place, {}).items():
                points.setdefault(policy, []).append((place.load, cost_over(series, bound)["online_usual"]))
    return [Line(policy, sorted(of_policy)) for policy, of_policy in points.items()]


def _of(table: Table, gpus: int, point: str) -> list[Place]:
    return [place for place in table if place.gpus == gpus and place.point == point]


def _largest_gain(table: Table, gpus: int, measure: str) -> Verdict | None:
    verdicts = [
        verdict
        for verdict in against_best(table, "ddit", STATIC)
        if verdict.place.gpus == gpus and verdict.measure == measure
    ]
    return min(verdicts, key=lambda verdict: verdict.ratio.value, default=None)


def _where(place: Place) -> str:
    return f"load {place.load:g}" if place.point == "sweep" else place.point


def _column(place: Place) -> tuple[int, float, str]:
    """Loads first, in order, then the other points by name."""
    return (0, place.load, f"{place.load:g}") if place.point == "sweep" else (1, 0.0, place.point)


def _cell(verdict: Verdict | None) -> str:
    if verdict is None:
        return "<td></td>"
    hint = f"{verdict.own_s:.2f} s against {verdict.other_s:.2f} s of {verdict.other}; ratio {verdict.ratio.text}"
    return f'<td class="{verdict.result}" title="{escape(hint)}">{verdict.ratio.value:.2f}</td>'


def _signed(percent: float) -> str:
    return f"{percent:+.1f}".replace("-", "−")


def _card(figure: str, text: str) -> str:
    return f'<div class="card"><b>{escape(figure)}</b><span>{escape(text)}</span></div>'


def _grid(charts: Iterable[str]) -> str:
    return f'<div class="grid2">{"".join(f"<figure>{chart}</figure>" for chart in charts)}</div>'

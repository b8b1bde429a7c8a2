"""The tables of MemServe's studies: ours beside the paper's, for people."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from loadgen.simulator.memserve import paper

Rows = Sequence[Mapping[str, Any]]


def print_paper(result: Mapping[str, Any]) -> None:
    """All studies."""
    _print_figure_8(result["runs"])
    print("The paper's claims: change in per cent, ours / paper")
    for claim in result["claims"]:
        change = f"{100 * claim['ours']:6.1f} / {100 * claim['paper']:6.1f}"
        sign = "" if claim["same_sign"] else "  other sign"
        print(f"  {claim['claim']:52} at {claim['rate']:g}/s {change}{sign}")
    _print_scheduler(result["scheduler"])
    _print_transfers(result["transfers"])
    print("PD-Caching by turn (ShareGPT, 1P1D): tokens of the prompt, computed at P, sent to D")
    for row in result["caching"]:
        counts = (row["prompt_tokens"], row["computed_tokens"], row["sent_tokens"])
        print(f"  {row['caching']:5} turn {row['turn']}  {'  '.join(f'{count:7.0f}' for count in counts)}")
    print("Figure 13, per cent of the time without cache, by cached tenths: ours/paper")
    for row in result["cached_share"]:
        pairs = "  ".join(f"{own:3.0f}/{other:3d}" for own, other in zip(row["ours"], row["paper"], strict=True))
        print(f"  {row['prompt_tokens']:5} tokens in {row['medium']:4}  {pairs}")
    print(f"all of it took {result['wall_s']:g} s")


def print_trace(result: Mapping[str, Any]) -> None:
    """How ours stands to the others."""
    for verdict in result["verdicts"]:
        ratios = verdict["ratios"]
        worse = ", ".join(name for name, ratio in ratios.items() if ratio > 1)
        cells = ", ".join(f"{name} {ratio:.3f}" for name, ratio in ratios.items())
        where = f"{verdict['policy']} over {verdict['against']} on {verdict['gpus']} instances"
        print(f"{where}: {cells}; {f'worse in {worse}' if worse else 'no worse'}")


def trace_line(run: Mapping[str, Any]) -> str:
    """One run."""

    def three(spread: Mapping[str, float]) -> str:
        return f"{spread['mean']:.3f} {spread['p50']:.3f} {spread['p99']:.3f}"

    return (
        f"{run['gpus']:3} instances, {run['policy']:12} TTFT mean p50 p99 {three(run['ttft_s'])} s, JCT "
        f"{three(run['jct_s'])} s, hit {run['cache_hit_ratio']:.3f} of {run['best_hit_ratio']:.3f}, "
        f"{run['pulls']} pulls; {run['simulated_s']:.0f} s in {run['cpu_s']:.1f} s"
    )


def _print_figure_8(runs: Rows) -> None:
    print("Figure 8, means: JCT in s, TTFT in ms, TPOT in ms; ours / paper")
    published = paper.figure_8()
    for (workload, setup, rate), found in _grouped(runs, "workload", "setup", "rate").items():
        theirs = published.get((workload, setup))
        cells = []
        for measure, scale in (("jct_s", 1.0), ("ttft_s", 1e3), ("tpot_s", 1e3)):
            own = scale * fmean(run[measure]["mean"] for run in found)
            other = f"{scale * theirs[measure]['mean'][paper.RATES.index(rate)]:8.3g}" if theirs else "       -"
            cells.append(f"{measure[:-2]} {own:8.3g} / {other}")
        hit = fmean(run["cache_hit_ratio"] for run in found)
        print(f"  {workload:9} {setup:8} {rate:g}/s  {'   '.join(cells)}   hit {hit:.2f}")


def _print_scheduler(runs: Rows) -> None:
    print("Figure 15, 3P1D, LooGLE: TTFT P50 and P99 in ms, ours / paper; hit, of the best available")
    for (ratio, rule), found in _grouped(runs, "share_ratio", "policy").items():
        theirs = paper.FIGURE_15[ratio].get(rule)
        cells = []
        for place, statistic in enumerate(("p50", "p99")):
            own = 1e3 * fmean(run["ttft_s"][statistic] for run in found)
            cells.append(f"{own:6.1f} / {f'{1e3 * theirs[place]:6.1f}' if theirs else '     -'}")
        hit, best = (fmean(run[name] for run in found) for name in ("cache_hit_ratio", "best_hit_ratio"))
        print(f"  ratio {ratio} {rule:12} {'   '.join(cells)}   hit {hit:.3f} of {best:.3f}")


def _print_transfers(runs: Rows) -> None:
    print("Figure 12, 1P1D, 1,024 + 32 tokens: P50 and P99 of the whole request in s, ours / paper")
    for run in runs:
        at = paper.MODE_RATES.index(run["rate"])
        figures = zip(("p50", "p99"), paper.FIGURE_12[run["mode"]], strict=True)
        cells = [f"{run['jct_s'][name]:6.2f} / {figure[at]:5.2f}" for name, figure in figures]
        print(f"  {run['mode']:10} {run['rate']:3g}/s {'   '.join(cells)}")


def _grouped(rows: Rows, *names: str) -> dict[tuple[Any, ...], list[Mapping[str, Any]]]:
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    return groups

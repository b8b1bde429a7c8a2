"""What comes of ``kv-transfer``'s comparison of layouts: figures of each way, and whether MemServe's ordering holds."""

import argparse
import asyncio
import statistics
from collections.abc import Mapping
from dataclasses import dataclass

from loadgen.bench.broker import broker
from loadgen.bench.kv_layout_rounds import Readings, measured, ratio
from loadgen.bench.kv_layouts import Shape, Way
from loadgen.bench.rounds import Ratio
from loadgen.counts import HEAD_WIDTH, count
from loadgen.gpu.options import chosen_device
from loadgen.gpu.table import device_name

_MEASURES = {"after_s": "after it is computed", "all_s": "until all is there"}


@dataclass(frozen=True)
class Claim:
    """MemServe's (figures 11a and 12): ``ours`` is faster than ``theirs``."""

    load: str
    ours: Way
    theirs: Way
    measure: str


CLAIMS = (
    Claim("alone", Way.AGGREGATED_BY_REQUEST, Way.DISCRETE_BY_REQUEST, "after_s"),
    Claim("alone", Way.AGGREGATED_BY_REQUEST, Way.DISCRETE_BY_REQUEST, "all_s"),
    Claim("alone", Way.DISCRETE_BY_LAYER, Way.DISCRETE_BY_REQUEST, "all_s"),
    Claim("alone", Way.DISCRETE_BY_LAYER, Way.AGGREGATED_BY_REQUEST, "after_s"),
    Claim("alone", Way.DISCRETE_BY_LAYER, Way.AGGREGATED_BY_REQUEST, "all_s"),
    Claim("loaded", Way.AGGREGATED_BY_REQUEST, Way.DISCRETE_BY_REQUEST, "all_s"),
    Claim("loaded", Way.AGGREGATED_BY_REQUEST, Way.DISCRETE_BY_LAYER, "all_s"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that count for layouts alone."""
    parser.add_argument(
        "--loaded", type=count, default=4, help="layouts: prompts of a loaded round (default %(default)s)"
    )
    parser.add_argument(
        "--device", default="cpu", metavar="NAME", help="layouts: of both processes, cuda for one (default %(default)s)"
    )


def run_layouts(options: argparse.Namespace) -> dict[str, object]:
    """Measure, print, and return what ``--json`` writes."""
    device = chosen_device(options.device)
    shape = Shape(options.prompt_tokens, options.layers, options.hidden // HEAD_WIDTH, HEAD_WIDTH, str(device))
    with broker() as url:
        found = asyncio.run(measured(url, shape, options.rounds, options.loaded))
    print(
        f"layouts: prompts of {shape.prompt_tokens} tokens, {shape.size_bytes / 1e6:.1f} MB, {shape.layers} layers; "
        f"on {device_name(device)}; medians of {options.rounds} rounds, ratios to discrete_by_request"
    )
    for load, readings in found.items():
        print(f"{'alone' if load == 'alone' else f'loaded, {options.loaded} prompts'}")
        print("\n".join(lines(readings, shape)))
    print("MemServe's ordering")
    print("\n".join(_verdict(claim, found) for claim in CLAIMS))
    return {
        "messages": {way: shape.messages(way) for way in Way},
        "size_bytes": shape.size_bytes,
        "readings": {
            load: {way: [vars(reading) for reading in rounds] for way, rounds in readings.items()}
            for load, readings in found.items()
        },
        "claims": [{**vars(claim), **vars(of(claim, found)), "verdict": verdict(of(claim, found))} for claim in CLAIMS],
    }


def lines(readings: Readings, shape: Shape) -> list[str]:
    """Each way's messages and bytes of a prompt, and its times with their ratios."""
    found = []
    for way, rounds in readings.items():
        times = [f"computed {1000 * statistics.median(reading.computed_s for reading in rounds):6.1f} ms"]
        for measure, title in _MEASURES.items():
            median_s = statistics.median(getattr(reading, measure) for reading in rounds)
            text = ratio(readings, way, Way.DISCRETE_BY_REQUEST, measure).text
            times.append(f"{title} {1000 * median_s:6.1f} ms, {text}")
        size = f"{shape.messages(way):>5} messages, {rounds[0].requests} requests, {shape.size_bytes / 1e6:.1f} MB"
        found.append(f"  {way:<21} {size}; {'; '.join(times)}")
    return found


def of(claim: Claim, found: Mapping[str, Readings]) -> Ratio:
    """The claim's ratio; below 1: as it says."""
    return ratio(found[claim.load], claim.ours, claim.theirs, claim.measure)


def verdict(found: Ratio) -> str:
    """What the spread lets us say."""
    if found.third < 1:
        return "holds"
    return "DOES NOT HOLD" if found.first > 1 else "cannot be told"


def _verdict(claim: Claim, found: Mapping[str, Readings]) -> str:
    told = of(claim, found)
    what = f"{claim.ours} under {claim.theirs}, {_MEASURES[claim.measure]}"
    return f"  {claim.load:<6} {what}: {told.text}: {verdict(told)}"

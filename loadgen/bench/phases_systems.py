"""The systems that ``loadgen bench phases`` compares: how many instances of which kind, and their settings.

All but one have two instances of one thread each, so that the hardware is equal, and so is an instance: what prefills
or decodes alone in one system does both in another. The paper gave its own system twice the cards of its baseline
(section 5). That comparison is against ``coupled-16``, which also batches as that baseline's curves show it to
(figures 12 to 14): 16 slots, given out again one by one. Names that the simulator has too mean the same there.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from loadgen.bench.phases_workload import Scale

FIXED, CONTINUOUS = "coupled-fixed", "coupled"
SLOTS = 16  # of the paper's baseline (section 5.2.1)
SORTED = 16  # prompts at a time, PrefillSchedBatch (section 5.1)


@dataclass(frozen=True)
class System:
    """``counts``: of instances, by service. ``settings``: beside those that all have in common."""

    name: str
    about: str
    counts: Mapping[str, int]
    settings: Mapping[str, str] = field(default_factory=dict)

    @property
    def instances(self) -> int:
        return sum(self.counts.values())


def systems(scale: Scale) -> dict[str, System]:
    """By name, in the order in which they are shown."""
    whole = {"TRIPTYCH_CHUNK_TOKENS": str(scale.budget_tokens)}
    fixed = {**whole, "TRIPTYCH_BATCHING": "fixed", "TRIPTYCH_FIXED_BATCH": str(SLOTS)}
    slots = {**whole, "TRIPTYCH_MOST_SEQUENCES": str(SLOTS)}
    split = {
        "TRIPTYCH_ROLE": "decode",
        "TRIPTYCH_DISPATCH": "scheduler",
        "TRIPTYCH_DECODE_ADMISSION": "greedy",
        "TRIPTYCH_PREFILL_ORDER": "fcfs",
    }
    predicting = {
        "TRIPTYCH_ROLE": "decode",
        "TRIPTYCH_LENGTH_PREDICTION": "parallel",
        "TRIPTYCH_DISPATCH": "power_of_two",
        "TRIPTYCH_DECODE_ADMISSION": "reserve_dynamic",
        "TRIPTYCH_PREFILL_ORDER": "sjf",
        "TRIPTYCH_PREFILL_SCHED_BATCH": str(SORTED),
    }
    ours = {
        "TRIPTYCH_LENGTH_PREDICTION": "parallel",
        "TRIPTYCH_DECODE_ADMISSION": "reserve_dynamic",
        "TRIPTYCH_PREFILL_ORDER": "srf",
        "TRIPTYCH_VICTIM_RULE": "longest_remaining",
    }
    found = (
        System(
            FIXED, f"2 fused, batches of {SLOTS} from their first prompt to their last answer", {"decode": 2}, fixed
        ),
        System(CONTINUOUS, "2 fused, continuous batching, chunked prefill", {"decode": 2}),
        System("split", "1 prefill, 1 decode, no prediction: fcfs, greedy", {"prefill": 1, "decode": 1}, split),
        System(
            "split-predicting",
            "1 prefill, 1 decode: sjf, power of two, reserve_dynamic, predictor beside prefill",
            {"prefill": 1, "decode": 1},
            predicting,
        ),
        System("ours", "2 fused: srf, reserve_dynamic, predictor beside prefill", {"decode": 2}, ours),
        System("coupled-16x2", f"2 fused, {SLOTS} slots each, prompts whole", {"decode": 2}, slots),
        System("coupled-16", f"1 fused, {SLOTS} slots, prompts whole: half the hardware", {"decode": 1}, slots),
    )
    return {one.name: one for one in found}


def common_settings(scale: Scale, kv_token_bytes: int, precision: str) -> dict[str, str]:
    """What all have in common: no caching of prefixes, as there are none; the memory and chunk of the paper, scaled."""
    return {
        "TRIPTYCH_ROLE": "fused",
        "TRIPTYCH_PRECISION": precision,
        "TRIPTYCH_CACHING": "pd_basic",
        "TRIPTYCH_KV_BYTES": str(scale.kv_tokens * kv_token_bytes),
        "TRIPTYCH_CHUNK_TOKENS": str(scale.chunk_tokens),
        "TRIPTYCH_LENGTH_PREDICTION": "off",
    }

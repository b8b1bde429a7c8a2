"""MemServe in virtual time: what a reproduction must show, each check by its number, and what they stand on."""

import json
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.policies.language.prefill_cost import DecodeCost
from common.policies.language.routing_rules import make_rule
from common.policies.language.sites import InstanceKind
from loadgen.__main__ import main
from loadgen.simulator.language.clock import Clock
from loadgen.simulator.language.workloads import WrongTrace
from loadgen.simulator.memserve import paper
from loadgen.simulator.memserve.batch import Batch
from loadgen.simulator.memserve.cluster import Cluster
from loadgen.simulator.memserve.machine import PAPER_MACHINE, Caching, TransferMode, Transfers
from loadgen.simulator.memserve.outcome import Asked
from loadgen.simulator.memserve.setup import Setup, View
from loadgen.simulator.memserve.studies import (
    SETUPS,
    cached_share,
    caching_study,
    end_to_end,
    scheduler_study,
    simulate,
    transfer_study,
)
from loadgen.simulator.memserve.trace import read_mooncake
from loadgen.simulator.memserve.workloads import LOOGLE, REACT, SHAREGPT, make_turns

P, D, PD = InstanceKind.PREFILL, InstanceKind.DECODE, InstanceKind.FUSED


def check_nothing_is_held(cluster: Cluster) -> None:
    for engine in cluster.engines.values():
        assert (engine.memory.held_blocks, engine.waiting) == (0, 0)
    for site in cluster.scheduler.sites.values():
        assert (site.prefill_tokens, site.sequences, site.context_tokens) == (0, 0, 0)


# --- the reproduction checks -------------------------------------------------------------------------------------


def test_check_1_what_is_computed_and_sent_by_caching_design() -> None:
    computed: dict[str, list[float]] = defaultdict(list)
    sent: dict[str, list[float]] = defaultdict(list)
    for row in caching_study(150, 1):
        if 2 <= row["turn"] <= 4:
            computed[row["caching"]].append(row["computed_tokens"])
            sent[row["caching"]].append(row["sent_tokens"])
    # C-1 sends whole prompts, which grow by the turn; C-2 and C-3 only what is new to the decode instance.
    assert sent["C1"] == sent["NONE"] == sorted(sent["C1"])
    assert sent["C2"] == sent["C3"]
    assert max(sent["C2"]) < min(sent["C1"])
    # Only C-3 saves the prefill instance what was generated.
    assert computed["C1"] == computed["C2"]
    assert all(less < more for less, more in zip(computed["C3"], computed["C2"], strict=True))


def test_check_2_aggregated_blocks_take_one_call_a_group_and_a_fifth_of_the_time() -> None:
    layers = PAPER_MACHINE.prefill.layers
    discrete, aggregated = Transfers(TransferMode.BY_REQUEST, communicators=1), Transfers(TransferMode.AGGREGATED)
    assert (discrete.calls(16, layers), aggregated.calls(16, layers)) == (80, 1)
    ratio = discrete.alone_s(2048, PAPER_MACHINE) / aggregated.alone_s(2048, PAPER_MACHINE)
    assert ratio == pytest.approx(5.3, rel=0.02)


def test_check_3_by_layer_is_better_at_low_load_and_aggregated_at_high_load() -> None:
    p50 = {(run["mode"], run["rate"]): run["jct_s"]["p50"] for run in transfer_study((5.0, 10.0, 40.0, 80.0), 150, 1)}
    for rate in (5.0, 10.0):
        assert p50["by_layer", rate] < p50["aggregated", rate] < p50["by_request", rate]
    for rate in (40.0, 80.0):
        assert p50["aggregated", rate] < p50["by_layer", rate] < p50["by_request", rate]


def test_check_4_prompt_trees_beat_sessions_beat_turns_and_more_so_the_more_is_shared() -> None:
    p99: dict[tuple[int, str], float] = {}
    hits: dict[tuple[int, str], float] = {}
    for run in scheduler_study((2, 3), ("round_robin", "session", "prompt_tree"), 1):
        p99[run["share_ratio"], run["policy"]] = run["ttft_s"]["p99"]
        hits[run["share_ratio"], run["policy"]] = run["cache_hit_ratio"]
    for ratio in (2, 3):
        assert p99[ratio, "prompt_tree"] < p99[ratio, "session"] < p99[ratio, "round_robin"]
        assert hits[ratio, "prompt_tree"] > hits[ratio, "session"] > hits[ratio, "round_robin"]
    assert p99[3, "prompt_tree"] / p99[3, "session"] < p99[2, "prompt_tree"] / p99[2, "session"]


def test_check_5_short_prompts_gain_nothing_and_long_ones_much() -> None:
    for tenth in range(1, 11):
        for tokens in (32, 128, 512):
            assert cached_share(PAPER_MACHINE, tokens, tenth / 10, in_dram=False) > 0.95
    assert 3 < 1 / cached_share(PAPER_MACHINE, 4096, 1.0, in_dram=False) < 7


def test_check_6_the_hosts_memory_saves_a_fifth_less() -> None:
    for tokens in (1024, 2048, 4096):
        near = cached_share(PAPER_MACHINE, tokens, 1.0, in_dram=False)
        far = cached_share(PAPER_MACHINE, tokens, 1.0, in_dram=True)
        assert 0.15 < far - near < 0.27
        assert far < 0.9


def test_check_7_caching_and_taking_apart_help_where_the_paper_says() -> None:
    runs = end_to_end(("loogle",), ("PD", "PD-CC", "1P1D", "1P1D-CC", "2P1D"), (1.0, 4.0, 5.0), 60, 1)
    runs += end_to_end(("react",), ("1P2D", "1P2D-CC", "PD", "PD-CC"), (2.0, 4.0), 60, 1)
    runs += end_to_end(("sharegpt",), ("PD", "1P1D", "2P1D"), (1.0,), 60, 1)
    claims = {claim["claim"]: claim for claim in paper.check_claims(runs)}
    # Why the paper's one prefill instance falls behind with ReAct is not known, so what follows from it is not here.
    unexplained = [name for name in claims if name.startswith("react 1P2D-CC against 1P2D, JCT")]
    wrong = [name for name, claim in claims.items() if not claim["same_sign"] and abs(claim["paper"]) > 0.15]
    assert len(claims) >= 10
    assert set(wrong) <= set(unexplained)


@pytest.mark.parametrize("victim", ["prefill-000", "decode-002"])
@pytest.mark.parametrize("mode", TransferMode)
def test_check_8_a_death_leaves_no_leak_and_no_request_unanswered(victim: str, mode: TransferMode) -> None:
    setup = Setup((P, P, D, D), PAPER_MACHINE, Caching.C3, Transfers(mode))
    clock = Clock()
    cluster = Cluster(clock, setup, make_rule("cost"))
    turns = make_turns(SHAREGPT, 80, 20.0, 3)
    clock.at(2.0, lambda: cluster.kill(victim))
    asked = cluster.run(turns)
    assert len(asked) == len(turns)
    assert all(one.end_s < float("inf") for one in asked.values())
    assert any(one.attempts > 1 for one in asked.values())
    assert victim not in cluster.scheduler.sites
    check_nothing_is_held(cluster)


def test_check_9_evictions_under_a_long_time_to_live_cost_hits_and_no_answers() -> None:
    hits = []
    for kv_tokens in (140_000, 12_000):
        machine = replace(PAPER_MACHINE, kv_tokens=kv_tokens)
        setup = Setup((PD, PD), machine, Caching.C1, view=View(publishes=False, ttl_s=1e9, expects=False))
        run, cluster = simulate(setup, make_turns(LOOGLE, 120, 4.0, 2), "prompt_tree")
        assert run["completed"] == run["requests"]
        check_nothing_is_held(cluster)
        hits.append(run["cache_hit_ratio"])
    assert hits[1] < 0.8 * hits[0]


# --- what they stand on ------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 5000), st.integers(1, 30)), min_size=1, max_size=6),
    st.floats(0.0, 2.0),
)
def test_many_decode_steps_at_once_are_the_steps_one_by_one(joined: list[tuple[int, int]], span_s: float) -> None:
    cost = DecodeCost(0.011, 0.0001, 1e-6)
    batch = Batch(cost)
    left = {}
    for number, (context, tokens) in enumerate(joined):
        batch.join(str(number), context, tokens)
        left[str(number)] = [context, tokens]
    spans = [0.0]
    for step in range(batch.steps_to_first_end):
        spans.append(
            spans[-1] + cost.step_s(len(left), sum(context for context, _ in left.values()) + step * len(left))
        )
        assert batch.span_s(step + 1) == pytest.approx(spans[-1])
    steps = batch.steps_within(span_s)
    assert batch.span_s(steps) >= span_s
    assert steps == 1 or batch.span_s(steps - 1) < span_s + 1e-9
    ended = batch.advance(batch.steps_to_first_end)
    assert sorted(ended) == sorted(name for name, (_, tokens) in left.items() if tokens == min(t for _, t in joined))
    assert batch.context_tokens == sum(
        context + len(spans) - 1 for name, (context, _) in left.items() if name not in ended
    )


@pytest.mark.parametrize(
    ("chats", "prompt", "answer", "cold"),
    [(SHAREGPT, 774, 322, 0.33), (LOOGLE, 1798, 23, 0.17), (REACT, 2222, 163, 0.25)],
)
def test_workloads_are_near_what_is_published_of_them(chats, prompt, answer, cold) -> None:  # type: ignore[no-untyped-def]
    turns = make_turns(chats, 3000, 5.0, 1)
    assert sum(turn.prompt_tokens for turn in turns) / len(turns) == pytest.approx(prompt, rel=0.3)
    assert sum(turn.answer_tokens for turn in turns) / len(turns) == pytest.approx(answer, rel=0.1)
    assert sum(not turn.after for turn in turns) / len(turns) == pytest.approx(cold, abs=0.05)
    assert [turn.arrival_s for turn in turns] == sorted(turn.arrival_s for turn in turns)


@pytest.mark.parametrize("rule", ["least_load", "session", "prompt_tree", "cost", "dynamo", "added_time"])
@pytest.mark.parametrize("kinds", [(PD, PD, PD), (P, D, D), (P, D, PD)])
def test_every_rule_answers_everything_over_a_line_that_loses(rule: str, kinds: tuple[InstanceKind, ...]) -> None:
    setup = Setup(kinds, PAPER_MACHINE, view=View(lost=0.05))
    run, cluster = simulate(setup, make_turns(SHAREGPT, 60, 10.0, 5), rule)
    assert run["completed"] == run["requests"]
    assert run["repairs"] > 0
    check_nothing_is_held(cluster)
    for one in cluster.asked.values():
        check_order(one, cluster)
    for name, engine in cluster.engines.items():
        assert cluster.scheduler.index.holding(name).blocks <= engine.memory.blocks


def check_order(one: Asked, cluster: Cluster) -> None:
    request = one.request
    assert one.asked_s <= one.first_token_s <= one.end_s
    assert 0 <= one.cached_tokens < request.prompt_tokens
    after = getattr(request, "after", "")
    if after:
        assert one.asked_s >= cluster.asked[after].end_s


def test_what_is_pulled_is_found_by_the_prefill_that_asked_for_it() -> None:
    setup = Setup((PD,) * 4, PAPER_MACHINE, Caching.C1)
    run, cluster = simulate(setup, make_turns(LOOGLE, 200, 40.0, 6), "added_time")
    assert run["pulls"] > 0
    pulled = [one for one in cluster.asked.values() if one.pulled_tokens]
    assert all(one.cached_tokens >= one.pulled_tokens for one in pulled)


def test_the_same_seed_gives_the_same_run() -> None:
    setup = SETUPS["1P2D-CC"]
    runs = [simulate(setup, make_turns(REACT, 40, 6.0, 4), "cost", seed=4)[0] for _ in range(2)]
    assert runs[0] == runs[1]


# --- traces and the command --------------------------------------------------------------------------------------


def write_trace(file: Path, rows: list[tuple[int, int, int, list[int]]]) -> Path:
    names = ("timestamp", "input_length", "output_length", "hash_ids")
    file.write_text("".join(json.dumps(dict(zip(names, row, strict=True))) + "\n" for row in rows), encoding="utf-8")
    return file


def test_a_trace_tells_prefixes_and_conversations(tmp_path: Path) -> None:
    rows = [(0, 1100, 5, [0, 1, 2]), (500, 1024, 0, [0, 3]), (2000, 1600, 7, [0, 1, 4, 5])]
    turns = read_mooncake(write_trace(tmp_path / "trace.jsonl", rows), speed=2.0)
    assert [turn.arrival_s for turn in turns] == [0.0, 0.25, 1.0]
    assert [len(turn.tokens) // 64 for turn in turns] == [2, 2, 3]
    assert turns[2].tokens.startswith(turns[0].tokens)
    assert turns[0].conversation == turns[2].conversation != turns[1].conversation
    assert turns[1].answer_tokens == 1


def test_what_is_no_trace_is_refused(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.jsonl"
    wrong.write_text('{"timestamp": 1}\n', encoding="utf-8")
    with pytest.raises(WrongTrace, match="no Mooncake trace"):
        read_mooncake(wrong)
    with pytest.raises(SystemExit, match="no such file"):
        main(["sim", "--trace", str(tmp_path / "none.jsonl"), "--format", "mooncake"])


def test_the_command_runs_a_trace_and_says_how_ours_stands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [(number * 100, 1024, 3, [0, number % 3]) for number in range(30)]
    trace, out = write_trace(tmp_path / "trace.jsonl", rows), tmp_path / "out.json"
    assert main(["sim", "--trace", str(trace), "--format", "mooncake", "--gpus", "2", "--json", str(out)]) == 0
    result = json.loads(out.read_text(encoding="utf-8"))
    assert {run["policy"] for run in result["runs"]} >= {"least_load", "cost", "dynamo", "added_time"}
    assert all(run["completed"] == 30 for run in result["runs"])
    assert "added_time over dynamo on 2 instances" in capsys.readouterr().out


def test_the_command_runs_the_papers_studies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    command = ["sim", "--experiment", "memserve", "--quick", "--requests", "12", "--policy", "prompt_tree"]
    assert main([*command, "--json", str(out)]) == 0
    result = json.loads(out.read_text(encoding="utf-8"))
    assert len(result["runs"]) == 3 * 8 * 2
    assert result["claims"]
    printed = capsys.readouterr().out
    for figure in ("Figure 8", "Figure 12", "Figure 13", "Figure 15"):
        assert figure in printed

"""``loadgen bench kv-transfer``'s layouts without processes: pieces, places, ratios and verdicts."""

import itertools

import pytest

from loadgen.bench.kv_layout_report import CLAIMS, lines, of, verdict
from loadgen.bench.kv_layout_rounds import Reading
from loadgen.bench.kv_layout_sender import Timed
from loadgen.bench.kv_layouts import Pool, Shape, Way
from loadgen.bench.rounds import Ratio

# Three blocks, the last of them not full.
SHAPE = Shape(prompt_tokens=40, layers=2, heads=3, head_dim=4)
BY_REQUEST = [way for way in Way if not way.by_layer]


def test_a_prompt_travels_in_as_many_messages_as_the_paper_counts() -> None:
    # Section 4: two calls for each layer and group of tokens, or one for each group.
    llama = Shape(prompt_tokens=2048, layers=40, heads=40, head_dim=128)
    counts = [llama.messages(way) for way in Way]
    assert counts == [10_240, 10_240, 128, 40, 1]
    assert SHAPE.size_bytes == 3 * 16 * 2 * 2 * 3 * 4 * 4


@pytest.mark.parametrize("way", Way)
def test_pieces_are_as_many_as_is_said_and_bring_all_to_its_place(way: Way) -> None:
    sender = Pool(way, SHAPE, Pool.memory_for(SHAPE), reversed_order=False)
    receiver = Pool(way, SHAPE, Pool.memory_for(SHAPE), reversed_order=True)
    sender.fill()
    layers = range(SHAPE.layers) if way.by_layer else (None,)
    sent = 0
    for layer in layers:
        assert not receiver.holds_what_was_filled()
        if way is Way.AGGREGATED_BY_LAYER:
            assert layer is not None
            receiver.copy_in(layer, sender.copy_out(layer))
            sent += 1
            continue
        for piece, target in zip(sender.pieces(layer), receiver.pieces(layer), strict=True):
            assert piece.is_contiguous() and target.is_contiguous()
            target.copy_(piece)
            sent += 1
    assert receiver.holds_what_was_filled()
    assert sent == SHAPE.messages(way)


@pytest.mark.parametrize("way", [Way.DISCRETE_BY_REQUEST, Way.AGGREGATED_BY_REQUEST])
def test_blocks_are_no_neighbours(way: Way) -> None:
    pool = Pool(way, SHAPE, Pool.memory_for(SHAPE), reversed_order=True)
    assert all(abs(one - other) > 1 for one, other in itertools.pairwise(pool.blocks))


def test_a_reading_is_of_each_prompt_by_itself() -> None:
    timed = [Timed(11.0, 11.5, 2), Timed(13.0, 13.25, 2), Timed(14.0, 15.0, 2)]
    assert Reading.of(10.0, timed) == Reading(computed_s=1.0, after_s=0.5, all_s=5.0, requests=2)


def test_claims_are_judged_by_ratios_round_by_round() -> None:
    readings = {
        way: [Reading(1.0, factor * place, 1.0 + factor * place, 1) for factor in (0.1, 0.2, 0.4)]
        for place, way in enumerate(Way, 1)
    }
    found = {"alone": readings, "loaded": readings}
    # Aggregated stands at the third place, discrete at the first.
    assert of(CLAIMS[0], found).median == pytest.approx(3.0)
    assert [verdict(of(claim, found)) for claim in CLAIMS[:2]] == ["DOES NOT HOLD"] * 2
    assert verdict(Ratio(0.9, 0.8, 0.99, 3)) == "holds"
    assert verdict(Ratio(0.9, 0.8, 1.1, 3)) == "cannot be told"
    told = lines(readings, SHAPE)
    assert "12 messages, 1 requests" in told[0] and "after it is computed  200.0 ms, 1.000" in told[0]
    assert "3 messages" in told[2] and "3.000 (3.000 to 3.000)" in told[2]

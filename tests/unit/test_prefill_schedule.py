"""The order of prefill (TetriInfer, sections 3.3.1 and 3.3.3): chunks, batches, and by how many one is overtaken."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.policies.language.prefill_schedule import ChunkPiece, PrefillOrder, PrefillSchedule


def _schedule(order: PrefillOrder, prompts: dict[str, int], **options: object) -> PrefillSchedule:
    schedule = PrefillSchedule(order, **options)  # type: ignore[arg-type]
    for number, (name, tokens) in enumerate(prompts.items()):
        schedule.add(name, tokens, number, float(number))
    return schedule


def _chunks(schedule: PrefillSchedule, tokens: int) -> list[tuple[tuple[tuple[str, int], ...], int]]:
    found = []
    while len(schedule):
        chunk = schedule.next_chunk(tokens)
        found.append((tuple((piece.name, piece.count) for piece in chunk.pieces), chunk.padding))
    return found


def test_prompts_are_sliced_and_merged_and_only_the_last_chunk_is_padded() -> None:
    schedule = _schedule(PrefillOrder.FCFS, {"a": 700, "b": 100, "c": 400})
    assert schedule.tokens == 1200
    assert schedule.next_chunk(512).pieces == (ChunkPiece("a", 512, False),)
    assert _chunks(schedule, 512) == [((("a", 188), ("b", 100), ("c", 224)), 0), ((("c", 176),), 336)]
    assert schedule.tokens == 0 and schedule.next_chunk(512).pieces == ()


def test_twenty_prompts_in_batches_of_ten_are_sorted_ten_by_ten() -> None:
    prompts = {f"p{number}": 10 + (7 * number) % 20 for number in range(20)}
    order = [name for pieces, _ in _chunks(_schedule(PrefillOrder.SJF, prompts, batch=10), 1) for name, _ in pieces]
    first, second = list(prompts)[:10], list(prompts)[10:]
    expected = sorted(first, key=prompts.__getitem__) + sorted(second, key=prompts.__getitem__)
    assert list(dict.fromkeys(order)) == expected


def test_the_longest_job_first_and_of_equals_the_first_to_come() -> None:
    schedule = _schedule(PrefillOrder.LJF, {"a": 1, "b": 3, "c": 3, "d": 2})
    assert [piece.name for piece in schedule.next_chunk(100).pieces] == ["b", "c", "d", "a"]


def test_the_papers_batches_do_not_share_a_chunk_and_ours_do() -> None:
    prompts = {"a": 300, "b": 300, "c": 300}
    paper = _chunks(_schedule(PrefillOrder.SJF, prompts, batch=2, merges_batches=False), 512)
    assert [padding for _, padding in paper] == [0, 424, 212]
    ours = _chunks(_schedule(PrefillOrder.SJF, prompts, batch=2), 512)
    assert [padding for _, padding in ours] == [0, 124]


def test_a_batch_is_not_joined_by_who_comes_later() -> None:
    schedule = _schedule(PrefillOrder.SJF, {"a": 600, "b": 700}, batch=16)
    schedule.next_chunk(512)
    schedule.add("short", 1, 2, 2.0)
    assert [n for p, _ in _chunks(schedule, 512) for n, _ in p] == ["a", "b", "b", "short"]


def test_one_that_comes_back_is_before_those_that_came_after_it() -> None:
    schedule = _schedule(PrefillOrder.FCFS, {"a": 10, "b": 10, "c": 10}, batch=1)
    schedule.remove("a")
    assert schedule.head() == "b"
    schedule.add("a", 20, 0, 0.0)
    assert schedule.head() == "a"
    schedule.remove("nobody")


def test_a_short_prompt_preempts_a_long_one_between_two_chunks() -> None:
    schedule = _schedule(PrefillOrder.SRF, {"long": 2000})
    schedule.next_chunk(512)
    schedule.add("short", 300, 1, 0.1)
    schedule.add("longer", 1600, 2, 0.2)
    assert schedule.next_chunk(512).pieces == (ChunkPiece("short", 300, True), ChunkPiece("long", 212, False))
    assert schedule.head() == "long"


def test_ageing_lets_a_long_prompt_through() -> None:
    schedule = PrefillSchedule(PrefillOrder.SRF, ageing=100.0)
    schedule.add("long", 1000, 0, 0.0)
    schedule.add("soon", 500, 1, 4.9)
    schedule.add("late", 500, 2, 5.1)
    assert [n for p, _ in _chunks(schedule, 100) for n, _ in p] == [*["soon"] * 5, *["long"] * 10, *["late"] * 5]


def test_nonsense_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one prompt"):
        PrefillSchedule(batch=0)


# Prompts with the number of chunks that are computed before each comes.
_ARRIVALS = st.lists(st.tuples(st.integers(1, 900), st.integers(0, 3)), min_size=1, max_size=40)


@settings(max_examples=150, deadline=None)
@given(
    arrivals=_ARRIVALS,
    order=st.sampled_from([PrefillOrder.FCFS, PrefillOrder.SJF, PrefillOrder.LJF]),
    batch=st.integers(1, 9),
    merges=st.booleans(),
)
def test_nobody_is_overtaken_by_more_than_a_batch_less_one(
    arrivals: list[tuple[int, int]], order: PrefillOrder, batch: int, merges: bool
) -> None:
    schedule = PrefillSchedule(order, batch, merges_batches=merges)
    done: list[int] = []

    def compute() -> None:
        chunk = schedule.next_chunk(512)
        done.extend(int(piece.name) for piece in chunk.pieces if piece.last)
        total = sum(piece.count for piece in chunk.pieces)
        assert total + chunk.padding == 512
        assert chunk.padding == 0 or not merges or not len(schedule)

    for number, (tokens, chunks) in enumerate(arrivals):
        for _ in range(chunks):
            compute()
        schedule.add(str(number), tokens, number, 0.0)
    while len(schedule):
        compute()
    assert sorted(done) == list(range(len(arrivals)))
    for number in done:
        overtakers = [other for other in done[: done.index(number)] if other > number]
        assert len(overtakers) <= batch - 1


@settings(max_examples=100, deadline=None)
@given(
    arrivals=st.lists(st.tuples(st.integers(1, 900), st.floats(0, 3)), min_size=1, max_size=30),
    ageing=st.floats(10, 2000),
)
def test_nobody_is_overtaken_by_who_comes_much_later(arrivals: list[tuple[int, float]], ageing: float) -> None:
    """The bound in time: after n / ageing seconds no newcomer is before a prompt of n tokens."""
    schedule = PrefillSchedule(PrefillOrder.SRF, ageing=ageing)
    now_s = 0.0
    came: dict[int, float] = {}
    done: list[int] = []
    for number, (tokens, wait_s) in enumerate(arrivals):
        now_s += wait_s
        came[number] = now_s
        schedule.add(str(number), tokens, number, now_s)
        if number % 2:
            done += [int(piece.name) for piece in schedule.next_chunk(256).pieces if piece.last]
    while len(schedule):
        done += [int(piece.name) for piece in schedule.next_chunk(256).pieces if piece.last]
    for place, number in enumerate(done):
        for other in done[:place]:
            assert came[other] - came[number] <= arrivals[number][0] / ageing + 1e-6

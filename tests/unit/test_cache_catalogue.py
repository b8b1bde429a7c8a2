"""What cache stores compare: digests that say where two of them differ, and what was dropped lately."""

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from services.cache_store.catalogue import BUCKETS, Catalogue
from services.cache_store.dropped import REMEMBERED_S, Dropped, DroppedFile

CHANGES = st.lists(st.tuples(st.sampled_from("abcdefgh"), st.none() | st.integers(0, 3)), max_size=30)


def catalogue(changes: list[tuple[str, int | None]]) -> Catalogue:
    kept = Catalogue()
    for key, version in changes:
        kept.note(key, version)
    return kept


def contents(kept: Catalogue) -> dict[str, int]:
    return {key: version for number in range(BUCKETS) for key, version in kept.bucket(number).items()}


@given(CHANGES, CHANGES)
def test_digests_differ_exactly_where_contents_do(some: list[tuple[str, int | None]], others: list) -> None:  # type: ignore[type-arg]
    one, other = catalogue(some), catalogue(others)
    assert contents(one) == {key: version for key, version in dict(some).items() if version is not None}
    for number in range(BUCKETS):
        assert (one.digests[number] == other.digests[number]) == (one.bucket(number) == other.bucket(number))


def test_the_later_of_two_drops_counts() -> None:
    dropped = Dropped()
    for at_s in (3.0, 7.0, 5.0):
        dropped.note("a", at_s)
    assert (dropped.at_s("a"), dropped.at_s("b")) == (7.0, None)
    dropped.forget(before_s=7.1)
    assert dict(dropped) == {}


def test_what_was_dropped_lately_is_known_to_the_next_life(tmp_path: Path) -> None:
    path = tmp_path / "dropped.log"
    file = DroppedFile(path)
    assert dict(file.read(0.0)) == {}
    for key, at_s in (("old", 10.0), ("b", 5000.0), ("a", 6000.0), ("b", 7000.0)):
        file.append(key, at_s)
    # What a killed process and a damaged disk leave.
    path.write_bytes(path.read_bytes() + b'\xff\n{"key": 1}\n[1, 2]\n["half", 70')
    read = DroppedFile(path).read(now_s=11.0 + REMEMBERED_S)
    assert dict(read) == {"a": 6000.0, "b": 7000.0}
    assert path.read_text().count("\n") == 2

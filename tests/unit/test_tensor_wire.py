"""What tensors' processes say to each other: requests and pieces."""

import pytest

from common.tensors.wire import (
    MAXIMUM_PIECES,
    MAXIMUM_TENSORS,
    FetchRequest,
    Kind,
    piece_size,
    pieces_of,
    read_tag,
    tag_of,
)

REQUEST = FetchRequest((2**62, 5), (0, 3 << 20), 1 << 20, 1.5, 3, b"address", (7, 2**63))


def test_a_tag_says_kind_fetch_and_piece() -> None:
    assert read_tag(tag_of(Kind.PIECE, 2**40 - 1, 2**16 - 1)) == (Kind.PIECE, 2**40 - 1, 2**16 - 1)


@pytest.mark.parametrize("taken", [(), (7, 2**63)])
def test_a_request_crosses_the_wire(taken: tuple[int, ...]) -> None:
    request = REQUEST._replace(taken=taken)
    assert FetchRequest.unpack(request.pack()) == request


@pytest.mark.parametrize(
    "damaged",
    [
        b"",
        REQUEST.pack()[:-1],
        REQUEST.pack()[:60],
        b"\x02" + REQUEST.pack()[1:],
        REQUEST._replace(tensor_ids=()).pack(),
        REQUEST._replace(tensor_ids=(1,) * (MAXIMUM_TENSORS + 1), sizes_bytes=(1,) * (MAXIMUM_TENSORS + 1)).pack(),
        REQUEST._replace(piece_bytes=0).pack(),
        REQUEST._replace(sizes_bytes=(0, 1 << 62)).pack(),
    ],
)
def test_what_is_no_request_is_refused(damaged: bytes) -> None:
    with pytest.raises(ValueError, match=r"request|tensors|identifiers|pieces"):
        FetchRequest.unpack(damaged)


def test_pieces_are_counted_through_all_tensors_and_one_of_no_bytes_has_one() -> None:
    assert pieces_of([5, 0, 4], 4) == [(0, 0, 4), (0, 4, 5), (1, 0, 0), (2, 0, 4)]
    assert pieces_of([5, 0, 4], 5) == [(0, 0, 5), (1, 0, 0), (2, 0, 4)]


@pytest.mark.parametrize("sizes", [[1 << 36], [MAXIMUM_PIECES * 4096 - 1, 1], [4097] * MAXIMUM_TENSORS, [0]])
def test_pieces_grow_where_there_would_be_too_many(sizes: list[int]) -> None:
    piece_bytes = piece_size(sizes, 4096)
    assert piece_bytes >= 4096 and len(pieces_of(sizes, piece_bytes)) <= MAXIMUM_PIECES

"""Every message survives the wire, and bytes that are not the message expected are refused by name."""

import enum
import inspect
import pkgutil
import types
import typing
from importlib import import_module
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

import common.messages
from common.messages import subjects
from common.messages.base import Message, MessageError, kind_of
from common.messages.chat import pack_tokens, tokens_in, unpack_tokens
from common.messages.cluster import Heartbeat
from common.messages.failures import Acknowledged, Failure, Stage
from common.messages.subjects import Bucket, EventSubject, ObjectBucket, RequestSubject, WorkQueue
from common.messages.video import VideoQueued, VideoRecord

_LARGEST = 2**63 - 1


def message_classes() -> list[type[Message]]:
    """Every message of the package, found rather than listed, so that a new one is tested too."""
    for module in pkgutil.iter_modules(common.messages.__path__):
        import_module(f"common.messages.{module.name}")
    found: list[type[Message]] = []
    waiting = Message.__subclasses__()
    while waiting:
        kind = waiting.pop()
        waiting += kind.__subclasses__()
        if kind.__module__.startswith("common.messages."):
            found.append(kind)
    return sorted(set(found), key=lambda kind: kind.__name__)


def values_of(annotation: Any, smallest: int = -_LARGEST) -> st.SearchStrategy[Any]:
    """Values that a field of this annotation may have."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is type(None):
        return st.none()
    if origin in (typing.Union, types.UnionType):
        return st.one_of(*(values_of(argument, smallest) for argument in arguments))
    if origin is tuple and arguments[-1] is Ellipsis:
        return st.lists(values_of(arguments[0]), max_size=3).map(tuple)
    if origin is tuple:
        return st.tuples(*(values_of(argument) for argument in arguments))
    if origin is dict:
        return st.dictionaries(values_of(arguments[0]), values_of(arguments[1]), max_size=3)
    if inspect.isclass(annotation) and issubclass(annotation, Message):
        return messages_of(annotation)
    if inspect.isclass(annotation) and issubclass(annotation, enum.Enum):
        return st.sampled_from(list(annotation))
    scalars: dict[Any, st.SearchStrategy[Any]] = {
        bool: st.booleans(),
        int: st.integers(smallest, _LARGEST),
        float: st.floats(allow_nan=False),
        str: st.text(max_size=20),
        bytes: st.binary(max_size=20),
    }
    return scalars[annotation]


def messages_of(kind: type[Message]) -> st.SearchStrategy[Message]:
    """Instances of ``kind``, fields with defaults given or not."""
    required: dict[str, st.SearchStrategy[Any]] = {}
    optional: dict[str, st.SearchStrategy[Any]] = {}
    for name, field in kind.model_fields.items():
        bounds = [bound for note in field.metadata for bound in [getattr(note, "ge", None)] if bound is not None]
        values = values_of(field.annotation, max([-_LARGEST, *bounds]))
        (required if field.is_required() else optional)[name] = values
    return st.fixed_dictionaries(required, optional=optional).map(lambda fields: kind(**fields))


@pytest.mark.parametrize("kind", message_classes(), ids=lambda kind: kind.__name__)
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_what_is_packed_comes_back_the_same(kind: type[Message], data: st.DataObject) -> None:
    message = data.draw(messages_of(kind))
    packed = message.pack()
    assert kind.unpack(packed) == message
    assert kind.unpack(packed).pack() == packed
    assert kind_of(packed) == kind.__name__


def test_kinds_are_told_apart_by_name_alone() -> None:
    names = [kind.__name__ for kind in message_classes()]
    assert len(names) == len(set(names))
    assert len(names) > 10


@settings(deadline=None)
@given(garbage=st.binary(max_size=200))
def test_garbage_is_refused(garbage: bytes) -> None:
    with pytest.raises(MessageError):
        Acknowledged.unpack(b"\xc1" + garbage)
    try:
        VideoRecord.unpack(garbage)
    except MessageError:
        return
    raise AssertionError("random bytes were taken for a VideoRecord")


@settings(deadline=None)
@given(
    body=st.recursive(
        st.none() | st.booleans() | st.integers(-_LARGEST, _LARGEST) | st.floats() | st.text() | st.binary(),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
        max_leaves=10,
    )
)
def test_msgpack_that_is_no_message_is_refused(body: object) -> None:
    for envelope in (body, ["Heartbeat", 1, body], ["Heartbeat", body, {}], [body, 1, {}]):
        with pytest.raises(MessageError):
            Heartbeat.unpack(msgpack.packb(envelope))


def test_a_cut_message_is_refused_at_every_length() -> None:
    packed = Failure(stage=Stage.DIT, code="lost", message="the worker is gone").pack()
    for length in range(len(packed)):
        with pytest.raises(MessageError):
            Failure.unpack(packed[:length])
    with pytest.raises(MessageError):
        Failure.unpack(packed + b"\x00")


def test_another_kind_is_named() -> None:
    with pytest.raises(MessageError, match="expected a Heartbeat, got a VideoQueued"):
        Heartbeat.unpack(VideoQueued(job_id="a").pack())


def test_another_version_says_what_to_do() -> None:
    packed = msgpack.packb(["VideoQueued", 2, {"job_id": "a"}])
    with pytest.raises(MessageError, match="expected version 1, got 2; upgrade the older process"):
        VideoQueued.unpack(packed)


@pytest.mark.parametrize(
    ("body", "named"),
    [({}, "job_id"), ({"job_id": "a", "priority": 1}, "priority"), ({"job_id": ["a"]}, "job_id")],
)
def test_fields_that_do_not_fit_are_named(body: dict[str, object], named: str) -> None:
    with pytest.raises(MessageError, match=f"(?s)VideoQueued.*{named}"):
        VideoQueued.unpack(msgpack.packb(["VideoQueued", 1, body]))


def test_a_field_left_at_its_default_takes_no_room_and_is_the_default_again() -> None:
    failure = Failure(stage=Stage.VAE, code="lost", message="gone")
    assert "retryable" not in msgpack.unpackb(failure.pack())[2]
    assert Failure.unpack(failure.pack()).retryable is False


def test_a_message_cannot_be_changed() -> None:
    message = VideoQueued(job_id="a")
    with pytest.raises(ValidationError):
        message.job_id = "b"  # type: ignore[misc]


@pytest.mark.parametrize("value", ["\ud800", "a" + "\udfff"])
def test_text_that_no_wire_can_carry_is_refused(value: str) -> None:
    with pytest.raises(MessageError, match="VideoQueued cannot be packed"):
        VideoQueued(job_id=value).pack()


def _declared(*kinds: type[Any]) -> dict[str, Any]:
    return {name: value for name, value in vars(subjects).items() if isinstance(value, kinds)}


def test_no_two_subjects_overlap() -> None:
    patterns = [value.pattern for value in _declared(RequestSubject, EventSubject, WorkQueue).values()]
    assert len(patterns) > 5
    for one in patterns:
        for other in patterns:
            if one is not other:
                assert not _overlap(one, other), f"{one} and {other} can be the same subject"


def _overlap(one: str, other: str) -> bool:
    first, second = one.split("."), other.split(".")
    return len(first) == len(second) and all("{}" in (a, b) or a == b for a, b in zip(first, second, strict=True))


def test_stored_names_are_unique_and_bounded() -> None:
    stores = _declared(Bucket, ObjectBucket, WorkQueue).values()
    names = [store.name for store in stores]
    assert len(names) == len(set(names))
    for store in stores:
        bound = store.max_messages if isinstance(store, WorkQueue) else store.max_bytes
        assert bound > 0


def test_token_ids_are_little_endian_and_come_back_the_same() -> None:
    tokens = [0, 1, 258, 2**32 - 1]
    packed = pack_tokens(tokens)
    assert packed[:8] == b"\0\0\0\0\1\0\0\0"
    assert unpack_tokens(packed) == tokens
    assert tokens_in(packed) == len(tokens)
    with pytest.raises(OverflowError):
        pack_tokens([2**32])
    with pytest.raises(ValueError):
        unpack_tokens(b"\0\0\0\0\0")

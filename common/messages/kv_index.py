"""What an instance's memory has: told to the scheduler change by change, and whole where that is needed.

Heard at most once. Numbers and digests (``common.policies.language.prompt_index``) show what was missed; then the whole
is asked for, in parts that fit a message.
"""

from pydantic import Field

from common.messages.base import Message


class IndexChanged(Message):
    """One change of an instance's index.

    ``incarnation`` is higher with every start of the instance, ``number`` counts its changes from 1. ``tokens``:
    packed, whole blocks from the first token on. ``kept_blocks`` None: all of them are there now; otherwise no more
    than so many are left of them. ``blocks`` and ``digest``: what the instance has with this change.
    """

    instance: str
    incarnation: int = Field(ge=0)
    number: int = Field(ge=1)
    tokens: bytes
    kept_blocks: int | None = Field(default=None, ge=0)
    blocks: int = Field(ge=0)
    digest: int = Field(ge=0)


class AskIndex(Message):
    """What is there? ``part`` 0 is taken now; later parts belong to the last part 0."""

    part: int = Field(ge=0)


class IndexTold(Message):
    """One of ``parts`` of all that an instance had after its change ``number``."""

    instance: str
    incarnation: int = Field(ge=0)
    number: int = Field(ge=0)
    part: int = Field(ge=0)
    parts: int = Field(ge=1)
    sequences: tuple[bytes, ...]
    blocks: int = Field(ge=0)
    digest: int = Field(ge=0)


class AskView(Message):
    """Asked of a scheduler: what do you take instances to have?"""


class InstanceViewed(Message):
    """What a scheduler has heard of one instance: up to its change ``number``, with ``blocks`` and ``digest`` then.

    ``awaited``: it knows that it has missed something, and waits for the whole.
    """

    instance: str
    incarnation: int = Field(ge=0)
    number: int = Field(ge=0)
    awaited: bool
    blocks: int = Field(ge=0)
    digest: int = Field(ge=0)


class ViewTold(Message):
    """Every instance of which anything was heard."""

    instances: tuple[InstanceViewed, ...]

"""The scheduler's settings."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from common.policies.language.decode_dispatch import DispatchRule
from common.runtime.settings import ServiceSettings


def _none_if_empty(value: object) -> object:
    """A compose file has no way to leave a variable out; an empty path is none."""
    return None if value == "" else value


OptionalPath = Annotated[Path | None, BeforeValidator(_none_if_empty)]


class SchedulerSettings(ServiceSettings):
    """``max_admitted`` jobs are known to the policy at once; the rest wait in the work queue.

    ``policy``: by the name it has in the registry. ``rib``: the file with the profile that it decides by (without one,
    the paper's table). ``record``: the file to which all events go, to be played again in the simulator.

    ``routing``: the rule, of ``common.policies.language.chat_rule.CHAT_RULES``, by which chats find their instances;
    empty: the fewest tokens to prefill. ``costs``: the file with the profile of the language model, for rules that
    weigh times. Without one they take an instance to prefill ``prefill_tokens_s`` tokens a second, and to send the keys
    and values of ``transfer_tokens_s`` of them. ``dispatch``: who decodes is chosen here with ``scheduler``; with any
    of the rules, by the prefill instances (TetriInfer, section 3.3.4).

    ``flip``: by which policy of ``common.policies.language.flip`` language instances change their roles, if at all:
    ``idle`` after ``flip_idle_s`` without work, ``queue`` once another split would have spared sequences waiting for
    ``flip_cost_s`` seconds for each instance.
    """

    policy: str = "ddit"
    rib: OptionalPath = None
    record: OptionalPath = None
    routing: str = ""
    costs: OptionalPath = None
    prefill_tokens_s: float = Field(default=2000.0, gt=0)
    transfer_tokens_s: float = Field(default=20_000.0, gt=0)
    dispatch: Literal["scheduler"] | DispatchRule = "scheduler"
    flip: Literal["off", "idle", "queue"] = "off"
    flip_cost_s: float = Field(default=5.0, gt=0)
    flip_idle_s: float = Field(default=60.0, gt=0)
    max_admitted: int = Field(default=64, ge=1)
    drain_s: float = Field(default=10.0, ge=0)

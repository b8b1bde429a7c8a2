"""What a scheduler's settings come to: its policy, its rule for chats and its record, or why they cannot be used."""

import contextlib

from common.mempool.address import BLOCK_TOKENS
from common.policies.chat_rule import ChatRule
from common.policies.flip import FlipPolicy, IdleFlip, QueueFlip
from common.policies.policy import Policy
from common.policies.prefill_cost import DecodeCost, LinkCost, RateCost
from common.policies.registry import UnknownPolicy, make_policy
from common.policies.rib import Rib, WrongRib
from common.policies.routing import Costs
from common.policies.routing_rules import UnknownRule, make_rule
from common.runtime.process import CannotServe
from services.scheduler.config import SchedulerSettings
from services.scheduler.record import EventRecord


def choose_policy(settings: SchedulerSettings, first_epoch: int) -> Policy:
    """The policy that is set, with the profile that is set.

    Raises:
        CannotServe: there is no such policy, or the file is no profile.
    """
    try:
        rib = Rib.from_json(settings.rib.read_text(encoding="utf-8")) if settings.rib is not None else None
        return make_policy(settings.policy, first_epoch, rib)
    except (OSError, UnicodeDecodeError, WrongRib) as error:
        raise CannotServe(f"TRIPTYCH_RIB: {settings.rib} cannot be used: {error}") from error
    except UnknownPolicy as error:
        raise CannotServe(f"TRIPTYCH_POLICY: {error}") from error


def choose_rule(settings: SchedulerSettings) -> ChatRule | None:
    """The rule that is set for chats; None: none is.

    Raises:
        CannotServe: there is no such rule.
    """
    if not settings.routing:
        return None
    try:
        rule = make_rule(settings.routing)
    except UnknownRule as error:
        raise CannotServe(f"TRIPTYCH_ROUTING: {error}") from error
    costs = Costs(
        prefill=RateCost(settings.prefill_tokens_s),
        # As if each token of an answer were one of a prompt.
        decode=DecodeCost(0.0, 1 / settings.prefill_tokens_s, 0.0),
        link=LinkCost(settings.transfer_tokens_s, 0.0),
        kv_token_bytes=1,
        block_tokens=BLOCK_TOKENS,
    )
    return ChatRule(rule, costs, settings.kv_tokens)


def choose_flips(settings: SchedulerSettings) -> FlipPolicy | None:
    """The policy that is set for roles; None: they stay what they are."""
    match settings.flip:
        case "idle":
            return IdleFlip(settings.flip_idle_s)
        case "queue":
            return QueueFlip(settings.flip_cost_s)
        case "off":
            return None


def open_record(settings: SchedulerSettings) -> contextlib.AbstractContextManager[EventRecord | None]:
    """The record that is set, if any.

    Raises:
        CannotServe: it cannot be written to.
    """
    if settings.record is None:
        return contextlib.nullcontext()
    try:
        return EventRecord(settings.record)
    except OSError as error:
        raise CannotServe(f"TRIPTYCH_RECORD: {settings.record} cannot be written to: {error}") from error

"""What a scheduler's settings come to: its policy, its rule for chats and its record, or why they cannot be used."""

import contextlib

import structlog

from common.mempool.address import BLOCK_TOKENS
from common.policies.language.chat_rule import CHAT_RULES, ChatRule, guessed_costs
from common.policies.language.flip import FlipPolicy, IdleFlip, QueueFlip
from common.policies.language.flip_demand import doubling_batch
from common.policies.language.language_costs import LanguageCosts, WrongLanguageCosts
from common.policies.language.routing import Costs
from common.policies.language.routing_rules import UnknownRule, make_rule
from common.policies.video.policy import Policy
from common.policies.video.registry import UnknownPolicy, make_policy
from common.policies.video.rib import Rib, WrongRib
from common.runtime.process import CannotServe
from services.scheduler.config import SchedulerSettings
from services.scheduler.record import EventRecord

log = structlog.get_logger()


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


def choose_rule(settings: SchedulerSettings) -> ChatRule:
    """The rule that is set for chats, with the profile that is set.

    Raises:
        CannotServe: there is no such rule, or the file has no costs of a language model.
    """
    try:
        rule = make_rule(settings.routing or "fewest_tokens", CHAT_RULES)
    except UnknownRule as error:
        raise CannotServe(f"TRIPTYCH_ROUTING: {error}") from error
    return ChatRule(rule, _costs(settings))


def log_rule(settings: SchedulerSettings) -> None:
    """Say what chats are routed by."""
    rule = settings.routing or "fewest_tokens"
    if settings.costs is not None:
        log.info("chats are routed", rule=rule, costs=str(settings.costs))
    else:
        rates = {"prefill_tokens_s": settings.prefill_tokens_s, "transfer_tokens_s": settings.transfer_tokens_s}
        log.info("chats are routed, costs not profiled but set", rule=rule, **rates)


def _costs(settings: SchedulerSettings) -> Costs:
    if settings.costs is None:
        return guessed_costs(settings.prefill_tokens_s, settings.transfer_tokens_s)
    try:
        found = LanguageCosts.from_json(settings.costs.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, WrongLanguageCosts) as error:
        raise CannotServe(f"TRIPTYCH_COSTS: {settings.costs} cannot be used: {error}") from error
    if found is None:
        raise CannotServe(f"TRIPTYCH_COSTS: {settings.costs} has no costs of a language model; triptych profile does")
    return Costs(
        found.prefill, found.decode, found.link, found.kv_token_bytes, BLOCK_TOKENS, found.prefill.chunk_tokens
    )


def choose_flips(settings: SchedulerSettings, costs: Costs) -> FlipPolicy | None:
    """The policy that is set for roles; None: they stay what they are. ``costs``: what chats are routed by."""
    match settings.flip:
        case "idle":
            return IdleFlip(settings.flip_idle_s)
        case "queue":
            return QueueFlip(settings.flip_cost_s, doubling_batch(costs.decode))
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

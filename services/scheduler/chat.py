"""Routes chats: turns what gateways ask into events for the dispatch policy, and its decisions into answers.

Nothing here is kept: a scheduler that starts anew counts no load of what runs already, and is told of its end in vain.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Collection

import structlog

from common.bus.errors import BusError, Refusal
from common.bus.port import Bus
from common.mempool.address import TOKEN_BYTES
from common.messages.chat import ChatEnded, ChatPrefilled, ChatRoute, ChatsUnderWay, RouteChat
from common.messages.cluster import LanguageRole, Member, MemberState, Service
from common.messages.failures import Failure, Stage
from common.messages.mempool import SendPrefix
from common.messages.subjects import CHAT_ENDED, CHAT_PREFILLED, CHATS_UNDER_WAY, ROUTE_CHAT, SEND_PREFIX
from common.policies.language import chat_events as event
from common.policies.language.chat_dispatch import ChatDispatch
from common.policies.language.chat_rule import ChatRule
from common.policies.language.flip import ChatLoad, InstanceLoad
from common.runtime.membership import MemberChange, MemberDraining, MemberJoined, MemberLost, MemberRolesChanged
from services.scheduler.decode_loads import DecodeLoadMonitor
from services.scheduler.prompt_view import PromptView

log = structlog.get_logger()

_MAX_WAITING = 4096
_LEAST_PULL_S = 0.1


class ChatRouter:
    """Answers gateways. ``doubt`` is told of instances at which a gateway found nobody.

    ``dispatched``: prefill instances choose who decodes, and are told how those are.
    """

    def __init__(
        self,
        bus: Bus,
        first_epoch: int,
        doubt: Callable[[str], None],
        rule: ChatRule,
        dispatched: bool = False,
    ) -> None:
        self._bus = bus
        self._policy = ChatDispatch(first_epoch, rule, dispatched)
        self._loads = DecodeLoadMonitor(bus) if dispatched else None
        self._doubt = doubt
        self._asked: dict[str, asyncio.Future[event.RouteSequence]] = {}
        self._prompts = PromptView(bus)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Answer while the block runs."""
        # Nobody is routed of whose end it could not be told.
        subscriptions = [
            await self._bus.subscribe(CHAT_PREFILLED, self._prefilled),
            await self._bus.subscribe(CHAT_ENDED, self._ended),
            await self._bus.subscribe(CHATS_UNDER_WAY, self._under_way),
            await self._bus.serve(ROUTE_CHAT, self._route, max_in_flight=_MAX_WAITING),
        ]
        try:
            async with self._prompts.running(), self._loads.running() if self._loads else contextlib.nullcontext():
                yield
        finally:
            for answer in self._asked.values():
                _refuse(answer, "stopping", "this scheduler stops")
            for subscription in reversed(subscriptions):
                await subscription.stop(deadline_s=1.0)

    def member_changed(self, change: MemberChange) -> None:
        """Take in who comes and goes."""
        member = change.member
        match change:
            case MemberJoined() if member.roles:
                self._prompts.follow(member.instance)
                self._tell(event.InstanceJoined(member.instance, member.roles, _room(member)))
                self._have_roles(member.instance, member.roles)
            case MemberRolesChanged() if member.state is MemberState.READY:
                # Who drains takes nothing new, whatever it was about to do.
                self.roles_changed(member.instance, member.roles)
            case MemberDraining() if member.roles:
                self._tell(event.InstanceDraining(member.instance))
                self._have_roles(member.instance, ())
            case MemberLost() if member.roles:
                self._prompts.forget(member.instance)
                self._tell(event.InstanceLost(member.instance))
                self._have_roles(member.instance, ())
            case MemberLost() if member.service is Service.GATEWAY:
                self._tell(event.GatewayLost(member.instance))
            case _:
                pass

    def roles_changed(self, instance: str, roles: tuple[LanguageRole, ...]) -> None:
        """Route by these roles from now on; what it has goes on counting."""
        self._tell(event.RolesChanged(instance, roles))
        self._have_roles(instance, roles)

    def loads(self, flipping: str) -> list[InstanceLoad]:
        """See ``ChatDispatch.loads``."""
        return self._policy.loads(flipping)

    def chats(self) -> ChatLoad:
        """See ``ChatDispatch.chats``."""
        return self._policy.chats()

    def decoding(self, but: str) -> list[str]:
        """See ``ChatDispatch.decoding``."""
        return self._policy.decoding(but)

    def _have_roles(self, instance: str, roles: Collection[LanguageRole]) -> None:
        if self._loads is not None:
            self._loads.has_roles(instance, roles)

    async def _route(self, asked: RouteChat) -> ChatRoute:
        for instance in asked.gone:
            self._doubt(instance)
        answer: asyncio.Future[event.RouteSequence] = asyncio.get_running_loop().create_future()
        end_s = asyncio.get_running_loop().time() + asked.wait_s
        best = min(self._prompts.best(asked.tokens), asked.prompt_tokens - 1)
        former = self._asked.get(asked.request_id)
        if former is not None:
            _refuse(former, "overtaken", "the sequence was asked for again")
        self._asked[asked.request_id] = answer
        cached = self._prompts.cached(asked.tokens)
        self._tell(
            event.ChatArrived(
                asked.request_id,
                asked.gateway,
                asked.created_at_s,
                asked.prompt_tokens,
                asked.max_tokens,
                (*asked.avoid, *asked.gone),
                cached,
                asked.conversation,
            )
        )
        try:
            async with asyncio.timeout_at(end_s):
                route = await answer
            self._prompts.expect(route.prefill, asked.tokens)
            if route.pull is not None:
                await self._pull(route, asked.tokens, end_s)
            return ChatRoute(
                request_id=route.request_id,
                epoch=route.epoch,
                prefill=route.prefill,
                decode=route.decode,
                reason=route.reason,
                best_cached_tokens=best,
                cached=() if route.decode else tuple(cached.items()),
            )
        except TimeoutError:
            raise _refusal("no_instance", f"no prefill and decode instance within {asked.wait_s:g} s") from None
        finally:
            if self._asked.get(asked.request_id) is answer:
                del self._asked[asked.request_id]
                if not answer.done() or answer.cancelled():
                    self._tell(event.ChatEnded(asked.request_id, None))

    async def _pull(self, route: event.RouteSequence, tokens: bytes, end_s: float) -> None:
        """Have the prefill instance get what it is to pull (MemServe, equation 2); without it, it computes that."""
        pull = route.pull
        assert pull is not None
        asked = SendPrefix(tokens=tokens[: pull.to_token * TOKEN_BYTES], to=route.prefill)
        moved = 0
        # The gateway does not wait much longer for its route.
        left_s = max(_LEAST_PULL_S, end_s - asyncio.get_running_loop().time())
        try:
            sent = await self._bus.request(SEND_PREFIX, asked, pull.source, deadline_s=left_s)
            moved = sent.tokens
            log.debug("pulled", request=route.request_id, source=pull.source, to=route.prefill, tokens=moved)
        except BusError as error:
            log.info("not pulled", request=route.request_id, source=pull.source, reason=str(error))
        finally:
            self._tell(event.PrefixPulled(route.request_id, route.epoch, moved))

    def _prefilled(self, report: ChatPrefilled) -> None:
        self._tell(event.ChatPrefilled(report.request_id, report.epoch, report.decode, report.decoding))

    def _ended(self, report: ChatEnded) -> None:
        asked = self._asked.get(report.request_id)
        if report.epoch is None and asked is not None:
            _refuse(asked, "overtaken", "the sequence has ended")
        self._tell(event.ChatEnded(report.request_id, report.epoch))

    def _under_way(self, report: ChatsUnderWay) -> None:
        self._tell(event.GatewayHolds(report.gateway, frozenset(report.epochs)))

    def _tell(self, happened: event.Event) -> None:
        for decision in self._policy.handle(happened, asyncio.get_running_loop().time()):
            log.debug("routed", request=decision.request_id, prefill=decision.prefill, reason=decision.reason)
            answer = self._asked.get(decision.request_id)
            if answer is not None and not answer.done():
                answer.set_result(decision)


def _room(member: Member) -> int:
    """For how many tokens it has memory."""
    return member.language_model.kv_tokens if member.language_model is not None else 0


def _refuse(answer: asyncio.Future[event.RouteSequence], code: str, message: str) -> None:
    if not answer.done():
        answer.set_exception(_refusal(code, message))


def _refusal(code: str, message: str) -> Refusal:
    return Refusal(Failure(stage=Stage.SCHEDULER, code=code, message=message, retryable=True))

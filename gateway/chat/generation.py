"""One sequence from its prompt to its last token, whatever becomes of the instances that compute it.

Tokens are heard at most once, so nothing is taken for granted: a gap in their positions, a member that is lost, or
silence about which nobody can say anything ends the attempt. The next one begins with all tokens there are, so that the
answer goes on as if nothing had happened.
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import structlog

from common.bus.errors import BusError, BusUnavailable, DeadlineExceeded, NobodyThere, RemoteFailure
from common.bus.port import Bus
from common.messages.chat import (
    MOVED,
    ChatEnded,
    ChatPrefilled,
    ChatRoute,
    FindGeneration,
    GenerateTokens,
    RouteChat,
    Sampling,
    pack_tokens,
    tokens_in,
)
from common.messages.subjects import CHAT_ENDED, CHAT_PREFILLED, FIND_GENERATION, GENERATE_TOKENS, ROUTE_CHAT
from gateway.chat.line import Broken, Line, Step
from gateway.chat.metrics import LanguageMetrics
from gateway.chat.switchboard import Switchboard
from gateway.work import OwnedWork

log = structlog.get_logger()

# In a row without a token: a sequence that gets on may change its instance as often as it has to.
MAX_ATTEMPTS = 5
_PAUSE_S = 0.1
# Until the scheduler has heard of the other role too.
_GIVEN_BACK_PAUSE_S = 0.01
# In a row, before it counts as failing.
_MOST_GIVEN_BACK = 50
_RETRY_S = 0.1
_ANSWER_DEADLINE_S = 5.0
_ROUTE_WAIT_S = 3.0


class GenerationFailed(Exception):
    """The sequence cannot be brought to its end. ``code`` as in failures; ``retryable``: later it may be possible."""

    def __init__(self, code: str, message: str, *, retryable: bool) -> None:
        super().__init__(message)
        self.code = code
        self.retryable = retryable


@dataclass(frozen=True)
class Patience:
    """``route_s``: how long to wait for an instance. After ``silence_s`` without tokens the instances are asked."""

    route_s: float
    silence_s: float


class Generation:
    """One sequence of a conversation. ``metrics`` hear of its routes."""

    def __init__(
        self,
        bus: Bus,
        board: Switchboard,
        work: OwnedWork,
        patience: Patience,
        request: GenerateTokens,
        prompt: bytes,
        conversation: str,
        metrics: LanguageMetrics,
    ) -> None:
        self._bus = bus
        self._board = board
        self._work = work
        self._patience = patience
        self._request = request
        self._prompt = prompt
        self._conversation = conversation
        self._metrics = metrics
        self._generated: list[int] = []
        self._avoid: tuple[str, ...] = ()
        self._gone: tuple[str, ...] = ()

    @property
    def _sampling(self) -> Sampling:
        return self._request.sampling

    async def run(self, deliver: Callable[[Step], Awaitable[bool]]) -> None:
        """Generate until the end, or until ``deliver`` says that no more is wanted. It gets every token once, in order.

        Cancelled, it has the instances drop the sequence.

        Raises:
            GenerationFailed: no instance could be found, or none could bring it to its end.
        """
        attempts = given_back_times = 0
        while True:
            before = len(self._generated)
            try:
                await self._attempt(deliver)
                return
            except Broken as broken:
                given_back_times = 0 if len(self._generated) > before else given_back_times + (broken.why == MOVED)
                # Whoever gives a sequence back has not failed at it, unless nobody keeps it.
                given_back = broken.why == MOVED and given_back_times < _MOST_GIVEN_BACK
                tell = log.info if given_back else log.warning
                tell("attempt broken", request=self._request.request_id, why=broken.why, reason=str(broken))
                if not broken.retryable:
                    raise GenerationFailed(broken.why, str(broken), retryable=False) from broken
                if not given_back:
                    attempts = 1 if len(self._generated) > before else attempts + 1
                if attempts == MAX_ATTEMPTS:
                    message = f"given up after {attempts} attempts without a token; the last one: {broken}"
                    raise GenerationFailed(broken.why, message, retryable=True) from broken
                self._metrics.rerouted(broken.why)
                self._avoid = (*self._avoid, *broken.avoid)[-MAX_ATTEMPTS:]
                self._gone = broken.gone
            # The first time there most likely is another instance; after that, what is wrong needs time.
            await asyncio.sleep(_GIVEN_BACK_PAUSE_S if given_back else _PAUSE_S * (2 ** (attempts - 1) - 1))

    async def _attempt(self, deliver: Callable[[Step], Awaitable[bool]]) -> None:
        route = await self._route()
        request_id, max_tokens = self._request.request_id, self._sampling.max_tokens
        finished = False
        with self._board.line(request_id, route, len(self._generated), max_tokens) as line:
            try:
                await self._start(route, line)
                told: tuple[str, bool] | None = None
                while True:
                    step = await self._next(line)
                    now = line.decode, line.decoding
                    if now != told and (step.tokens or told is not None):
                        if line.decode and (told is None or told[0] != line.decode):
                            self._metrics.goes_on(line.decode)
                        told = now
                        await self._bus.publish(
                            CHAT_PREFILLED,
                            ChatPrefilled(
                                request_id=request_id, epoch=route.epoch, decode=line.decode, decoding=line.decoding
                            ),
                        )
                    finished = step.finish is not None
                    if not step.tokens and not finished:
                        continue
                    self._generated += step.tokens
                    if not await deliver(step) or finished:
                        return
            finally:
                await self._work.finish(self._let_go(line, finished))

    async def _let_go(self, line: Line, finished: bool) -> None:
        request_id, epoch = self._request.request_id, line.route.epoch
        if not finished:
            await self._board.cancel(request_id, epoch, line.instances)
        await self._bus.publish(CHAT_ENDED, ChatEnded(request_id=request_id, epoch=epoch))

    async def _route(self) -> ChatRoute:
        """Ask the scheduler, waiting for one that is away and for instances that are not there yet."""
        clock = asyncio.get_running_loop().time
        end_s = clock() + self._patience.route_s
        request_id = self._request.request_id
        tokens = self._prompt + pack_tokens(self._generated)
        routed = False
        try:
            while True:
                # Not all at once: a scheduler that dies meanwhile is not noticed, and the next one knows nothing of it.
                wait_s = min(max(0.0, end_s - clock()), _ROUTE_WAIT_S)
                asked = RouteChat(
                    request_id=request_id,
                    gateway=self._board.instance,
                    tokens=tokens,
                    prompt_tokens=tokens_in(tokens),
                    max_tokens=self._sampling.max_tokens - len(self._generated),
                    avoid=self._avoid,
                    gone=self._gone,
                    wait_s=wait_s,
                    created_at_s=self._request.created_at_s,
                    conversation=self._conversation,
                )
                try:
                    route = await self._bus.request(ROUTE_CHAT, asked, deadline_s=wait_s + 1.0)
                    routed = True
                    self._metrics.routed(route.best_cached_tokens)
                    return route
                except RemoteFailure as refused:
                    failure = refused.failure
                    if clock() >= end_s:
                        raise GenerationFailed(failure.code, failure.message, retryable=True) from refused
                except (NobodyThere, BusUnavailable, DeadlineExceeded) as error:
                    if clock() >= end_s:
                        raise GenerationFailed("no_scheduler", f"no scheduler: {error}", retryable=True) from error
                await asyncio.sleep(_RETRY_S)
        finally:
            if not routed:
                await self._work.finish(self._bus.publish(CHAT_ENDED, ChatEnded(request_id=request_id)))

    async def _start(self, route: ChatRoute, line: Line) -> None:
        """Have the prefill instance begin. The line may know before its answer: by tokens, or because it is lost.

        Raises:
            Broken: it does not begin.
        """
        request = self._request.model_copy(
            update={
                "epoch": route.epoch,
                "decode": route.decode,
                "cached": route.cached,
                "tokens": self._prompt + pack_tokens(self._generated),
                "generated": len(self._generated),
            }
        )
        asking = asyncio.ensure_future(
            self._bus.request(GENERATE_TOKENS, request, route.prefill, deadline_s=_ANSWER_DEADLINE_S)
        )
        stirring = asyncio.ensure_future(line.stir())
        try:
            await asyncio.wait((asking, stirring), return_when=asyncio.FIRST_COMPLETED)
            if asking.done():
                await asking
        except NobodyThere as error:
            raise Broken("lost", f"nobody is at {route.prefill}", gone=(route.prefill,)) from error
        except RemoteFailure as refused:
            failure = refused.failure
            raise Broken(
                failure.code, failure.message, retryable=failure.retryable, avoid=(route.prefill,)
            ) from refused
        except BusError as error:
            raise Broken("silence", f"{route.prefill} does not answer: {error}", avoid=(route.prefill,)) from error
        finally:
            for task in (asking, stirring):
                task.cancel()
            await asyncio.gather(asking, stirring, return_exceptions=True)

    async def _next(self, line: Line) -> Step:
        """The next tokens. In silence the instances are asked whether they are still at it.

        Raises:
            Broken: see Line.
        """
        while True:
            step = await line.next(self._patience.silence_s)
            if step is not None:
                return step
            expected = line.expected
            broken = await self._ask_for_it(line)
            if broken is None:
                continue
            try:
                # Tokens that were sent before the answers are here, but perhaps not heard.
                await self._board.caught_up(_ANSWER_DEADLINE_S)
            except DeadlineExceeded:
                continue
            step = await line.next(0.0)
            if step is not None:
                return step
            if line.expected == expected:
                raise broken

    async def _ask_for_it(self, line: Line) -> Broken | None:
        """Why the sequence must go on elsewhere; None: an instance has it, and all of its tokens have come."""
        asked = FindGeneration(request_id=self._request.request_id, epoch=line.route.epoch)
        gone = []
        # In this order: what the prefill instance has no more, the decode instance has already.
        to_ask = list(line.instances)
        for instance in to_ask:
            try:
                found = await self._bus.request(FIND_GENERATION, asked, instance, deadline_s=_ANSWER_DEADLINE_S)
            except NobodyThere:
                gone.append(instance)
                continue
            except BusError as error:
                return Broken("silence", f"{instance} does not answer: {error}", avoid=(instance,))
            if found.held and found.tokens <= line.expected:
                return None
            if found.held:
                return Broken("gap", f"tokens {line.expected} to {found.tokens - 1} from {instance} never came")
            if found.decode and found.decode not in to_ask:
                line.moved(instance, found.decode)
                to_ask.append(found.decode)
        if gone:
            return Broken("lost", f"nobody is at {', '.join(gone)}", gone=tuple(gone))
        instances = line.instances
        return Broken("silence", f"{' and '.join(instances)} know nothing of it", avoid=instances)

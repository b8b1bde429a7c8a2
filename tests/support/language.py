"""Plays prefill and decode instances towards a real gateway and a real scheduler over a real broker.

What a played instance answers is fixed by ``script``, position by position: whoever goes on with a sequence goes on as
the other would have. What goes wrong is up to the test.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

from common.bus.errors import Refusal
from common.bus.nats_bus import NatsBus
from common.bus.port import Bus
from common.messages.chat import (
    CancelGeneration,
    FindGeneration,
    FinishReason,
    GenerateTokens,
    GenerationFound,
    SequenceTokens,
    TakeOver,
    TokenLogprobs,
    TokensGenerated,
    pack_tokens,
    tokens_in,
    unpack_tokens,
)
from common.messages.cluster import LanguageModelInfo, LanguageRole, Member, MemberState, Service
from common.messages.failures import Acknowledged, Failure
from common.messages.subjects import (
    CANCEL_GENERATION,
    FIND_GENERATION,
    GENERATE_TOKENS,
    TAKE_OVER,
    TOKENS_GENERATED,
)
from common.runtime.membership import Registration
from common.runtime.settings import ServiceSettings
from tests.support.tiny_tokenizer import END, tiny_tokenizer

WAIT_S = 60.0
INFO = LanguageModelInfo(name="tiny", context_tokens=512, created_at_s=1)
FUSED = (LanguageRole.PREFILL, LanguageRole.DECODE)
_TOKENIZER = tiny_tokenizer()
END_ID: int = _TOKENIZER.token_to_id(END)


def language_member(
    name: str, roles: tuple[LanguageRole, ...], state: MemberState = MemberState.READY, model: str = INFO.name
) -> Member:
    """The record of an instance that is only talked about."""
    return Member(
        instance=name,
        incarnation="1",
        service=Service.DECODE,
        state=state,
        host="here",
        pid=1,
        started_at_s=0.0,
        language_model=INFO.model_copy(update={"name": model}),
        roles=roles,
    )


def ids_of(text: str) -> list[int]:
    """The text's tokens."""
    ids: list[int] = _TOKENIZER.encode(text, add_special_tokens=False).ids
    return ids


def text_of(tokens: list[int]) -> str:
    """The tokens' text, special ones by name."""
    text: str = _TOKENIZER.decode(tokens, skip_special_tokens=False)
    return text


@dataclass
class Faults:
    """What an instance does wrong: stop saying anything after so many tokens of a sequence, leave out the message with
    the token at a position, or refuse. A sequence that ``forget``s is not found any more either."""

    silent_after: int | None = None
    drop: set[int] = field(default_factory=set)
    refuse: Failure | None = None
    forget: bool = False


@dataclass(frozen=True)
class HandOn:
    """At a position, another instance goes on. ``told``: the gateway hears of it before."""

    place: int
    to: str
    told: bool


class PlayedLanguageWorker:
    """One instance. It sends a token each time ``allowed`` permits, which by default is always."""

    def __init__(
        self, bus: Bus, instance: str, script: Callable[[str], str], roles: tuple[LanguageRole, ...] = FUSED
    ) -> None:
        self.bus = bus
        self.instance = instance
        self.roles = roles
        self.faults = Faults()
        self.hand_on: HandOn | None = None
        self.finds = 0
        self.requests: asyncio.Queue[GenerateTokens] = asyncio.Queue(1000)
        self.cancelled: asyncio.Queue[CancelGeneration] = asyncio.Queue(1000)
        self.allowed = asyncio.Semaphore(1_000_000)
        self.messages = 0
        self._script = script
        self._running: dict[str, asyncio.Task[None]] = {}
        self._sent: dict[str, tuple[int, int]] = {}
        self._handed_on: dict[str, str] = {}
        self._life: contextlib.AsyncExitStack | None = None

    async def join(self, url: str) -> None:
        """Register and take work."""
        service = Service.PREFILL if LanguageRole.PREFILL in self.roles else Service.DECODE
        settings = ServiceSettings(nats_url=url, instance=self.instance, heartbeat_s=0.1)
        self._life = contextlib.AsyncExitStack()
        registration = await self._life.enter_async_context(Registration(self.bus, settings, service))
        for subscription in (
            await self.bus.serve(GENERATE_TOKENS, self._generate, self.instance),
            await self.bus.serve(FIND_GENERATION, self._find, self.instance),
            await self.bus.serve(TAKE_OVER, self._take_over, self.instance),
            await self.bus.subscribe(CANCEL_GENERATION, self._cancel, self.instance),
        ):
            self._life.push_async_callback(subscription.stop)
        await registration.ready(language_model=INFO, roles=self.roles)

    async def leave(self) -> None:
        """Withdraw, with whatever was under way."""
        life, self._life = self._life, None
        for task in self._running.values():
            task.cancel()
        if life is not None:
            await life.aclose()

    async def next_request(self) -> GenerateTokens:
        return await asyncio.wait_for(self.requests.get(), WAIT_S)

    async def next_cancelled(self) -> CancelGeneration:
        return await asyncio.wait_for(self.cancelled.get(), WAIT_S)

    @property
    def busy(self) -> int:
        """How many sequences it holds."""
        return len(self._running)

    async def _generate(self, request: GenerateTokens) -> Acknowledged:
        self.requests.put_nowait(request)
        if self.faults.refuse is not None:
            raise Refusal(self.faults.refuse)
        handing_over = request.decode != self.instance
        self._begin(request, None, handing_over)
        return Acknowledged()

    async def _take_over(self, handed: TakeOver) -> Acknowledged:
        if self.faults.refuse is not None:
            raise Refusal(self.faults.refuse)
        self._begin(handed.request, handed, False)
        return Acknowledged()

    def _begin(self, request: GenerateTokens, handed: TakeOver | None, handing_over: bool) -> None:
        key = request.request_id
        if (former := self._running.pop(key, None)) is not None:
            former.cancel()
        work = self._hand_over(request) if handing_over else self._go_on(request)
        task = self._running[key] = asyncio.create_task(work, name=key)
        self._sent[key] = (request.epoch, request.generated)
        task.add_done_callback(lambda done: self._running.pop(key) if self._running.get(key) is done else None)

    async def _find(self, asked: FindGeneration) -> GenerationFound:
        epoch, tokens = self._sent.get(asked.request_id, (0, 0))
        self.finds += 1
        held = asked.request_id in self._running and epoch == asked.epoch and not self.faults.forget
        later = "" if held else self._handed_on.get(asked.request_id, "")
        return GenerationFound(request_id=asked.request_id, epoch=asked.epoch, held=held, tokens=tokens, decode=later)

    async def _cancel(self, cancel: CancelGeneration) -> None:
        self.cancelled.put_nowait(cancel)
        if later := self._handed_on.pop(cancel.request_id, ""):
            await self.bus.publish(CANCEL_GENERATION, cancel, later)
        if self._sent.get(cancel.request_id, (0, 0))[0] <= cancel.epoch:
            task = self._running.pop(cancel.request_id, None)
            if task is not None:
                task.cancel()

    async def _hand_over(self, request: GenerateTokens) -> None:
        """Send the first token, then have the decode instance go on."""
        answer = self._answer(request)
        place = request.generated
        await self._send(request, place, answer)
        if place + 1 >= min(len(answer), request.sampling.max_tokens):
            return
        await self._give(request, place + 1, answer, request.decode)

    async def _give(self, request: GenerateTokens, generated: int, answer: list[int], to: str) -> None:
        tokens = pack_tokens(answer[request.generated : generated])
        handed = request.model_copy(update={"tokens": request.tokens + tokens, "generated": generated, "decode": to})
        take_over = TakeOver(
            request=handed, prefill=self.instance, parts=(), kv_tokens=tokens_in(handed.tokens) - 1, block_tokens=16
        )
        await self.bus.request(TAKE_OVER, take_over, to, deadline_s=WAIT_S)

    async def _go_on(self, request: GenerateTokens) -> None:
        answer = self._answer(request)
        for place in range(request.generated, min(len(answer), request.sampling.max_tokens)):
            if self.hand_on is not None and place == self.hand_on.place:
                await self._move(request, answer, self.hand_on)
                return
            await self.allowed.acquire()
            if self.faults.silent_after is not None and place >= self.faults.silent_after:
                await asyncio.sleep(WAIT_S)
            await self._send(request, place, answer)

    async def _move(self, request: GenerateTokens, answer: list[int], hand_on: HandOn) -> None:
        if hand_on.told:
            news = SequenceTokens(
                request_id=request.request_id, epoch=request.epoch, offset=hand_on.place, decode=hand_on.to
            )
            message = TokensGenerated(instance=self.instance, sequences=(news,))
            await self.bus.publish(TOKENS_GENERATED, message, request.gateway)
        self._handed_on[request.request_id] = hand_on.to
        await self._give(request, hand_on.place, answer, hand_on.to)

    async def _send(self, request: GenerateTokens, place: int, answer: list[int]) -> None:
        finish = None
        if answer[place] == END_ID and not request.sampling.ignore_end:
            finish = FinishReason.STOP
        elif place + 1 == request.sampling.max_tokens:
            finish = FinishReason.LENGTH
        logprobs: tuple[TokenLogprobs, ...] = ()
        if request.sampling.logprobs is not None:
            likeliest = ((answer[place], -0.25), (END_ID, float("-inf")))[: request.sampling.logprobs]
            logprobs = (TokenLogprobs(logprob=-0.25, alternatives=likeliest),)
        news = SequenceTokens(
            request_id=request.request_id,
            epoch=request.epoch,
            offset=place,
            tokens=(answer[place],),
            logprobs=logprobs,
            finish=finish,
        )
        if place in self.faults.drop:
            self.faults.drop.discard(place)
        else:
            self.messages += 1
            await self.bus.publish(
                TOKENS_GENERATED, TokensGenerated(instance=self.instance, sequences=(news,)), request.gateway
            )
        self._sent[request.request_id] = (request.epoch, place + 1)

    def _answer(self, request: GenerateTokens) -> list[int]:
        """The tokens that the script has for the prompt; the prompt is what was not generated."""
        tokens = unpack_tokens(request.tokens)
        prompt = tokens[: len(tokens) - request.generated]
        answer = [*ids_of(self._script(text_of(prompt))), END_ID]
        assert tokens[len(prompt) :] == answer[: request.generated], "what was generated before is not the same"
        return answer


@contextlib.asynccontextmanager
async def played_language_worker(
    url: str,
    instance: str,
    script: Callable[[str], str],
    roles: tuple[LanguageRole, ...] = FUSED,
) -> AsyncIterator[PlayedLanguageWorker]:
    """An instance that has joined; it leaves at the end of the block if it has not before."""
    bus = await NatsBus.connect(url, name=f"played-{instance}")
    worker = PlayedLanguageWorker(bus, instance, script, roles)
    try:
        await worker.join(url)
        yield worker
    finally:
        await worker.leave()
        await bus.close()

"""What leaves a prefill instance while its prompt is still being computed.

``by_chunk``: after each pass the blocks that it filled, as they lie. ``by_layer`` (MemServe, figure 5): a copy
of each layer while later ones are computed. One offer of a sequence is under way at a time; what is computed meanwhile
goes with the next one, so that at most the keys and values of the prompts in the pool are kept a second time. An offer
that is refused, or a preemption, ends sending ahead: then all goes at the end.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import structlog

from common.bus.errors import BusError, RemoteFailure
from common.bus.port import Bus
from common.engine import Engine
from common.language.blocks import Part, blocks_part, bytes_in, exported, layer_part
from common.language.foretelling import told_already
from common.language.held import Held
from common.language.settings import LanguageSettings, TransferMode
from common.language.stepper import Stepper
from common.language.tasks import SpawnFor
from common.mempool.allocator import Access
from common.mempool.transfer import MARGIN_S
from common.messages.chat import CancelGeneration, OfferKV
from common.messages.subjects import CANCEL_GENERATION, OFFER_KV
from common.models.causal_lm import BLOCK_TOKENS, BlockTable, Chunk
from common.tensors.errors import TensorError
from common.tensors.port import Tensors

log = structlog.get_logger()


@dataclass(slots=True)
class _Ahead:
    """One sequence. ``until``: so many tokens are sent or ready, of each layer."""

    held: Held
    kv_tokens: int
    until: list[int]
    ready: list[Part] = field(default_factory=list)
    accesses: list[Access] = field(default_factory=list)
    offers: int = 0
    finishing: bool = False
    broken: bool = False
    sending: asyncio.Task[None] | None = None


@dataclass(frozen=True, slots=True)
class SentAhead:
    """What ``offers`` brought and ``parts`` hold is all of the first ``tokens`` tokens."""

    offers: int = 0
    parts: tuple[Part, ...] = ()
    tokens: int = 0


class SendingAhead:
    """Everything of one instance that is under way. Called on the event loop, unless a method says else."""

    def __init__(
        self,
        instance: str,
        bus: Bus,
        tensors: Tensors,
        engine: Engine,
        stepper: Stepper,
        settings: LanguageSettings,
        spawn: SpawnFor,
    ) -> None:
        self._instance = instance
        self._bus = bus
        self._tensors = tensors
        self._engine = engine
        self._stepper = stepper
        self._settings = settings
        self._spawn = spawn
        self._loop = asyncio.get_running_loop()
        self._under_way: dict[str, _Ahead] = {}
        self.sent_bytes = 0
        if settings.transfer_mode is TransferMode.BY_LAYER:
            engine.passes.layer_stored = self._layer_stored

    def begin(self, held: Held) -> None:
        """From now on, send of this sequence what is computed, and what is already. Between two steps, or before it is
        the engine's. Nothing where its first token will be its last.
        """
        last = held.generated + 1 >= held.request.sampling.max_tokens
        if self._settings.transfer_mode is TransferMode.BY_REQUEST or last:
            return
        table = self._engine.table(held.key)
        computed = self._engine.computed_tokens(held.key)
        ahead = _Ahead(held, held.kv_tokens + 1, [0] * self._engine.pool.layout.layers)
        self._under_way[held.key] = ahead
        if table is None or not computed:
            return
        if self._settings.transfer_mode is TransferMode.BY_CHUNK:
            self._add_blocks(ahead, table, computed)
        else:
            part = blocks_part(self._engine.pool, table, 0, computed)
            # A copy: its last block is written to again, before it may have left.
            part.kv = [tensor.clone() for tensor in part.kv]
            ahead.until = [computed] * len(ahead.until)
            self._add(ahead, part)

    def step_done(self) -> None:
        """A step is over: what it computed may leave."""
        if self._settings.transfer_mode is not TransferMode.BY_CHUNK:
            return
        for piece in self._engine.computed:
            ahead = self._under_way.get(piece.sequence)
            table = self._engine.table(piece.sequence)
            # After the last piece the sequence is handed over, with what is left of it.
            if ahead is None or table is None or piece.last:
                continue
            if piece.start < ahead.until[0]:
                self._break(ahead, "it was preempted")
            else:
                self._add_blocks(ahead, table, piece.start + piece.count)

    def _add_blocks(self, ahead: _Ahead, table: BlockTable, computed: int) -> None:
        """Those that are full now, in place."""
        first, end = ahead.until[0], computed // BLOCK_TOKENS * BLOCK_TOKENS
        if end > first and not ahead.broken:
            ahead.until = [end] * len(ahead.until)
            blocks = table.blocks[first // BLOCK_TOKENS : end // BLOCK_TOKENS]
            ahead.accesses.append(self._engine.allocator.begin_access(blocks))
            self._add(ahead, blocks_part(self._engine.pool, table, first, end))

    def _layer_stored(self, chunks: Sequence[Chunk], layer: int) -> None:
        """Within a step, in the compute thread: copied there, the layer needs no block to stay as it is."""
        if not self._under_way:
            return
        parts = [
            (chunk.sequence, layer_part(self._engine.pool, chunk.table, chunk.start, end, layer))
            for chunk in chunks
            if chunk.sequence in self._under_way and (end := chunk.start + len(chunk.tokens))
        ]
        if parts:
            self._loop.call_soon_threadsafe(self._layer_ready, parts, layer)

    def _layer_ready(self, parts: list[tuple[str, Part]], layer: int) -> None:
        for name, part in parts:
            ahead = self._under_way.get(name)
            if ahead is None or ahead.broken:
                continue
            if part.first_token != ahead.until[layer]:
                self._break(ahead, "it was preempted, or its first tokens were there already")
                continue
            ahead.until[layer] += part.tokens
            self._add(ahead, part)

    def _add(self, ahead: _Ahead, part: Part) -> None:
        if ahead.ready and ahead.ready[-1].goes_on(part):
            ahead.ready[-1].kv += part.kv
        else:
            ahead.ready.append(part)
        if ahead.sending is None:
            ahead.sending = self._spawn(ahead.held, partial(self._send, ahead), "send ahead")

    async def _send(self, ahead: _Ahead) -> None:
        try:
            if not ahead.offers and await ahead.held.known_there():
                self._break(ahead, "the receiver has its first tokens already, so the rest is little")
            while ahead.ready and not ahead.finishing:
                parts, ahead.ready = ahead.ready, []
                refusal = await self._offer(ahead, parts)
                if refusal is None:
                    ahead.offers += 1
                else:
                    self._break(ahead, refusal)
        finally:
            ahead.sending = None
            if ahead.broken:
                self._let_go(ahead)

    async def _offer(self, ahead: _Ahead, parts: list[Part]) -> str | None:
        """Have the receiver fetch these; why it does not, None: it has."""
        request = ahead.held.request
        wait_s = self._settings.transfer_s + MARGIN_S
        try:
            async with exported(self._tensors, parts, wait_s, self._settings.kv_checksum) as described:
                offer = OfferKV(
                    request_id=request.request_id,
                    epoch=request.epoch,
                    prefill=self._instance,
                    kv_tokens=ahead.kv_tokens,
                    block_tokens=BLOCK_TOKENS,
                    number=ahead.offers,
                    parts=described,
                    expected=told_already(ahead.held.expected),
                )
                await self._bus.request(OFFER_KV, offer, request.decode, deadline_s=wait_s)
            self.sent_bytes += bytes_in(described)
            return None
        except RemoteFailure as refused:
            return refused.failure.message
        except (BusError, TensorError) as error:
            return str(error)

    async def finish(self, key: str) -> SentAhead:
        """Wait for what is under way; what was sent, and what only waits to be. From now on nothing is sent ahead."""
        ahead = self._under_way.get(key)
        if ahead is None:
            return SentAhead()
        ahead.finishing = True
        if ahead.sending is not None:
            await asyncio.wait((ahead.sending,))
        whole = min(ahead.until) == ahead.kv_tokens
        if ahead.broken or (self._settings.transfer_mode is TransferMode.BY_LAYER and not whole):
            return SentAhead()
        return SentAhead(ahead.offers, tuple(ahead.ready), ahead.until[0])

    def taken_over(self, key: str) -> None:
        """The receiver has it, or has said that it has not: nothing of it is to be kept any more."""
        ahead = self._under_way.pop(key, None)
        if ahead is not None:
            self._let_go(ahead)

    def stop(self) -> None:
        """The instance leaves: nothing is sent any more, and nobody is told."""
        for ahead in self._under_way.values():
            self._break(ahead, None)
        self._under_way.clear()

    def forget(self, key: str) -> None:
        """Nobody will take it over; where something of it was sent, the receiver is told."""
        ahead = self._under_way.pop(key, None)
        if ahead is None:
            return
        sent = bool(ahead.offers) or ahead.sending is not None
        self._break(ahead, None)
        if sent:
            self._spawn(ahead.held, partial(self._cancel, ahead.held), "cancel")

    async def _cancel(self, held: Held) -> None:
        request = held.request
        message = CancelGeneration(request_id=request.request_id, epoch=request.epoch)
        try:
            await self._bus.publish(CANCEL_GENERATION, message, request.decode)
        except BusError as error:
            # It forgets by itself, after a while.
            log.warning("not cancelled", sequence=held.key, decode=request.decode, reason=str(error))

    def _break(self, ahead: _Ahead, why: str | None) -> None:
        if why is not None and not ahead.broken:
            log.info("not sent ahead", sequence=ahead.held.key, reason=why)
        ahead.broken = True
        ahead.ready.clear()
        if ahead.sending is None:
            self._let_go(ahead)

    def _let_go(self, ahead: _Ahead) -> None:
        """Nobody reads its blocks any more for what was sent ahead."""
        accesses, ahead.accesses = ahead.accesses, []
        for access in accesses:
            self._stepper.soon(partial(self._engine.allocator.end_access, access))

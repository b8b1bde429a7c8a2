"""Moving blocks to another instance's pool: ``transfer`` and ``transfer_with_insert`` (MemServe, section 4.3).

The receiver allocates, fetches the bytes from where they lie, and only then, if asked to, inserts: nobody finds what is
half written. Whatever goes wrong, by a deadline both ends have let go of the blocks, so that a peer that died costs no
memory. Ours: bytes are fetched, not sent, so the protocol's three steps are one message and its answer; and an
insertion whose beginning the receiver lacks is refused.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from enum import Flag, auto
from functools import partial
from typing import Protocol, TypeVar

from common.bus.errors import Refusal
from common.bus.port import Bus
from common.mempool.address import BLOCK_TOKENS, KEY_BYTES, Address, Medium, MemoryType
from common.mempool.allocator import Access, WrongBlock
from common.mempool.checksum import checksums
from common.mempool.fetching import blocks_of_each, fetch_into
from common.mempool.pool import MemPool
from common.mempool.tiers import begin_access, end_access, memory_of
from common.messages.failures import Failure, Stage
from common.messages.mempool import BlockAddress, BlocksMoved, MoveBlocks
from common.messages.subjects import MOVE_BLOCKS
from common.tensors.errors import TensorError
from common.tensors.port import Tensors

R = TypeVar("R")

DAMAGED = "damaged"
"""The code of a refusal: bytes came that are not those that left."""
NOT_MOVED = "not_moved"
"""The code of a refusal: they did not come."""
MARGIN_S = 2.0
"""So much longer than the receiver a sender waits: who gives up first never reads from blocks that are in use again."""


class Between(Protocol):
    """Does work on the pool when nothing else does, and returns or raises what came of it."""

    def __call__(self, work: Callable[[], R], /) -> Awaitable[R]: ...


class TransferFlags(Flag):
    """``DRAM``: to the receiver's host memory. ``CHECK``: compare checksums."""

    NONE = 0
    DRAM = auto()
    CHECK = auto()


@dataclass(frozen=True, slots=True)
class _Place:
    """Where blocks go: after ``before``, held too. ``accesses`` keep what is written to from being given out."""

    before: list[Address]
    addresses: list[Address]
    accesses: list[tuple[Medium, Access]]
    own: bool


class BlockTransfer:
    """One instance's end, of either direction.

    Args:
        deadline_s: how long the receiver may take.
        take: is given what comes without tokens, between two steps: ``private`` and the blocks, which are its own from
            then on. None: such transfers are refused.
    """

    def __init__(
        self,
        memory: MemPool,
        bus: Bus,
        tensors: Tensors,
        between: Between,
        deadline_s: float,
        take: Callable[[bytes, list[Address]], None] | None = None,
    ) -> None:
        self._memory = memory
        self._bus = bus
        self._tensors = tensors
        self._between = between
        self._deadline_s = deadline_s
        self._take = take
        self.sent_bytes = 0

    # --- the sender ----------------------------------------------------------------------------------------------

    async def transfer(
        self,
        instance: str,
        source: Sequence[Address],
        destination: Sequence[Address] = (),
        flags: TransferFlags = TransferFlags.NONE,
        private: bytes = b"",
    ) -> list[Address]:
        """Copy blocks to another instance, whose engine gets them with ``private``.

        Args:
            source: held by the caller until this returns.
            destination: held there for this transfer; without it the receiver allocates.

        Returns:
            Where they are there.

        Raises:
            BusError, TensorError: they are not there, as far as is known.
        """
        message = self._message(destination, flags, private)
        return await self._send(instance, source, flags, message)

    async def transfer_with_insert(
        self,
        instance: str,
        tokens: bytes,
        source: Sequence[Address],
        destination: Sequence[Address] = (),
        flags: TransferFlags = TransferFlags.NONE,
        private: bytes = b"",
    ) -> list[Address]:
        """Copy the last blocks of ``tokens`` (packed, whole blocks), and have the receiver's index find all of them.

        See ``transfer``. Nothing is copied, and nothing returned, where all of them are there already.
        """
        message = self._message(destination, flags, private).model_copy(
            update={"tokens": tokens, "first_block": len(tokens) // KEY_BYTES - len(source)}
        )
        return await self._send(instance, source, flags, message)

    def _message(self, destination: Sequence[Address], flags: TransferFlags, private: bytes) -> MoveBlocks:
        return MoveBlocks(
            source=self._memory.instance,
            block_tokens=BLOCK_TOKENS,
            kv=(),
            into=_described(destination),
            dram=TransferFlags.DRAM in flags,
            private=private,
        )

    async def _send(
        self, instance: str, source: Sequence[Address], flags: TransferFlags, message: MoveBlocks
    ) -> list[Address]:
        runs = memory_of(self._memory.tiers, source)
        values = await asyncio.to_thread(checksums, runs) if TransferFlags.CHECK in flags else []
        wait_s = self._deadline_s + MARGIN_S
        refs = self._tensors.export_all(runs, lease_s=wait_s)
        try:
            message = message.model_copy(update={"kv": tuple(refs), "checksums": tuple(values)})
            moved = await self._bus.request(MOVE_BLOCKS, message, instance, deadline_s=wait_s)
        finally:
            for ref in refs:
                await self._tensors.release(ref)
        if moved.addresses:
            self.sent_bytes += sum(ref.size_bytes for ref in refs)
        return _addresses(instance, moved.addresses)

    # --- the receiver --------------------------------------------------------------------------------------------

    async def receive(self, message: MoveBlocks) -> BlocksMoved:
        """Answer a transfer.

        Raises:
            Refusal: ``no_parent``, ``no_space``, ``not_wanted``, ``NOT_MOVED`` or ``DAMAGED``.
        """
        return await self.receive_within(message, self._deadline_s)

    async def receive_within(self, message: MoveBlocks, deadline_s: float) -> BlocksMoved:
        """The same within so many seconds."""
        place = await self._between(partial(self._place, message))
        if place is None:
            return BlocksMoved()
        done = False
        try:
            await self._fetch(message, place.addresses, deadline_s)
            addresses = await self._between(partial(self._settle, message, place))
            done = True
            return BlocksMoved(addresses=_described(addresses))
        except TensorError as error:
            raise _refusal(NOT_MOVED, str(error)) from error
        except ValueError as error:
            raise _refusal(DAMAGED, str(error)) from error
        finally:
            if not done:
                await self._between(partial(self._give_up, place))

    def _place(self, message: MoveBlocks) -> _Place | None:
        blocks = sum(ref.shape[0] for ref in message.kv)
        shape = tuple(self._memory.hbm.memory.shape[1:])
        if message.block_tokens != BLOCK_TOKENS or any(tuple(ref.shape[1:]) != shape for ref in message.kv):
            raise _refusal("not_wanted", f"blocks here have {BLOCK_TOKENS} tokens and the shape {shape}")
        before: list[Address] = []
        if message.tokens:
            if (message.first_block + blocks) * KEY_BYTES != len(message.tokens):
                raise _refusal("not_wanted", f"{blocks} blocks from {message.first_block} on are not all of the rest")
            known = len(self._memory.match(message.tokens))
            if known == len(message.tokens) // KEY_BYTES:
                return None
            if known < message.first_block:
                raise _refusal("no_parent", f"{known} of {message.first_block} blocks are here")
            before = self._beginning(message)
        elif self._take is None:
            raise _refusal("not_wanted", "blocks without tokens are for nobody here")
        addresses = self._destination(message, blocks)
        if addresses is None:
            self._memory.free_mem(before)
            raise _refusal("no_space", f"{blocks} blocks are not to be had")
        return _Place(before, addresses, begin_access(self._memory.tiers, addresses), own=not message.into)

    def _beginning(self, message: MoveBlocks) -> list[Address]:
        """What comes before the blocks, held; and no colder than they will be. Raises: Refusal."""
        before = self._memory.match(message.tokens[: message.first_block * KEY_BYTES], hold=True)
        coldest = Medium.DRAM if message.dram else Medium.HBM
        if all(address.medium <= coldest for address in before):
            return before
        warm = self._memory.swap_in(before)
        if warm is None:
            self._memory.free_mem(before)
            raise _refusal("no_space", f"{len(before)} blocks cannot be brought to where these are to follow")
        return warm

    def _destination(self, message: MoveBlocks, blocks: int) -> list[Address] | None:
        if not message.into:
            return self._memory.alloc_mem(blocks, MemoryType.DRAM_ONLY if message.dram else MemoryType.HBM_ONLY)
        try:
            given = _addresses(self._memory.instance, message.into)
        except WrongBlock as error:
            raise _refusal("not_wanted", str(error)) from error
        if len(given) != blocks:
            raise _refusal("not_wanted", f"{len(given)} addresses are given for {blocks} blocks")
        for address in given:
            tier = self._memory.tiers.get(address.medium)
            if tier is None or not tier.allocator.is_current(address.block, address.epoch):
                raise _refusal("not_wanted", f"{address} is not given out any more")
        return given

    async def _fetch(self, message: MoveBlocks, addresses: Sequence[Address], deadline_s: float) -> None:
        """Raises: TensorError: they did not come; ValueError: they came damaged."""
        places = [
            (self._memory.tiers[own[0].medium].memory, [address.block for address in own])
            for own in blocks_of_each(message.kv, addresses)
        ]
        await fetch_into(self._tensors, message.kv, places, deadline_s)
        if message.checksums:
            values = await asyncio.to_thread(checksums, memory_of(self._memory.tiers, addresses))
            if not _agree(values, message.checksums):
                raise ValueError(f"of {len(values)} blocks, some have another checksum than they had")

    def _settle(self, message: MoveBlocks, place: _Place) -> list[Address]:
        """They have come. Where they are now."""
        if message.tokens:
            stay = self._memory.insert(message.tokens, [*place.before, *place.addresses])
            end_access(self._memory.tiers, place.accesses)
            return stay[message.first_block :]
        assert self._take is not None
        end_access(self._memory.tiers, place.accesses)
        self._take(message.private, place.addresses)
        return place.addresses

    def _give_up(self, place: _Place) -> None:
        end_access(self._memory.tiers, place.accesses)
        self._memory.free_mem([*place.before, *(place.addresses if place.own else ())])


def _agree(values: Sequence[int], told: Sequence[int | None]) -> bool:
    """Whether they are as told, where anything is."""
    return len(values) == len(told) and all(was in (value, None) for value, was in zip(values, told, strict=True))


def _described(addresses: Sequence[Address]) -> tuple[BlockAddress, ...]:
    return tuple(BlockAddress(medium=int(one.medium), block=one.block, epoch=one.epoch) for one in addresses)


def _addresses(instance: str, described: Sequence[BlockAddress]) -> list[Address]:
    try:
        return [Address(instance, Medium(one.medium), one.block, one.epoch) for one in described]
    except ValueError as error:
        raise WrongBlock(str(error)) from error


def _refusal(code: str, message: str) -> Refusal:
    return Refusal(Failure(stage=Stage.DECODE, code=code, message=message, retryable=True))

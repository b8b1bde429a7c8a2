"""The tensor transport's contract, part three: many tensors of one owner, fetched together."""

import asyncio
import signal
from collections.abc import Sequence

import pytest
import torch

from common.messages.tensors import TensorRef
from common.tensors import TensorFetchTimeout, TensorMismatch, TensorsFull, TensorUnknown, UcxTensors
from common.tensors.wire import MAXIMUM_TENSORS
from tests.support.bus import eventually
from tests.support.tensor_peer import WAIT_S, TensorPeer, are_patterned, patterned, peers, same_bytes

MB = 1 << 20
# More than are asked for at a time, some of no bytes, some of several pieces.
SIZES = [(number * 7_919) % 60_000 for number in range(MAXIMUM_TENSORS + 20)] + [0, 3 * MB + 1, 1, MB, 2 * MB]


async def exported(peer: TensorPeer, sizes: Sequence[int]) -> list[TensorRef]:
    """One tensor of each size, for one use."""
    return [await peer.export((size,), seed=number) for number, size in enumerate(sizes)]


async def fetched(
    tensors: UcxTensors, refs: Sequence[TensorRef], places: Sequence[torch.Tensor | None] = (), wait_s: float = WAIT_S
) -> list[torch.Tensor]:
    """All of them, in new memory without ``places``."""
    return await tensors.fetch_all(refs, places or [None] * len(refs), deadline_s=wait_s)


async def test_all_come_in_order_to_the_places_given_and_are_counted() -> None:
    async with peers() as [peer], await UcxTensors.open("test", stripe_bytes=MB) as tensors:
        refs = await exported(peer, SIZES)
        home = torch.zeros(sum(SIZES), dtype=torch.uint8)
        places = [place if number % 3 else None for number, place in enumerate(home.split(SIZES))]
        came = await fetched(tensors, refs, places)
        assert [one.numel() for one in came] == SIZES and are_patterned(came)
        for one, place in zip(came, places, strict=True):
            assert place is None or one is place
        await peer.counts_become(0, 0, 0)


async def test_all_are_exported_together_or_none_is() -> None:
    async with (
        await UcxTensors.open("owner", max_exported_bytes=1000) as owner,
        await UcxTensors.open("test") as tensors,
    ):
        ours = [patterned((100,), seed=number) for number in range(10)]
        with pytest.raises(TensorMismatch, match="contiguous"):
            owner.export_all([*ours, torch.zeros(3, 4).t()])
        with pytest.raises(TensorsFull, match="1000"):
            owner.export_all([*ours, torch.zeros(1)])
        assert (owner.exported_count, owner.exported_bytes) == (0, 0)
        assert owner.export_all([]) == []
        refs = owner.export_all(ours, uses=2, lease_s=WAIT_S)
        for left in (10, 0):
            assert are_patterned(await fetched(tensors, refs))
            await eventually(lambda left=left: owner.exported_count == left)


async def test_each_lease_ends_at_its_own_time_whichever_was_given_first() -> None:
    async with await UcxTensors.open("test") as tensors:
        long, short = (tensors.export(torch.zeros(1), uses=None, lease_s=lease_s) for lease_s in (WAIT_S, 0.05))
        shortest = tensors.export(torch.zeros(1), uses=None, lease_s=0.01)
        await eventually(lambda: tensors.exported_count == 1)
        for ref in (short, shortest):
            with pytest.raises(TensorUnknown):
                tensors.renew(ref, WAIT_S)
        tensors.renew(long, 0.05)
        await eventually(lambda: tensors.exported_count == 0)


async def test_one_that_is_unknown_is_named_and_none_is_counted() -> None:
    async with peers() as [peer], await UcxTensors.open("test") as tensors:
        refs = await exported(peer, [1000] * (MAXIMUM_TENSORS + 2))
        gone = refs[-1]
        await tensors.fetch(gone, deadline_s=WAIT_S)
        with pytest.raises(TensorUnknown) as raised:
            await fetched(tensors, refs)
        assert raised.value.ref == gone
        assert are_patterned(await fetched(tensors, refs[:-1]))
        await peer.counts_become(0, 0, 0)


async def test_those_of_two_owners_and_what_does_not_fit_are_refused_before_anything_is_sent() -> None:
    async with peers(2) as [one, two], await UcxTensors.open("test") as tensors:
        [first], [second] = await exported(one, [10]), await exported(two, [10])
        with pytest.raises(TensorMismatch, match="one owner"):
            await tensors.fetch_all([first, second], [None, None])
        with pytest.raises(TensorMismatch, match="2 places"):
            await tensors.fetch_all([first], [None, None])
        with pytest.raises(TensorMismatch, match=r"\(11,\)"):
            await tensors.fetch_all([first, first], [None, torch.zeros(11, dtype=torch.uint8)])
        assert await tensors.fetch_all([], []) == []
        assert are_patterned(await fetched(tensors, [first]))
        await one.counts_become(0, 0, 0)


async def test_own_ones_are_copied_and_counted() -> None:
    async with await UcxTensors.open("test") as tensors:
        refs = [tensors.export(patterned((size,), seed=number)) for number, size in enumerate(SIZES)]
        into = torch.zeros(SIZES[1], dtype=torch.uint8)
        came = await fetched(tensors, refs, [None, into, *[None] * len(refs[2:])])
        assert came[1] is into
        assert are_patterned(came) and tensors.exported_count == 0
        with pytest.raises(TensorUnknown):
            await tensors.fetch_all(refs[:2], [None, None])


async def test_many_at_once_do_not_get_into_each_others_way() -> None:
    async with peers(2) as [one, two], await UcxTensors.open("test", stripe_bytes=MB) as tensors:
        groups = [await exported((one, two)[number % 2], SIZES) for number in range(3)]
        fetching = [fetched(tensors, refs) for refs in groups]
        assert all(are_patterned(came) for came in await asyncio.gather(*fetching))
        for peer in (one, two):
            await peer.counts_become(0, 0, 0)


async def test_a_stopped_owner_times_out_and_writes_nowhere_when_it_goes_on() -> None:
    async with peers() as [owner], await UcxTensors.open("test", stripe_bytes=MB) as tensors:
        refs = await exported(owner, SIZES)
        home = torch.zeros(sum(SIZES), dtype=torch.uint8)
        warm = await owner.export((MB,), uses=None)
        await tensors.fetch(warm, deadline_s=WAIT_S)
        owner.stop()
        with pytest.raises(TensorFetchTimeout, match="did not answer") as raised:
            await fetched(tensors, refs, home.split(SIZES), wait_s=0.5)
        assert raised.value.ref == refs[0]
        home.fill_(7)
        owner.signal(signal.SIGCONT)
        # The late request is answered before this one.
        await tensors.fetch(warm, deadline_s=WAIT_S)
        await owner.counts_become(len(refs) + 1, sum(SIZES) + MB, 0)
        assert bool((home == 7).all())
        assert are_patterned(await fetched(tensors, refs, home.split(SIZES)))
        await owner.counts_become(1, MB, 0)


@pytest.mark.parametrize("killed", [False, True])
async def test_cancelled_or_bereft_in_the_middle_the_places_are_left_alone(killed: bool) -> None:
    size, count = 8 * MB, 16
    async with peers(2) as [owner, survivor], await UcxTensors.open("test") as tensors:
        small = await survivor.export((MB,), seed=3, uses=None)
        refs = await exported(owner, [size] * count)
        home = torch.zeros(size * count, dtype=torch.uint8)
        # A death before UCX has looked at the owner once is not noticed before the deadline.
        fetch = asyncio.create_task(fetched(tensors, refs, home.split(size), wait_s=8.0 if killed else WAIT_S))
        await eventually(lambda: home[0] != 0 or fetch.done())
        if killed:
            owner.kill()
        else:
            fetch.cancel()
        [outcome] = await asyncio.gather(fetch, return_exceptions=True)
        # It may have been too fast to be caught.
        if isinstance(outcome, list):
            assert are_patterned(outcome)
        else:
            assert isinstance(outcome, TensorFetchTimeout if killed else asyncio.CancelledError)
            home.fill_(1)
            assert same_bytes(await tensors.fetch(small, deadline_s=WAIT_S), patterned((MB,), seed=3))
            if not killed:
                assert are_patterned(await fetched(tensors, refs[:2]))
                await owner.counts_become(count - 2, (count - 2) * size, 0)
            assert bool((home == 1).all())
        await eventually(lambda: tensors.in_flight == 0)


async def test_a_killed_receiver_leaves_all_to_their_leases() -> None:
    async with peers(2) as [victim, other], await UcxTensors.open("test") as tensors:
        refs = [tensors.export(patterned((300_000,), seed=number)) for number in range(MAXIMUM_TENSORS)]
        asked = asyncio.create_task(victim.ask("fetch_all", refs=[ref.pack() for ref in refs], deadline_s=1.0))
        await eventually(lambda: tensors.in_flight > 0 or asked.done())
        victim.kill()
        asked.cancel()
        await asyncio.gather(asked, return_exceptions=True)
        again = tensors.export(patterned((MB,), seed=0))
        assert await other.ask("fetch_all", refs=[again.pack()])
        for ref in refs:
            await tensors.release(ref)
        await eventually(lambda: tensors.in_flight == 0)
        assert tensors.exported_bytes == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(("source", "target"), [("cuda", "cuda"), ("cuda", "cpu"), ("cpu", "cuda")])
async def test_many_travel_between_devices(source: str, target: str) -> None:
    async with peers(device=source) as [peer], await UcxTensors.open("test", device=target) as tensors:
        refs = await exported(peer, SIZES)
        places = [torch.zeros(size, dtype=torch.uint8, device=target) if size % 2 else None for size in SIZES]
        assert are_patterned(await fetched(tensors, refs, places))
        ours = [tensors.export(patterned((size,), seed=number).to(source)) for number, size in enumerate(SIZES)]
        assert await peer.ask("fetch_all", refs=[ref.pack() for ref in ours])

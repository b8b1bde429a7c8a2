"""The tensor transport's contract, part two: owners and receivers that die, stop or start again."""

import asyncio
import contextlib
import gc
import signal
import weakref

import pytest
import torch

from common.messages.tensors import TensorRef
from common.tensors import TensorFetchTimeout, TensorUnknown, UcxTensors
from tests.support.bus import eventually
from tests.support.tensor_peer import WAIT_S, TensorPeer, patterned, peers, same_bytes, shared_memory_of

MB = 1 << 20
BIG = 256 * MB


async def until_it_begins(fetch: asyncio.Task[torch.Tensor], into: torch.Tensor) -> None:
    """Bytes have arrived, and more are to come (or the fetch was too fast to be caught)."""
    await eventually(lambda: into[0] != 0 or fetch.done())


async def test_a_killed_owner_is_a_typed_error_and_its_next_life_another_owner() -> None:
    async with await UcxTensors.open("test") as tensors:
        async with peers() as [owner]:
            ref = await owner.export((MB,), uses=None)
            assert same_bytes(await tensors.fetch(ref, deadline_s=WAIT_S), patterned((MB,)))
            owner.kill()
            with pytest.raises(TensorFetchTimeout):
                await tensors.fetch(ref, deadline_s=8.0)
        async with peers() as [again]:
            new = await again.export((MB,), seed=1, uses=None)
            assert new.owner == ref.owner
            with pytest.raises(TensorFetchTimeout):
                await tensors.fetch(ref, deadline_s=1.0)
            with pytest.raises(TensorUnknown):
                await tensors.fetch(ref.model_copy(update={"address": new.address}), deadline_s=WAIT_S)
            assert same_bytes(await tensors.fetch(new, deadline_s=WAIT_S), patterned((MB,), seed=1))


async def test_an_owner_that_was_never_spoken_to_and_is_dead_is_a_typed_error() -> None:
    async with peers() as [
        owner,
    ]:
        ref = await owner.export((MB,), uses=None)
        owner.kill()
        async with await UcxTensors.open("test") as tensors:
            with pytest.raises(TensorFetchTimeout):
                await tensors.fetch(ref, deadline_s=2.0)
            await tensors.release(ref)


@pytest.mark.parametrize("given", [False, True])
async def test_an_owner_killed_in_the_middle_fails_that_fetch_alone(given: bool) -> None:
    async with peers() as [survivor], await UcxTensors.open("test", stripe_bytes=8 * MB) as tensors:
        good = await survivor.export((MB,), seed=3, uses=None)
        for _ in range(3):
            async with peers() as [owner]:
                ref = await owner.export((BIG,), seed=1)
                into = torch.zeros(BIG, dtype=torch.uint8)
                fetch = asyncio.create_task(tensors.fetch(ref, into, deadline_s=10.0))
                await until_it_begins(fetch, into)
                owner.kill()
                if given:
                    await asyncio.gather(fetch, return_exceptions=True)
                    outcome = fetch.exception()
                    assert isinstance(outcome, TensorFetchTimeout) or same_bytes(into, patterned((BIG,), seed=1))
                    into.fill_(1)
                together = await asyncio.gather(*(tensors.fetch(good, deadline_s=WAIT_S) for _ in range(8)))
                assert all(same_bytes(tensor, patterned((MB,), seed=3)) for tensor in together)
                await asyncio.gather(fetch, return_exceptions=True)
                if given:
                    assert bool((into == 1).all())


async def test_a_stopped_owner_times_out_and_does_no_harm_when_it_goes_on() -> None:
    async with peers() as [owner], await UcxTensors.open("test", stripe_bytes=MB) as tensors:
        ref = await owner.export((20 * MB,), seed=1, uses=1)
        warm = await owner.export((MB,), uses=None)
        await tensors.fetch(warm, deadline_s=WAIT_S)
        into = torch.zeros(20 * MB, dtype=torch.uint8)
        owner.stop()
        with pytest.raises(TensorFetchTimeout, match="did not answer"):
            await tensors.fetch(ref, into, deadline_s=0.5)
        into.fill_(7)
        owner.signal(signal.SIGCONT)
        # The late request is answered before this one, its bytes refused: nothing of it may be written.
        assert same_bytes(await tensors.fetch(warm, deadline_s=WAIT_S), patterned((MB,)))
        await owner.counts_become(2, 21 * MB, 0)
        assert bool((into == 7).all())
        # The use was not counted, for nobody had it.
        assert same_bytes(await tensors.fetch(ref, into, deadline_s=WAIT_S), patterned((20 * MB,), seed=1))
        await owner.counts_become(1, MB, 0)


async def test_memory_that_awaits_a_tensor_in_vain_is_let_go_of() -> None:
    async with peers() as [owner], await UcxTensors.open("test") as tensors:
        ref = await owner.export((MB,), seed=1, uses=1)
        with pytest.raises(TensorUnknown):
            await tensors.fetch(ref.model_copy(update={"tensor_id": ref.tensor_id + 1}))
        await eventually(lambda: tensors.in_flight == 0)
        owner.stop()
        with pytest.raises(TensorFetchTimeout, match="did not answer"):
            await tensors.fetch(ref, deadline_s=0.3)
        owner.signal(signal.SIGCONT)
        # The late answer lands in memory that nobody has: not in what is fetched next, and it is not counted.
        assert same_bytes(await tensors.fetch(ref, deadline_s=WAIT_S), patterned((MB,), seed=1))
        await eventually(lambda: tensors.in_flight == 0)
        await owner.counts_become(0, 0, 0)


async def test_an_owner_stopped_in_the_middle_never_writes_into_memory_given_back() -> None:
    async with peers() as [owner], await UcxTensors.open("test", stripe_bytes=MB) as tensors:
        ref = await owner.export((BIG,), seed=1, uses=None)
        into = torch.zeros(BIG, dtype=torch.uint8)
        fetch = asyncio.create_task(tensors.fetch(ref, into, deadline_s=1.0))
        await until_it_begins(fetch, into)
        owner.stop()
        await asyncio.gather(fetch, return_exceptions=True)
        if fetch.exception() is None:
            assert same_bytes(into, patterned((BIG,), seed=1))
        else:
            assert isinstance(fetch.exception(), TensorFetchTimeout)
        into.fill_(9)
        owner.signal(signal.SIGCONT)
        await owner.counts_become(1, BIG, 0)
        assert bool((into == 9).all())
        assert same_bytes(await tensors.fetch(ref, into, deadline_s=WAIT_S), patterned((BIG,), seed=1))


async def receiver_in_the_middle(
    tensors: UcxTensors, receiver: TensorPeer, ref: TensorRef, deadline_s: float
) -> asyncio.Task[bool]:
    """A fetch by ``receiver`` of which pieces are under way."""
    task = asyncio.create_task(receiver.ask("fetch", ref=ref.pack(), deadline_s=deadline_s))
    await eventually(lambda: tensors.in_flight > 0 or task.done())
    return task


async def test_a_receiver_killed_in_the_middle_leaves_a_healthy_owner_that_frees_by_lease() -> None:
    async with peers(2) as [victim, other], await UcxTensors.open("test", stripe_bytes=8 * MB) as tensors:
        tensor = patterned((BIG,))
        gone = weakref.ref(tensor)
        ref = tensors.export(tensor, uses=1, lease_s=WAIT_S)
        del tensor
        task = await receiver_in_the_middle(tensors, victim, ref, 5.0)
        victim.kill()
        task.cancel()
        assert await other.ask("fetch", ref=tensors.export(patterned((MB,), seed=2)).pack(), seed=2)
        with contextlib.suppress(TensorUnknown):  # the receiver was done with it
            tensors.renew(ref, 0.1)
        await eventually(lambda: tensors.exported_count == 0 and tensors.in_flight == 0)
        gc.collect()
        assert gone() is None


async def test_a_receiver_that_stops_for_good_does_not_hold_the_memory_and_may_come_back() -> None:
    async with peers() as [receiver], await UcxTensors.open("test", stripe_bytes=8 * MB) as tensors:
        tensor = patterned((BIG,))
        gone = weakref.ref(tensor)
        ref = tensors.export(tensor, uses=None, lease_s=WAIT_S)
        del tensor
        task = await receiver_in_the_middle(tensors, receiver, ref, 0.5)
        tensors.renew(ref, 0.5)
        receiver.stop()
        await eventually(lambda: tensors.exported_count == 0 and tensors.in_flight == 0)
        gc.collect()
        assert gone() is None
        receiver.signal(signal.SIGCONT)
        [outcome] = await asyncio.gather(task, return_exceptions=True)
        assert outcome is True or "Timeout" in str(outcome) or "OwnerLost" in str(outcome)
        for seed in range(3):
            again = tensors.export(patterned((3 * MB,), seed=seed))
            assert await receiver.ask("fetch", ref=again.pack(), seed=seed)
            theirs = await receiver.export((3 * MB,), seed=seed)
            assert same_bytes(await tensors.fetch(theirs, deadline_s=WAIT_S), patterned((3 * MB,), seed=seed))


@pytest.mark.alone
async def test_nothing_stays_in_shared_memory_after_kill_9() -> None:
    # What others left on this machine is theirs.
    before = set(shared_memory_of(set()))
    async with peers(2) as [one, two]:
        pids = {one.pid, two.pid}
        ref = await one.export((BIG,), uses=None)
        assert await two.ask("fetch", ref=ref.pack())
        task = asyncio.create_task(two.ask("fetch", ref=ref.pack()))
        await asyncio.sleep(0.05)
        one.kill()
        two.kill()
        task.cancel()
        await eventually(lambda: not set(shared_memory_of(pids)) - before)

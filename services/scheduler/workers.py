"""What the scheduler says to encoders, DiT and VAE workers."""

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Iterable
from typing import Any

import structlog

from common.bus.errors import BusError, BusUnavailable, DeadlineExceeded, NobodyThere
from common.bus.port import Bus
from common.messages.cluster import Ping
from common.messages.subjects import (
    CANCEL_DECODING,
    DECODE_VIDEO,
    ENCODE_PROMPT,
    FIND_LATENT,
    GRANT_LEASE,
    PARK_JOB,
    PING,
    REVOKE_LEASE,
    Reply,
    Request,
    RequestSubject,
)
from common.messages.video import (
    CancelDecoding,
    Checkpoint,
    DecodeVideo,
    EncodePrompt,
    FindLatent,
    LatentFound,
    Lease,
    ParkJob,
    PromptEncoded,
    RevokeLease,
)
from common.policies.video import decisions as decide

log = structlog.get_logger()

CONTROL_DEADLINE_S = 5.0
ENCODE_DEADLINE_S = 60.0
# A worker that joins a group answers when it is free, which may take the step of a job that was taken from it.
JOIN_DEADLINE_S = 65.0
PING_DEADLINE_S = 1.0
# A worker answers once the step under way is done; then a checkpoint of its group may be all there is.
LATENT_DEADLINE_S = 2.5
# Both together are less than workers keep what they had.
HEARD_DEADLINE_S = 3.0
# A broker that is started again takes what was asked, or the answer, with it: asked again after so long, then after
# twice that, and so on. Workers take everything twice.
PATIENCE_S = 2.0


class Workers:
    """The conversation with all workers. One that is not there is not chosen again before it has given a life sign.

    ``meetings`` has the address of each DiT worker at which groups meet that it leads.
    """

    def __init__(self, bus: Bus, doubt: Callable[[str], None]) -> None:
        """doubt: told of a worker that is not there."""
        self._bus = bus
        self._doubt = doubt
        self._asked: dict[str, set[asyncio.Timeout]] = {}
        self._unheard: set[str] = set()
        self._all_heard = asyncio.Event()
        self._all_heard.set()
        self._at_hand: dict[str, set[str]] = {}
        self.meetings: dict[str, str] = {}

    def lost(self, instance: str) -> None:
        """It is gone: who waits for its answer gets `NobodyThere` now, not at the deadline."""
        now_s = asyncio.get_running_loop().time()
        for until_lost in self._asked.pop(instance, ()):
            until_lost.reschedule(now_s)

    async def encode(self, request: EncodePrompt, instance: str) -> PromptEncoded:
        return await self._ask(ENCODE_PROMPT, request, instance, ENCODE_DEADLINE_S)

    async def grant(self, lease: Lease) -> None:
        """Give the lease to all members: at once to all who join, and to the leader when they have said yes.

        The leader may thus go over to it at its next step boundary without asking anybody.
        """
        await _together(
            self._ask(GRANT_LEASE, lease, instance, JOIN_DEADLINE_S)
            for instance in lease.members
            if instance != lease.leader
        )
        await self._ask(GRANT_LEASE, lease, lease.leader)

    async def park(self, decision: decide.ParkJob) -> None:
        """Tell the leader, who tells the others."""
        await self._ask(PARK_JOB, ParkJob(job_id=decision.job_id, epoch=decision.epoch), decision.members[0])

    async def decode(self, work: DecodeVideo, instance: str) -> None:
        await self._ask(DECODE_VIDEO, work, instance)

    async def withdraw(self, decision: decide.RevokeLease | decide.CancelDecoding) -> None:
        """Have a job let go, by all who have it at once."""
        match decision:
            case decide.RevokeLease(job_id, epoch, members):
                await _together(self.revoke_lease(member, job_id, epoch) for member in members)
            case decide.CancelDecoding(job_id, epoch, instance):
                await self.cancel_decoding(instance, job_id, epoch)

    async def revoke_lease(self, instance: str, job_id: str | None, epoch: int) -> str | None:
        """Have a DiT worker drop the leases of ``job_id`` (None: of any job) up to ``epoch``; which job it has at hand.

        One that cannot be told is dying; should it live on, the next lease's higher epoch tells it.
        """
        try:
            revoke = RevokeLease(job_id=job_id, epoch=epoch)
            return (await self._ask_until_answered(REVOKE_LEASE, revoke, instance, CONTROL_DEADLINE_S)).job_id
        except BusError as error:
            log.info("lease not revoked", instance=instance, job=job_id, reason=str(error))
            return None

    async def take_back(self, instance: str, epoch: int) -> None:
        """Have a DiT worker drop what was granted before, up to ``epoch``, and note which job it has at hand."""
        self._unheard.add(instance)
        self._all_heard.clear()
        try:
            at_hand = await self.revoke_lease(instance, None, epoch)
            if at_hand is not None:
                self._at_hand.setdefault(at_hand, set()).add(instance)
        finally:
            self._unheard.discard(instance)
            if not self._unheard:
                self._all_heard.set()

    async def kept_latent(self, job_id: str, above: int, leader: str) -> Checkpoint | None:
        """The furthest latent that is still kept by those from whom the job was taken back, exported for one fetch.

        None if it is not ``above`` so many steps. Of several as far as each other, that of ``leader``, the next one.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(HEARD_DEADLINE_S):
                await self._all_heard.wait()
        at_hand = self._at_hand.pop(job_id, set())
        found = await asyncio.gather(*(self._find_latent(instance, FindLatent(job_id=job_id)) for instance in at_hand))
        kept = sorted(
            ((latent.step, instance == leader, instance) for latent, instance in zip(found, at_hand, strict=True)),
            reverse=True,
        )
        for step, _, instance in kept:
            if step <= above:
                break
            latent = await self._find_latent(instance, FindLatent(job_id=job_id, uses=1))
            if latent.latent is not None:
                return Checkpoint(step=latent.step, latent=latent.latent)
        return None

    async def _find_latent(self, instance: str, request: FindLatent) -> LatentFound:
        try:
            return await self._ask(FIND_LATENT, request, instance, LATENT_DEADLINE_S)
        except BusError as error:
            log.info("not known what is kept of a job", instance=instance, job=request.job_id, reason=str(error))
            return LatentFound()

    async def cancel_decoding(self, instance: str, job_id: str | None, epoch: int) -> None:
        """Have a VAE worker drop the decoding of ``job_id`` (None: of any job) up to ``epoch``."""
        try:
            cancel = CancelDecoding(job_id=job_id, epoch=epoch)
            await self._ask_until_answered(CANCEL_DECODING, cancel, instance, CONTROL_DEADLINE_S)
        except BusError as error:
            log.info("decoding not cancelled", instance=instance, job=job_id, reason=str(error))

    async def look_for_dead(self, instances: Iterable[str]) -> None:
        """Doubt those of a broken group that are gone. The broker knows at once; life signs stop only after a while."""
        await _together(self._ping(instance) for instance in instances)

    async def _ping(self, instance: str) -> None:
        try:
            await self._ask(PING, Ping(), instance, PING_DEADLINE_S)
        except BusError as error:
            log.info("member of a broken group does not answer", instance=instance, reason=str(error))

    async def _ask(
        self,
        subject: RequestSubject[Request, Reply],
        request: Request,
        instance: str,
        deadline_s: float = CONTROL_DEADLINE_S,
    ) -> Reply:
        until_lost = asyncio.timeout(None)
        asked = self._asked.setdefault(instance, set())
        try:
            async with until_lost:
                asked.add(until_lost)
                try:
                    return await self._ask_until_answered(subject, request, instance, deadline_s)
                finally:
                    asked.discard(until_lost)
        except TimeoutError:
            raise NobodyThere(f"{instance} was lost while it was asked") from None
        except NobodyThere:
            self._doubt(instance)
            raise

    async def _ask_until_answered(
        self, subject: RequestSubject[Request, Reply], request: Request, instance: str, deadline_s: float
    ) -> Reply:
        loop = asyncio.get_running_loop()
        ends_s = loop.time() + deadline_s
        patience_s = PATIENCE_S
        while True:
            left_s = ends_s - loop.time()
            try:
                return await self._bus.request(subject, request, instance, deadline_s=min(patience_s, left_s))
            except (DeadlineExceeded, BusUnavailable):
                if left_s <= patience_s:
                    raise
            patience_s *= 2


async def _together(requests: Iterable[Coroutine[Any, Any, object]]) -> None:
    """Make all of them at once; raises the first's error, when all have ended."""
    outcomes = await asyncio.gather(*requests, return_exceptions=True)
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome

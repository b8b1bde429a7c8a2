"""The scheduler gives out more than one GPU: leases start, change, heal and are parked, and all of it is on record."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from common.bus.nats_bus import NatsBus
from common.messages.cache import FindTensor, TensorFound
from common.messages.cluster import Service
from common.messages.subjects import FIND_TENSOR, VIDEO_PROGRESS, VIDEO_TIMELINES
from common.messages.tensors import TensorRef
from common.messages.video import Checkpoint, Lease, VideoProgress, VideoState
from common.policies.video.decisions import GrantLease, ParkJob
from common.policies.video.events import JobArrived
from common.policies.video.registry import make_policy
from common.policies.video.rib import KindProfile, Rib, VideoKind
from common.runtime.process import CannotServe
from loadgen.simulator.replay import from_lines, replay
from services.scheduler.choices import choose_policy, open_record
from services.scheduler.config import SchedulerSettings
from services.scheduler.service import EPOCHS_PER_LIFE
from tests.component.test_scheduler import REQUEST, Heard, Stage, recorded, stage
from tests.support.bus import eventually
from tests.support.nats_server import NatsServer
from tests.support.workers import WAIT_S, PlayedWorker, played_worker

LONG = REQUEST.model_copy(update={"steps": 50})
PARKED = TensorRef(owner="cache_store-0", tensor_id=5, address=b"there", shape=(1,), dtype="float32", size_bytes=4)


# Two GPUs pay off, four do not.
RIB = Rib(
    {VideoKind(REQUEST.width, REQUEST.height, REQUEST.frames): KindProfile({1: 1.0, 2: 0.52, 4: 0.54}, decode_s=0.1)}
)


@dataclass
class Group:
    """A stage with two slots of one server, and the second slot's worker."""

    play: Stage
    other: PlayedWorker
    record: Path

    async def lease(self) -> Lease:
        """The next lease that both are given."""
        lease = await self.play.dit.next_lease()
        assert await self.other.next_lease() == lease
        return lease


@contextlib.asynccontextmanager
async def two_slots(url: str, folder: Path, policy: str = "ddit") -> AsyncIterator[Group]:
    profile, record = folder / "rib.json", folder / "record.jsonl"
    profile.write_text(RIB.to_json())
    settings = {"policy": policy, "rib": profile, "record": record}
    async with stage(url, **settings) as play, played_worker(url, Service.DIT, 1) as other:
        # The scheduler knows a worker once it has cleared what its predecessor left there.
        await recorded(record, '"WorkerJoined"', 4)
        yield Group(play, other, record)


def decided(record: Path, policy: str) -> list[object]:
    """What the recorded events, played again, make a fresh policy decide."""
    events = from_lines(record.read_text())
    return [decision for _, decision in replay(events, make_policy(policy, EPOCHS_PER_LIFE, RIB))]


def leases_in(decisions: list[object]) -> list[tuple[int, tuple[str, ...]]]:
    return [(each.epoch, each.members) for each in decisions if isinstance(each, GrantLease)]


async def finish(group: Group, lease: Lease, job_id: str) -> None:
    await group.play.dit.finish_denoising(lease)
    await group.play.vae.finish_decoding(await group.play.vae.next_decoding())
    await group.play.reaches(job_id, VideoState.COMPLETED)


async def test_a_job_starts_on_all_members_and_its_timeline_names_them(nats_server: NatsServer, tmp_path: Path) -> None:
    async with two_slots(nats_server.url, tmp_path) as group:
        await group.play.submit("video_a")
        lease = await group.lease()
        assert (lease.members, lease.slots, lease.leader) == (("dit-0", "dit-1"), (0, 1), "dit-0")
        assert (lease.meeting, lease.from_step) == ("where dit-0 leads", 0)
        assert lease.text is not None and lease.resume is None
        await group.play.dit.do_step(lease, 1)
        await group.play.dit.do_step(lease, 2)
        await recorded(group.record, '"StepFinished"', 2)
        await finish(group, lease, "video_a")
        spans = (await group.play.bus.get(VIDEO_TIMELINES, "video_a")).value.spans
        steps = [(span.step, span.slot, span.instance) for span in spans if span.phase == "step"]
        assert steps == [(1, 0, "dit-0"), (1, 1, "dit-1"), (2, 0, "dit-0"), (2, 1, "dit-1")]
        assert all(span.degree_of_parallelism == 2 for span in spans if span.phase == "step")


async def test_a_hungry_job_grows_and_its_leader_hears_of_it_last(nats_server: NatsServer, tmp_path: Path) -> None:
    async with two_slots(nats_server.url, tmp_path) as group:
        heard = Heard()
        await group.play.bus.subscribe(VIDEO_PROGRESS, heard)
        await group.other.leave()
        await recorded(group.record, '"WorkerLost"')
        await group.play.submit("video_a", LONG)
        first = await group.play.dit.next_lease()
        assert first.members == ("dit-0",)
        await group.play.dit.do_step(first, 1)
        await recorded(group.record, '"StepFinished"')
        group.other.free.clear()
        await group.other.join(group.play.url)
        grown = await group.other.next_lease()
        assert (grown.members, grown.from_step, grown.text) == (("dit-0", "dit-1"), 1, None)
        await asyncio.sleep(0.2)
        assert group.play.dit.leases.empty(), "the leader goes over as soon as it hears, so all must be free by then"
        group.other.free.set()
        assert await group.play.dit.next_lease() == grown
        await group.play.dit.do_step(first, 2, next_epoch=grown.epoch)
        await eventually(lambda: any((each.step, each.degree_of_parallelism) == (2, 2) for each in heard.all))
        await group.play.dit.do_step(grown, 3)
        await heard.until(lambda last: last.step == 3)
        await finish(group, grown, "video_a")
        leases = [(first.epoch, first.members), (grown.epoch, grown.members)]
        assert leases_in(decided(group.record, "ddit")) == leases


async def test_those_left_of_a_group_get_a_lease_at_once(nats_server: NatsServer, tmp_path: Path) -> None:
    async with two_slots(nats_server.url, tmp_path) as group:
        await group.play.submit("video_a", LONG)
        lease = await group.lease()
        await group.play.dit.do_step(lease, 7)
        await recorded(group.record, '"StepFinished"')
        # Killed: its record stands, its last life sign is fresh, but nobody is there. Its group notices first.
        await group.other.bus.close()
        await group.play.dit.lose_group(lease)
        healing = await group.play.dit.next_lease()
        assert (healing.members, healing.slots, healing.from_step) == (("dit-0",), (0,), 7)
        assert healing.text is None and healing.epoch > lease.epoch
        # Its report of the step under way crossed the loss.
        await group.play.dit.do_step(healing, 8)
        await finish(group, healing, "video_a")
        assert (await group.play.reaches("video_a", VideoState.COMPLETED)).attempt == 1


async def test_a_lost_leader_is_followed_by_one_of_the_others(nats_server: NatsServer, tmp_path: Path) -> None:
    async with two_slots(nats_server.url, tmp_path) as group:
        await group.play.submit("video_a", LONG)
        lease = await group.lease()
        await group.play.dit.do_step(lease, 7)
        await group.play.dit.leave()
        healing = await group.other.next_lease()
        assert (healing.leader, healing.slots, healing.meeting) == ("dit-1", (1,), "where dit-1 leads")
        await group.other.do_step(healing, 8)
        await group.other.finish_denoising(healing)
        work = await group.play.vae.next_decoding()
        assert work.latent == group.other.ref(healing.epoch), "decoded where there is a VAE, fetched from where it lies"


async def test_a_joining_worker_that_dies_does_not_cost_the_running_job_anything(
    nats_server: NatsServer, tmp_path: Path
) -> None:
    async with two_slots(nats_server.url, tmp_path) as group:
        await group.other.leave()
        await recorded(group.record, '"WorkerLost"')
        await group.play.submit("video_a", LONG)
        first = await group.play.dit.next_lease()
        await group.play.dit.do_step(first, 1)
        group.other.free.clear()
        await group.other.join(group.play.url)
        await group.other.next_lease()
        # Nobody is there when it is asked again.
        await group.other.bus.close()
        alone = await group.play.dit.next_lease()
        assert (alone.members, alone.text) == (("dit-0",), None)
        await group.play.dit.do_step(first, 2, next_epoch=alone.epoch)
        await finish(group, alone, "video_a")
        assert (await group.play.reaches("video_a", VideoState.COMPLETED)).attempt == 1
        assert group.play.dit.revoked.empty()


async def test_a_job_is_parked_for_a_shorter_one_and_goes_on(
    nats_server: NatsServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for wait in ("FIND_DEADLINE_S", "RESTART_S"):
        monkeypatch.setattr(f"services.scheduler.checkpoints.{wait}", WAIT_S)
    async with (
        two_slots(nats_server.url, tmp_path, policy="srtf") as group,
        await NatsBus.connect(nats_server.url, name="cache_store-0") as store,
    ):

        async def find(request: FindTensor) -> TensorFound:
            ref = PARKED if request.uses else None
            return TensorFound(key=request.key, tensor_version=7, tensor=ref)

        await store.serve(FIND_TENSOR, find)
        heard = Heard()
        await group.play.bus.subscribe(VIDEO_PROGRESS, heard)
        await group.play.submit("long", LONG)
        lease = await group.lease()
        await group.play.dit.do_step(lease, 6)
        await group.play.submit("short")
        park = await group.play.dit.next_park()
        assert (park.job_id, park.epoch) == ("long", lease.epoch)
        assert group.other.parks.empty(), "the leader tells the others"
        await group.play.dit.finish_parking(lease, 7)
        # It was told of before, by an event, which takes another way.
        await group.play.dit.do_step(lease, 7)
        await recorded(group.record, '"StepFinished"', 2)
        short = await group.lease()
        assert short.job_id == "short"
        waits = VideoProgress(job_id="long", state=VideoState.DENOISING, queue_place=1, step=7, steps=LONG.steps)
        await eventually(lambda: waits in heard.all)
        # While the master of the short one decodes, the long one goes on where nobody is.
        await group.play.dit.finish_denoising(short)
        decoding = await group.play.vae.next_decoding()
        again = await group.other.next_lease()
        assert (again.job_id, again.members, again.from_step) == ("long", ("dit-1",), 7)
        assert again.resume == Checkpoint(step=7, latent=PARKED)
        assert again.text is not None and group.play.encoder.encoded.count("long") >= 2
        await group.play.vae.finish_decoding(decoding)
        grown = await group.lease()
        assert (grown.members, grown.meeting, grown.text) == (("dit-1", "dit-0"), "where dit-1 leads", None)
        await group.other.do_step(again, 8, next_epoch=grown.epoch)
        await recorded(group.record, '"StepFinished"', 3)
        await group.other.finish_denoising(grown)
        await group.play.vae.finish_decoding(await group.play.vae.next_decoding())
        assert (await group.play.reaches("long", VideoState.COMPLETED)).attempt == 1
        timeline = (await group.play.bus.get(VIDEO_TIMELINES, "long")).value
        assert {span.step for span in timeline.spans if span.phase == "step"} == {6, 7, 8}
        assert any(isinstance(decision, ParkJob) for decision in decided(group.record, "srtf"))


async def test_a_run_that_was_drained_is_played_again_as_it_was(nats_server: NatsServer, tmp_path: Path) -> None:
    async with two_slots(nats_server.url, tmp_path) as group:
        await group.play.submit("video_a", LONG)
        lease = await group.lease()
        await group.play.submit("video_b")
        await recorded(group.record, '"video_b"')
        stopping = asyncio.create_task(group.play.scheduler.stop())
        await recorded(group.record, '"DrainRequested"')
        await finish(group, lease, "video_a")
        await stopping
        assert leases_in(decided(group.record, "ddit")) == [(lease.epoch, lease.members)]


async def test_all_members_are_told_of_a_cancellation(nats_server: NatsServer, tmp_path: Path) -> None:
    async with two_slots(nats_server.url, tmp_path) as group:
        await group.play.submit("video_a", LONG)
        lease = await group.lease()
        await group.play.cancel("video_a")
        for worker in (group.play.dit, group.other):
            assert (await worker.next_revoked()).epoch == lease.epoch


async def test_priority_deadline_and_checkpoint_reach_the_policy(nats_server: NatsServer, tmp_path: Path) -> None:
    async with two_slots(nats_server.url, tmp_path) as group:
        urgent = LONG.model_copy(update={"priority": 3, "deadline_s": 2e9})
        await group.play.submit("video_a", urgent)
        await group.lease()
        (arrived,) = [each for _, each in from_lines(group.record.read_text()) if isinstance(each, JobArrived)]
        assert (arrived.priority, arrived.deadline_s, arrived.step) == (3, 2e9, 0)


@pytest.mark.parametrize(
    ("settings", "named", "use"),
    [
        ({"policy": "nonsense"}, "TRIPTYCH_POLICY: no policy is called 'nonsense'", choose_policy),
        ({"rib": "nowhere.json"}, "TRIPTYCH_RIB: nowhere.json cannot be used", choose_policy),
        ({"rib": __file__}, "cannot be used: not JSON", choose_policy),
        ({"record": "/nowhere/record.jsonl"}, "TRIPTYCH_RECORD: /nowhere/record.jsonl", lambda s, _: open_record(s)),
    ],
    ids=["policy", "no profile", "wrong profile", "record"],
)
def test_settings_that_cannot_be_used_are_named(
    settings: dict[str, str], named: str, use: Callable[[SchedulerSettings, int], object]
) -> None:
    with pytest.raises(CannotServe, match=named):
        use(SchedulerSettings.model_validate(settings), 1)


def test_empty_paths_are_none() -> None:
    settings = SchedulerSettings.model_validate({"rib": "", "record": ""})
    assert (settings.rib, settings.record, settings.policy) == (None, None, "ddit")

"""Live progress: the present state first, then every change in order, then an end."""

import asyncio
from typing import Any

from common.messages.subjects import VIDEO_PROGRESS
from common.messages.video import VideoProgress, VideoState
from tests.component.gateway_support import ServerSentEvent, Stack, server_sent_events, stack, until
from tests.support.nats_server import NatsServer


class Listener:
    """Reads one stream to its end, and tells when something has been seen."""

    def __init__(self, s: Stack, video_id: str) -> None:
        self.events: list[ServerSentEvent] = []
        self._more = asyncio.Condition()
        self._reading = asyncio.create_task(self._read(s, video_id))

    @property
    def data(self) -> list[dict[str, Any]]:
        return [event.data for event in self.events]

    async def sees(self, **fields: Any) -> None:
        """Wait until the latest event has these values."""
        async with asyncio.timeout(60.0), self._more:
            await self._more.wait_for(lambda: self.events and fields.items() <= self.events[-1].data.items())

    async def ends(self) -> list[ServerSentEvent]:
        async with asyncio.timeout(60.0):
            await self._reading
        return self.events

    async def _read(self, s: Stack, video_id: str) -> None:
        async with s.http.get(f"/v1/videos/{video_id}/events") as response:
            assert response.status == 200
            assert response.content_type == "text/event-stream"
            async for event in server_sent_events(response):
                if isinstance(event, ServerSentEvent):
                    async with self._more:
                        self.events.append(event)
                        self._more.notify_all()


async def listeners(s: Stack, count: int) -> None:
    async def there() -> bool:
        return s.gateway.edge.ledger.listeners == count

    await until(there)


async def test_several_listeners_each_see_the_whole_life_in_order(nats_server: NatsServer) -> None:
    async with stack(nats_server) as s:
        video_id = (await s.create())["id"]
        listening = [Listener(s, video_id) for _ in range(3)]

        async def all_see(**fields: Any) -> None:
            await asyncio.gather(*(listener.sees(**fields) for listener in listening))

        await all_see(state="queued")
        for place in (2, 1):
            await s.progress(video_id, VideoState.QUEUED, queue_place=place)
            await all_see(queue_place=place)
        await s.move(video_id, VideoState.ENCODING)
        await all_see(state="encoding")
        # The progress of a state may come before the record has moved there.
        await s.progress(video_id, VideoState.DENOISING, step=1, degree_of_parallelism=1, remaining_s=9.0)
        await s.move(video_id, VideoState.DENOISING)
        await all_see(state="denoising", step=1)
        for step, degree in ((2, 2), (3, 4)):
            await s.progress(
                video_id, VideoState.DENOISING, step=step, degree_of_parallelism=degree, remaining_s=9.0 - step
            )
            await all_see(step=step)
        await s.move(video_id, VideoState.DECODING)
        await all_see(state="decoding")
        await s.move(video_id, VideoState.CANCELLED)

        for listener in listening:
            events = await listener.ends()
            data = listener.data
            assert all(item["id"] == video_id and item["object"] == "video.event" for item in data)
            states = list(dict.fromkeys(item["state"] for item in data))
            assert states == ["queued", "encoding", "denoising", "decoding", "cancelled"]
            assert [item["queue_place"] for item in data if item["state"] == "queued"] == [None, 2, 1]
            # Record and progress come by separate ways: the record's move may show before its first step.
            denoising = [item for item in data if item["state"] == "denoising" and item["step"] > 0]
            assert [item["step"] for item in denoising] == [1, 2, 3]
            assert [item["degree_of_parallelism"] for item in denoising] == [1, 2, 4]
            assert [item["estimate_s"] for item in denoising] == [9.0, 7.0, 6.0]
            running = [item["progress"] for item in data if item["state"] != "cancelled"]
            assert running == sorted(running)
            assert (data[-1]["status"], data[-1]["error"]["code"]) == ("failed", "cancelled")
            assert events[-1].id == "ended"
        await listeners(s, 0)


async def test_a_listener_that_comes_later_begins_with_the_present_state(nats_server: NatsServer) -> None:
    async with stack(nats_server) as s:
        video_id = (await s.create())["id"]
        await s.move(video_id, VideoState.ENCODING, VideoState.DENOISING)
        await s.progress(video_id, VideoState.DENOISING, step=4, degree_of_parallelism=2)

        async def retrieved() -> bool:
            return bool((await s.call("GET", f"/v1/videos/{video_id}"))[1]["step"] == 4)

        await until(retrieved)
        listener = Listener(s, video_id)
        await listener.sees(state="denoising")
        await s.move(video_id, VideoState.CANCELLED)
        await listener.ends()
        first, last = listener.data
        assert (first["state"], first["step"], first["degree_of_parallelism"]) == ("denoising", 4, 2)
        assert last["state"] == "cancelled"


async def test_of_an_ended_video_there_is_one_event_and_on_reconnecting_none(nats_server: NatsServer) -> None:
    async with stack(nats_server) as s:
        video_id = (await s.create())["id"]
        await s.complete(video_id, b"film")
        (only,) = await Listener(s, video_id).ends()
        assert (only.data["state"], only.data["progress"], only.data["step"]) == ("completed", 100, 10)
        async with s.http.get(f"/v1/videos/{video_id}/events", headers={"Last-Event-ID": only.id}) as response:
            assert response.status == 204


async def test_a_job_that_goes_back_to_the_queue_keeps_its_step_until_told_otherwise(nats_server: NatsServer) -> None:
    async with stack(nats_server) as s:
        video_id = (await s.create())["id"]
        await s.move(video_id, VideoState.ENCODING, VideoState.DENOISING)
        listener = Listener(s, video_id)
        await listener.sees(state="denoising")
        await s.progress(video_id, VideoState.DENOISING, step=7, degree_of_parallelism=1)
        await listener.sees(step=7)
        await s.move(video_id, VideoState.QUEUED)
        await listener.sees(state="queued")
        await s.progress(video_id, VideoState.QUEUED, step=6, queue_place=1)
        await listener.sees(step=6)
        for state in (VideoState.ENCODING, VideoState.DENOISING, VideoState.CANCELLED):
            await s.move(video_id, state)
            await listener.sees(state=state)
        seen = [(event.data["state"], event.data["step"]) for event in await listener.ends()]
        assert seen == [
            ("denoising", 0),
            ("denoising", 7),
            ("queued", 7),
            ("queued", 6),
            ("encoding", 6),
            ("denoising", 6),
            ("cancelled", 0),
        ]


async def test_deleting_ends_the_stream(nats_server: NatsServer) -> None:
    async with stack(nats_server) as s:
        video_id = (await s.create())["id"]
        listener = Listener(s, video_id)
        await listener.sees(state="queued")
        assert (await s.call("DELETE", f"/v1/videos/{video_id}"))[0] == 200
        last = (await listener.ends())[-1]
        assert last.id == "ended"
        assert last.data.get("state") == "cancelled" or last.data["object"] == "video.deleted"


async def test_an_idle_stream_carries_comments(nats_server: NatsServer) -> None:
    async with stack(nats_server, stream_comment_s=0.05) as s:
        video_id = (await s.create())["id"]
        async with asyncio.timeout(60.0), s.http.get(f"/v1/videos/{video_id}/events") as response:
            seen = []
            async for item in server_sent_events(response):
                seen.append(item)
                if len(seen) == 4:
                    break
        assert isinstance(seen[0], ServerSentEvent)
        assert seen[1:] == ["still here"] * 3


async def test_a_listener_that_leaves_is_forgotten_at_once(nats_server: NatsServer) -> None:
    async with stack(nats_server, stream_comment_s=600.0) as s:
        video_id = (await s.create())["id"]
        for _ in range(3):
            async with s.http.get(f"/v1/videos/{video_id}/events") as response:
                await response.content.readline()
                await listeners(s, 1)
                response.close()
            await listeners(s, 0)


async def test_a_drain_ends_streams_and_refuses_new_videos(nats_server: NatsServer) -> None:
    async with stack(nats_server) as s:
        video_id = (await s.create())["id"]
        lines: list[ServerSentEvent | str] = []

        async def listen() -> None:
            async with s.http.get(f"/v1/videos/{video_id}/events") as response:
                lines.extend([item async for item in server_sent_events(response)])

        listening = asyncio.create_task(listen())
        await listeners(s, 1)
        s.gateway.edge.draining.set()
        s.gateway.edge.ledger.wake_all()
        async with asyncio.timeout(60.0):
            await listening
        assert lines[-1] == "this server is shutting down; connect again"
        async with s.http.post("/v1/videos", json={"prompt": "x"}) as response:
            assert response.status == 503
            assert (await response.json())["error"]["code"] == "draining"
            assert response.headers["Retry-After"]
        assert (await s.call("GET", "/readyz"))[0] == 503
        assert (await s.call("GET", f"/v1/videos/{video_id}"))[0] == 200


async def test_a_stream_outlives_a_restart_of_the_broker(nats_server: NatsServer) -> None:
    async with stack(nats_server) as s:
        video_id = (await s.create())["id"]
        listener = Listener(s, video_id)
        await listener.sees(state="queued")
        await nats_server.kill()
        await nats_server.start()
        await s.move(video_id, VideoState.ENCODING, VideoState.DENOISING)
        await s.move(video_id, VideoState.CANCELLED)
        events = await listener.ends()
        assert events[0].data["state"] == "queued"
        assert events[-1].data["state"] == "cancelled"


async def test_progress_of_unknown_and_ended_jobs_is_not_kept(nats_server: NatsServer) -> None:
    async with stack(nats_server) as s:
        ledger = s.gateway.edge.ledger
        video_id = (await s.create())["id"]
        await s.complete(video_id, b"film")
        for job_id in (video_id, "video_nobody"):
            progress = VideoProgress(job_id=job_id, state=VideoState.DENOISING, step=3, steps=10)
            await s.bus.publish(VIDEO_PROGRESS, progress, job_id)
        other = (await s.create())["id"]
        await s.progress(other, VideoState.QUEUED, queue_place=1)

        async def heard() -> bool:
            return bool((await s.call("GET", f"/v1/videos/{other}"))[1]["queue_place"] == 1)

        await until(heard)
        record = (await s.gateway.edge.desk.find(video_id)).value
        assert ledger.with_progress(record).progress is None
        assert ledger.snapshot("video_nobody") is None


async def test_asking_only_for_the_head_of_a_stream_ends(nats_server: NatsServer) -> None:
    async with stack(nats_server) as s:
        video_id = (await s.create())["id"]
        async with asyncio.timeout(60.0), s.http.head(f"/v1/videos/{video_id}/events") as response:
            assert response.status == 200
            assert response.content_type == "text/event-stream"
        await listeners(s, 0)

"""Live progress as server-sent events: first where the video stands, then every change, until it has ended."""

import asyncio

from aiohttp import web

from gateway import present
from gateway.edge import EDGE, Edge
from gateway.ledger import Snapshot
from gateway.schemas import VideoDeleted, VideoEvent

# The id of the last event. A browser that reconnects with it is told that there is nothing more.
_ENDED = "ended"
_RECONNECT_MS = 1000
_HEADERS = {"Content-Type": "text/event-stream", "Cache-Control": "no-store", "X-Accel-Buffering": "no"}


async def video_events(request: web.Request) -> web.StreamResponse:
    """Changes that come faster than a client reads are told together; nothing piles up for slow ones."""
    edge = request.app[EDGE]
    video_id = request.match_info["video_id"]
    with edge.ledger.listening(video_id) as changed:
        entry = await edge.desk.find(video_id)
        if not entry.value.state.terminal:
            edge.ledger.apply(entry)
        elif request.headers.get("Last-Event-ID") == _ENDED:
            return web.Response(status=204)
        stream = _Stream(request, edge.settings.write_deadline_s)
        await stream.start()
        if request.method != "HEAD":
            await _tell(edge, stream, edge.ledger.with_progress(entry.value), changed)
    return stream.response


async def _tell(edge: Edge, stream: "_Stream", snapshot: Snapshot | None, changed: asyncio.Event) -> None:
    video_id = snapshot.record.job_id if snapshot else ""
    told: VideoEvent | None = None
    while True:
        if snapshot is None:
            await stream.event(VideoDeleted(id=video_id).model_dump_json(), _ENDED)
            return
        news = present.event(snapshot.record, snapshot.progress)
        terminal = snapshot.record.state.terminal
        if news != told:
            await stream.event(news.model_dump_json(), _ENDED if terminal else f"{news.state}-{news.step}")
            told = news
        if terminal:
            return
        if edge.draining.is_set():
            await stream.comment("this server is shutting down; connect again")
            return
        try:
            async with asyncio.timeout(edge.settings.stream_comment_s):
                await changed.wait()
        except TimeoutError:
            await stream.comment("still here")
        changed.clear()
        snapshot = edge.ledger.snapshot(video_id)


class _Stream:
    """Writes one event stream, each write within a deadline."""

    def __init__(self, request: web.Request, deadline_s: float) -> None:
        self._request = request
        self._deadline_s = deadline_s
        self.response = web.StreamResponse(headers=_HEADERS)

    async def start(self) -> None:
        await self.response.prepare(self._request)
        if self._request.method != "HEAD":
            await self._write(f"retry: {_RECONNECT_MS}\n\n")

    async def event(self, data: str, event_id: str) -> None:
        await self._write(f"id: {event_id}\ndata: {data}\n\n")

    async def comment(self, text: str) -> None:
        await self._write(f": {text}\n\n")

    async def _write(self, text: str) -> None:
        async with asyncio.timeout(self._deadline_s):
            await self.response.write(text.encode())

"""A small client of our HTTP interface, for the command line."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

import aiohttp

from common.messages.video import VideoState, VideoTimeline
from compose.errors import OptionError, ServerError

_CONNECT_TIMEOUT_S = 10.0
_SILENCE_TIMEOUT_S = 60.0
_RETRY_EVENTS_AFTER_S = 0.5
_CHUNK_BYTES = 256 * 1024
# As many as the list gives at once.
_PAGE = 100


class StackClient:
    """Talks to one server. Use as ``async with StackClient(url) as client``.

    Every method raises ServerError where the server cannot be reached or refuses, and OptionError where ``base_url`` is
    no address.
    """

    def __init__(self, base_url: str) -> None:
        self._base_url = base_url.rstrip("/")
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_TIMEOUT_S, sock_read=_SILENCE_TIMEOUT_S)
        self._session = aiohttp.ClientSession(timeout=timeout)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._session.close()

    async def get(self, path: str) -> dict[str, Any]:
        """What the server says at ``path``."""
        return await self._json("GET", path)

    async def create(self, fields: Mapping[str, object]) -> dict[str, Any]:
        """Order a video; returns the job."""
        return await self._json("POST", "/v1/videos", json=dict(fields))

    async def retrieve(self, video_id: str) -> dict[str, Any]:
        """The job as it stands."""
        return await self._json("GET", _path(video_id))

    async def videos(self) -> AsyncIterator[dict[str, Any]]:
        """Every job, the newest first."""
        after = ""
        while True:
            page = await self._json("GET", f"/v1/videos?limit={_PAGE}&order=desc{after}")
            for video in page["data"]:
                yield video
            if not page["has_more"]:
                return
            after = f"&after={page['last_id']}"

    async def chat(self, fields: Mapping[str, object]) -> AsyncIterator[str]:
        """The parts of a streamed answer's text."""
        try:
            async with self._request("POST", "/v1/chat/completions", json=dict(fields)) as response:
                async for event in _events(response):
                    if "error" in event:
                        raise ServerError(f"the answer broke off: {event['error'].get('message')}")
                    for choice in event["choices"]:
                        yield choice["delta"].get("content") or ""
        except aiohttp.ClientPayloadError as error:
            raise ServerError(f"the answer broke off: {error}") from error

    async def cancel(self, video_id: str) -> None:
        """Ask for an end to the job."""
        await self._json("POST", f"{_path(video_id)}/cancel")

    async def timeline(self, video_id: str) -> VideoTimeline:
        """Which slot did which part of the job."""
        body = await self._json("GET", f"{_path(video_id)}/timeline")
        return VideoTimeline.model_validate({"job_id": body["id"], "spans": body["spans"]})

    async def progress(self, video_id: str) -> AsyncIterator[dict[str, Any]]:
        """Every progress report until the job has ended. A stream that breaks off is taken up again."""
        while True:
            with contextlib.suppress(aiohttp.ClientPayloadError, TimeoutError):
                async with self._request("GET", f"{_path(video_id)}/events") as response:
                    async for report in _events(response):
                        yield report
            if VideoState((await self.retrieve(video_id))["state"]).terminal:
                return
            await asyncio.sleep(_RETRY_EVENTS_AFTER_S)

    async def download(self, video_id: str, target: Path) -> None:
        """Write the finished file to ``target``, which appears only once it is whole."""
        partial = target.with_name(f".{target.name}.part")
        try:
            async with self._request("GET", f"{_path(video_id)}/content") as response:
                with partial.open("wb") as file:
                    async for chunk in response.content.iter_chunked(_CHUNK_BYTES):
                        file.write(chunk)
            partial.replace(target)
        except aiohttp.ClientPayloadError as error:
            raise ServerError(f"the download broke off: {error}") from error
        finally:
            partial.unlink(missing_ok=True)

    async def _json(self, method: str, path: str, **arguments: Any) -> dict[str, Any]:
        try:
            body: dict[str, Any] = json.loads(await self._body(method, path, **arguments))
        except ValueError as error:
            raise ServerError(f"{self._base_url} is no Triptych server: {path} did not answer JSON") from error
        return body

    async def _body(self, method: str, path: str, **arguments: Any) -> bytes:
        async with self._request(method, path, **arguments) as response:
            return await response.read()

    @contextlib.asynccontextmanager
    async def _request(self, method: str, path: str, **arguments: Any) -> AsyncIterator[aiohttp.ClientResponse]:
        try:
            async with self._session.request(method, f"{self._base_url}{path}", **arguments) as response:
                if response.status >= 400:
                    raise ServerError(_refusal(response.status, await response.read()))
                yield response
        except aiohttp.ClientConnectionError as error:
            raise ServerError(f"no server answers at {self._base_url}; start one with: triptych up") from error
        except (aiohttp.InvalidURL, aiohttp.NonHttpUrlClientError) as error:
            raise OptionError(
                f"--base-url {self._base_url} is no address of a server, such as http://127.0.0.1:8080"
            ) from error


def _path(video_id: str) -> str:
    """Where a video is; whatever was given as its id stays one part of the path."""
    return f"/v1/videos/{quote(video_id, safe='')}"


async def _events(response: aiohttp.ClientResponse) -> AsyncIterator[dict[str, Any]]:
    """The data of server-sent events, as JSON objects; comments and other fields are passed over."""
    data: list[str] = []
    async for raw in response.content:
        line = raw.decode().rstrip("\r\n")
        if line.startswith("data:"):
            data.append(line.removeprefix("data:").strip())
        elif not line and data:
            text, data = "\n".join(data), []
            if text != "[DONE]":
                yield json.loads(text)


def _refusal(status: int, body: bytes) -> str:
    """The message of an OpenAI error object, or what there is instead."""
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"the server answered {status}: {body[:200].decode(errors='replace')}"

"""The gateway's settings."""

from pydantic import Field

from common.runtime.settings import ServiceSettings


class GatewaySettings(ServiceSettings):
    """Environment variables carry the prefix ``TRIPTYCH_``, so the port is ``TRIPTYCH_PORT``; port 0 takes a free one.

    ``bus_deadline_s`` bounds each exchange with the broker, ``body_deadline_s`` the reading of a request's body,
    ``write_deadline_s`` each write to a client that reads slowly or not at all. ``listed_videos`` bounds the newest
    videos kept in memory for listing (older ones still answer by id). An idle event stream carries a comment every
    ``stream_comment_s``.

    ``language_model``: a local folder, a hub name or ``demo``, of which the gateway reads tokenizer and chat template;
    empty: no language is served. At most ``max_sequences`` answers are under way at once. One waits up to ``route_s``
    seconds for an instance; after ``silence_s`` without a token its instances are asked whether they are still at it.
    A video's prompt is to be expanded within ``expansion_s``.
    """

    host: str = "127.0.0.1"
    port: int = Field(default=8080, ge=0, le=65535)
    max_body_bytes: int = Field(default=1024 * 1024, ge=1024)
    bus_deadline_s: float = Field(default=5.0, gt=0)
    body_deadline_s: float = Field(default=30.0, gt=0)
    write_deadline_s: float = Field(default=30.0, gt=0)
    stream_comment_s: float = Field(default=10.0, gt=0)
    listed_videos: int = Field(default=10_000, ge=1)
    retry_after_s: int = Field(default=5, ge=1)
    language_model: str = ""
    max_sequences: int = Field(default=1024, ge=1)
    route_s: float = Field(default=30.0, gt=0)
    silence_s: float = Field(default=2.0, gt=0)
    expansion_s: float = Field(default=10.0, gt=0)
    drain_s: float = Field(default=10.0, ge=0)

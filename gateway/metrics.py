"""Prometheus metrics, in a registry of the gateway's own."""

from collections import Counter as Tally
from collections.abc import Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from common.messages.cluster import Member
from common.messages.video import PromptsServed, VideoState
from gateway.chat.metrics import LanguageMetrics

_DURATION_BUCKETS_S = (0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Metrics:
    """Requests are counted as they end; what stands still in between is read when somebody looks."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "triptych_http_requests",
            "HTTP requests answered; status 499 where the client left first.",
            ("method", "route", "status"),
            registry=self._registry,
        )
        self._durations = Histogram(
            "triptych_http_request_duration_seconds",
            "Time from a request's head to the end of its answer; event streams are left out.",
            ("method", "route"),
            buckets=_DURATION_BUCKETS_S,
            registry=self._registry,
        )
        self._prompts = Counter(
            "triptych_prompts_served",
            "Prompts of videos by where their embeddings came from: an encoder's memory, a cache store, or the model.",
            ("source",),
            registry=self._registry,
        )
        self._videos = self._gauge("triptych_videos", "Video jobs by state.", "state")
        self._queue_depth = self._gauge("triptych_video_queue_depth", "Jobs in the broker's queue, not yet taken.")
        self._members = self._gauge("triptych_members", "Living members of the stack.", "service", "state")
        self._streams = self._gauge("triptych_event_streams", "Open event streams.")
        self._broker = self._gauge("triptych_broker_connected", "1 while the broker is connected.")
        self.language = LanguageMetrics(self._registry)

    def request_ended(self, method: str, route: str, status: int, duration_s: float, streamed: bool) -> None:
        self._requests.labels(method, route, str(status)).inc()
        if not streamed:
            self._durations.labels(method, route).observe(duration_s)

    def prompts_served(self, served: PromptsServed) -> None:
        self._prompts.labels(served.source).inc(served.prompts)

    def render(
        self,
        videos: Mapping[VideoState, int],
        queue_depth: int | None,
        members: Iterable[Member],
        streams: int,
        broker_connected: bool,
    ) -> bytes:
        """The text of ``/metrics``. ``queue_depth`` is None where the broker did not say; it is then not a number."""
        for state, count in videos.items():
            self._videos.labels(state).set(count)
        self._members.clear()
        for (service, member_state), count in Tally((member.service, member.state) for member in members).items():
            self._members.labels(service, member_state).set(count)
        self._queue_depth.set(float("nan") if queue_depth is None else queue_depth)
        self._streams.set(streams)
        self._broker.set(broker_connected)
        return generate_latest(self._registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(name, text, labels, registry=self._registry)

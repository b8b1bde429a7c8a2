"""What is counted of language: requests are counted by the gateway's own metrics, sequences and tokens here."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from common.messages.cluster import RoleFlipped

_FLIP_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5)
_FIRST_TOKEN_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class LanguageMetrics:
    """Sequences are counted as they end, tokens as they come."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._sequences = Counter("triptych_sequences", "Answers by how they ended.", ("outcome",), registry=registry)
        self._prompt_tokens = Counter("triptych_prompt_tokens", "Tokens of prompts.", registry=registry)
        self._cached_tokens = Counter(
            "triptych_cached_prompt_tokens", "Tokens whose keys and values were there already.", registry=registry
        )
        self._best_cached_tokens = Counter(
            "triptych_best_cached_prompt_tokens",
            "Tokens whose keys and values the instance had that had the most of them, whoever got the prompt.",
            registry=registry,
        )
        self._tokens = Counter("triptych_generated_tokens", "Tokens of answers.", registry=registry)
        self._reroutes = Counter(
            "triptych_sequence_reroutes", "Sequences that went on elsewhere, by why.", ("why",), registry=registry
        )
        self._decodes = Counter(
            "triptych_sequence_decodes",
            "Attempts at answers by who went on after the first token, or after another.",
            ("instance",),
            registry=registry,
        )
        self._first_token = Histogram(
            "triptych_time_to_first_token_seconds",
            "From a request's arrival to the first token of each answer.",
            buckets=_FIRST_TOKEN_BUCKETS_S,
            registry=registry,
        )
        self._flips = Histogram(
            "triptych_role_flip_seconds",
            "From when an instance was told to take another role until everybody could know, without draining.",
            ("role",),
            buckets=_FLIP_BUCKETS_S,
            registry=registry,
        )
        self._waiting = Gauge(
            "triptych_sequences_waiting",
            "Sequences that waited for memory when the instance last spoke.",
            ("instance",),
            registry=registry,
        )
        self._preemptions = Counter(
            "triptych_preemptions",
            "Sequences that had to give their memory up and are computed again.",
            ("instance",),
            registry=registry,
        )
        self._preempted: dict[str, int] = {}
        self._active = Gauge("triptych_sequences_active", "Answers being generated.", registry=registry)

    def begun(self, prompt_tokens: int) -> None:
        self._prompt_tokens.inc(prompt_tokens)
        self._active.inc()

    def first_token(self, after_s: float) -> None:
        self._first_token.observe(after_s)

    def generated(self, tokens: int, cached_tokens: int) -> None:
        self._tokens.inc(tokens)
        self._cached_tokens.inc(cached_tokens)

    def routed(self, best_cached_tokens: int) -> None:
        self._best_cached_tokens.inc(best_cached_tokens)

    def role_flipped(self, flipped: RoleFlipped) -> None:
        self._flips.labels("+".join(flipped.roles)).observe(flipped.flip_s)

    def spoke(self, instance: str, waiting: int, preemptions: int) -> None:
        """``preemptions``: since the instance began; fewer than before, and it has begun anew."""
        before = self._preempted.get(instance, 0)
        self._preempted[instance] = preemptions
        self._waiting.labels(instance).set(waiting)
        self._preemptions.labels(instance).inc(preemptions - before if preemptions >= before else preemptions)

    def lost(self, instance: str) -> None:
        """Nobody waits at an instance that is gone."""
        if self._preempted.pop(instance, None) is not None:
            self._waiting.remove(instance)

    def rerouted(self, why: str) -> None:
        self._reroutes.labels(why).inc()

    def goes_on(self, instance: str) -> None:
        self._decodes.labels(instance).inc()

    def ended(self, outcome: str) -> None:
        """``outcome``: ``stop``, ``length``, ``cancelled`` or ``failed``."""
        self._active.dec()
        self._sequences.labels(outcome).inc()

"""What instances say of themselves, as the gateway counts it."""

from prometheus_client import CollectorRegistry

from gateway.chat.metrics import LanguageMetrics


def test_preemptions_are_counted_over_the_lives_of_an_instance_and_who_is_gone_has_nobody_waiting() -> None:
    registry = CollectorRegistry()
    metrics = LanguageMetrics(registry)

    def value(name: str) -> float | None:
        return registry.get_sample_value(name, {"instance": "decode-0"})

    metrics.spoke("decode-0", waiting=3, preemptions=2)
    metrics.spoke("decode-0", waiting=1, preemptions=5)
    assert (value("triptych_sequences_waiting"), value("triptych_preemptions_total")) == (1, 5)
    metrics.spoke("decode-0", waiting=0, preemptions=1)  # it has begun anew
    assert value("triptych_preemptions_total") == 6
    metrics.lost("decode-0")
    metrics.lost("decode-0")
    assert (value("triptych_sequences_waiting"), value("triptych_preemptions_total")) == (None, 6)
    metrics.spoke("decode-0", waiting=2, preemptions=1)
    assert (value("triptych_sequences_waiting"), value("triptych_preemptions_total")) == (2, 7)

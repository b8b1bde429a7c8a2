"""Loads in, one broadcast out every 100 ms (TetriInfer, section 3.2)."""

import pytest

from common.policies.language.cluster_monitor import ClusterMonitor, LoadReported, PeriodPassed, StoppedDecoding
from common.policies.language.decode_dispatch import DecodeLoad, LoadsBroadcast

D0, D1 = DecodeLoad("d0", 10, 1, 2), DecodeLoad("d1", 20, 3, 4)


def test_one_broadcast_each_period_with_the_newest_reports() -> None:
    monitor = ClusterMonitor()
    assert monitor.handle(PeriodPassed(), 0.0) == [LoadsBroadcast(())]
    monitor.handle(LoadReported(D1), 0.01)
    monitor.handle(LoadReported(DecodeLoad("d0", 99, 0, 0)), 0.02)
    monitor.handle(LoadReported(D0), 0.03)
    assert monitor.handle(PeriodPassed(), 0.05) == []
    assert monitor.handle(PeriodPassed(), 0.1) == [LoadsBroadcast((D0, D1))]


def test_who_stops_decoding_is_out_at_once() -> None:
    monitor = ClusterMonitor()
    monitor.handle(LoadReported(D0), 0.0)
    monitor.handle(LoadReported(D1), 0.0)
    assert monitor.handle(StoppedDecoding("d0"), 0.01) == [LoadsBroadcast((D1,))]
    assert monitor.handle(StoppedDecoding("d0"), 0.02) == []


def test_who_is_silent_is_left_out() -> None:
    monitor = ClusterMonitor(period_s=0.1, stale_s=0.5)
    monitor.handle(LoadReported(D0), 0.0)
    monitor.handle(LoadReported(D1), 0.4)
    assert monitor.handle(PeriodPassed(), 0.6) == [LoadsBroadcast((D1,))]
    with pytest.raises(ValueError, match="above 0"):
        ClusterMonitor(period_s=0.0)

"""Arrivals and mixes: the rates they promise, and the same requests for the same seed."""

import numpy as np
import pytest

from common.policies.video.rib import paper_rib
from loadgen.arrivals import poisson, square_wave
from loadgen.workloads import MIXES, Mix, Pattern, UnknownMix, make_workload, mix_named, saturation_rate

RIB = paper_rib()
KINDS = tuple(RIB.profiles)


def test_poisson_has_its_rate_and_its_spread() -> None:
    gaps = np.diff(poisson(2.0, 20_000, seed=3))
    assert gaps.mean() == pytest.approx(0.5, rel=0.03)
    assert gaps.std() == pytest.approx(0.5, rel=0.03)


def test_a_square_wave_keeps_its_mean_and_is_high_in_its_first_part() -> None:
    times = square_wave(2.0, 50_000, seed=3, period_s=100.0, high_share=0.25, ratio=5.0)
    assert len(times) / times[-1] == pytest.approx(2.0, rel=0.03)
    assert np.all(np.diff(times) >= 0)
    high = np.mean(times % 100.0 < 25.0)
    assert high == pytest.approx(5 * 0.25 / (5 * 0.25 + 0.75), abs=0.02)


def test_a_seed_gives_the_same_requests_at_every_rate() -> None:
    slow, fast = (make_workload(KINDS, MIXES["even"], Pattern.POISSON, rate, 50, seed=7) for rate in (0.5, 1.0))
    assert np.allclose(slow.arrival_s, 2 * fast.arrival_s)
    assert np.array_equal(slow.kind, fast.kind)
    assert not np.array_equal(slow.kind, make_workload(KINDS, MIXES["even"], Pattern.BURST, 1.0, 50, seed=8).kind)


@pytest.mark.parametrize("mix", MIXES.values(), ids=lambda mix: mix.name)
def test_a_mix_draws_its_shares(mix: Mix) -> None:
    kinds = make_workload(KINDS, mix, Pattern.BURST, 1.0, 30_000, seed=1).kind
    assert np.bincount(kinds, minlength=3) / 30_000 == pytest.approx(mix.shares(), abs=0.01)


def test_saturation_is_gpus_over_mean_work_at_one() -> None:
    # 3.14, 7.89 and 19.32 GPU-seconds: 0.7 to 0.8 requests/s on 8 GPUs.
    assert saturation_rate(RIB, KINDS, MIXES["even"], 8) == pytest.approx(8 / ((3.14 + 7.89 + 19.32) / 3))


def test_wrong_numbers_say_so() -> None:
    with pytest.raises(UnknownMix, match="even"):
        mix_named("odd")
    with pytest.raises(ValueError, match="above 0"):
        poisson(0.0, 10, 1)
    with pytest.raises(ValueError, match="weights"):
        make_workload(KINDS[:2], MIXES["even"], Pattern.BURST, 1.0, 10, 1)

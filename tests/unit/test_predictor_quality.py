"""The maths of how good length predictions are, on cases small enough to work out by hand."""

import pytest

from common.models.length_predictor.quality import calibration_error, coarser, quality, quality_of_classes


def test_the_calibration_error_of_a_case_worked_out_by_hand() -> None:
    # Two bins of two: 0.9 and 0.95 with one right differ by 0.425, 0.55 and 0.59 with both right by 0.43.
    error = calibration_error([0.9, 0.95, 0.55, 0.59], [True, False, True, True])
    assert error == pytest.approx((2 * 0.425 + 2 * 0.43) / 4)


def test_true_probabilities_have_no_error_and_certainty_belongs_to_the_last_bin() -> None:
    assert calibration_error([0.75] * 4, [True, True, True, False]) == pytest.approx(0)
    assert calibration_error([1.0, 1.0], [True, True]) == 0
    assert calibration_error([1.0, 1.0], [False, False]) == 1


def test_errors_of_one_bin_cancel_and_of_two_do_not() -> None:
    assert calibration_error([0.52, 0.58], [True, False]) == pytest.approx(0.05)
    assert calibration_error([0.52, 0.68], [True, False]) == pytest.approx((0.48 + 0.68) / 2)


def test_without_predictions_there_is_nothing_to_tell() -> None:
    with pytest.raises(ValueError, match="no predictions"):
        calibration_error([], [])
    with pytest.raises(ValueError, match="no predictions"):
        quality_of_classes([], [])
    with pytest.raises(ValueError, match="zip"):
        calibration_error([0.5], [])


def test_right_and_within_one_are_counted() -> None:
    judged = quality([[0.8, 0.1, 0.1], [0.8, 0.1, 0.1], [0.1, 0.1, 0.8], [0.1, 0.1, 0.8]], [0, 1, 0, 2])
    assert (judged.count, judged.exact, judged.within_one) == (4, 0.5, 0.75)
    assert judged.calibration_error == pytest.approx(0.3)
    assert quality_of_classes([0, 2], [0, 0]).calibration_error is None


def test_wider_ranges_have_the_sum_of_what_they_join() -> None:
    assert coarser([0.1, 0.2, 0.3, 0.15, 0.25], 2) == pytest.approx([0.3, 0.45, 0.25])

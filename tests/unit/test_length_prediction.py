"""Ranges of answer lengths, and the histogram that stands in for a trained predictor (TetriInfer, section 3.3.2)."""

import pytest

from common.policies.language.length_prediction import LengthBuckets, LengthHistogram, LengthRange, prompt_class


def test_a_bucket_is_a_range_of_one_granularity() -> None:
    buckets = LengthBuckets(granularity=200, buckets=11)
    assert [buckets.bucket(tokens) for tokens in (1, 199, 200, 399, 2100, 9000)] == [0, 0, 1, 1, 10, 10]
    assert buckets.range(1, "test") == LengthRange(200, 400, "test")
    assert buckets.range(99, "test").low == 2000 and buckets.range(-3, "test").low == 0
    assert buckets.range(1, "test").middle == 300
    with pytest.raises(ValueError, match="at least 1"):
        LengthBuckets(granularity=0)


def test_prompts_within_a_power_of_two_are_of_one_class() -> None:
    assert prompt_class(64) == prompt_class(127) != prompt_class(128)


def test_the_histogram_says_that_it_is_one_and_of_what() -> None:
    histogram = LengthHistogram(LengthBuckets(100, 10), unknown=250, least=2)
    assert histogram.predict("code") == LengthRange(200, 300, "histogram, still empty")
    histogram.observe("code", 450)
    assert histogram.predict("chat") == LengthRange(400, 500, "histogram of all 1 answers")
    for tokens in (10, 20, 430):
        histogram.observe("chat", tokens)
    predicted = histogram.predict("chat")
    assert (predicted.low, predicted.source) == (0, "histogram of 3 answers to prompts of this class")
    assert histogram.predict("code").source == "histogram of all 4 answers"


def test_the_middle_answer_counts_and_of_two_the_shorter() -> None:
    histogram = LengthHistogram(LengthBuckets(100, 10), unknown=0, least=1)
    histogram.observe("a", 50)
    histogram.observe("a", 950)
    assert histogram.predict("a").low == 0
    histogram.observe("a", 951)
    assert histogram.predict("a").low == 900

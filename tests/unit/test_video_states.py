"""A job's life: what a record may become, and what it never leaves."""

import itertools

import pytest

from common.messages.video import IllegalMove, VideoRecord, VideoRequest, VideoState

REQUEST = VideoRequest(
    model="demo", prompt="a red circle", width=64, height=64, frames=16, fps=8, steps=2, guidance_scale=2.0, seed=1
)


def record(state: VideoState) -> VideoRecord:
    return VideoRecord(job_id="video_1", state=state, request=REQUEST, created_at_s=1.0, updated_at_s=1.0)


def test_the_straight_way() -> None:
    job = record(VideoState.QUEUED)
    for now_s, state in enumerate(
        (VideoState.ENCODING, VideoState.DENOISING, VideoState.DECODING, VideoState.COMPLETED), start=2
    ):
        job = job.moved(state, float(now_s))
    assert (job.attempt, job.started_at_s, job.ended_at_s, job.updated_at_s) == (1, 2.0, 5.0, 5.0)


def test_a_lost_phase_counts_as_another_attempt_and_keeps_the_first_start() -> None:
    job = record(VideoState.QUEUED).moved(VideoState.ENCODING, 2.0).moved(VideoState.DENOISING, 3.0)
    again = job.moved(VideoState.QUEUED, 4.0).moved(VideoState.ENCODING, 5.0)
    assert (again.attempt, again.started_at_s) == (2, 2.0)


@pytest.mark.parametrize(
    ("ended", "wanted"), itertools.product([state for state in VideoState if state.terminal], VideoState)
)
def test_a_terminal_state_is_never_left(ended: VideoState, wanted: VideoState) -> None:
    with pytest.raises(IllegalMove, match="video_1"):
        record(ended).moved(wanted, 2.0)


@pytest.mark.parametrize("state", [state for state in VideoState if not state.terminal])
def test_every_job_under_way_can_be_cancelled_and_can_fail(state: VideoState) -> None:
    for end in (VideoState.CANCELLED, VideoState.FAILED):
        assert record(state).moved(end, 9.0).ended_at_s == 9.0


@pytest.mark.parametrize(
    ("start", "wanted"),
    [
        (VideoState.QUEUED, VideoState.DENOISING),
        (VideoState.QUEUED, VideoState.COMPLETED),
        (VideoState.ENCODING, VideoState.DECODING),
        (VideoState.DENOISING, VideoState.COMPLETED),
    ],
)
def test_no_phase_is_skipped(start: VideoState, wanted: VideoState) -> None:
    with pytest.raises(IllegalMove):
        record(start).moved(wanted, 2.0)

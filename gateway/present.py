"""What a record and its latest progress look like to a client. Pure."""

from common.messages.video import VideoProgress, VideoRecord, VideoState
from gateway.schemas import Status, Video, VideoError, VideoEvent
from gateway.validation import seconds_text, size_text

_STATUS: dict[VideoState, Status] = {
    VideoState.QUEUED: "queued",
    VideoState.ENCODING: "in_progress",
    VideoState.DENOISING: "in_progress",
    VideoState.DECODING: "in_progress",
    VideoState.COMPLETED: "completed",
    VideoState.FAILED: "failed",
    # OpenAI's SDKs know no other status; the error's code and ``state`` tell the difference.
    VideoState.CANCELLED: "failed",
}

# Which field of the request a worker's failure is about.
_PARAM_OF_CODE = {"prompt_too_long": "prompt", "negative_prompt_too_long": "negative_prompt"}

# Denoising is nearly all of the work, so it has nearly all of the bar.
_ENCODING_PERCENT = 1
_DENOISING_PERCENT = 2
_DECODING_PERCENT = 95


def video(record: VideoRecord, progress: VideoProgress | None) -> Video:
    request = record.request
    step = _step(record, progress)
    return Video(
        id=record.job_id,
        created_at=int(record.created_at_s),
        completed_at=int(record.ended_at_s or 0) if record.state is VideoState.COMPLETED else None,
        status=_STATUS[record.state],
        progress=percent(record.state, step, request.steps),
        model=request.model,
        prompt=request.prompt,
        expanded_prompt=request.expanded_prompt,
        size=size_text(request.width, request.height),
        seconds=seconds_text(request.frames, request.fps),
        error=error(record),
        state=record.state,
        seed=request.seed,
        frames=request.frames,
        fps=request.fps,
        steps=request.steps,
        guidance_scale=request.guidance_scale,
        negative_prompt=request.negative_prompt,
        priority=request.priority,
        deadline_at=request.deadline_s,
        queue_place=progress.queue_place if progress else None,
        step=step,
        degree_of_parallelism=progress.degree_of_parallelism if progress else 0,
        estimate_s=progress.remaining_s if progress else None,
        attempt=record.attempt,
    )


def event(record: VideoRecord, progress: VideoProgress | None) -> VideoEvent:
    whole = video(record, progress)
    return VideoEvent(
        id=whole.id,
        status=whole.status,
        state=whole.state,
        progress=whole.progress,
        queue_place=whole.queue_place,
        step=whole.step,
        steps=whole.steps,
        degree_of_parallelism=whole.degree_of_parallelism,
        estimate_s=whole.estimate_s,
        error=whole.error,
    )


def error(record: VideoRecord) -> VideoError | None:
    """Why there is no video and will be none."""
    if record.state is VideoState.CANCELLED:
        return VideoError(code="cancelled", message="The video was cancelled on request.")
    if record.state is not VideoState.FAILED:
        return None
    if record.failure is None:
        return VideoError(code="unknown", message="The video could not be made.")
    code = record.failure.code
    param = _PARAM_OF_CODE.get(code)
    if param == "prompt" and record.request.expanded_prompt is not None:
        param = "expand_prompt"
    return VideoError(code=code, message=record.failure.message, param=param)


def percent(state: VideoState, step: int, steps: int) -> int:
    match state:
        case VideoState.COMPLETED:
            return 100
        case VideoState.DECODING:
            return _DECODING_PERCENT
        case VideoState.ENCODING if not step:
            return _ENCODING_PERCENT
        case VideoState.QUEUED if not step:
            return 0
        case VideoState.QUEUED | VideoState.ENCODING | VideoState.DENOISING:
            # A job that has lost its worker waits and is encoded again, and goes on from its checkpoint.
            return _DENOISING_PERCENT + (_DECODING_PERCENT - _DENOISING_PERCENT) * min(step, steps) // max(steps, 1)
        case _:
            return 0


def _step(record: VideoRecord, progress: VideoProgress | None) -> int:
    if record.state in (VideoState.DECODING, VideoState.COMPLETED):
        return record.request.steps
    return progress.step if progress else 0

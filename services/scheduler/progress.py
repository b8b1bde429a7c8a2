"""What people waiting for their videos are told: state, place in the queue, step, parallelism, time left."""

from common.messages.video import VideoProgress, VideoRecord, VideoState
from common.policies.video.estimate import RemainingTime
from common.policies.video.policy import Policy
from common.policies.video.state import Job, Phase


class ProgressReporter:
    """Derives each job's progress from the policy's state, and remembers what was told last."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._remaining = RemainingTime()
        # The same by degree of parallelism, for steps alone.
        self._by_degree = RemainingTime()
        self._told: dict[str, VideoProgress] = {}
        self._ended: list[VideoProgress] = []

    def step_took(self, job: Job, degree: int, seconds: float) -> None:
        self._remaining.step_took(_kind(job), seconds)
        self._by_degree.step_took((_kind(job), degree), seconds)

    def decode_took(self, job: Job, seconds: float) -> None:
        self._remaining.decode_took(_kind(job), seconds)

    def ended(self, record: VideoRecord) -> None:
        """The job has left the scheduler; what is told last is its terminal state."""
        self._told.pop(record.job_id, None)
        if record.state.terminal:
            done = record.request.steps if record.state is VideoState.COMPLETED else 0
            self._ended.append(
                VideoProgress(job_id=record.job_id, state=record.state, step=done, steps=record.request.steps)
            )

    def changes(self, records: dict[str, VideoRecord], steps: dict[str, int]) -> list[VideoProgress]:
        """What has changed since the last call. ``steps``: after how many each job stands."""
        news, self._ended = self._ended, []
        places = self._policy.queue_places()
        for job_id, job in self._policy.state.jobs.items():
            record = records.get(job_id)
            if record is None:
                continue
            progress = self._progress(job, record, steps.get(job_id, 0), places.get(job_id))
            if self._told.get(job_id) != progress:
                self._told[job_id] = progress
                news.append(progress)
        return news

    def _progress(self, job: Job, record: VideoRecord, step: int, place: int | None) -> VideoProgress:
        steps_left = job.steps - step
        return VideoProgress(
            job_id=job.job_id,
            state=record.state,
            queue_place=place,
            step=step,
            steps=job.steps,
            degree_of_parallelism=len(job.active) if job.phase is Phase.DENOISING else 0,
            remaining_s=None if place is not None else self._remaining_s(job, steps_left),
        )

    def _remaining_s(self, job: Job, steps_left: int) -> float | None:
        """By the steps on as many GPUs as the job has now, where there were any; else by all of its kind."""
        steps_s = self._by_degree.remaining_s((_kind(job), len(job.active)), steps_left)
        decode_s = self._remaining.remaining_s(_kind(job), 0)
        if steps_s is None or decode_s is None:
            return self._remaining.remaining_s(_kind(job), steps_left)
        return steps_s + decode_s


def _kind(job: Job) -> tuple[int, int, int]:
    return job.width, job.height, job.frames

"""The scheduler's settings."""

from pydantic import Field

from common.runtime.settings import ServiceSettings


class SchedulerSettings(ServiceSettings):
    """``max_admitted`` jobs are known to the policy at once; the rest wait in the work queue."""

    policy: str = "fifo"
    max_admitted: int = Field(default=64, ge=1)
    drain_s: float = Field(default=10.0, ge=0)

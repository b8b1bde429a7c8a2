"""Clusters for the policies' tests."""

from typing import TypeVar

from common.messages.cluster import Service
from common.policies.video import decisions as decide
from common.policies.video import events as event
from common.policies.video.policy import Policy
from common.policies.video.state import Phase

P = TypeVar("P", bound=Policy)

SMALL, MIDDLE, LARGE = (256, 144), (426, 240), (640, 360)
"""The paper's sizes, whose B is 1, 2 and 4."""
STEPS = 30


def cluster(policy: P, *servers: int) -> P:
    """The policy once an encoder and servers with so many slots each, numbered through, have joined."""
    policy.handle(event.WorkerJoined("encoder-0", Service.ENCODER), 0.0)
    slot = 0
    for server, slots in enumerate(servers):
        for _ in range(slots):
            policy.handle(event.WorkerJoined(f"dit-{slot}", Service.DIT, slot, f"server-{server}"), 0.0)
            policy.handle(event.WorkerJoined(f"vae-{slot}", Service.VAE, slot, f"server-{server}"), 0.0)
            slot += 1
    return policy


def arrive(
    policy: Policy,
    job_id: str,
    size: tuple[int, int],
    at_s: float = 1.0,
    deadline_s: float | None = None,
    priority: int = 0,
) -> list[decide.Decision]:
    """A video comes and its prompt is encoded at once; all that was decided."""
    arrived = event.JobArrived(job_id, at_s, *size, 51, STEPS, deadline_s=deadline_s, priority=priority)
    decisions = policy.handle(arrived, at_s)
    job = policy.state.jobs[job_id]
    if job.phase is Phase.ENCODING:
        decisions += policy.handle(event.PromptEncoded(job_id, job.attempt), at_s)
    return decisions


def leases(decisions: list[decide.Decision]) -> dict[str, tuple[int, ...]]:
    """The slots granted, by job."""
    return {one.job_id: one.slots for one in decisions if isinstance(one, decide.GrantLease)}

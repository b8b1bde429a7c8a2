"""Clusters for the policies' tests."""

from typing import TypeVar

from common.messages.cluster import Service
from common.policies import events as event
from common.policies.policy import Policy

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

"""When a stack is ready: the gateway says so, and every expected member is in the cluster and takes work."""

import asyncio
from collections.abc import Collection, Mapping
from typing import Any

import aiohttp

from common.messages.cluster import MemberState

_PERIOD_S = 0.1
_REQUEST_TIMEOUT_S = 5.0


async def wait_ready(base_url: str, expected: Collection[str], waiting_for: set[str]) -> None:
    """Return once every instance of ``expected`` is ready. Cancel it to give up.

    Args:
        base_url: the gateway's.
        expected: instance names.
        waiting_for: kept current with those that are still missing.
    """
    waiting_for.update(expected)
    timeout = aiohttp.ClientTimeout(total=_REQUEST_TIMEOUT_S)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        while True:
            states = await _states(session, base_url)
            ready = {name for name, state in states.items() if state == MemberState.READY}
            waiting_for.intersection_update(set(expected) - ready)
            waiting_for.update(set(expected) - ready)
            if not waiting_for and await _gateway_ready(session, base_url):
                return
            await asyncio.sleep(_PERIOD_S)


async def _states(session: aiohttp.ClientSession, base_url: str) -> Mapping[str, str]:
    try:
        async with session.get(f"{base_url}/v1/cluster") as response:
            if response.status != 200:
                return {}
            body: dict[str, Any] = await response.json()
    except (aiohttp.ClientError, TimeoutError):
        return {}
    return {member["instance"]: member["state"] for member in body["members"]}


async def _gateway_ready(session: aiohttp.ClientSession, base_url: str) -> bool:
    try:
        async with session.get(f"{base_url}/readyz") as response:
            return response.status == 200
    except (aiohttp.ClientError, TimeoutError):
        return False

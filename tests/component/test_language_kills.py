"""Instances die in mid-stream, at any moment: the streams go on elsewhere, and nobody sees a seam.

``TRIPTYCH_TEST_KILLS`` says how many die in each test.
"""

import asyncio
import os
import random
from pathlib import Path

import pytest

from common.language.settings import TransferMode
from common.policies.decode_dispatch import DispatchRule
from tests.component.language_support import known_prompts, language_stack, shown
from tests.support.language_processes import language_processes
from tests.support.nats_server import NatsServer

KILLS = int(os.environ.get("TRIPTYCH_TEST_KILLS", "3"))
CLIENTS = 6


FUSED = ("decode-0", "decode-1")
APART = ("prefill-0", "decode-0", "prefill-1", "decode-1")


@pytest.mark.parametrize(
    ("mode", "dispatch"),
    [
        ("fused", "scheduler"),
        (TransferMode.BY_CHUNK, "scheduler"),
        *((mode, DispatchRule.POWER_OF_TWO) for mode in TransferMode),
    ],
)
async def test_streams_outlive_their_instances(
    nats_server: NatsServer, language_model: Path, tmp_path: Path, mode: str, dispatch: str
) -> None:
    if mode == "fused":
        prefills, role, victims, sending = 0, "fused", FUSED, TransferMode.BY_REQUEST
    else:
        prefills, role, victims, sending = 2, "decode", APART, TransferMode(mode)
    chance = random.Random(KILLS)
    url = nats_server.url
    prompts = known_prompts(language_model)
    killed = asyncio.Event()
    answered = 0

    async with (
        language_processes(
            nats_server.url, language_model, tmp_path, prefills, 2, role, sending, dispatch
        ) as processes,
        language_stack(url, language_model, dispatch, silence_s=0.5) as stack,
    ):
        await stack.served(*victims)

        async def client() -> None:
            nonlocal answered
            while not killed.is_set():
                prompt = chance.choice(list(prompts))
                assert await stack.text(prompt) == shown(prompts[prompt])
                answered += 1

        async def killer() -> None:
            for number in range(KILLS):
                # One at a time: where all are gone, streams wait for as long as a gateway has patience.
                await stack.served(*victims)
                before = answered
                async with asyncio.timeout(120):
                    while answered < before + CLIENTS:  # noqa: ASYNC110 - clients at their work
                        await asyncio.sleep(chance.uniform(0.0, 0.02))
                await processes.kill(victims[number % len(victims)])
            killed.set()

        async with asyncio.TaskGroup() as tasks:
            for _ in range(CLIENTS):
                tasks.create_task(client())
            tasks.create_task(killer())
    assert answered >= KILLS * CLIENTS

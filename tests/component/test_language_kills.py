"""Instances die in mid-stream, at any moment: the streams go on elsewhere, and nobody sees a seam.

``TRIPTYCH_TEST_KILLS`` says how many die in each test.
"""

import os
import random
from pathlib import Path

import pytest

from common.language.settings import TransferMode
from common.policies.language.decode_dispatch import DispatchRule
from tests.component.language_support import Clients, known_prompts, language_stack
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

    async with (
        language_processes(url, language_model, tmp_path, prefills, 2, role, sending, dispatch) as processes,
        language_stack(url, language_model, dispatch, silence_s=0.5) as stack,
    ):
        clients = Clients(stack, prompts, CLIENTS, chance)
        await stack.served(*victims)

        async def kill() -> None:
            for number in range(KILLS):
                # One at a time: where all are gone, streams wait for as long as a gateway has patience.
                await stack.served(*victims)
                await clients.some_more()
                await processes.kill(victims[number % len(victims)])

        await clients.beside(kill())
    assert clients.answered >= KILLS * CLIENTS

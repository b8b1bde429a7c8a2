"""What runs an engine, when it ends: nobody waits for a step that does not come."""

import asyncio
from pathlib import Path

import pytest
import torch

from common.bus.errors import Refusal
from common.engine import Output
from common.language.loading import load_model
from common.language.settings import LanguageSettings
from common.language.stepper import Stepper
from common.runtime.worker import ComputeThread


async def nothing(_: list[Output]) -> None:
    """No step brings anything here."""


async def nothing_lost(_: list[str], __: Exception) -> None:
    """Nor fails."""


async def test_who_leaves_refuses_what_waits_for_a_step_and_what_is_asked_later(language_model: Path) -> None:
    settings = LanguageSettings(instance="decode-0", language_model=str(language_model))
    engine = load_model(settings, torch.device("cpu"), torch.float32).engine
    compute = ComputeThread("steps", 1)
    stepper = Stepper(engine, compute, nothing, nothing_lost)
    running = asyncio.create_task(stepper.run())
    try:
        assert await stepper.between(lambda: 5) == 5
        attempts = 0

        def attempt() -> None:
            nonlocal attempts
            attempts += 1

        waiting = asyncio.create_task(stepper.until(attempt, asyncio.get_running_loop().time() + 600.0))
        async with asyncio.timeout(60.0):
            while not attempts:
                await stepper.between(lambda: None)
            running.cancel()
            with pytest.raises(Refusal, match="leaving"):
                await waiting
            with pytest.raises(Refusal, match="leaving"):
                await stepper.between(lambda: 5)
            with pytest.raises(Refusal, match="leaving"):
                await stepper.until(lambda: 5, 0.0)
    finally:
        compute.close()

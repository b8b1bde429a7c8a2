"""Plumbing for every test: ``async def`` tests run in an event loop of their own, brokers are real processes."""

import asyncio
import inspect
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.nats_server import NatsServer, nats_server_process

# What tests compare to the bit is made on one kind of device, also where there is a GPU; tests of GPUs say so.
os.environ.setdefault("TRIPTYCH_DEVICE", "cpu")
# Drawn once for all processes of a run, which must agree on what tests there are.
os.environ.setdefault("TRIPTYCH_TEST_SEED", str(1 + time.time_ns() % 10**9))


def pytest_report_header() -> str:
    """What repeats the draws of this run."""
    return f"TRIPTYCH_TEST_SEED={os.environ['TRIPTYCH_TEST_SEED']}"


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run a coroutine test to its end; everything else is pytest's own business."""
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    names = inspect.signature(pyfuncitem.obj).parameters
    arguments = {name: pyfuncitem.funcargs[name] for name in names if name in pyfuncitem.funcargs}
    asyncio.run(pyfuncitem.obj(**arguments), debug=False)
    return True


@pytest.fixture(scope="session")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small random language model; what transformers answers with it is remembered by folder."""
    from tests.support.language_model import write_language_model

    return write_language_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def nats_server() -> Iterator[NatsServer]:
    """A broker of this test's own, with an empty store."""
    with nats_server_process() as server:
        yield server

"""Servers of language models to be measured: stacks of ours, and others, each started here or running already."""

import asyncio
import contextlib
import os
import shlex
import signal
import sys
from asyncio.subprocess import DEVNULL
from collections.abc import AsyncIterator
from dataclasses import dataclass

import aiohttp

from common.runtime.ports import free_port
from common.runtime.tether import tether_to
from loadgen.bench.process import ROOT, START_TIMEOUT_S, BenchmarkError, started
from loadgen.refusal import WrongArgument

_STOP_TIMEOUT_S = 60.0
_LOOK_EVERY_S = 0.5


@dataclass(frozen=True)
class Server:
    """``model`` is what it calls the model."""

    name: str
    url: str
    model: str


async def running(name: str, url: str) -> Server:
    """One that runs already.

    Raises:
        BenchmarkError: it serves no model.
        WrongArgument: ``url`` is none.
    """
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=10.0)) as session:
        try:
            async with session.get(f"{url}/v1/models", raise_for_status=True) as response:
                models = (await response.json())["data"]
        except (aiohttp.InvalidURL, aiohttp.NonHttpUrlClientError):
            raise WrongArgument(f"{name}={url}: give an address such as http://127.0.0.1:8000") from None
        except (aiohttp.ClientError, TimeoutError, LookupError, TypeError, ValueError) as error:
            raise BenchmarkError(f"{name}: nothing at {url} that lists its models: {error}") from error
    # Ours serves video models too, and says which is which.
    for model in models:
        if model.get("kind", "language") == "language":
            return Server(name, url, model["id"])
    raise BenchmarkError(f"{name}: {url} has no language model")


@contextlib.asynccontextmanager
async def stack(mode: str, model: str, threads: int, precision: str) -> AsyncIterator[Server]:
    """A stack of ours: ``fused``, one instance of ``threads`` threads, or ``split``, two that share them out."""
    split = mode == "split"
    each = max(1, threads // 2) if split else threads
    environment = {
        **os.environ,
        "TRIPTYCH_THREADS": str(each),
        "TRIPTYCH_PRECISION": precision,
        "TRIPTYCH_ROLE": "decode" if split else "fused",
    }
    command = [sys.executable, "-m", "compose.cli", "up", "--port", "0", "--log-level", "warning"]
    command += ["--language-model", model, "--set", "decode=1", *(("--set", "prefill=1") if split else ())]
    async with started(command, environment) as (_, ready):
        yield await running(mode, ready.split()[1])


@contextlib.asynccontextmanager
async def other(name: str, command: str, model: str) -> AsyncIterator[Server]:
    """Another's server; ``{model}`` and ``{port}`` in its command are filled in.

    Raises:
        BenchmarkError: it does not come up.
        WrongArgument: ``command`` cannot be run.
    """
    port = free_port()
    try:
        words = [word.format(model=model, port=port) for word in shlex.split(command)]
        # A group of its own, since such servers have processes of their own.
        process = await asyncio.create_subprocess_exec(
            *words,
            cwd=ROOT,
            stdin=DEVNULL,
            stdout=sys.stderr,
            start_new_session=True,
            preexec_fn=tether_to(os.getpid()),
        )
    except (OSError, LookupError, TypeError, ValueError) as error:
        raise WrongArgument(f"{name}={command}: this cannot be run: {error!r}") from None
    try:
        yield await _answering(name, f"http://127.0.0.1:{port}", process)
    finally:
        try:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), _STOP_TIMEOUT_S)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()


async def _answering(name: str, url: str, process: asyncio.subprocess.Process) -> Server:
    try:
        async with asyncio.timeout(START_TIMEOUT_S):
            while process.returncode is None:
                with contextlib.suppress(BenchmarkError):
                    return await running(name, url)
                await asyncio.sleep(_LOOK_EVERY_S)
    except TimeoutError as error:
        raise BenchmarkError(f"{name} did not answer within {START_TIMEOUT_S:g} s") from error
    raise BenchmarkError(f"{name} ended early; what it said stands above")

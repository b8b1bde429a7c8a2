"""Another process with tensors of its own, told what to do over a pipe; and tensors whose content both sides know."""

import asyncio
import contextlib
import multiprocessing
import os
import signal
from collections.abc import AsyncIterator, Sequence
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from typing import Any

import psutil
import torch

from common.messages.tensors import TensorRef
from common.tensors import TensorError, Tensors, UcxTensors
from common.tensors.memory import dtype_named
from tests.support.stopping import stop_process

# Longer than this machine stands still for.
WAIT_S = 60.0
_FORK_SERVER_IMPORTS = ["torch", "ucxx", "common.tensors", "tests.support.tensor_peer"]


def patterned(shape: tuple[int, ...], dtype: torch.dtype = torch.uint8, seed: int = 0) -> torch.Tensor:
    """A tensor of every bit pattern its dtype has, NaNs among them, the same in every process."""
    size = int(torch.Size(shape).numel()) * dtype.itemsize
    run = torch.randint(
        1, 256, (min(size, 1_000_003),), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )
    if dtype is torch.bool:
        run &= 1
    flat = run if size <= len(run) else run.repeat(-(-size // len(run)))[:size].contiguous()
    return flat.view(dtype).reshape(shape)


def same_bytes(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Equal in shape, dtype and every bit: NaNs compare as what they are."""
    return (
        left.shape == right.shape
        and left.dtype == right.dtype
        and torch.equal(left.cpu().reshape(-1).view(torch.uint8), right.cpu().reshape(-1).view(torch.uint8))
    )


def are_patterned(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether each is what ``patterned`` makes of bytes, with seeds that count from 0."""
    return all(same_bytes(tensor, patterned(tuple(tensor.shape), seed=seed)) for seed, tensor in enumerate(tensors))


class TensorPeer:
    """Drives one child process. ``ask`` sends a command and waits for its answer; commands may overlap."""

    def __init__(self, context: BaseContext, options: dict[str, Any]) -> None:
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_child, args=(theirs, options), daemon=True)  # type: ignore[attr-defined]
        self._process.start()
        theirs.close()
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self._next = 0
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._pipe.fileno(), self._read)

    @property
    def pid(self) -> int:
        return int(self._process.pid)

    async def ask(self, command: str, **arguments: Any) -> Any:
        """The child's answer. What it raised is raised here."""
        self._next += 1
        answer = self._answers[self._next] = self._loop.create_future()
        self._pipe.send((self._next, command, arguments))
        async with asyncio.timeout(120):
            return await answer

    async def export(self, shape: tuple[int, ...], dtype: str = "uint8", seed: int = 0, **how: Any) -> TensorRef:
        return TensorRef.unpack(await self.ask("export", shape=shape, dtype=dtype, seed=seed, how=how))

    async def counts_become(self, exports: int, size_bytes: int, in_flight: int) -> None:
        """Wait for these counts: uses are counted, and leases end, a moment after what causes it."""
        async with asyncio.timeout(120):
            while await self.ask("counts") != (exports, size_bytes, in_flight):  # noqa: ASYNC110 - another process's
                await asyncio.sleep(0.02)

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def stop(self) -> None:
        """Have it stand still, until it is sent SIGCONT."""
        stop_process(self.pid)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        self._process.join()

    @property
    def cpu_s(self) -> float:
        times = psutil.Process(self.pid).cpu_times()
        return float(times.user + times.system)

    def _read(self) -> None:
        try:
            number, value, error = self._pipe.recv()
        except (EOFError, ConnectionResetError):
            self._loop.remove_reader(self._pipe.fileno())
            return
        answer = self._answers.pop(number)
        if answer.done():
            return
        if error is None:
            answer.set_result(value)
        else:
            answer.set_exception(error)

    async def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.signal(signal.SIGCONT)
        self._loop.remove_reader(self._pipe.fileno())
        with contextlib.suppress(ConnectionError):
            self._pipe.send((0, "stop", {}))
        await asyncio.to_thread(self._process.join, 20)
        if self._process.is_alive():
            self.kill()
        self._pipe.close()


def start_context(method: str = "forkserver") -> BaseContext:
    """``forkserver`` forks a process that has imported torch and ucxx, as services may; ``spawn`` starts afresh."""
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload(_FORK_SERVER_IMPORTS)  # type: ignore[attr-defined]
    return context


@contextlib.asynccontextmanager
async def peers(count: int = 1, *, method: str = "forkserver", **options: Any) -> AsyncIterator[list[TensorPeer]]:
    """Children with ``UcxTensors`` opened with ``options``, stopped at the end."""
    context = start_context(method)
    children = [TensorPeer(context, {"owner": f"peer-{number}", **options}) for number in range(count)]
    try:
        await asyncio.gather(*(child.ask("hello") for child in children))
        yield children
    finally:
        await asyncio.gather(*(child.close() for child in children))


def shared_memory_of(pids: set[int]) -> list[str]:
    """What these processes left in System V's or POSIX shared memory."""
    left = [name for name in os.listdir("/dev/shm") if "ucx" in name]  # noqa: PTH208 - names are all we want
    with open("/proc/sysvipc/shm", encoding="ascii") as table:  # noqa: PTH123
        rows = [line.split() for line in table][1:]
    return left + [f"sysv {row[1]}" for row in rows if int(row[4]) in pids]


def _child(pipe: Connection, options: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    asyncio.run(_serve(pipe, options))


async def _serve(pipe: Connection, options: dict[str, Any]) -> None:
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    tasks: set[asyncio.Task[None]] = set()
    async with await UcxTensors.open(**options) as tensors:
        child = _Child(tensors)

        async def run(number: int, command: str, arguments: dict[str, Any]) -> None:
            try:
                pipe.send((number, await getattr(child, command)(**arguments), None))
            except (TensorError, ValueError) as error:
                pipe.send((number, None, RuntimeError(f"{type(error).__name__}: {error}")))

        def read() -> None:
            try:
                number, command, arguments = pipe.recv()
            except (EOFError, ConnectionResetError):
                command = "stop"
            if command == "stop":
                loop.remove_reader(pipe.fileno())
                stop.set()
                return
            task = loop.create_task(run(number, command, arguments))
            tasks.add(task)
            task.add_done_callback(tasks.discard)

        loop.add_reader(pipe.fileno(), read)
        await stop.wait()


class _Child:
    """The commands."""

    def __init__(self, tensors: UcxTensors) -> None:
        self._tensors: Tensors = tensors
        self._ucx = tensors
        self._fetched: list[torch.Tensor] = []

    async def hello(self) -> int:
        return os.getpid()

    async def export(self, shape: tuple[int, ...], dtype: str, seed: int, how: dict[str, Any]) -> bytes:
        return self._tensors.export(patterned(shape, dtype_named(dtype), seed), **how).pack()

    async def counts(self) -> tuple[int, int, int]:
        """Exports, their bytes, and requests in flight."""
        return self._tensors.exported_count, self._tensors.exported_bytes, self._ucx.in_flight

    async def fetch(self, ref: bytes, seed: int = 0, deadline_s: float = WAIT_S) -> bool:
        """Whether what was fetched is what ``patterned`` makes."""
        reference = TensorRef.unpack(ref)
        fetched = await self._tensors.fetch(reference, deadline_s=deadline_s)
        return same_bytes(fetched, patterned(reference.shape, fetched.dtype, seed))

    async def fetch_all(self, refs: list[bytes], deadline_s: float = WAIT_S) -> bool:
        """See ``are_patterned``, of those fetched together."""
        references = [TensorRef.unpack(ref) for ref in refs]
        fetched = await self._tensors.fetch_all(references, [None] * len(refs), deadline_s=deadline_s)
        return are_patterned(fetched)

    async def release(self, ref: bytes) -> None:
        await self._tensors.release(TensorRef.unpack(ref))

    async def renew(self, ref: bytes, lease_s: float) -> None:
        self._tensors.renew(TensorRef.unpack(ref), lease_s)


def open_descriptors() -> int:
    return psutil.Process().num_fds()


def threads() -> int:
    return psutil.Process().num_threads()

"""A stack of language instances, and requests that are asked of it at their times."""

import asyncio
import contextlib
import json
import os
import re
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from loadgen.bench.process import BenchmarkError, completed, started
from loadgen.bench.trace_excerpt import SmallRequest, random_tokens

_ANSWER_TIMEOUT_S = 300.0
_PROFILE_TIMEOUT_S = 600.0
_BEST = "triptych_best_cached_prompt_tokens_total"
_WARM_UP_SEED = 1 << 50
_WARM_UP_TOKENS = 512


@dataclass(frozen=True)
class Told:
    """What the scheduler is told of an instance: by ``profile``, or else in tokens a second; see its settings."""

    profile: str = ""
    prefill_tokens_s: float = 2000.0
    transfer_tokens_s: float = 20_000.0


@dataclass
class Answer:
    """What a stream of events has told so far. Times are of ``time.monotonic``."""

    asked_s: float
    first_s: float | None = None
    last_s: float = 0.0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    answer_tokens: int = 0
    text: str = ""
    done: bool = False

    @property
    def ttft_s(self) -> float:
        """Raises BenchmarkError: there was no token."""
        if self.first_s is None or not self.done:
            raise BenchmarkError("an answer ended before its end")
        return self.first_s - self.asked_s

    @property
    def jct_s(self) -> float:
        """Until its last token. Raises BenchmarkError: there was none."""
        return self.ttft_s + self.last_s - (self.first_s or 0.0)

    def take(self, line: bytes, now_s: float) -> None:
        """One line of the stream. Raises BenchmarkError: it tells of a failure."""
        if not line.startswith(b"data:"):
            return
        data = line.removeprefix(b"data:").strip()
        if data == b"[DONE]":
            self.done = True
            return
        told: dict[str, Any] = json.loads(data)
        if "error" in told:
            raise BenchmarkError(f"an answer failed: {told['error']['message']}")
        if told["choices"]:
            self.first_s = now_s if self.first_s is None else self.first_s
            self.last_s = now_s
        self.text += "".join(choice["text"] for choice in told["choices"])
        if (usage := told.get("usage")) is not None:
            self.prompt_tokens = usage["prompt_tokens"]
            self.answer_tokens = usage["completion_tokens"]
            self.cached_tokens = usage["prompt_tokens_details"]["cached_tokens"]


@dataclass(frozen=True)
class Replay:
    """What came of one run. ``best_tokens``: the sum of what the instance had that had the most of each prompt, when
    it was routed. ``texts``: of the answers, in the order of the requests."""

    ttft_s: list[float]
    prompt_tokens: int
    cached_tokens: int
    best_tokens: int
    texts: list[str] = field(default_factory=list)


class LanguageStack:
    """A running stack, by its address.

    Attributes:
        pid: of the process that runs it.
        answered: how many answers have come to their end.
        under_way: how many are yet to.
    """

    def __init__(self, session: aiohttp.ClientSession, vocabulary: int, pid: int) -> None:
        self.pid = pid
        self.answered = 0
        self.under_way = 0
        self._session = session
        self._vocabulary = vocabulary
        self._warmed = 0

    async def warm_up(self, instances: int) -> None:
        """Prompts that nothing else has in common, some at once, so that all instances get one."""
        for _ in range(2):
            await asyncio.gather(*(self._alone() for _ in range(2 * instances)))

    async def replay(self, requests: Sequence[SmallRequest]) -> Replay:
        """Ask for all, each at its time, or when the one before it in its conversation has been answered.

        Raises:
            BenchmarkError: one of them was not answered.
        """
        best_before = await self._best_tokens()
        # A little later, so that the first one is not late already.
        begin_s = time.monotonic() + 0.2
        before: dict[str, asyncio.Task[Answer]] = {}
        tasks = []

        async def one(request: SmallRequest, after: asyncio.Task[Answer] | None) -> Answer:
            if after is not None:
                await asyncio.wait([after])
            await asyncio.sleep(max(0.0, begin_s + request.due_s - time.monotonic()))
            return await self.ask(request)

        try:
            async with asyncio.TaskGroup() as group:
                for request in requests:
                    task = group.create_task(one(request, before.get(request.conversation)))
                    before[request.conversation] = task
                    tasks.append(task)
        except ExceptionGroup as failed:
            raise failed.exceptions[0] from failed
        answers = [task.result() for task in tasks]
        return Replay(
            [answer.ttft_s for answer in answers],
            sum(answer.prompt_tokens for answer in answers),
            sum(answer.cached_tokens for answer in answers),
            await self._best_tokens() - best_before,
            [answer.text for answer in answers],
        )

    async def _alone(self) -> Answer:
        self._warmed += 1
        name = f"warming up {self._warmed}"
        tokens = random_tokens(_WARM_UP_SEED + self._warmed, _WARM_UP_TOKENS, self._vocabulary)
        return await self.ask(SmallRequest(0.0, name, tuple(tokens), 2))

    async def ask(self, request: SmallRequest) -> Answer:
        """Ask at once, and read the answer to its end. Raises BenchmarkError: it was refused, or failed."""
        fields = {
            "prompt": list(request.tokens),
            "max_tokens": request.answer_tokens,
            "temperature": 0.0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            "prompt_cache_key": request.conversation,
        }
        self.under_way += 1
        try:
            answer = await self._streamed(fields)
        finally:
            self.under_way -= 1
        self.answered += 1
        return answer

    async def _streamed(self, fields: Mapping[str, Any]) -> Answer:
        answer = Answer(time.monotonic())
        async with asyncio.timeout(_ANSWER_TIMEOUT_S), self._session.post("/v1/completions", json=fields) as response:
            if response.status != 200:
                raise BenchmarkError(f"a request was refused: {(await response.json())['error']['message']}")
            async for line in response.content:
                answer.take(line, time.monotonic())
        return answer

    async def metrics(self) -> str:
        """What the gateway counts, in Prometheus' text."""
        async with self._session.get("/metrics", raise_for_status=True) as response:
            return await response.text()

    async def _best_tokens(self) -> int:
        return counted(await self.metrics(), _BEST)


def counted(metrics: str, name: str) -> int:
    """The value of a counter in Prometheus' text. Raises BenchmarkError: there is none of that name."""
    found = re.search(rf"^{name} (\S+)$", metrics, re.MULTILINE)
    if found is None:
        raise BenchmarkError(f"the stack's metrics have no {name}")
    return round(float(found[1]))


async def profiled(model: str, folder: Path) -> str:
    """What ``triptych profile`` measures of a language model, on one thread: the path of its file in ``folder``.

    Raises:
        BenchmarkError: it could not.
    """
    target = str(folder / "profile.json")
    command = [sys.executable, "-m", "compose.cli", "profile", "--video-model", "none", "--language-model", model]
    async with asyncio.timeout(_PROFILE_TIMEOUT_S):
        if await completed(*command, "-o", target):
            raise BenchmarkError("the language model was not profiled; why stands above")
    return target


@contextlib.asynccontextmanager
async def language_stack(
    rule: str, model: str, instances: int, vocabulary: int, told: Told
) -> AsyncIterator[LanguageStack]:
    """A stack under ``rule`` with so many fused instances of one thread each; stopped at the end."""
    settings = {
        "TRIPTYCH_ROLE": "fused",
        "TRIPTYCH_ROUTING": rule,
        "TRIPTYCH_PREFILL_TOKENS_S": str(told.prefill_tokens_s),
        "TRIPTYCH_TRANSFER_TOKENS_S": str(told.transfer_tokens_s),
    }
    async with stack_of(model, {"decode": instances}, settings, vocabulary, told.profile) as stack:
        yield stack


@contextlib.asynccontextmanager
async def stack_of(
    model: str, counts: Mapping[str, int], settings: Mapping[str, str], vocabulary: int, profile: str = ""
) -> AsyncIterator[LanguageStack]:
    """A stack with so many of each service, of one thread each, under these settings; stopped at the end.

    ``profile``: a file of ``triptych profile`` to go by, if any.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRIPTYCH_THREADS": "1", **settings}
    command = [sys.executable, "-m", "compose.cli", "up", "--port", "0", "--log-level", "warning"]
    command += ["--language-model", model]
    command += ["--rib", profile] if profile else []
    for service, count in counts.items():
        command += ["--set", f"{service}={count}"]
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=10.0, sock_read=_ANSWER_TIMEOUT_S)
    async with (
        started(command, environment) as (process, ready),
        aiohttp.ClientSession(ready.split()[1], timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session,
    ):
        yield LanguageStack(session, vocabulary, process.pid)

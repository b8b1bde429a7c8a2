"""A real stack in a process of its own, as ``triptych up`` runs it, and what a client does with it."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from compose.launch import PACKAGE_ROOT

VIDEO_MODEL = os.environ.get("TRIPTYCH_TEST_VIDEO_MODEL", "demo")
START_S = 180.0
VIDEO_S = 240.0
_STOP_S = 60.0
_MOST_ORDERED = 5


@dataclass
class Stack:
    """A running ``triptych up``."""

    process: subprocess.Popen[str]
    base_url: str
    ready_line: str
    killed_at_s: dict[str, float] = field(default_factory=dict)

    def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> bytes:
        """One request; the answer's body. Raises urllib's HTTPError from 400 upwards."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            f"{self.base_url}{path}", data, {"Content-Type": "application/json"}, method=method
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            answer: bytes = response.read()
        return answer

    def json(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(self.call(method, path, body))
        return answer

    def limits(self) -> dict[str, Any]:
        """What the served video model can do, and its defaults."""
        limits: dict[str, Any] = self.json("GET", "/v1/models")["data"][0]["video"]
        return limits

    def order(self, **fields: Any) -> str:
        return str(self.json("POST", "/v1/videos", fields)["id"])

    def wait(self, video_id: str, holds: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """The video once ``holds`` does. A gateway that is away for a moment is waited for."""
        deadline_s = time.monotonic() + VIDEO_S
        while time.monotonic() < deadline_s:
            with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
                video = self.json("GET", f"/v1/videos/{video_id}")
                if holds(video):
                    return video
                if video["status"] == "failed":
                    raise AssertionError(f"the video failed: {video['error']}")
            time.sleep(0.01)
        raise AssertionError(f"video {video_id} did not get there within {VIDEO_S:g} s")

    def caught(self, holds: Callable[[dict[str, Any]], bool], **fields: Any) -> dict[str, Any]:
        """A video that was ordered, while ``holds``: one that is done before it is looked at is ordered once more."""
        for _ in range(_MOST_ORDERED):
            video_id = self.order(**fields)
            video = self.wait(video_id, lambda video: holds(video) or video["status"] == "completed")
            if video["status"] != "completed":
                return video
        raise AssertionError("every video was done before it was looked at")

    def order_and_kill(self, fields: dict[str, Any], victim: str, step: int, pause_s: float) -> str:
        """Order a video and kill ``victim`` a moment after that step of it was done; the video's id."""
        video_id = self.order(**fields)
        self.wait(video_id, lambda video: video["step"] >= step)
        time.sleep(pause_s)
        self.kill(victim)
        return video_id

    def completed(self, video_id: str) -> bytes:
        """The file, once the video is completed."""
        self.wait(video_id, lambda video: video["status"] == "completed")
        return self.call("GET", f"/v1/videos/{video_id}/content")

    def kill(self, instance: str) -> None:
        """End a process as a power cut would; ``wait_whole`` waits for its next life."""
        process = self.process_of(instance)
        self.killed_at_s[instance] = time.time()
        process.kill()

    def processes(self) -> list[psutil.Process]:
        """Everything the supervisor started, directly or not."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def process_of(self, instance: str) -> psutil.Process:
        """A worker by its name; gateway and scheduler by their module, the broker by its program."""
        service = instance.rpartition("-")[0]
        program = f"{service}-server"
        module = "gateway" if service == "gateway" else f"services.{service}"
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.status() == psutil.STATUS_ZOMBIE:
                    continue
                if process.name() in (instance, program) or process.cmdline()[-1:] == [module]:
                    return process
        raise AssertionError(f"no process of {instance}")

    def wait_whole(self) -> None:
        """Return once every member is ready (again); the record of a life that was ended outlives it for a while."""
        deadline_s = time.monotonic() + START_S
        while time.monotonic() < deadline_s:
            with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
                members = self.json("GET", "/v1/cluster")["members"]
                alive = [each for each in members if each["started_at_s"] > self.killed_at_s.get(each["instance"], 0.0)]
                if sum(member["state"] == "ready" for member in alive) >= 9:
                    return
            time.sleep(0.05)
        raise AssertionError("the stack did not become whole again")

    def stop(self, number: signal.Signals = signal.SIGINT) -> int:
        """Ask it to end, as a person at the terminal would; its exit code."""
        self.process.send_signal(number)
        return self.process.wait(_STOP_S)


@contextlib.contextmanager
def running_stack(*options: str) -> Iterator[Stack]:
    """``triptych up`` on a free port while the block runs, with a checkpoint after each step.

    Who dies is known by its next life, and by nobody answering: silence is a busy machine's.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "compose.cli", "up", "--port", "0", "--video-model", VIDEO_MODEL, *options],
        cwd=PACKAGE_ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TRIPTYCH_CHECKPOINT_STEPS": "1", "TRIPTYCH_MEMBER_TIMEOUT_S": "20"},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("ready "), "the stack did not start; its standard error says why"
        yield Stack(process, line.split()[1], line)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
        process.communicate()


def posix_shared_memory() -> set[str]:
    """The names of what there is of POSIX shared memory on this machine."""
    return {path.name for path in Path("/dev/shm").iterdir()}


def system_v_shared_memory(processes: list[psutil.Process]) -> list[str]:
    """The System V segments that one of these processes made, dead or alive."""
    pids = {process.pid for process in processes}
    # key, shmid, perms, size, cpid (who made it), ...
    rows = [line.split() for line in Path("/proc/sysvipc/shm").read_text().splitlines()[1:]]
    return [row[1] for row in rows if int(row[4]) in pids]

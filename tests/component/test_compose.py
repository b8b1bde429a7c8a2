"""The compose file's reader, and the local runner with small real processes."""

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import psutil
import pytest

from common.runtime import ports
from compose.cli import main
from compose.entrypoint import ReplicaError, filled, replica_of
from compose.errors import ComposeError, CrashLoopError, OptionError, StartError
from compose.interpolation import interpolate
from compose.launch import PACKAGE_ROOT, CommandLauncher, ForkLauncher, Launch
from compose.local import StackOptions, variable_values
from compose.logs import LogFollower
from compose.ports import checked_port, free_port, kept_port
from compose.rundir import run_directory, sweep
from compose.spec import read_stack, seconds
from compose.supervisor import Supervisor
from tests.support.stopping import stop_process

_DEADLINE_S = 120.0


# --- the reader ----------------------------------------------------------------------------------------------------


def test_the_shipped_file_describes_the_stack() -> None:
    stack = read_stack({"TRIPTYCH_NATS_PORT": "5555"})
    assert {name: spec.replicas for name, spec in stack.services.items()} == {
        "nats": 1, "scheduler": 1, "dit": 2, "vae": 2, "encoder": 1, "cache_store": 1, "prefill": 0, "decode": 1,
        "gateway": 1,
    }  # fmt: skip
    assert stack.levels[0] == ("nats",)
    assert stack.levels[-1] == ("gateway",)
    assert set(stack.levels[1]) == {"scheduler", "dit", "vae", "encoder", "cache_store", "prefill", "decode"}
    assert "--port=5555" in stack.services["nats"].command
    assert stack.services["dit"].instances == ("dit-0", "dit-1")
    assert stack.services["dit"].environment["TRIPTYCH_SLOT"] == ""
    assert stack.services["dit"].environment["TRIPTYCH_MEETING_HOST"] == "", "each container's own address"
    assert stack.services["dit"].environment["TRIPTYCH_NATS_URL"] == "nats://nats:4222"
    assert "TRIPTYCH_SLOT" not in stack.services["encoder"].environment
    assert "common.runtime.worker" in stack.services["dit"].preload
    assert stack.services["gateway"].preload == ()
    assert stack.services["cache_store"].environment["TRIPTYCH_CACHE_DIR"] == "/var/lib/cache_store"


def test_processes_of_one_machine_meet_on_loopback(tmp_path: Path) -> None:
    with run_directory(tmp_path) as directory:
        stack = read_stack(variable_values(StackOptions(), directory, 8080))
    assert stack.services["dit"].environment["TRIPTYCH_MEETING_HOST"] == "127.0.0.1"


def _write(folder: Path, text: str) -> Path:
    path = folder / "compose.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("services: {a: {command: [x], surprise: 1}}", "a: unknown surprise"),
        ("services: {a: {command: [x]}}\nnetworks: {}", "unknown networks"),
        ("services: {a: {command: x}}", "a.command: expected a list"),
        ("services: {a: {command: [x], environment: {N: 1}}}", "a.environment.N: put 1 in quotes"),
        ("services: {a: {command: [x], deploy: {replicas: -1}}}", "a.deploy.replicas: -1"),
        ("services: {a: {command: [x], deploy: {replicas: '${N:-some}'}}}", "a.deploy.replicas: 'some'"),
        ("services: {a: {command: [x], deploy: {mode: global}}}", "a.deploy: unknown mode"),
        ("services: {a: {command: [x], stop_grace_period: 10}}", "10 is no duration"),
        ("services: {a: {command: [x], depends_on: {b: {condition: service_started}}}}", "which is no service"),
        (
            "services: {a: {command: [x], depends_on: {b: {condition: service_healthy}}}, b: {command: [y]}}",
            "b has no healthcheck",
        ),
        ("services: {a: {command: [x], depends_on: {b: {condition: done}}}, b: {command: [y]}}", "'done' is neither"),
        ("services: {a: {command: ['${NOPE:?say which}']}}", "variable NOPE must be set: say which"),
        ("services: {a: {command: [x], healthcheck: {test: [CMD-SHELL, y]}}}", "write it as"),
        ("services: [", "cannot read"),
        ("- a", "expected a mapping"),
    ],
)
def test_what_the_reader_does_not_know_it_refuses(tmp_path: Path, text: str, complaint: str) -> None:
    with pytest.raises(ComposeError, match="(?s)" + complaint.replace("$", r"\$")):
        read_stack({}, _write(tmp_path, text))


def test_a_circle_of_dependencies_is_refused(tmp_path: Path) -> None:
    text = (
        "services: {a: {command: [x], depends_on: {b: {condition: service_started}}},"
        " b: {command: [x], depends_on: {a: {condition: service_started}}}}"
    )
    with pytest.raises(ComposeError, match="circle"):
        _ = read_stack({}, _write(tmp_path, text)).levels


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("$A/${A}", "1/1"),
        ("${B:-two}", "two"),
        ("${EMPTY:-two}", "two"),
        ("${EMPTY-two}", ""),
        ("${A:-two}${C-}", "1"),
        ("$$A", "$A"),
        ("http://${H:-nats}:${P:-4222}", "http://nats:4222"),
    ],
)
def test_interpolation(text: str, value: str) -> None:
    assert interpolate({"deep": [text]}, {"A": "1", "EMPTY": ""}) == {"deep": [value]}


@pytest.mark.parametrize("text", ["${A", "100$", "${A:+x}", "${1}"])
def test_interpolation_refuses_what_it_does_not_understand(text: str) -> None:
    with pytest.raises(ComposeError, match="starts no variable"):
        interpolate(text, {"A": "1"})


def test_durations() -> None:
    assert seconds("1m30s", "here") == 90.0
    assert seconds("100ms", "here") == pytest.approx(0.1)
    with pytest.raises(ComposeError, match="here: '5' is no duration"):
        seconds("5", "here")


# --- options -------------------------------------------------------------------------------------------------------


def test_a_stack_without_a_language_model_has_no_instance_for_one(tmp_path: Path) -> None:
    with run_directory(tmp_path) as directory:
        variables = variable_values(StackOptions(language_model="none"), directory, 8080)
    stack = read_stack(variables)
    assert stack.services["decode"].instances == ()
    assert stack.services["gateway"].environment["TRIPTYCH_LANGUAGE_MODEL"] == ""
    assert read_stack({}).services["gateway"].environment["TRIPTYCH_LANGUAGE_MODEL"] == "demo"


def test_scaling() -> None:
    scaled = read_stack({}).scaled({"dit": 4})
    assert scaled.services["dit"].instances == ("dit-0", "dit-1", "dit-2", "dit-3")
    assert scaled.services["vae"].replicas == 2


@pytest.mark.parametrize(
    ("arguments", "code", "complaint"),
    [
        (["--set", "dit"], 2, "'dit' is not SERVICE=COUNT"),
        (["--set", "dit=0"], 2, "'dit=0' is not SERVICE=COUNT"),
        (["--set", "dit=many"], 2, "'dit=many' is not SERVICE=COUNT"),
        (["--set", "oven=2"], 2, "no service 'oven'; the stack has nats, scheduler"),
        (["--port", "70000"], 2, "ports go from 1 to 65535"),
        (["--language-model", "./no/such/folder"], 2, "--language-model ./no/such/folder: no such folder"),
        (["--video-model", "./no/such/folder"], 2, "no such folder"),
        (["--state-dir", "/proc/nowhere"], 2, "cannot keep the stack's state"),
        (["--host", "192.0.2.77"], 2, "192.0.2.77"),
    ],
)
def test_bad_options_are_named(
    capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, complaint: str
) -> None:
    try:
        returned = main(["up", *(arguments if "--port" in arguments else ["--port", "0", *arguments])])
    except SystemExit as exited:
        returned = int(exited.code or 0)
    captured = capsys.readouterr()
    assert returned == code
    assert complaint in captured.err
    assert captured.out == ""


def test_a_port_in_use_names_the_remedy(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OptionError, match=f"port {port} on 127.0.0.1 cannot be used"):
            checked_port("127.0.0.1", port)
        assert main(["up", "--port", str(port)]) == 2
    assert "choose another with --port" in capsys.readouterr().err


def test_a_free_port_is_none_that_the_system_gives_away() -> None:
    first, last = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    if first <= 20_000:
        pytest.skip("this system gives away all ports")
    assert not any(first <= free_port("127.0.0.1") <= last for _ in range(20))
    with pytest.raises(OptionError, match=r"--host 192\.0\.2\.77"):
        free_port("192.0.2.77")


def test_a_kept_port_is_given_to_nobody_else_and_its_server_may_come_and_go(monkeypatch: pytest.MonkeyPatch) -> None:
    with kept_port("127.0.0.1") as port:
        # Nobody draws any other.
        monkeypatch.setattr(ports, "_LOWEST_PORT", port)
        monkeypatch.setattr(ports, "_first_given_port", lambda: port + 1)
        for _ in range(2):
            assert free_port("127.0.0.1") != port
            assert checked_port("127.0.0.1", port) == port
            with socket.create_server(("127.0.0.1", port)), socket.create_connection(("127.0.0.1", port)):
                assert free_port("127.0.0.1") != port
    # What is left of a connection keeps a port from whoever looks for one for a while; not from its server.
    assert checked_port("127.0.0.1", port) == port


def test_the_broker_takes_the_port_that_the_environment_names(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    port = free_port("127.0.0.1")
    monkeypatch.setenv("TRIPTYCH_NATS_PORT", str(port))
    with run_directory(None) as directory:
        variables = variable_values(StackOptions(), directory, 8080)
    assert variables["TRIPTYCH_NATS_URL"] == f"nats://127.0.0.1:{port}"
    for wrong in ("4222x", "0", "70000"):
        monkeypatch.setenv("TRIPTYCH_NATS_PORT", wrong)
        assert main(["up", "--port", "0"]) == 2
        assert "TRIPTYCH_NATS_PORT" in capsys.readouterr().err


def test_no_server_names_the_remedy(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    address = f"http://127.0.0.1:{free_port('127.0.0.1')}"
    assert main(["video", "a ball", "-o", str(tmp_path / "a.mp4"), "--base-url", address]) == 1
    assert capsys.readouterr().err == f"triptych: no server answers at {address}; start one with: triptych up\n"


@pytest.mark.parametrize(
    ("name", "replica"),
    [
        ("triptych-dit-1.triptych_default", ("dit", 0)),
        ("my-stack-vae-12", ("vae", 11)),
        ("triptych_gateway_1", ("gateway", 0)),
        ("triptych-cache_store-2.triptych_default", ("cache_store", 1)),
        ("my_own-stack-dit-3", ("dit", 2)),
    ],
)
def test_a_container_finds_out_which_replica_it_is(name: str, replica: tuple[str, int]) -> None:
    assert replica_of(name) == replica


def test_the_entry_point_fills_in_what_is_empty() -> None:
    given = {"TRIPTYCH_INSTANCE": "", "TRIPTYCH_SLOT": "", "TRIPTYCH_MEETING_HOST": "", "OTHER": ""}
    assert filled(given, lambda: "t-dit-3.net", lambda: "172.18.0.5") == {
        "TRIPTYCH_INSTANCE": "dit-2", "TRIPTYCH_SLOT": "2", "TRIPTYCH_MEETING_HOST": "172.18.0.5", "OTHER": "",
    }  # fmt: skip
    with pytest.raises(ReplicaError, match="set TRIPTYCH_INSTANCE"):
        filled(given, lambda: "a1b2c3d4e5f6", lambda: "172.18.0.5")
    settled = {"TRIPTYCH_INSTANCE": "dit-7", "TRIPTYCH_MEETING_HOST": "10.0.0.1"}
    assert filled(settled, lambda: "nonsense", lambda: "nonsense") == settled


# --- the run directory ---------------------------------------------------------------------------------------------


def test_a_temporary_run_directory_goes_and_a_state_directory_stays(tmp_path: Path) -> None:
    with run_directory(None) as directory:
        assert directory.logs.is_dir()
    assert not directory.path.exists()
    with run_directory(tmp_path / "state") as kept:
        (kept.path / "job").write_text("here")
    assert (tmp_path / "state" / "job").read_text() == "here"


def test_two_stacks_cannot_share_a_state_directory(tmp_path: Path) -> None:
    with (
        run_directory(tmp_path),
        pytest.raises(OptionError, match="another stack is running"),
        run_directory(tmp_path),
    ):
        pass


def test_what_a_killed_stack_left_is_swept_and_a_living_one_is_not() -> None:
    long_ago = time.time() - 3600
    with contextlib.suppress(KeyError), run_directory(None) as left:
        raise KeyError("a stack that fails leaves its logs")
    os.utime(left.path, (long_ago, long_ago))
    with run_directory(None) as living:
        os.utime(living.path, (long_ago, long_ago))
        # Another stack that starts just then may be at it.
        deadline_s = time.monotonic() + _DEADLINE_S
        while left.path.exists() and time.monotonic() < deadline_s:
            sweep()
        assert not left.path.exists()
        assert living.path.exists()


# --- processes -----------------------------------------------------------------------------------------------------

_FORKED = ", x-preload: [json]"


def _service(mode: str, forked: bool = False, more: str = "") -> str:
    return f"{{command: [python, -m, tests.support.worker, {mode}]{_FORKED if forked else ''}{more}}}"


class Stage:
    """A supervisor over small real processes, and what they told."""

    def __init__(self, supervisor: Supervisor, forking: ForkLauncher, folder: Path, said: list[str]) -> None:
        self.supervisor, self.forking, self.folder, self.said = supervisor, forking, folder, said

    @property
    def events(self) -> list[str]:
        path = self.folder / "events"
        return path.read_text().splitlines() if path.exists() else []

    async def until(self, holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(_DEADLINE_S):
            while not holds():  # noqa: ASYNC110 - other processes announce nothing to this loop
                await asyncio.sleep(0.01)

    async def until_told(self, event: str, times: int = 1) -> None:
        await self.until(lambda: sum(line.startswith(event) for line in self.events) >= times)

    async def pid_of(self, name: str) -> int:
        """Who is forked may speak before the supervisor is told its number."""
        await self.until(lambda: self.supervisor.replicas[name].pid is not None)
        pid = self.supervisor.replicas[name].pid
        assert pid is not None
        return pid


@contextlib.asynccontextmanager
async def _stage(folder: Path, services: str, **variables: str) -> AsyncIterator[Stage]:
    environment = {**os.environ, "EVENTS": str(folder / "events"), **variables}
    said: list[str] = []
    forking, executing = ForkLauncher(environment, ["json"], folder / "forkserver.log"), CommandLauncher()
    supervisor = Supervisor(
        read_stack(variables, _write(folder, f"services:\n{services}")),
        lambda spec: forking if spec.preload else executing,
        lambda spec, index: {
            **environment,
            **spec.environment,
            "TRIPTYCH_INSTANCE": spec.instances[index],
            "TRIPTYCH_SLOT": str(index),
        },
        folder,
        said.append,
    )
    supervisor.settled.set()
    try:
        yield Stage(supervisor, forking, folder, said)
    finally:
        await supervisor.stop()
        await forking.close()


@pytest.mark.parametrize("forked", [False, True])
def test_replicas_start_with_their_own_environment_and_stop_politely(tmp_path: Path, forked: bool) -> None:
    async def play() -> None:
        more = ", deploy: {replicas: 2}"
        async with _stage(tmp_path, f"  a: {_service('obedient', forked, more)}") as stage:
            await stage.supervisor.start()
            await stage.until_told("a-0 started slot=0 torch=False")
            await stage.until_told("a-1 started slot=1 torch=False")
            # Asked to stop before it knows its replicas, the supervisor has nobody to ask politely.
            for name in stage.supervisor.replicas:
                await stage.pid_of(name)
            await stage.supervisor.stop()
            assert sorted(line for line in stage.events if "stopped" in line) == ["a-0 stopped", "a-1 stopped"]
            # A forked worker has what the fork server imported; one of its own process does not.
            assert all(line.endswith(f"json={forked}") for line in stage.events if "started" in line)
            assert stage.said == []

    asyncio.run(play())


@pytest.mark.parametrize("forked", [False, True])
def test_what_is_killed_is_started_again(tmp_path: Path, forked: bool) -> None:
    async def play() -> None:
        async with _stage(tmp_path, f"  a: {_service('obedient', forked)}") as stage:
            await stage.supervisor.start()
            await stage.until_told("a-0 started")
            first = await stage.pid_of("a-0")
            os.kill(first, signal.SIGKILL)
            await stage.until_told("a-0 started", times=2)
            await stage.until(lambda: stage.supervisor.replicas["a-0"].pid not in (None, first))
            assert stage.said == ["a-0 was killed by SIGKILL; starting it again"]

    asyncio.run(play())


def test_a_dead_fork_server_is_replaced_with_its_children(tmp_path: Path) -> None:
    async def play() -> None:
        more = ", deploy: {replicas: 2}"
        async with _stage(tmp_path, f"  a: {_service('obedient', True, more)}") as stage:
            server = stage.forking.start()
            await stage.supervisor.start()
            await stage.until_told("a-0 started")
            await stage.until_told("a-1 started")
            orphans = [await stage.pid_of(name) for name in stage.supervisor.replicas]
            server.signal(signal.SIGKILL)
            await stage.until_told("a-0 started", times=2)
            await stage.until_told("a-1 started", times=2)
            await stage.until(lambda: not any(psutil.pid_exists(pid) for pid in orphans))

    asyncio.run(play())


def test_a_fork_server_that_is_busy_is_waited_for_by_all(tmp_path: Path) -> None:
    environment = {**os.environ, "EVENTS": str(tmp_path / "events"), "TRIPTYCH_INSTANCE": "a-0", "LARGE": "x" * 20_000}

    async def play() -> None:
        forking = ForkLauncher(environment, ["json"], tmp_path / "forkserver.log")
        server = forking.start()
        stop_process(server.pid)
        command = ("python", "-m", "tests.support.worker", "broken")
        launch = Launch("a-0", command, environment, tmp_path / "a.log", ("json",))
        # More than its socket has room for.
        launching = [asyncio.create_task(forking.launch(launch)) for _ in range(30)]
        await asyncio.sleep(0.1)
        server.signal(signal.SIGCONT)
        async with asyncio.timeout(_DEADLINE_S):
            assert {await (await each).ended for each in launching} == {3}
        await forking.close()

    asyncio.run(play())


@pytest.mark.parametrize("forked", [False, True])
def test_a_crash_loop_is_given_up_with_the_last_words(tmp_path: Path, forked: bool) -> None:
    policy = ", deploy: {restart_policy: {delay: 10ms, max_attempts: 3, window: 1h}}"

    async def play() -> None:
        async with _stage(tmp_path, f"  a: {_service('broken', forked, policy)}") as stage:
            await stage.supervisor.start()
            with pytest.raises(CrashLoopError, match=r"(?s)a-0 died 3 times .*exit code 3.*the last word of a broken"):
                async with asyncio.timeout(_DEADLINE_S):
                    await stage.supervisor.failed
            assert len(stage.events) == 3
            assert stage.said[0].endswith("starting it again")
            assert stage.said[1].endswith("starting it again in 0.01 s")

    asyncio.run(play())


def test_a_stack_that_starts_with_wrong_settings_gives_up_at_once(tmp_path: Path) -> None:
    async def play() -> None:
        async with _stage(tmp_path, f"  a: {_service('misled')}") as stage:
            stage.supervisor.settled.clear()
            await stage.supervisor.start()
            with pytest.raises(CrashLoopError, match=r"(?s)a-0 cannot start as it is set up.*the last word"):
                async with asyncio.timeout(_DEADLINE_S):
                    await stage.supervisor.failed
            assert len(stage.events) == 1

    asyncio.run(play())


def test_a_stack_that_is_still_starting_gives_up_sooner(tmp_path: Path) -> None:
    async def play() -> None:
        async with _stage(tmp_path, f"  a: {_service('broken')}") as stage:
            stage.supervisor.settled.clear()
            await stage.supervisor.start()
            with pytest.raises(CrashLoopError, match="a-0 died 2 times"):
                async with asyncio.timeout(_DEADLINE_S):
                    await stage.supervisor.failed

    asyncio.run(play())


def test_a_module_that_cannot_be_imported_is_a_start_error(tmp_path: Path) -> None:
    async def play() -> None:
        async with _stage(tmp_path, "  a: {command: [python, -m, x], x-preload: [json, no_such_module]}") as stage:
            await stage.supervisor.start()
            with pytest.raises(StartError, match="cannot import no_such_module"):
                async with asyncio.timeout(_DEADLINE_S):
                    await stage.supervisor.failed

    asyncio.run(play())


def test_a_program_that_is_not_there_is_named(tmp_path: Path) -> None:
    async def play() -> None:
        launch = Launch("a-0", ("no-such-program",), {}, tmp_path / "a.log")
        with pytest.raises(ComposeError, match="no program 'no-such-program'"):
            await CommandLauncher().launch(launch)

    asyncio.run(play())


def test_a_service_waits_until_what_it_depends_on_is_healthy(tmp_path: Path) -> None:
    port = str(free_port("127.0.0.1"))
    probe = "import os,socket; socket.create_connection(('127.0.0.1', int(os.environ['PORT'])), 1)"
    timing = "start_interval: 50ms, timeout: 60s, start_period: 2m"
    health = f', healthcheck: {{test: [CMD, python, -c, "{probe}"], {timing}}}'
    after = ", depends_on: {first: {condition: service_healthy}}"
    services = f"  later: {_service('obedient', more=after)}\n  first: {_service('serving', more=health)}"

    async def play() -> None:
        async with _stage(tmp_path, services, PORT=port) as stage:
            await stage.supervisor.start()
            await stage.until_told("later-0 started")
            names = [" ".join(line.split()[:2]) for line in stage.events]
            assert names == ["first-0 started", "first-0 serving", "later-0 started"]

    asyncio.run(play())


def test_what_never_becomes_healthy_is_named(tmp_path: Path) -> None:
    health = ", healthcheck: {test: [CMD, python, -c, raise SystemExit(1)], start_period: 300ms, start_interval: 50ms}"
    after = ", depends_on: {first: {condition: service_healthy}}"
    services = f"  first: {_service('obedient', more=health)}\n  later: {_service('obedient', more=after)}"

    async def play() -> None:
        async with _stage(tmp_path, services) as stage:
            with pytest.raises(StartError, match=r"first was not healthy after 0.3 s"):
                await stage.supervisor.start()

    asyncio.run(play())


def test_dependants_stop_first(tmp_path: Path) -> None:
    after_a = ", depends_on: {a: {condition: service_started}}"
    after_b = ", depends_on: {b: {condition: service_started}}"
    services = (
        f"  a: {_service('obedient')}\n  b: {_service('obedient', True, after_a)}\n"
        f"  c: {_service('obedient', more=after_b)}"
    )

    async def play() -> None:
        async with _stage(tmp_path, services) as stage:
            await stage.supervisor.start()
            for name in "abc":
                await stage.until_told(f"{name}-0 started")
                await stage.pid_of(f"{name}-0")
            await stage.supervisor.stop()
            assert [line for line in stage.events if "stopped" in line] == ["c-0 stopped", "b-0 stopped", "a-0 stopped"]

    asyncio.run(play())


@pytest.mark.parametrize("hurried", [False, True])
@pytest.mark.parametrize("forked", [False, True])
def test_who_does_not_end_is_killed(tmp_path: Path, forked: bool, hurried: bool) -> None:
    grace = f", stop_grace_period: {'1h' if hurried else '200ms'}"

    async def play() -> None:
        async with _stage(tmp_path, f"  a: {_service('deaf', forked, grace)}") as stage:
            await stage.supervisor.start()
            await stage.until_told("a-0 started")
            pid = await stage.pid_of("a-0")
            stopping = asyncio.create_task(stage.supervisor.stop())
            if hurried:
                stage.supervisor.hurry.set()
            async with asyncio.timeout(_DEADLINE_S):
                await stopping
            assert not psutil.pid_exists(pid)
            assert stage.said == ([] if hurried else ["a-0 did not end within 0.2 s; killing it"])

    asyncio.run(play())


def test_a_killed_supervisor_leaves_nothing(tmp_path: Path) -> None:
    services = f"services:\n  a: {_service('deaf')}\n  b: {_service('deaf', True, ', deploy: {replicas: 2}')}"
    supervisor = subprocess.Popen(
        [sys.executable, "-m", "tests.support.supervise", str(_write(tmp_path, services)), str(tmp_path)],
        cwd=PACKAGE_ROOT,
        env={**os.environ, "EVENTS": str(tmp_path / "events")},
        stdout=subprocess.PIPE,
    )
    try:
        assert supervisor.stdout is not None
        processes = [psutil.Process(int(pid)) for pid in supervisor.stdout.readline().split()]
        assert len(processes) == 4
        supervisor.kill()
        gone, alive = psutil.wait_procs(processes, timeout=_DEADLINE_S)
        assert len(gone) == 4
        assert alive == []
    finally:
        supervisor.kill()
        supervisor.communicate()


# --- logs ----------------------------------------------------------------------------------------------------------


def test_warnings_and_tracebacks_are_shown_and_the_rest_is_not(tmp_path: Path) -> None:
    said: list[str] = []
    follower = LogFollower(tmp_path, said.append)
    log = tmp_path / "dit-0.log"
    log.write_text("timestamp=1 level=info event=a\ntimestamp=2 level=warning event=b\nTraceback (most")
    follower.catch_up()
    assert said == ["dit-0 | timestamp=2 level=warning event=b"]
    with log.open("a") as file:
        file.write(
            " recent call last):\n[77] 2026/01/01 10:00:00.1 [INF] quiet\n[77] 2026/01/01 10:00:00.1 [ERR] loud\n"
        )
    follower.catch_up()
    assert said[1:] == [
        "dit-0 | Traceback (most recent call last):",
        "dit-0 | [77] 2026/01/01 10:00:00.1 [ERR] loud",
    ]

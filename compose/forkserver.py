"""The fork server: a process that has imported the heavy modules once and forks the workers from there.

It is started as ``python -m compose.forkserver FD`` with one end of a SEQPACKET socket pair, and answers requests
one after the other; each packet is one JSON object.

    {"preload": [module, ...]}                                           no answer; imports ahead of time
    {"launch": id, "name": ..., "module": ..., "arguments": [...], "environment": {...},
     "preload": [...], "log": path}                                      {"launched": id, "pid": pid}
                                                                         {"refused": id, "reason": text}
    (a worker ends)                                                      {"ended": pid, "status": wait status}

It has one thread and holds no CUDA or UCX state, so its children may do with theirs what they like. It ends, and
its children with it, when the socket closes or its parent dies.
"""

import atexit
import faulthandler
import gc
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from common.runtime.tether import show_as, tether_to

MAX_PACKET_BYTES = 128 * 1024


@dataclass(frozen=True)
class Program:
    """What a forked child is to become."""

    name: str
    module: str
    arguments: tuple[str, ...]
    environment: dict[str, str]
    log: str


class ForkServer:
    """The server's loop. ``serve`` returns in the parent with None at the end, and in each child with its program."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._selector = selectors.DefaultSelector()
        self._selector.register(control, selectors.EVENT_READ)
        self._tether = tether_to(os.getpid())

    def serve(self) -> Program | None:
        """Answer requests until the socket closes; returns a program in the child that is to run it."""
        while True:
            for key, _ in self._selector.select():
                if key.fileobj is not self._control:
                    self._reap(key.fd, key.data)
                    continue
                packet = self._control.recv(MAX_PACKET_BYTES)
                if not packet:
                    return None
                program = self._answer(json.loads(packet))
                if program is not None:
                    return program

    def _answer(self, request: dict[str, Any]) -> Program | None:
        launch_id = request.get("launch")
        try:
            for module in request["preload"]:
                importlib.import_module(module)
        except ImportError as error:
            if launch_id is not None:
                self._send({"refused": launch_id, "reason": f"cannot import {error.name}: {error}"})
            return None
        if launch_id is None:
            return None
        program = Program(
            request["name"],
            request["module"],
            tuple(request["arguments"]),
            dict(request["environment"]),
            request["log"],
        )
        # What is loaded by now is never collected, so collections in the children leave those pages shared.
        gc.collect()
        gc.freeze()
        pid = os.fork()
        if pid == 0:
            self._become_child()
            return program
        os.setpgid(pid, pid)
        self._selector.register(os.pidfd_open(pid), selectors.EVENT_READ, data=pid)
        self._send({"launched": launch_id, "pid": pid})
        return None

    def _become_child(self) -> None:
        self._tether()
        if os.getpgrp() != os.getpid():
            os.setpgid(0, 0)
        for key in list(self._selector.get_map().values()):
            if key.fileobj is not self._control:
                os.close(key.fd)
        self._selector.close()
        self._control.close()

    def _reap(self, pidfd: int, pid: int) -> None:
        self._selector.unregister(pidfd)
        os.close(pidfd)
        _, status = os.waitpid(pid, 0)
        self._send({"ended": pid, "status": status})

    def _send(self, message: dict[str, Any]) -> None:
        self._control.send(json.dumps(message).encode())


class QuickExit:
    """Ends a child once its exit handlers have run.

    Taking the interpreter apart object by object would first copy every page shared with the server, seconds of work
    whose result is thrown away.
    """

    def __init__(self) -> None:
        self.code: int | None = None
        # Handlers run last in, first out: what is registered before anything is imported has the last word.
        atexit.register(self._leave)

    def _leave(self) -> None:
        if self.code is not None:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(self.code)

    def watch(self, run_program: Callable[[], None]) -> None:
        """Run the program and note the exit code that it will have."""
        try:
            self.code = 0
            run_program()
        except SystemExit as leaving:
            self.code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
            raise
        except BaseException:
            self.code = 1
            raise


def run(program: Program) -> None:
    """Become ``program``: its environment, its log as standard output and error, its module as ``__main__``."""
    log = os.open(program.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    faulthandler.enable()
    show_as(program.name)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(program.environment)
    sys.argv = [program.module, *program.arguments]
    runpy.run_module(program.module, run_name="__main__", alter_sys=True)


def main() -> None:
    """Serve on the file descriptor given; in a forked child, run its program instead."""
    # A Ctrl-C in the terminal is the supervisor's to act on.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    quick_exit = QuickExit()
    program = ForkServer(socket.socket(fileno=int(sys.argv[1]))).serve()
    if program is not None:
        quick_exit.watch(lambda: run(program))


if __name__ == "__main__":
    main()

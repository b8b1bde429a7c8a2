"""The folder a running stack keeps its files in: logs, what broker and cache store keep, and a lock while it lives."""

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from compose.errors import OptionError

_LOCK = "lock"
# A folder this young may belong to a stack that has not locked it yet.
_SETTLED_AFTER_S = 30.0


@dataclass(frozen=True)
class RunDirectory:
    """Where a stack's files are. ``kept`` says whether they outlive it."""

    path: Path
    kept: bool

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def broker_store(self) -> Path:
        return self.path / "nats"

    @property
    def cache(self) -> Path:
        return self.path / "cache"


@contextlib.contextmanager
def run_directory(state_dir: Path | None) -> Iterator[RunDirectory]:
    """A locked folder for one stack: ``state_dir``, or a temporary one that is removed at the end.

    A block that fails leaves a temporary folder behind, for its logs; the next stack's start sweeps it away.

    Raises:
        OptionError: ``state_dir`` cannot be used, or another stack is using it.
    """
    sweep()
    if state_dir is None:
        directory = RunDirectory(Path(tempfile.mkdtemp(prefix=_prefix())), kept=False)
    else:
        directory = RunDirectory(state_dir.absolute(), kept=True)
    try:
        directory.logs.mkdir(parents=True, exist_ok=True)
        lock = os.open(directory.path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise OptionError(f"cannot keep the stack's state in {directory.path}: {error.strerror}") from error
    try:
        if not _locked(lock):
            raise OptionError(f"another stack is running in {directory.path}; stop it or give another --state-dir")
        for log in directory.logs.glob("*.log"):
            log.unlink()
        yield directory
        if not directory.kept:
            shutil.rmtree(directory.path, ignore_errors=True)
    finally:
        os.close(lock)


def sweep() -> None:
    """Remove what stacks of ours left in the temporary folder when they were killed."""
    for path in Path(tempfile.gettempdir()).glob(f"{_prefix()}*"):
        with contextlib.suppress(OSError):
            status = path.lstat()
            if status.st_uid != os.getuid() or time.time() - status.st_mtime < _SETTLED_AFTER_S:
                continue
            lock = os.open(path / _LOCK, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                if _locked(lock):
                    shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(lock)


def _prefix() -> str:
    return f"triptych-{os.getuid()}-"


def _locked(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True

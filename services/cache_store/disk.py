"""The disk tier: one file for each key, indexed in memory, read and written by one thread in the order asked for."""

import asyncio
import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import structlog
import torch

from services.cache_store.dropped import Dropped, DroppedFile
from services.cache_store.files import DamagedFile, FileHeader, read_header, read_tensor, write_tensor
from services.cache_store.tier import Held, Tier, TierFull

log = structlog.get_logger()

R = TypeVar("R")


class DiskTier:
    """Files of ``folder``, together never above ``capacity_bytes`` of tensors. Make one with ``open``."""

    def __init__(self, folder: Path, capacity_bytes: int) -> None:
        self._folder = folder
        self._tier = Tier(capacity_bytes)
        self._thread = ThreadPoolExecutor(1, "disk")
        self._dropped_file = DroppedFile(folder / "dropped.log")
        self.dropped = Dropped()

    @classmethod
    async def open(cls, folder: Path, capacity_bytes: int, now_s: float) -> "DiskTier":
        """The tier with what a former life left in the folder, the files written last being those used last.

        Files that do not match their header's checksum or their length are removed now, with a log line each; the
        tensor's own checksum is looked at whenever it is read, so that a start takes no longer the more is kept.

        Raises:
            OSError: the folder cannot be made or read.
        """
        disk = cls(folder, capacity_bytes)
        headers = await disk._run(disk._scan)
        disk.dropped = await disk._run(lambda: disk._dropped_file.read(now_s))
        for header in headers:
            disk._index(header, now_s)
        return disk

    def __len__(self) -> int:
        return len(self._tier)

    @property
    def used_bytes(self) -> int:
        return self._tier.used_bytes

    def listen(self, changed: Callable[[str], None]) -> None:
        """See `Tier.listen`."""
        self._tier.listen(changed)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tier)

    def held(self, key: str) -> Held | None:
        return self._tier.held(key)

    def evicts(self, key: str, size_bytes: int, now_s: float) -> bool:
        """See `Tier.evicts`."""
        return self._tier.evicts(key, size_bytes, now_s)

    def check_room(self, key: str, size_bytes: int, now_s: float) -> None:
        """Raises TierFull where so much would not fit."""
        self._tier.check_room(key, size_bytes, now_s)

    def used(self, key: str) -> None:
        """Note that ``key`` was asked for."""
        self._tier.used(key)

    async def write(self, key: str, held: Held, tensor: torch.Tensor, now_s: float) -> None:
        """Keep ``tensor`` in a file.

        Raises:
            TierFull: there is no room beside what is pinned; nothing has changed.
            OSError: the disk did not take it; nothing is kept under the key.
        """
        for evicted in self._tier.admit(key, held, now_s):
            self._thread.submit(self._unlink, evicted)
        try:
            await self._run(lambda: self._write(key, held, tensor))
        except OSError:
            self._forget(key, held)
            raise

    async def read(self, key: str) -> tuple[Held, torch.Tensor] | None:
        """The newest version under ``key`` and its tensor. A damaged file is removed with a log line, and is none."""
        held = self._tier.held(key)
        if held is None:
            return None
        try:
            header, tensor = await self._run(lambda: self._read(key))
        except (DamagedFile, OSError) as error:
            log.warning("damaged tensor dropped", key=key, reason=str(error))
            self._forget(key, held)
            return None
        return header.held, tensor

    async def drop(self, key: str, at_s: float) -> None:
        """Forget the key at once; returns when that it was dropped will outlive this process."""
        self.remove(key)
        all_known = tuple(self.dropped) if self._dropped_file.overgrown else ()
        await self._run(lambda: self._note_dropped(key, at_s, all_known))

    def remove(self, key: str) -> None:
        """Forget the key; its file goes in a moment."""
        if self._tier.held(key) is not None:
            self._tier.remove(key)
            self._thread.submit(self._unlink, key)

    async def close(self) -> None:
        """Let what was asked for come to its end."""
        await self._run(lambda: None)
        self._thread.shutdown(wait=False)

    def _forget(self, key: str, held: Held) -> None:
        """Unless something newer has taken its place while the thread was at it."""
        if self._tier.held(key) is held:
            self._tier.remove(key)

    def _index(self, header: FileHeader, now_s: float) -> None:
        if header.stored_at_s <= (self.dropped.at_s(header.key) or -1.0):
            # The former life ended between the note of its drop and the file's end.
            self._thread.submit(self._unlink, header.key)
            return
        try:
            evicted = self._tier.admit(header.key, header.held, now_s)
        except TierFull:
            evicted = [header.key]
        for key in evicted:
            log.info("the disk tier has become smaller: tensor dropped", key=key)
            self._thread.submit(self._unlink, key)

    async def _run(self, work: Callable[[], R]) -> R:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    # --- in the thread, where nothing comes between a file's failure and its removal ---------------------------------

    def _scan(self) -> list[FileHeader]:
        self._folder.mkdir(parents=True, exist_ok=True)
        for unfinished in self._folder.glob("*.part"):
            unfinished.unlink()
        headers: list[FileHeader] = []
        for path in sorted(self._folder.glob("*.tensor"), key=lambda path: path.stat().st_mtime_ns):
            try:
                header = read_header(path)
                if path != self._path(header.key):
                    raise DamagedFile(f"{path.name}: not where {header.key!r} is kept")
                headers.append(header)
            except DamagedFile as error:
                log.warning("damaged tensor dropped", reason=str(error))
                path.unlink()
        return headers

    def _write(self, key: str, held: Held, tensor: torch.Tensor) -> None:
        try:
            write_tensor(self._path(key), key, held, tensor)
        except OSError:
            self._unlink(key)
            raise

    def _read(self, key: str) -> tuple[FileHeader, torch.Tensor]:
        try:
            return read_tensor(self._path(key))
        except (DamagedFile, OSError):
            self._unlink(key)
            raise

    def _unlink(self, key: str) -> None:
        try:
            self._path(key).unlink(missing_ok=True)
        except OSError as error:
            log.warning("file not removed", key=key, reason=str(error))

    def _note_dropped(self, key: str, at_s: float, all_known: tuple[tuple[str, float], ...]) -> None:
        try:
            self._dropped_file.append(key, at_s)
            if all_known:
                self._dropped_file.rewrite(all_known)
        except OSError as error:
            log.warning("not on disk that a tensor was dropped", key=key, reason=str(error))

    def _path(self, key: str) -> Path:
        return self._folder / f"{hashlib.sha256(key.encode()).hexdigest()[:40]}.tensor"

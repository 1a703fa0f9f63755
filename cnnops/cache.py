"""Compiled kernels on disk: what all compilers, NVRTC, g++ and numba's, share.

An entry's name is a digest of all that decides its content; the file is that content followed by its SHA-256.
It is written to a temporary file and renamed, so that any number of processes may use one cache at once, and
one that does not match its digest is made anew. A directory that cannot be written, or is full, is read all
the same, and costs time only.

What is found here is run as code. So folders are made for this user alone (0700), and one that somebody else
may have written, or such a file in it, is left aside with a warning: see `is_trusted`. Files of root's count
as one's own, as an image for deployment has them.
"""

from __future__ import annotations

import atexit
import errno
import hashlib
import os
import shutil
import stat
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

_DIGEST_BYTES = 32
_BUILDING = ".building-"
_DAY = 24 * 3600
"""Seconds: no compiler takes as long."""


def cache_dir() -> Path:
    """Where compiled kernels are kept: ``CNNOPS_CACHE_DIR``, else the user's cache; made private (0700)."""
    named = os.environ.get("CNNOPS_CACHE_DIR")
    if named:
        path = Path(named)
    else:
        from platformdirs import user_cache_path

        path = user_cache_path("cnnops")
    path.mkdir(parents=True, exist_ok=True, mode=0o700)
    return path


def digest_of(*parts: object, files: Sequence[Path] = ()) -> str:
    """SHA-256 of the parts' ``repr`` and of the files' names and contents."""
    digest = hashlib.sha256(repr(parts).encode())
    for file in files:
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()


def is_trusted(state: os.stat_result) -> bool:
    """Whether nobody but this user and root can have written the file or folder. Root's group counts as root:
    containers that run under any user id give them that group."""
    owned = state.st_uid in (0, os.geteuid())
    by_group = state.st_mode & stat.S_IWGRP and state.st_gid != 0
    return owned and not by_group and not state.st_mode & stat.S_IWOTH


@lru_cache(None)
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=2)


def _leave_aside(path: Path, state: os.stat_result) -> None:
    _warn_once(
        f"{path}: expected to be written by this user or root alone, got owner {state.st_uid} and mode "
        f"{stat.S_IMODE(state.st_mode):o}: compiled kernels there are not used"
    )


@lru_cache(None)
def _folder_of_this_process() -> Path:
    path = tempfile.mkdtemp(prefix="cnnops-")
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return Path(path)


class DiskCache:
    """The files ``<folder>/*<suffix>`` of the cache directory, at most `limit` bytes of them.

    `place`, if given, says anew at every use where the folder is instead. Threads may share it.
    """

    def __init__(
        self,
        folder: str,
        suffix: str,
        limit: int | None = 1 << 30,
        place: Callable[[], Path] | None = None,
    ) -> None:
        self._folder, self._suffix, self._limit = folder, suffix, limit
        self._place = place or (lambda: cache_dir() / folder)
        self._lock = threading.Lock()
        self._compiled = self._loaded = self._bytes = 0
        self._seconds = 0.0
        self._said = False

    def stats(self) -> dict[str, float]:
        """Entries made, entries found on disk, seconds spent making, and bytes written, since this process
        started."""
        return {
            "compiled": self._compiled,
            "loaded_from_cache": self._loaded,
            "compile_seconds": self._seconds,
            "bytes_written": self._bytes,
        }

    def _count(
        self, compiled: int = 0, loaded: int = 0, seconds: float = 0.0, bytes: int = 0
    ) -> None:
        with self._lock:
            self._compiled += compiled
            self._loaded += loaded
            self._seconds += seconds
            self._bytes += bytes

    # ---- where ----

    def folder(self) -> Path:
        """Where entries are; where the cache cannot be written, a folder that ends with the process."""
        try:
            return self.writable()
        except OSError:
            return self._passing()

    def writable(self) -> Path:
        """The folder, made if it is missing. Raises OSError where this process may not write it."""
        folder = self._place()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not self._readable() or not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
        return folder

    def _readable(self) -> Path | None:
        """The folder that entries may be found in, be it another user's who is trusted."""
        try:
            folder = self._place()
            state = folder.stat()
        except OSError:
            return None
        if is_trusted(state):
            return folder
        _leave_aside(folder, state)
        return None

    def _passing(self) -> Path:
        folder = _folder_of_this_process() / self._folder
        folder.mkdir(exist_ok=True)
        return folder

    # ---- entries ----

    def entry(self, name: str, build: Callable[[Path], None]) -> Path:
        """The file of entry `name`; ``build(path)`` writes its content when it is missing or damaged."""
        for folder in dict.fromkeys((self._readable(), self.folder())):
            if folder is not None and self._content(folder, name) is not None:
                return self._path(folder, name)
        began = time.perf_counter()
        try:
            path = self._write(self.writable(), name, build)
        except OSError as error:
            self._cannot_keep(error)
            path = self._write(self._passing(), name, build)
        self._count(compiled=1, seconds=time.perf_counter() - began)
        return path

    def find(self, name: str) -> bytes | None:
        """The content of entry `name`; None where it is missing, damaged, or not to be trusted."""
        folder = self._readable()
        return None if folder is None else self._content(folder, name)

    def store(self, name: str, content: bytes) -> None:
        """Keep the content of entry `name`. Raises OSError where it cannot be kept."""

        def build(path: Path) -> None:
            path.write_bytes(content)

        self._write(self.writable(), name, build)

    def kept(self, name: str, make: Callable[[], bytes]) -> tuple[bytes, bool]:
        """The content of entry `name`, and whether it was found; ``make()`` makes what is missing or damaged.

        As `entry` for compilers that write no file: nothing has to be written for this process to go on.
        """
        content = self.find(name)
        if content is not None:
            return content, True
        began = time.perf_counter()
        content = make()
        self._count(compiled=1, seconds=time.perf_counter() - began)
        try:
            self.store(name, content)
        except OSError as error:
            self._cannot_keep(error)
        return content, False

    def _cannot_keep(self, error: OSError) -> None:
        with self._lock:
            said, self._said = self._said, True
        if not said:
            warnings.warn(
                f"compiled kernels cannot be kept, later processes compile them again: {error}",
                stacklevel=3,
            )

    def _path(self, folder: Path, name: str) -> Path:
        return folder / f"{name}{self._suffix}"

    def _content(self, folder: Path, name: str) -> bytes | None:
        """The content of the entry in `folder`, if it is as it was written, by somebody who is trusted."""
        path = self._path(folder, name)
        try:
            with path.open("rb") as file:
                state = os.fstat(file.fileno())
                if not is_trusted(state):
                    _leave_aside(path, state)
                    return None
                both = file.read()
        except OSError:
            return None
        content, digest = both[:-_DIGEST_BYTES], both[-_DIGEST_BYTES:]
        if hashlib.sha256(content).digest() != digest:
            return None
        with suppress(OSError):  # another user's
            os.utime(path)
        self._count(loaded=1)
        return content

    def _write(self, folder: Path, name: str, build: Callable[[Path], None]) -> Path:
        """What `build` writes, with its digest, as the entry `name`: all of it appears in one moment."""
        path = self._path(folder, name)
        with tempfile.TemporaryDirectory(dir=folder, prefix=_BUILDING) as scratch:
            built = Path(scratch) / f"entry{self._suffix}"
            build(built)
            with built.open("r+b") as file:
                file.write(hashlib.sha256(file.read()).digest())
            built.chmod(0o644)  # whatever the umask: others may be let into the folder
            self._count(bytes=built.stat().st_size)
            os.replace(built, path)
        self._trim(folder)
        return path

    def _trim(self, folder: Path) -> None:
        """Keep the entries that were used last, and nothing of processes that were killed in writing."""
        for left in folder.glob(f"{_BUILDING}*"):
            with suppress(OSError):
                if time.time() - left.stat().st_mtime > _DAY:
                    shutil.rmtree(left)
        if self._limit is None:
            return
        used = []
        for path in folder.glob(f"*{self._suffix}"):
            try:
                state = path.stat()
            except FileNotFoundError:  # another process trims too
                continue
            used.append((state.st_mtime, state.st_size, path))
        kept = 0
        for _, size, path in sorted(used, reverse=True):
            kept += size
            if kept > self._limit:
                path.unlink(missing_ok=True)

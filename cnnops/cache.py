"""Compiled kernels on disk: what all compilers, NVRTC, g++ and numba's, share.

An entry's name is a digest of all that decides its content; the file is that content followed by its SHA-256.
It is written to a temporary file and renamed, so that any number of processes may use one cache at once, and
one that does not match its digest is made anew. A directory that cannot be written is read all the same, and
costs time only.
"""

from __future__ import annotations

import atexit
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

_DIGEST_BYTES = 32


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


@lru_cache(None)
def _folder_of_this_process() -> Path:
    path = tempfile.mkdtemp(prefix="cnnops-")
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return Path(path)


class DiskCache:
    """The files ``<folder>/*<suffix>`` of the cache directory, at most `limit` bytes of them.

    `place`, if given, says anew at every use where the folder is instead.
    """

    def __init__(
        self,
        folder: str,
        suffix: str,
        limit: int = 1 << 30,
        place: Callable[[], Path] | None = None,
    ) -> None:
        self._folder, self._suffix, self._limit = folder, suffix, limit
        self._place = place or (lambda: cache_dir() / folder)
        self._compiled = self._loaded = 0
        self._seconds = 0.0

    def stats(self) -> dict[str, float]:
        """Entries made, entries found on disk, and seconds spent making, since this process started."""
        return {
            "compiled": self._compiled,
            "loaded_from_cache": self._loaded,
            "compile_seconds": self._seconds,
        }

    def folder(self) -> Path:
        """Where entries are; where the cache cannot be written, a folder that ends with the process."""
        with suppress(OSError):
            folder = self._place()
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if os.access(folder, os.W_OK | os.X_OK):
                return folder
        folder = _folder_of_this_process() / self._folder
        folder.mkdir(exist_ok=True)
        return folder

    def entry(self, name: str, build: Callable[[Path], None]) -> Path:
        """The file of entry `name`; ``build(path)`` writes its content when it is missing or damaged."""
        folder = self.folder()
        for place in dict.fromkeys((*self._readable(), folder)):
            path = place / f"{name}{self._suffix}"
            if _is_whole(path):
                with suppress(OSError):  # another user's
                    os.utime(path)
                self._loaded += 1
                return path
        began = time.perf_counter()
        with tempfile.TemporaryDirectory(dir=folder, prefix=".building-") as scratch:
            built = Path(scratch) / f"entry{self._suffix}"
            build(built)
            with built.open("r+b") as file:
                file.write(hashlib.sha256(file.read()).digest())
            os.replace(built, path)
        self._compiled += 1
        self._seconds += time.perf_counter() - began
        self._trim(folder)
        return path

    def kept(self, name: str, make: Callable[[], bytes]) -> tuple[bytes, bool]:
        """The content of entry `name`, and whether it was found; ``make()`` makes what is missing or damaged.

        As `entry` for compilers that write no file: then even a disk without room costs time only.
        """
        made: list[bytes] = []

        def build(path: Path) -> None:
            made.append(make())
            path.write_bytes(made[0])

        try:
            content = self.content(self.entry(name, build))
        except OSError:
            # Of the disk, or `make` has raised it: then it does again.
            content = made[0] if made else make()
            made.append(content)
            self._compiled += 1
        return content, not made

    def _readable(self) -> list[Path]:
        """The folder that entries may be found in, be it another user's."""
        try:
            return [self._place()]
        except OSError:
            return []

    @staticmethod
    def content(path: Path) -> bytes:
        """What `build` wrote to the entry at `path`."""
        return path.read_bytes()[:-_DIGEST_BYTES]

    def _trim(self, folder: Path) -> None:
        """Keep the entries that were used last."""
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


def _is_whole(path: Path) -> bool:
    """Whether there is an entry at `path`, as it was written."""
    try:
        content = path.read_bytes()
    except OSError:
        return False
    return hashlib.sha256(content[:-_DIGEST_BYTES]).digest() == content[-_DIGEST_BYTES:]

"""Files that appear whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


def check_writable(path: Path, name: str) -> None:
    """Raises ValueError, in one line that begins with `name`, where no file could be written to `path`."""
    if os.path.isdir(path) or not os.path.isdir(path.parent):
        raise ValueError(f"{name}: expected a file in a folder that exists, got {path}")
    # The folder, as files are written beside their places; the file, as its owner may have locked it.
    if not all(os.access(p, os.W_OK) for p in (path.parent, path) if os.path.exists(p)):
        raise ValueError(f"{name}: expected a place that can be written, got {path}")


@contextmanager
def written_whole(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of `path` when the block ends; what raises in it leaves `path` alone.

    Raises ValueError, in one line, where it cannot be written.
    """
    target = path.resolve()  # a link stays one
    partial = target.with_name(f".{target.name}-{os.getpid()}")
    try:
        with partial.open("wb") as file:
            yield file
        os.replace(partial, target)
    except OSError as error:
        raise ValueError(f"expected a place that can be written, got {error}") from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)

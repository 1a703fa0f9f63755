"""Checkpoints: written whole or not at all, checked when they are read, with nothing in them that can run.

    DIR/checkpoint.pt             the newest one
    DIR/checkpoint-previous.pt    the one before it

A file is what ``torch.save`` writes, followed by its SHA-256, 32 bytes: `torch.load` reads it as it is. It is
written beside the former one, forced to the disk and renamed, so that a kill at any point leaves a whole one.
"""

from __future__ import annotations

import hashlib
import io
import os
import pickle
from pathlib import Path
from typing import Any

import torch

from cnnops.files import written_whole

NEWEST = "checkpoint.pt"
PREVIOUS = "checkpoint-previous.pt"
FORMAT = "cnnops checkpoint 1"
KEYS = {
    "format", "recipe", "classes", "images", "model", "optimizer", "schedule", "scaler", "record", "step",
    "seconds",
}  # fmt: skip
DIGEST = hashlib.sha256().digest_size


class CheckpointError(ValueError):
    """A file is not the whole checkpoint that it should be; the message is fit for a user's eyes."""


def save(folder: Path, state: dict[str, Any]) -> None:
    """Write `state`, which has all `KEYS` but the format. Raises ValueError where that cannot be done.

    What was kept before is whole at every moment.
    """
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **state}, buffer)
    content = buffer.getbuffer()
    newest = folder / NEWEST
    with written_whole(newest) as file:
        file.write(content)
        file.write(hashlib.sha256(content).digest())
        file.flush()
        os.fsync(file.fileno())
        if newest.exists():
            os.replace(newest, folder / PREVIOUS)
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)  # the names, too
    finally:
        os.close(handle)


def find(place: Path) -> Path | None:
    """The newest checkpoint of a folder, None where it has none; a file is what it is."""
    if place.is_file():
        return place
    # Killed between two renames, a run leaves only the former one.
    return next((place / name for name in (NEWEST, PREVIOUS) if (place / name).is_file()), None)


def load(path: Path) -> dict[str, Any]:
    """What `save` wrote, all tensors on the CPU. Raises CheckpointError where that is not in `path`."""
    try:
        content = memoryview(path.read_bytes())
    except OSError as error:
        raise CheckpointError(
            f"{path}: expected a readable checkpoint, got {error.strerror}"
        ) from error
    payload, digest = content[:-DIGEST], content[-DIGEST:]
    if hashlib.sha256(payload).digest() != digest:
        raise CheckpointError(
            f"{path}: expected a whole checkpoint of `cnnops train`, got {len(content):,} bytes that do not "
            f"match their digest{_hint(path)}"
        )
    try:
        state = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError) as error:
        line = str(error).strip().partition("\n")[0]
        raise CheckpointError(f"{path}: expected a checkpoint, got {line}") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT or set(state) != KEYS:
        found = state.get("format") if isinstance(state, dict) else type(state).__name__
        raise CheckpointError(f"{path}: expected a {FORMAT!r}, got {found!r}")
    return state


def _hint(path: Path) -> str:
    """Where to go on from instead."""
    previous = path.with_name(PREVIOUS)
    if path.name != NEWEST or not previous.is_file():
        return ""
    return f"; remove it to go on from {PREVIOUS}"

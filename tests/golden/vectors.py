"""Recorded golden vectors on disk: `vectors/<item>.npz`, arrays and one JSON text, no pickles."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from .item import Tensors

FOLDER = Path(__file__).parent / "vectors"
_ABOUT = "about"


@dataclass(frozen=True)
class Recording:
    """What a GPU made of an item's inputs. `machine`: GPU, driver, versions, date and commit, as text."""

    inputs: Tensors
    outputs: Tensors
    machine: dict[str, str]


def _to_array(tensor: torch.Tensor) -> np.ndarray:
    """The bits as integers: numpy has no bfloat16."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(kinds[tensor.element_size()]).numpy()


def save(path: Path, recording: Recording) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    dtypes, arrays = {}, {}
    for group in ("inputs", "outputs"):
        for name, tensor in getattr(recording, group).items():
            dtypes[f"{group}.{name}"] = str(tensor.dtype).removeprefix("torch.")
            arrays[f"{group}.{name}"] = _to_array(tensor)
    about = json.dumps({"machine": recording.machine, "dtypes": dtypes})
    np.savez_compressed(path, **arrays, **{_ABOUT: np.frombuffer(about.encode(), dtype=np.uint8)})


def load(path: Path) -> Recording:
    with np.load(path, allow_pickle=False) as file:
        about = json.loads(file[_ABOUT].tobytes())
        groups: dict[str, Tensors] = {"inputs": {}, "outputs": {}}
        for key, dtype in about["dtypes"].items():
            group, name = key.split(".", 1)
            groups[group][name] = torch.from_numpy(file[key].copy()).view(getattr(torch, dtype))
    return Recording(groups["inputs"], groups["outputs"], about["machine"])

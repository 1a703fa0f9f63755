"""What a training run is to do: options of the command line, checked before any work is done.

A `Recipe` is what decides the weights that come out, and nothing else: every checkpoint holds it, so that a
run goes on as it began.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from cnnops import info
from cnnops.data import augment

ENGINES = ("cuda", "cpu", "aten")
OPTIMIZERS = ("sgd", "adam", "adamw")
SCHEDULES = ("constant", "step", "cosine", "onecycle")
AMP = {"bfloat16": torch.bfloat16, "float16": torch.float16}

RATES = {"sgd": 0.05, "adam": 2e-3, "adamw": 2e-3}
"""Learning rates that small networks take from each optimizer."""


@dataclass(frozen=True)
class Recipe:
    """All that decides the weights. Plain values; None means: what suits the model.

    model:           a name in `cnnops.models`, or package.module:callable
    data:            folder; "" is scikit-learn's digits
    batch:           images a step, in all processes together
    rate:            the schedule's largest learning rate
    warmup:          epochs in which it rises from nearly 0; None: 0, of a onecycle 30 % of all
    dropout:         probability of every dropout in the model, or of one before its last dense layer
    amp:             "bfloat16", "float16" or "": the type that autocast computes in
    channels, size:  of the images that the model is given, size as (H, W)
    threads:         of the CPU
    """

    model: str
    data: str = ""
    epochs: int = 12
    batch: int = 32
    optimizer: str = "adam"
    rate: float = RATES["adam"]
    momentum: float = 0.9
    weight_decay: float = 0.0
    schedule: str = "onecycle"
    warmup: float | None = None
    label_smoothing: float = 0.0
    dropout: float | None = None
    augment: str = "shift=2"
    amp: str = ""
    channels_last: bool = False
    engine: str = "cpu"
    fuse_training: bool = False
    seed: int = 0
    channels: int | None = None
    size: tuple[int, int] | None = None
    threads: int = 1

    def state(self) -> dict[str, Any]:
        """Plain values, as `of` takes them."""
        return asdict(self)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Recipe:
        """From `state`'s values. Raises ValueError for others."""
        names = {field.name for field in fields(cls)}
        if set(values) != names:
            raise ValueError(
                f"recipe: expected {', '.join(sorted(names))}, got {', '.join(sorted(values))}"
            )
        size = values["size"]
        return checked(cls(**{**values, "size": None if size is None else tuple(size)}))


def complete(given: Mapping[str, Any]) -> Recipe:
    """A checked recipe of the values given; what is missing gets values that suit the others.

    Raises ValueError, with a line fit for the user, for whatever cannot work.
    """
    values = dict(given)
    if values.get("data"):  # MNIST has forty times the digits' images
        values = {"epochs": 3, "batch": 64, **values}
    values.setdefault("rate", RATES.get(values.get("optimizer", "adam"), 1.0))
    values.setdefault("threads", torch.get_num_threads())
    if "engine" not in values:
        values["engine"], _ = choose_engine(os.environ.get("CNNOPS_ENGINE"))
    return checked(Recipe(**values))


_RANGES: dict[str, tuple[float, float]] = {
    "epochs": (1, math.inf),
    "batch": (1, math.inf),
    "rate": (0, math.inf),
    "momentum": (0, 0.9999),
    "weight_decay": (0, math.inf),
    "label_smoothing": (0, 0.9999),
    "dropout": (0, 0.9999),
    "seed": (0, 2**63 - 1),
    "channels": (1, math.inf),
    "threads": (1, math.inf),
}
_CHOICES: dict[str, tuple[str, ...]] = {
    "engine": ENGINES,
    "optimizer": OPTIMIZERS,
    "schedule": SCHEDULES,
    "amp": ("", *AMP),
}


def checked(recipe: Recipe) -> Recipe:
    """The recipe. Raises ValueError where it cannot work, whatever the model and the data."""
    for name, choices in _CHOICES.items():
        if (value := getattr(recipe, name)) not in choices:
            expected = ", ".join(filter(None, choices))
            raise ValueError(f"{flag(name)}: expected one of {expected}, got {value!r}")
    for name, (least, most) in _RANGES.items():
        value = getattr(recipe, name)
        if value is not None and not (least <= value <= most and value < math.inf):
            wanted = f"at least {least:g}" if most == math.inf else f"{least:g} to {_figure(most)}"
            raise ValueError(f"{flag(name)}: expected {wanted}, got {value}")
    if recipe.warmup is not None and not 0 <= recipe.warmup < recipe.epochs:
        raise ValueError(
            f"--warmup: expected 0 or more epochs, less than all {recipe.epochs}, got {recipe.warmup:g}"
        )
    if recipe.size is not None and min(recipe.size) < 1:
        raise ValueError(f"--size: expected positive sizes, got {recipe.size}")
    try:
        augment.parse(recipe.augment)
    except ValueError as error:
        raise ValueError(f"--augment: {str(error).removeprefix('augmentation: ')}") from None
    if recipe.engine == "aten" and recipe.fuse_training:
        raise ValueError("--fuse-training: expected engine cuda or cpu, got aten")
    choose_engine(recipe.engine)
    return recipe


def _figure(value: float) -> str:
    return "2**63 - 1" if value == 2**63 - 1 else f"{value:g}"


def flag(name: str) -> str:
    """What a field of the recipe is called on the command line."""
    return "MODEL" if name == "model" else f"--{name.replace('_', '-')}"


def choose_engine(wish: str | None) -> tuple[str, str]:
    """The engine to train with, and a note where a GPU is there but cannot be used.

    Without a wish that is cuda where it works, else cpu. Raises ValueError for an engine that does not work.
    """
    if wish and wish not in ENGINES:
        raise ValueError(f"--engine: expected one of {', '.join(ENGINES)}, got {wish!r}")
    reason = info.unavailable("cuda")
    if wish == "cuda" and reason is not None:
        raise ValueError(f"engine 'cuda': {reason}")
    if wish:
        return wish, ""
    if reason is None:
        return "cuda", ""
    return "cpu", f"the GPU is left out: {reason}" if info.gpu() else ""


def resumed(began: Recipe, given: Mapping[str, Any]) -> Recipe:
    """The recipe that a run began with. Raises ValueError where what is given now contradicts it."""
    for name, value in given.items():
        former = getattr(began, name)
        same = (
            math.isclose(value, former) if isinstance(value, float) and former else value == former
        )
        if not same:
            raise ValueError(
                f"{flag(name)}: expected {_shown(former)}, with which this run began, got {_shown(value)}"
            )
    return began


def _shown(value: Any) -> str:
    return "its default" if value is None or value == "" else str(value)


# ---- where results go ------------------------------------------------------------------------------------


def writable(folder: Path) -> Path:
    """The folder, made if need be. Raises ValueError where no file can be written into it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(
            f"--out: expected a folder that can be written, got {folder} ({error.strerror})"
        ) from error
    return folder


def need(*packages: str) -> None:
    """Raises ValueError where one of the packages that pictures and digits need is missing."""
    for name in packages:
        if importlib.util.find_spec(name) is None:
            raise ValueError(f"training needs {name}: pip install 'cnnops[demo]'")

"""``cnnops compile``: every kernel that some networks need, compiled before anybody waits for it.

Which variant of a kernel a layer needs is decided by the layer's sizes, so the networks themselves say: each
runs at its own image size, as it is and fused, in training and at inference, while kernels are compiled but
do not run. Its parameters are memory that nobody has written. For batches of other sizes the network does not
run again: each of its problems is posed once more.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

import cnnops
from cnnops import registry
from cnnops.epilogue import Epilogue
from cnnops.models import MODELS
from cnnops.registry import Choice
from cnnops.shapes import LayerShape, Shape
from cnnops.tuned import dtype_name

DTYPES = (torch.float32, torch.bfloat16)
LAYOUTS = (torch.contiguous_format, torch.channels_last)
BATCHES = (1, 32)
"""One image, and enough of them that more would be cut up in the same way."""

_SEEN_AT = 2
"""The batch that networks run with: one that training's batch norm takes at every size."""


# ---- problems --------------------------------------------------------------------------------------------


def _at(shape: Shape, batch: int) -> Shape:
    """The problem with another batch."""
    if isinstance(shape, LayerShape):
        return replace(shape, outer=(shape.outer[0] // _SEEN_AT * batch, *shape.outer[1:]))
    return replace(shape, N=shape.N // _SEEN_AT * batch)


def _sizes(shape: Shape) -> tuple[Sequence[int], Sequence[int]]:
    return shape.x_size, getattr(shape, "y_size", shape.x_size)


def _like(t: Any, before: Shape, after: Shape) -> Any:
    """An unwritten tensor in the place of `t`, whose first axis may be the batch."""
    if isinstance(t, Epilogue):
        return Epilogue(*(_like(part, before, after) for part in t))
    if not isinstance(t, Tensor):
        return t
    for old, new in zip(_sizes(before), _sizes(after), strict=True):
        if tuple(t.shape) == tuple(old):
            return t.new_empty_strided(tuple(new), t.stride())
    return t


def _observer(batches: Sequence[int]) -> registry.Observer:
    """Poses every problem of the CPU engine that is new, at all batches."""
    seen: set[tuple[Any, ...]] = set()

    def observe(choice: Choice, _: str, shape: Shape, dtype: torch.dtype) -> Callable[..., None]:
        def pose(shape: Shape, *arguments: Any) -> None:
            layout = tuple(a.stride() if isinstance(a, Tensor) else a for a in arguments)
            if (key := (choice.op, shape, dtype, layout)) in seen:
                return
            seen.add(key)
            for batch in batches:
                at = _at(shape, batch)
                choice.function(at, *(_like(a, shape, at) for a in arguments))

        return pose if choice.engine == "cpu" else choice.function

    return observe


# ---- networks --------------------------------------------------------------------------------------------


@lru_cache(1)
def _forms(name: str) -> dict[str, nn.Module]:
    """The network as it is, fused for training, and fused for inference. Parameters have no memory yet: to
    draw them takes seconds, and so does fusing, which is done once for all types."""
    with torch.device("meta"):
        network = MODELS[name]()
        for_training = cnnops.convert(copy.deepcopy(network), fuse_training=True).model
        for_inference = cnnops.fuse(network.eval()).model
    return {"plain": network, "training": for_training, "inference": for_inference}


def _run(name: str, dtype: torch.dtype, layout: torch.memory_format) -> None:
    for use, form in _forms(name).items():
        network = copy.deepcopy(form).to(dtype).to(memory_format=layout)  # type: ignore[call-overload]
        network = network.to_empty(device="cpu")
        filters = next(p for p in network.parameters() if p.dim() == 4)
        size = (_SEEN_AT, filters.shape[1], *MODELS[name].input_size)
        x = torch.zeros(size, dtype=dtype).contiguous(memory_format=layout)
        if use != "inference":
            network.train()
            network(x).sum().backward()
        if use != "training":
            with torch.no_grad():
                network.eval()(x)


@dataclass(frozen=True)
class Compiled:
    """What `compile_cpu` has done."""

    compiled: int
    loaded: int
    seconds: float

    def __str__(self) -> str:
        return f"{self.compiled} kernels compiled, {self.loaded} found in the cache, {self.seconds:.1f} s"


def compile_cpu(
    models: Sequence[str],
    batches: Sequence[int] = BATCHES,
    advance: Callable[[str], None] = lambda text: None,
) -> Compiled:
    """Compile the kernels of the CPU engine that these networks of `cnnops.models` need, in float32 and
    bfloat16, contiguous and channels-last, in training and at inference. `advance` is called with a line
    after each of `steps(models)`."""
    from cnnops.cpu import code, task

    began, before = time.perf_counter(), code.stats()
    with (
        task.compiling_only(),
        registry.observed(_observer(batches)),
        cnnops.engine("cpu"),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # of what has not been computed
        for name, dtype, layout in steps(models):
            _run(name, dtype, layout)
            advance(f"{name}, {dtype_name(dtype)}: {code.stats()['compiled']} compiled")
    counts = code.stats()
    return Compiled(
        counts["compiled"] - before["compiled"],
        counts["loaded_from_cache"] - before["loaded_from_cache"],
        time.perf_counter() - began,
    )


def steps(models: Sequence[str]) -> list[tuple[str, torch.dtype, torch.memory_format]]:
    return list(product(models, DTYPES, LAYOUTS))


# ---- command line ----------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``cnnops compile``."""
    parser.add_argument(
        "models", nargs="*", metavar="MODEL", help="names in cnnops.models (default: all of them)"
    )
    parser.add_argument("--cpu", action="store_true", help="the kernels of the CPU engine")
    parser.add_argument(
        "--batch",
        metavar="N,…",
        default=",".join(map(str, BATCHES)),
        help="numbers of images (default: %(default)s)",
    )


def main(options: argparse.Namespace) -> int:
    """Run ``cnnops compile``; its exit code: 0, 1 where nothing can be kept, or 2 for bad input."""
    try:
        models, batches = _checked(options)
    except ValueError as error:
        print(f"cnnops compile: {error}", file=sys.stderr)
        return 2
    from cnnops.cpu import code

    if not code.is_kept():
        print("cnnops compile: the cache directory cannot be written", file=sys.stderr)
        return 1
    with _bar(len(steps(models))) as advance:
        done = compile_cpu(models, batches, advance)
    print(f"{done}: {code.cache_path()}")
    return 0


def _checked(options: argparse.Namespace) -> tuple[list[str], list[int]]:
    if not options.cpu:
        raise ValueError("expected --cpu: kernels of other engines are compiled when first used")
    for name in options.models:
        if name not in MODELS:
            raise ValueError(f"MODEL: expected one of {', '.join(MODELS)}, got {name!r}")
    parts = options.batch.split(",")
    if not all(part.isascii() and part.isdecimal() and int(part) for part in parts):
        raise ValueError(f"--batch: expected positive numbers as in 1,32, got {options.batch!r}")
    return options.models or list(MODELS), [int(part) for part in parts]


@contextmanager
def _bar(steps: int) -> Iterator[Callable[[str], None]]:
    """A progress bar on stderr, if that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=steps)
        yield lambda text: progress.update(task, advance=1, description=text)

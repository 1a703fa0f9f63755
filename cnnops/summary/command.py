"""The command line ``cnnops summary``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from cnnops.models import named
from cnnops.ops import DTYPES
from cnnops.summary import GPUS, Summary, figure, summary
from cnnops.tuned import dtype_name

FORMATS: dict[str, Callable[[Summary], str]] = {
    "table": str,
    "csv": Summary.csv,
    "json": Summary.json,
    "html": Summary.html,
}
FLAGS = {
    "input_size": "--input",
    "batch": "--batch",
    "dtype": "--dtype",
    "gpu": "--gpu",
    "plot": "--plot",
}
"""What arguments of `cnnops.summary` are called on the command line."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``cnnops summary``."""
    parser.add_argument(
        "model", metavar="MODEL", help="name in cnnops.models, or package.module:callable"
    )
    parser.add_argument(
        "--input", metavar="C,H,W", help="size of one image (default: what the model says)"
    )
    parser.add_argument(
        "--batch", metavar="N", default="1", help="how many images (default: %(default)s)"
    )
    dtypes = ", ".join(map(dtype_name, DTYPES))
    parser.add_argument("--dtype", default="float32", help=f"{dtypes} (default: %(default)s)")
    parser.add_argument("--gpu", default="h100", help=f"{', '.join(GPUS)} (default: %(default)s)")
    parser.add_argument(
        "--format", default="table", help=f"{', '.join(FORMATS)} (default: %(default)s)"
    )
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw the layers into a PNG, SVG or PDF file"
    )


def main(options: argparse.Namespace) -> int:
    """Run ``cnnops summary``; its exit code: 0, or 2 for bad input."""
    try:
        text = _run(options)
    except (ValueError, TypeError, RuntimeError) as error:
        name, colon, words = str(error).partition(": ")
        print(f"cnnops summary: {FLAGS.get(name, name)}{colon}{words}", file=sys.stderr)
        return 2
    try:
        sys.stdout.write(text.rstrip("\n") + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        raise  # a reader that has seen enough: `cnnops.__main__` knows
    except OSError as error:
        print(f"cnnops summary: standard output cannot be written: {error}", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 2
    return 0


def _run(options: argparse.Namespace) -> str:
    """What to print. All that the command line says is checked before anything is built."""
    if options.format not in FORMATS:
        raise ValueError(f"--format: expected one of {', '.join(FORMATS)}, got {options.format!r}")
    dtype = {dtype_name(dtype): dtype for dtype in DTYPES}.get(options.dtype)
    if dtype is None:
        names = ", ".join(map(dtype_name, DTYPES))
        raise ValueError(f"dtype: expected one of {names}, got {options.dtype!r}")
    if options.gpu not in GPUS:
        raise ValueError(f"gpu: expected one of {', '.join(GPUS)}, got {options.gpu!r}")
    (batch,) = _sizes("batch", options.batch, "one size, as in 32", 1)
    size = None
    if options.input is not None:
        size = _sizes("input_size", options.input, "sizes as in 3,224,224")
    if options.plot is not None:
        figure.check(options.plot)
    with named.at_home():
        model = _model(options.model)
        found = summary(model, size, batch=batch, dtype=dtype, gpu=options.gpu)
    text = FORMATS[options.format](found)
    if options.plot is not None:
        found.plot(options.plot)
    return text


def _sizes(name: str, text: str, wanted: str, count: int | None = None) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")]
    good = all(part.isascii() and part.isdecimal() and int(part) for part in parts)
    if not good or count not in (None, len(parts)):
        raise ValueError(f"{name}: expected {wanted}, got {text!r}")
    return tuple(map(int, parts))


def _model(name: str) -> torch.nn.Module:
    """A model by its name, without memory for its weights, unless building it needs their values.

    Raises ValueError where the name leads to none.
    """
    factory = named.find(name)
    try:
        with torch.device("meta"):
            return named.make(name, factory)
    except ValueError:  # meta tensors have no values: only without them is it known to be a mistake
        return named.make(name, factory)

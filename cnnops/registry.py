"""THE table of kernels: which module computes which operation in which engine, and how one is chosen.

A row's module has a function of the operation's name (signatures below) and
``supports(op, shape, dtype) -> str | None``: None, or the reason why not. Row order is preference.

Every function gets the problem's shape first and its result tensors last, allocated by the caller in the
layout that PyTorch would give, never empty, and fills them:

    conv_fprop(shape, x, w, bias | None, y)
    conv_dgrad(shape, grad_y, w, grad_x)
    conv_wgrad(shape, grad_y, x, grad_w)
    conv_bgrad(shape, grad_y, grad_bias)
    max_pool_fwd(shape, x, y, offsets)             offsets: place in the window, row by row; uint8 or int32
    max_pool_bwd(shape, grad_y, offsets, grad_x)
    max_pool_gather(shape, x, offsets, y)          y = x at the kept places: the backward's own backward
    avg_pool_fwd(shape, x, y)                      adaptive windows too
    avg_pool_bwd(shape, grad_y, grad_x)
    batch_norm_train(shape, x, weight | None, bias | None, residual | None, running_mean | None,
                     running_var | None, momentum, eps, activation, y, mean, rstd)
    batch_norm_infer(shape, x, weight | None, bias | None, residual | None, running_mean, running_var,
                     eps, activation, y)
    batch_norm_bwd(shape, grad_y, x, weight | None, bias | None, residual | None, mean, rstd, activation,
                   training, grad_x | None, grad_weight | None, grad_bias | None, grad_residual | None)
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch

from cnnops.config import Setting, settings
from cnnops.shapes import ConvShape, NormShape, PoolShape

Shape = ConvShape | PoolShape | NormShape


class UnsupportedError(RuntimeError):
    """No kernel of the engine takes the problem, and the fallback to PyTorch is switched off."""


@dataclass(frozen=True)
class Row:
    """One kernel family's answer to one operation."""

    op: str
    engines: tuple[str, ...]
    module: str

    @property
    def algorithm(self) -> str:
        return self.module.rpartition(".")[2]

    def supports(self, shape: Shape, dtype: torch.dtype) -> str | None:
        """None, or why this row cannot take the problem."""
        reason: str | None = importlib.import_module(self.module).supports(self.op, shape, dtype)
        return reason

    @cached_property
    def function(self) -> Callable[..., None]:
        function: Callable[..., None] = getattr(importlib.import_module(self.module), self.op)
        return function


GPU = ("cuda", "emulate")
CONV = ("conv_fprop", "conv_dgrad", "conv_wgrad", "conv_bgrad")
POOL = ("max_pool_fwd", "max_pool_bwd", "max_pool_gather", "avg_pool_fwd", "avg_pool_bwd")
NORM = ("batch_norm_train", "batch_norm_infer", "batch_norm_bwd")

ROWS: tuple[Row, ...] = (
    *(Row(op, GPU, "cnnops.cuda.conv_direct") for op in CONV),
    *(Row(op, GPU, "cnnops.cuda.conv_im2col") for op in CONV[:3]),
    *(Row(op, GPU, "cnnops.cuda.pool") for op in POOL),
    *(Row(op, GPU, "cnnops.cuda.batch_norm") for op in NORM),
    *(Row(op, ("cpu",), "cnnops.cpu.conv") for op in CONV),
    *(Row(op, ("cpu",), "cnnops.cpu.pool") for op in POOL),
    *(Row(op, ("cpu",), "cnnops.cpu.norm") for op in NORM),
    *(Row(op, ("aten",), "cnnops.aten") for op in CONV + POOL + NORM),
)


def algorithms() -> tuple[str, ...]:
    """Names for `cnnops.algorithm`, in the table's order."""
    return tuple(dict.fromkeys(row.algorithm for row in ROWS))


def algorithm(name: str | None) -> Setting:
    """Prefer kernels of one name, such as "conv_im2col", wherever they support the problem; None: no wish.

    Raises ValueError for a name that is not in the table.
    """
    if name is not None and name not in algorithms():
        raise ValueError(f"algorithm: expected one of {', '.join(algorithms())}, got {name!r}")
    return Setting("algorithm", name or "")


def engine_for(device: torch.device) -> str:
    """The engine in force for tensors on `device`.

    Raises RuntimeError when the engine chosen by name cannot take tensors of that device.
    """
    chosen, kind = settings.engine, device.type
    if not chosen:
        return kind if kind in ("cuda", "cpu") else "aten"
    if chosen != "aten" and kind != (needs := "cuda" if chosen == "cuda" else "cpu"):
        raise RuntimeError(f"engine {chosen!r}: expected tensors on {needs}, got {device}")
    return chosen


@dataclass(frozen=True)
class Choice:
    """What `choose` decided for one problem: the row, and why the rows before it were passed over."""

    op: str
    engine: str
    row: Row
    passed_over: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        lines = [f"{self.op}: {self.row.algorithm} ({self.engine})"]
        return "\n".join(lines + [f"  not {name}: {reason}" for name, reason in self.passed_over])


@lru_cache(4096)
def _choose(op: str, engine: str, algorithm: str, shape: Shape, dtype: torch.dtype) -> Choice:
    passed_over: list[tuple[str, str]] = []
    rows = [row for row in ROWS if row.op == op and engine in row.engines]
    for row in sorted(rows, key=lambda row: row.algorithm != algorithm):
        reason = row.supports(shape, dtype)
        if reason is None:
            return Choice(op, engine, row, tuple(passed_over))
        passed_over.append((row.algorithm, reason))
    aten = next(row for row in ROWS if row.op == op and "aten" in row.engines)
    return Choice(op, "aten", aten, tuple(passed_over))


@lru_cache(256)
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=4)


_recording: list[Choice] | None = None


def choose(op: str, engine: str, shape: Shape, dtype: torch.dtype) -> Callable[..., None]:
    """The function that computes `op` for this problem in `engine`.

    Falls back to PyTorch's op where no row of the engine supports the problem: with one warning a reason,
    silently, or by raising `UnsupportedError`, as `cnnops.fallback` says.
    """
    choice = _choose(op, engine, settings.algorithm, shape, dtype)
    if choice.engine != engine and settings.fallback != "silent":
        reasons = "; ".join(f"{name}: {reason}" for name, reason in choice.passed_over)
        message = f"{op} in engine {engine!r}: no kernel takes the problem ({reasons})"
        if settings.fallback == "error":
            raise UnsupportedError(message)
        _warn_once(f"{message}; PyTorch's own op runs instead")
    if _recording is not None:
        _recording.append(choice)
    return choice.row.function


def explain(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Choice]:
    """Run ``fn(*args, **kwargs)`` and return what was chosen for every operation, in call order.

    Printing a `Choice` tells the kernel that ran and why those before it in the table did not.
    """
    global _recording
    former, _recording = _recording, []
    try:
        fn(*args, **kwargs)
        return _recording
    finally:
        _recording = former

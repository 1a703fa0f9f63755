"""THE table of kernels: which module computes which operation in which engine, and how one is chosen.

A row's module has a function of the operation's name (signatures below) and
``supports(op, shape, dtype) -> str | None``: None, or the reason why not. Row order is preference, unless
`cnnops.tune` has measured the problem on this device: then the table of `cnnops.tuned` says which row it is.

A module that can compute a problem in several ways may have ``variants(op, shape, *arguments)``, the names
of those that are worth measuring beside its own choice, and ``forced(variant)``, a context in which it takes
one of them.

Every function gets the problem's shape first and its result tensors last, allocated by the caller in the
layout that PyTorch would give, never empty, and fills them:

    conv_fprop(shape, x, w, bias | None, y, epilogue=None)
    conv_dgrad(shape, grad_y, w, bias | None, grad_x, epilogue=None)
                                                   zeros outside of grad_x; the bias, C long, is added:
                                                   transposed convolution. Epilogue: see `cnnops.epilogue`
    conv_wgrad(shape, grad_y, x, grad_w)
    conv_bgrad(shape, grad_y, grad_bias)           shape: of any convolution whose y is as large as grad_y
    conv_fold(shape, padded, grad_x)               grad_x = the sum of `padded`, as large as the padded input,
                                                   over all places that the padding mode reads this one for
    max_pool_fwd(shape, x, y, offsets)             offsets: place in the window, row by row; uint8 or int32.
                                                   Adaptive windows too, here and below
    max_pool_bwd(shape, grad_y, offsets, grad_x)
    max_pool_gather(shape, x, offsets, y)          y = x at the kept places: the backward's own backward
    max_unpool_fwd(shape, x, indices, y)           int64 places in y's planes; of several values with one
                                                   place the last wins, row by row; zero where there is none
    max_unpool_bwd(shape, grad_y, indices, grad_x) grad_x = grad_y at the indices
    avg_pool_fwd(shape, x, y)
    avg_pool_bwd(shape, grad_y, grad_x)
    batch_norm_stats(shape, x, mean, var)          var: biased
    batch_norm_train(shape, x, weight | None, bias | None, residual | None, running_mean | None,
                     running_var | None, momentum, eps, activation, y, mean, rstd)
    batch_norm_infer(shape, x, weight | None, bias | None, residual | None, running_mean, running_var,
                     eps, activation, y)
    batch_norm_bwd(shape, grad_y, x, weight | None, bias | None, residual | None, y | None, mean, rstd,
                   activation, training, grad_x | None, grad_weight | None, grad_bias | None,
                   grad_residual | None)           y: in place of the residual, for an activation whose
                                                   derivative its result tells
    group_norm_fwd(shape, x, weight | None, bias | None, eps, activation, y, mean, rstd)
    group_norm_bwd(shape, grad_y, x, weight | None, bias | None, mean, rstd, activation, grad_x | None,
                   grad_weight | None, grad_bias | None)
    layer_norm_fwd(shape, x, weight | None, bias | None, eps, y, mean, rstd)
    layer_norm_bwd(shape, grad_y, x, weight | None, mean, rstd, grad_x | None, grad_weight | None,
                   grad_bias | None)
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache, wraps
from typing import Any

import torch
from torch import Tensor

from cnnops import tuned
from cnnops.config import Setting, settings, tf32
from cnnops.epilogue import Epilogue as Epilogue
from cnnops.shapes import Shape


class UnsupportedError(RuntimeError):
    """No kernel of the engine takes the problem, and the fallback to PyTorch is switched off."""


def _without_autocast(function: Callable[..., None]) -> Callable[..., None]:
    """`function`, which finds its tensors in the dtypes that they are to be computed in."""

    @wraps(function)
    def run(shape: Shape, x: Tensor, *arguments: Any) -> None:
        device = x.device.type
        if device in ("cpu", "cuda") and torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                function(shape, x, *arguments)
        else:
            function(shape, x, *arguments)

    return run


@dataclass(frozen=True)
class Row:
    """One kernel family's answer to one operation."""

    op: str
    engines: tuple[str, ...]
    module: str
    by_torch: bool = False
    """Whether the module calls operations that autocast would interfere with."""
    tf32: bool = False
    """Whether the module multiplies float32 as TF32, for which torch must give leave."""

    @property
    def algorithm(self) -> str:
        return self.module.rpartition(".")[2]

    def supports(self, shape: Shape, dtype: torch.dtype, tf32: bool = False) -> str | None:
        """None, or why this row cannot take the problem. `tf32`: what `config.tf32` says of it."""
        if self.tf32 and dtype == torch.float32 and not tf32:
            return "float32: expected torch.backends.cudnn.conv.fp32_precision 'tf32', of a CPU mkldnn's"
        reason: str | None = importlib.import_module(self.module).supports(self.op, shape, dtype)
        return reason

    @cached_property
    def function(self) -> Callable[..., None]:
        function: Callable[..., None] = getattr(importlib.import_module(self.module), self.op)
        return _without_autocast(function) if self.by_torch else function

    def variants(self, shape: Shape, *arguments: Any) -> tuple[str, ...]:
        """What else than the module's own choice is worth measuring for a call; () for most modules."""
        variants = getattr(importlib.import_module(self.module), "variants", None)
        return tuple(variants(self.op, shape, *arguments)) if variants else ()

    def describe(self, shape: Shape, *arguments: Any) -> str:
        """How the module would go about a call, in a line; "" of most modules."""
        describe = getattr(importlib.import_module(self.module), "describe", None)
        return str(describe(self.op, shape, *arguments)) if describe else ""

    def forced(self, variant: str) -> AbstractContextManager[None]:
        """A context in which the module takes this variant, or for "" its own choice, whatever tables say."""
        forced = getattr(importlib.import_module(self.module), "forced", None)
        return forced(variant) if forced else nullcontext()


GPU = ("cuda", "emulate")
CONV = ("conv_fprop", "conv_dgrad", "conv_wgrad", "conv_bgrad")
POOL = ("max_pool_fwd", "max_pool_bwd", "max_pool_gather", "avg_pool_fwd", "avg_pool_bwd")
UNPOOL = ("max_unpool_fwd", "max_unpool_bwd")
BATCH_NORM = ("batch_norm_train", "batch_norm_infer", "batch_norm_bwd", "batch_norm_stats")
GROUP_NORM = ("group_norm_fwd", "group_norm_bwd", "layer_norm_fwd", "layer_norm_bwd")

ROWS: tuple[Row, ...] = (
    *(Row(op, GPU, "cnnops.cuda.conv_depthwise") for op in CONV[:3]),
    *(Row(op, GPU, "cnnops.cuda.conv_igemm", tf32=True) for op in CONV[:3]),
    *(Row(op, GPU, "cnnops.cuda.conv_direct") for op in CONV),
    *(Row(op, GPU, "cnnops.cuda.conv_im2col", by_torch=True) for op in CONV[:3]),
    Row("conv_fold", GPU, "cnnops.cuda.conv_fold"),
    *(Row(op, GPU, "cnnops.cuda.pool") for op in POOL),
    *(Row(op, GPU, "cnnops.cuda.unpool") for op in UNPOOL),
    *(Row(op, GPU, "cnnops.cuda.batch_norm") for op in BATCH_NORM),
    *(Row(op, GPU, "cnnops.cuda.group_norm") for op in GROUP_NORM),
    *(Row(op, ("cpu",), "cnnops.cpu.conv") for op in (*CONV, "conv_fold")),
    *(Row(op, ("cpu",), "cnnops.cpu.pool") for op in POOL + UNPOOL),
    *(Row(op, ("cpu",), "cnnops.cpu.norm") for op in BATCH_NORM),
    *(Row(op, ("cpu",), "cnnops.cpu.group_norm") for op in GROUP_NORM),
    *(
        Row(op, ("aten",), "cnnops.aten", by_torch=True)
        for op in (*CONV, "conv_fold", *POOL, *UNPOOL, *BATCH_NORM, *GROUP_NORM)
    ),
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
    """The engine in force for tensors on `device`. Where no engine was chosen by name and `cuda` cannot work,
    for want of CuPy or by a broken one, that is "aten" for a GPU's tensors, which is said once.

    Raises RuntimeError when the engine chosen by name cannot take tensors of that device, UnsupportedError
    when `cuda` cannot work and the fallback to PyTorch is switched off.
    """
    chosen, kind = settings.engine, device.type
    if not chosen:
        if kind == "cuda" and not torch.compiler.is_compiling():
            return _engine_of_gpus()
        return kind if kind in ("cuda", "cpu") else "aten"
    if chosen != "aten" and kind != (needs := "cuda" if chosen == "cuda" else "cpu"):
        raise RuntimeError(f"engine {chosen!r}: expected tensors on {needs}, got {device}")
    return chosen


@lru_cache(None)
def _engine_of_gpus() -> str:
    from cnnops.cuda import jit

    reason = jit.unavailable() if torch.cuda.is_available() else None
    if reason is None:
        return "cuda"
    message = f"engine 'cuda' does not work here: {reason}"
    if settings.fallback == "error":
        raise UnsupportedError(message)
    if settings.fallback != "silent":
        _warn_once(f"{message}; PyTorch's own ops run instead. Tensors on a CPU keep engine 'cpu'")
    return "aten"


@dataclass(frozen=True)
class Choice:
    """What `choose` decided for one problem: the row, and why the rows before it were passed over.

    `variant` and `measured` are filled in where a table of `cnnops.tuned` decided; `detail` by `explain`,
    where the row has more to tell.
    """

    op: str
    engine: str
    row: Row
    passed_over: tuple[tuple[str, str], ...] = ()
    variant: str = ""
    measured: str = ""
    detail: str = ""
    function: Callable[..., None] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # A plain attribute: `choose` reads it at every call, and a cached property takes four times as long.
        object.__setattr__(self, "function", self.row.function)

    def settled(self, arguments: Sequence[Any]) -> Choice:
        """The choice for a call with these arguments."""
        return self

    def __str__(self) -> str:
        lines = [f"{self.op}: {tuned.candidate(self.row.algorithm, self.variant)} ({self.engine})"]
        lines += [f"  measured on {self.measured}"] if self.measured else []
        lines += [f"  {self.detail}"] if self.detail else []
        return "\n".join(lines + [f"  not {name}: {reason}" for name, reason in self.passed_over])


@dataclass(frozen=True)
class _Measured(Choice):
    """The choice for a problem that a table knows, made when the call's tensors are there.

    Which row is the fastest depends on how tensors lie, too, but `choose` knows sizes only. Where all entries
    of the problem agree on the row that would run anyway, its function is called as ever. Otherwise what is
    called looks at the strides first: that costs a microsecond, of problems in a table alone.
    """

    shape: Shape = field(kw_only=True)
    dtype: torch.dtype = field(kw_only=True)
    rows: tuple[Row, ...] = field(kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        layouts = tuned.layouts(self.op, self.engine, self.shape, self.dtype)
        if any(self._in(layout).row is not self.row for layout in layouts):
            object.__setattr__(self, "function", self._run)

    @cached_property
    def _by_strides(self) -> dict[tuple[Any, ...], Callable[..., None]]:
        return {}

    def _run(self, shape: Shape, *arguments: Any) -> None:
        strides = tuple(
            [a.stride() if isinstance(a, Tensor) else type(a) is str and a for a in arguments]
        )
        function = self._by_strides.get(strides)
        if function is None:
            function = self._by_strides[strides] = self.settled(arguments).row.function
        function(shape, *arguments)

    def settled(self, arguments: Sequence[Any]) -> Choice:
        return self._in(tuned.layout_of(arguments))

    def _in(self, layout: str) -> Choice:
        default = Choice(self.op, self.engine, self.row, self.passed_over)
        entry = tuned.find(self.op, self.engine, self.shape, self.dtype, layout)
        if entry is None:
            return default
        rows = {row.algorithm: row for row in self.rows}
        aten = tuned.aten_candidate(self.op, self.engine, self.dtype)

        def allowed(name: str) -> bool:
            algorithm = name.partition(":")[0]
            return algorithm in rows and (algorithm != "aten" or name == aten)

        best = entry.best(allowed)
        if best is None:
            return default
        algorithm, variant = best
        device = tuned.device_name(self.engine)
        at = entry.problem.partition(" ")[0]
        where = "" if at == f"N={self.shape.N}" else f" (at {at})"
        measured = f"{device}, {entry.date[:10]}: {entry.by_algorithm()}{where}"
        engine = "aten" if algorithm == "aten" else self.engine
        return Choice(self.op, engine, rows[algorithm], (), variant, measured)


@tuned.cached
def _choose(
    op: str,
    engine: str,
    algorithm: str,
    shape: Shape,
    dtype: torch.dtype,
    policy: str = "own",
    tf32: bool = False,
) -> Choice:
    passed_over: list[tuple[str, str]] = []
    supported: list[Row] = []
    rows = [row for row in ROWS if row.op == op and engine in row.engines]
    for row in sorted(rows, key=lambda row: row.algorithm != algorithm):
        reason = row.supports(shape, dtype, tf32)
        if reason is None:
            supported.append(row)
        elif not supported:
            passed_over.append((row.algorithm, reason))
    aten = next(row for row in ROWS if row.op == op and "aten" in row.engines)
    if not supported:
        return Choice(op, "aten", aten, tuple(passed_over))
    row = supported[0]
    if engine == "aten" or not tuned.layouts(op, engine, shape, dtype):
        return Choice(op, engine, row, tuple(passed_over))
    if row.algorithm == algorithm:  # asked for by name
        supported = [row]
    elif policy == "auto" and engine != "emulate":
        supported.append(aten)
    return _Measured(
        op, engine, row, tuple(passed_over), shape=shape, dtype=dtype, rows=tuple(supported)
    )


def own_choice(
    op: str, engine: str, shape: Shape, dtype: torch.dtype, tf32: bool = False
) -> Choice:
    """Which of this package's kernels runs for this problem in `engine`, or "aten" where none takes it.
    `tf32`: whether float32 may be multiplied as TF32."""
    return _choose(op, engine, settings.algorithm, shape, dtype, "own", tf32)


@lru_cache(256)
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=4)


Observer = Callable[[Choice, str, Shape, torch.dtype], Callable[..., None]]
_observer: Observer | None = None


def choose(op: str, engine: str, shape: Shape, dtype: torch.dtype) -> Callable[..., None]:
    """The function that computes `op` for this problem in `engine`.

    Falls back to PyTorch's op where no row of the engine supports the problem: with one warning a reason,
    silently, or by raising `UnsupportedError`, as `cnnops.fallback` says.
    """
    choice = _choose(
        op, engine, settings.algorithm, shape, dtype, settings.policy, tf32(engine, dtype)
    )
    if choice.engine != engine and settings.fallback != "silent":
        reasons = "; ".join(f"{name}: {reason}" for name, reason in choice.passed_over)
        message = f"{op} in engine {engine!r}: no kernel takes the problem ({reasons})"
        if settings.fallback == "error":
            raise UnsupportedError(message)
        _warn_once(f"{message}; PyTorch's own op runs instead")
    return choice.function if _observer is None else _observer(choice, engine, shape, dtype)


def is_unobserved() -> bool:
    """Whether this is outside of `observed`."""
    return _observer is None


@contextmanager
def observed(observer: Observer) -> Iterator[None]:
    """Within the block, `choose` returns what ``observer(choice, engine, shape, dtype)`` does."""
    global _observer
    former, _observer = _observer, observer
    try:
        yield
    finally:
        _observer = former


def explain(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Choice]:
    """Run ``fn(*args, **kwargs)`` and return what was chosen for every operation, in call order.

    Printing a `Choice` tells the kernel that ran and why: what was measured, or why those before it in the
    table of kernels did not run.
    """
    choices: list[Choice] = []

    def observe(choice: Choice, *_: Any) -> Callable[..., None]:
        at = len(choices)
        choices.append(choice)

        def run(shape: Shape, *arguments: Any) -> None:
            settled = choice.settled(arguments)
            detail = settled.row.describe(shape, *arguments)
            choices[at] = replace(settled, detail=detail) if detail else settled
            choice.function(shape, *arguments)

        return run

    with observed(observe):
        fn(*args, **kwargs)
    return choices

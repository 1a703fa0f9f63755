"""``cnnops check FILE.cu``: does a kernel compile for GPUs, and is it right? No GPU is needed.

NVRTC compiles the file for each architecture and tells registers, spills and shared memory. The emulator runs
it on small problems under three thread orders, checks every memory access, and the results are compared.

For a file of ``kernels/`` the problems are in this module: the operations of `cnnops.functional` that the
registry's rows give to its launcher, forward and gradients, against PyTorch in float64. For any other file
they are in a Python file beside it, ``<name>_cases.py`` (or ``--cases FILE.py``), whose function ``launches``
yields, for each launch, ``(launch, inputs, outputs, updates, expected, tolerance)``: the `Launch`, made by
`cnnops.cuda.kernel.launch_of`; its CPU tensors, in the order of the launch's names; what the outputs and then
the updates must hold (None: anything), and the largest ``||result - expected|| / ||expected||``.

A complete example. ``scale.cu``::

    #include "common.cuh"

    struct Params { FastDiv row; int n; };
    static_assert(sizeof(Params) == PARAMS_BYTES, "scale_cases.py must mirror this struct");

    // y[r, c] = x[r, c] * w[r] over n elements
    extern "C" __global__ void __launch_bounds__(THREADS)
    scale(const ELEMENT* __restrict__ x, const ELEMENT* __restrict__ w, ELEMENT* __restrict__ y, Params p) {
      const int i = blockIdx.x * THREADS + threadIdx.x;
      if (i < p.n) y[i] = x[i] * w[p.row.div(i)];
    }

and ``scale_cases.py``, which runs it on 5 x 70 elements of two types::

    import ctypes
    from pathlib import Path

    import torch

    from cnnops.cuda.kernel import ELEMENT, FastDiv, launch_of

    class Params(ctypes.Structure):
        _fields_ = [("row", FastDiv), ("n", ctypes.c_int)]

    def launches():
        for dtype in (torch.float32, torch.float64):
            x, w = torch.randn(5, 70, dtype=dtype), torch.randn(5, dtype=dtype)
            launch = launch_of(
                str(Path(__file__).with_name("scale.cu")),
                "scale",
                {"ELEMENT": ELEMENT[dtype], "THREADS": 128},
                Params(FastDiv(70), x.numel()),
                grid=(-(-x.numel() // 128),),
                block=(128,),
                inputs=("x", "w"),
                outputs=("y",),
            )
            yield launch, (x, w), (torch.empty_like(x),), (), (x * w[:, None],), 0.0
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import cnnops
from cnnops import functional as C
from cnnops import registry
from cnnops.cuda import emulate, jit
from cnnops.cuda.kernel import Kernel, Launch, kernels_dir
from cnnops.ops.conv import conv
from cnnops.ops.norm import batch_norm_stats
from cnnops.shapes import PADDING_MODES

ARCHITECTURES = ("80", "90a")


# ---- the report ------------------------------------------------------------------------------------------


@dataclass
class Row:
    """What was found out about one entry under one set of constants."""

    kernel: Kernel
    launches: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    resources: dict[str, jit.Resources] = field(default_factory=dict)
    """By architecture."""


@dataclass
class Report:
    """Rows in the order of their first launch, and everything that was wrong, each error in full."""

    file: Path
    schedules: tuple[str, ...]
    rows: dict[Kernel, Row] = field(default_factory=dict)
    checks: int = 0
    """Results that were compared."""
    errors: list[str] = field(default_factory=list)
    idle: set[str] = field(default_factory=set)
    """Entries of the file, as far as they were compiled, that no case launches."""
    nvrtc_missing: str = ""
    """Why nothing was compiled for GPUs; empty where it was."""

    @property
    def passed(self) -> bool:
        return not self.errors


# ---- comparing -------------------------------------------------------------------------------------------


def _compare(what: str, got: Tensor, expected: Tensor, tolerance: float) -> str | None:
    """None, or how far off `got` is, norm-relative."""
    if got.shape != expected.shape:
        return f"{what}: expected size {tuple(expected.shape)}, got {tuple(got.shape)}"
    a, b = got.detach().double(), expected.detach().double()
    wild = ~b.isfinite()
    if not torch.equal(a[wild].nan_to_num(), b[wild].nan_to_num()):
        return f"{what}: expected NaN and infinity in the same places, got other ones"
    a, b = a.masked_fill(wild, 0), b.masked_fill(wild, 0)
    error, scale = float((a - b).norm()), float(b.norm())
    if error <= tolerance * scale:  # NaN in `a` fails
        return None
    first = (a != b).nonzero()[0].tolist()
    return (
        f"{what}: expected at most {tolerance:.0e} from the reference, got {error / (scale or 1):.1e} "
        f"(first at {first}: {got[tuple(first)].item():.7g} instead of {b[tuple(first)].item():.7g})"
    )


@contextmanager
def _watched(report: Report, source: str) -> Iterator[None]:
    """Within the context, the launches from `source` are counted in the report's rows."""
    execute = emulate.execute

    def counting(plan: Launch, tensors: Sequence[Tensor | None]) -> None:
        execute(plan, tensors)
        if plan.kernel.source == source:
            row = report.rows.setdefault(plan.kernel, Row(plan.kernel))
            counters = emulate.last_counters()
            row.launches += 1
            row.bytes_read += counters.global_bytes_read
            row.bytes_written += counters.global_bytes_written

    emulate.execute = counting
    try:
        yield
    finally:
        emulate.execute = execute


# ---- the problems of a file of kernels/ ------------------------------------------------------------------


@dataclass(frozen=True)
class _Problem:
    """One call: `ours` and `theirs` of tensors of these sizes, dtype and layout, with their gradients."""

    name: str
    ours: Callable[..., Tensor]
    theirs: Callable[..., Tensor]
    sizes: tuple[tuple[int, ...], ...]
    dtype: torch.dtype = torch.float32
    channels_last: bool = False

    def __str__(self) -> str:
        sizes = ", ".join("x".join(map(str, size)) for size in self.sizes)
        last = ", channels last" if self.channels_last else ""
        return f"{self.name} of {sizes} ({str(self.dtype).removeprefix('torch.')}{last})"


_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_TOLERANCE = {torch.float64: 1e-13, torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""Largest norm-relative distance from PyTorch in float64, for the same rounded inputs."""


def _named(name: str, **options: Any) -> tuple[str, Callable[..., Tensor], Callable[..., Tensor]]:
    """An operation that has one name here and in torch.nn.functional, with its options."""
    told = ", ".join(f"{key}={value}" for key, value in options.items())
    ours, theirs = getattr(C, name), getattr(F, name)
    return f"{name}({told})", lambda *t: ours(*t, **options), lambda *t: theirs(*t, **options)


def _convolutions() -> Iterator[_Problem]:
    plain = _named("conv2d", padding=1)
    small, bias = (2, 3, 9, 8), (4,)
    for dtype in _DTYPES:
        yield _Problem(*plain, (small, (4, 3, 3, 3), bias), dtype)
    strided = _named("conv2d", stride=2, padding=2, dilation=2)
    yield _Problem(*strided, ((2, 8, 11, 9), (12, 8, 3, 3)))
    yield _Problem(*strided, ((2, 8, 11, 9), (12, 8, 3, 3), (12,)), torch.float16, True)
    yield _Problem(*_named("conv2d", groups=7, padding=1), ((2, 7, 8, 7), (7, 1, 3, 3), (7,)))
    yield _Problem(*_named("conv2d"), ((2, 33, 5, 7), (17, 33, 1, 1), (17,)))
    transposed = _named("conv_transpose2d", stride=2, padding=1, output_padding=1)
    yield _Problem(*transposed, ((2, 3, 5, 4), (3, 4, 3, 3), (4,)))
    yield _Problem(*_named("conv1d", stride=2), ((2, 3, 17), (4, 3, 5), (4,)))
    yield _Problem(*_named("conv3d", padding=1), ((1, 3, 4, 5, 6), (4, 3, 3, 3, 3), (4,)))
    wide = ((2, 64, 9, 8), (64, 64, 3, 3), (64,))
    for dtype in _DTYPES[2:]:
        yield _Problem(*plain, wide, dtype, True)
    strided = _named("conv2d", stride=2)
    yield _Problem(*strided, ((2, 64, 9, 8), (64, 64, 3, 3)), torch.bfloat16, True)
    yield from _finished()
    yield from _folded()


def _finished() -> Iterator[_Problem]:
    """Convolutions whose results meet something on their way out."""

    def ours(x: Tensor, w: Tensor, bias: Tensor, scale: Tensor, residual: Tensor) -> Tensor:
        return C.conv_act(x, w, bias, padding=1, scale=scale, residual=residual, activation="tanh")

    def theirs(x: Tensor, w: Tensor, bias: Tensor, scale: Tensor, residual: Tensor) -> Tensor:
        z = F.conv2d(x, w, padding=1) * scale.view(-1, 1, 1) + bias.view(-1, 1, 1)
        return torch.tanh(z + residual)

    def normalised(x: Tensor, w: Tensor) -> Tensor:
        return C.conv_batch_norm_act(x, w, None, None, None, training=True, activation="none")

    def by_torch(x: Tensor, w: Tensor) -> Tensor:
        return F.batch_norm(F.conv2d(x, w), None, None, training=True)

    size, filters, y = (2, 8, 9, 8), (16, 8, 3, 3), (2, 16, 9, 8)
    for last in (False, True):
        sizes = (size, filters, (16,), (16,), y)
        yield _Problem("conv_act(tanh)", ours, theirs, sizes, channels_last=last)
        yield _Problem(
            "conv_batch_norm_act()", normalised, by_torch, (size, filters), channels_last=last
        )


def _folded() -> Iterator[_Problem]:
    for mode in PADDING_MODES[1:]:

        def ours(x: Tensor, w: Tensor, mode: str = mode) -> Tensor:
            return conv(x, w, padding=2, padding_mode=mode)

        def theirs(x: Tensor, w: Tensor, mode: str = mode) -> Tensor:
            return F.conv2d(F.pad(x, [2] * 4, mode), w)

        for channels, dtype, last in ((3, torch.float32, False), (8, torch.float16, True)):
            sizes = ((2, channels, 9, 8), (4, channels, 3, 3))
            yield _Problem(f"conv2d(padding_mode={mode})", ours, theirs, sizes, dtype, last)


def _poolings() -> Iterator[_Problem]:
    overlapping: dict[str, Any] = {"kernel_size": 3, "stride": 2, "padding": 1}
    for name in ("max_pool2d", "avg_pool2d"):
        for dtype in _DTYPES:
            yield _Problem(*_named(name, **overlapping), ((2, 3, 9, 8),), dtype)
        yield _Problem(*_named(name, kernel_size=2), ((2, 8, 8, 6),), torch.float32, True)
        yield _Problem(*_named(name, kernel_size=7), ((2, 3, 7, 7),))
    for size in (1, (3, 4)):
        for name in ("adaptive_avg_pool2d", "adaptive_max_pool2d"):
            yield _Problem(*_named(name, output_size=size), ((2, 5, 7, 11),))


def _unpoolings() -> Iterator[_Problem]:
    for dims, last in ((2, False), (2, True), (3, False)):
        size = (2, 8, *(4,) * dims)
        plane = 8**dims
        places = torch.arange(4**dims).mul(7).remainder(plane).view(1, 1, *size[2:]).expand(size)
        named = _named(f"max_unpool{dims}d", indices=places.contiguous(), kernel_size=2)
        for dtype in _DTYPES:
            yield _Problem(f"max_unpool{dims}d(kernel_size=2)", *named[1:], (size,), dtype, last)


def _norms() -> Iterator[_Problem]:
    def statistics(x: Tensor) -> dict[str, Any]:
        """Running mean and variance, of the type that goes with input `x`."""
        dtype = torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype
        channels = torch.arange(x.shape[1], dtype=dtype)
        return {"running_mean": channels / 8, "running_var": channels / 4 + 1}

    def ours(training: bool) -> Callable[..., Tensor]:
        def function(x: Tensor, w: Tensor, b: Tensor, residual: Tensor) -> Tensor:
            w, b = (t.to(statistics(x)["running_mean"].dtype) for t in (w, b))
            return C.batch_norm_act(
                x, weight=w, bias=b, training=training, residual=residual, activation="relu", **statistics(x)
            )  # fmt: skip

        return function

    def theirs(training: bool) -> Callable[..., Tensor]:
        def function(x: Tensor, w: Tensor, b: Tensor, residual: Tensor) -> Tensor:
            return F.relu(
                F.batch_norm(x, weight=w, bias=b, training=training, **statistics(x)) + residual
            )

        return function

    for training in (True, False):
        named = f"batch_norm_act(training={training})", ours(training), theirs(training)
        for dtype in _DTYPES:
            yield _Problem(*named, ((4, 3, 6, 5), (3,), (3,), (4, 3, 6, 5)), dtype)
        size = (3, 8, 6, 5)
        yield _Problem(*named, (size, (8,), (8,), size), torch.float32, True)
    for last in (False, True):
        yield _Problem(
            "batch_norm_stats()", lambda x: torch.stack(batch_norm_stats(x, "emulate")[::-1]),
            lambda x: torch.stack(torch.var_mean(x, (0, 2, 3), correction=0)).detach(),
            ((4, 8, 6, 5),), channels_last=last,
        )  # fmt: skip
    size = (2, 2, 67, 65)  # several blocks a channel
    yield _Problem(
        "batch_norm_act(training=True)", ours(True), theirs(True), (size, (2,), (2,), size)
    )


def _group_norms() -> Iterator[_Problem]:
    def group(home: Any) -> Callable[..., Tensor]:
        return lambda x, w, b: home.group_norm(x, 2, w, b)

    def layer(home: Any) -> Callable[..., Tensor]:
        return lambda x, *parameters: home.layer_norm(x, x.shape[-1:], *parameters)

    groups = "group_norm(num_groups=2)", group(C), group(F)
    layers = "layer_norm()", layer(C), layer(F)
    for dtype in _DTYPES:
        yield _Problem(*groups, ((3, 8, 6, 5), (8,), (8,)), dtype)
        yield _Problem(*layers, ((3, 4, 5, 8), (8,), (8,)), dtype)
    yield _Problem(*groups, ((3, 8, 6, 5), (8,), (8,)), torch.float32, True)
    yield _Problem(*groups, ((1, 4, 67, 65), (4,), (4,)))  # a group in a whole block
    yield _Problem(*_named("instance_norm"), ((2, 3, 9, 7),))
    yield _Problem(*layers, ((3, 5000),))


_PROBLEMS = {
    registry.CONV: _convolutions,
    ("conv_fold",): _folded,
    registry.POOL: _poolings,
    registry.UNPOOL: _unpoolings,
    registry.BATCH_NORM: _norms,
    registry.GROUP_NORM: _group_norms,
}


def _results(
    function: Callable[..., Tensor], tensors: Sequence[Tensor], twice: bool
) -> dict[str, Tensor]:
    """The output, every gradient, and with `twice` the second derivative that max pooling's gather gives."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    y = function(*leaves)
    if not y.requires_grad:
        return {"output": y}
    steps = torch.arange(y.numel()).remainder(7).view(y.shape) - 3  # exact in every type
    grad = torch.empty_like(y).copy_(steps).requires_grad_(twice)
    gradients = torch.autograd.grad(y, leaves, grad, create_graph=twice)
    found = {"output": y}
    found |= {f"gradient of tensor {i}": g for i, g in enumerate(gradients)}
    if twice:
        (found["second gradient"],) = torch.autograd.grad(gradients[0], grad, leaves[0].detach())
    return found


def _run_problem(problem: _Problem, report: Report) -> None:
    generator = torch.Generator().manual_seed(0)
    form = torch.channels_last if problem.channels_last else torch.contiguous_format
    tensors = [
        torch.randn(size, generator=generator, dtype=torch.float64).to(problem.dtype)
        for size in problem.sizes
    ]
    tensors = [t.contiguous(memory_format=form) if t.dim() == 4 else t for t in tensors]
    twice = "max_pool" in problem.name
    ours = _results(problem.ours, tensors, twice)
    theirs = _results(problem.theirs, [t.double() for t in tensors], twice)
    for name, got in ours.items():
        wrong = _compare(f"{problem}: {name}", got, theirs[name], _TOLERANCE[problem.dtype])
        report.checks += 1
        report.errors += [] if wrong is None else [wrong]


_FORMS = {
    "conv_igemm_planes": ("conv_igemm", "planes8x16x16"),
    "conv_igemm_sm90": ("conv_igemm", "wgmma128x16"),
}
"""Files that a row's module chooses for some problems: the row's algorithm, and a variant that is theirs."""


def _run_own(file: Path, report: Report) -> None:
    """Run the problems of the operations whose rows name the launcher of this file."""
    algorithm, variant = _FORMS.get(file.stem, (file.stem, None))
    rows = [r for r in registry.ROWS if r.engines == registry.GPU and r.algorithm == algorithm]
    with ExitStack() as stack:
        for context in (
            cnnops.engine("emulate"),
            cnnops.algorithm(algorithm),
            cnnops.fallback("error"),
        ):
            stack.enter_context(context)
        if variant is not None:
            stack.enter_context(rows[0].forced(variant))
        for family, problems in _PROBLEMS.items():
            if not any(row.op in family for row in rows):
                continue
            for problem in problems():
                try:
                    _run_problem(problem, report)
                except (
                    emulate.KernelError,
                    emulate.CompileError,
                    registry.UnsupportedError,
                ) as error:
                    report.errors.append(f"{problem}: {error}")


# ---- the launches of any other file ----------------------------------------------------------------------


def _launches(cases: Path) -> Iterator[tuple[Any, ...]]:
    """What ``launches()`` of the Python file yields. Raises ValueError where that is not to be had."""
    if not cases.is_file():
        raise ValueError(
            f"{cases}: expected a Python file with launches() (see cnnops.check), got none"
        )
    spec = importlib.util.spec_from_file_location(cases.stem, cases)
    if spec is None or spec.loader is None:
        raise ValueError(f"{cases}: expected a Python file, got {cases.suffix or 'no suffix'}")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        yield from module.launches()
    except Exception as error:
        raise ValueError(
            f"{cases}: expected a function launches() that runs, got {type(error).__name__}: {error}"
        ) from error


def _run_foreign(file: Path, cases: Path, report: Report) -> None:
    for given in _launches(cases):
        if len(given) != 6 or not isinstance(given[0], Launch):
            raise ValueError(
                f"{cases}: launches(): expected (launch, inputs, outputs, updates, expected, tolerance), "
                f"got {len(given)} values"
            )
        plan, inputs, outputs, updates, expected, tolerance = given
        results = [*outputs, *updates]
        if len(expected) != len(results):
            raise ValueError(
                f"{cases}: launches(): expected {len(results)} tensors to compare outputs and updates with, "
                f"got {len(expected)}"
            )
        if Path(plan.kernel.source).resolve() != file:
            raise ValueError(f"{cases}: launches(): expected launches of {file}, got {plan.kernel}")
        try:
            emulate.execute(plan, [*inputs, *results])
        except (emulate.KernelError, emulate.CompileError) as error:
            report.errors.append(str(error))
            continue
        for name, got, wanted in zip(plan.names[len(inputs) :], results, expected, strict=True):
            if got is not None and wanted is not None:
                wrong = _compare(f"{plan.kernel}: {name}", got, wanted, tolerance)
                report.checks += 1
                report.errors += [] if wrong is None else [wrong]
    if not report.checks and not report.errors:
        raise ValueError(f"{cases}: launches(): expected a launch of {file}, got none")


# ---- for GPUs --------------------------------------------------------------------------------------------


def _compile(report: Report, architectures: Sequence[str]) -> None:
    """Registers and memory of every row's kernel, for every architecture, or why there are none."""
    try:
        jit.nvrtc_version()
    except RuntimeError as error:
        report.nvrtc_missing = str(error)
        return
    units: dict[tuple[object, ...], list[Row]] = {}
    for row in report.rows.values():
        units.setdefault((row.kernel.source, row.kernel.constants), []).append(row)
    launched = {row.kernel.entry for row in report.rows.values()}
    for rows in units.values():
        kernel = rows[0].kernel
        for arch in architectures:
            if not _claimed(kernel.source, [row.kernel.entry for row in rows], arch):
                continue
            try:
                _, log = jit.compile_cubin(kernel.source, kernel.constants, arch)
            except emulate.CompileError as error:
                report.errors.append(str(error))
                continue
            by_entry = {r.entry: r for r in jit.resources(log)}
            report.idle |= set(by_entry) - launched
            for row in rows:
                row.resources[arch] = by_entry[row.kernel.entry]


def _claimed(source: str, entries: Sequence[str], arch: str) -> bool:
    """Whether the launcher of a file of ``kernels/`` launches one of these entries on ``sm_<arch>``, which it
    says where that is not everywhere.
    """
    name = f"cnnops.cuda.{Path(source).stem}"
    if Path(source).is_absolute() or importlib.util.find_spec(name) is None:
        return True
    stated = getattr(importlib.import_module(name), "ARCHITECTURES", (arch,))
    if isinstance(stated, Mapping):
        return any(arch in stated.get(entry, (arch,)) for entry in entries)
    return arch in stated


def run(
    file: Path | str,
    cases: Path | str | None = None,
    architectures: Sequence[str] = ARCHITECTURES,
    schedules: str = "all",
) -> Report:
    """Check the kernels of `file`, a ``.cu`` file, as this module's docstring describes.

    `cases` is the Python file with ``launches()``, by default beside a `file` that is not of ``kernels/``;
    `architectures` are names after ``sm_``; `schedules` is a thread order of `cnnops.cuda.emulate.schedule`.
    What is wrong with the kernels is in the report. Raises ValueError for arguments and cases that cannot be
    used, and RuntimeError where kernels cannot be emulated.
    """
    path = Path(file).resolve()
    if path.suffix != ".cu":
        raise ValueError(
            f"{file}: expected a .cu file, got {path.suffix or 'a name without suffix'}"
        )
    if not path.is_file():
        raise ValueError(f"{file}: expected a file, got {'a folder' if path.is_dir() else 'none'}")
    for arch in architectures:
        if not re.fullmatch(r"\d{2,3}[af]?", arch):
            raise ValueError(f"architecture: expected a number such as 80 or 90a, got {arch!r}")
    reason = emulate.available()
    if reason is not None:
        raise RuntimeError(
            f"the emulator: expected a C++ compiler, got none that serves ({reason})"
        )
    own = path.parent == kernels_dir() and cases is None
    orders = emulate.SCHEDULES if schedules == "all" else (schedules,)
    report = Report(path, orders)
    with emulate.schedule(schedules), _watched(report, path.name if own else str(path)):
        if own:
            _run_own(path, report)
        else:
            beside = path.with_name(f"{path.stem}_cases.py")
            _run_foreign(path, Path(cases) if cases is not None else beside, report)
    _compile(report, architectures)
    return report


# ---- the command -----------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``cnnops check``."""
    parser.add_argument("file", type=Path, metavar="FILE.cu", help="the kernel file")
    parser.add_argument(
        "--cases",
        type=Path,
        metavar="FILE.py",
        help="Python file with launches() (default: <name>_cases.py beside FILE.cu)",
    )
    parser.add_argument(
        "--arch",
        default=",".join(ARCHITECTURES),
        help="architectures to compile for, such as 80,90a (default: %(default)s)",
    )
    parser.add_argument(
        "--schedule",
        default="all",
        choices=(*emulate.SCHEDULES, "all"),
        help="thread orders to run under (default: %(default)s)",
    )


def _each(row: Row, architectures: Sequence[str], of: Callable[[jit.Resources], int]) -> str:
    """One number where the architectures agree, else one for each; "-" where the entry is not for one."""
    found = row.resources
    values = [of(found[arch]) if arch in found else "-" for arch in architectures]
    return "/".join(map(str, dict.fromkeys(values) if len(set(values)) == 1 else values))


def _print(report: Report) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(markup=False, highlight=False, emoji=False, soft_wrap=True)
    settings = [dict(row.kernel.constants) for row in report.rows.values()]
    shared = [
        item for item in (settings or [{}])[0].items() if all(item in s.items() for s in settings)
    ]
    if shared:
        console.print("all with", *(f"{name}={value}" for name, value in shared))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    architectures = list(dict.fromkeys(a for row in report.rows.values() for a in row.resources))
    titles = ("", "entry", "registers", "spilled", "shared", "launches", "read", "written")
    for title in titles:
        table.add_column(title, justify="left" if title == "entry" else "right", no_wrap=True)
    for i, row in enumerate(report.rows.values(), 1):
        own = [f"{n}={v}" for n, v in row.kernel.constants if (n, v) not in shared]
        if own:
            console.print(f"{i:3}", *own)
        table.add_row(
            str(i), row.kernel.entry, _each(row, architectures, lambda r: r.registers),
            _each(row, architectures, lambda r: r.spill_store_bytes + r.spill_load_bytes + r.stack_bytes),
            _each(row, architectures, lambda r: r.shared_bytes), str(row.launches), str(row.bytes_read),
            str(row.bytes_written),
        )  # fmt: skip
    console.print(table, soft_wrap=False)
    if architectures:
        console.print(f"registers, spilled and shared bytes: of sm_{'/'.join(architectures)}")
    console.print("read and written: global bytes of all launches")
    if report.nvrtc_missing:
        console.print(f"registers are unknown: {report.nvrtc_missing}")
    if report.idle:
        console.print("launched by no case:", ", ".join(sorted(report.idle)))
    for error in report.errors:
        console.print(f"error: {error}")
    launches = sum(row.launches for row in report.rows.values())
    console.print(
        f"{report.file.name}: {launches} launches under {', '.join(report.schedules)}; "
        f"{report.checks} results compared; {len(report.errors)} errors"
    )


def main(options: argparse.Namespace) -> int:
    """Run ``cnnops check``: 0 where all is well, 1 where a kernel is wrong, 2 for bad input."""
    try:
        report = run(options.file, options.cases, options.arch.split(","), options.schedule)
    except (ValueError, RuntimeError) as error:
        print(f"cnnops check: {error}", file=sys.stderr)
        return 2
    _print(report)
    return 0 if report.passed else 1

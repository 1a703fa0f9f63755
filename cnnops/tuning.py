"""`cnnops.tune`: measure which kernel is the fastest at each problem of a model, on this device, once.

The model runs once, forward and backward, while `collect` notes every problem that a kernel is asked for.
Each is then posed again, on random tensors of the same sizes and strides, to all that can answer:

    every row of the engine that supports it     "conv_direct", "conv_im2col"
    the variants that a row's launcher offers    "conv_direct:128x64x8/4"
    PyTorch's own op                             "aten"; on a GPU also with cudnn.benchmark, "aten:benchmark"

Those that agree with PyTorch in float64 are timed, in turn. `cnnops.tuned` keeps the winners: later processes
use them from their first call on. Nothing is ever timed by an ordinary call.
"""

from __future__ import annotations

import argparse
import gc
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from cnnops import registry, tuned
from cnnops.config import settings, tf32
from cnnops.registry import CONV, ROWS, Choice, Row
from cnnops.shapes import Shape

Call = Callable[[], None]
Measure = Callable[[Mapping[str, Call], float], dict[str, float]]
"""Median seconds of each call, all taken in turn within about so many seconds."""

SECONDS = 0.5
"""What one problem's timing takes unless `tune` is told otherwise."""
LEAST = 5
"""Rounds that every candidate gets that is not hopeless."""
HOPELESS = 2.0
"""After two rounds, a candidate that takes this many times as long as the best gets no more."""

LIMIT = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""Largest ``||result - reference|| / ||reference||`` of a candidate."""
TF32_LIMIT = 1e-3
"""The same for float32 where torch lets it be multiplied as TF32."""
KINK_LIMIT = 2e-3
"""The same for the backward of an activation: near its kink an element's gradient may fall on either side."""


# ---- collecting ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Like:
    """A tensor's size, strides, dtype and device; of integers (places in pooling windows) the values too."""

    size: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    values: Tensor | None

    @classmethod
    def of(cls, t: Tensor) -> _Like:
        values = None if t.is_floating_point() else t.detach().clone()
        return cls(tuple(t.shape), t.stride(), t.dtype, t.device, values)

    def make(self, generator: torch.Generator) -> Tensor:
        """Random numbers: standard normal, and 0.5 to 1.5 for what is there once a channel, as variances."""
        if self.values is not None:
            return self.values.clone()
        length = sum((n - 1) * s for n, s in zip(self.size, self.strides, strict=True)) + 1
        storage = torch.empty(length, dtype=self.dtype, device=self.device)
        if len(self.size) > 1:
            storage.normal_(generator=generator)
        else:
            storage.uniform_(0.5, 1.5, generator=generator)
        return storage.as_strided(self.size, self.strides)


@dataclass(frozen=True)
class Problem:
    """What a kernel was asked for, and how often. `arguments` are its function's, tensors as `_Like`."""

    op: str
    engine: str
    shape: Shape
    dtype: torch.dtype
    layout: str
    arguments: tuple[Any, ...] = field(compare=False, repr=False)
    count: int = 1

    def __str__(self) -> str:
        return (
            f"{self.op} {tuned.problem(self.shape)}, {tuned.dtype_name(self.dtype)}, {self.layout}"
        )


def collect(model: Callable[..., Any], sample: Any, backward: bool = True) -> list[Problem]:
    """The problems that ``model(sample)`` and its backward pose to kernels, each once, as they come up.

    Arguments and what is left untouched are as in `tune`.
    """
    found: dict[tuple[Any, ...], Problem] = {}

    def observe(
        choice: Choice, engine: str, shape: Shape, dtype: torch.dtype
    ) -> Callable[..., None]:
        def run(shape: Shape, *arguments: Any) -> None:
            choice.function(shape, *arguments)
            layout = tuned.layout_of(arguments)
            key = choice.op, shape, dtype, layout
            known = found.get(key)
            if known is None:
                kept = tuple(_Like.of(a) if isinstance(a, Tensor) else a for a in arguments)
                found[key] = Problem(choice.op, engine, shape, dtype, layout, kept)
            else:
                found[key] = replace(known, count=known.count + 1)

        # Without a kernel that takes the problem there is nothing to choose from.
        return run if choice.engine == engine else choice.function

    args: Sequence[Any] = ()
    kwargs: dict[str, Any] = {}
    if isinstance(sample, dict):
        kwargs = sample
    else:
        args = sample if isinstance(sample, (tuple, list)) else (sample,)
    with registry.observed(observe), _untouched(model, sample):
        with torch.set_grad_enabled(backward):
            outputs = [t for t in _tensors(model(*args, **kwargs)) if t.is_floating_point()]
        into = [t for t in (*_parameters(model), *_tensors(sample)) if t.requires_grad]
        outputs = [t for t in outputs if t.requires_grad]
        if backward and outputs and into:
            # Not backward(): that would add to .grad. Ones are the gradients of the outputs' sum.
            ones = [torch.ones_like(t) for t in outputs]
            torch.autograd.grad(outputs, into, ones, allow_unused=True)
    return list(found.values())


def _tensors(value: Any) -> list[Tensor]:
    """All tensors in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    return [t for v in value for t in _tensors(v)] if isinstance(value, (tuple, list)) else []


def _parameters(model: Callable[..., Any]) -> list[Tensor]:
    return list(model.parameters()) if isinstance(model, torch.nn.Module) else []


@contextmanager
def _untouched(model: Callable[..., Any], sample: Any) -> Iterator[None]:
    """Puts back what a forward may change: buffers, such as running statistics, and random generators."""
    modules = list(model.modules()) if isinstance(model, torch.nn.Module) else []
    kept = [
        (module._buffers, name, buffer, buffer.detach().clone())
        for module in modules
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    training = [(module, module.training) for module in modules]
    gpus = {t.get_device() for t in _tensors(sample) if t.is_cuda}
    with torch.random.fork_rng(sorted(gpus)):
        try:
            yield
        finally:
            with torch.no_grad():
                for buffers, name, buffer, values in kept:
                    buffers[name] = buffer.copy_(values)
            for module, flag in training:
                module.training = flag


# ---- candidates ------------------------------------------------------------------------------------------

RESULTS = {"max_pool_fwd": 2, "batch_norm_train": 3, "batch_norm_bwd": 4}
"""How many of an operation's last arguments are its results, where not one."""
UPDATES = {"batch_norm_train": slice(4, 6)}
"""Which of its arguments it updates in place: the running statistics."""


def _results(op: str, arguments: Sequence[Any]) -> list[Tensor]:
    return [t for t in arguments[-RESULTS.get(op, 1) :] if t is not None]


def _updates(op: str, arguments: Sequence[Any]) -> list[Tensor]:
    return [t for t in arguments[UPDATES.get(op, slice(0))] if t is not None]


def _call(row: Row, variant: str, shape: Shape, arguments: Sequence[Any]) -> Call:
    def call() -> None:
        with row.forced(variant):
            row.function(shape, *arguments)

    return call


def _aten_call(row: Row, shape: Shape, arguments: Sequence[Any], search: bool) -> Call:
    def call() -> None:
        cudnn = torch.backends.cudnn
        former, cudnn.benchmark = cudnn.benchmark, search
        try:
            row.function(shape, *arguments)
        finally:
            cudnn.benchmark = former

    return call


def candidates(problem: Problem, arguments: Sequence[Any]) -> dict[str, Call]:
    """All ways to compute the problem, what runs without a table first; each writes to the same results."""
    op, engine, shape, dtype = problem.op, problem.engine, problem.shape, problem.dtype
    calls: dict[str, Call] = {}
    for row in ROWS:
        if (
            row.op == op
            and engine in row.engines
            and row.supports(shape, dtype, tf32(engine, dtype)) is None
        ):
            for variant in ("", *row.variants(shape, *arguments)):
                name = tuned.candidate(row.algorithm, variant)
                calls[name] = _call(row, variant, shape, arguments)
    aten = next(row for row in ROWS if row.op == op and "aten" in row.engines)
    searches = (False, True) if engine == "cuda" and op in CONV[:3] else (False,)
    for search in searches:
        call = _aten_call(aten, shape, arguments, search)
        calls[tuned.aten_candidate(op, engine, dtype, search)] = call
    return calls


def _reference(problem: Problem, arguments: Sequence[Any]) -> list[Tensor]:
    """What PyTorch's own op updates and results in, all in float64."""
    wide = [
        a if not isinstance(a, Tensor) else a.double() if a.is_floating_point() else a.clone()
        for a in arguments
    ]
    aten = next(row for row in ROWS if row.op == problem.op and "aten" in row.engines)
    aten.function(problem.shape, *wide)
    return _updates(problem.op, wide) + _results(problem.op, wide)


def _refused(
    problem: Problem, arguments: Sequence[Any], calls: Mapping[str, Call]
) -> dict[str, str]:
    """Candidates that fail, or whose results are not those of PyTorch in float64, each with the reason."""
    reference = _reference(problem, arguments)
    limit = TF32_LIMIT if tf32(problem.engine, problem.dtype) else LIMIT[problem.dtype]
    if problem.op == "batch_norm_bwd":
        limit = max(limit, KINK_LIMIT)
    results, updates = _results(problem.op, arguments), _updates(problem.op, arguments)
    former = [t.clone() for t in updates]
    refused = {}
    for name, call in calls.items():
        for t in results:  # so that what is not written is wrong
            t.fill_(math.nan if t.is_floating_point() else torch.iinfo(t.dtype).max)
        for t, values in zip(updates, former, strict=True):
            t.copy_(values)
        try:
            call()
            worst = max(_error(*pair) for pair in zip(updates + results, reference, strict=True))
        except RuntimeError as error:  # of which running out of memory is one
            refused[name] = str(error).partition("\n")[0]
            continue
        if not worst <= limit:
            refused[name] = f"off by {worst:.1e} from float64, expected at most {limit:.0e}"
    return refused


def _error(result: Tensor, reference: Tensor) -> float:
    if not result.is_floating_point():
        return 0.0 if torch.equal(result, reference) else math.inf
    scale = float(reference.norm())
    return float((result.double() - reference).norm()) / (scale or 1.0)


# ---- timing ----------------------------------------------------------------------------------------------


def measurer(engine: str, device: torch.device) -> Measure:
    """How candidates of an engine are timed. Raises RuntimeError for an engine whose speed says nothing."""
    if engine not in ("cuda", "cpu"):
        raise RuntimeError(f"tune: expected engine cuda or cpu, which can be timed, got {engine!r}")
    once = _gpu_clock(device) if engine == "cuda" else _cpu_seconds

    def measure(calls: Mapping[str, Call], seconds: float) -> dict[str, float]:
        return in_turn(calls, seconds, once, time.perf_counter)

    return measure


def _cpu_seconds(call: Call) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def _gpu_clock(device: torch.device) -> Callable[[Call], float]:
    """Times a call by CUDA events, with none of its data in the L2 cache, as in the midst of a network."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    flush = torch.empty(max(4 * cache, 1 << 28), dtype=torch.int8, device=device)

    def seconds(call: Call) -> float:
        with torch.cuda.device(device):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            # While the GPU sleeps and overwrites its cache the host queues the call: its time is not counted.
            torch.cuda._sleep(500_000)
            flush.zero_()
            begin.record()
            call()
            end.record()
            end.synchronize()
        return float(begin.elapsed_time(end)) * 1e-3

    return seconds


def in_turn(
    calls: Mapping[str, Call],
    seconds: float,
    once: Callable[[Call], float],
    clock: Callable[[], float],
) -> dict[str, float]:
    """Median time of each call. Rounds go on, each beginning with another call, for about so many seconds.

    What a round disturbs, a clock that changes or a neighbour, it disturbs for all.
    """
    for call in calls.values():
        once(call)  # compiled, loaded, warm
    samples: dict[str, list[float]] = {name: [] for name in calls}
    running = list(calls)
    enabled = gc.isenabled()
    gc.disable()  # a collection would fall on whoever is being timed
    try:
        begin, number = clock(), 0
        while number < LEAST or clock() - begin < seconds:
            first = number % len(running)
            for name in running[first:] + running[:first]:
                samples[name].append(once(calls[name]))
            number += 1
            if number == 2:
                best = min(median(taken) for taken in samples.values())
                running = [n for n in running if median(samples[n]) <= HOPELESS * best]
    finally:
        if enabled:
            gc.enable()
    return {name: median(taken) for name, taken in samples.items()}


# ---- tuning ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """One problem: what runs without a table and what is taken from now on, the median seconds of every
    candidate, and why some were refused. Nothing changes (`after` is `before`) where none could be measured.
    """

    problem: Problem
    before: str
    after: str
    seconds: Mapping[str, float]
    refused: Mapping[str, str]

    @property
    def entry(self) -> tuned.Entry | None:
        """What the table gets: the fastest of all, also where flags or policy leave it aside today."""
        name = tuned.fastest(self.seconds)
        if name is None:
            return None
        p = self.problem
        algorithm, _, variant = name.partition(":")
        return tuned.Entry(
            p.op, tuned.problem(p.shape), tuned.dtype_name(p.dtype), p.layout, algorithm, variant,
            dict(self.seconds), time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        )  # fmt: skip


@dataclass(frozen=True)
class Tuned:
    """What `tune` found. `path` is the table it is kept in, None if there was nothing to keep.

    Printed: a line a problem with its time before and after, and the sum over the model's calls.
    """

    device: str
    path: Path | None
    results: tuple[Result, ...]

    def __str__(self) -> str:
        rows = [(str(r.problem), *_change(r), r.after) for r in self.results]
        before = sum(r.problem.count * r.seconds.get(r.before, 0.0) for r in self.results)
        after = sum(r.problem.count * r.seconds.get(r.after, 0.0) for r in self.results)
        calls = sum(r.problem.count for r in self.results)
        total = (f"all {calls} calls", tuned.milliseconds(before), tuned.milliseconds(after), "")
        head = ("problem", "before", "after", "winner")
        lines = [head, *rows, total]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        text = [
            f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}  {d}".rstrip()
            for a, b, c, d in lines
        ]
        for r in self.results:
            text += [f"{r.problem}: not {name}: {reason}" for name, reason in r.refused.items()]
        kept = f"kept in {self.path}" if self.path else "nothing was measured"
        return "\n".join([*text, f"{len(self.results)} problems on {self.device}: {kept}"])


def _change(result: Result) -> tuple[str, str]:
    """Times before and after, "-" for a candidate that was refused."""
    before, after = (result.seconds.get(name) for name in (result.before, result.after))
    return tuple("-" if s is None else tuned.milliseconds(s) for s in (before, after))  # type: ignore[return-value]


def tune(
    model: Callable[..., Any],
    sample: Any,
    *,
    backward: bool = True,
    seconds: float | None = None,
    progress: bool = True,
    file: str | Path | None = None,
) -> Tuned:
    """Find the fastest kernels for a model on the device of `sample`, and keep them for later processes.

    `model` is called as it is, in the mode, with the dtype and under the autocast that it will be used with:
    ``model(sample)``, with a tuple of `sample` as its arguments or a dict as its keyword arguments. With
    `backward`, gradients are taken of the sum of its floating-point outputs. `seconds` is about how long all
    candidates are timed, half a second a problem unless given; compiling them comes on top. `file` names
    another table than the cache directory's, to be used through ``CNNOPS_TUNE_FILE``.

    What is found is in force at once, and in every later process; `cnnops.policy` says whether PyTorch's own
    op may win. The model's parameters, gradients, buffers and mode, and torch's random generators, are left
    as they were. Entries of the table for other problems stay.

    Raises TypeError for a sample without tensors, RuntimeError unless the engine in force is cuda or cpu, and
    OSError where the table cannot be written.
    """
    tensors = _tensors(sample)
    if not tensors:
        raise TypeError(f"sample: expected at least one tensor, got {type(sample).__name__}")
    device = tensors[0].device
    engine = registry.engine_for(device)
    measure = measurer(engine, device)
    problems = collect(model, sample, backward)
    budget = SECONDS if seconds is None else seconds / max(1, len(problems))
    results: list[Result] = []
    name, path = tuned.device_name(engine, device.index or 0), None
    try:
        with torch.no_grad(), _bar(len(problems), progress) as advance:
            for problem in problems:
                results.append(_tuned(problem, measure, budget))
                advance(f"{problem.op}: {results[-1].after}")
    finally:  # also when it is interrupted: what has been measured is worth keeping
        entries = [entry for r in results if (entry := r.entry) is not None]
        if entries:
            path = tuned.save(entries, engine, name, None if file is None else Path(file))
    return Tuned(name, path, tuple(results))


def _tuned(problem: Problem, measure: Measure, seconds: float) -> Result:
    """Pose one problem to all candidates."""
    p = replace(problem, arguments=())  # results outlive the tensors
    device = next(a.device for a in problem.arguments if isinstance(a, _Like))
    generator = torch.Generator(device).manual_seed(0)
    arguments = [a.make(generator) if isinstance(a, _Like) else a for a in problem.arguments]
    calls = candidates(p, arguments)
    before = next(iter(calls))
    try:
        with torch.autocast(device.type, enabled=False):
            refused = _refused(p, arguments, calls)
            good = {name: call for name, call in calls.items() if name not in refused}
            times = measure(good, seconds) if good else {}
    except RuntimeError as error:  # the reference, in float64, may not fit into memory
        return Result(p, before, before, {}, {"measured": str(error).partition("\n")[0]})
    aten = tuned.aten_candidate(p.op, p.engine, p.dtype) if settings.policy == "auto" else ""
    now = {n: s for n, s in times.items() if n.partition(":")[0] != "aten" or n == aten}
    return Result(p, before, tuned.fastest(now) or before, times, refused)


@contextmanager
def _bar(problems: int, wanted: bool) -> Iterator[Callable[[str], None]]:
    """A progress bar on stderr."""
    if not wanted:
        yield lambda text: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=problems)
        yield lambda text: progress.update(task, advance=1, description=text)


# ---- command line ----------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``cnnops tune``."""
    parser.add_argument(
        "model", metavar="MODEL", help="name in cnnops.models, or package.module:callable"
    )
    parser.add_argument(
        "--input",
        metavar="N,C,H,W",
        help="size of the input (default: 32 images of the model's size)",
    )
    parser.add_argument("--dtype", default="float32", choices=[tuned.dtype_name(d) for d in LIMIT])
    parser.add_argument(
        "--channels-last", action="store_true", help="model and input in this layout"
    )
    parser.add_argument("--no-backward", action="store_true", help="inference only: model.eval()")
    parser.add_argument(
        "--file", type=Path, help="the table to add to (default: in the cache directory)"
    )


def main(options: argparse.Namespace) -> int:
    """Run ``cnnops tune``; its exit code: 0, or 2 for bad input."""
    try:
        model, sample = _prepared(options)
    except ValueError as error:
        print(f"cnnops tune: {error}", file=sys.stderr)
        return 2
    try:
        print(tune(model, sample, backward=not options.no_backward, file=options.file))
    except (OSError, RuntimeError) as error:
        print(f"cnnops tune: {error}", file=sys.stderr)
        return 1
    return 0


def _prepared(options: argparse.Namespace) -> tuple[torch.nn.Module, Tensor]:
    """The model and an input for it. Raises ValueError for a name or a size that makes no sense."""
    engine = settings.engine or ("cuda" if torch.cuda.is_available() else "cpu")
    device = "cuda" if engine == "cuda" else "cpu"
    dtype = getattr(torch, options.dtype)
    form = torch.channels_last if options.channels_last else torch.contiguous_format
    model = _model(options.model).to(device, dtype)
    size = _size(options.input, model)
    if len(size) == 4:
        model = model.to(memory_format=form)  # type: ignore[call-overload]
    elif options.channels_last:
        raise ValueError(f"--channels-last: expected an input N,C,H,W, got {list(size)}")
    model.train(not options.no_backward)
    sample = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    return model, sample.contiguous(memory_format=form)


def _model(name: str) -> torch.nn.Module:
    from cnnops.models import named  # networks are built on this package, which imports this module

    with named.at_home():
        return named.make(name, named.find(name))


def _size(text: str | None, model: torch.nn.Module) -> tuple[int, ...]:
    if text is not None:
        parts = text.split(",")
        if not all(part.strip().isdecimal() and int(part) for part in parts):
            raise ValueError(f"--input: expected positive sizes as in 32,3,224,224, got {text!r}")
        return tuple(int(part) for part in parts)
    filters = next((p for p in model.parameters() if p.dim() == 4), None)
    plane = getattr(model, "input_size", None)
    if plane is None or filters is None:
        raise ValueError("--input: expected N,C,H,W for a model that does not say its input_size")
    return 32, filters.shape[1], *plane

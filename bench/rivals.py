"""Who computes a row, on which tensors, and what the right result is.

A rival is asked for one row at a time: `calls` makes the tensors, every rival's way of computing the row on
them, and checks each result against a reference before anyone may be timed. All get the same random inputs
(never zeros), the same precision (TF32 is off unless a run says otherwise), and the same freedom: forward
passes run without recording a graph, backward passes time the gradients that the row asks for and no others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import cnnops
from bench import cudnn_graph
from bench.suites import Row

CNNOPS = ("cnnops", "cnnops-auto")
TORCH = ("eager", "eager-benchmark", "cudnn-graph", "compile", "compile-max-autotune")
FUSED = "cnnops-fused"
RIVALS = (*CNNOPS, *TORCH, FUSED)
"""cnnops: own kernels only. cnnops-auto: policy "auto", where a table of cnnops.tune speaks of the problem.
eager-benchmark: with torch.backends.cudnn.benchmark. cudnn-graph: see `bench.cudnn_graph`. compile:
torch.compile, by default and max-autotune. cnnops-fused: of networks alone, what `cnnops.fuse` makes of them,
or in training ``cnnops.convert(fuse_training=True)``."""

ONE_THREAD = "cnnops-1-thread"
"""cnnops on one thread of a CPU, to be held against cnnops on all. Asked for by name, for few rows."""

UNTUNED = "no table of cnnops.tune speaks of it"
"""Why cnnops-auto is absent where nothing was measured: it would be cnnops."""

TOLERANCE = {"float64": 1e-11, "float32": 5e-5, "tf32": 2e-3, "float16": 1e-2, "bfloat16": 6e-2}
"""Largest |result - reference| / |reference| (norms over a tensor) with which a time counts. Half types have
room for a rival that rounds between a norm and its ReLU, which then cuts elsewhere."""

KINK = 1e-2
"""The same for gradients behind a ReLU: about one input in a million lies so near to its kink that rounding
says on which side. One among 200,000 makes the distance 0.002, the inverse of the root of their number."""

IN_PLACE: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu_,
    "relu6": partial(F.relu6, inplace=True),
}
"""Activations that torch's users apply in place, since their gradient is found from the result."""


HANGING_TAPS = 31
"""Depthwise float16 filters of so many taps a row: PyTorch 2.13 does not come back from them on a CPU with
AVX512-FP16 (29 taps take it 20 ms)."""


class Absent(Exception):
    """A rival has no time for a row; the message says why."""


@dataclass
class Inputs:
    """One set of the tensors of a row: what the function reads, and the gradient that comes back to it."""

    x: Tensor
    w: Tensor | None = None
    bias: Tensor | None = None
    residual: Tensor | None = None
    norm: tuple[Tensor, ...] = ()
    """weight, bias, and before them a batch norm's running_mean, running_var"""
    grad: Tensor | None = None

    def each(self, change: Callable[[Tensor], Tensor]) -> Inputs:
        """The same set with every tensor changed."""

        def changed(t: Tensor | None) -> Tensor | None:
            return None if t is None else change(t)

        return Inputs(
            change(self.x), changed(self.w), changed(self.bias), changed(self.residual),
            tuple(change(t) for t in self.norm), changed(self.grad),
        )  # fmt: skip


@dataclass
class Call:
    """One rival, ready: ``run(i)`` computes the row on the i-th set of inputs, inside of ``around()``."""

    run: Callable[[int], Any]
    around: Callable[[], AbstractContextManager[Any]] = nullcontext
    error: float = 0.0


# ---- tensors ----------------------------------------------------------------------------------------------


def inputs(row: Row, device: torch.device, seed: int) -> Inputs:
    """Random tensors of the row's dtype and layout, about as large in norm as a network's."""
    g = torch.Generator(device).manual_seed(seed)
    dtype = getattr(torch, row.dtype)
    form = torch.contiguous_format
    if row.layout == "channels_last" and len(row.case.x) in (4, 5):
        form = torch.channels_last if len(row.case.x) == 4 else torch.channels_last_3d

    def make(*size: int) -> Tensor:
        t = torch.randn(size, generator=g, device=device, dtype=torch.float32).to(dtype)
        return t.to(memory_format=form) if t.dim() == len(row.case.x) else t

    case, options = row.case, dict(row.case.options)
    made = Inputs(make(*case.x))
    if case.w is not None:
        made.w = make(*case.w) * math.prod(case.w[1:]) ** -0.5
        outputs = case.w[0] if case.kind == "conv" else case.w[1] * options.get("groups", 1)
        made.bias = make(outputs) if case.bias else None
    if case.kind == "norm":
        C = case.x[1]
        made.norm = (make(C), make(C).abs() + 0.5, make(C), make(C))
        made.residual = make(*case.x) if options.get("residual") else None
    if case.kind == "group_norm":
        channels = options.get("normalized_shape", case.x[1:2])
        made.norm = (make(*channels), make(*channels))
    if row.direction not in ("fprop", "fwd"):
        made.grad = make(*case.y)
    return made


# ---- the function and its gradients -----------------------------------------------------------------------


def function(row: Row, ours: bool) -> Callable[[Inputs], Tensor]:
    """The row's operation by cnnops, or by torch. Raises Absent where cnnops has no such function."""
    case, options = row.case, dict(row.case.options)
    home: Any = cnnops.functional if ours else F
    if not hasattr(home, case.op) and case.op != "batch_norm_act":
        raise Absent(f"cnnops.functional has no {case.op}")
    if case.kind in ("conv", "conv_transpose"):
        conv = getattr(home, case.op)
        return lambda t: conv(t.x, t.w, t.bias, **options)
    if case.kind == "pool":
        pool = getattr(home, case.op)
        return lambda t: pool(t.x, **options)
    if case.kind == "group_norm":
        norm, (together,) = getattr(home, case.op), options.values()
        return lambda t: norm(t.x, together, *t.norm)
    training, after = options.get("training", False), options.get("activation", "relu")
    if case.op == "batch_norm":
        return lambda t: home.batch_norm(t.x, *t.norm, training)
    if ours:
        return lambda t: home.batch_norm_act(
            t.x, *t.norm, training, residual=t.residual, activation=after
        )
    activate = (lambda z: z) if after == "none" else IN_PLACE.get(after) or getattr(F, after)

    def composed(t: Inputs) -> Tensor:
        z: Tensor = home.batch_norm(t.x, *t.norm, training)
        result: Tensor = activate(z if t.residual is None else z.add_(t.residual))
        return result

    return composed


def wanted(row: Row, t: Inputs) -> list[Tensor]:
    """The tensors whose gradient the row's direction asks for."""
    if row.direction == "dgrad" or row.case.kind == "pool":
        return [t.x]
    if row.direction == "wgrad":
        assert t.w is not None
        return [t.w]
    return [t.x, *t.norm[-2:], *([] if t.residual is None else [t.residual])]


def runner(row: Row, f: Callable[[Inputs], Tensor], sets: Sequence[Inputs]) -> Callable[[int], Any]:
    """``run(i)`` of a Call: the function without a graph, or its gradients with the forward done before."""
    if row.direction in ("fprop", "fwd"):

        def forward(i: int) -> tuple[Tensor, ...]:
            with torch.no_grad():
                return (f(sets[i % len(sets)]),)

        return forward
    graphs: list[tuple[Tensor, list[Tensor], Tensor | None]] = []
    for t in sets:
        own = t.each(Tensor.detach)  # the same memory, but a graph of this rival's own
        into = [leaf.requires_grad_() for leaf in wanted(row, own)]
        graphs.append((f(own), into, own.grad))

    def backward(i: int) -> tuple[Tensor, ...]:
        y, into, grad = graphs[i % len(graphs)]
        return torch.autograd.grad(y, into, grad, retain_graph=True)

    return backward


def reference(row: Row, t: Inputs, memory: float) -> list[Tensor]:
    """The right results, in float64 where that fits into `memory` bytes, else in float32."""
    elements = sum(v.numel() for v in (t.x, t.w, t.residual, t.grad) if v is not None)
    dtype = torch.float64 if 6 * 8 * elements <= memory else torch.float32
    exact = t.each(lambda v: v.to(dtype, copy=True))
    with torch_settings(benchmark=False, tf32=False):
        return [r.detach() for r in runner(row, function(row, ours=False), [exact])(0)]


def tolerance(row: Row, tf32: bool) -> float:
    """The largest distance from the reference with which a time of the row counts."""
    limit = TOLERANCE["tf32" if tf32 and row.dtype == "float32" else row.dtype]
    after = dict(row.case.options).get("activation", "relu")
    kinked = row.case.op == "batch_norm_act" and row.direction == "bwd" and after in IN_PLACE
    return max(limit, KINK) if kinked else limit


def distance(results: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest norm-relative distance of a result; infinite where something is not a number."""
    worst = 0.0
    for result, right in zip(results, expected, strict=True):
        scale = float(torch.linalg.vector_norm(right)) or 1.0
        off = float(torch.linalg.vector_norm(result.to(right.dtype) - right)) / scale
        worst = max(worst, off) if off == off else float("inf")
    return worst


# ---- rivals -----------------------------------------------------------------------------------------------


@contextmanager
def torch_settings(benchmark: bool, tf32: bool) -> Iterator[None]:
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    former = cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32
    cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32 = benchmark, tf32, tf32
    try:
        yield
    finally:
        cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32 = former


@contextmanager
def one_thread() -> Iterator[None]:
    """The CPU engine takes as many threads as torch has."""
    former = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(former)


@contextmanager
def our_settings(
    policy: str, engine: str | None, tf32: bool, serial: bool = False
) -> Iterator[None]:
    """Torch's leave to use TF32, which our kernels ask for, is the other rivals'."""
    with ExitStack() as stack:
        stack.enter_context(one_thread() if serial else nullcontext())
        stack.enter_context(torch_settings(benchmark=False, tf32=tf32))
        stack.enter_context(cnnops.engine(engine))
        stack.enter_context(cnnops.fallback("error"))
        stack.enter_context(cnnops.policy(policy))
        yield


def call(
    rival: str, row: Row, sets: Sequence[Inputs], tf32: bool, engine: str | None = None
) -> Call:
    """One rival's Call. Raises Absent, and whatever the rival raises."""
    if rival == FUSED:
        raise Absent("networks are fused, not layers")
    if rival in (*CNNOPS, ONE_THREAD):
        policy = "auto" if rival == "cnnops-auto" else "own"
        around = partial(our_settings, policy, engine, tf32, rival == ONE_THREAD)
        f = function(row, ours=True)
    else:
        on_gpu = sets[0].x.is_cuda
        if rival in ("eager-benchmark", "cudnn-graph") and not on_gpu:
            raise Absent("cuDNN concerns GPUs only")
        if not on_gpu and _never_returns(row):
            raise Absent("PyTorch does not return from it on CPUs with AVX512-FP16")
        if rival == "cudnn-graph":
            try:
                run = cudnn_graph.convolution(row, sets)
            except cudnn_graph.Unavailable as reason:
                raise Absent(str(reason)) from None
            run(0)
            return Call(run)
        around = partial(torch_settings, rival == "eager-benchmark", tf32)
        f = function(row, ours=False)
        if rival.startswith("compile"):
            f = _compiled(
                f, "max-autotune-no-cudagraphs" if rival.endswith("autotune") else "default"
            )
    with around():
        run = runner(row, f, sets)
        if rival == "cnnops-auto" and not any(c.measured for c in cnnops.explain(run, 0)):
            raise Absent(UNTUNED)
        run(0)
    return Call(run, around)


def _never_returns(row: Row) -> bool:
    """Whether PyTorch on a CPU may compute the row forever."""
    w = row.case.w
    return row.dtype == "float16" and w is not None and w[1] == 1 and w[-1] >= HANGING_TAPS


def _compiled(f: Callable[[Inputs], Tensor], mode: str) -> Callable[[Inputs], Tensor]:
    """torch.compile of `f`, over plain tensors; its backward may be asked for more than once."""
    import torch._dynamo
    import torch._functorch.config

    torch._dynamo.reset()
    torch._functorch.config.donated_buffer = False

    def flat(x: Any, w: Any, bias: Any, residual: Any, *norm: Any) -> Tensor:
        return f(Inputs(x, w, bias, residual, norm))

    compiled = torch.compile(flat, mode=mode, dynamic=False, fullgraph=True)
    return lambda t: compiled(t.x, t.w, t.bias, t.residual, *t.norm)


def calls(
    row: Row,
    rivals: Sequence[str],
    device: torch.device,
    *,
    sets: int = 1,
    seed: int = 0,
    tf32: bool = False,
    memory: float = 2e9,
    engine: str | None = None,
) -> tuple[dict[str, Call], dict[str, str]]:
    """Every rival's Call for a row, and why those that have none are absent.

    A rival whose result is further from the reference than its dtype's rounding explains is absent as
    "wrong result: …", one that fails as "raised …". Memory that results will land in is filled with NaN
    beforehand, so that what a kernel leaves unwritten is seen.
    """
    made = [inputs(row, device, seed + i) for i in range(sets)]
    right = reference(row, made[0], memory)
    limit = tolerance(row, tf32)
    ready: dict[str, Call] = {}
    absent: dict[str, str] = {}
    for rival in rivals:
        try:
            candidate = call(rival, row, made, tf32, engine)
            with candidate.around():
                _poison(candidate.run(0), made[0])
                candidate.error = distance(candidate.run(0), right)
        except Absent as reason:
            absent[rival] = str(reason)
        except Exception as error:  # a rival's failure is a result, whatever it is
            absent[rival] = raised(error)
        else:
            if candidate.error <= limit:
                ready[rival] = candidate
            else:
                absent[rival] = wrong(candidate.error, limit)
    return ready, absent


def raised(error: Exception) -> str:
    """Why a rival that failed is absent."""
    return f"raised {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def wrong(error: float, limit: float, what: str = "result") -> str:
    """Why a rival whose result is too far off is absent."""
    return f"wrong {what}: {error:.2g} from the reference, at most {limit:.2g} allowed"


def _poison(results: Sequence[Tensor], t: Inputs) -> None:
    """NaN into memory that the next results of these sizes are likely to get."""
    own = {v.data_ptr() for v in (t.x, t.w, t.residual, t.grad) if v is not None}
    for result in results:
        if result.data_ptr() not in own:  # a residual's gradient may be grad itself
            result.fill_(float("nan"))

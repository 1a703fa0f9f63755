"""Convolution with what follows it: `conv_act`, `conv_transpose_act`, `conv_batch_norm_act`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from cases import (
    CONV_ACT_CASES,
    ENGINES,
    TOLERANCE,
    ConvActCase,
    assert_close,
    check,
    device_of,
    grid,
    needs_emulator,
    normal,
)
from cases.norm import ACTIVATIONS
from torch import Tensor
from torch.func import grad, jvp, vmap

import cnnops
import cnnops.functional as C
from cnnops.cuda import emulate
from cnnops.cuda.launch import trace
from cnnops.ops.conv_act import conv_moments

ROW = {case.id: case for case in CONV_ACT_CASES}
PLAIN = [case for case in CONV_ACT_CASES if not case.norm]
DERIVED = 6
"""What is normalised, and what gradients are made of, was rounded before: so many tolerances."""


@pytest.mark.parametrize("case, engine, dtype", grid(CONV_ACT_CASES))
def test_rows(case: ConvActCase, engine: str, dtype: torch.dtype) -> None:
    check(case, engine, dtype, DERIVED)


def forward(case: ConvActCase, engine: str, dtype: torch.dtype) -> None:
    """The result, where no gradients are recorded: one kernel whatever follows."""
    tensors = case.tensors(dtype, device_of(engine))
    with cnnops.engine(engine):
        y = case.ours(*tensors)
    expected = case.theirs(*(t.cpu().double() for t in tensors))
    # By im2col and PyTorch sums are rounded before the rest follows, and what is added may be larger.
    assert_close(y, expected, 2 * TOLERANCE[dtype].output, f"{case.id}, {case.activation}")


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16), ids=str)
@pytest.mark.parametrize("case", PLAIN, ids=lambda case: case.id)
def test_forward(case: ConvActCase, dtype: torch.dtype, engine: str) -> None:
    forward(case, engine, dtype)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_parts(activation: str, engine: str) -> None:
    for given in ({}, {"scale": False}, {"residual": False}, {"bias": False, "scale": False}):
        case = replace(ROW["act_3x3_last"], activation=activation, **given)
        forward(case, engine, torch.float32)


@needs_emulator
@pytest.mark.parametrize("case", PLAIN, ids=lambda case: case.id)
def test_by_im2col(case: ConvActCase) -> None:
    with cnnops.algorithm("conv_im2col"):
        for dtype in (torch.float32, torch.bfloat16):
            forward(case, "emulate", dtype)


@needs_emulator
@pytest.mark.parametrize("algorithm", ["conv_direct", "conv_im2col"])
@pytest.mark.parametrize("case", [c for c in CONV_ACT_CASES if c.schedules], ids=lambda c: c.id)
def test_thread_order_does_not_matter(case: ConvActCase, algorithm: str) -> None:
    with emulate.schedule("all"), cnnops.algorithm(algorithm), cnnops.engine("emulate"):
        y = case.ours(*case.tensors(torch.float32))
    assert_close(y, case.theirs(*case.tensors(torch.float64)), 1e-5, case.id)


@pytest.mark.parametrize("given", ["composed", "fused"])
@pytest.mark.parametrize("transposed", [False, True])
def test_gradients_of_gradients(transposed: bool, given: str) -> None:
    row = ROW["act_transposed" if transposed else "act_3x3"]
    case = replace(row, x=(1, row.x[1], 4, 4), scale=given == "composed")
    leaves = [t.requires_grad_() for t in case.tensors(torch.float64)]
    assert torch.autograd.gradcheck(case.ours, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(case.ours, leaves, fast_mode=True)


def test_transforms() -> None:
    case = ROW["act_3x3"]
    x, w, *rest = case.tensors(torch.float64)
    results = []
    for function in (case.ours, case.theirs):

        def loss(x: Tensor, function: Callable[..., Tensor] = function) -> Tensor:
            return function(x, w, *rest).square().sum()

        results.append(
            (
                grad(loss)(x),
                jvp(loss, (x,), (x.cos(),))[1],
                vmap(grad(loss))(torch.stack([x, 2 * x])),
                vmap(partial(function, x), (0, None, None, None))(torch.stack([w, 2 * w]), *rest),
            )
        )
    for a, b in zip(*results, strict=True):
        assert_close(a, b, 1e-12, "transform")


@pytest.mark.parametrize("id", ["act_3x3_last", "act_no_scale", "act_transposed", "norm_3x3"])
def test_compile(id: str) -> None:
    case = ROW[id]
    leaves = [t.requires_grad_() for t in case.tensors(torch.float32)]

    def step(*tensors: Tensor) -> tuple[Tensor, ...]:
        statistics = case.running(tensors[0])
        return case.ours(*tensors, statistics=statistics), *statistics

    results = []
    for function in (step, torch.compile(step, backend="aot_eager", fullgraph=True)):
        y, *statistics = function(*leaves)
        results.append([y, *statistics, *torch.autograd.grad(y.square().sum(), leaves)])
    for a, b in zip(*results, strict=True):
        assert_close(a, b, 1e-5, id)
        assert a.stride() == b.stride()


def test_what_backward_keeps() -> None:
    """x, w and y: neither the residual nor what the activation was applied to."""
    case = ROW["act_relu"]
    tensors = [t.requires_grad_() for t in case.tensors(torch.float32)]
    kept: list[int] = []

    def keep(t: Tensor) -> Tensor:
        kept.append(t.data_ptr())
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = case.ours(*tensors)
    assert sorted(kept) == sorted(t.data_ptr() for t in (*tensors[:2], y))


@needs_emulator
def test_one_launch() -> None:
    with cnnops.engine("emulate"), trace(run=False) as launches:
        for id in ("act_3x3", "act_3x3_last", "act_1x1", "act_depthwise", "act_transposed"):
            before = len(launches)
            ROW[id].ours(*ROW[id].tensors(torch.float32))
            assert len(launches) == before + 1, id


@pytest.mark.parametrize("engine", ENGINES)
def test_layouts(engine: str) -> None:
    """A residual that lies otherwise than the result, a bias and a scale with gaps, no batch."""
    case = replace(ROW["act_3x3"], activation="relu")
    x, w, *vectors, r = case.tensors(torch.float32, device_of(engine))
    expected = case.theirs(*(t.cpu().double() for t in (x, w, *vectors, r)))
    gaps = [torch.stack([t, t], 1)[:, 0] for t in vectors]
    last = torch.channels_last
    across = r.transpose(2, 3).contiguous().transpose(2, 3)
    with cnnops.engine(engine):
        for residual in (r, r.to(memory_format=last), across):
            y = case.ours(x, w, *gaps, residual)
            assert y.is_contiguous()
            assert_close(y, expected, 1e-6, "layout")
        y = case.ours(x.to(memory_format=last), w, *vectors, r)
        assert y.is_contiguous(memory_format=last)
        assert_close(y, expected, 1e-6, "channels-last")
        assert_close(case.ours(x[0], w, *vectors, r[0]), expected[0], 1e-6, "no batch")


def test_empty() -> None:
    b, s = torch.tensor([1.0, -2.0]), torch.tensor([3.0, 4.0])
    y = C.conv_act(torch.empty(1, 0, 4, 4), torch.empty(2, 0, 1, 1), b, scale=s)
    assert torch.equal(y, torch.tensor([1.0, 0.0]).view(1, 2, 1, 1).expand(1, 2, 4, 4))
    assert C.conv_act(torch.empty(0, 3, 4, 4), torch.empty(2, 3, 1, 1), b).shape == (0, 2, 4, 4)


def test_autocast() -> None:
    case = ROW["act_3x3"]
    tensors = case.tensors(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = case.ours(*tensors)
    assert y.dtype == torch.bfloat16
    assert_close(y, case.theirs(*tensors), 0.02, "autocast")


X, W, V = torch.zeros(2, 3, 5, 5), torch.zeros(4, 3, 3, 3), torch.zeros(4)
Y = torch.zeros(2, 4, 3, 3)
G = torch.zeros(2, 3, 5, 5, requires_grad=True)


def norm(x: Tensor = X, **change: Any) -> Tensor:
    arguments = {"running_mean": None, "running_var": None, "training": True} | change
    return C.conv_batch_norm_act(x, W, None, **arguments)


MISTAKES: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "activation": (lambda: C.conv_act(X, W, activation="softmax"), ValueError, "activation: expected one"),
    "scale": (lambda: C.conv_act(X, W, scale=V[:3]), RuntimeError, r"scale: expected size \[4\], got \[3\]"),
    "residual": (lambda: C.conv_act(X, W, residual=X), RuntimeError, r"residual: .* \[2, 4, 3, 3\], got"),
    "broadcast": (lambda: C.conv_act(X, W, residual=Y[:1]), RuntimeError, "residual: expected size"),
    "gradient": (lambda: C.conv_act(G, W, scale=V[:3]), RuntimeError, "scale: expected size"),
    "dtype": (lambda: C.conv_act(X, W, scale=V.double()), RuntimeError, "scale: expected torch.float32"),
    "type": (lambda: C.conv_act(X, W, scale=2.0), TypeError, "scale: expected a Tensor, got float"),
    "weight": (lambda: C.conv_act(X, W[0, 0]), RuntimeError, "weight: expected 3 to 5 dimensions"),
    "transposed": (lambda: C.conv_transpose_act(X, W[:3], scale=V), RuntimeError, "scale: expected size"),
    "momentum": (lambda: norm(momentum="0.1"), TypeError, "momentum: expected a float"),
    "statistics": (lambda: norm(training=False), RuntimeError, "running_mean: expected a Tensor"),
    "running": (lambda: norm(running_mean=V[:3], running_var=V[:3]), RuntimeError, "running_mean: expected"),
    "norm": (lambda: norm(norm_weight=V[:3]), RuntimeError, "weight: expected"),
    "one value": (lambda: norm(X[:1, :, :3, :3]), ValueError, "more than 1 value"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name: str) -> None:
    function, kind, message = MISTAKES[name]
    with pytest.raises(kind, match=message):
        function()


# ---- with batch norm --------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("id", ["norm_3x3", "norm_3x3_last", "norm_eval"])
def test_running_statistics(id: str, engine: str) -> None:
    case = ROW[id]
    for dtype in (torch.float32, torch.bfloat16):
        tensors = case.tensors(dtype, device_of(engine))
        wide = [t.cpu().double() for t in tensors]
        ours, theirs = case.running(tensors[0]), case.running(wide[0])
        with cnnops.engine(engine):
            y = case.ours(*tensors, statistics=ours)
        expected = case.theirs(*wide, statistics=theirs)
        limit = 1e-6 if dtype == torch.float32 else 0.02  # the running ones are of a half type, too
        for a, b in zip((y, *ours), (expected, *theirs), strict=True):
            assert_close(a, b, limit, case.id)


@needs_emulator
def test_batch_norm_reads_the_result_once() -> None:
    """Convolution with moments, their merge, and one pass: no statistics of its own."""
    case = ROW["norm_3x3_last"]
    with cnnops.engine("emulate"), trace(run=False) as launches:
        case.ours(*case.tensors(torch.float32))
    entries = [plan.kernel.entry for plan in launches]
    assert entries == ["conv_fprop_direct", "conv_moments_direct", "batch_norm_infer"]


@pytest.mark.parametrize("engine", ENGINES)
def test_moments_far_from_zero(engine: str) -> None:
    """Variance survives a mean that is ten thousand times the deviation."""
    x = (normal(3, torch.float32)((4, 1, 16, 16)) * 0.01 + 100).to(device_of(engine))
    w = torch.ones(40, 1, 1, 1, device=x.device)
    with cnnops.engine(engine):
        y, mean, var = conv_moments(x, w, None, (1, 1), (0,) * 4, (1, 1), 1, "zeros", engine)
    values = y.double().movedim(1, 0).flatten(1)
    assert_close(mean, values.mean(1), 1e-7, "mean")
    assert_close(var, values.var(1, correction=0), 1e-4, "var")


def test_batch_norm_transforms() -> None:
    case = ROW["norm_3x3"]
    x, *rest = case.tensors(torch.float64)
    results = []
    for function in (case.ours, case.theirs):

        def loss(x: Tensor, function: Callable[..., Tensor] = function) -> Tensor:
            return function(x, *rest).square().sum()

        leaf = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), leaf)
        results.append((grad(loss)(x), jvp(loss, (x,), (x.cos(),))[1], second))
    for a, b in zip(*results, strict=True):
        assert_close(a, b, 1e-9, "transform")

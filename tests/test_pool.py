"""Pooling in every engine: the rows of tests/cases, the worked examples, and what PyTorch's choices are."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import ENGINES, POOL_CASES, PoolCase, check, device_of, grid, needs_emulator
from torch import Tensor

import cnnops
from cnnops.cuda import emulate
from cnnops.functional import adaptive_avg_pool2d, avg_pool2d, max_pool2d
from cnnops.ops import pool as ops

MAX_CASES = [case for case in POOL_CASES if case.kind == "max"]


@pytest.mark.parametrize("case, engine, dtype", grid(POOL_CASES))
def test_rows(case: PoolCase, engine: str, dtype: torch.dtype) -> None:
    check(case, engine, dtype)


@pytest.mark.parametrize("case, engine, dtype", grid(MAX_CASES))
def test_maxima_are_exact(case: PoolCase, engine: str, dtype: torch.dtype) -> None:
    (x,) = case.tensors(dtype, device_of(engine))
    with cnnops.engine(engine):
        y = case.ours(x)
    assert torch.equal(y.cpu().nan_to_num(7e3), case.theirs(x.cpu()).nan_to_num(7e3))


@needs_emulator
@pytest.mark.parametrize("case", [c for c in POOL_CASES if c.schedules], ids=lambda c: c.id)
def test_thread_order_does_not_matter(case: PoolCase) -> None:
    with emulate.schedule("all"):
        check(case, "emulate", torch.float32)


# ---- worked examples ------------------------------------------------------------------------------------

PLANE = torch.tensor([[[[1.0, 1, 2, 4], [5, 6, 7, 8], [3, 2, 1, 0], [1, 2, 3, 4]]]])
FOR_AVERAGE = torch.tensor([[[[2.0, 3, 2, 4], [5, 6, 6, 8], [3, 2, 1, 0], [1, 2, 3, 4]]]])


@pytest.mark.parametrize("engine", ENGINES)
def test_worked_examples(engine: str) -> None:
    device = device_of(engine)
    with cnnops.engine(engine):
        assert max_pool2d(PLANE.to(device), 2, 2)[0, 0].tolist() == [[6, 8], [3, 4]]
        assert adaptive_avg_pool2d(FOR_AVERAGE.to(device), 1).item() == 3.25
        assert avg_pool2d(FOR_AVERAGE.to(device), 4).item() == 3.25


@pytest.mark.parametrize("engine", ENGINES)
def test_gradients_of_the_worked_examples(engine: str) -> None:
    device = device_of(engine)
    x = PLANE.to(device, copy=True).requires_grad_()
    with cnnops.engine(engine):
        max_pool2d(x, 2).sum().backward()
        assert x.grad is not None
        assert x.grad[0, 0].tolist() == [[0, 0, 0, 0], [0, 1, 0, 1], [1, 0, 0, 0], [0, 0, 0, 1]]
        x.grad = None
        avg_pool2d(x, 2).sum().backward()
        assert x.grad is not None and x.grad.tolist() == torch.full_like(x, 0.25).tolist()


# ---- which maximum --------------------------------------------------------------------------------------


@pytest.mark.parametrize("case, engine, dtype", grid(MAX_CASES))
def test_indices_are_torchs(case: PoolCase, engine: str, dtype: torch.dtype) -> None:
    (x,) = case.tensors(dtype, device_of(engine))
    arguments = (case.kernel, case.stride, case.padding, case.dilation, case.ceil_mode)
    with cnnops.engine(engine):
        _, indices = ops.max_pool(x, *arguments, indices=True)
    assert indices is not None
    pool = getattr(F, f"max_pool{x.dim() - 2}d")
    _, expected = pool(x.cpu(), *arguments[:4], ceil_mode=case.ceil_mode, return_indices=True)
    assert torch.equal(indices.cpu(), expected)


@pytest.mark.parametrize("engine", ENGINES)
def test_ties_go_to_the_first_maximum(engine: str) -> None:
    x = torch.zeros(1, 1, 4, 4, device=device_of(engine), requires_grad=True)
    with cnnops.engine(engine):
        max_pool2d(x, 2).sum().backward()
    assert x.grad is not None
    assert x.grad[0, 0].tolist() == [[1, 0, 1, 0], [0, 0, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_nan_wins_and_the_last_nan_gets_the_gradient(
    layout: torch.memory_format, engine: str
) -> None:
    values = torch.tensor([[3.0, math.nan], [math.nan, 5.0]]).expand(1, 8, 2, 2)
    x = values.to(device_of(engine)).contiguous(memory_format=layout).requires_grad_()
    with cnnops.engine(engine):
        y = max_pool2d(x, 2)
        y.sum().backward()
    assert y.isnan().all()
    assert x.grad is not None and x.grad[0, 0].tolist() == [[0, 0], [1, 0]]


@pytest.mark.parametrize("engine", ENGINES)
def test_minus_infinity_is_found_inside_of_the_padding(engine: str) -> None:
    """Padding is -inf too, but never the maximum: the first place of the input is."""
    x = torch.full((1, 1, 2, 2), -math.inf, device=device_of(engine), requires_grad=True)
    with cnnops.engine(engine):
        y = max_pool2d(x, 3, padding=1)
        y.backward(torch.ones_like(y))
    assert y.item() == -math.inf
    assert x.grad is not None and x.grad[0, 0].tolist() == [[1, 0], [0, 0]]


@pytest.mark.parametrize("engine", ENGINES)
def test_window_of_nothing_but_padding(engine: str) -> None:
    """A dilated window can step over the whole input: -inf, whose gradient goes nowhere, to any order.

    Not a row of tests/cases: PyTorch's own backward writes outside of the gradient here.
    """
    x = torch.ones(1, 1, 2, 2, device=device_of(engine), requires_grad=True)
    grad = torch.ones(1, 1, 1, 1, device=x.device, requires_grad=True)
    with cnnops.engine(engine):
        y = max_pool2d(x, 2, stride=1, padding=1, dilation=3)
        (first,) = torch.autograd.grad(y, x, grad, create_graph=True)
        (second,) = torch.autograd.grad(first, grad, torch.ones_like(x))
    assert y.item() == -math.inf
    assert not first.any() and second.item() == 0


@pytest.mark.parametrize("places, dtype", [((15, 17), torch.uint8), ((16, 16), torch.int32)])
def test_kept_bytes(places: tuple[int, int], dtype: torch.dtype) -> None:
    """One byte an output is kept for the backward, four where a window has more than 255 places."""
    x = torch.randn(1, 2, 20, 20, requires_grad=True)
    kept: list[Tensor] = []

    def keep(t: Tensor) -> Tensor:
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = max_pool2d(x, places, 1)
    assert [(t.dtype, t.shape) for t in kept] == [(dtype, y.shape)]


@pytest.mark.parametrize("first, second", [("aten", "cpu"), ("cpu", "aten")])
@pytest.mark.parametrize(
    "case", [c for c in MAX_CASES if c.values == "ties" or "256" in c.id], ids=lambda c: c.id
)
def test_engines_mix_between_forward_and_backward(case: PoolCase, first: str, second: str) -> None:
    (x,) = case.tensors(torch.float32)
    shape = ops._shape(x.shape, *ops._window(x.dim(), case.kernel, case.stride, case.padding))
    arguments = (shape.kernel, shape.stride, [p for p, _ in shape.padding], shape.dilation, False)
    y, offsets = ops.max_pool_fwd(x, *arguments, first)
    grad_x = ops.max_pool_bwd(torch.ones_like(y), offsets, x.shape, False, *arguments, second)
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(case.theirs(leaf), leaf, torch.ones_like(y))
    assert torch.equal(grad_x, expected)
    assert torch.equal(y, ops.max_pool_gather(x, offsets, *arguments, second))


# ---- derivatives ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "function, arguments",
    [
        (max_pool2d, {"kernel_size": 3, "stride": 2, "padding": 1}),
        (max_pool2d, {"kernel_size": (2, 3), "stride": 1, "dilation": 2, "ceil_mode": True}),
        (avg_pool2d, {"kernel_size": 3, "stride": 2, "padding": 1, "count_include_pad": False}),
        (avg_pool2d, {"kernel_size": 2, "ceil_mode": True, "divisor_override": 3}),
        (adaptive_avg_pool2d, {"output_size": (3, 2)}),
        (adaptive_avg_pool2d, {"output_size": 1}),
    ],
)
def test_first_and_second_derivatives(function: Any, arguments: dict[str, Any]) -> None:
    x = torch.randn(2, 2, 6, 5, dtype=torch.float64, requires_grad=True)
    with cnnops.engine("cpu"):
        assert torch.autograd.gradcheck(lambda x: function(x, **arguments), (x,))
        assert torch.autograd.gradgradcheck(lambda x: function(x, **arguments), (x,))

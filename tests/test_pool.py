"""Pooling in every engine: the rows of tests/cases, the worked examples, and what PyTorch's choices are."""

from __future__ import annotations

import copy
import inspect
import itertools
import math
import pickle
import re
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import (
    ENGINES,
    POOL_CASES,
    TOLERANCE,
    PoolCase,
    assert_close,
    check,
    device_of,
    grid,
    needs_emulator,
)
from torch import Tensor
from torch.func import grad, hessian, jvp, vmap

import cnnops
import cnnops.functional as C
from cnnops import nn, registry
from cnnops.cpu import pool as cpu
from cnnops.cpu import simd
from cnnops.cuda import emulate
from cnnops.functional import adaptive_avg_pool2d, avg_pool2d, max_pool2d
from cnnops.ops import pool as ops
from cnnops.shapes import PoolShape, UnpoolShape

MAX_CASES = [case for case in POOL_CASES if case.kind in ("max", "adaptive_max")]
FAMILIES = (
    "max_pool",
    "max_unpool",
    "avg_pool",
    "adaptive_avg_pool",
    "adaptive_max_pool",
    "lp_pool",
)
DIMS = (1, 2, 3)


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


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("stride", [1, 2])
def test_rows_about_as_long_as_vectors(stride: int, dtype: torch.dtype, layout: str) -> None:
    """Of many ties, NaN and -inf, at both ends of each row, with and without padding."""
    form = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    for width in (5, 15, 16, 17, 31, 32, 33, 63, 65, 130):
        x = torch.randn(2, 19, 9, width).mul(2).round().to(dtype)
        x[0, 1, 4, -2], x[0, 2, 4, 0], x[1, 3] = math.nan, math.nan, -math.inf
        x = x.to(memory_format=form).requires_grad_()
        for kernel, padding in ((2, 0), (3, 0), (3, 1)):
            window = {"kernel_size": kernel, "stride": stride, "padding": padding}
            theirs, places = F.max_pool2d(x, **window, return_indices=True)
            grad_y = torch.randn_like(theirs)
            with cnnops.engine("cpu"):
                y, found = C.max_pool2d(x, **window, return_indices=True)
                (grad_x,) = torch.autograd.grad(y, x, grad_y)
                average = avg_pool2d(x, **window)
                (grad_average,) = torch.autograd.grad(average, x, grad_y)
            what = f"{width} {window}"
            assert torch.equal(found, places) and torch.equal(y.isnan(), theirs.isnan()), what
            assert torch.equal(y.nan_to_num(7.0), theirs.nan_to_num(7.0)), what
            wide, g = x.detach().double().requires_grad_(), grad_y.double()
            limit = TOLERANCE[dtype].gradient
            (wanted,) = torch.autograd.grad(F.max_pool2d(wide, **window), wide, g)
            assert_close(grad_x, wanted, limit, f"gradient of maxima {what}")
            averages = F.avg_pool2d(wide, **window)
            (wanted,) = torch.autograd.grad(averages, wide, g)
            assert_close(average[:, 4:], averages[:, 4:], limit, f"averages {what}")
            assert_close(grad_average, wanted, limit, f"gradient of averages {what}")


def within(size: tuple[int, ...], last: bool, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor of sevens, with more of them behind it."""
    flat = torch.full((math.prod(size) + 70,), 7.0, dtype=dtype)[: math.prod(size)]
    return flat.view(size[0], *size[2:], size[1]).movedim(-1, 1) if last else flat.view(size)


def nothing_behind(*results: Tensor) -> bool:
    return all(
        bool((t.as_strided((70,), (1,), t.storage_offset() + t.numel()) == 7).all())
        for t in results
    )


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("bits", simd.WIDTHS)
def test_every_vector_width(bits: int, last: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Channels and rows that are no whole vectors, in blocks of every size; windows that overlap, that leave
    places out, and that have them in the padding. Nothing is written behind a result."""
    monkeypatch.setattr(simd, "simd_bits", lambda: bits)
    windows = [
        (2, 2, 0),
        (3, 2, 1),
        ((2, 3), (1, 2), (1, 0)),
        ((3, 2), (4, 3), 0),
        ((5, 7), (4, 6), 0),
    ]
    sizes = [(2, 8, 9, 13), (1, 20, 10, 28), (1, 40, 11, 19), (2, 50, 9, 14), (1, 70, 9, 9)]
    for size, (kernel, stride, padding) in itertools.product(sizes, windows):
        x = within(size, last).copy_(torch.randn(size).mul(2).round())
        leaf = x.clone().requires_grad_()
        shape = PoolShape.of(size, kernel, stride, padding)
        y, means = within(shape.y_size, last), within(shape.y_size, last)
        offsets = within(shape.y_size, last, torch.uint8)
        grad_y = within(shape.y_size, last).copy_(torch.randint(-3, 4, shape.y_size))
        grad_x, grad_means = within(size, last), within(size, last)
        cpu.max_pool_fwd(shape, x, y, offsets)
        cpu.max_pool_bwd(shape, grad_y, offsets, grad_x)
        cpu.avg_pool_fwd(shape, x, means)
        cpu.avg_pool_bwd(shape, grad_y, grad_means)
        largest = F.max_pool2d(leaf, kernel, stride, padding)
        average = F.avg_pool2d(leaf, kernel, stride, padding)
        what = f"{size} {kernel} {stride} {padding}"
        assert torch.equal(y, largest), what
        assert torch.equal(grad_x, *torch.autograd.grad(largest, leaf, grad_y)), what
        torch.testing.assert_close(means, average.detach(), msg=what)
        (expected,) = torch.autograd.grad(average, leaf, grad_y)
        torch.testing.assert_close(grad_means, expected, msg=what)
        assert nothing_behind(y, means, offsets, grad_x, grad_means), what


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
    with cnnops.engine(engine):
        y, indices = case.with_indices(C, x)
    expected, places = case.with_indices(F, x.cpu())
    assert indices.dtype == torch.int64 and torch.equal(indices.cpu(), places)
    assert torch.equal(y.cpu().nan_to_num(7e3), expected.nan_to_num(7e3))


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


def saved(function: Callable[[Tensor], Any], x: Tensor) -> int:
    """Bytes that `function` keeps for its backward."""
    kept: list[int] = []

    def keep(t: Tensor) -> Tensor:
        kept.append(t.numel() * t.element_size())
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        function(x.clone().requires_grad_())
    return sum(kept)


@pytest.mark.parametrize("places, itemsize", [((15, 17), 1), ((16, 16), 4)])
def test_kept_bytes(places: tuple[int, int], itemsize: int) -> None:
    """One byte an output is kept for the backward, four where a window has more than 255 places."""
    x = torch.randn(1, 2, 20, 20)
    assert (
        saved(lambda x: max_pool2d(x, places, 1), x) == itemsize * max_pool2d(x, places, 1).numel()
    )


@pytest.mark.parametrize("dims", DIMS)
def test_kept_bytes_beside_torchs(dims: int) -> None:
    """PyTorch keeps an index of eight bytes an output, and the input."""
    x = torch.randn(2, 3, *(8,) * dims)
    indices = torch.arange(8**dims).view(1, 1, *x.shape[2:]).expand(x.shape).contiguous()
    outputs = 6 * 4**dims
    arguments: dict[str, tuple[tuple[Any, ...], int, int]] = {
        "max_pool": ((2,), outputs, 8 * outputs + 4 * x.numel()),
        "adaptive_max_pool": ((4,), outputs, 8 * outputs + 4 * x.numel()),
        "avg_pool": ((2,), 0, 4 * x.numel()),
        "adaptive_avg_pool": ((4,), 0, 4 * x.numel()),
        "max_unpool": ((indices, 2), 8 * x.numel(), 8 * x.numel()),
    }
    for name, (rest, ours, theirs) in arguments.items():
        function, reference = (getattr(module, f"{name}{dims}d") for module in (C, F))
        assert saved(lambda x, f=function, r=rest: f(x, *r), x) == ours, name
        assert saved(lambda x, f=reference, r=rest: f(x, *r), x) == theirs, name


@pytest.mark.parametrize("first, second", [("aten", "cpu"), ("cpu", "aten")])
@pytest.mark.parametrize(
    "case",
    [c for c in MAX_CASES if c.values == "ties" or "256" in c.id or c.id == "adaptive_max_3d"],
    ids=lambda c: c.id,
)
def test_engines_mix_between_forward_and_backward(case: PoolCase, first: str, second: str) -> None:
    (x,) = case.tensors(torch.float32)
    arguments: tuple[Any, ...] = ((), (), (), (), False, ops._adaptive_output(x, case.kernel))
    if case.kind == "max":
        window = ops._window(x.dim(), case.kernel, case.stride, case.padding)
        arguments = (*window, False, None)
    y, offsets = ops.max_pool_fwd(x, *arguments, first)
    ones = torch.ones_like(y)
    grad_x = ops.max_pool_bwd(ones, offsets, x.shape[2:], False, *arguments, second)
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(case.theirs(leaf), leaf, ones)
    assert torch.equal(grad_x, expected)
    assert torch.equal(y, ops.max_pool_gather(x, offsets, *arguments, second))


# ---- unpooling ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dims", DIMS)
@pytest.mark.parametrize("kernel, stride", [(2, 2), (3, 2)])
def test_unpooling_undoes_pooling(kernel: int, stride: int, dims: int, engine: str) -> None:
    """Every maximum is back at its place, zeros elsewhere; pooling that gives the same maxima."""
    x = torch.rand(2, 3, *(9, 8, 7)[:dims], device=device_of(engine)) + 1
    pool = getattr(nn, f"MaxPool{dims}d")(kernel, stride, return_indices=True)
    unpool = getattr(nn, f"MaxUnpool{dims}d")(kernel, stride)
    with cnnops.engine(engine):
        y, indices = pool(x)
        back = unpool(y, indices, output_size=x.shape)
        assert torch.equal(pool(back)[0], y)
    kept = torch.zeros_like(x, dtype=torch.bool)
    kept.flatten(2).scatter_(2, indices.flatten(2), True)
    assert torch.equal(back, x * kept)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_last_value_of_a_place_stays(layout: torch.memory_format, engine: str) -> None:
    """And its gradient goes to all of them; the second derivative sums up what came from there."""
    device = device_of(engine)
    x = torch.arange(1.0, 33).view(1, 8, 2, 2).to(device).contiguous(memory_format=layout)
    x.requires_grad_()
    places = torch.tensor([[5, 1], [5, 1]], device=device).expand(1, 8, 2, 2)
    weights = torch.arange(128.0, device=device).view(1, 8, 4, 4).requires_grad_()
    with cnnops.engine(engine):
        y = C.max_unpool2d(x, places, 2)
        (first,) = torch.autograd.grad(y, x, weights, create_graph=True)
        (second,) = torch.autograd.grad(first, weights, x.detach())
    for c in range(8):
        expected = torch.zeros(16)
        expected[5], expected[1] = 4 * c + 3, 4 * c + 4
        assert torch.equal(y[0, c].flatten().cpu(), expected)
        assert first[0, c].tolist() == [[16 * c + 5, 16 * c + 1]] * 2
        expected[5], expected[1] = 8 * c + 4, 8 * c + 6
        assert torch.equal(second[0, c].flatten().cpu(), expected)


@pytest.mark.parametrize("engine", ["aten", "cpu", pytest.param("emulate", marks=needs_emulator)])
@pytest.mark.parametrize("dims", DIMS)
@pytest.mark.parametrize("place", [-1, "behind", 2**40])
def test_places_outside_of_the_plane(place: int | str, dims: int, engine: str) -> None:
    indices = torch.arange(3**dims).view(1, 1, *(3,) * dims).repeat(2, 2, *(1,) * dims)
    x, unpool = torch.ones(indices.shape), f"max_unpool{dims}d"
    indices.view(-1)[4] = 6**dims if place == "behind" else int(place)
    with pytest.raises(RuntimeError):
        getattr(F, unpool)(x, indices, 2)
    with (
        cnnops.engine(engine),
        pytest.raises(RuntimeError, match="indices: expected places .* got"),
    ):
        getattr(C, unpool)(x, indices, 2)
    indices.view(-1)[4] = 6**dims - 1
    with cnnops.engine(engine):
        assert torch.equal(getattr(C, unpool)(x, indices, 2), getattr(F, unpool)(x, indices, 2))


def test_kernel_leaves_out_places_outside_of_the_plane() -> None:
    """What a GPU does, where nobody waits for indices to be looked at."""
    x, indices = torch.ones(1, 1, 4), torch.tensor([[[0, -1, 9, 2]]])
    shape = UnpoolShape.of(x.shape, indices.shape, (8,))
    y, grad_x = torch.empty(1, 1, 8), torch.empty_like(x)
    cpu.max_unpool_fwd(shape, x, indices, y)
    cpu.max_unpool_bwd(shape, torch.ones_like(y), indices, grad_x)
    assert y.tolist() == [[[1, 0, 1, 0, 0, 0, 0, 0]]] and grad_x.tolist() == [[[1, 0, 0, 1]]]


# ---- powers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm_type", [1, 2, 3.5, -1, math.inf, -math.inf])
@pytest.mark.parametrize("dims", DIMS)
def test_powers_are_torchs_step_by_step(dims: int, norm_type: float) -> None:
    """On PyTorch's own operations not a bit differs, NaN and gradients included."""
    x = torch.randn(2, 3, *(7, 8, 6)[:dims])
    x.view(-1)[:5] = 0  # whose derivative PyTorch does not define, but has
    sizes = {"kernel_size": 2 if dims == 1 else (2, 3, 2)[:dims], "stride": 2, "ceil_mode": True}
    results = []
    for module in (C, F):
        with cnnops.engine("aten"):
            leaf = x.clone().requires_grad_()
            y = getattr(module, f"lp_pool{dims}d")(leaf, norm_type, **sizes)
            results.append((y, *torch.autograd.grad(y.sum(), leaf)))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(7), b.nan_to_num(7))


# ---- derivatives ----------------------------------------------------------------------------------------


def places(x: Tensor) -> Tensor:
    """Indices for unpooling with a kernel of 2, all different."""
    count = math.prod(x.shape[2:])
    walk = torch.arange(count, device=x.device) * 5 % math.prod(2 * size for size in x.shape[2:])
    return walk.view(x.shape[2:]).expand(x.shape)


DERIVATIVES: list[tuple[str, Callable[[Any, int, Tensor], Tensor]]] = [
    ("max", lambda m, d, x: getattr(m, f"max_pool{d}d")(x, 3, 2, 1)),
    ("max_dilated", lambda m, d, x: getattr(m, f"max_pool{d}d")(x, 2, 1, 0, 2, ceil_mode=True)),
    ("avg", lambda m, d, x: getattr(m, f"avg_pool{d}d")(x, 3, 2, 1, False, False)),
    ("avg_ceil", lambda m, d, x: getattr(m, f"avg_pool{d}d")(x, 2, ceil_mode=True)),
    ("adaptive_avg", lambda m, d, x: getattr(m, f"adaptive_avg_pool{d}d")(x, 2)),
    ("global_avg", lambda m, d, x: getattr(m, f"adaptive_avg_pool{d}d")(x, 1)),
    ("adaptive_max", lambda m, d, x: getattr(m, f"adaptive_max_pool{d}d")(x, 2)),
    ("unpool", lambda m, d, x: getattr(m, f"max_unpool{d}d")(x, places(x), 2)),
    ("lp", lambda m, d, x: getattr(m, f"lp_pool{d}d")(x.square() + 0.5, 2.5, 2)),
]

differentiated = pytest.mark.parametrize(
    "function", [f for _, f in DERIVATIVES], ids=[name for name, _ in DERIVATIVES]
)


@pytest.mark.parametrize("dims", DIMS)
@differentiated
def test_first_and_second_derivatives(
    function: Callable[[Any, int, Tensor], Tensor], dims: int
) -> None:
    """Backward and forward, to the second order."""
    # Numbers that are far enough apart for a difference quotient.
    x = torch.randperm(2 * math.prod((4, 3, 3)[:dims])).double() / 8
    x = x.view(1, 2, *(4, 3, 3)[:dims]).requires_grad_()

    def ours(x: Tensor) -> Tensor:
        return function(C, dims, x)

    with cnnops.engine("cpu"):
        assert torch.autograd.gradcheck(ours, (x,), check_forward_ad=True)
        assert torch.autograd.gradgradcheck(ours, (x,), check_fwd_over_rev=True)


@pytest.mark.parametrize("dims", DIMS)
@differentiated
def test_transforms_are_torchs(function: Callable[[Any, int, Tensor], Tensor], dims: int) -> None:
    x = torch.randn(3, 1, 2, *(4, 3, 4)[:dims], dtype=torch.float64)
    transforms: list[Callable[[Callable[[Tensor], Tensor]], Any]] = [
        lambda f: vmap(f)(x),
        lambda f: vmap(f, in_dims=1, out_dims=2)(x.movedim(0, 1)),
        lambda f: vmap(f)(x[0]),  # no batch of its own
        lambda f: vmap(grad(lambda x: f(x).square().sum()))(x),
        lambda f: grad(lambda x: vmap(f)(x).square().sum())(x),
        lambda f: jvp(f, (x[0],), (x[1],)),
        lambda f: jvp(grad(lambda x: f(x).pow(3).sum()), (x[0],), (x[1],)),
        lambda f: hessian(lambda x: f(x).pow(3).sum())(x[0]),
    ]
    with cnnops.engine("cpu"), warnings.catch_warnings():
        warnings.filterwarnings("error", "There is a performance drop")
        ours = [transform(lambda x: function(C, dims, x)) for transform in transforms]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = [transform(lambda x: function(F, dims, x)) for transform in transforms]
    torch.testing.assert_close(ours, theirs)


# ---- at home in torch -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dims", DIMS)
@pytest.mark.parametrize("name", FAMILIES)
def test_signatures(name: str, dims: int) -> None:
    """PyTorch's builtins have no signature to inspect, but their documentation starts with it."""
    ours = inspect.signature(getattr(C, f"{name}{dims}d")).parameters.values()
    theirs = getattr(F, f"{name}{dims}d")
    theirs = getattr(F, f"{name}{dims}d_with_indices", theirs)
    if inspect.isbuiltin(theirs):
        documented = re.search(r"\w+\((.*)\) -> Tensor", theirs.__doc__ or "")
        assert documented
        plain = [p.name if p.default is p.empty else f"{p.name}={p.default}" for p in ours]
        assert ", ".join(plain) == documented[1]
    else:
        other = inspect.signature(theirs).parameters.values()
        assert [(p.name, p.default, p.kind) for p in ours] == [
            (p.name, p.default, p.kind) for p in other
        ]


LAYERS: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
    ("MaxPool", (3,), {"stride": 2, "padding": 1}),
    ("MaxPool", (2,), {"dilation": 2, "ceil_mode": True, "return_indices": True}),
    ("MaxUnpool", (3,), {"stride": 2, "padding": 1}),
    ("AvgPool", (2,), {}),
    ("AvgPool", (3,), {"stride": 2, "padding": 1, "ceil_mode": True, "count_include_pad": False}),
    ("LPPool", (2, 3), {}),
    ("LPPool", (3, 2), {"stride": 1, "ceil_mode": True}),
    ("AdaptiveAvgPool", (3,), {}),
    ("AdaptiveMaxPool", (2,), {}),
    ("AdaptiveMaxPool", (3,), {"return_indices": True}),
]


@pytest.mark.parametrize("dims", DIMS)
@pytest.mark.parametrize("name, args, kwargs", LAYERS)
def test_layers_are_torchs(
    name: str, args: tuple[Any, ...], kwargs: dict[str, Any], dims: int
) -> None:
    """Results, text, state; copies and pickles; batched or not."""
    ours, theirs = (getattr(module, f"{name}{dims}d")(*args, **kwargs) for module in (nn, torch.nn))
    assert isinstance(ours, type(theirs)) and repr(ours) == repr(theirs)
    assert vars(ours) == vars(theirs) and not ours.state_dict()
    for x in (torch.rand(2, 3, *(5,) * dims), torch.rand(3, *(5,) * dims)):
        indices = torch.arange(5**dims).view((5,) * dims).expand(x.shape)
        inputs = (x, indices) if name == "MaxUnpool" else (x,)
        expected = theirs(*inputs)
        for layer in (ours, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
            torch.testing.assert_close(layer(*inputs), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dims", DIMS)
@pytest.mark.parametrize("name", FAMILIES)
def test_unbatched_inputs(name: str, dims: int) -> None:
    x = torch.rand(3, *(6,) * dims)
    arguments: tuple[Any, ...] = (2, 2) if name == "lp_pool" else (2,)
    if name == "max_unpool":
        arguments = (torch.arange(6**dims).view((6,) * dims).expand(x.shape), 2)
    ours, theirs = (getattr(module, f"{name}{dims}d")(x, *arguments) for module in (C, F))
    assert_close(ours, theirs, 1e-6, "unbatched")


@pytest.mark.parametrize("dims", DIMS)
def test_no_channels_where_torch_allows_it(dims: int) -> None:
    x = torch.rand(2, 0, *(6,) * dims)
    calls = [("adaptive_avg_pool", x[0]), ("adaptive_max_pool", x[0])]
    calls += [("adaptive_avg_pool", x)] if dims < 3 else []
    for name, empty in calls:
        ours, theirs = (getattr(module, f"{name}{dims}d")(empty, 2) for module in (C, F))
        assert ours.shape == theirs.shape


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["adaptive_avg_pool2d", "adaptive_max_pool2d"])
def test_an_output_of_nothing(name: str, engine: str) -> None:
    x = torch.rand(2, 3, 4, 5, device=device_of(engine), requires_grad=True)
    with cnnops.engine(engine):
        y = getattr(C, name)(x, (0, 2))
    (grad_x,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert y.shape == (2, 3, 0, 2) and not grad_x.any()


def test_dtypes_that_no_kernel_takes() -> None:
    """PyTorch's own functions take them, or say why not; `cnnops.fallback` decides whether they may."""
    x = torch.arange(64, dtype=torch.int32).view(1, 1, 4, 4, 4)
    with pytest.raises(cnnops.UnsupportedError):
        C.max_pool3d(x, 2)
    with cnnops.fallback("silent"):
        ours, theirs = (module.max_pool3d(x, 2, return_indices=True) for module in (C, F))
        assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])
        for name, arguments in {
            "max_unpool3d": (x.long(), 2), "adaptive_max_pool3d": (2,), "adaptive_avg_pool3d": (2,),
            "avg_pool3d": (2,), "lp_pool3d": (2, 2),
        }.items():  # fmt: skip
            for module in (F, C):
                with pytest.raises(NotImplementedError, match="not implemented for 'Int'"):
                    getattr(module, name)(x, *arguments)


@pytest.mark.parametrize("dims", DIMS)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiled_without_a_graph_break(dims: int, dynamic: bool) -> None:
    torch._dynamo.reset()
    maxima, unpool, average, to_average, to_maxima, power = (
        getattr(C, f"{name}{dims}d") for name in FAMILIES
    )

    def network(x: Tensor) -> Tensor:
        y, indices = maxima(x, 3, 2, return_indices=True)
        y = unpool(power(y.exp(), 2.0, 1), indices, 3, 2, output_size=x.shape)
        return to_average(average(to_maxima(y, 5), 2, 1), 3).square().sum()

    compiled = torch.compile(network, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    x = torch.randn(2, 3, *(9,) * dims, requires_grad=True)
    results = [(y, *torch.autograd.grad(y, x)) for y in (network(x), compiled(x))]
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_operations_pass_opcheck() -> None:
    x = torch.randn(2, 3, 5, 7)
    adaptive = ([], [], [], [], False, [3, 4], "cpu")
    y, offsets = ops.max_pool_fwd(x, *adaptive)
    indices = torch.arange(35).view(1, 1, 5, 7).expand(x.shape).contiguous()
    for name, arguments in {
        "max_pool_fwd": (x, *adaptive),
        "max_pool_bwd": (y, offsets, x.shape[2:], False, *adaptive),
        "max_pool_gather": (x, offsets, *adaptive),
        "max_pool_indices": (offsets, x.shape[2:], *adaptive[:-1]),
        "max_unpool_fwd": (x, indices, [10, 14], "cpu"),
        "max_unpool_bwd": (torch.randn(2, 3, 10, 14), indices, "cpu"),
    }.items():
        torch.library.opcheck(getattr(torch.ops.cnnops, name).default, arguments)


# ---- mistakes -------------------------------------------------------------------------------------------


def mistakes(dims: int) -> list[tuple[str, str, tuple[Any, ...], dict[str, Any]]]:
    """Calls that PyTorch refuses: a name, the family, arguments."""
    x = torch.ones(2, 4, *(8,) * dims)
    p = torch.ones(2, 4, *(4,) * dims)
    i = torch.arange(4**dims).view((4,) * dims).expand(p.shape).contiguous()
    long, ints, floats = (2,) * (dims + 1), (2,) * dims, (2.0,) * dims
    window: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
        ("too_many_dimensions", (x[None], 2), {}),
        ("no_channels", (x[:, :0], 2), {}),
        ("unbatched_no_channels", (x[0, :0], 2), {}),
        ("empty_plane", (x[..., :0], 2), {}),
        ("empty_plane_padded", (x[..., :0], 2, 2, 1), {}),
        ("kernel_0", (x, 0), {}),
        ("kernel_negative", (x, -1), {}),
        ("kernel_beyond_input", (x, 9), {}),
        ("kernel_too_long", (x, long), {}),
        ("kernel_empty", (x, ()), {}),
        ("kernel_float", (x, 2.5), {}),
        ("kernel_none", (x, None), {}),
        ("stride_0", (x, 2, 0), {}),
        ("stride_negative", (x, 2, -1), {}),
        ("stride_too_long", (x, 2, long), {}),
        ("stride_text", (x, 2, "2"), {}),
        ("padding_negative", (x, 2, 2, -1), {}),
        ("padding_beyond_half", (x, 3, 2, 2), {}),
        ("padding_too_long", (x, 2, 2, (1,) * (dims + 1)), {}),
        ("padding_empty", (x, 2, 2, ()), {}),
        ("ceil_mode_int", (x, 2), {"ceil_mode": 1}),
        ("ceil_mode_none", (x, 2), {"ceil_mode": None}),
        ("array", (np.ones(x.shape), 2), {}),
    ]
    adaptive: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
        ("dimensions", (x[0, 0], 2), {}),
        ("too_many_dimensions", (x[None], 2), {}),
        ("empty_plane", (x[..., :0], 2), {}),
        ("empty_plane_of_no_image", (x[:0, ..., :0], 2), {}),
        ("size_negative", (x, -1), {}),
        ("size_too_long", (x, long), {}),
        ("size_empty", (x, ()), {}),
        ("size_float", (x, 1.5), {}),
        ("size_floats", (x, floats), {}),
        ("size_none", (x, None), {}),
        ("size_bool", (x, True), {}),
        ("size_text", (x, "2"), {}),
        ("array", (np.ones(x.shape), 2), {}),
    ]
    unpool: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
        ("dimensions", (p[0, 0], i[0, 0], 2), {}),
        ("too_many_dimensions", (p[None], i[None], 2), {}),
        ("no_channels", (p[:, :0], i[:, :0], 2), {}),
        ("empty_plane", (p[..., :0], i[..., :0], 2), {}),
        ("indices_int32", (p, i.int(), 2), {}),
        ("indices_float", (p, i.float(), 2), {}),
        ("indices_size", (p, i[..., :2], 2), {}),
        ("indices_of_one_image", (p, i[:1], 2), {}),
        ("indices_device", (p, i.to("meta"), 2), {}),
        ("kernel_negative", (p, i, -2), {}),
        ("kernel_float", (p, i, 2.0), {}),
        ("kernel_too_short", (p, i, (2,) * (dims - 1)), {}),
        ("kernel_none", (p, i, None), {}),
        ("stride_negative", (p, i, 2, -1), {}),
        ("stride_0_with_size", (p, i, 2, 0), {"output_size": (8,) * dims}),
        ("padding_beyond", (p, i, 2, 2, 20), {}),
        ("padding_none", (p, i, 2, 2, None), {}),
        ("size_too_small", (p, i, 2), {"output_size": (6,) * dims}),
        ("size_too_large", (p, i, 2), {"output_size": (10,) * dims}),
        ("size_negative", (p, i, 2), {"output_size": (-8,) * dims}),
        ("size_too_long", (p, i, 2), {"output_size": (8,) * (dims + 1)}),
        ("size_too_short", (p, i, 2), {"output_size": (8,) * (dims - 1)}),
        ("size_int", (p, i, 2), {"output_size": 8}),
        ("size_floats", (p, i, 2), {"output_size": (7.5,) * dims}),
        ("array", (np.ones(p.shape), i, 2), {}),
    ]
    power: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
        ("too_many_dimensions", (x[None], 2, 2), {}),
        ("no_channels", (x[:, :0], 2, 2), {}),
        ("norm_0", (x, 0, 2), {}),
        ("norm_text", (x, "2", 2), {}),
        ("norm_none", (x, None, 2), {}),
        ("kernel_0", (x, 2, 0), {}),
        ("kernel_too_long", (x, 2, long), {}),
        ("kernel_empty", (x, 2, ()), {}),
        ("kernel_of_one_axis", (x, 2, (2,)), {}),
        ("kernel_float", (x, 2, 2.5), {}),
        ("kernel_none", (x, 2, None), {}),
        ("kernel_beyond_input", (x, 2, 9), {}),
        ("stride_0", (x, 2, 2, 0), {}),
        ("ceil_mode_int", (x, 2, 2), {"ceil_mode": 1}),
    ]
    found = [("max_pool", *m) for m in window] + [("avg_pool", *m) for m in window]
    found += [("adaptive_avg_pool", *m) for m in adaptive]
    found += [("adaptive_max_pool", *m) for m in adaptive]
    found += [("max_unpool", *m) for m in unpool] + [("lp_pool", *m) for m in power]
    found += [
        ("max_pool", "dilation_0", (x, 2), {"dilation": 0}),
        ("max_pool", "dilation_too_long", (x, 2), {"dilation": long}),
        ("max_pool", "dilated_beyond_input", (x, 2, 1, 0, 9), {}),
        ("max_pool", "padding_beyond_half_dilated", (x, 2, 1, 2, 3), {}),
        ("avg_pool", "count_include_pad_text", (x, 2), {"count_include_pad": "no"}),
        ("adaptive_max_pool", "no_channels", (x[:, :0], 2), {}),
    ]
    if dims == 1:
        found += [("adaptive_max_pool", "size_of_none", (x, (None,)), {})]
        found += [("adaptive_avg_pool", "size_of_none", (x, (None,)), {})]
    else:
        found += [("avg_pool", "divisor_0", (x, 2), {"divisor_override": 0})]
        found += [("avg_pool", "divisor_float", (x, 2), {"divisor_override": 2.5})]
    if dims == 3:
        found += [
            ("avg_pool", "smaller_than_kernel", (x[..., :2], 4, 1, 2), {}),
            ("avg_pool", "smaller_than_kernel_rounded_up", (x[..., :2], 3), {"ceil_mode": True}),
            ("lp_pool", "smaller_than_kernel", (x[..., :1], 2, ints), {"ceil_mode": True}),
            ("adaptive_avg_pool", "no_channels", (x[:, :0], 2), {}),
            ("max_unpool", "stride_0", (p, i, 2, 0), {}),
        ]
    return found


@pytest.mark.parametrize(
    "function, args, kwargs",
    [
        pytest.param(f"{family}{dims}d", args, kwargs, id=f"{family}{dims}d-{name}")
        for dims in DIMS
        for family, name, args, kwargs in mistakes(dims)
    ],
)
def test_mistakes(
    function: str, args: tuple[Any, ...], kwargs: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch's type of exception, and no kernel is chosen."""
    with pytest.raises(Exception) as theirs:  # noqa: PT011
        getattr(F, function)(*args, **kwargs)
    monkeypatch.setattr(registry, "choose", lambda *_: pytest.fail("a kernel was chosen"))
    expected = TypeError if theirs.type is AttributeError else theirs.type
    with pytest.raises(expected, match="expected .*got"):
        getattr(C, function)(*args, **kwargs)


def test_what_torch_takes_beside_its_refusals() -> None:
    """The same arguments that one function refuses are right for its neighbours."""
    small = torch.rand(1, 2, 8, 8, 2)
    for module in (C, F):
        assert module.max_pool3d(small, 4, 1, 2).shape == (1, 2, 9, 9, 3)
        assert module.avg_pool2d(small[0], 4, 1, 2).shape == (2, 8, 9, 3)
        assert module.avg_pool3d(small, (4, 4, 2), 1, 1).shape == (1, 2, 7, 7, 3)

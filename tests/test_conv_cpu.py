"""Convolution in two engines, below all operators: every padding mode, crops, and convolution transposed.

Results are filled with NaN before, so that a place that nobody writes is found. References are PyTorch's, in
float64, gradients by its autograd.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import ALL, TOLERANCE, assert_close, laid_out, normal
from cases.base import Size
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

import cnnops.aten
import cnnops.cpu.conv
from cnnops.cpu import conv_blocks, conv_rows, simd
from cnnops.cpu.conv_axes import is_framed
from cnnops.cpu.task import Task, unpack
from cnnops.cpu.task import layout as layout_of
from cnnops.epilogue import ACTIVATIONS as ORDER
from cnnops.epilogue import Epilogue
from cnnops.shapes import PADDING_MODES, ConvShape

ENGINES = {"cpu": cnnops.cpu.conv, "aten": cnnops.aten}
LAYOUTS = ("contiguous", "channels_last", "sliced", "expanded", "offset")
MODES = [mode for mode in PADDING_MODES if mode != "zeros"]

CONV = (F.conv1d, F.conv2d, F.conv3d)
TRANSPOSED = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)

every_engine = pytest.mark.parametrize("engine", ENGINES.values(), ids=ENGINES)
every_dtype = pytest.mark.parametrize("dtype", ALL, ids=str)
every_mode = pytest.mark.parametrize("mode", MODES)
every_layout = pytest.mark.parametrize("layout", LAYOUTS)


def given_shapes(most: int, shapes: st.SearchStrategy[Any]) -> Any:
    """So many examples: a shape, an element type and the layouts of two tensors."""
    run = settings(max_examples=most, database=None, phases=[Phase.generate])
    layout = st.sampled_from(LAYOUTS)
    arguments = given(problem=shapes, dtype=st.sampled_from(ALL), layouts=st.tuples(layout, layout))
    return lambda function: run(arguments(function))


def result(size: Size, dtype: torch.dtype, layout: str = "contiguous") -> Tensor:
    """Where an engine is to write, in one of the layouts that PyTorch gives results."""
    layout = "channels_last" if layout == "channels_last" else "contiguous"
    return laid_out(size, layout, lambda s: torch.full(s, torch.nan, dtype=dtype))


def pad(shape: ConvShape, x: Tensor) -> Tensor:
    sides = [p for pair in reversed(shape.padding) for p in pair]
    mode = "constant" if shape.padding_mode == "zeros" else shape.padding_mode
    return F.pad(x, sides, mode) if any(sides) else x


def check(
    engine: ModuleType, shape: ConvShape, dtype: torch.dtype, layouts: tuple[str, str]
) -> None:
    """All passes of one convolution; the layouts are those of x and grad_y."""
    x, grad_y = (
        laid_out(size, layout, normal(seed, dtype))
        for seed, (size, layout) in enumerate(
            zip((shape.x_size, shape.y_size), layouts, strict=True)
        )
    )
    w, bias = normal(2, dtype)(shape.w_size), normal(3, dtype)((shape.K,))
    leaves = [t.to(torch.float64, copy=True).requires_grad_() for t in (x, w, bias)]
    padded = pad(shape, leaves[0])
    reference = CONV[shape.dims - 1](
        padded, *leaves[1:], shape.stride, 0, shape.dilation, shape.groups
    )
    to_padded, to_x, to_w, to_bias = torch.autograd.grad(
        reference, (padded, *leaves), grad_y.double(), retain_graph=True
    )
    output, gradient = TOLERANCE[dtype]

    y = result(shape.y_size, dtype, layouts[0])
    engine.conv_fprop(shape, x, w, bias, y)
    assert_close(y, reference, output, f"y of {shape}")

    grad_w = result(shape.w_size, dtype)
    engine.conv_wgrad(shape, grad_y, x, grad_w)
    assert_close(grad_w, to_w, gradient, f"grad_w of {shape}")

    grad_bias = result((shape.K,), dtype)
    engine.conv_bgrad(shape, grad_y, grad_bias)
    assert_close(grad_bias, to_bias, gradient, f"grad_bias of {shape}")

    grad_x = result(shape.x_size, dtype, layouts[0])
    if shape.padding_mode == "zeros":
        engine.conv_dgrad(shape, grad_y, w, None, grad_x)
    else:
        grad_padded = result(shape.padded.x_size, dtype, layouts[0])
        engine.conv_dgrad(shape.padded, grad_y, w, None, grad_padded)
        assert_close(grad_padded, to_padded, gradient, f"grad_x of {shape.padded}")
        engine.conv_fold(shape, grad_padded, grad_x)
        (to_x,) = torch.autograd.grad(padded, leaves[0], grad_padded.double())
    assert_close(grad_x, to_x, gradient, f"grad_x of {shape}")


def check_transposed(
    engine: ModuleType, shape: ConvShape, arguments: dict[str, Any], dtype: torch.dtype,
    layouts: tuple[str, str],
) -> None:  # fmt: skip
    """Convolution transposed, and its gradients, which are a forward pass and a weight gradient. The layouts
    are those of its input and of its result's gradient."""
    x, grad = (
        laid_out(size, layout, normal(seed, dtype))
        for seed, (size, layout) in enumerate(
            zip((shape.y_size, shape.x_size), layouts, strict=True)
        )
    )
    w, every_second = normal(2, dtype)(shape.w_size), normal(3, dtype)((2 * shape.C,))[::2]
    leaves = [t.to(torch.float64, copy=True).requires_grad_() for t in (x, w)]
    function = TRANSPOSED[shape.dims - 1]
    reference = function(*leaves, every_second.double(), **arguments)
    to_x, to_w = torch.autograd.grad(reference, leaves, grad.double())
    output, gradient = TOLERANCE[dtype]

    for bias in (every_second, None):
        y = result(shape.x_size, dtype, layouts[0])
        engine.conv_dgrad(shape, x, w, bias, y)
        theirs = reference if bias is not None else function(*leaves, **arguments)
        assert_close(y, theirs, output, f"y of {arguments}, bias {bias is not None}")

    grad_x = result(shape.y_size, dtype, layouts[0])
    engine.conv_fprop(shape, grad, w, None, grad_x)
    assert_close(grad_x, to_x, gradient, f"grad_x of {arguments}")

    grad_w = result(shape.w_size, dtype)
    engine.conv_wgrad(shape, x, grad, grad_w)
    assert_close(grad_w, to_w, gradient, f"grad_w of {arguments}")


# ---- rows -----------------------------------------------------------------------------------------------


@every_layout
@every_dtype
@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("mode", PADDING_MODES)
@every_engine
def test_modes(engine: ModuleType, mode: str, dims: int, dtype: torch.dtype, layout: str) -> None:
    """Other padding on every side, other strides and dilations along every axis, two groups."""
    padding = ((3, 2), (0, 4), (2, 1))[3 - dims :]
    shape = ConvShape.of(
        (3, 4, *(4, 5, 6)[3 - dims :]), (6, 2, *(2, 3, 3)[3 - dims :]), None, (1, 2, 1)[3 - dims :], padding,
        (2, 1, 2)[3 - dims :], 2, mode,
    )  # fmt: skip
    check(engine, shape, dtype, (layout, layout))


@every_layout
@every_dtype
@pytest.mark.parametrize("dims", [1, 2, 3])
@every_engine
def test_transposed(engine: ModuleType, dims: int, dtype: torch.dtype, layout: str) -> None:
    """Output padding of two strides, which only a larger dilation allows, along every axis."""
    arguments = {"stride": 2, "padding": 1, "output_padding": 4, "dilation": 5, "groups": 2}
    shape = ConvShape.transposed(
        (2, 4, *(3, 4, 2)[:dims]), (4, 3, *(2, 3, 1)[:dims]), None, **arguments
    )
    assert all(pair == (1, -3) for pair in shape.padding)
    check_transposed(engine, shape, arguments, dtype, (layout, layout))


EDGES = {
    "all_of_the_axis": ((2, 3, 4, 5), (4, 3, 3, 3), {"padding": ((4, 4), (5, 5))}, ["circular"]),
    "all_but_the_edge": ((2, 3, 4, 5), (4, 3, 3, 3), {"padding": ((3, 3), (4, 4))}, ["reflect"]),
    "far_beyond_the_axis": ((2, 3, 2, 3), (4, 3, 3, 3), {"padding": ((9, 0), (0, 20))}, ["replicate"]),
    "one_value": ((2, 3, 1, 1), (4, 3, 3, 3), {"padding": 1}, ["replicate", "circular"]),
    "one_axis": ((2, 3, 6, 7), (4, 3, 3, 3), {"padding": (0, 2)}, MODES),
    "no_padding": ((2, 3, 6, 7), (4, 3, 3, 3), {}, MODES),
    "dense": ((5, 3, 4, 4), (7, 3, 4, 4), {}, MODES),
    "dense_but_padded": ((5, 3, 4, 4), (7, 3, 4, 4), {"padding": 1}, MODES),
    "long_rows": ((1, 2, 1000), (3, 2, 3), {"padding": 300}, MODES),
    "rows_joined": ((2, 16, 14, 14), (24, 16, 3, 3), {"padding": 1}, MODES),
    "images_side_by_side": ((7, 20, 4, 4), (20, 20, 3, 3), {"padding": 1}, MODES),
    "phases": ((3, 8, 15, 13), (8, 8, 5, 5), {"padding": 4, "stride": 3, "dilation": 2}, MODES),
    "depthwise": ((2, 40, 9, 8), (40, 1, 3, 3), {"padding": 2, "groups": 40}, MODES),
    "tiles": ((1, 70, 20, 21), (50, 70, 3, 3), {"padding": 5, "stride": 2}, MODES),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", EDGES)
@every_engine
def test_edges_of_the_modes(engine: ModuleType, name: str, dtype: torch.dtype) -> None:
    """The most padding that a mode takes, and shapes that reach every way of cutting the work."""
    x, w, arguments, modes = EDGES[name]
    for mode in modes:
        check(
            engine, ConvShape.of(x, w, **arguments, padding_mode=mode), dtype, ("contiguous",) * 2
        )


CROPS = [((-1, -1),), ((-1, 0),), ((0, -2),), ((-2, -1),), ((-3, 2),), ((4, -3),)]


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("padding", CROPS, ids=str)
@pytest.mark.parametrize("dims", [1, 2, 3])
@every_engine
def test_crops(engine: ModuleType, dims: int, padding: tuple[tuple[int, int]], stride: int) -> None:
    """Negative padding takes places away, which get no gradient."""
    shape = ConvShape.of(
        (2, 3, *(7, 8, 9)[:dims]), (4, 3, *(2, 3, 3)[:dims]), None, stride, padding * dims
    )
    check(engine, shape, torch.float64, ("contiguous", "contiguous"))


@every_dtype
@pytest.mark.parametrize("form", ["dense", "unreached", "cropped", "everywhere"])
@every_engine
def test_bias_of_the_input_gradient(engine: ModuleType, form: str, dtype: torch.dtype) -> None:
    """It comes to every place exactly once, also where no tap reaches and where the input is cropped."""
    x, w, arguments = {
        "dense": ((3, 4, 2, 3), (5, 4, 2, 3), {}),
        "unreached": ((2, 4, 8, 9), (5, 4, 2, 1), {"stride": 3}),
        "cropped": ((2, 4, 8, 9), (5, 4, 2, 2), {"padding": ((-2, 1), (0, -3))}),
        "everywhere": ((2, 4, 8, 9), (6, 2, 3, 3), {"padding": 1, "stride": 2, "groups": 2}),
    }[form]
    shape = ConvShape.of(x, w, **arguments)
    grad_y, filters, bias = (
        normal(i, dtype)(size) for i, size in enumerate((shape.y_size, w, (4,)))
    )
    leaf = torch.zeros(x, dtype=torch.float64, requires_grad=True)
    y = F.conv2d(pad(shape, leaf), filters.double(), None, shape.stride, groups=shape.groups)
    (reference,) = torch.autograd.grad(y, leaf, grad_y.double())
    grad_x = result(x, dtype)
    engine.conv_dgrad(shape, grad_y, filters, bias, grad_x)
    theirs = reference + bias.double().view(-1, 1, 1)
    assert_close(grad_x, theirs, TOLERANCE[dtype].gradient, form)
    # Nothing but the bias where nothing else comes to.
    alone = (reference == 0).all(1, keepdim=True).expand(x)
    assert torch.equal(grad_x[alone], bias.view(-1, 1, 1).expand(x)[alone])


@every_layout
@every_dtype
@pytest.mark.parametrize("dims", [1, 2, 3])
@every_mode
@every_engine
def test_fold(engine: ModuleType, mode: str, dims: int, dtype: torch.dtype, layout: str) -> None:
    """Padding's own gradient, also where reflected or repeated places meet each other."""
    for size, padding in itertools.product(((4, 5, 6), (3, 17, 40)), ((2, 1), (0, 2), (2, 2))):
        x = (2, 20, *size[:dims])
        shape = ConvShape.of(x, (1, 20, *(1,) * dims), padding=(padding,) * dims, padding_mode=mode)
        padded = laid_out(shape.padded.x_size, layout, normal(1, dtype))
        leaf = torch.zeros(x, dtype=torch.float64, requires_grad=True)
        (reference,) = torch.autograd.grad(pad(shape, leaf), leaf, padded.double())
        grad_x = result(x, dtype, layout)
        engine.conv_fold(shape, padded, grad_x)
        assert_close(grad_x, reference, TOLERANCE[dtype].output, f"fold of {shape}")


@every_engine
def test_fold_of_half_types_rounds_once(engine: ModuleType) -> None:
    """A one on either side of 256: added to it in bfloat16 one by one, both would be lost."""
    shape = ConvShape.of((1, 1, 2), (1, 1, 1), padding=2, padding_mode="circular")
    padded = torch.tensor([[[1, 1, 256, 256, 1, 1]]], dtype=torch.bfloat16)
    grad_x = result((1, 1, 2), torch.bfloat16)
    engine.conv_fold(shape, padded, grad_x)
    assert grad_x.tolist() == [[[258, 258]]]


@every_dtype
@pytest.mark.parametrize("dims", [1, 2, 3])
@every_engine
def test_bias_gradient_for_any_shape_with_that_output(
    engine: ModuleType, dims: int, dtype: torch.dtype
) -> None:
    size = (3, 5, *(4, 3, 6)[:dims])
    for w, arguments in (
        ((1,) * dims, {}),
        ((3,) * dims, {"padding": 1, "padding_mode": "reflect"}),
    ):
        shape = ConvShape.of((3, 2, *size[2:]), (5, 2, *w), **arguments)
        for layout in LAYOUTS:
            grad_y, grad_bias = laid_out(size, layout, normal(1, dtype)), result((5,), dtype)
            engine.conv_bgrad(shape, grad_y, grad_bias)
            theirs = grad_y.double().transpose(0, 1).flatten(1).sum(1)
            assert_close(grad_bias, theirs, TOLERANCE[dtype].gradient, layout)


# ---- laws -----------------------------------------------------------------------------------------------


def forget_plans() -> None:
    for plans in (conv_blocks._wgrad, conv_rows._fprop, conv_rows._dgrad):
        plans.cache_clear()


def pack_filters(monkeypatch: pytest.MonkeyPatch, here: bool) -> None:
    """Let `conv_rows` pack filters where they are used, or else once for all."""
    monkeypatch.setattr(conv_rows, "PACK_HERE", 0.0 if here else math.inf)
    forget_plans()


@pytest.fixture(params=["rows", "rows_packed_here", "inner", "outer"])
def products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """By rows, with filters packed for all or where they are used, or by blocks with inner or with outer
    products, whichever would be faster."""
    if request.param.startswith("rows"):
        pack_filters(monkeypatch, request.param == "rows_packed_here")

        def chosen(direction: Any, shape: ConvShape, *rest: Any) -> ModuleType:
            return conv_blocks if is_framed(shape) else conv_rows

    else:
        weighed = partial(conv_blocks._weigh_weights, forms=(request.param == "outer",))
        monkeypatch.setattr(conv_blocks, "_weigh_weights", weighed)

        def chosen(direction: Any, shape: ConvShape, *rest: Any) -> ModuleType:
            return conv_blocks

    monkeypatch.setattr(cnnops.cpu.conv, "_chosen", chosen)
    forget_plans()
    yield
    monkeypatch.undo()
    forget_plans()


FEW_PLACES: dict[str, tuple[Size, Size, dict[str, Any]]] = {
    "1x1": ((2, 300, 4, 3), (200, 300, 1, 1), {}),
    "1x1_of_many_slices": ((1, 1700, 3, 3), (90, 1700, 1, 1), {}),
    "3x3": ((1, 200, 5, 5), (150, 200, 3, 3), {"padding": 1}),
    "strided": ((1, 130, 7, 7), (75, 130, 3, 3), {"padding": 1, "stride": 2}),
    "grouped": ((2, 100, 4, 4), (210, 50, 3, 3), {"padding": 1, "groups": 2}),
    "3d": ((1, 40, 3, 4, 4), (30, 40, 3, 3, 3), {"padding": 1}),
}


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FEW_PLACES)
@pytest.mark.usefixtures("threads")
def test_filters_packed_where_they_are_used(
    name: str, dtype: torch.dtype, layout: str, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bits as with filters packed for all, in more pieces of a panel than one and with half a vector
    of filters left over."""
    torch.set_num_threads(count)
    x_size, w_size, arguments = FEW_PLACES[name]
    shape, values = ConvShape.of(x_size, w_size, **arguments), normal(7, dtype)
    x, w, grad_y = (laid_out(size, layout, values) for size in (x_size, w_size, shape.y_size))
    results = []
    for here in (True, False):
        pack_filters(monkeypatch, here)
        y, grad_x = result(shape.y_size, dtype, layout), result(x_size, dtype, layout)
        conv_rows.fprop(shape, x, w, None, y)
        conv_rows.dgrad(shape, grad_y, w, None, grad_x)
        plan = conv_rows._fprop(shape, dtype, x.stride(), w.stride(), y.stride(), count)
        assert (plan._pack is None) == here
        results.append((y, grad_x))
    monkeypatch.undo()
    forget_plans()
    for packed_here, packed_for_all in zip(*results, strict=True):
        assert torch.equal(packed_here, packed_for_all)
        assert packed_here.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", EDGES)
@pytest.mark.usefixtures("products")
def test_every_form(name: str, dtype: torch.dtype) -> None:
    """On every shape, also those that another form is faster on; with one split and with several."""
    x, w, arguments, modes = EDGES[name]
    for mode in ("zeros", *modes[:1]):
        shape = ConvShape.of(x, w, **arguments, padding_mode=mode)
        check(cnnops.cpu.conv, shape, dtype, ("contiguous", "sliced"))


def test_rows_of_more_than_any_number_of_equal_parts() -> None:
    shape = ConvShape.of((1, 8, 65_600), (8, 8, 3), padding=1)
    check(cnnops.cpu.conv, shape, torch.float32, ("contiguous", "contiguous"))


def test_float16_where_the_cpu_does_not_convert_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only blocks go through float32 as a whole."""
    conv = cnnops.cpu.conv
    monkeypatch.setattr(conv.vectors, "kind", lambda dtype: None)
    conv._chosen.cache_clear()
    for x, w, groups in (((1, 16, 8, 8), (16, 16, 3, 3), 1), ((1, 16, 8, 8), (16, 1, 3, 3), 16)):
        shape = ConvShape.of(x, w, padding=1, groups=groups)
        chosen = conv._chosen(
            "fprop", shape, torch.float16, True, (1024, 64, 8, 1), (1024, 64, 8, 1)
        )
        assert chosen is conv_blocks
    conv._chosen.cache_clear()


@pytest.fixture
def threads() -> Iterator[None]:
    former = torch.get_num_threads()
    yield
    torch.set_num_threads(former)


@every_mode
@pytest.mark.usefixtures("products", "threads")
def test_same_bits_for_any_number_of_threads(mode: str) -> None:
    shape = ConvShape.of((8, 20, 14, 14), (50, 20, 5, 5), padding=4, padding_mode=mode)
    x, grad_y, padded = map(torch.randn, (shape.x_size, shape.y_size, shape.padded.x_size))
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        y, grad_w, grad_x = map(torch.empty, (shape.y_size, shape.w_size, shape.x_size))
        cnnops.cpu.conv.conv_fprop(shape, x, torch.ones(shape.w_size), None, y)
        cnnops.cpu.conv.conv_wgrad(shape, grad_y, x, grad_w)
        cnnops.cpu.conv.conv_fold(shape, padded, grad_x)
        results.append((y, grad_w, grad_x))
    for others in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], others, strict=True))


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("K", [1, 20, 64, 515])
def test_bias_gradient_of_many_places(K: int, dtype: torch.dtype) -> None:
    """In either order of memory, in a slice of it, and expanded; the same bits for any number of threads."""
    shape = ConvShape.of((9, 1, 33, 35), (K, 1, 1, 1))
    wide = torch.randn(9, K, 35, 40).to(dtype)
    last = wide.to(memory_format=torch.channels_last)
    dense = wide[:, :, :33, :35].contiguous()
    for grad_y in (
        dense,
        dense.to(memory_format=torch.channels_last),
        wide[:, :, 2:, 5:],
        last[:, :, 2:, 5:],
        dense.transpose(2, 3).contiguous().transpose(2, 3),
        wide.repeat_interleave(2, 3)[:, :, 2:, 10::2],
        dense[:, :, :1, :1].expand(shape.y_size),
    ):
        found = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            grad_bias = torch.empty(K, dtype=dtype)
            cnnops.cpu.conv.conv_bgrad(shape, grad_y, grad_bias)
            found.append(grad_bias)
        assert all(torch.equal(found[0], other) for other in found[1:])
        expected = grad_y.double().sum((0, 2, 3))
        allowed = grad_y.double().abs().sum((0, 2, 3))
        allowed *= 1e-14 if dtype == torch.float64 else 1e-6
        if dtype == torch.bfloat16:
            allowed += 4e-3 * expected.abs()
        assert ((found[0].double() - expected).abs() <= allowed).all()


@pytest.mark.usefixtures("products")
@every_mode
def test_infinity_goes_where_the_padding_shows_it(mode: str) -> None:
    """Work is done on more places than are asked for: an infinity there must not reach other results."""
    x = torch.randn(3, 2, 6, 7)
    x[1, 0, 2, 1] = float("inf")
    shape = ConvShape.of(x.shape, (3, 2, 3, 3), padding=2, padding_mode=mode)
    w, grad_y = torch.rand(3, 2, 3, 3) + 1, torch.rand(shape.y_size) + 1
    y, grad_w = torch.empty(shape.y_size), torch.empty(shape.w_size)
    cnnops.cpu.conv.conv_fprop(shape, x, w, None, y)
    cnnops.cpu.conv.conv_wgrad(shape, grad_y, x, grad_w)
    padded = pad(shape, x)
    assert torch.equal(y.isinf(), F.conv2d(padded, w).isinf()) and not y.isnan().any()
    assert grad_w[:, 0].isinf().all() and grad_w[:, 1].isfinite().all()


@pytest.mark.usefixtures("products", "threads")
@pytest.mark.parametrize("mode", PADDING_MODES)
def test_what_another_call_left_in_memory_does_not_matter(mode: str) -> None:
    """Seven images in blocks of eight, rows of which vectors read more than there is."""
    torch.set_num_threads(1)
    shape = ConvShape.of((7, 20, 4, 5), (20, 20, 3, 3), padding=1, padding_mode=mode)
    x, w, grad_y = map(torch.randn, (shape.x_size, shape.w_size, shape.y_size))
    results = []
    for _ in range(2):
        y, grad_w = torch.empty(shape.y_size), torch.empty(shape.w_size)
        cnnops.cpu.conv.conv_fprop(shape, x, w, None, y)
        cnnops.cpu.conv.conv_wgrad(shape, grad_y, x, grad_w)
        results.append((y, grad_w))
        nan, y, grad_w = torch.full_like(x, torch.nan), y.clone(), grad_w.clone()
        cnnops.cpu.conv.conv_wgrad(shape, torch.full_like(grad_y, torch.nan), nan, grad_w)
        cnnops.cpu.conv.conv_fprop(shape, nan, w, None, y)
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


# ---- epilogues ------------------------------------------------------------------------------------------

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda z: z,
    "relu": F.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "gelu": F.gelu,
    "hardswish": F.hardswish,
    "leaky_relu": F.leaky_relu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}
every_activation = pytest.mark.parametrize("activation", ACTIVATIONS)

PATHS: dict[str, tuple[Size, Size, dict[str, Any]]] = {
    "direct": ((2, 20, 20, 21), (18, 20, 3, 3), {"padding": 1}),
    "1x1": ((2, 24, 15, 14), (40, 24, 1, 1), {}),
    "1x1_small_maps": ((5, 24, 7, 7), (40, 24, 1, 1), {}),
    "few_channels": ((2, 3, 17, 19), (2, 3, 3, 3), {"padding": 1}),
    "depthwise": ((2, 40, 9, 8), (40, 1, 3, 3), {"padding": 2, "groups": 40}),
    "grouped": ((3, 12, 9, 11), (14, 6, 3, 2), {"padding": 1, "groups": 2}),
    "strided": ((2, 8, 15, 13), (9, 8, 3, 3), {"padding": 1, "stride": 2}),
    "strided_beyond_the_kernel": ((2, 8, 15, 13), (9, 8, 2, 1), {"stride": 3}),
    "dense": ((5, 3, 4, 4), (7, 3, 4, 4), {}),
    "cropped": ((2, 4, 8, 9), (5, 4, 2, 2), {"padding": ((-2, 1), (0, -3))}),
    "many_terms": ((1, 300, 6, 6), (20, 300, 3, 3), {"padding": 1}),
    "images_side_by_side": ((7, 20, 4, 4), (20, 20, 3, 3), {"padding": 1}),
    "1d": ((2, 5, 700), (6, 5, 3), {"padding": 1}),
    "3d": ((2, 4, 5, 6, 7), (6, 4, 2, 3, 3), {"padding": 1, "stride": (1, 2, 1)}),
    "reflected": ((2, 6, 9, 10), (8, 6, 3, 3), {"padding": 1, "padding_mode": "reflect"}),
}
PARTS = ("scale", "bias", "residual", "activation")
COMBINATIONS = [*((part,) for part in PARTS), ("scale", "residual"), PARTS]
both_layouts = pytest.mark.parametrize("layout", ["contiguous", "channels_last"])


def correlated(
    direction: str, shape: ConvShape, dtype: torch.dtype, layout: str
) -> tuple[Callable[..., None], Tensor, Size]:
    """A pass to be called with (bias, result, epilogue), its sums in float64, and its result's size."""
    forward = direction == "fprop"
    sizes = (shape.x_size, shape.y_size)[:: 1 if forward else -1]
    x, w = laid_out(sizes[0], layout, normal(0, dtype)), normal(1, dtype)(shape.w_size)
    arguments = (shape.stride, 0, shape.dilation, shape.groups)
    convolve = CONV[shape.dims - 1]
    if forward:
        reference = convolve(pad(shape, x.double()), w.double(), None, *arguments)
    else:
        leaf = torch.zeros(shape.x_size, dtype=torch.float64, requires_grad=True)
        y = convolve(pad(shape, leaf), w.double(), None, *arguments)
        (reference,) = torch.autograd.grad(y, leaf, x.double())
    conv = cnnops.cpu.conv
    return (
        partial(conv.conv_fprop if forward else conv.conv_dgrad, shape, x, w),
        reference,
        sizes[1],
    )


def per_channel(t: Tensor, like: Tensor) -> Tensor:
    return t.view(-1, *(1,) * (like.dim() - 2))


@every_dtype
@both_layouts
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("direction", ["fprop", "dgrad"])
def test_epilogue(direction: str, path: str, layout: str, dtype: torch.dtype) -> None:
    """Every part alone, and together; half types are rounded once, behind all of it."""
    x, w, arguments = PATHS[path]
    shape = ConvShape.of(x, w, **arguments)
    if direction == "dgrad":
        shape = shape.padded
    run, sums, size = correlated(direction, shape, dtype, layout)
    scale, bias = normal(2, dtype)((size[1],)), normal(3, dtype)((size[1],))
    residual = laid_out(size, layout, normal(4, dtype))
    kept = residual.clone()
    for parts, activation in itertools.product(COMBINATIONS, ("silu", "relu")):
        reference, epilogue = sums, Epilogue()
        if "scale" in parts:
            reference = reference * per_channel(scale.double(), sums)
            epilogue = epilogue._replace(scale=scale)
        if "bias" in parts:
            reference = reference + per_channel(bias.double(), sums)
        if "residual" in parts:
            reference = reference + residual.double()
            epilogue = epilogue._replace(residual=residual)
        if "activation" in parts:
            reference = ACTIVATIONS[activation](reference)
            epilogue = epilogue._replace(activation=activation)
        y = result(size, dtype, layout)
        run(bias if "bias" in parts else None, y, epilogue)
        assert_close(y, reference, TOLERANCE[dtype].output, f"{path}: {parts}")
        assert torch.equal(residual, kept)


@both_layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("direction", ["fprop", "dgrad"])
def test_epilogue_leaves_the_sums_as_they_are(
    direction: str, path: str, dtype: torch.dtype, layout: str
) -> None:
    """What rounds nothing more gives the bits of a convolution and PyTorch's operations behind it."""
    x, w, arguments = PATHS[path]
    shape = ConvShape.of(x, w, **arguments)
    if direction == "dgrad":
        shape = shape.padded
    run, _, size = correlated(direction, shape, dtype, layout)
    bias, ones = normal(3, dtype)((size[1],)), torch.ones(size[1], dtype=dtype)
    residual = laid_out(size, layout, normal(4, dtype))
    plain, same = result(size, dtype, layout), result(size, dtype, layout)
    run(bias, plain)
    for epilogue, expected in (
        (Epilogue(), plain),
        (Epilogue(scale=ones), plain),
        (Epilogue(activation="relu"), plain.relu()),
        (Epilogue(residual=residual), plain + residual),
        (Epilogue(ones, residual, "relu6"), F.relu6(plain + residual)),
    ):
        same.fill_(torch.nan)
        run(bias, same, epilogue)
        assert torch.equal(same, expected), epilogue


def values_to_activate(dtype: torch.dtype) -> Tensor:
    """From the smallest to the largest that matter, then zeros, infinities and NaN."""
    special = torch.tensor([0.0, -0.0, 3, -3, 6, torch.inf, -torch.inf, torch.nan], dtype=dtype)
    magnitudes = 10 ** torch.linspace(-8, 3, 400, dtype=torch.float64)
    return torch.cat([magnitudes.to(dtype), -magnitudes.to(dtype), special])


@every_dtype
@every_activation
@pytest.mark.parametrize("form", ["rows", "apart", "residual"])
def test_activations(form: str, activation: str, dtype: torch.dtype) -> None:
    """Each value is right by itself, NaN and infinities included: a convolution by 1 shows them."""
    z = values_to_activate(dtype)
    shape = ConvShape.of((1, 1, 1, z.numel()), (1, 1, 1, 1))
    x, epilogue = z.view(shape.x_size), Epilogue(activation=activation)
    y = torch.full_like(x, torch.nan)
    if form == "apart":
        y = y.new_empty(1, 1, 1, z.numel(), 2)[..., 0]
    elif form == "residual":
        x, epilogue = torch.zeros_like(x), epilogue._replace(residual=x)
    cnnops.cpu.conv.conv_fprop(shape, x, torch.ones(shape.w_size, dtype=dtype), None, y, epilogue)
    ours, theirs = y.flatten().double(), ACTIVATIONS[activation](z.double())
    assert torch.equal(ours.isnan(), theirs.isnan()) and torch.equal(ours.isinf(), theirs.isinf())
    near = theirs.isfinite()
    # 1 + erf is exact next to 1 only, in float64, as it is in PyTorch.
    size = theirs.abs() if activation != "gelu" else z.double().abs()
    smallest = torch.finfo(dtype).tiny / torch.finfo(dtype).eps
    limit = 4 * torch.finfo(dtype).eps * size[near] + smallest
    assert ((ours - theirs)[near].abs() <= limit).all()


@both_layouts
@every_dtype
@pytest.mark.parametrize("kind", [torch.nan, torch.inf, -torch.inf])
@every_activation
def test_epilogue_passes_on_what_is_not_finite(
    activation: str, kind: float, dtype: torch.dtype, layout: str
) -> None:
    """From the input, a scale, a bias or the residual, to the places where it belongs and to no others."""
    shape = ConvShape.of((2, 3, 6, 7), (4, 3, 3, 3), padding=1)
    for place in ("x", "scale", "bias", "residual"):
        x, residual = (
            laid_out(size, layout, normal(i, dtype))
            for i, size in enumerate((shape.x_size, shape.y_size))
        )
        w, scale, bias = (
            normal(i + 2, dtype)(size) for i, size in enumerate((shape.w_size, (4,), (4,)))
        )
        tensor = {"x": x, "scale": scale, "bias": bias, "residual": residual}[place]
        tensor[(1,) * tensor.dim()] = kind
        y = result(shape.y_size, dtype, layout)
        epilogue = Epilogue(scale, residual, activation)
        cnnops.cpu.conv.conv_fprop(shape, x, w, bias, y, epilogue)
        sums = F.conv2d(x.double(), w.double(), padding=1)
        z = sums * per_channel(scale.double(), sums) + per_channel(bias.double(), sums)
        reference = ACTIVATIONS[activation](z + residual.double())
        assert not reference.isnan().all()
        assert_close(y, reference, 2 * TOLERANCE[dtype].output, f"{kind} in {place}")


@both_layouts
@every_dtype
@pytest.mark.parametrize("far", [False, True])
@pytest.mark.parametrize("path", ["direct", "1x1_small_maps", "dense", "1d"])
def test_moments_of_what_is_stored(path: str, far: bool, dtype: torch.dtype, layout: str) -> None:
    """Also where the mean is 100 and the deviation 0.01: then of the values as they were rounded."""
    x, w, arguments = PATHS[path]
    shape = ConvShape.of(x, w, **arguments)
    run, _, size = correlated("fprop", shape, dtype, layout)
    y = result(size, dtype, layout)
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    mean, var = torch.full((2, size[1]), torch.nan, dtype=accumulator)
    residual, activation = None, "silu"
    if far:
        residual = laid_out(
            size, layout, lambda s: (normal(4, torch.float64)(s) / 100 + 100).to(dtype)
        )
        activation = "relu"
    scale = torch.full((size[1],), 1e-4 if far else 1.0, dtype=dtype)
    run(None, y, Epilogue(scale, residual, activation, mean, var))
    channels = y.double().transpose(0, 1).flatten(1)
    limit = 1e-10 if dtype == torch.float64 else 1e-6
    assert_close(mean, channels.mean(1), limit, "mean")
    assert_close(var, channels.var(1, correction=0), limit, "var")
    without = result(size, dtype, layout)
    run(None, without, Epilogue(scale, residual, activation))
    assert torch.equal(y, without)


@pytest.mark.usefixtures("threads")
@both_layouts
def test_epilogue_has_the_same_bits_for_any_number_of_threads(layout: str) -> None:
    shape = ConvShape.of((8, 20, 14, 14), (50, 20, 5, 5), padding=2, stride=2)
    for direction in ("fprop", "dgrad"):
        run, _, size = correlated(direction, shape, torch.float32, layout)
        residual = laid_out(size, layout, normal(4, torch.float32))
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            y, mean, var = result(size, torch.float32, layout), *torch.zeros(2, size[1])
            moments = (mean, var) if direction == "fprop" else ()
            run(None, y, Epilogue(torch.rand(size[1]).fill_(0.3), residual, "gelu", *moments))
            results.append((y, mean, var))
        for others in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], others, strict=True))


@lru_cache(None)
def finish(T: str, L: int) -> Task:
    args = layout_of(f"{T}**5 int64*3")

    def test_finish(address: int, index: int, scratch: int) -> None:
        to, source, residual, scale, shift, count, activation, following = unpack(address, args)
        simd.finish(L, to, source, residual, count, scale[0], shift[0], activation, following)

    return Task(test_finish, args)


@every_activation
@pytest.mark.parametrize("T", ["float32", "float64"])
@pytest.mark.parametrize("bits", simd.WIDTHS)
def test_finish_at_every_width(bits: int, T: str, activation: str) -> None:
    """Exactly the elements asked for are written, with and without a residual."""
    dtype = getattr(torch, T)
    L = bits // (8 * dtype.itemsize)
    scale, shift = (torch.tensor([v], dtype=dtype) for v in (0.7, -0.2))
    for count in (0, 1, L - 1, L, 2 * L + 3):
        source, residual = (normal(i, dtype)((count + 1,)) for i in range(2))
        for beside in (None, residual):
            to = torch.full((count + L,), 7, dtype=dtype)
            finish(T, L).run(
                1, 0, to.data_ptr(), source.data_ptr(), 0 if beside is None else beside.data_ptr(),
                scale.data_ptr(), shift.data_ptr(), count, ORDER.index(activation), 64,
            )  # fmt: skip
            z = source.double() * scale.double() + shift.double()
            z = z if beside is None else z + beside.double()
            theirs = ACTIVATIONS[activation](z)[:count]
            limit = 4 * torch.finfo(dtype).eps
            assert (to[:count].double() - theirs).abs().le(limit * (1 + theirs.abs())).all()
            assert (to[count:] == 7).all()


# ---- random shapes --------------------------------------------------------------------------------------


def ints(least: int, most: int) -> st.SearchStrategy[int]:
    return st.integers(least, most)


@st.composite
def convolutions(draw: st.DrawFn) -> ConvShape:
    dims, mode = draw(ints(1, 3)), draw(st.sampled_from(PADDING_MODES))
    groups, stride, dilation, kernel = (
        draw(ints(1, 3)),
        *([draw(ints(1, 3)) for _ in range(dims)] for _ in range(3)),
    )
    spatial, padding = [], []
    for r, k in zip(dilation, kernel, strict=True):
        size = draw(ints(1, 8))
        most = {"reflect": size - 1, "circular": size}.get(mode, 5)
        # Zeros may be a crop, but not of more than there is.
        least = -min(3, (size - 1) // 2) if mode == "zeros" else 0
        before, after = (draw(ints(min(least, most), most)) for _ in range(2))
        size += max(0, r * (k - 1) + 1 - size - before - after)
        spatial.append(size)
        padding.append((before, after))
    x = (draw(ints(1, 5)), groups * draw(ints(1, 7)), *spatial)
    w = (groups * draw(ints(1, 7)), x[1] // groups, *kernel)
    return ConvShape.of(x, w, None, stride, padding, dilation, groups, mode)


@given_shapes(300, convolutions())
def test_random_shapes(problem: ConvShape, dtype: torch.dtype, layouts: tuple[str, str]) -> None:
    for engine in ENGINES.values():
        check(engine, problem, dtype, layouts)


@st.composite
def transposed(draw: st.DrawFn) -> tuple[ConvShape, dict[str, Any]]:
    dims, groups = draw(ints(1, 3)), draw(ints(1, 3))
    places, kernel, stride, dilation = (
        [draw(ints(1, most)) for _ in range(dims)] for most in (6, 3, 3, 4)
    )
    reach = [
        (p - 1) * s + r * (k - 1)
        for p, k, s, r in zip(places, kernel, stride, dilation, strict=True)
    ]
    arguments = {
        "stride": tuple(stride),
        "padding": tuple(draw(ints(0, min(4, n // 2))) for n in reach),
        "output_padding": tuple(
            draw(ints(0, max(s, r) - 1)) for s, r in zip(stride, dilation, strict=True)
        ),
        "groups": groups,
        "dilation": tuple(dilation),
    }
    x = (draw(ints(1, 5)), groups * draw(ints(1, 7)), *places)
    w = (x[1], draw(ints(1, 7)), *kernel)
    return ConvShape.transposed(x, w, None, **arguments), arguments


@given_shapes(200, transposed())
def test_random_transposed(
    problem: tuple[ConvShape, dict[str, Any]], dtype: torch.dtype, layouts: tuple[str, str]
) -> None:
    for engine in ENGINES.values():
        check_transposed(engine, *problem, dtype, layouts)

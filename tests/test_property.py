"""The whole argument space against PyTorch: problems that nobody thought of, the same ones in every run.

Each is a row as in `cases`, made up by hypothesis: output and every gradient are compared with PyTorch in
float64, and what PyTorch refuses must be refused with the same type of exception. In engine "cpu"
everything varies. Under the emulator every new set of compile-time constants costs seconds of g++, so there
the arguments come from a few sets, and sizes, layouts and values vary.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cases import ALL, Case, ConvCase, NormCase, PoolCase, check, needs_emulator, run
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import cnnops
from cnnops.shapes import PoolShape

LAYOUTS = ("contiguous", "channels_last", "sliced", "transposed", "expanded", "offset")
GRADS = ("like", "contiguous", "expanded")
DTYPES = st.sampled_from((torch.float64, *ALL))


def agrees(case: Case, engine: str, dtype: torch.dtype, slack: float = 1) -> None:
    """`check`, or the same refusal."""
    tensors = [t.double() for t in case.tensors(dtype)]
    try:
        run(case.theirs, tensors, case.grad)
    except (RuntimeError, ValueError, TypeError) as error:
        with cnnops.engine(engine), pytest.raises(type(error)):
            run(case.ours, tensors, case.grad)
        return
    check(case, engine, dtype, slack)


def per_axis(dims: int, values: st.SearchStrategy[int]) -> st.SearchStrategy[tuple[int, ...]]:
    return st.tuples(*[values] * dims)


# ---- convolution ----------------------------------------------------------------------------------------


@st.composite
def convolutions(draw: st.DrawFn, transposed: bool) -> ConvCase:
    """Any convolution that fits into some thousand multiply-adds, and some that fit nowhere."""
    dims, groups = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    small = st.integers(1, 4 if dims < 3 else 3)
    kernel = draw(per_axis(dims, small))
    stride, dilation = (
        draw(per_axis(dims, st.integers(1, 3))),
        draw(per_axis(dims, st.integers(1, 3))),
    )
    side = st.integers(1, {1: 30, 2: 9, 3: 5}[dims])
    # PyTorch looks at sizes of a transposed convolution only where there is an image.
    N, C, K = (
        draw(st.integers(int(transposed), 3)),
        draw(st.integers(1, 5)),
        draw(st.integers(1, 5)),
    )
    x = (N, C * groups, *draw(per_axis(dims, side)))
    options: dict[str, Any] = {}
    if transposed:
        options["output_padding"] = draw(per_axis(dims, st.integers(0, 2)))
        options["padding"] = draw(per_axis(dims, st.integers(0, 2)))
        w = (C * groups, K, *kernel)
    else:
        w = (K * groups, C, *kernel)
        options["padding_mode"] = draw(
            st.sampled_from(("zeros",) * 3 + ("reflect", "replicate", "circular"))
        )
        least = 0 if options["padding_mode"] != "zeros" else -1
        options["padding"] = draw(
            st.one_of(
                per_axis(dims, st.integers(0, 3)),
                st.tuples(*[st.tuples(*[st.integers(least, 3)] * 2)] * dims),
                st.sampled_from(("same", "valid")),
            )
        )
        if options["padding"] in ("same", "valid"):
            options["padding_mode"] = "zeros"
    return ConvCase(
        "random", x, "drawn", w=w, stride=stride, dilation=dilation, groups=groups, transposed=transposed,
        bias=draw(st.booleans()), layout=draw(st.sampled_from(LAYOUTS)),
        w_layout=draw(st.sampled_from(LAYOUTS[:4])), grad=draw(st.sampled_from(GRADS)), **options,
    )  # fmt: skip


@settings(max_examples=900)
@given(convolutions(transposed=False), DTYPES)
def test_convolutions(case: ConvCase, dtype: torch.dtype) -> None:
    if case.padding_mode != "zeros" and dtype.itemsize == 2:
        dtype = (
            torch.float32
        )  # up to 15 rounded gradients of the padding are added up, by PyTorch as here
    agrees(case, "cpu", dtype)


@settings(max_examples=500)
@given(convolutions(transposed=True), DTYPES)
def test_transposed_convolutions(case: ConvCase, dtype: torch.dtype) -> None:
    agrees(case, "cpu", dtype)


EMULATED_CONVOLUTIONS: tuple[dict[str, Any], ...] = (
    {"kernel": (3, 3), "padding": 1},
    {"kernel": (3, 2), "stride": (2, 1), "padding": ((1, 0), (2, -1)), "dilation": 2},
    {"kernel": (3, 3), "padding": 2, "padding_mode": "reflect"},
    {"kernel": (3, 3), "padding": (1, 2), "padding_mode": "circular", "groups": 3},
    {"kernel": (1, 1), "stride": 2},
    {"kernel": (4,), "padding": 3, "stride": 3},
    {"kernel": (2, 3, 2), "padding": 1},
    {"kernel": (3, 3), "stride": 2, "padding": 1, "output_padding": 1, "transposed": True},
    {"kernel": (3,), "dilation": 3, "output_padding": 2, "transposed": True},
)


@st.composite
def emulated_convolutions(draw: st.DrawFn) -> ConvCase:
    options = dict(draw(st.sampled_from(EMULATED_CONVOLUTIONS)))
    kernel, groups = options.pop("kernel"), options.get("groups", 1)
    dims = len(kernel)
    C, K = draw(st.sampled_from(((1, 1), (3, 4), (8, 8), (9, 5))))
    x = (
        draw(st.integers(1, 3)),
        C * groups,
        *draw(per_axis(dims, st.integers(3, {1: 40, 2: 9, 3: 5}[dims]))),
    )
    w = (C * groups, K, *kernel) if options.get("transposed") else (K * groups, C, *kernel)
    layout = draw(st.sampled_from(("contiguous", "channels_last")))
    return ConvCase("random", x, "drawn", w=w, layout=layout, w_layout=layout, **options)


@needs_emulator
@settings(max_examples=120)
@given(emulated_convolutions())
def test_emulated_convolutions(case: ConvCase) -> None:
    agrees(case, "emulate", torch.float32)


# ---- pooling --------------------------------------------------------------------------------------------

VALUES = ("normal", "normal", "ties", "nan", "-inf")


@st.composite
def poolings(draw: st.DrawFn) -> PoolCase:
    """Any window on small planes, and some that no plane holds."""
    dims = draw(st.integers(1, 3))
    kind = draw(st.sampled_from(("max", "max", "average", "average", "adaptive", "adaptive_max")))
    side = st.integers(1, {1: 30, 2: 10, 3: 6}[dims])
    x = (draw(st.integers(0, 3)), draw(st.sampled_from((1, 2, 3, 8))), *draw(per_axis(dims, side)))
    options: dict[str, Any] = {"kind": kind, "layout": draw(st.sampled_from(LAYOUTS))}
    if kind.startswith("adaptive"):
        options["kernel"] = draw(st.one_of(st.integers(1, 7), per_axis(dims, st.integers(1, 7))))
    else:
        options["kernel"] = draw(per_axis(dims, st.integers(1, 5)))
        options["stride"] = draw(st.one_of(st.none(), per_axis(dims, st.integers(1, 4))))
        options["padding"] = draw(per_axis(dims, st.integers(0, 3)))
        options["ceil_mode"] = draw(st.booleans())
    if kind == "max":
        options["dilation"] = draw(per_axis(dims, st.integers(1, 3)))
    if kind == "average":
        options["count_include_pad"] = draw(st.booleans())
        options["divisor_override"] = draw(st.sampled_from((None, None, 3, -2)))
    if "max" in kind:
        options["values"] = draw(st.sampled_from(VALUES))
    return PoolCase("random", x, "drawn", grad=draw(st.sampled_from(GRADS)), **options)


def sees_padding_alone(case: PoolCase) -> bool:
    """Whether some dilated window lies between the values: there PyTorch writes outside of its gradient."""
    if case.dilation == 1 or not math.prod(case.x):
        return False
    try:
        shape = PoolShape.of(
            case.x, case.kernel, case.stride, case.padding, case.dilation, case.ceil_mode
        )
    except RuntimeError:
        return False
    return any(
        not any(0 <= p * step - before + t * r < size for t in range(taps))
        for size, out, taps, step, (before, _), r in zip(
            shape.spatial, shape.output, shape.kernel, shape.stride, shape.padding, shape.dilation,
            strict=True,
        )
        for p in range(out)
    )  # fmt: skip


@settings(max_examples=1200)
@given(poolings(), DTYPES)
def test_poolings(case: PoolCase, dtype: torch.dtype) -> None:
    assume(not sees_padding_alone(case))
    agrees(case, "cpu", dtype)


EMULATED_POOLINGS: tuple[dict[str, Any], ...] = (
    {"kind": "max", "kernel": 3, "stride": 2, "padding": 1},
    {"kind": "max", "kernel": (3, 2), "stride": 1, "dilation": (1, 2)},
    {"kind": "max", "kernel": 2, "ceil_mode": True, "values": "nan"},
    {"kind": "average", "kernel": 3, "stride": 2, "padding": 1, "count_include_pad": False},
    {"kind": "average", "kernel": (7, 6), "stride": 1, "padding": 3},
    {"kind": "adaptive", "kernel": (3, 2)},
    {"kind": "adaptive_max", "kernel": (2, 5), "values": "ties"},
)


@st.composite
def emulated_poolings(draw: st.DrawFn) -> PoolCase:
    options = draw(st.sampled_from(EMULATED_POOLINGS))
    x = (
        draw(st.integers(1, 3)),
        draw(st.sampled_from((1, 3, 8))),
        *draw(per_axis(2, st.integers(3, 12))),
    )
    layout = draw(st.sampled_from(("contiguous", "channels_last")))
    return PoolCase("random", x, "drawn", layout=layout, **options)


@needs_emulator
@settings(max_examples=120)
@given(emulated_poolings())
def test_emulated_poolings(case: PoolCase) -> None:
    agrees(case, "emulate", torch.float32)


# ---- normalisation --------------------------------------------------------------------------------------


@st.composite
def batch_norms(draw: st.DrawFn) -> NormCase:
    dims = draw(st.integers(0, 3))
    side = st.integers(1, {0: 1, 1: 20, 2: 7, 3: 4}[dims])
    x = (draw(st.integers(0, 9)), draw(st.sampled_from((1, 3, 8, 17))), *draw(per_axis(dims, side)))
    # Of a few values a channel, or of a gradient that is the same everywhere, the gradient is what remains of
    # a difference of almost equal numbers.
    assume(not 0 < math.prod(x) // x[1] < 8)
    activation = draw(st.sampled_from(("none", "relu", "silu")))
    return NormCase(
        "random", x, "drawn", mode=draw(st.sampled_from(("train", "eval"))), affine=draw(st.booleans()),
        track=draw(st.booleans()), momentum=draw(st.sampled_from((0.1, 0.0, 1.0))),
        eps=draw(st.sampled_from((1e-5, 1e-2))), residual=draw(st.booleans()), activation=activation,
        half_parameters=draw(st.booleans()), shift=draw(st.sampled_from((0.5, 2.0))),
        layout=draw(st.sampled_from(LAYOUTS if dims > 1 else LAYOUTS[:1])),
        grad=draw(st.sampled_from(GRADS[:2])),
    )  # fmt: skip


@settings(max_examples=500)
@given(batch_norms(), DTYPES)
def test_batch_norms(case: NormCase, dtype: torch.dtype) -> None:
    # A gradient of one channel may be a single number in which much cancels.
    agrees(case, "cpu", dtype, slack=20)

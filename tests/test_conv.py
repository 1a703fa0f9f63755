"""Convolution in every engine: its rows, the worked examples, and what convolution must obey."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import (
    CONV_CASES,
    ENGINES,
    TOLERANCE,
    ConvCase,
    assert_close,
    check,
    device_of,
    grid,
    needs_emulator,
)
from torch import Tensor

import cnnops
from cnnops.cuda import emulate
from cnnops.functional import conv2d
from cnnops.ops.conv import conv

GPU_ENGINES = [e for e in ENGINES if not isinstance(e, str)]


@pytest.mark.parametrize("case, engine, dtype", grid(CONV_CASES))
def test_rows(case: ConvCase, engine: str, dtype: torch.dtype) -> None:
    check(case, engine, dtype)


@pytest.mark.parametrize("engine", GPU_ENGINES)
@pytest.mark.parametrize(
    "case, dtype",
    [
        pytest.param(case, dtype, id=f"{case.id}-{dtype}")
        for i, case in enumerate(c for c in CONV_CASES if len(c.dtypes) > 1)
        for dtype in (torch.float32, (torch.float64, torch.bfloat16)[i % 2])
    ],
)
def test_rows_by_im2col(case: ConvCase, dtype: torch.dtype, engine: str) -> None:
    with cnnops.algorithm("conv_im2col"):
        check(case, engine, dtype)


@needs_emulator
@pytest.mark.parametrize("algorithm", ["conv_direct", "conv_im2col"])
@pytest.mark.parametrize("case", [c for c in CONV_CASES if c.schedules], ids=lambda c: c.id)
def test_thread_order_does_not_matter(case: ConvCase, algorithm: str) -> None:
    with emulate.schedule("all"), cnnops.algorithm(algorithm):
        check(case, "emulate", torch.float32)


# ---- worked examples ------------------------------------------------------------------------------------


def _grid3(start: int = 0) -> Tensor:
    return torch.arange(start, start + 9.0).view(1, 1, 3, 3)


def _kernel2(start: int = 0) -> Tensor:
    return torch.arange(start, start + 4.0).view(1, 1, 2, 2)


EXAMPLES: list[tuple[str, Tensor, Tensor, dict[str, Any], list[list[float]]]] = [
    ("plain", _grid3(), _kernel2(), {}, [[19, 25], [37, 43]]),
    ("padded", _grid3(), _kernel2(), {"padding": 1},
     [[0, 3, 8, 4], [9, 19, 25, 10], [21, 37, 43, 16], [6, 7, 8, 0]]),
    ("padded_and_strided", _grid3(), _kernel2(), {"padding": 1, "stride": (3, 2)}, [[0, 8], [6, 8]]),
    ("two_channels", torch.cat([_grid3(), _grid3(1)], 1), torch.cat([_kernel2(), _kernel2(1)], 1), {},
     [[56, 72], [104, 120]]),
]  # fmt: skip


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name, x, w, arguments, expected", EXAMPLES, ids=[e[0] for e in EXAMPLES])
def test_worked_examples(
    name: str,
    x: Tensor,
    w: Tensor,
    arguments: dict[str, Any],
    expected: list[list[float]],
    engine: str,
) -> None:
    device = device_of(engine)
    with cnnops.engine(engine):
        y = conv2d(x.to(device), w.to(device), **arguments)
    assert y[0, 0].tolist() == expected


@pytest.mark.parametrize("engine", ENGINES)
def test_gradients_of_the_worked_example(engine: str) -> None:
    """The weight sums over patches it touched, the bias over places, the input over taps that touched it."""
    device = device_of(engine)
    x, w = _grid3().to(device).requires_grad_(), _kernel2().to(device).requires_grad_()
    bias = torch.zeros(1, device=device, requires_grad=True)
    with cnnops.engine(engine):
        conv2d(x, w, bias).sum().backward()
    assert bias.grad is not None and bias.grad.tolist() == [4]
    assert w.grad is not None and w.grad[0, 0].tolist() == [[8, 12], [20, 24]]
    assert x.grad is not None and x.grad[0, 0].tolist() == [[0, 1, 1], [2, 6, 4], [2, 5, 3]]


# ---- laws -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
def test_one_by_one_is_a_dense_layer_at_each_place(engine: str) -> None:
    device = device_of(engine)
    x, w, b = (torch.randn(*size, device=device) for size in ((2, 6, 5, 4), (3, 6), (3,)))
    with cnnops.engine(engine):
        y = conv2d(x, w[:, :, None, None], b)
    dense = F.linear(x.movedim(1, -1).double(), w.double(), b.double()).movedim(-1, 1)
    assert_close(y, dense, TOLERANCE[torch.float32].output, "dense")


@pytest.mark.parametrize("engine", ENGINES)
def test_two_convolutions_are_one(engine: str) -> None:
    """Without a non-linearity between them, they are the convolution with the kernels' own convolution."""
    device = device_of(engine)
    x, first, second = (
        torch.randn(*size, device=device, dtype=torch.float64)
        for size in ((2, 3, 9, 8), (4, 3, 3, 2), (5, 4, 2, 3))
    )
    with cnnops.engine(engine):
        stacked = conv2d(conv2d(x, first), second)
        # Convolution turns the second kernel round; conv2d is a correlation.
        both = conv2d(first.transpose(0, 1), second.flip(2, 3), padding=(1, 2)).transpose(0, 1)
        assert_close(stacked, conv2d(x, both), 1e-12, "stacked")


@pytest.mark.parametrize("engine", ENGINES)
def test_convolution_is_linear(engine: str) -> None:
    device = device_of(engine)
    x, z, w = (
        torch.randn(*size, device=device, dtype=torch.float64)
        for size in ((2, 3, 7, 6), (2, 3, 7, 6), (4, 3, 3, 3))
    )
    with cnnops.engine(engine):
        together = conv2d(2 * x - 3 * z, w, padding=1)
        apart = 2 * conv2d(x, w, padding=1) - 3 * conv2d(z, w, padding=1)
    assert_close(together, apart, 1e-13, "linearity")


@pytest.mark.parametrize("engine", ENGINES)
def test_convolution_of_a_shifted_image_is_shifted(engine: str) -> None:
    device = device_of(engine)
    x, w = torch.randn(1, 2, 9, 10, device=device), torch.randn(3, 2, 3, 3, device=device)
    with cnnops.engine(engine):
        y = conv2d(x, w, padding=1)
        shifted = conv2d(x.roll((2, 3), (2, 3)), w, padding=1)
    # Away from the border, where the image that comes in on the other side is not seen.
    assert torch.equal(y.roll((2, 3), (2, 3))[..., 3:-1, 4:-1], shifted[..., 3:-1, 4:-1])


@pytest.mark.parametrize("engine", ENGINES)
def test_same_input_gives_same_bits(engine: str) -> None:
    device = device_of(engine)
    x = torch.randn(5, 6, 13, 11, device=device, requires_grad=True)
    w = torch.randn(7, 6, 3, 3, device=device, requires_grad=True)
    runs = []
    with cnnops.engine(engine):
        for _ in range(2):
            y = conv2d(x, w, padding=1)
            runs.append((y, *torch.autograd.grad(y, (x, w), torch.ones_like(y))))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


# ---- derivatives ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        {"padding": 1},
        {"stride": 2, "padding": 1, "groups": 2},
        {"padding": ((1, 0), (0, 2)), "dilation": 2, "stride": (1, 2)},
    ],
    ids=["padded", "strided_groups", "unequal_dilated"],
)
def test_first_and_second_derivatives(arguments: dict[str, Any]) -> None:
    x, w, b = (
        torch.randn(*size, dtype=torch.float64, requires_grad=True)
        for size in ((2, 2, 5, 4), (4, 2 // arguments.get("groups", 1), 3, 2), (4,))
    )

    def function(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return conv(x, w, b, **arguments)

    with cnnops.engine("cpu"):
        assert torch.autograd.gradcheck(function, (x, w, b))
        assert torch.autograd.gradgradcheck(function, (x, w, b))


def test_backward_uses_the_engine_of_the_forward() -> None:
    x, w = torch.randn(1, 2, 4, 4, requires_grad=True), torch.randn(2, 2, 3, 3, requires_grad=True)
    with cnnops.engine("aten"):
        y = conv2d(x, w)
    with cnnops.engine("cpu"):
        choices = cnnops.explain(y.sum().backward)
    assert [(c.op, c.engine) for c in choices] == [("conv_dgrad", "aten"), ("conv_wgrad", "aten")]


def test_only_gradients_that_are_asked_for_are_computed() -> None:
    x, w = torch.randn(1, 2, 4, 4), torch.randn(2, 2, 3, 3, requires_grad=True)
    b = torch.randn(2)
    choices = cnnops.explain(lambda: conv2d(x, w, b).sum().backward())
    assert [c.op for c in choices] == ["conv_fprop", "conv_wgrad"]


def test_no_channels_give_the_bias() -> None:
    x, w, b = torch.randn(2, 0, 4, 4), torch.randn(3, 0, 2, 2), torch.randn(3)
    assert torch.equal(conv2d(x, w, b), b.view(1, 3, 1, 1).expand(2, 3, 3, 3))
    assert torch.equal(conv2d(x, w), torch.zeros(2, 3, 3, 3))

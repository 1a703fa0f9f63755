"""Batch norm on the CPU where the activation's derivative is dear: its product with the gradient waits in the
memory of the input's gradient."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from cases import assert_close
from cases.norm import ACTIVATIONS
from torch import Tensor

import cnnops
import cnnops.functional as C
from cnnops.cpu import norm_vectors, simd

DEAR = ["silu", "gelu", "sigmoid", "tanh"]

# Planes of several times four vectors, two more, another and a part of one, and of less than one; columns of
# as many, and so few that rows are laid side by side.
SIZES = {
    "planes": ((3, 5, 9, 13), torch.contiguous_format),
    "small planes": ((5, 8, 2, 2), torch.contiguous_format),
    "columns": ((3, 117, 9, 7), torch.channels_last),
    "few columns": ((9, 6, 5, 3), torch.channels_last),
}


@pytest.fixture(autouse=True)
def engine() -> Iterator[None]:
    with cnnops.engine("cpu"), cnnops.fallback("error"):
        yield


def tensors(name: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """x, weight, bias, residual, and the gradient of y."""
    size, form = SIZES[name]
    numbers = torch.Generator().manual_seed(0)
    x, residual, grad_y = (
        torch.randn(size, generator=numbers).to(dtype, memory_format=form) for _ in range(3)
    )
    weight, bias = torch.randn(2, size[1], generator=numbers).to(dtype)
    return x, weight, bias, residual, grad_y


def gradients(
    name: str, activation: str, dtype: torch.dtype, beside: Tensor | None = None
) -> tuple[Tensor, ...]:
    *some, _, grad_y = tensors(name, dtype)
    some = [t.requires_grad_() for t in some]
    y = C.batch_norm_act(
        some[0], None, None, *some[1:], training=True, residual=beside, activation=activation
    )
    return torch.autograd.grad(y, some, grad_y)


@pytest.mark.parametrize("bits", simd.WIDTHS)
@pytest.mark.parametrize("name", SIZES)
def test_every_vector_width(name: str, bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simd, "simd_bits", lambda: bits)
    *wide, _, grad_y = (t.double() for t in tensors(name, torch.float32))
    wide = [t.requires_grad_() for t in wide]
    z = torch.nn.functional.batch_norm(wide[0], None, None, *wide[1:], True)
    wanted = torch.autograd.grad(ACTIVATIONS["silu"](z), wide, grad_y)
    for ours, theirs in zip(gradients(name, "silu", torch.float32), wanted, strict=True):
        assert_close(ours, theirs, 1e-6, "silu")


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize(
    ("activation", "dtype", "beside"),
    [
        *((activation, torch.float32, False) for activation in DEAR),
        ("silu", torch.bfloat16, False),
        ("silu", torch.float32, True),
    ],
    ids=lambda value: str(value),
)
def test_same_bits_as_without_waiting(
    name: str, activation: str, dtype: torch.dtype, beside: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A half type would round what waits, so there nothing does."""
    residual = tensors(name, dtype)[3] if beside else None
    found = gradients(name, activation, dtype, residual)
    monkeypatch.setattr(norm_vectors, "may_wait", lambda *_: False)
    for a, b in zip(gradients(name, activation, dtype, residual), found, strict=True):
        assert torch.equal(a, b)

"""Group and layer norm on the CPU: every width of vectors, images in parts, unlike values, sums that few ask
for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from cases import assert_close
from torch import Tensor

import cnnops
import cnnops.functional as C
from cnnops.aten.norm import activate
from cnnops.cpu import group_norm, simd

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]

LIMIT = {torch.float32: 1e-6, torch.float64: 1e-13, torch.float16: 2e-3, torch.bfloat16: 1e-2}


NUMBERS = torch.Generator().manual_seed(0)


def planes(*size: int) -> Tensor:
    return torch.randn(size, generator=NUMBERS)


def columns(*size: int) -> Tensor:
    return planes(*size).contiguous(memory_format=torch.channels_last)


rows = planes


# What x is, what the norm is, and how long gamma and beta are. Planes, rows and groups of several times four
# vectors, two more, another and a part of one; of less than one; and rows of more than are added up at once.
PROBLEMS: dict[str, tuple[Tensor, Callable[..., Tensor], int]] = {
    "planes": (planes(3, 12, 9, 13), partial(C.group_norm_act, num_groups=4), 12),
    "small planes": (planes(5, 8, 2, 2), partial(C.group_norm_act, num_groups=2), 8),
    "columns": (columns(3, 117, 9, 7), partial(C.group_norm_act, num_groups=39), 117),
    "few columns": (columns(9, 6, 5, 3), partial(C.group_norm_act, num_groups=2), 6),
    "rows": (rows(37, 117), partial(C.group_norm_act, num_groups=1), 117),
    "rows of groups": (rows(70, 42), partial(C.group_norm_act, num_groups=6), 42),
    "long rows": (rows(35, 4500), partial(C.group_norm_act, num_groups=1), 4500),
    "rows of long groups": (rows(5, 9400), partial(C.group_norm_act, num_groups=2), 9400),
}


@pytest.fixture(autouse=True)
def engine() -> Iterator[None]:
    with cnnops.engine("cpu"), cnnops.fallback("error"):
        yield


def compared(
    norm: Callable[..., Tensor],
    x: Tensor,
    channels: int,
    activation: str = "none",
    affine: bool = True,
) -> list[tuple[str, Tensor, Tensor]]:
    """Results and gradients, and those of PyTorch in float64."""
    parameters = [torch.randn(channels).to(x.dtype) for _ in range(2 if affine else 0)]
    grad_y = torch.randn(x.shape).to(x)
    ours = [t.detach().clone().requires_grad_() for t in (x, *parameters)]
    theirs = [t.detach().double().requires_grad_() for t in ours]
    y = norm(
        ours[0], activation=activation, **dict(zip(("weight", "bias"), ours[1:], strict=False))
    )
    groups = norm.keywords["num_groups"]  # type: ignore[attr-defined]
    z = activate(torch.nn.functional.group_norm(theirs[0], groups, *theirs[1:]), None, activation)
    found = (y, *torch.autograd.grad(y, ours, grad_y))
    wanted = (z, *torch.autograd.grad(z, theirs, grad_y.double()))
    return list(zip(("y", "x", "weight", "bias"), found, wanted, strict=False))


@pytest.mark.parametrize("bits", simd.WIDTHS)
@pytest.mark.parametrize("name", PROBLEMS)
def test_every_vector_width(name: str, bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simd, "simd_bits", lambda: bits)
    x, norm, channels = PROBLEMS[name]
    for what, a, b in compared(norm, x, channels):
        assert_close(a, b, 1e-6, what)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["planes", "columns", "rows", "long rows"])
def test_every_type_with_an_activation(name: str, dtype: torch.dtype) -> None:
    x, norm, channels = PROBLEMS[name]
    ways = [("relu", False), ("silu", True)] if dtype == torch.float32 else [("relu", True)]
    for activation, affine in ways:
        found = compared(norm, x.to(dtype), channels, activation, affine)
        for what, a, b in found:
            assert_close(a, b, LIMIT[dtype], f"{what} {activation}")


@pytest.mark.parametrize("images", [1, 3, 7])
@pytest.mark.parametrize("activation", ["none", "gelu"])
def test_images_in_parts(images: int, activation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where images are few, threads share them: the same bits, however many they are."""
    x, norm = columns(images, 40, 11, 9), partial(C.group_norm_act, num_groups=5)
    whole = compared(norm, x, 40, activation)
    monkeypatch.setattr(group_norm, "PLACES", 300)
    assert group_norm._Numbers(images, 5, 8, 99).parts == min(-(-16 // images), 13)
    for what, a, b in compared(norm, x, 40, activation):
        assert_close(a, b, 1e-6, what)
    assert all(t.isfinite().all() for _, t, _ in whole)
    threads, runs = torch.get_num_threads(), []
    w, b = (torch.randn(40, requires_grad=True) for _ in range(2))
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            y = C.group_norm_act(x.requires_grad_(), 5, w, b, activation=activation)
            runs.append((y, *torch.autograd.grad(y, (x, w, b), y.detach())))
    finally:
        torch.set_num_threads(threads)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))


@pytest.mark.parametrize("wanted", ["x", "weight", "bias", "x bias"])
@pytest.mark.parametrize("name", ["planes", "columns", "rows", "long rows", "parts"])
def test_some_gradients_alone(name: str, wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group_norm, "PLACES", 300 if name == "parts" else 1 << 40)
    x, norm, channels = PROBLEMS["columns" if name == "parts" else name]
    inputs = {"x": x, "weight": torch.randn(channels), "bias": torch.randn(channels)}
    asked = [inputs[part].requires_grad_() for part in wanted.split()]
    try:
        y = norm(x, weight=inputs["weight"], bias=inputs["bias"], activation="none")
        grad_y = torch.randn_like(y)
        found = torch.autograd.grad(y, asked, grad_y)
        groups = norm.keywords["num_groups"]  # type: ignore[attr-defined]
        # PyTorch 2.13 crashes where the gradient of x is not asked for, channels last.
        z = torch.nn.functional.group_norm(x.contiguous(), groups, inputs["weight"], inputs["bias"])
        for a, b in zip(found, torch.autograd.grad(z, asked, grad_y), strict=True):
            assert_close(a, b.double(), 2e-6, wanted)
    finally:
        for t in asked:
            t.requires_grad_(False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["planes", "columns", "parts", "rows"])
def test_unlike_values(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups whose first values say nothing of the mean, or that are all alike; squares that float32 does not
    hold, and that are less than it tells from zero; NaN and infinities, which are kept in their group."""
    monkeypatch.setattr(group_norm, "PLACES", 300 if name == "parts" else 1 << 40)
    x = torch.randn(8, 4, 15, 9)
    x[0, :, :, :2] = 2000 + x[0, :, :, :2] / 100
    x[1, 0, :, :3], x[1] = -30, x[1] * 2
    x[2] = 0.375
    if dtype in (torch.float32, torch.float64):
        x[3] *= 1e18
        x[4] *= 1e-25
    x[5, 2, 3, 4] = float("nan")
    x[6, 3, 4, 5] = float("inf")
    x = x.to(dtype)
    groups = 1
    if name == "rows":
        x = x.flatten(1)
    elif name != "planes":
        x = x.contiguous(memory_format=torch.channels_last)
    if name == "parts":
        x = x[:7].contiguous(memory_format=torch.channels_last)
    eps = 1e-52
    y = C.group_norm(x, groups, eps=eps)
    wanted = torch.nn.functional.group_norm(x.double(), groups, eps=eps)
    for n in range(len(x)):
        if n == 2:
            assert not y[n].any(), "all alike"
        elif n in (5, 6):
            assert y[n].isnan().all()
        else:
            assert_close(y[n], wanted[n], 3 * LIMIT[dtype], f"image {n}")


def test_far_means() -> None:
    """A mean that float32 holds to a good part of the deviation only, in both directions."""
    for name in ("planes", "columns", "rows", "rows of groups"):
        x, norm, channels = PROBLEMS[name]
        for what, a, b in compared(norm, x / 100 + 3000.1, channels):
            assert_close(a, b, 2e-3 if what == "y" else 1e-2, f"{name} {what}")

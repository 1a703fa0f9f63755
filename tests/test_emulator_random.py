"""A thousand launches of random problems under the emulator: no false alarm, and PyTorch's results.

Shapes, strides, padding and layouts are drawn at random, the same ones in every run. Every launch runs under
the three thread orders, whose results must agree bit by bit. Each set of constants is a compilation of a
second, so only the first few that are met of each entry are taken: `Launches`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import pytest
import torch
import torch.nn.functional as F
from cases import TOLERANCE, assert_close, laid_out, needs_emulator
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight

import cnnops
from cnnops import functional as C
from cnnops import registry
from cnnops.cuda import emulate
from cnnops.cuda.kernel import Launch
from cnnops.cuda.launch import trace
from cnnops.shapes import ConvShape

T = TypeVar("T")

pytestmark = [needs_emulator, pytest.mark.slow]

LEAST = {"conv": 480, "pool": 320, "norm": 240}
"""Launches that each test makes at least: a thousand in all, each under three thread orders."""
assert sum(LEAST.values()) >= 1000

DTYPES = (torch.float32, torch.float16, torch.float64, torch.bfloat16)
LAYOUTS = ("contiguous", "channels_last", "sliced", "transposed", "offset")


def problems(most: int) -> settings:
    """So many examples; most are passed over, see `Launches`."""
    return settings(
        max_examples=most,
        database=None,
        phases=[Phase.generate],  # an example that fails is small as it is
        suppress_health_check=list(HealthCheck),
    )


class Launches:
    """What has run: at most `most` sets of constants of each entry, until there are `enough` launches.

    Whether a problem runs is decided after it is drawn: what hypothesis draws must not depend on it.
    """

    def __init__(self, most: int, enough: int) -> None:
        self.most, self.enough = most, enough
        self.plans: list[Launch] = []
        self.known: dict[tuple[str, str], set[object]] = defaultdict(set)

    def run(self, compute: Callable[[], T]) -> T | None:
        """What `compute` returns, every launch of it under three thread orders, or None: passed over."""
        if len(self.plans) >= self.enough:
            return None
        with trace(run=False) as plans:
            compute()
        kernels = {plan.kernel for plan in plans}
        for k in kernels:
            known = self.known[k.source, k.entry]
            if k.constants not in known and len(known) >= self.most:
                return None
        for k in kernels:
            self.known[k.source, k.entry].add(k.constants)
        with trace() as plans, emulate.schedule("all"):
            result = compute()
        self.plans += plans
        return result

    @property
    def compilations(self) -> int:
        return len({(s, c) for (s, _), known in self.known.items() for c in known})

    @property
    def entries(self) -> set[str]:
        return {plan.kernel.entry for plan in self.plans}


@pytest.fixture(autouse=True)
def emulated() -> Iterator[None]:
    with cnnops.engine("emulate"):
        yield


def drawn(data: st.DataObject, size: Sequence[int], dtype: torch.dtype, layout: str = "") -> Tensor:
    """A tensor of this size, of a layout that is drawn unless it is given, with numbers of its own."""
    layout = layout or data.draw(st.sampled_from(LAYOUTS), "layout")
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 9), "seed"))
    return laid_out(
        tuple(size),
        layout,
        lambda s: torch.randn(s, generator=generator, dtype=torch.float64).to(dtype),
    )


def small(most: int, least: int = 1) -> st.SearchStrategy[int]:
    return st.integers(least, most)


def pairs(most: int, least: int = 1) -> st.SearchStrategy[tuple[int, int]]:
    return st.tuples(small(most, least), small(most, least))


# ---- convolution -----------------------------------------------------------------------------------------

CONV_OPS = {
    "conv_direct": ("conv_fprop", "conv_dgrad", "conv_wgrad", "conv_bgrad"),
    "conv_im2col": ("conv_fprop", "conv_dgrad", "conv_wgrad"),
}


def convolve(
    op: str, shape: ConvShape, x: Tensor, w: Tensor, grad_y: Tensor, bias: Tensor
) -> Tensor:
    """The result of one pass, in one of the layouts that PyTorch gives results."""
    function = registry.choose(op, "emulate", shape, x.dtype)
    inputs, size = {
        "conv_fprop": ((x, w, bias), shape.y_size),
        "conv_dgrad": ((grad_y, w, None), shape.x_size),
        "conv_wgrad": ((grad_y, x), shape.w_size),
        "conv_bgrad": ((grad_y,), shape.y_size[1:2]),
    }[op]
    last = len(size) == 4 and x.is_contiguous(memory_format=torch.channels_last)
    form = torch.channels_last if last else torch.contiguous_format
    result = torch.empty(size, dtype=x.dtype, memory_format=form)
    function(shape, *inputs, result)
    return result


def reference(
    op: str, shape: ConvShape, x: Tensor, w: Tensor, grad_y: Tensor, bias: Tensor
) -> Tensor:
    x, w, grad_y, bias = (t.double() for t in (x, w, grad_y, bias))
    padding = [p for p, _ in shape.padding]
    settings = shape.stride, padding, shape.dilation, shape.groups
    if op == "conv_fprop":
        return F.conv2d(x, w, bias, *settings)
    if op == "conv_dgrad":
        return conv2d_input(x.shape, w, grad_y, *settings)
    if op == "conv_wgrad":
        return conv2d_weight(x, w.shape, grad_y, *settings)
    return grad_y.sum((0, 2, 3))


def test_convolutions() -> None:
    launches, compared = Launches(3, LEAST["conv"]), defaultdict(int)

    @problems(4000)
    @given(data=st.data())
    def run(data: st.DataObject) -> None:
        direct = data.draw(small(4), "of four") < 4
        algorithm = "conv_direct" if direct else "conv_im2col"
        op = data.draw(st.sampled_from(CONV_OPS[algorithm]), "op")
        dtype = data.draw(st.sampled_from(DTYPES), "dtype")
        # (groups, channels and filters a group): the tiled form takes more than four, the thin one fewer.
        groups, c, k = data.draw(
            st.sampled_from(((1, 8, 8), (2, 5, 6), (3, 1, 1), (1, 3, 4))), "form"
        )
        r, s = data.draw(st.sampled_from(((1, 1), (3, 3), (3, 2))), "kernel")
        dilation, padding = data.draw(pairs(2), "dilation"), data.draw(pairs(2, 0), "padding")
        least = [d * (f - 1) + 1 - 2 * p for d, f, p in zip(dilation, (r, s), padding, strict=True)]
        h, w_ = (data.draw(small(9, max(1, n)), "extent") for n in least)
        size, filters = (data.draw(small(3), "N"), groups * c, h, w_), (groups * k, c, r, s)
        stride = data.draw(pairs(3), "stride")
        shape = ConvShape.of(size, filters, None, stride, padding, dilation, groups)
        x, w = drawn(data, size, dtype), drawn(data, filters, dtype)
        grad_y, bias = (
            drawn(data, shape.y_size, dtype),
            drawn(data, filters[:1], dtype, "contiguous"),
        )
        with cnnops.algorithm(algorithm):
            got = launches.run(lambda: convolve(op, shape, x, w, grad_y, bias))
        if got is None:
            return
        limit = TOLERANCE[dtype].gradient
        assert_close(got, reference(op, shape, x, w, grad_y, bias), limit, f"{op} ({algorithm})")
        compared[algorithm, op] += 1

    run()
    assert len(launches.plans) >= LEAST["conv"] and launches.compilations <= 30
    passes = {f"conv_{p}grad_{form}" for p in "dw" for form in ("direct", "thin")}
    assert {*passes, "conv_bgrad_direct", "conv_im2col", "conv_col2im"} <= launches.entries
    assert all(compared[a, op] >= 10 for a, ops in CONV_OPS.items() for op in ops), compared


# ---- pooling ---------------------------------------------------------------------------------------------


def gradients(
    function: Callable[..., Tensor], tensors: Sequence[Tensor], grad: Tensor, twice: bool = False
) -> list[Tensor]:
    """The output, and the gradients of all tensors for the output's gradient; `twice`: and that one's."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    y, grad = function(*leaves), grad.to(leaves[0].dtype).requires_grad_(twice)
    first = torch.autograd.grad(y, leaves, grad, create_graph=twice)
    return [y, *first, *(torch.autograd.grad(first[0], grad, leaves[0].detach()) if twice else ())]


def test_poolings() -> None:
    launches, compared = Launches(5, LEAST["pool"]), defaultdict(int)

    @problems(2000)
    @given(data=st.data())
    def run(data: st.DataObject) -> None:
        kind = data.draw(st.sampled_from(("max", "avg", "adaptive")), "kind")
        dtype = data.draw(st.sampled_from(DTYPES), "dtype")
        kernel, stride = data.draw(st.sampled_from(((2, 2), (3, 2))), "kernel and stride")
        padding = kernel // 2
        size = (
            *data.draw(pairs(5), "N C"),
            data.draw(small(9, 3), "H"),
            8,
        )  # widths decide vectors
        x = drawn(data, size, dtype)
        if kind == "adaptive":
            out = data.draw(st.sampled_from((1, (3, 2), (2, 5))), "output")
            arguments: dict[str, object] = {"output_size": out}
            name = "adaptive_avg_pool2d"
        else:
            name = f"{kind}_pool2d"
            arguments = {"kernel_size": kernel, "stride": stride, "padding": padding}
            arguments["ceil_mode"] = data.draw(st.booleans(), "ceil_mode")
            if kind == "avg":
                arguments["count_include_pad"] = data.draw(st.booleans(), "count_include_pad")
        ours, theirs = getattr(C, name), getattr(F, name)
        grad = drawn(data, theirs(x.double(), **arguments).shape, dtype)

        twice = kind == "max"
        got = launches.run(lambda: gradients(lambda t: ours(t, **arguments), [x], grad, twice))
        if got is None:
            return
        wanted = gradients(lambda t: theirs(t, **arguments), [x.double()], grad, twice)
        for a, b in zip(got, wanted, strict=True):
            assert_close(a, b, TOLERANCE[dtype].gradient, name)
        compared[kind] += 1

    run()
    assert len(launches.plans) >= LEAST["pool"] and launches.compilations <= 26
    assert {"max_pool_gather", "avg_pool_reduce", "max_pool_bwd"} <= launches.entries
    assert all(compared[kind] >= 15 for kind in ("max", "avg", "adaptive")), compared


# ---- batch norm ------------------------------------------------------------------------------------------


def test_norms() -> None:
    launches, compared = Launches(3, LEAST["norm"]), defaultdict(int)

    @problems(2000)
    @given(data=st.data())
    def run(data: st.DataObject) -> None:
        dtype = data.draw(st.sampled_from(DTYPES), "dtype")
        training, residual = (
            data.draw(st.booleans(), "training"),
            data.draw(st.booleans(), "residual"),
        )
        # Long planes take three launches instead of one.
        extents = data.draw(st.sampled_from(((1, 7), (5, 6), (3, 8), (65, 67))), "H W")
        size = (data.draw(small(3, 2), "N"), data.draw(small(4), "C"), *extents)
        x = drawn(data, size, dtype) + data.draw(st.integers(-2, 2), "mean")
        half = dtype in (torch.float16, torch.bfloat16)
        parameter = torch.float32 if half else dtype
        weight, bias = (drawn(data, size[1:2], parameter, "contiguous") for _ in range(2))
        mean, var = torch.zeros(size[1], dtype=parameter), torch.ones(size[1], dtype=parameter)
        tensors = [x, weight, bias] + ([drawn(data, size, dtype)] if residual else [])
        grad = drawn(data, size, dtype)

        def ours(x: Tensor, weight: Tensor, bias: Tensor, added: Tensor | None = None) -> Tensor:
            running = mean.clone(), var.clone()
            return C.batch_norm_act(
                x, *running, weight, bias, training, residual=added, activation="relu"
            )

        def theirs(x: Tensor, weight: Tensor, bias: Tensor, added: Tensor | None = None) -> Tensor:
            y = F.batch_norm(x, mean.double(), var.double(), weight, bias, training)
            return F.relu(y if added is None else y + added)

        got = launches.run(lambda: gradients(ours, tensors, grad))
        if got is None:
            return
        wanted = gradients(theirs, [t.double() for t in tensors], grad)
        for a, b in zip(got, wanted, strict=True):
            limit = 5 * TOLERANCE[dtype].gradient  # sums over thousands of places may cancel
            assert_close(a, b, limit, f"batch norm, training: {training}")
        compared[training] += 1

    run()
    wanted = {"batch_norm_train", "batch_norm_infer", "batch_norm_bwd", "batch_norm_bwd_sums"}
    assert wanted <= launches.entries and min(compared[True], compared[False]) >= 20
    assert len(launches.plans) >= LEAST["norm"] and launches.compilations <= 16

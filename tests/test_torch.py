"""At home in torch: signatures, layouts, other dtypes, autocast, torch.compile, meta tensors, opcheck."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import (
    CASES,
    CONV_CASES,
    NORM_CASES,
    POOL_CASES,
    Case,
    ConvCase,
    NormCase,
    PoolCase,
    assert_close,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import cnnops
import cnnops.functional as C
from cnnops.ops import is_channels_last, pool

# ---- signatures -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ours, theirs",
    [
        (C.max_pool2d, F.max_pool2d_with_indices),
        (C.adaptive_avg_pool2d, F.adaptive_avg_pool2d),
        (C.batch_norm, F.batch_norm),
    ],
)
def test_signatures(ours: Callable[..., Any], theirs: Callable[..., Any]) -> None:
    mine, other = inspect.signature(ours).parameters, inspect.signature(theirs).parameters
    assert list(mine) == list(other)
    assert [p.default for p in mine.values()] == [p.default for p in other.values()]


@pytest.mark.parametrize("name", ["conv2d", "avg_pool2d"])
def test_signatures_of_builtins(name: str) -> None:
    """Theirs have no signature to inspect, but their documentation starts with it."""
    documented = re.search(r"\w+\((.*)\) -> Tensor", getattr(F, name).__doc__ or "")
    assert documented
    mine = inspect.signature(getattr(C, name)).parameters.values()
    plain = [p.name if p.default is p.empty else f"{p.name}={p.default}" for p in mine]
    assert ", ".join(plain) == documented[1]


def test_batch_norm_act_extends_batch_norm() -> None:
    mine = inspect.signature(C.batch_norm_act).parameters
    assert list(mine)[:8] == list(inspect.signature(F.batch_norm).parameters)
    assert {n: p.default for n, p in list(mine.items())[8:]} == {
        "residual": None,
        "activation": "relu",
    }


# ---- layouts --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{type(case).__name__}-{case.id}")
def test_results_have_torchs_layout(case: Case) -> None:
    """Outputs are dense, and channels-last where torch's are; so are gradients."""
    tensors = [t.requires_grad_() for t in case.tensors(torch.float32)]
    ours, theirs = case.ours(*tensors), case.theirs(*tensors)
    assert is_channels_last(ours) == is_channels_last(theirs)
    assert ours.is_contiguous() or is_channels_last(ours)
    if isinstance(case, PoolCase) and case.kind == "adaptive":
        return  # torch's gradient of a global average is an expanded tensor
    for a, b in zip(
        torch.autograd.grad(ours, tensors, torch.ones_like(ours)),
        torch.autograd.grad(theirs, tensors, torch.ones_like(theirs)),
        strict=True,
    ):
        assert is_channels_last(a) == is_channels_last(b)
        assert a.is_contiguous() or is_channels_last(a)


@pytest.mark.parametrize(
    "function",
    [
        lambda module, x: module.conv2d(x, torch.ones(2, 3, 3, 3)),
        lambda module, x: module.max_pool2d(x, 2, return_indices=True)[1].float(),
        lambda module, x: module.avg_pool2d(x, 2),
        lambda module, x: module.adaptive_avg_pool2d(x, (2, 3)),
    ],
)
def test_unbatched_inputs(function: Callable[[Any, Tensor], Tensor]) -> None:
    x = torch.randn(3, 6, 7)
    ours, theirs = function(C, x), function(F, x)
    assert ours.dim() == 3
    assert_close(ours, theirs, 1e-6, "unbatched")


# ---- dtypes that no kernel takes ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "function, dtype",
    [
        (lambda module, x: module.conv2d(x, x[:, :, :2, :2]), torch.int64),
        (lambda module, x: module.conv2d(x, x[:, :, :2, :2], padding=1, groups=1), torch.complex64),
        (lambda module, x: module.max_pool2d(x, 2), torch.int32),
        (lambda module, x: module.max_pool2d(x, 2, return_indices=True)[1], torch.uint8),
        (lambda module, x: module.avg_pool2d(x, 2), torch.int64),
    ],
)
def test_other_dtypes_are_pytorchs(
    function: Callable[[Any, Tensor], Tensor], dtype: torch.dtype
) -> None:
    x = torch.arange(75).view(1, 3, 5, 5).to(dtype)
    with pytest.raises(cnnops.UnsupportedError):
        function(C, x)
    with cnnops.fallback("silent"):
        assert torch.equal(function(C, x), function(F, x))


@pytest.mark.parametrize(
    "function, dtype",
    [
        (lambda module, x: module.conv2d(x, x[:, :, :2, :2]), torch.bool),
        (lambda module, x: module.max_pool2d(x, 2), torch.complex64),
        (lambda module, x: module.avg_pool2d(x, 2), torch.int32),
        (lambda module, x: module.adaptive_avg_pool2d(x, 2), torch.int64),
        (lambda module, x: module.batch_norm(x, None, None, training=True), torch.int64),
        (lambda module, x: module.batch_norm(x, torch.ones(3), torch.ones(3)), torch.complex64),
    ],
)
def test_other_dtypes_raise_what_pytorch_raises(
    function: Callable[[Any, Tensor], Tensor], dtype: torch.dtype
) -> None:
    x = torch.ones(2, 3, 5, 5).to(dtype)
    with pytest.raises(NotImplementedError) as theirs:
        function(F, x)
    with cnnops.fallback("silent"), pytest.raises(NotImplementedError) as ours:
        function(C, x)
    assert str(ours.value) == str(theirs.value)


def test_complex_gradients() -> None:
    x = torch.randn(1, 2, 4, 4, dtype=torch.complex128, requires_grad=True)
    w = torch.randn(3, 2, 2, 2, dtype=torch.complex128, requires_grad=True)
    with cnnops.fallback("silent"):
        ours = torch.autograd.grad(C.conv2d(x, w).abs().sum(), (x, w))
    theirs = torch.autograd.grad(F.conv2d(x, w).abs().sum(), (x, w))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


# ---- autocast -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_autocast_dtypes_are_torchs(dtype: torch.dtype, low: torch.dtype) -> None:
    """Convolution runs in autocast's dtype; pooling and batch norm in the input's."""
    x, w, b = torch.randn(2, 3, 6, 6).to(dtype), torch.randn(4, 3, 3, 3), torch.randn(4)
    mean, var = torch.zeros(3), torch.ones(3)
    functions: list[Callable[[Any], Tensor]] = [
        lambda module: module.conv2d(x, w, b),
        lambda module: module.max_pool2d(x, 2),
        lambda module: module.avg_pool2d(x, 2),
        lambda module: module.adaptive_avg_pool2d(x, 2),
        lambda module: module.batch_norm(x, mean, var),
        lambda module: module.batch_norm(x, None, None, mean, var, True),
    ]
    with torch.autocast("cpu", dtype=low):
        for function in functions:
            assert function(C).dtype == function(F).dtype


@pytest.mark.parametrize("engine", ["cpu", "aten"])
def test_autocast_gradients(engine: str) -> None:
    x = torch.randn(2, 3, 6, 6, requires_grad=True)
    w, b = torch.randn(4, 3, 3, 3, requires_grad=True), torch.randn(4, requires_grad=True)
    results = []
    for module in (C, F):
        with cnnops.engine(engine), torch.autocast("cpu", dtype=torch.bfloat16):
            y = module.conv2d(x, w, b)
            # Also the backward, whose own operations must not be cast.
            results.append(torch.autograd.grad(y.float().square().sum(), (x, w, b)))
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype == torch.float32
        assert_close(ours, theirs, 2e-2, "gradient")


def test_autocast_leaves_float64_alone() -> None:
    x, w = torch.randn(1, 2, 4, 4).double(), torch.randn(2, 2, 3, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert C.conv2d(x, w.double()).dtype == torch.float64
        with pytest.raises(RuntimeError, match=r"expected torch\.float64 .*got torch\.bfloat16"):
            C.conv2d(x, w)


# ---- torch.compile --------------------------------------------------------------------------------------


def _case(id: str, cases: tuple[Case, ...]) -> Case:
    return next(case for case in cases if case.id == id)


COMPILED = [
    _case(id, cases)
    for cases, ids in (
        (CONV_CASES, "plain same_even groups channels_last no_bias unequal"),
        (POOL_CASES, "max_overlapping max_channels_last avg_ceil adaptive_keep global"),
        (NORM_CASES, "train eval train_residual_gelu eval_residual_relu train_plain untracked"),
    )
    for id in ids.split()
]


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("case", COMPILED, ids=lambda case: f"{type(case).__name__}-{case.id}")
def test_compiled_without_a_graph_break(case: Case, dynamic: bool) -> None:
    """Forward and backward as one graph each; running statistics move as they do without compiling."""
    torch._dynamo.reset()
    function: Callable[..., Any] = case.ours
    extra: dict[str, Any] = {}
    if isinstance(case, NormCase) and case.track:
        statistics = case.statistics(case.tensors(torch.float32)[0])

        def function(*tensors: Tensor, mean: Tensor, var: Tensor) -> Tensor:
            return case.ours(*tensors, statistics=(mean, var))

        extra = dict(zip(("mean", "var"), statistics, strict=True))
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    results = []
    for call in (function, compiled):
        tensors = [t.requires_grad_() for t in case.tensors(torch.float32)]
        moved = {name: t.clone() for name, t in extra.items()}
        y = call(*tensors, **moved)
        grads = torch.autograd.grad(y, tensors, torch.ones_like(y))
        results.append((y, *grads, *moved.values()))
    for plain, other in zip(*results, strict=True):
        assert torch.equal(plain, other) and plain.stride() == other.stride()


def test_compiled_network_trains() -> None:
    """Modules, autocast and a second batch size under one torch.compile."""
    torch._dynamo.reset()
    net = torch.nn.Sequential(
        cnnops.nn.Conv2d(1, 4, 3), cnnops.nn.BatchNorm2d(4), torch.nn.ReLU(), cnnops.nn.MaxPool2d(2),
        cnnops.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(4, 2),
    )  # fmt: skip
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    for batch in (4, 6, 5):
        x = torch.randn(batch, 1, 8, 8)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = compiled(x).float().square().mean()
        net.zero_grad()
        loss.backward()
    assert net[1].num_batches_tracked == 3
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


def test_compiled_indices() -> None:
    torch._dynamo.reset()
    x = torch.randn(2, 3, 8, 7)
    function = torch.compile(
        lambda x: C.max_pool2d(x, 3, 2, 1, return_indices=True), fullgraph=True, backend="aot_eager"
    )
    y, indices = function(x)
    expected, places = F.max_pool2d(x, 3, 2, 1, return_indices=True)
    assert torch.equal(y, expected) and torch.equal(indices, places)


def test_compiled_errors_are_errors() -> None:
    torch._dynamo.reset()
    function = torch.compile(C.conv2d, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="expected 4 channels"):
        function(torch.randn(1, 3, 5, 5), torch.randn(2, 4, 3, 3))


# ---- torch.library --------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", COMPILED, ids=lambda case: f"{type(case).__name__}-{case.id}")
def test_meta_tensors_give_sizes_without_computing(case: Case) -> None:
    tensors = case.tensors(torch.float32)
    expected = case.ours(*tensors)
    result = case.ours(*(t.to("meta") for t in tensors))
    assert result.device.type == "meta"
    assert (result.shape, result.stride(), result.dtype) == (
        expected.shape,
        expected.stride(),
        expected.dtype,
    )


def test_operations_pass_opcheck() -> None:
    """Schemas say what is written, fake results are the real ones, and the ops survive tracing."""
    x, w, grad = torch.randn(2, 4, 6, 5), torch.randn(6, 2, 3, 3), torch.randn(2, 6, 6, 5)
    arguments = ([1, 1], [1, 1, 1, 1], [1, 1], 2, "aten")
    window = ([2, 2], [2, 2], [0, 0], [1, 1], False, "aten")
    average = ([2, 2], [2, 2], [0, 0], False, True, None, None, "aten")
    weight, residual = torch.randn(4), torch.randn_like(x)
    mean, var = torch.zeros(4), torch.ones(4)
    y, offsets = pool.max_pool_fwd(x, *window)
    calls: list[tuple[str, tuple[Any, ...]]] = [
        ("conv_fprop", (x, w, torch.randn(6), *arguments)),
        ("conv_dgrad", (grad, w, x.shape, False, *arguments)),
        ("conv_wgrad", (grad, x, w.shape, False, *arguments)),
        ("conv_bgrad", (grad, x.shape, w.shape, *arguments)),
        ("max_pool_fwd", (x, *window)),
        ("max_pool_bwd", (y, offsets, x.shape, False, *window)),
        ("max_pool_gather", (x, offsets, *window)),
        ("max_pool_indices", (offsets, x.shape, *window[:-1])),
        ("avg_pool_fwd", (x, *average)),
        ("avg_pool_bwd", (y, x.shape, False, *average)),
        ("batch_norm_train", (x, weight, weight, residual, mean, var, 0.1, 1e-5, "relu", "aten")),
        ("batch_norm_infer", (x, weight, None, residual, mean, var, 1e-5, "relu", "aten")),
        ("batch_norm_bwd",
         (x, x, weight, weight, None, mean, var, 1e-5, "relu", True, [True] * 3 + [False], "aten")),
    ]  # fmt: skip
    for name, args in calls:
        torch.library.opcheck(getattr(torch.ops.cnnops, name).default, args)


@pytest.mark.filterwarnings("ignore:`torch.jit.trace` is deprecated:DeprecationWarning")
def test_who_looks_on_sees_the_operations() -> None:
    """The dispatcher is passed by only where nobody would notice."""
    x, w = torch.randn(1, 2, 6, 6), torch.randn(3, 2, 3, 3)

    class Log(TorchDispatchMode):
        seen: list[str] = []

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            self.seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Log() as log:
        C.conv2d(x, w)
    assert "cnnops.conv_fprop.default" in log.seen
    with torch.profiler.profile() as profile:
        C.conv2d(x, w)
    assert "cnnops::conv_fprop" in {event.name for event in profile.events()}
    traced = torch.jit.trace(lambda t: C.max_pool2d(t, 2), x, check_trace=False)
    assert "cnnops::max_pool_fwd" in str(traced.graph)


@pytest.mark.parametrize("engine", ["aten", "cpu"])
def test_views_that_only_the_dispatcher_understands(engine: str) -> None:
    """A view to be negated, and a tensor that outlived the transform it came from."""
    negated = torch.randn(1, 2, 6, 6, dtype=torch.complex64).conj().imag
    assert negated.is_neg()
    kept: list[Tensor] = []

    def keep(t: Tensor) -> Tensor:
        kept.append(t * 2)
        return kept[0].sum()

    torch.func.grad(keep)(torch.randn(1, 2, 6, 6))
    w = torch.randn(3, 2, 3, 3)
    with cnnops.engine(engine):
        for x in (negated, kept[0]):
            torch.testing.assert_close(C.conv2d(x, w), F.conv2d(x, w))
            with_graph = C.conv2d(x, w.clone().requires_grad_())
            torch.testing.assert_close(with_graph.detach(), F.conv2d(x, w))
            torch.testing.assert_close(C.avg_pool2d(x, 2), F.avg_pool2d(x, 2))


def test_inference_mode() -> None:
    x, w = torch.randn(1, 2, 5, 5), torch.randn(3, 2, 3, 3, requires_grad=True)
    with torch.inference_mode():
        y = C.max_pool2d(C.conv2d(x, w), 2)
    assert y.is_inference() and not y.requires_grad


@pytest.mark.parametrize("case", [ConvCase, PoolCase, NormCase])
def test_no_gradient_is_recorded_without_need(case: type[Case]) -> None:
    row = next(c for c in CASES if isinstance(c, case))
    tensors = row.tensors(torch.float32)
    assert row.ours(*tensors).grad_fn is None
    with torch.no_grad():
        assert row.ours(*(t.requires_grad_() for t in tensors)).grad_fn is None

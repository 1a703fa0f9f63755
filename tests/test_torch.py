"""At home in torch: signatures, layouts, other dtypes, autocast, who looks on, switches, what uses it."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import (
    CASES,
    ENGINES,
    Case,
    ConvCase,
    NormCase,
    PoolCase,
    assert_close,
    device_of,
)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import cnnops
import cnnops.functional as C
from cnnops.ops import is_channels_last

# ---- signatures -----------------------------------------------------------------------------------------


def _documented(name: str) -> str:
    """The arguments of a builtin of torch.nn.functional, which has no signature but in its documentation."""
    found = re.search(rf"{name}\((.*?)\) -> Tensor", getattr(F, name).__doc__ or "", re.DOTALL)
    assert found, name
    return found[1]


@pytest.mark.parametrize("name", [name for name in C.__all__ if hasattr(F, name)])
def test_signatures(name: str) -> None:
    """Names, order and defaults are torch's, or else a keyword argument would not be understood."""
    mine = inspect.signature(getattr(C, name)).parameters.values()
    # Functions whose result depends on return_indices hide behind a dispatcher; this one has their arguments.
    theirs = getattr(F, f"{name}_with_indices", getattr(F, name))
    if inspect.isbuiltin(theirs):
        plain = [p.name if p.default is p.empty else f"{p.name}={p.default}" for p in mine]
        assert ", ".join(plain) == _documented(name)
    else:
        other = inspect.signature(theirs).parameters.values()
        assert [(p.name, p.default) for p in mine] == [(p.name, p.default) for p in other]


def test_everything_that_the_names_promise_is_there() -> None:
    families = ["conv", "conv_transpose", "max_pool", "max_unpool", "avg_pool", "lp_pool",
                "adaptive_avg_pool", "adaptive_max_pool"]  # fmt: skip
    names = {f"{family}{dims}d" for family in families for dims in (1, 2, 3)}
    assert names | {"batch_norm", "group_norm", "layer_norm", "instance_norm"} <= set(C.__all__)
    layers = ["Conv", "ConvTranspose", "LazyConv", "LazyConvTranspose", "MaxPool", "MaxUnpool", "AvgPool",
              "LPPool", "AdaptiveAvgPool", "AdaptiveMaxPool", "BatchNorm", "LazyBatchNorm", "InstanceNorm",
              "LazyInstanceNorm"]  # fmt: skip
    names = {f"{layer}{dims}d" for layer in layers for dims in (1, 2, 3)}
    assert names | {"GroupNorm", "LayerNorm", "SyncBatchNorm"} <= set(cnnops.nn.__all__)


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
    if isinstance(case, ConvCase) and case.padding_mode == "circular":
        return  # torch's padding is made of copies, whose gradient is contiguous
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
        (
            lambda module, x: module.conv_transpose2d(x, x[:, :, :2, :2].transpose(0, 1)),
            torch.int64,
        ),
        (
            lambda module, x: module.conv_transpose2d(x, x.transpose(0, 1), stride=2),
            torch.complex64,
        ),
        (lambda module, x: module.lp_pool2d(x, 2, 2), torch.int64),
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
        (lambda module, x: module.group_norm(x, 3), torch.int32),
        (lambda module, x: module.layer_norm(x, (5,)), torch.complex128),
        (lambda module, x: module.adaptive_max_pool2d(x, 2), torch.int16),
        (lambda module, x: module.layer_norm(x, (5,)), torch.int64),
        (lambda module, x: module.instance_norm(x), torch.bool),
        (lambda module, x: module.adaptive_max_pool2d(x, 2), torch.complex64),
        (
            lambda module, x: module.conv_transpose2d(x, torch.ones_like(x)[:1].transpose(0, 1)),
            torch.bool,
        ),
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
        lambda module: module.conv_transpose2d(x, w.transpose(0, 1)),
        lambda module: module.adaptive_max_pool2d(x, 2),
        lambda module: module.group_norm(x, 3),
        lambda module: module.layer_norm(x, (6,)),
        lambda module: module.instance_norm(x),
        lambda module: module.lp_pool2d(x.abs(), 2.0, 2),
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


# ---- who looks on ----------------------------------------------------------------------------------------


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


# ---- switches -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
def test_torchs_switches_change_no_bit(engine: str) -> None:
    """Nothing searches for algorithms, or is not deterministic; on a CPU cuDNN's TF32 is nothing to us."""
    device = device_of(engine)
    x = torch.randn(2, 8, 9, 9, device=device, requires_grad=True)
    w = torch.randn(8, 8, 3, 3, device=device, requires_grad=True)

    def results() -> list[Tensor]:
        with cnnops.engine(engine):
            y = C.max_pool2d(C.conv2d(x, w), 3, 2)
        return [y, *torch.autograd.grad(y.square().sum(), (x, w))]

    before = results()
    tf32 = engine not in ("aten", "cuda")  # which obey
    torch.use_deterministic_algorithms(True)
    try:
        with torch.backends.cudnn.flags(benchmark=True, deterministic=True, allow_tf32=tf32):
            after = results()
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


# ---- what others build on -------------------------------------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant: bool) -> None:
    net = cnnops.convert(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2))
    ).model
    other = copy.deepcopy(net)
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    plain = torch.autograd.grad(net(x).square().sum(), (x, *net.parameters()))
    y = checkpoint(other, x, use_reentrant=use_reentrant)
    y.square().sum().backward()
    again = (x.grad, *(p.grad for p in other.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_data_parallel() -> None:
    net = cnnops.convert(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))).model.cuda()
    x = torch.randn(4, 3, 8, 8, device="cuda")
    expected = copy.deepcopy(net)(x)
    ids = list(range(torch.cuda.device_count()))
    assert_close(nn.DataParallel(net, ids[:1])(x), expected, 1e-6, "one device")
    assert nn.DataParallel(net, ids)(x).shape == expected.shape


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_capture_as_a_cuda_graph() -> None:
    """Forward, backward and running statistics replayed: no host synchronisation, no allocation outside."""
    net = cnnops.convert(
        nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(8), nn.ReLU(),
            nn.MaxPool2d(2), nn.ConvTranspose2d(8, 8, 2, 2), nn.GroupNorm(2, 8), nn.AdaptiveAvgPool2d(1),
        )
    ).model.cuda()  # fmt: skip
    reference = copy.deepcopy(net)
    x = torch.randn(4, 3, 8, 8, device="cuda")
    graphed: Any = torch.cuda.make_graphed_callables(net, (x.clone(),))
    for _ in range(2):
        x = torch.randn(4, 3, 8, 8, device="cuda")
        found = [graphed(x), reference(x)]
        grads = [
            torch.autograd.grad(y.square().sum(), list(m.parameters()))
            for y, m in zip(found, (net, reference), strict=True)
        ]
        for a, b in zip((found[0], *grads[0]), (found[1], *grads[1]), strict=True):
            assert_close(a, b, 1e-5, "replayed")

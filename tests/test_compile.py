"""torch.compile, torch.export, torch.library: forward and backward as one graph each, with nothing broken."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import CONV_CASES, NORM_CASES, POOL_CASES, Case, NormCase
from networks import UNet, assert_same, step
from torch import Tensor, nn

import cnnops
import cnnops.functional as C
import cnnops.nn
from cnnops.ops import pool

# ---- torch.compile --------------------------------------------------------------------------------------


def _case(id: str, cases: tuple[Case, ...]) -> Case:
    return next(case for case in cases if case.id == id)


COMPILED = [
    _case(id, cases)
    for cases, ids in (
        (CONV_CASES, "plain same_even groups channels_last no_bias unequal conv1d conv3d circular"),
        (CONV_CASES, "transposed_twice transposed_3d transposed_dilated"),
        (POOL_CASES, "max_overlapping max_channels_last avg_ceil adaptive_keep global"),
        (NORM_CASES, "train eval train_residual_gelu eval_residual_relu train_plain untracked"),
    )
    for id in ids.split()
]


@pytest.mark.parametrize(
    "case, dynamic",
    [
        pytest.param(case, dynamic, id=f"{type(case).__name__}-{case.id}-{name}")
        for i, case in enumerate(COMPILED)
        for dynamic, name in ((False, "static"), (True, "dynamic"))
        if not dynamic or i % 2 == 0
    ],
)
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


def assert_trains_alike(
    plain: nn.Module, compiled: Callable[..., Any], batches: tuple[int, ...], side: int
) -> None:
    """The same steps by both, a batch size after the other; `compiled` shares no tensor with `plain`."""
    for batch in batches:
        x = torch.randn(batch, 3, side, side)
        expected = step(plain, x)
        net: Any = compiled
        net.zero_grad()
        found = {name.replace("_orig_mod.", ""): t for name, t in step(net, x).items()}
        assert_same(found, expected, 1e-5)
        plain.zero_grad()


@pytest.mark.parametrize(
    "backend, dynamic, batches", [("aot_eager", None, (4, 6, 5)), ("inductor", True, (4, 6))]
)
def test_a_compiled_network_trains(
    backend: str, dynamic: bool | None, batches: tuple[int, ...]
) -> None:
    """Every kind of layer in one graph: first for one batch size and then, recompiled, for any; or for any
    from the start, by the backend whose code takes the longest to compile."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    plain = cnnops.convert(UNet(2)).model
    net: Any = torch.compile(copy.deepcopy(plain), fullgraph=True, backend=backend, dynamic=dynamic)
    assert_trains_alike(plain, net, batches, 8)


def test_compiled_for_every_size_at_once() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch.manual_seed(0)
    plain = cnnops.convert(UNet(2)).model
    net: Any = torch.compile(
        copy.deepcopy(plain), fullgraph=True, backend="aot_eager", dynamic=True
    )
    assert_trains_alike(plain, net, (2, 3, 5), 8)
    counts = torch._dynamo.utils.counters["stats"]
    assert counts["unique_graphs"] <= 2


def test_compiled_under_autocast() -> None:
    """Modules, autocast and a second batch size under one torch.compile."""
    torch._dynamo.reset()
    net = nn.Sequential(
        cnnops.nn.Conv2d(1, 4, 3), cnnops.nn.BatchNorm2d(4), nn.ReLU(), cnnops.nn.MaxPool2d(2),
        cnnops.nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2),
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


def test_an_exported_network_infers() -> None:
    """torch.export keeps the operations by name, for any batch."""
    torch.manual_seed(0)
    net = cnnops.convert(UNet(2)).model.eval()
    x = torch.randn(3, 3, 8, 8)
    with torch.no_grad():
        program = torch.export.export(net, (x,), dynamic_shapes=({0: torch.export.Dim("N")},))
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    ours = {name.split(".")[1] for name in called if name.startswith("cnnops.")}
    assert {
        "conv_fprop",
        "conv_dgrad",
        "max_pool_fwd",
        "max_unpool_fwd",
        "batch_norm_infer",
    } <= ours
    for batch in (3, 5):
        x = torch.randn(batch, 3, 8, 8)
        assert torch.equal(program.module()(x), net(x))


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
    arguments = ([1, 1], [1, 1, 1, 1], [1, 1], 2, "zeros", "aten")
    reflected = (*arguments[:-2], "reflect", "aten")
    window = ([2, 2], [2, 2], [0, 0], [1, 1], False, None, "aten")
    average = ([2, 2], [2, 2], [0, 0], False, True, None, None, "aten")
    weight, residual = torch.randn(4), torch.randn_like(x)
    mean, var = torch.zeros(4), torch.ones(4)
    y, offsets = pool.max_pool_fwd(x, *window)
    places = torch.arange(y[0, 0].numel()).view(y.shape[2:]).expand(y.shape).contiguous()
    calls: list[tuple[str, tuple[Any, ...]]] = [
        ("conv_fprop", (x, w, torch.randn(6), *arguments)),
        ("conv_dgrad", (grad, w, torch.randn(4), x.shape, False, *arguments)),
        ("conv_wgrad", (grad, x, w.shape, False, *arguments)),
        ("conv_fprop", (x, w, None, *reflected)),
        ("conv_dgrad", (grad, w, None, x.shape, True, *reflected)),
        ("conv_bgrad", (grad, "aten")),
        ("max_pool_fwd", (x, *window)),
        ("max_pool_bwd", (y, offsets, x.shape[2:], False, *window)),
        ("max_pool_gather", (x, offsets, *window)),
        ("max_pool_indices", (offsets, x.shape[2:], *window[:-1])),
        ("avg_pool_fwd", (x, *average)),
        ("avg_pool_bwd", (y, x.shape[2:], False, *average)),
        ("max_unpool_fwd", (y, places, [6, 4], "aten")),
        ("max_unpool_bwd", (x[..., :4].contiguous(), places, "aten")),
        ("batch_norm_stats", (x, "aten")),
        ("batch_norm_train", (x, weight, weight, residual, mean, var, 0.1, 1e-5, "relu", "aten")),
        ("batch_norm_infer", (x, weight, None, residual, mean, var, 1e-5, "relu", "aten")),
        ("batch_norm_bwd",
         (x, x, weight, weight, None, None, mean, var, 1e-5, "relu", True, [True] * 3 + [False], "aten")),
    ]  # fmt: skip
    for name, args in calls:
        torch.library.opcheck(getattr(torch.ops.cnnops, name).default, args)

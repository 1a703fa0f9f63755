"""Batch norm in every engine: the rows of tests/cases, running statistics, and the switch to evaluation."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import (
    ENGINES,
    NORM_CASES,
    TOLERANCE,
    NormCase,
    assert_close,
    check,
    device_of,
    grid,
    needs_emulator,
)
from cases.norm import ACTIVATIONS
from torch import Tensor
from torch.func import grad, hessian, jacrev, jvp, vmap
from torch.utils._pytree import tree_leaves

import cnnops
from cnnops import nn
from cnnops.cpu import simd
from cnnops.cuda import emulate
from cnnops.functional import batch_norm, batch_norm_act
from cnnops.ops.norm import batch_norm_stats


@pytest.mark.parametrize("case, engine, dtype", grid(NORM_CASES))
def test_rows(case: NormCase, engine: str, dtype: torch.dtype) -> None:
    check(case, engine, dtype)


@pytest.mark.parametrize("case, engine, dtype", grid(c for c in NORM_CASES if c.track))
def test_running_statistics(case: NormCase, engine: str, dtype: torch.dtype) -> None:
    """Training moves them as PyTorch does, evaluation and an empty batch leave them alone."""
    tensors = case.tensors(dtype, device_of(engine))
    mean, var = case.statistics(tensors[0])
    assert mean is not None and var is not None
    before, expected = (mean.clone(), var.clone()), (mean.cpu().double(), var.cpu().double())
    case.theirs(*(t.cpu().double() for t in tensors), statistics=expected)
    with cnnops.engine(engine):
        case.ours(*tensors, statistics=(mean, var))
    if case.training and tensors[0].numel():
        limit = case.limit(engine, TOLERANCE[mean.dtype].output)
        for name, ours, theirs in (("mean", mean, expected[0]), ("variance", var, expected[1])):
            assert_close(ours, theirs, limit, f"running {name}")
    else:
        assert torch.equal(mean, before[0]) and torch.equal(var, before[1])


@needs_emulator
@pytest.mark.parametrize("case", [c for c in NORM_CASES if c.schedules], ids=lambda c: c.id)
def test_thread_order_does_not_matter(case: NormCase) -> None:
    with emulate.schedule("all"):
        check(case, "emulate", torch.float32)


@pytest.mark.parametrize("engine", ENGINES)
def test_normalised_values(engine: str) -> None:
    """Mean 0 and biased variance 1 over all axes but the channel, then gamma and beta."""
    device = device_of(engine)
    x = 3 * torch.randn(4, 5, 6, 7, device=device) + 2
    gamma, beta = torch.full((5,), 2.0, device=device), torch.full((5,), -1.0, device=device)
    with cnnops.engine(engine):
        plain = batch_norm(x, None, None, training=True, eps=1e-12).double()
        scaled = batch_norm(x, None, None, gamma, beta, training=True, eps=1e-12).double()
    assert plain.mean((0, 2, 3)).abs().max() < 1e-6
    assert (plain.var((0, 2, 3), correction=0) - 1).abs().max() < 1e-6
    assert (scaled - (2 * plain - 1)).abs().max() < 1e-5


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("momentum", [0.1, None])
def test_switching_between_training_and_evaluation(momentum: float | None, engine: str) -> None:
    """A layer that is trained, evaluated, trained on and evaluated again stays PyTorch's all the way."""
    device = device_of(engine)
    ours = nn.BatchNorm2d(3, momentum=momentum, device=device)
    theirs = torch.nn.BatchNorm2d(3, momentum=momentum, dtype=torch.float64)
    with cnnops.engine(engine):
        for step, training in enumerate([True, True, False, True, False, False, True]):
            ours.train(training)
            theirs.train(training)
            x = (torch.randn(3, 3, 4, 5, device=device) * (step + 1) + step).requires_grad_()
            z = x.detach().cpu().double().requires_grad_()
            for layer, value in ((ours, x), (theirs, z)):
                layer.zero_grad()
                layer(value).square().sum().backward()
            assert x.grad is not None and z.grad is not None
            if not training:  # in training the gradient of this loss is all but zero
                assert_close(x.grad, z.grad, 1e-5, f"input gradient, step {step}")
            for name, value in theirs.state_dict().items():
                assert_close(ours.state_dict()[name], value, 2e-6, f"{name}, step {step}")
            for name, parameter in theirs.named_parameters():
                mine = dict(ours.named_parameters())[name].grad
                assert mine is not None and parameter.grad is not None
                assert (mine.cpu() - parameter.grad).abs().max() < 1e-3, f"{name}, step {step}"


@pytest.mark.parametrize("engine", ENGINES)
def test_evaluation_does_not_depend_on_the_batch(engine: str) -> None:
    device = device_of(engine)
    layer = nn.BatchNorm2d(4, device=device)
    x = torch.randn(6, 4, 5, 5, device=device)
    with cnnops.engine(engine):
        layer(x)
        layer.eval()
        whole = layer(x)
        alone = torch.cat([layer(image[None]) for image in x])
    assert torch.equal(whole, alone)


@pytest.mark.parametrize("engine", ENGINES)
def test_backward_in_evaluation_sees_the_statistics_of_its_forward(engine: str) -> None:
    """Training between a forward in evaluation and its backward must not change the gradient."""
    device = device_of(engine)
    layer = nn.BatchNorm2d(2, device=device).eval()
    x = torch.randn(3, 2, 4, 4, device=device, requires_grad=True)
    with cnnops.engine(engine):
        y = layer(x)
        layer.train()
        layer(5 * x.detach() + 3)
        y.sum().backward()
    assert x.grad is not None
    assert (x.grad - 1 / (1 + layer.eps) ** 0.5).abs().max() < 1e-6


@pytest.mark.parametrize("engine", ENGINES)
def test_batches_of_one_value_are_refused_in_training_only(engine: str) -> None:
    device = device_of(engine)
    x, mean, var = (torch.ones(size, device=device) for size in ((1, 3, 1, 1), (3,), (3,)))
    with cnnops.engine(engine):
        with pytest.raises(ValueError, match="expected more than 1 value per channel"):
            batch_norm(x, mean, var, training=True)
        assert batch_norm(x, mean, var).shape == x.shape
    assert mean.tolist() == var.tolist() == [1, 1, 1]


@pytest.mark.parametrize("engine", ENGINES)
def test_strided_running_statistics(engine: str) -> None:
    """They may be views, and the values between theirs stay."""
    device = device_of(engine)
    x = torch.randn(4, 3, 5, 5, device=device)
    store = torch.ones(6, device=device)
    mean, var = store[::2], torch.ones(3, device=device)
    reference = torch.ones(3), torch.ones(3)
    F.batch_norm(x.cpu(), *reference, training=True)
    with cnnops.engine(engine):
        batch_norm(x, mean, var, training=True)
    assert_close(mean, reference[0], 2e-6, "mean")
    assert_close(var, reference[1], 2e-6, "variance")
    assert store[1::2].tolist() == [1, 1, 1]


@pytest.mark.parametrize("engine", ENGINES)
def test_same_input_gives_same_bits(engine: str) -> None:
    device = device_of(engine)
    x = torch.randn(5, 6, 13, 11, device=device, requires_grad=True)
    w, b = (torch.randn(6, device=device, requires_grad=True) for _ in range(2))
    runs = []
    with cnnops.engine(engine):
        for _ in range(2):
            y = batch_norm_act(x, None, None, w, b, training=True)
            runs.append((y, *torch.autograd.grad(y, (x, w, b), y.detach())))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


# ---- derivatives ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["x", "x_affine", "x_bias", "x_affine_residual", "x_residual"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_first_and_second_derivatives(activation: str, training: bool, given: str) -> None:
    x, residual = (
        torch.randn(3, 2, 2, 2, dtype=torch.float64, requires_grad=True) for _ in range(2)
    )
    weight, bias = (torch.randn(2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    mean, var = torch.randn(2, dtype=torch.float64), torch.rand(2, dtype=torch.float64) + 0.5
    inputs = (
        x,
        weight if "affine" in given else None,
        bias if "affine" in given or "bias" in given else None,
        residual if "residual" in given else None,
    )

    def function(x: Tensor, w: Tensor | None, b: Tensor | None, r: Tensor | None) -> Tensor:
        statistics = (None, None) if training else (mean, var)
        return batch_norm_act(x, *statistics, w, b, training, residual=r, activation=activation)

    with cnnops.engine("cpu"):
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)


def test_second_derivative_where_the_gradient_is_constant() -> None:
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    mean, var = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    (first,) = torch.autograd.grad(batch_norm(x, mean, var).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x, allow_unused=True)
    assert second is None


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_third_derivative(training: bool) -> None:
    """Of a loss that is not linear, so that output gradients themselves depend on the input."""
    x = torch.randn(3, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    mean, var = torch.zeros(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    statistics = (None, None) if training else (mean, var)

    def third(function: Callable[[Tensor], Tensor]) -> Tensor:
        y = function(x)
        for _ in range(3):
            (y,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return y

    ours = third(
        lambda x: batch_norm_act(
            x, *statistics, None, None, training, residual=x, activation="tanh"
        )
    )
    theirs = third(lambda x: torch.tanh(_composed(x, mean, var, training) + x))
    assert_close(ours, theirs, 1e-9, "third derivative")


def _composed(x: Tensor, mean: Tensor, var: Tensor, training: bool) -> Tensor:
    if training:
        var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
    return (x - mean.view(-1, 1, 1)) * torch.rsqrt(var + 1e-5).view(-1, 1, 1)


def _by_definition(
    x: Tensor, w: Tensor, b: Tensor, r: Tensor, statistics: tuple[Tensor, Tensor] | None, activation: str
) -> Tensor:  # fmt: skip
    """Batch norm of N x C x L in elementary operations. PyTorch's own is no reference here: in training its
    tangent is not differentiated right."""
    if statistics is None:
        mean = x.mean((0, 2))
        statistics = mean, (x - mean[:, None]).square().mean((0, 2))
    mean, var = statistics
    xhat = (x - mean[:, None]) / (var[:, None] + 1e-5).sqrt()
    return ACTIVATIONS[activation](xhat * w[:, None] + b[:, None] + r)


Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
ALL_FOUR = (0, 1, 2, 3)


def _squared(f: Loss) -> Loss:
    return lambda *tensors: (f(*tensors).square() * torch.arange(60.0).view(4, 3, 5)).sum()


def _transformed(
    name: str, f: Loss, tensors: tuple[Tensor, ...], tangents: tuple[Tensor, ...]
) -> Any:
    x, w, b, r = tensors
    maps = torch.stack([x, 2 * x.sin(), x.cos()])
    scales = torch.stack([w, w + 1])
    loss = _squared(f)
    gradients = grad(loss, ALL_FOUR)

    def second(*tensors: Tensor) -> Tensor:
        return torch.stack([g.square().sum() for g in gradients(*tensors)]).sum()

    def tangent(*tensors: Tensor) -> Tensor:
        return jvp(f, tensors, tangents)[1].square().sum()

    results: dict[str, Callable[[], Any]] = {
        "grad": lambda: gradients(*tensors),
        "grad(grad)": lambda: grad(second, ALL_FOUR)(*tensors),
        "jvp": lambda: jvp(f, tensors, tangents),
        "jvp of x": lambda: jvp(lambda x: f(x, w, b, r), (x,), tangents[:1]),
        "jvp(grad)": lambda: jvp(gradients, tensors, tangents),
        "grad(jvp)": lambda: grad(tangent, ALL_FOUR)(*tensors),
        "vmap of x": lambda: vmap(lambda x: f(x, w, b, r))(maps),
        "vmap of an inner axis": lambda: vmap(lambda x: f(x, w, b, r), 2, 1)(maps.movedim(0, 2)),
        "vmap of weight": lambda: vmap(lambda w: f(x, w, b, r))(scales),
        "vmap(vmap)": lambda: vmap(vmap(lambda x, w: f(x, w, b, r), (0, None)), (None, 0))(maps, scales),
        "vmap(grad)": lambda: vmap(gradients, (0, None, None, None))(maps, w, b, r),
        "grad(vmap)": lambda: grad(lambda m: vmap(lambda x: loss(x, w, b, r))(m).sum())(maps),
        "hessian": lambda: hessian(lambda x: loss(x, w, b, r))(x),
        "jacrev(jacrev)": lambda: jacrev(jacrev(lambda x: loss(x, w, b, r)))(x),
    }  # fmt: skip
    return results[name]()


TRANSFORMS = (
    "grad", "grad(grad)", "jvp", "jvp of x", "jvp(grad)", "grad(jvp)", "vmap of x", "vmap of an inner axis",
    "vmap of weight", "vmap(vmap)", "vmap(grad)", "grad(vmap)", "hessian", "jacrev(jacrev)",
)  # fmt: skip


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("activation", ["none", "relu", "sigmoid", "silu"])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms(name: str, activation: str, training: bool) -> None:
    """What torch.func makes of it, with a residual."""
    wide = {"dtype": torch.float64}
    tensors, tangents = (
        (torch.randn(4, 3, 5, **wide), *torch.randn(2, 3, **wide), torch.randn(4, 3, 5, **wide))
        for _ in range(2)
    )
    statistics = None if training else (torch.randn(3, **wide), torch.rand(3, **wide) + 0.5)

    def function(x: Tensor, w: Tensor, b: Tensor, r: Tensor) -> Tensor:
        running = statistics or (None, None)
        return batch_norm_act(x, *running, w, b, training, residual=r, activation=activation)

    def definition(*tensors: Tensor) -> Tensor:
        return _by_definition(*tensors, statistics, activation)

    ours = _transformed(name, function, tensors, tangents)
    theirs = _transformed(name, definition, tensors, tangents)
    for a, b in zip(tree_leaves(ours), tree_leaves(theirs), strict=True):
        assert_close(a, b, 1e-11, name)


def test_map_of_running_statistics() -> None:
    """Mapped ones are updated each by its map; shared ones cannot be, as in PyTorch."""
    x, mean, var = torch.randn(5, 4, 3, 6), torch.zeros(3, 5), torch.ones(5, 3)
    vmap(lambda x, m, v: batch_norm(x, m, v, training=True), (0, 1, 0))(x, mean, var)
    for i in range(5):
        expected = torch.zeros(3), torch.ones(3)
        F.batch_norm(x[i], *expected, training=True)
        assert_close(mean[:, i], expected[0], 2e-6, f"mean of map {i}")
        assert_close(var[i], expected[1], 2e-6, f"variance of map {i}")
    with pytest.raises(RuntimeError, match="running_mean, running_var: expected mapped tensors"):
        vmap(lambda x: batch_norm(x, mean[:, 0], var[0], training=True))(x)


# ---- memory ---------------------------------------------------------------------------------------------


def _saved(function: Callable[[], Tensor]) -> int:
    """Bytes that are kept for the backward, shared memory counted once."""
    storages: dict[int, int] = {}
    keep = []

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        keep.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = function()
    assert y.requires_grad
    return sum(storages.values())


@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_keeps_no_more_than_torch(activation: str, training: bool, residual: bool) -> None:
    """Batch norm, addition and activation between two convolutions; vectors of one value a channel aside."""
    C, w = 8, torch.randn(8, 8, 3, 3, requires_grad=True)
    x = torch.randn(4, C, 16, 16, requires_grad=True)
    weight, bias, mean, var = torch.rand(4, C).add_(0.5)
    parameters = [t.clone().requires_grad_() for t in (weight, bias)]

    def ours() -> Tensor:
        h = cnnops.functional.conv2d(x, w)
        r = cnnops.functional.conv2d(x, w) if residual else None
        y = batch_norm_act(h, mean, var, *parameters, training, residual=r, activation=activation)
        return cnnops.functional.conv2d(y, w)

    def theirs() -> Tensor:
        z = F.batch_norm(F.conv2d(x, w), mean, var, *parameters, training)
        z = z + F.conv2d(x, w) if residual else z
        return F.conv2d(ACTIVATIONS[activation](z), w)

    assert _saved(ours) <= _saved(theirs) + 8 * C * x.itemsize


# ---- statistics -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("engine", ENGINES)
def test_statistics_alone(engine: str, dtype: torch.dtype) -> None:
    device = device_of(engine)
    sizes = ((1, 2, 1), (3, 5), (2, 3, 70, 70), (2, 16, 9, 8))
    for size in sizes:
        for x in (torch.randn(size), torch.randn(size[0], *size[2:], size[1]).movedim(-1, 1)):
            x = (100 + x).to(device, dtype)
            with cnnops.engine(engine):
                mean, var = batch_norm_stats(x, engine)
            axes = (0, *range(2, x.dim()))
            wanted = torch.var_mean(x.double(), axes, correction=0)
            limit = 1e-13 if dtype == torch.float64 else 1e-6
            assert mean.dtype == var.dtype and mean.itemsize == max(4, x.itemsize)
            assert_close(mean, wanted[1], limit, f"mean {size}")
            assert_close(
                var, wanted[0], 10 * limit if engine == "aten" else limit, f"variance {size}"
            )
    with cnnops.engine(engine):
        mean, var = batch_norm_stats(x[:0], engine)
    assert not mean.any() and not var.any()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_statistics_of_unlike_values(dtype: torch.dtype, layout: str) -> None:
    """Of channels whose first values say nothing of the mean: far from all others, or all alike; of squares
    that float32 does not hold, and that are less than it tells from zero."""
    x = torch.randn(5, 19, 23, 21)
    x[0, ::4] = 2000 + x[0, ::4] / 100
    x[:, 1, :12] = -30
    x[:, 2] = 0.375
    if dtype in (torch.float32, torch.float64):
        x[:, 3] *= 1e25
        x[:, 5] *= 1e-25
    x = x.to(dtype)
    if layout == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    with cnnops.engine("cpu"):
        mean, var = batch_norm_stats(x, "cpu")
    wanted_var, wanted_mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    limit = 1e-12 if dtype == torch.float64 else 1e-6
    assert ((mean - wanted_mean).abs() <= limit * (wanted_var.sqrt() + wanted_mean.abs())).all()
    wanted_var = wanted_var.to(var.dtype)  # to infinity, where float32 does not hold it
    finite = wanted_var.isfinite()
    assert torch.equal(var.isfinite(), finite)
    assert ((var - wanted_var)[finite].abs() <= 2 * limit * wanted_var[finite] + 1e-30).all()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("bits", [bits for bits in simd.WIDTHS if bits != simd.simd_bits()])
def test_vectors_of_other_widths(bits: int, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planes and rows of several times four vectors, two more, another and a part of one."""
    monkeypatch.setattr(simd, "simd_bits", lambda: bits)
    form = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    x, g = (torch.randn(3, 117, 9, 13).to(memory_format=form) for _ in range(2))
    inputs = [t.requires_grad_() for t in (x, *torch.randn(2, 117))]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    with cnnops.engine("cpu"):
        y = batch_norm(inputs[0], None, None, *inputs[1:], training=True)
        ours = (y, *torch.autograd.grad(y, inputs, g))
    y = F.batch_norm(exact[0], None, None, *exact[1:], training=True)
    theirs = (y, *torch.autograd.grad(y, exact, g.double()))
    for name, a, b in zip(("y", "x", "weight", "bias"), ours, theirs, strict=True):
        assert_close(a, b, 1e-6, name)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("channels", [6, 65, 260])
def test_threads_do_not_change_bits(channels: int, layout: str) -> None:
    form = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    x, r, g = (torch.randn(4, channels, 31, 29).to(memory_format=form) for _ in range(3))
    parameters = torch.randn(2, channels)
    inputs = [t.requires_grad_() for t in (x, *parameters, r)]
    threads, runs = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            with cnnops.engine("cpu"):
                y = batch_norm_act(x, None, None, *inputs[1:3], training=True, residual=r)
                runs.append((y, *torch.autograd.grad(y, inputs, g)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


# ---- layers ---------------------------------------------------------------------------------------------

LAYERS = [
    ("BatchNorm1d", (6, 4)), ("BatchNorm1d", (6, 4, 5)), ("BatchNorm2d", (3, 4, 5, 2)),
    ("BatchNorm3d", (2, 4, 3, 2, 5)),
]  # fmt: skip
OPTIONS: list[dict[str, Any]] = [
    {}, {"affine": False}, {"momentum": None, "eps": 0.1}, {"track_running_stats": False},
]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("lazy", [False, True], ids=["", "lazy"])
@pytest.mark.parametrize("name, size", LAYERS)
def test_layers(name: str, size: tuple[int, ...], lazy: bool, options: dict[str, Any]) -> None:
    """Every one computes what PyTorch's does, by our kernels from the first call on."""
    theirs = getattr(torch.nn, name)(4, **options)
    ours = getattr(nn, f"Lazy{name}")(**options) if lazy else getattr(nn, name)(4, **options)
    for training in (True, True, False):
        x = torch.randn(size)
        with torch.no_grad():
            chosen = cnnops.explain(ours.train(training), x)
            expected = theirs.train(training)(x)
        assert [c.op for c in chosen] == [
            "batch_norm_train" if training or not theirs.track_running_stats else "batch_norm_infer"
        ]
        assert type(ours) is getattr(nn, name)
        for key, value in theirs.state_dict().items():
            assert_close(ours.state_dict()[key], value, 2e-6, key)
    assert_close(ours(x), expected, 2e-6, "output")
    assert repr(ours) == repr(theirs)


@pytest.mark.parametrize("name, size", LAYERS)
def test_layers_with_activation(name: str, size: tuple[int, ...]) -> None:
    plain = getattr(torch.nn, name)(4)
    fused = getattr(nn, name.replace("Norm", "NormAct"))(4, activation="silu")
    fused.load_state_dict(plain.state_dict())
    x, residual = torch.randn(2, *size)
    assert_close(fused(x, residual), F.silu(plain(x) + residual), 1e-6, "with residual")
    assert_close(fused(x), F.silu(plain(x)), 1e-6, "without")
    assert_close(fused.eval()(x), F.silu(plain.eval()(x)), 2e-6, "evaluated")
    assert list(fused.state_dict()) == list(plain.state_dict())
    assert repr(fused).endswith("activation=silu)")
    copied = pickle.loads(pickle.dumps(fused))
    assert copied.activation == "silu" and torch.equal(copied(x), fused(x))
    with pytest.raises(ValueError, match="activation: expected one of none, relu"):
        type(fused)(4, activation="softmax")


@pytest.mark.parametrize("name, size", LAYERS)
def test_layers_refuse_other_dimensions(name: str, size: tuple[int, ...]) -> None:
    layer = getattr(nn, name)(4)
    with pytest.raises(ValueError, match="expected"):
        layer(torch.randn(4))
    with pytest.raises(ValueError, match="expected"):
        layer(torch.randn(2, 4, 3, 3, 3, 3))
    assert layer.num_batches_tracked == 0

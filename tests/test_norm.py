"""Batch norm in every engine: the rows of tests/cases, running statistics, and the switch to evaluation."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from cases import (
    ACTIVATIONS,
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
from torch import Tensor

import cnnops
from cnnops import nn
from cnnops.cuda import emulate
from cnnops.functional import batch_norm, batch_norm_act


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

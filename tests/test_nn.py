"""Layers: torch.nn's constructors, attributes and state_dicts, with this package's computation."""

from __future__ import annotations

import copy
import inspect
import io
from typing import Any

import pytest
import torch
from cases import ENGINES, assert_close, device_of

import cnnops
from cnnops import nn

LAYERS: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
    ("Conv2d", (4, 6, 3), {}),
    ("Conv2d", (4, 6, (3, 2)), {"stride": (2, 1), "padding": (1, 0), "groups": 2, "bias": False}),
    ("Conv2d", (4, 8, 3), {"padding": "same", "dilation": 2}),
    ("Conv2d", (4, 6, 3), {"padding": 1, "padding_mode": "reflect"}),
    ("Conv2d", (4, 6, (3, 5)), {"padding": (1, 2), "padding_mode": "replicate", "stride": 2}),
    ("Conv2d", (4, 6, (2, 4)), {"padding": "same", "padding_mode": "circular"}),
    ("MaxPool2d", (3,), {"stride": 2, "padding": 1}),
    ("MaxPool2d", (2,), {"dilation": 2, "ceil_mode": True}),
    ("AvgPool2d", (2,), {}),
    ("AvgPool2d", ((3, 2),), {"padding": 1, "ceil_mode": True, "count_include_pad": False}),
    ("AvgPool2d", (2,), {"divisor_override": 3}),
    ("AdaptiveAvgPool2d", (1,), {}),
    ("AdaptiveAvgPool2d", ((3, None),), {}),
    ("BatchNorm2d", (4,), {}),
    ("BatchNorm2d", (4,), {"eps": 0.1, "momentum": None}),
    ("BatchNorm2d", (4,), {"affine": False, "momentum": 0.4}),
    ("BatchNorm2d", (4,), {"track_running_stats": False}),
]


def _pair(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    ours, theirs = getattr(nn, name)(*args, **kwargs), getattr(torch.nn, name)(*args, **kwargs)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name, args, kwargs", LAYERS)
def test_layers_compute_what_torchs_do(
    name: str, args: tuple[Any, ...], kwargs: dict[str, Any], engine: str
) -> None:
    device = device_of(engine)
    ours, theirs = _pair(name, args, kwargs)
    ours, theirs = ours.to(device), theirs.double()
    with cnnops.engine(engine):
        for training in (True, True, False):
            ours.train(training)
            theirs.train(training)
            x = torch.randn(2, 4, 8, 7, device=device, requires_grad=True)
            z = x.detach().cpu().double().requires_grad_()
            y, expected = ours(x), theirs(z)
            assert_close(y, expected, 2e-6, "output")
            grad = torch.randn_like(y)
            y.backward(grad)
            expected.backward(grad.cpu().double())
            assert_close(x.grad, z.grad, 5e-6, "input gradient")
    for (key, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        assert_close(a, b, 2e-6, key)
    for (key, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert_close(p.grad, q.grad, 5e-6, key)


@pytest.mark.parametrize("name", [name for name in nn.__all__ if hasattr(torch.nn, name)])
def test_constructors_are_torchs(name: str) -> None:
    ours, theirs = getattr(nn, name), getattr(torch.nn, name)
    assert issubclass(ours, theirs)
    assert inspect.signature(ours) == inspect.signature(theirs)


@pytest.mark.parametrize("name, args, kwargs", LAYERS)
def test_state_dicts_are_torchs(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Both ways, and with the same start values from the same seed."""
    torch.manual_seed(1)
    ours = getattr(nn, name)(*args, **kwargs)
    torch.manual_seed(1)
    theirs = getattr(torch.nn, name)(*args, **kwargs)
    mine, other = ours.state_dict(), theirs.state_dict()
    assert mine.keys() == other.keys()
    assert all(torch.equal(a, other[key]) for key, a in mine.items())
    ours.load_state_dict(other)
    theirs.load_state_dict(mine)
    assert repr(ours) == repr(theirs)


def test_layers_can_be_copied_and_saved() -> None:
    layers = torch.nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.MaxPool2d(2))
    x = torch.randn(3, 1, 6, 6)
    layers(x)
    layers.eval()
    buffer = io.BytesIO()
    torch.save(layers, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(layers), torch.load(buffer, weights_only=False)):
        assert torch.equal(other(x), layers(x))


def test_max_pool_with_indices() -> None:
    """The indices are what torch.nn.MaxUnpool2d takes."""
    x = torch.randn(2, 3, 8, 8)
    y, indices = nn.MaxPool2d(2, return_indices=True)(x)
    expected, places = torch.nn.MaxPool2d(2, return_indices=True)(x)
    assert torch.equal(y, expected) and torch.equal(indices, places)
    sparse = torch.nn.MaxUnpool2d(2)(y, indices)
    assert torch.equal(sparse[sparse != 0], x[sparse != 0])


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("tracked", [True, False])
def test_batch_norm_keeps_torchs_books(tracked: bool, affine: bool, momentum: float | None) -> None:
    """num_batches_tracked, and running statistics that are absent, frozen, or dropped later."""
    kwargs = {"momentum": momentum, "affine": affine, "track_running_stats": tracked}
    ours, theirs = _pair("BatchNorm2d", (3,), kwargs)
    for training in (True, False, True, True):
        for layer in (ours, theirs):
            layer.train(training)
        x = torch.randn(4, 3, 5, 5) + 1
        assert_close(ours(x), theirs(x), 2e-6, "output")
    for key, value in theirs.state_dict().items():
        assert_close(ours.state_dict()[key], value, 2e-6, key)
    if tracked:
        assert ours.num_batches_tracked == 3 and ours.num_batches_tracked.dtype == torch.int64
    for layer in (ours, theirs):
        layer.running_mean = layer.running_var = None
        layer.eval()
    assert_close(ours(x), theirs(x), 2e-6, "without running statistics")


def test_failed_forward_leaves_batch_norm_as_it_was() -> None:
    layer = nn.BatchNorm2d(3)
    before = copy.deepcopy(layer.state_dict())
    bad: list[tuple[type[Exception], torch.Tensor]] = [
        (ValueError, torch.ones(1, 3, 1, 1)),
        (ValueError, torch.ones(4, 3)),
        (RuntimeError, torch.ones(2, 4, 5, 5)),
        (RuntimeError, torch.ones(2, 3, 5, 5, dtype=torch.float64)),
    ]
    for error, x in bad:
        with pytest.raises(error):
            layer(x)
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())


def test_training_a_small_network_follows_torchs() -> None:
    """Ten steps of the same network, from the same weights, on the same data."""

    def network(layers: Any) -> torch.nn.Sequential:
        return torch.nn.Sequential(
            layers.Conv2d(1, 4, 3, padding=1, bias=False), layers.BatchNorm2d(4), torch.nn.ReLU(),
            layers.MaxPool2d(2), layers.Conv2d(4, 6, 3), layers.AdaptiveAvgPool2d(1),
            torch.nn.Flatten(), torch.nn.Linear(6, 3),
        )  # fmt: skip

    ours, theirs = network(nn).double(), network(torch.nn).double()
    ours.load_state_dict(theirs.state_dict())
    x, labels = torch.randn(12, 1, 8, 8, dtype=torch.float64), torch.arange(12) % 3
    losses = []
    for net in (ours, theirs):
        optimizer = torch.optim.SGD(net.parameters(), 0.2, momentum=0.9)
        for _ in range(10):
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(net(x), labels)
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)
    for (key, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        assert_close(a, b, 1e-9, key)

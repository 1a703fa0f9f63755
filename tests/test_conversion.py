"""Whole models: what `convert` exchanges, what it leaves, and that nobody can tell but by the kernels."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from cases import TOLERANCE, assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import UNet, assert_same, step
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

import cnnops
import cnnops.nn

# ---- the swap -------------------------------------------------------------------------------------------


def test_every_layer_that_both_have() -> None:
    shared = [name for name in cnnops.nn.__all__ if hasattr(nn, name)]
    assert len(shared) >= 45
    for name in shared:
        assert issubclass(getattr(cnnops.nn, name), getattr(nn, name)), name


def test_in_place_and_back() -> None:
    model = UNet(2)
    state = copy.deepcopy(model.state_dict())
    parameters = [id(p) for p in model.parameters()]
    before = {name: type(m) for name, m in model.named_modules()}
    done = cnnops.convert(model)
    assert done.model is model and not done.left
    assert done.swapped["first.0"] == (nn.Conv2d, cnnops.nn.Conv2d)
    assert len(done.swapped) == 12
    kinds = {type(m) for m in model.modules() if type(m).__module__.startswith("cnnops")}
    assert kinds == {ours for _, ours in done.swapped.values()}
    assert [id(p) for p in model.parameters()] == parameters
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    assert not cnnops.convert(model).swapped, "converting twice"
    assert len(cnnops.revert(model).swapped) == 12
    assert {name: type(m) for name, m in model.named_modules()} == before
    assert not cnnops.revert(model).swapped, "reverting twice"


def test_a_copy_leaves_the_model_alone() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    done = cnnops.convert(model, copy=True)
    assert type(model[0]) is nn.Conv2d and type(done.model[0]) is cnnops.nn.Conv2d
    assert done.model[0].weight is not model[0].weight
    assert torch.equal(done.model[0].weight, model[0].weight)


def test_a_single_layer_and_a_layer_of_two_names() -> None:
    layer = nn.Conv2d(3, 4, 3)
    assert cnnops.convert(layer).swapped == {"": (nn.Conv2d, cnnops.nn.Conv2d)}
    shared = nn.MaxPool2d(2)
    model = nn.Sequential(shared, shared)
    assert list(cnnops.convert(model).swapped) == ["0"] and type(model[1]) is cnnops.nn.MaxPool2d


def test_subclasses_and_scripts_are_left() -> None:
    class Standardized(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x - x.mean())

    scripted: Any = torch.jit.script(nn.Sequential(nn.Conv2d(3, 3, 1)))  # type: ignore[no-untyped-call]
    model = nn.Sequential(Standardized(3, 4, 3), nn.ReLU(), nn.Linear(4, 4))
    done = cnnops.convert(model)
    assert not done.swapped and list(done.left) == ["0"]
    assert "Standardized is a subclass of torch.Conv2d" in done.left["0"]
    assert set(cnnops.convert(nn.Sequential(scripted)).left) == {"0", "0.0"}


def test_the_report_is_a_tree() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.BatchNorm2d(4), nn.ReLU()))
    assert str(cnnops.convert(model)).splitlines() == [
        "Sequential",
        "  0: Conv2d  torch.Conv2d -> cnnops.Conv2d",
        "  1: Sequential",
        "    0: BatchNorm2d  torch.BatchNorm2d -> cnnops.BatchNorm2d",
        "    1: ReLU",
        "2 swapped, 0 left",
    ]


def test_not_a_module() -> None:
    with pytest.raises(TypeError, match="expected a torch.nn.Module, got list"):
        cnnops.convert([nn.Conv2d(1, 1, 1)])  # type: ignore[arg-type]


def test_hooks_flags_and_optimizers_go_on() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).double().eval()
    seen: list[str] = []
    model[0].register_forward_hook(lambda *_: seen.append("forward"))
    model[0].register_full_backward_hook(lambda *_: seen.append("backward"))
    model[1].weight.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    cnnops.convert(model)
    assert not model[1].training and not model[1].weight.requires_grad
    before = model[0].weight.detach().clone()
    model(torch.randn(1, 3, 5, 5).double()).sum().backward()
    optimizer.step()
    assert seen == ["forward", "backward"]
    assert not torch.equal(before, model[0].weight)


@pytest.mark.parametrize("norm", [spectral_norm, weight_norm])
def test_parametrized_layers(norm: Any) -> None:
    torch.manual_seed(0)
    theirs = nn.Sequential(norm(nn.Conv2d(3, 4, 3)), norm(nn.ConvTranspose2d(4, 2, 2, stride=2)))
    ours = copy.deepcopy(theirs)
    done = cnnops.convert(ours)
    assert len(done.swapped) == 2
    assert isinstance(ours[0], cnnops.nn.Conv2d) and parametrize.is_parametrized(ours[0])
    x = torch.randn(2, 3, 6, 6)
    choices = cnnops.explain(ours, x)
    assert [c.op for c in choices] == ["conv_fprop", "conv_dgrad"]
    torch.manual_seed(1)
    first = step(theirs, x)
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    for module in (theirs, ours):
        module.eval()
        module.zero_grad()
    assert_same(step(ours, x), step(theirs, x), 2e-6)
    assert first
    again = copy.deepcopy(ours)
    assert_close(again(x), ours(x), 0.0, "a copy of a parametrized layer")
    parametrize.remove_parametrizations(ours[0], "weight")
    assert type(ours[0]) is cnnops.nn.Conv2d


def test_pickle_and_deepcopy() -> None:
    model = cnnops.convert(UNet(2)).model.eval()
    x = torch.randn(1, 3, 8, 8)
    y = model(x)
    assert torch.equal(copy.deepcopy(model)(x), y)
    restored = pickle.loads(pickle.dumps(model))
    assert type(restored.first[0]) is cnnops.nn.Conv2d and torch.equal(restored(x), y)


def test_compiled_and_wrapped_models() -> None:
    """What torch wraps around a model is passed through: the layers inside are the same modules."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    compiled: Any = torch.compile(model, backend="eager")
    x = torch.randn(1, 3, 5, 5)
    before = compiled(x)
    assert list(cnnops.convert(compiled).swapped) == ["_orig_mod.0"]
    assert_close(compiled(x), before, 1e-6, "compiled")
    wrapped = nn.DataParallel(nn.Sequential(nn.Conv2d(3, 4, 3)))
    assert list(cnnops.convert(wrapped).swapped) == ["module.0"]
    assert wrapped(x).shape == (1, 4, 3, 3)


# ---- nobody can tell ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_unet_trains_as_before(dims: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    theirs = UNet(dims).to(dtype)
    ours = cnnops.convert(theirs, copy=True).model
    limit = 20 * TOLERANCE[dtype].gradient
    for _ in range(2):
        x = torch.randn(3, 3, *(8, 6, 10)[:dims], dtype=dtype)
        assert_same(step(ours, x), step(theirs, x), limit)
    for model in (ours, theirs):
        model.eval()
    assert_close(ours(x), theirs(x), limit, "evaluation")


@st.composite
def networks(draw: st.DrawFn) -> tuple[nn.Sequential, tuple[int, ...]]:
    """A stack of layers of torch.nn, and the size of an input that it takes."""
    dims = draw(st.integers(1, 3))
    channels, side = draw(st.integers(1, 6)), draw(st.integers(5, 7 if dims > 1 else 12))
    size = (draw(st.integers(2, 3)), channels, *(side,) * dims)
    layers: list[nn.Module] = []

    def layer(name: str, *args: Any, **options: Any) -> None:
        layers.append(getattr(nn, f"{name}{dims}d")(*args, **options))

    for _ in range(draw(st.integers(1, 5))):
        kind = draw(
            st.sampled_from(
                ["conv", "depthwise", "up", "max", "avg", "lp", "adaptive", "batch", "group", "instance",
                 "layer", "relu"]
            )
        )  # fmt: skip
        if kind == "conv" and side >= 3:
            out = draw(st.integers(1, 6))
            mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
            layer("Conv", channels, out, 3, padding=1, padding_mode=mode, bias=draw(st.booleans()))
            channels = out
        elif kind == "depthwise":
            layer("Conv", channels, channels, 3, padding=2, dilation=2, groups=channels)
        elif kind == "up" and side < 8:
            out = draw(st.integers(1, 4))
            layer("ConvTranspose", channels, out, 3, stride=2, padding=1, output_padding=1)
            channels, side = out, 2 * side
        elif kind == "max" and side >= 3:
            layer("MaxPool", 3, 2, padding=1, ceil_mode=draw(st.booleans()))
            side = (side + 1) // 2 if not layers[-1].ceil_mode else (side + 2) // 2
        elif kind == "avg" and side >= 2:
            layer("AvgPool", 2, 1)
            side -= 1
        elif kind == "lp" and side >= 2:
            layer("LPPool", 2.0, 2, 1)
            side -= 1
        elif kind == "adaptive":
            side = draw(st.integers(2, 5))
            layer(draw(st.sampled_from(["AdaptiveAvgPool", "AdaptiveMaxPool"])), side)
        elif kind == "batch":
            momentum = draw(st.sampled_from([0.1, None]))
            layer("BatchNorm", channels, momentum=momentum, affine=draw(st.booleans()))
        elif kind == "group":
            layers.append(nn.GroupNorm(channels if draw(st.booleans()) else 1, channels))
        elif kind == "instance" and side > 1:
            layer("InstanceNorm", channels, affine=draw(st.booleans()))
        elif kind == "layer":
            layers.append(nn.LayerNorm([side] * dims))
        else:
            layers.append(nn.ReLU())
    return nn.Sequential(*layers), size


@settings(max_examples=100)
@given(networks(), st.integers(0, 2**31))
def test_random_networks_train_as_before(
    network: tuple[nn.Sequential, tuple[int, ...]], seed: int
) -> None:
    theirs, size = network[0].double(), network[1]
    ours = cnnops.convert(theirs, copy=True).model
    # Positive and of one scale: an LP norm's root, and roots' gradients, stay tame.
    x = torch.rand(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.5
    try:
        expected = step(theirs, x)
    except (RuntimeError, ValueError) as error:
        with pytest.raises(type(error)):
            step(ours, x)
        return
    if all(value.isfinite().all() for value in expected.values()):
        assert_same(step(ours, x), expected, 1e-8)

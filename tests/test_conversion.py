"""Whole models: what `convert` exchanges, what it leaves, and that nobody can tell but by the kernels."""

from __future__ import annotations

import copy
import pickle
from collections import Counter
from typing import Any

import pytest
import torch
from cases import TOLERANCE, assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import UNet, assert_same, step
from test_fuse import drawn, lived_in
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


class Depthwise(nn.Conv2d):
    """Arguments of its own, and nothing else."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, padding=1, groups=channels)

    def receptive(self) -> int:
        return self.kernel_size[0]


class Norm(nn.BatchNorm2d):
    def extra_repr(self) -> str:
        return f"of {self.num_features}"


class OfOurs(cnnops.nn.BatchNorm2d):
    """One that computes by our kernels from the start."""


class Pair(nn.Sequential):
    """Whose forward is a Sequential's."""

    def __init__(self, channels: int) -> None:
        super().__init__(
            Depthwise(channels), Norm(channels), nn.ReLU(), OfOurs(channels), nn.Tanh()
        )


@pytest.mark.parametrize("fuse_training", [False, True], ids=["plain", "fused"])
def test_subclasses_that_override_nothing(fuse_training: bool) -> None:
    model = Pair(4).double()
    theirs = copy.deepcopy(model)
    done = cnnops.convert(model, fuse_training=fuse_training)
    assert not done.left and done.swapped.keys() == (
        {"0", "1", "3"} if fuse_training else {"0", "1"}
    )
    assert done.fused == ({"1": "relu", "3": "tanh"} if fuse_training else {})
    conv, norm = model[0], model[1]
    assert isinstance(conv, Depthwise) and isinstance(conv, cnnops.nn.Conv2d)
    assert type(conv).__qualname__ == "Depthwise" and type(conv).__module__ == Depthwise.__module__
    assert conv.receptive() == 3 and repr(norm) == "Norm(of 4)"
    assert "  0: Depthwise  test_conversion.Depthwise -> cnnops.Conv2d" in str(done)
    assert isinstance(norm, Norm) and isinstance(norm, cnnops.nn.BatchNormAct2d) == fuse_training
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    ops = [choice.op for choice in cnnops.explain(model, x)]
    assert ops == ["conv_fprop", "batch_norm_train", "batch_norm_train"]
    model.load_state_dict(theirs.state_dict())
    assert_same(step(model, x), step(theirs, x), 1e-12)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other[0]) is type(conv) and type(other[1]) is type(norm), "made once"
        assert torch.equal(other.eval()(x), model.eval()(x))
    assert not cnnops.convert(model, fuse_training=fuse_training).swapped, "converting twice"
    undone = cnnops.revert(model)
    assert undone.swapped.keys() == {"0", "1"}
    assert [type(m) for m in model] == [type(m) for m in theirs]
    assert list(undone.left) == ["3"], "nothing of torch's computes as OfOurs does"


def test_subclasses_that_override_nothing_may_be_parametrized() -> None:
    theirs = nn.Sequential(weight_norm(Depthwise(4)))
    ours = cnnops.convert(theirs, copy=True).model
    assert isinstance(ours[0], cnnops.nn.Conv2d) and isinstance(ours[0], Depthwise)
    x = torch.randn(2, 4, 5, 5)
    assert_same(step(ours, x), step(theirs, x), 2e-6)
    assert not cnnops.convert(ours).swapped
    assert cnnops.revert(ours).swapped and not isinstance(ours[0], cnnops.nn.Conv2d)
    parametrize.remove_parametrizations(ours[0], "weight")
    assert type(ours[0]) is Depthwise


def test_subclasses_in_the_way_of_ours() -> None:
    """What torch's layer does not have, but ours."""

    class Own(nn.BatchNorm2d):
        def _forward(self, x: Tensor) -> Tensor:
            return x

    assert hasattr(cnnops.nn.BatchNorm2d, "_forward") and not hasattr(nn.BatchNorm2d, "_forward")
    model = nn.Sequential(Own(3), nn.ReLU())
    done = cnnops.convert(model, fuse_training=True)
    assert not done.swapped and "Own is a subclass of torch.BatchNorm2d" in done.left["0"]


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


# ---- batch norm, addition and activation in one layer ------------------------------------------------------


class Residual(nn.Module):
    """A block as they are written, with an addition in place and one activation for all."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = nn.Sequential(nn.Conv2d(channels, channels, 1), nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        identity = self.shortcut(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        return self.relu(out)


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        act = nn.SiLU()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=None), act)
        self.blocks = nn.Sequential(Residual(4), Residual(4))
        self.tail = nn.Sequential(
            nn.Conv2d(4, 6, 2), nn.BatchNorm2d(6), act, nn.BatchNorm2d(6), nn.Tanh()
        )
        self.norm, self.head = nn.BatchNorm1d(6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.tail(self.blocks(self.stem(x)))
        y: Tensor = self.head(torch.sigmoid(self.norm(x.mean([2, 3]))))
        return y


def trained(model: nn.Module, steps: int = 3) -> list[dict[str, Tensor]]:
    """What `steps` steps of training give, and the output in evaluation after them."""
    generator = torch.Generator().manual_seed(7)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    dtype = next(model.parameters()).dtype
    found = []
    for _ in range(steps):
        optimizer.zero_grad()
        found.append(step(model.train(), torch.randn(4, 3, 8, 8, generator=generator).to(dtype)))
        optimizer.step()
    with torch.no_grad():
        y = model.eval()(torch.randn(2, 3, 8, 8, generator=generator).to(dtype))
    return [*found, {"evaluation": y}]


def fuse_training(model: nn.Module) -> cnnops.Conversion:
    return cnnops.convert(model, copy=True, fuse_training=True)


def test_training_fused() -> None:
    theirs = Network().double()
    done = fuse_training(theirs)
    assert done.fused == {
        "stem.1": "silu",
        "blocks.0.bn1": "relu", "blocks.0.bn2": "residual + relu",
        "blocks.1.bn1": "relu", "blocks.1.bn2": "residual + relu",
        "tail.1": "silu", "tail.3": "tanh", "norm": "sigmoid",
    }  # fmt: skip
    assert done.swapped["stem.1"] == (nn.BatchNorm2d, cnnops.nn.BatchNormAct2d) and not done.left
    ours = done.model
    assert isinstance(ours, Network) and isinstance(ours.blocks[0], Residual)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    names = [[n for n, _ in m.named_modules(remove_duplicate=False)] for m in (ours, theirs)]
    assert names[0] == names[1]
    for a, b in zip(trained(ours), trained(theirs), strict=True):
        assert_same(a, b, 1e-10)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    ops = [choice.op for choice in cnnops.explain(ours.train(), x)]
    assert ops.count("batch_norm_train") == 10
    # Nothing but the dense layer and the mean is left to PyTorch's own operations.
    with torch.profiler.profile() as profile:
        ours(x)
    ran = {event.key.removeprefix("aten::") for event in profile.key_averages()}
    assert not ran & {"relu", "relu_", "silu", "tanh", "sigmoid", "add"}


def test_training_fused_of_a_network_by_name() -> None:
    from cnnops.models import ResNet18

    theirs = ResNet18(10, layers=nn).double()
    done = fuse_training(theirs)
    assert len(done.fused) == 17 and not done.left, "all but those of the three shortcuts"
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    assert_same(step(done.model, x), step(theirs, x), 1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_training_fused_in_other_types(dtype: torch.dtype) -> None:
    theirs = Network().to(dtype)
    ours = fuse_training(theirs).model
    assert all(p.dtype == dtype for p in ours.parameters())
    x = torch.randn(4, 3, 8, 8).to(dtype)
    exact = step(copy.deepcopy(theirs).double(), x.double())
    a, b = step(ours, x), step(theirs, x)
    for name, value in exact.items():
        if not value.is_floating_point() or (name.startswith("gradient") and name.endswith("bias")):
            continue  # counts of batches; and zero but for rounding, before a batch norm
        norm = float(value.norm())
        errors = [float((found[name].double() - value).norm()) for found in (a, b)]
        assert errors[0] <= 2 * errors[1] + 4 * torch.finfo(dtype).eps * norm, name


def test_training_fused_under_autocast() -> None:
    """A residual of another dtype than batch norm's is added as PyTorch adds it."""
    theirs = Residual(4)
    ours = fuse_training(theirs).model
    x = torch.randn(2, 4, 6, 6)
    with torch.autocast("cpu", torch.bfloat16):
        for identity in (nn.Identity(), nn.MaxPool2d(6)):  # float32, and one that broadcasts
            theirs.shortcut = ours.shortcut = identity
            a, b = ours(x), theirs(x)
            assert a.dtype == b.dtype
            assert_close(a, b.double(), 2e-2, "autocast")


def test_training_fused_and_back() -> None:
    model = Network()
    kinds = {name: type(m) for name, m in model.named_modules()}
    shared = model.stem[2]
    state = {k: v.data_ptr() for k, v in model.state_dict().items()}
    done = cnnops.convert(model, fuse_training=True)
    assert not cnnops.convert(model, fuse_training=True).fused, "twice"
    assert type(model.blocks[0]).__name__ == "FusedResidual"
    assert repr(model.stem[2]) == "Absorbed(was SiLU())"
    model.eval()
    undone = cnnops.revert(model)
    assert undone.fused.keys() == done.fused.keys()
    assert {name: type(m) for name, m in model.named_modules()} == kinds
    assert model.stem[2] is shared and model.tail[2] is shared and not shared.training
    assert {k: v.data_ptr() for k, v in model.state_dict().items()} == state
    assert "activation=" not in repr(model) and "fused" not in str(vars(model.blocks[0]).keys())
    by_hand = nn.Sequential(cnnops.nn.BatchNormAct2d(4))
    assert not cnnops.revert(by_hand).swapped and type(by_hand[0]) is cnnops.nn.BatchNormAct2d


def test_training_fused_is_fused_for_inference() -> None:
    model = lived_in(Network()).double()
    fused = fuse_training(model).model.eval()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    done = cnnops.fuse(fused, x)
    assert cnnops.fuse(model).fused.keys() - done.fused.keys() == {"tail.3", "norm"}, "fused before"
    assert done.fused["blocks.0.conv2"] == ("blocks.0.bn2", "residual")
    assert done.model.blocks.get_submodule("0").conv2.adds_in_place
    assert Counter(c.op for c in cnnops.explain(done.model, x)) == {
        "conv_fprop": 8,
        "batch_norm_infer": 2,
    }
    assert_close(done.model(x), model(x), 1e-12, "fused twice over")


def test_training_fused_can_be_copied_and_compiled() -> None:
    ours = fuse_training(Network()).model.eval()
    x = torch.randn(2, 3, 8, 8)
    y = ours(x)
    copied = copy.deepcopy(ours)
    assert torch.equal(copied(x), y)
    restored = pickle.loads(pickle.dumps(ours))
    assert type(restored) is type(ours) and torch.equal(restored(x), y)
    with torch.no_grad():
        copied.blocks[0].bn2.weight.zero_()
    assert torch.equal(ours(x), y) and not torch.equal(copied(x), y), "a copy is its own"
    assert type(cnnops.revert(restored).model) is Network
    compiled: Any = torch.compile(ours, backend="aot_eager", fullgraph=True)
    assert_close(compiled(x), y, 2e-6, "compiled")


def test_training_fused_keeps_hooks_and_flags() -> None:
    model = Network()
    seen: list[str] = []
    model.blocks[0].register_forward_hook(lambda m, x, y: seen.append(type(m).__name__))
    model.stem.register_full_backward_hook(lambda *_: seen.append("backward"))
    model.blocks[1].bn1.weight.requires_grad_(False)
    model.blocks[1].bn1.eval()
    cnnops.convert(model, fuse_training=True)
    assert not model.blocks[1].bn1.training and not model.blocks[1].bn1.weight.requires_grad
    model(torch.randn(2, 3, 8, 8).requires_grad_()).sum().backward()
    assert seen == ["FusedResidual", "backward"]


class Odd(nn.Module):
    """`how`: what keeps batch norm and activation from being one."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.norm, self.other, self.act = nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.ReLU()
        self.pair = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())
        if how == "norm hooked":
            self.norm.register_forward_hook(lambda m, x, y: y + 1)
        if how == "activation hooked":
            self.act.register_forward_hook(lambda m, x, y: y + 1)
        if how == "pair's norm elsewhere":
            self.other = self.pair[0]
        if how == "parametrized":
            parametrize.register_parametrization(self.norm, "weight", nn.Identity())
        if how == "replaced":
            self.forward = lambda x: self.act(self.norm(x)) - 1  # type: ignore[method-assign]

    def forward(self, x: Tensor, *rest: Any) -> Tensor:
        how = self.how
        if how == "used twice":
            y = self.norm(x)
            return self.act(y) + y
        if how == "called twice":
            return self.act(self.norm(x)) + self.act(self.norm(2 * x))
        if how == "by mode":
            y = self.norm(x)
            return self.act(y) if self.training else y
        if how == "by value":
            return self.act(self.norm(x)) if x.sum() < 1e9 else x
        if how == "part of a pair":
            return self.pair(x) + self.pair[1](x)
        if how == "pair's norm elsewhere":
            return self.pair(x) + self.other(x)
        if how == "weight read":
            return self.act(self.norm(x)) * self.norm.weight.sum()
        return self.act(self.norm(x))


class Strict(Odd):
    """Without a star among its arguments, which cannot be traced."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


ODD = {
    "used twice": ("norm", "the result of norm is used 2 times"),
    "called twice": ("norm", "is called from more than one place"),
    "norm hooked": ("norm", "has hooks"),
    "activation hooked": ("norm", "has hooks"),
    "parametrized": ("", ""),
    "replaced": ("", "its forward was replaced"),
    "by mode": ("", "its forward differs between training and evaluation"),
    "by value": ("", "used as inputs to control flow"),
    "part of a pair": ("pair.0", "a part of Sequential is called from outside"),
    "pair's norm elsewhere": ("pair.0", "is called from more than one place"),
    "weight read": ("norm", "its parameters are read by themselves"),
}


@pytest.mark.parametrize("how", ODD)
def test_training_not_fused(how: str) -> None:
    name, reason = ODD[how]
    theirs: nn.Module = Strict(how)
    if how == "replaced":  # a copy's would belong to the original
        done = cnnops.convert(Strict(how), fuse_training=True)
    else:
        done = fuse_training(theirs)
    assert not {"norm", "other"} & done.fused.keys()
    assert reason in done.left.get(name, ""), done.left
    if how != "replaced":
        done.model.load_state_dict(theirs.state_dict())
        x = torch.randn(2, 3, 4, 4)
        for mode in (True, False):
            assert_close(done.model.train(mode)(x), theirs.train(mode)(x), 2e-6, how)


def scaled(x: Tensor, *modules: Any) -> Tensor:
    """Cannot be traced; calls the first module that it gets."""
    y: Tensor = modules[0](x) if modules and x.shape[0] > 0 else x * 2
    return y


class Scaled(nn.Module):
    """`gets`: what a function is handed."""

    def __init__(self, gets: str) -> None:
        super().__init__()
        self.gets = gets
        self.conv, self.norm, self.act = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU()
        self.pair = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        x = scaled(x, *(getattr(self, name) for name in self.gets.split()))
        y: Tensor = self.act(self.norm(self.conv(x)))
        return y


@pytest.mark.parametrize("gets", ["conv", "norm", "pair"])
def test_training_fused_around_functions(gets: str) -> None:
    """A function that cannot be traced stays a call; what it is handed stays what it is."""
    theirs = Scaled(gets).double()
    done = fuse_training(theirs)
    norms = {"norm": "norm", "pair": "pair.0"}
    assert done.fused.keys() == {"norm", "pair.0"} - {norms.get(gets)}
    assert done.left == ({norms[gets]: "is handed to a function"} if gets in norms else {})
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    for model in (done.model, copy.deepcopy(done.model), pickle.loads(pickle.dumps(done.model))):
        model.load_state_dict(theirs.state_dict())
        assert_same(step(model, x), step(copy.deepcopy(theirs), x), 1e-12)
    assert type(cnnops.revert(done.model).model) is Scaled


def test_training_of_forwards_with_options_is_not_fused() -> None:
    done = cnnops.convert(Odd(""), fuse_training=True)
    assert not done.fused and done.left == {
        "": "its forward takes any number of arguments (*rest)",
        "pair.0": "its Sequential may be used in other ways than as a whole",
    }


def test_training_of_a_sequential_that_may_be_iterated() -> None:
    class Taps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())
            self.rows = nn.ModuleList([nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())])
            self.whole = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())

        def forward(self, x: Tensor) -> Tensor:
            if x.sum() > 1e9:
                return x
            for layer in self.layers:
                x = layer(x)
            return self.whole(self.rows[0](x))

    done = cnnops.convert(Taps(), fuse_training=True)
    why = "its Sequential may be used in other ways than as a whole"
    assert done.fused == {"whole.0": "relu"}
    assert done.left["layers.0"] == why and done.left["rows.0.0"] == why

    class Clear(Taps):
        def forward(self, x: Tensor) -> Tensor:
            for layer in [*self.layers, *self.rows]:
                x = layer(x)
            return self.whole(x)

    theirs = Clear()
    done = fuse_training(theirs)
    assert done.fused == {"layers.0": "relu", "rows.0.0": "relu", "whole.0": "relu"}
    x = torch.randn(2, 3, 4, 4)
    assert_same(step(done.model, x), step(theirs, x), 2e-6)


@settings(max_examples=40)
@given(drawn(), st.integers(0, 2**31))
def test_random_networks_train_fused(network: tuple[Any, tuple[int, ...]], seed: int) -> None:
    theirs, size = lived_in(network[0], seed).double(), network[1]
    ours = fuse_training(theirs).model
    x = torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    assert_same(step(ours, x), step(theirs, x), 1e-9)
    for model in (ours, theirs):
        model.train()
        # A value or two a channel would make gradients of what rounding left.
        step(model, torch.cat([x, 2 * x + 1]))
    assert_same(*(dict(model.named_buffers()) for model in (ours, theirs)), 1e-9)  # type: ignore[misc]


# ---- what is wrapped around a model ------------------------------------------------------------------------


def test_compiled_models_compile_anew() -> None:
    model = Network()
    compiled: Any = torch.compile(model, backend="aot_eager")
    x = torch.randn(2, 3, 8, 8)
    before = compiled(x)
    done = cnnops.convert(compiled, fuse_training=True)
    assert done.fused["_orig_mod.blocks.0.bn2"] == "residual + relu"
    with torch.profiler.profile() as profile:
        after = compiled(x)
    assert "cnnops::batch_norm_train" in {event.key for event in profile.key_averages()}
    assert_close(after, before, 1e-5, "compiled")
    cnnops.revert(compiled)
    assert type(model) is Network


def test_distributed_data_parallel() -> None:
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        theirs = Network().double()
        wrapped = nn.parallel.DistributedDataParallel(copy.deepcopy(theirs))
        done = cnnops.convert(wrapped, fuse_training=True)
        assert done.fused["module.blocks.0.bn2"] == "residual + relu"
        x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
        a, b = step(wrapped, x), step(theirs, x)
        assert_same({k.replace("module.", ""): v for k, v in a.items()}, b, 1e-10)
        with pytest.raises(TypeError, match="copy of model.module and wrap that"):
            cnnops.convert(wrapped, copy=True)
        with pytest.raises(TypeError, match="got DistributedDataParallel"):
            cnnops.fuse(wrapped.eval())
    finally:
        torch.distributed.destroy_process_group()

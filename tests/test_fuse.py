"""`cnnops.fuse`: the same results from fewer steps, and nothing fused that is not certain to be the same."""

from __future__ import annotations

import copy
import inspect
import pickle
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm

import cnnops
import cnnops.nn
from cnnops.cuda.launch import trace
from cnnops.fusion import folding
from cnnops.models import (
    VGG16BN,
    AlexNet,
    ConvNeXtT,
    EfficientNetB0,
    LeNet5,
    LeNet5Original,
    MobileNetV2,
    ResNet18,
    ResNet50,
)

BATCH_NORM = nn.modules.batchnorm._BatchNorm


def lived_in(model: nn.Module, seed: int = 0) -> nn.Module:
    """`model` in evaluation, with statistics and weights that none of its batch norms starts with."""
    g = torch.Generator().manual_seed(seed)
    for m in model.modules():
        if isinstance(m, BATCH_NORM):
            with torch.no_grad():
                for t, least in ((m.running_var, 0.5), (m.weight, 0.7)):
                    if t is not None:
                        t.copy_(torch.rand(t.shape, generator=g) + least)
                for t in (m.running_mean, m.bias):
                    if t is not None:
                        t.copy_(torch.randn(t.shape, generator=g) * 0.3)
    return model.eval()


class UpDown(nn.Module):
    """A small U-Net: convolutions both ways with batch norm, joined by concatenation and by addition."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        conv, up = getattr(nn, f"Conv{dims}d"), getattr(nn, f"ConvTranspose{dims}d")
        norm = getattr(nn, f"BatchNorm{dims}d")
        self.first = nn.Sequential(
            conv(3, 6, 3, padding=1, bias=False), norm(6), nn.SiLU(inplace=True)
        )
        self.down = nn.Sequential(
            conv(6, 8, 3, 2, 1, padding_mode="reflect"), norm(8), nn.Dropout(), nn.LeakyReLU()
        )
        self.up = nn.Sequential(up(8, 6, 2, 2, groups=2), norm(6), nn.Hardswish())
        self.up_norm = norm(6)
        self.plain_up = up(8, 6, 4, 2, 1)
        self.last = conv(12, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        deep = self.down(x)
        added = F.gelu(self.up_norm(self.plain_up(deep)) + x)
        return torch.tanh(self.last(torch.cat([self.up(deep), added], 1)))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "lenet5": (lambda: LeNet5(), (2, 1, 28, 28), 2),
    "lenet5-original": (lambda: LeNet5Original(layers=nn), (2, 1, 32, 32), 3),
    "alexnet": (lambda: AlexNet(10).features, (1, 3, 63, 63), 5),
    "vgg16-bn": (lambda: VGG16BN(10).features, (1, 3, 32, 32), 13),
    "resnet18": (lambda: ResNet18(10, layers=nn), (1, 3, 32, 32), 20),
    "resnet50": (lambda: ResNet50(10), (1, 3, 32, 32), 53),
    "mobilenetv2": (lambda: MobileNetV2(10), (1, 3, 32, 32), 52),
    "efficientnet-b0": (lambda: EfficientNetB0(10), (1, 3, 32, 32), 49 + 16 * 2),
    "convnext-tiny": (lambda: ConvNeXtT(10), (1, 3, 32, 32), 0),
    **{f"unet-{d}d": (lambda d=d: UpDown(d), (2, 3, 8, 6, 10)[: d + 2], 5) for d in (1, 2, 3)},
}
"""How to build it, its input, and how many fused steps it has."""


@pytest.mark.parametrize("name", MODELS)
def test_models(name: str) -> None:
    build, size, fused = MODELS[name]
    model = lived_in(build())
    state = {k: v.clone() for k, v in model.state_dict().items()}
    x = torch.randn(size)
    done = cnnops.fuse(model, x)
    assert len(done.fused) == fused
    kinds = Counter(type(m) for m in done.model.modules())
    assert not [kind for kind in kinds if issubclass(kind, BATCH_NORM)]
    with torch.no_grad():
        expected = model(x)
        assert_close(done.model(x), expected, 3e-6, "float32")
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items()), (
        "the user's weights"
    )
    # Half types: no further from the truth than before. One image alone would tell of chance.
    half = model.bfloat16()
    x = torch.randn(8, *size[1:]).bfloat16()
    with torch.no_grad():
        exact = copy.deepcopy(half).double()(x.double())
        again = cnnops.fuse(half, x)
        errors = [float((m(x).double() - exact).norm() / exact.norm()) for m in (half, again.model)]
    assert errors[1] <= 1.1 * errors[0] + 2**-9, errors


def test_resnet50_has_nothing_left_to_fuse() -> None:
    model = lived_in(ResNet50(10))
    done = cnnops.fuse(model)
    graph = done.model.graph
    kinds = Counter(
        type(done.model.get_submodule(n.target)) for n in graph.nodes if n.op == "call_module"
    )
    own = cnnops.nn
    assert kinds == {own.ConvAct2d: 53, own.MaxPool2d: 1, own.AdaptiveAvgPool2d: 1, nn.Linear: 1}
    others = [n for n in graph.nodes if n.op not in ("call_module", "placeholder", "output")]
    assert [n.target for n in others] == ["flatten"]
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        ops = Counter(choice.op for choice in cnnops.explain(done.model, x))
        assert ops == {"conv_fprop": 53, "max_pool_fwd": 1, "avg_pool_fwd": 1}
        assert sum(Counter(c.op for c in cnnops.explain(model, x)).values()) == 53 + 53 + 2
        with cnnops.engine("emulate"), trace(run=False) as launches:
            done.model(x)
        with cnnops.engine("emulate"), trace(run=False) as before:
            model(x)
    norms = [
        sum("batch_norm" in str(plan.kernel) for plan in plans) for plans in (before, launches)
    ]
    assert norms == [53, 0]


# ---- what is recognised ----------------------------------------------------------------------------------

ACTIVATIONS: dict[str, tuple[str, Callable[[Tensor], Tensor] | nn.Module]] = {
    "nn.ReLU": ("relu", nn.ReLU()),
    "nn.ReLU-inplace": ("relu", nn.ReLU(inplace=True)),
    "nn.ReLU6": ("relu6", nn.ReLU6()),
    "nn.SiLU": ("silu", nn.SiLU()),
    "nn.GELU": ("gelu", nn.GELU()),
    "nn.Hardswish": ("hardswish", nn.Hardswish()),
    "nn.LeakyReLU": ("leaky_relu", nn.LeakyReLU()),
    "nn.Sigmoid": ("sigmoid", nn.Sigmoid()),
    "nn.Tanh": ("tanh", nn.Tanh()),
    "F.relu": ("relu", F.relu),
    "F.relu-inplace": ("relu", lambda z: F.relu(z, inplace=True)),
    "F.relu6": ("relu6", F.relu6),
    "F.silu": ("silu", F.silu),
    "F.gelu": ("gelu", F.gelu),
    "F.hardswish": ("hardswish", F.hardswish),
    "F.leaky_relu": ("leaky_relu", F.leaky_relu),
    "F.leaky_relu-0.01": ("leaky_relu", lambda z: F.leaky_relu(z, 0.01, True)),
    "F.sigmoid": ("sigmoid", F.sigmoid),
    "F.tanh": ("tanh", F.tanh),
    "torch.relu": ("relu", torch.relu),
    "torch.relu_": ("relu", torch.relu_),
    "torch.sigmoid": ("sigmoid", torch.sigmoid),
    "torch.tanh": ("tanh", torch.tanh),
    "relu": ("relu", lambda z: z.relu()),
    "relu_": ("relu", lambda z: z.relu_()),
    "sigmoid": ("sigmoid", lambda z: z.sigmoid()),
    "tanh": ("tanh", lambda z: z.tanh()),
    # Others, which no epilogue has.
    "nn.GELU-tanh": ("none", nn.GELU(approximate="tanh")),
    "F.gelu-tanh": ("none", lambda z: F.gelu(z, approximate="tanh")),
    "nn.LeakyReLU-0.2": ("none", nn.LeakyReLU(0.2)),
    "F.leaky_relu-0.2": ("none", lambda z: F.leaky_relu(z, 0.2)),
    "nn.ELU": ("none", nn.ELU()),
    "clamp": ("none", lambda z: z.clamp(min=0)),
    "hardtanh": ("none", nn.Hardtanh()),
}

ADDITIONS: dict[str, tuple[bool, Callable[[Tensor, Tensor], Tensor]]] = {
    "y + r": (True, lambda y, r: y + r),
    "r + y": (True, lambda y, r: r + y),
    "torch.add": (True, lambda y, r: torch.add(y, r)),
    "y.add": (True, lambda y, r: y.add(r)),
    "r.add": (True, lambda y, r: r.add(y)),
    "y.add_": (True, lambda y, r: y.add_(r)),
    "alpha": (False, lambda y, r: torch.add(y, r, alpha=2)),
    "r.add_": (False, lambda y, r: r.add_(y)),
    "number": (False, lambda y, r: y + 1.5),
    "y - r": (False, lambda y, r: y - r),
}


def iadd(y: Tensor, r: Tensor) -> Tensor:
    y += r
    return y


def iadd_to_residual(y: Tensor, r: Tensor) -> Tensor:
    r += y
    return r


ADDITIONS |= {"y += r": (True, iadd), "r += y": (False, iadd_to_residual)}


class Block(nn.Module):
    """Convolution, batch norm, then whatever `finish(y, x)` does."""

    def __init__(self, finish: Callable[[Tensor, Tensor], Tensor], norm: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4) if norm else None
        self.finish = finish

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.finish(y if self.norm is None else self.norm(y), x)


def agree(model: nn.Module, done: cnnops.Fusion, *inputs: Tensor, limit: float = 2e-6) -> None:
    """Both models return the same and leave the same in their inputs."""
    theirs, ours = [t.clone() for t in inputs], [t.clone() for t in inputs]
    with torch.no_grad():
        expected, found = model(*theirs), done.model(*ours)
    assert found.dtype == expected.dtype and found.stride() == expected.stride()
    assert_close(found, expected, limit, "result")
    for a, b in zip(ours, theirs, strict=True):
        assert_close(a, b, limit, "input")


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize("form", ACTIVATIONS)
def test_activations(form: str, norm: bool) -> None:
    name, function = ACTIVATIONS[form]
    model = lived_in(Block(lambda y, x: y))
    model.finish = lambda y, x: function(y)
    if isinstance(function, nn.Module):
        model.act = function.eval()
    if not norm:
        model.norm = None
    done = cnnops.fuse(model)
    if name == "none" and not norm:
        assert done.model is model and not done.fused
    else:
        assert done.model.conv.activation == name
        assert len([n for n in done.model.graph.nodes if n.op != "placeholder"]) == 2 + (
            name == "none"
        )
    agree(model, done, torch.randn(2, 4, 5, 6))


@pytest.mark.parametrize("form", ADDITIONS)
@pytest.mark.parametrize("act", [True, False], ids=["relu", "none"])
def test_additions(form: str, act: bool) -> None:
    fused, add = ADDITIONS[form]
    model = lived_in(Block(lambda y, x: torch.relu(add(y, x)) if act else add(y, x)))
    done = cnnops.fuse(model)
    assert ("residual" in done.fused["conv"]) == fused
    assert done.model.conv.activation == ("relu" if act and fused else "none")
    agree(model, done, torch.randn(2, 4, 5, 6))


class Sum(Block):
    """Takes the residual as an argument."""

    def forward(self, x: Tensor, r: Tensor) -> Tensor:
        return torch.relu(self.finish(self.norm(self.conv(x)), r))


@pytest.mark.parametrize("form", ["y + r", "y += r"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_residuals_that_are_not_like_the_result(dtype: torch.dtype, form: str) -> None:
    """One that broadcasts, or has another dtype, is added as PyTorch adds it."""
    model = lived_in(Sum(ADDITIONS[form][1])).to(dtype)
    done = cnnops.fuse(model)
    assert "residual" in done.fused["conv"]
    x = torch.randn(2, 4, 5, 6).to(dtype)
    limit = 2e-6 if dtype == torch.float32 else 2e-3
    for r in (torch.randn(2, 4, 5, 6), torch.randn(4, 1, 1), torch.randn(()), x[:1]):
        agree(model, done, x, r, limit=limit)
    if form == "y + r":
        agree(model, done, x[:1], torch.randn(3, 4, 5, 6), limit=limit)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
        agree(model, done, x, torch.randn(2, 4, 5, 6), limit=2e-2)


def test_of_two_convolutions_one_takes_the_sum() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 3, padding=1)
            self.norm_a, self.norm_b = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            a = self.norm_a(self.a(x))
            return F.relu(a + self.norm_b(self.b(x)))

    model = lived_in(Model())
    done = cnnops.fuse(model, torch.randn(1, 3, 6, 5))
    assert done.fused == {"a": ("norm_a", "residual", "relu"), "b": ("norm_b",)} and not done.left
    agree(model, done, torch.randn(2, 3, 5, 5))


def test_dense_layers_take_batch_norm() -> None:
    model = lived_in(nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.BatchNorm1d(5), nn.ReLU()))
    done = cnnops.fuse(model, torch.randn(3, 12))
    assert done.fused == {"1": ("2",)} and done.left == {"3": "follows FoldedLinear"}
    agree(model, done, torch.randn(4, 12))
    # Of a batch of sequences the channels are another axis, which only the input tells.
    row = lived_in(nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5)))
    with pytest.raises(
        ValueError, match="expected 2 dimensions, as batch norm is folded in, got 3"
    ):
        cnnops.fuse(row).model(torch.randn(2, 5, 3))


def test_unbatched_inputs() -> None:
    model = lived_in(Block(lambda y, x: torch.relu(y + x), norm=False))
    agree(model, cnnops.fuse(model), torch.randn(4, 5, 6))
    normed = lived_in(nn.Sequential(nn.Conv1d(3, 4, 1), nn.BatchNorm1d(4)))
    with pytest.raises(
        ValueError, match="expected 3 dimensions, as batch norm is folded in, got 2"
    ):
        cnnops.fuse(normed).model(torch.randn(3, 4))


def test_batch_norm_that_cannot_be_folded_takes_what_follows() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.BatchNorm2d(4), cnnops.nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            y = F.max_pool2d(F.relu(self.first(x)), 2)
            return torch.sigmoid(self.second(y) + y)

    model = lived_in(Model())
    x = torch.randn(2, 4, 6, 6)
    done = cnnops.fuse(model, x)
    assert done.fused == {"first": ("relu",), "second": ("residual", "sigmoid")}
    assert type(done.model.first) is cnnops.nn.BatchNormAct2d
    assert done.model.first.weight is model.first.weight, "nothing was folded into it"
    agree(model, done, x)
    assert [c.op for c in cnnops.explain(done.model, x)] == ["batch_norm_infer"] * 2


def test_layers_of_ours_fold_as_well() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = cnnops.nn.Conv2d(4, 4, 3, padding=1)
            self.norm = cnnops.nn.BatchNormAct2d(4, activation="silu")

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.conv(x), x)

    model = lived_in(Model())
    done = cnnops.fuse(model, torch.randn(1, 4, 4, 4))
    assert done.fused == {"conv": ("norm", "residual")} and done.model.conv.activation == "silu"
    agree(model, done, torch.randn(2, 4, 5, 6))


# ---- what is refused ---------------------------------------------------------------------------------------


def hooked(model: Any) -> None:
    model.norm.register_forward_hook(lambda m, x, y: y + 1)


def hooked_conv(model: Any) -> None:
    model.conv.register_forward_pre_hook(lambda m, x: None)


def without_statistics(model: Any) -> None:
    model.norm = nn.BatchNorm2d(4, track_running_stats=False).eval()


def parametrized(model: Any) -> None:
    weight_norm(model.conv)


def parametrized_norm(model: Any) -> None:
    parametrize.register_parametrization(model.norm, "weight", nn.Identity())


def forward_of_its_own(model: Any) -> None:
    model.conv.forward = lambda x: F.conv2d(x, model.conv.weight, padding=1) * 2


class Standardized(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean())


def subclass(model: Any) -> None:
    model.conv = Standardized(4, 4, 3, padding=1).eval()


class Doubled(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def subclass_of_norm(model: Any) -> None:
    model.norm = Doubled(4).eval()


def compiled_in_place(model: Any) -> None:
    model.conv.compile(backend="eager")


REFUSED: dict[str, tuple[Any, str]] = {
    "hooks": (hooked, "has hooks"),
    "hooks of the convolution": (hooked_conv, "conv has hooks"),
    "no statistics": (without_statistics, "has no running statistics"),
    "parametrized": (parametrized, "follows ParametrizedConv2d"),
    "parametrized norm": (parametrized_norm, ""),
    "a forward of its own": (forward_of_its_own, "conv has a forward of its own"),
    "compiled": (compiled_in_place, "conv is compiled"),
    "subclass": (subclass, "follows Standardized"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name: str) -> None:
    change, reason = REFUSED[name]
    model = lived_in(Block(lambda y, x: y))
    change(model)
    done = cnnops.fuse(model.eval(), torch.randn(1, 4, 4, 4))
    assert "conv" not in done.fused and reason in done.left.get("norm", "")
    agree(model, done, torch.randn(2, 4, 5, 6))


def test_other_classes_are_left() -> None:
    model = lived_in(Block(lambda y, x: y))
    subclass_of_norm(model)
    assert cnnops.fuse(model).model is model
    other = nn.Sequential(nn.Conv2d(3, 4, 1), nn.InstanceNorm2d(4), nn.ReLU()).eval()
    done = cnnops.fuse(other)
    assert done.model is other and done.left == {"2": "follows InstanceNorm2d"}


class Uses(nn.Module):
    """`how`: what forward does with a convolution, a batch norm and an activation."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.conv, self.norm, self.act = (
            nn.Conv2d(4, 4, 1),
            nn.BatchNorm2d(4),
            nn.ReLU(inplace=True),
        )
        self.other = nn.BatchNorm2d(4)
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        how = self.how
        if how == "result used twice":
            y = self.conv(x)
            return self.norm(y) * y
        if how == "norm's result used twice":
            y = self.norm(self.conv(x))
            return torch.relu(y) + y
        if how == "in place, and used":
            y = self.norm(self.conv(x))
            self.act(y)
            return y
        if how == "shared convolution":
            return self.norm(self.conv(x)) * self.other(self.conv(x * 2))
        if how == "shared norm":
            return self.norm(self.conv(x)) + self.norm(x)
        if how == "weight read":
            return self.norm(self.conv(x)) * self.conv.weight.sum()
        if how == "cast":
            return self.norm(self.conv(x).double().float())
        if how == "view":
            return self.norm(self.conv(x).flip(2))
        if how == "residual changes in place":
            y = self.norm(self.conv(x))
            r = x * 2
            z = r + 1
            r.mul_(3)
            return torch.relu(y + r) + z
        if how == "input changes in place":
            x = x + 0
            y = self.norm(self.conv(x))
            r = x.exp_()
            return torch.relu(y + r)
        if how == "added to itself":
            y = self.conv(x)
            return torch.relu(y + y)
        raise ValueError(how)


USES = {
    "result used twice": {"norm": "the result of conv is used 2 times"},
    "norm's result used twice": {"relu": "the result of norm is used 2 times"},
    "in place, and used": {"act": "the result of norm is used 2 times"},
    "shared convolution": {"norm": "conv is called 2 times", "other": "conv is called 2 times"},
    "shared norm": {"norm": "is called 2 times"},
    "weight read": {"norm": "conv its parameters are read by themselves"},
    "cast": {"norm": "follows float_1"},
    "view": {"norm": "follows flip"},
    "residual changes in place": {"relu": "follows add_1"},
    "input changes in place": {"relu": "follows add_1"},
    "added to itself": {"relu": "follows add"},
}


@pytest.mark.parametrize("how", USES)
def test_uses_that_forbid_it(how: str) -> None:
    model = lived_in(Uses(how))
    x = torch.randn(1, 4, 4, 4)
    done = cnnops.fuse(model, x)
    for name, reason in USES[how].items():
        assert done.left[name] == reason, done.left
    assert not any("residual" in parts or "relu" in parts for parts in done.fused.values())
    agree(model, done, x)


@pytest.mark.parametrize(
    "dtype, other", [(torch.float32, torch.float64), (torch.bfloat16, torch.float16)], ids=str
)
def test_dtypes_that_differ(dtype: torch.dtype, other: torch.dtype) -> None:
    model = lived_in(Block(lambda y, x: y)).to(dtype)
    model.norm.to(other)
    done = cnnops.fuse(model)
    assert not done.fused and done.left == {"norm": f"is {other} behind a layer of {dtype}"}
    # A batch norm that keeps float32 beside half types is what PyTorch allows.
    mixed = lived_in(Block(lambda y, x: y)).bfloat16()
    mixed.norm.float()
    done = cnnops.fuse(mixed, torch.randn(1, 4, 4, 4).bfloat16())
    assert done.fused and done.model.conv.weight.dtype == torch.bfloat16


def test_training_mode() -> None:
    model = ResNet18(10)
    with pytest.raises(
        RuntimeError, match=r"expected model.eval\(\), got training mode in ResNet18"
    ):
        cnnops.fuse(model)
    model.eval().layer1[0].bn1.train()
    with pytest.raises(RuntimeError, match=r"in layer layer1.0.bn1 \(BatchNorm2d\)"):
        cnnops.fuse(model)


def test_arguments() -> None:
    with pytest.raises(TypeError, match="expected a torch.nn.Module, got int"):
        cnnops.fuse(3)  # type: ignore[arg-type]
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()).eval()
    compiled: Any = torch.compile(model, backend="eager")
    with pytest.raises(
        TypeError, match="got OptimizedModule: fuse model._orig_mod and wrap the result"
    ):
        cnnops.fuse(compiled)
    with pytest.raises(TypeError, match="got DataParallel: fuse model.module and wrap the result"):
        cnnops.fuse(nn.DataParallel(model).eval())
    inner = nn.Sequential(compiled, nn.Conv2d(4, 4, 1), nn.ReLU()).eval()
    done = cnnops.fuse(inner, torch.randn(1, 3, 4, 4))
    assert done.fused == {"1": ("2",)} and done.left["0"].startswith(
        "OptimizedModule: fuse what it holds"
    )


# ---- forwards that cannot be traced ------------------------------------------------------------------------


class Stem(nn.Module):
    def __init__(self, how: str = "") -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.how = how
        self.seen: list[Any] = []

    def forward(self, x: Tensor) -> Tensor:
        how = self.how
        if how == "value" and x.sum() > 1e9:
            return x
        if how == "type" and isinstance(x, list):
            return x[0]
        if how == "random":
            x = x + random.random() * 1e-9
        if how == "constant":
            x = x + torch.zeros(1)
        if how == "attribute":
            self.last = x
        if how == "list":
            self.seen.append(x)
        if how == "autocast":
            with torch.autocast("cpu", torch.bfloat16):
                return self.body(x).float()
        if how == "no gradients":
            with torch.no_grad():
                return self.body(x)
        y: Tensor = self.body(x)
        return y


WAYS = {
    "value": "symbolically traced variables cannot be used as inputs to control flow",
    "type": "it asks for the type of what it computes",
    "random": "its forward differs from run to run",
    "constant": "its forward makes a tensor",
    "attribute": "its forward changes attributes",
    "list": "its forward changes attributes",
    "autocast": "its forward switches autocast or gradients",
    "no gradients": "its forward switches autocast or gradients",
}


@pytest.mark.parametrize("how", WAYS)
def test_untraceable_forwards_keep_running(how: str) -> None:
    """What is around stays what it is; the Sequential in it, which it only calls, is fused."""
    model = lived_in(nn.Sequential(Stem(how), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU()))
    attributes = set(vars(model[0]))
    x = torch.randn(2, 3, 5, 6)
    done = cnnops.fuse(model)
    assert WAYS[how] in done.left["0"], done.left
    assert done.fused == {"0.body.0": ("0.body.1", "0.body.2"), "1": ("2", "3")}
    assert set(vars(model[0])) == attributes and not model[0].seen, "tracing leaves nothing behind"
    inner = done.model.get_submodule("0")
    assert type(inner) is Stem and inner is not model[0] and type(model[0].body) is nn.Sequential
    limit = 2e-2 if how == "autocast" else 2e-6
    agree(model, done, x, limit=limit)
    assert done.model(x).requires_grad or how == "no gradients"


def test_a_sequential_that_may_be_iterated() -> None:
    class Taps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())

        def forward(self, x: Tensor) -> Tensor:
            if x.sum() > 1e9:
                return x
            for layer in self.body:
                x = layer(x)
            return x

    model = lived_in(Taps())
    done = cnnops.fuse(model)
    assert done.model is model
    assert done.left["body"] == "may be used in other ways than as a whole; a sample would tell"
    # In a forward that can be traced it is clear what happens.
    clear = lived_in(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()))

    class Clear(Taps):
        def forward(self, x: Tensor) -> Tensor:
            found = []
            for layer in self.body:
                x = layer(x)
                found.append(x)
            return found[-1] + found[0].mean()

    traced = lived_in(Clear())
    done = cnnops.fuse(traced, torch.randn(1, 3, 5, 5))
    assert done.fused == {"body.1": ("body.2",)}, "the convolution's result is used twice"
    assert cnnops.fuse(clear).fused


def test_modules_with_hooks_keep_them() -> None:
    model = lived_in(nn.Sequential(Stem(), nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU())))
    seen: list[Any] = []
    model.register_forward_hook(lambda m, x, y: seen.append("model"))
    model[1].register_forward_hook(lambda m, x, y: y * 2)
    done = cnnops.fuse(model, torch.randn(1, 3, 5, 5))
    assert set(done.fused) == {"0.body.0", "1.0"}
    seen.clear()
    agree(model, done, torch.randn(1, 3, 5, 5))
    assert seen == ["model", "model"]


def test_optional_arguments() -> None:
    class Masked(Block):
        def forward(self, x: Tensor, mask: Tensor | None = None, scale: float = 2.0) -> Tensor:
            y = torch.relu(self.norm(self.conv(x)))
            return scale * (y if mask is None else y * mask)

    model = lived_in(Masked(lambda y, x: y))
    x = torch.randn(1, 4, 5, 5)
    done = cnnops.fuse(model, {"x": x, "scale": 2.0})
    assert done.fused == {"conv": ("norm", "relu")}
    agree(model, done, x)
    assert_close(done.model(x, mask=None), model(x), 1e-6, "by keyword")
    with pytest.raises(AssertionError, match="mask: expected its default, None, as .* got Tensor"):
        done.model(x, x)


class AllOptional(Block):
    """As models of transformers are called: no argument has to be given."""

    def forward(
        self, pixel_values: Tensor | None = None, labels: Tensor | None = None, twice: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        if pixel_values is None:
            return torch.zeros(1)
        y = torch.relu(self.norm(self.conv(pixel_values)))
        y = y + y if twice else y
        return y if labels is None else (y, (y - labels).square().mean())


def names_of(model: nn.Module) -> list[str]:
    return [p for p in inspect.signature(model.forward).parameters if p != "self"]


@pytest.mark.parametrize("sampled", ["nothing", "position", "keyword", "default"])
def test_the_input_is_optional(sampled: str) -> None:
    """The sample's, and without one the first argument, whatever its default is."""
    model = lived_in(AllOptional(lambda y, x: y))
    x = torch.randn(1, 4, 5, 5)
    samples = {"position": x, "keyword": {"pixel_values": x}, "default": (x, None, False)}
    done = cnnops.fuse(model, samples.get(sampled))
    assert done.fused == {"conv": ("norm", "relu")} and not done.left
    assert names_of(done.model) == ["pixel_values", "labels", "twice"]
    agree(model, done, torch.randn(2, 4, 6, 5))
    for again in (done.model, pickle.loads(pickle.dumps(done.model))):
        assert_close(again(pixel_values=x, labels=None), model(x), 2e-6, "by keyword")
        with pytest.raises(AssertionError, match="labels: expected its default, None, as when"):
            again(x, labels=x)
        with pytest.raises(AssertionError, match="twice: expected its default, False, .* got True"):
            again(x, twice=True)
        for nothing in ((), (None,)):
            with pytest.raises(AssertionError, match="pixel_values: expected a value, as when"):
                again(*nothing)


@pytest.mark.parametrize("keyword", [False, True], ids=["position", "keyword"])
def test_a_second_input_is_optional(keyword: bool) -> None:
    model = lived_in(AllOptional(lambda y, x: y))
    x, labels = torch.randn(2, 1, 4, 5, 5)
    both = {"pixel_values": x, "labels": labels}
    done = cnnops.fuse(model, both if keyword else (x, labels))
    assert done.fused == {"conv": ("norm", "relu")}
    assert names_of(done.model) == ["pixel_values", "labels", "twice"]
    more = torch.randn(2, 2, 4, 6, 5)
    for found in (done.model(*more), done.model(labels=more[1], pixel_values=more[0])):
        for a, b in zip(found, model(*more), strict=True):
            assert_close(a, b, 2e-6, "result")
    with pytest.raises(AssertionError, match="labels: expected a value, as when the model was fus"):
        done.model(x)
    compiled: Any = torch.compile(done.model, backend="aot_eager", fullgraph=True)
    assert_close(compiled(x, labels)[0], model(x), 2e-6, "compiled")


def test_options_that_the_sample_changes() -> None:
    """A number is an input; of a decision no graph knows. A model that cannot be called is not hidden."""

    class Scaled(Block):
        def forward(self, x: Tensor, scale_1: float = 1.0, scale: float = 2.0) -> Tensor:
            return scale * torch.relu(self.norm(self.conv(x))) - scale_1

    model, x = lived_in(Scaled(lambda y, x: y)), torch.randn(1, 4, 5, 5)
    done = cnnops.fuse(model, {"x": x, "scale_1": 3.0})
    assert names_of(done.model) == ["x", "scale_1", "scale"]
    for scale in (3.0, 5.0):
        assert_close(done.model(x, scale), model(x, scale), 2e-6, "another value")
    agree(model, done, x)
    with pytest.raises(AssertionError, match="scale: expected its default, 2.0, as .* got 1.0"):
        done.model(x, 3.0, 1.0)
    decided = lived_in(AllOptional(lambda y, x: y))
    done = cnnops.fuse(decided, {"pixel_values": x, "twice": True})
    assert "used as inputs to control flow" in done.left[""] and not done.fused
    with pytest.raises(TypeError, match="unexpected keyword argument 'images'"):
        cnnops.fuse(decided, {"images": x})


# ---- functions that cannot be traced -----------------------------------------------------------------------


def _same(x: Tensor, conv: Any) -> Tensor:
    """Padding that depends on the size, as TensorFlow has it."""
    pads: list[int] = []
    for size, stride, kernel in zip(x.shape[2:], conv.stride, conv.kernel_size, strict=True):
        total = max(kernel - (stride if size % stride == 0 else size % stride), 0)
        pads = [total // 2, total - total // 2, *pads]
    return F.pad(x, pads)


def weighed(x: Tensor, conv: Any) -> Tensor:
    return x * conv.weight.mean() if x.shape[0] > 0 else x


def run(x: Tensor, module: Any) -> Tensor:
    y: Tensor = module(x) if x.shape[0] > 0 else x
    return y


def first_of(x: Tensor, modules: Any) -> Tensor:
    y: Tensor = modules[0](x) if x.shape[0] > 0 else x
    return y


def doubled_in_place(x: Tensor) -> Tensor:
    return x.mul_(2) if x.shape[0] > 0 else x


def is_large(x: Tensor) -> bool:
    return bool(x.abs().max() > 0.1)


def asks_another(x: Tensor) -> Tensor:
    return x * 2 if is_large(x) else x


@torch.no_grad()
def without_gradients(x: Tensor) -> Tensor:
    return x * torch.ones(1)


class CallsFunctions(nn.Module):
    """`how`: which one."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.first = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
        self.block = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
        self.conv, self.norm, self.act = nn.Conv2d(4, 4, 3, 2), nn.BatchNorm2d(4), nn.ELU()

    def forward(self, x: Tensor) -> Tensor:
        how, x = self.how, self.first(x)
        r = F.avg_pool2d(x, 3, 2)
        if how == "pads":
            x = _same(x, self.conv)
        if how == "reads weights":
            x = weighed(x, conv=self.conv)
        if how == "calls a block":
            x = run(x, self.block)
        if how == "takes one of a list":
            x = first_of(x, self.block)
        if how == "asks another":
            x = asks_another(x)
        if how == "switches gradients":
            x = without_gradients(x)
        if how == "gets the model":
            x = run(x, self)
        y = self.norm(self.conv(x))
        if how == "changes the residual":
            doubled_in_place(r)
            y = y + r
        if how == "calls the layer":
            y = y + run(x * 1, self.conv)
        z: Tensor = self.act(y)
        return z


MAIN, FIRST, BLOCK = {"conv": ("norm",)}, {"first.0": ("first.1",)}, {"block.0": ("block.1",)}

# With a sample, without one, and why the convolution or block stays what it is, with one and without.
FUNCTIONS: dict[str, tuple[dict[str, Any], dict[str, Any], str, str]] = {
    "pads": (FIRST | MAIN, FIRST, "", "conv is handed to _same, which may use it in other ways"),
    "reads weights": (
        FIRST, FIRST, "conv is handed to weighed, which needs it as it is",
        "conv is handed to weighed, which may use it in other ways; a sample would tell",
    ),
    "calls the layer": (
        FIRST, FIRST, "conv is handed to run, which needs it as it is",
        "conv is handed to run, which may use it in other ways; a sample would tell",
    ),
    "changes the residual": (FIRST | MAIN, FIRST | MAIN, "", ""),
    "asks another": (FIRST | MAIN, FIRST | MAIN, "", ""),
    "switches gradients": (FIRST | MAIN, FIRST | MAIN, "", ""),
    "calls a block": (
        FIRST | MAIN | BLOCK, FIRST | MAIN, "", "may be used in other ways than as a whole",
    ),
}  # fmt: skip


@pytest.mark.parametrize("sampled", [True, False], ids=["sample", "no sample"])
@pytest.mark.parametrize("how", FUNCTIONS)
def test_functions_that_cannot_be_traced(how: str, sampled: bool) -> None:
    """They are called as they are, and so is what they get, unless a sample clears the fused layer."""
    model = lived_in(CallsFunctions(how))
    x = torch.randn(2, 4, 9, 8)
    done = cnnops.fuse(model, x if sampled else None)
    with_sample, without, *reasons = FUNCTIONS[how]
    assert done.fused == (with_sample if sampled else without)
    why = reasons[not sampled]
    assert any(why in left for left in done.left.values()) if why else "norm" not in done.left
    for found in (done.model, copy.deepcopy(done.model), pickle.loads(pickle.dumps(done.model))):
        for size in (x, torch.randn(1, 4, 12, 7)):
            agree(model, cnnops.Fusion(found), size)
    assert not cnnops.fuse(done.model).fused, "fusing twice"


@pytest.mark.parametrize("how", ["gets the model", "takes one of a list"])
def test_functions_that_see_through_a_model(how: str) -> None:
    """One that gets the model itself would see all of it; one that iterates over a list, its layers."""
    model = lived_in(CallsFunctions(how))
    x = torch.randn(1, 4, 40, 40)
    if how == "gets the model":
        done = cnnops.fuse(model)
        assert done.fused == FIRST and "its forward cannot be traced" in done.left[""]
    else:
        done = cnnops.fuse(model)
        assert done.fused == FIRST | MAIN and "a sample would tell" in done.left["block"]
        agree(model, done, x)


def test_functions_of_a_forward_that_the_sample_misses() -> None:
    """Where the sample does not come by, nothing was compared."""

    class Either(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = CallsFunctions("pads"), CallsFunctions("reads weights")

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.a(x) if x.shape[0] == 1 else self.b(x)
            return y

    model = lived_in(Either())
    done = cnnops.fuse(model, torch.randn(1, 4, 9, 9))
    for n in (1, 2):
        agree(model, done, torch.randn(n, 4, 9, 9))
    assert "b.conv is handed to weighed, which needs it" in done.left["b.norm"]


def test_functions_that_nobody_finds_again() -> None:
    """A graph that calls them could not be pickled."""

    def local(x: Tensor) -> Tensor:
        return x * 2 if x.shape[0] > 0 else x

    class Calls(CallsFunctions):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(local(x))

    done = cnnops.fuse(lived_in(Calls("")), torch.randn(1, 4, 8, 8))
    assert "used as inputs to control flow" in done.left[""]


def test_parts_that_are_used_by_themselves_stay() -> None:
    """A block that is called as it is, and of which a layer is called as well, or a weight read."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
            self.block.register_forward_hook(lambda m, x, y: y + 1)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.block(x) + self.block[0](x) * self.block[0].weight.sum()
            return y

    model = lived_in(Both())
    done = cnnops.fuse(model, torch.randn(1, 4, 5, 5))
    assert done.left["block"] == "is used as a whole and in parts" and not done.fused
    agree(model, done, torch.randn(2, 4, 5, 5))


# ---- subclasses that override nothing ----------------------------------------------------------------------


class Depthwise(nn.Conv2d):
    """Arguments of its own, and nothing else."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, padding=1, groups=channels)


class Norm(cnnops.nn.BatchNorm2d):
    def extra_repr(self) -> str:
        return f"of {self.num_features}"


class Clipped(nn.ReLU6):
    pass


class Nothing(nn.Identity):
    pass


class Dense(nn.Linear):
    pass


class Norm1d(nn.BatchNorm1d):
    def names(self) -> list[str]:
        return [name for name, _ in self.named_parameters()]


def test_plain_subclasses_fuse() -> None:
    model = lived_in(
        nn.Sequential(
            Depthwise(4), Nothing(), Norm(4), Clipped(), nn.Flatten(), Dense(16, 3), Norm1d(3)
        )
    )
    done = cnnops.fuse(model, torch.randn(2, 4, 2, 2))
    assert done.fused == {"0": ("1", "2", "3"), "5": ("6",)} and not done.left
    assert cnnops.fuse(cnnops.convert(model).model).fused == done.fused
    agree(model, done, torch.randn(3, 4, 2, 2))
    alone = lived_in(nn.Sequential(nn.MaxPool2d(2), Norm(4), Clipped()))
    done = cnnops.fuse(alone, torch.randn(2, 4, 4, 4))
    assert done.fused == {"1": ("2",)}


class Strided(nn.Conv2d):
    stride: Any = property(lambda self: (2, 2), lambda self, value: None)


class OwnPadding(nn.Conv2d):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input * 2, weight, bias)


class Called(nn.Conv2d):
    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = super().__call__(x) * 2
        return y


class Louder:
    """Not a layer; what it does comes before the layer's."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = super().forward(x) * 2  # type: ignore[misc]
        return y


class Mixed(Louder, nn.Conv2d):
    pass


class Scaled(nn.Conv2d):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.scale = 3.0


def test_blocks_with_a_call_of_their_own() -> None:
    class Doubling(nn.Sequential):
        def __call__(self, x: Tensor) -> Tensor:
            y: Tensor = super().__call__(x) * 2
            return y

    parts = (nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    x = torch.randn(2, 4, 3, 3)
    for model in (Doubling(*parts), nn.Sequential(Doubling(*parts), nn.ReLU())):
        done = cnnops.fuse(lived_in(model))
        agree(model, done, x)
    assert done.fused == {"0.0": ("0.1",)}, "where it is a part it is looked through"


@pytest.mark.parametrize("kind", [Strided, OwnPadding, Called, Mixed, Scaled])
def test_other_subclasses_do_not(kind: Any) -> None:
    conv = kind(4, 4, 1)
    model = lived_in(nn.Sequential(conv, nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)))
    x = torch.randn(2, 4, 3, 3)
    done = cnnops.fuse(model, x)
    assert done.fused == ({} if kind is Called else {"2": ("3",)})
    if kind is Scaled:  # plain, but in the way of the layer that it would become
        assert done.left["1"] == "0 has an attribute scale of its own"
    else:
        assert "0" in cnnops.convert(model, copy=True).left
    agree(model, done, x)


# ---- the check -------------------------------------------------------------------------------------------


def test_a_wrong_step_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model = lived_in(ResNet18(10))
    right, x = folding.folded, torch.randn(1, 3, 32, 32)

    def wrong(layer: Any, norm: Any) -> Any:
        parameters = right(layer, norm)
        if layer is model.layer2[0].conv2:
            parameters.bias.add_(1e-2)
        return parameters

    monkeypatch.setattr(folding, "folded", wrong)
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(
        RuntimeError, match="fused step 'layer2.0.conv2': expected the model's values within"
    ):
        cnnops.fuse(model, x)
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    assert cnnops.fuse(model).fused, "nobody looked"


def test_a_wrong_whole_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a graph misses altogether shows in the results."""

    class Counts(nn.Module):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            type(self).calls += 1
            return x * (1 + self.calls // 3)

    model = lived_in(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), Counts()))
    with pytest.raises(RuntimeError, match="the result: expected the model's values within"):
        cnnops.fuse(model, torch.randn(1, 3, 4, 4))


# ---- the fused layers --------------------------------------------------------------------------------------


def test_folding_is_rounded_once() -> None:
    """Half weights are the exact products, rounded; float16's range is kept by a power of two."""
    conv, norm = nn.ConvTranspose2d(4, 6, 3, groups=2).half(), lived_in(nn.BatchNorm2d(6)).half()
    with torch.no_grad():
        norm.running_var[0], norm.running_var[4] = 1e-7, 3e4
        norm.eps = 1e-12
        norm.weight[0], norm.weight[4] = 60.0, 1e-4
        conv.weight[:2, 0] *= 100
    model = nn.Sequential(conv, norm).eval()
    done = cnnops.fuse(model)
    layer = done.model.get_submodule("0")
    scale = layer.scale.double()
    assert scale[[1, 2, 3, 5]].eq(1).all() and scale[0] > 2**14 and scale[4] < 2**-14
    assert torch.equal(scale.log2(), scale.log2().round())
    s = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    exact = conv.weight.double().view(2, 2, 3, 3, 3) * s.view(2, 1, 3, 1, 1)
    expected = (exact / scale.view(2, 1, 3, 1, 1)).view(4, 3, 3, 3).half()
    assert torch.equal(layer.weight, expected)
    x = torch.randn(2, 4, 5, 5).half()
    wide = (
        nn.Sequential(copy.deepcopy(conv), copy.deepcopy(norm)).eval().double()(x.double() * 1e-3)
    )
    assert_close(done.model(x * 1e-3), wide, 2e-3, "float16")


def test_a_fused_layer_is_a_layer() -> None:
    model = lived_in(nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.SiLU()))
    layer = cnnops.fuse(model).model.get_submodule("0")
    assert repr(layer) == (
        "ConvAct2d(3, 4, kernel_size=(3, 3), stride=(1, 1), activation=silu, fused=1 + 2)"
    )
    assert list(layer.state_dict()) == ["weight", "bias"]
    own = cnnops.nn.ConvAct2d(3, 4, 3, activation="silu")
    own.load_state_dict(layer.state_dict())
    x = torch.randn(2, 3, 6, 6)
    assert torch.equal(own(x), layer(x))
    with pytest.raises(ValueError, match="expected one of none, relu"):
        cnnops.nn.ConvAct2d(3, 4, 3, activation="selu")


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("name", ["ConvAct", "ConvTransposeAct"])
def test_layers_by_hand(name: str, dims: int) -> None:
    torch.manual_seed(0)
    layer = getattr(cnnops.nn, f"{name}{dims}d")(
        4, 6, 3, stride=2, groups=2, activation="relu6"
    ).double()
    theirs = getattr(nn, f"{name.removesuffix('Act')}{dims}d")(4, 6, 3, stride=2, groups=2).double()
    theirs.load_state_dict(layer.state_dict())
    x = torch.randn(2, 4, *(7, 6, 5)[:dims], dtype=torch.float64, requires_grad=True)
    expected = theirs(x)
    r = torch.randn_like(expected, requires_grad=True)
    for residual in (None, r, r[:1]):
        y = layer(x, residual)
        z = F.relu6(expected if residual is None else expected + residual)
        assert_close(y, z, 1e-13, "result")
        leaves = [x] if residual is None else [x, r]
        for a, b in zip(
            torch.autograd.grad(y.square().sum(), [*leaves, layer.weight, layer.bias]),
            torch.autograd.grad(
                z.square().sum(), [*leaves, theirs.weight, theirs.bias], retain_graph=True
            ),
            strict=True,
        ):
            assert_close(a, b, 1e-12, "gradient")


def test_gradients_flow() -> None:
    model = lived_in(UpDown(2).double())
    done = cnnops.fuse(model)
    x = torch.randn(1, 3, 6, 6, dtype=torch.float64)
    grads = []
    for m in (model, done.model):
        leaf = x.clone().requires_grad_()
        m(leaf).square().sum().backward()
        grads.append(leaf.grad)
    assert_close(grads[1], grads[0], 1e-12, "gradient of the input")
    assert all(p.grad is not None for p in done.model.parameters())


@pytest.mark.parametrize("dims", [2, 3])
def test_channels_last(dims: int) -> None:
    form = torch.channels_last if dims == 2 else torch.channels_last_3d
    model = cnnops.convert(lived_in(UpDown(dims)).to(memory_format=form)).model
    done = cnnops.fuse(model)
    assert done.model.get_submodule("first.0").weight.is_contiguous(memory_format=form)
    agree(model, done, torch.randn(1, 3, *(4, 6, 4)[:dims]).contiguous(memory_format=form))


def test_compiled() -> None:
    model = lived_in(nn.Sequential(UpDown(2), nn.MaxPool2d(2), nn.BatchNorm2d(2), nn.ReLU()))
    done = cnnops.fuse(model)
    x = torch.randn(1, 3, 6, 6)
    compiled: Any = torch.compile(done.model, backend="aot_eager", fullgraph=True)
    assert_close(compiled(x), model(x), 3e-6, "compiled")


def test_copies_and_pickles() -> None:
    model = lived_in(ResNet18(10))
    x = torch.randn(1, 3, 32, 32)
    done = cnnops.fuse(model)
    y = done.model(x)
    assert torch.equal(copy.deepcopy(done.model)(x), y)
    assert torch.equal(pickle.loads(pickle.dumps(done.model))(x), y)
    assert done.model.fc.weight is model.fc.weight
    assert cnnops.fuse(model, copy=True).model.fc.weight is not model.fc.weight
    again = cnnops.fuse(done.model)
    assert again.model is done.model and not again.fused, "fusing twice"
    assert not cnnops.convert(done.model).left


def test_the_report_is_a_tree() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
            self.pool, self.norm = nn.MaxPool2d(2), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(F.silu(self.pool(self.body(x))))

    assert str(cnnops.fuse(lived_in(Model()))).splitlines() == [
        "Model",
        "  pool: MaxPool2d",
        "  norm: BatchNorm2d  left: follows silu",
        "  body: Module",
        "    0: ConvAct2d  + body.1 + body.2",
        "silu  left: follows MaxPool2d",
        "1 fused, 2 left",
    ]


# ---- random networks ---------------------------------------------------------------------------------------


class Drawn(nn.Module):
    """Steps of a few kinds, some with a residual, on one size of tensor."""

    def __init__(self, dims: int, channels: int, steps: list[dict[str, Any]]) -> None:
        super().__init__()
        self.steps = steps
        self.convs, self.norms, self.acts = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for step in steps:
            kind = "Conv" if step["forward"] else "ConvTranspose"
            self.convs.append(
                getattr(nn, f"{kind}{dims}d")(
                    channels, channels, 3, padding=1, bias=step["bias"],
                    groups=channels if step["depthwise"] else 1,
                )
            )  # fmt: skip
            self.norms.append(getattr(nn, f"BatchNorm{dims}d")(channels, affine=step["affine"]))
            self.acts.append(copy.deepcopy(step["act"]))

    def forward(self, x: Tensor) -> Tensor:
        seen = [x]
        for i, step in enumerate(self.steps):
            y = self.convs[i](seen[-1]) if step["conv"] else seen[-1] * 1.5
            y = self.norms[i](y) if step["norm"] else y
            if step["residual"] is not None:
                r = seen[step["residual"] % len(seen)]
                if step["in place"] and (step["conv"] or step["norm"]):
                    y += r
                else:
                    y = r + y
            seen.append(self.acts[i](y))
        return seen[-1] + seen[len(seen) // 2]


FORMS = [
    nn.Identity(),
    nn.ReLU(),
    nn.ReLU(inplace=True),
    nn.GELU(),
    nn.Tanh(),
    nn.ELU(),
    nn.Hardswish(),
]


@st.composite
def drawn(draw: st.DrawFn) -> tuple[nn.Module, tuple[int, ...]]:
    dims, channels = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    often = st.sampled_from([True, True, False])
    steps = [
        {
            "conv": draw(often), "norm": draw(often), "act": draw(st.sampled_from(FORMS)),
            "residual": draw(st.one_of(st.none(), st.integers(0, 4))), "bias": draw(st.booleans()),
            "forward": draw(often), "depthwise": draw(st.booleans()), "affine": draw(often),
            "in place": draw(st.booleans()),
        }
        for _ in range(draw(st.integers(1, 4)))
    ]  # fmt: skip
    return Drawn(dims, channels, steps), (2, channels, *(4, 5, 3)[:dims])


@settings(max_examples=120)
@given(drawn(), st.integers(0, 2**31))
def test_random_networks(network: tuple[nn.Module, tuple[int, ...]], seed: int) -> None:
    model, size = lived_in(network[0], seed).double(), network[1]
    x = torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    done = cnnops.fuse(model, x)
    agree(model, done, x, limit=1e-12)
    if isinstance(done.model, fx.GraphModule):
        folded = sum(step["conv"] and step["norm"] for step in model.steps)
        assert (
            sum(isinstance(m, BATCH_NORM) for m in done.model.modules())
            <= len(model.steps) - folded
        )

"""torch.func over every family: grad, vmap, jvp and their combinations give what torch's functions give."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from cases import assert_close
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

import cnnops
import cnnops.functional as C
import cnnops.nn

Function = Callable[..., Tensor]


@dataclass(frozen=True)
class Family:
    """``call(module, *tensors)``, with the tensors' sizes; `module` is cnnops.functional or torch's."""

    name: str
    call: Callable[..., Tensor]
    sizes: tuple[tuple[int, ...], ...]

    def tensors(self, *front: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(3)
        return [
            torch.rand(*front, *size, generator=generator, dtype=torch.float64)
            for size in self.sizes
        ]

    def ours(self, *tensors: Tensor) -> Tensor:
        return self.call(C, *tensors)

    def theirs(self, *tensors: Tensor) -> Tensor:
        return self.call(F, *tensors)


X = (2, 4, 6, 5)
INDICES = torch.tensor([0, 7, 14, 24, 3, 22, 16, 9]).view(1, 2, 2, 2)

FAMILIES = (
    Family("conv2d", lambda m, x, w, b: m.conv2d(x, w, b, padding=1, groups=2), (X, (6, 2, 3, 2), (6,))),
    Family("conv1d", lambda m, x, w: m.conv1d(x, w, stride=2), ((2, 3, 7), (4, 3, 3))),
    Family("conv3d", lambda m, x, w, b: m.conv3d(x, w, b), ((1, 2, 3, 4, 3), (3, 2, 2, 2, 2), (3,))),
    Family(
        "conv_transpose2d",
        lambda m, x, w, b: m.conv_transpose2d(x, w, b, stride=2, padding=1, groups=2),
        ((2, 4, 3, 4), (4, 3, 3, 2), (6,)),
    ),
    Family("conv_transpose1d", lambda m, x, w: m.conv_transpose1d(x, w, stride=3), ((2, 3, 4), (3, 2, 3))),
    Family("max_pool2d", lambda m, x: m.max_pool2d(x, 3, 2, 1), (X,)),
    Family("max_pool1d", lambda m, x: m.max_pool1d(x, 3, 1), ((2, 3, 7),)),
    Family("adaptive_max_pool2d", lambda m, x: m.adaptive_max_pool2d(x, (3, 2)), (X,)),
    Family("avg_pool2d", lambda m, x: m.avg_pool2d(x, 3, 2, 1), (X,)),
    Family("avg_pool3d", lambda m, x: m.avg_pool3d(x, 2, 1), ((2, 3, 3, 4, 3),)),
    Family("adaptive_avg_pool2d", lambda m, x: m.adaptive_avg_pool2d(x, (4, 1)), (X,)),
    Family("lp_pool2d", lambda m, x: m.lp_pool2d(x, 3.0, 2), (X,)),
    Family("max_unpool2d", lambda m, x: m.max_unpool2d(x, INDICES, 2, 2, 0, (5, 5)), ((1, 2, 2, 2),)),
    Family(
        "batch_norm_eval",
        lambda m, x, w, b: m.batch_norm(x, torch.arange(4.0).double() / 8, torch.ones(4).double(), w, b),
        (X, (4,), (4,)),
    ),
    Family(
        "batch_norm_train",
        lambda m, x, w, b: m.batch_norm(x, None, None, w, b, training=True),
        (X, (4,), (4,)),
    ),
    Family("group_norm", lambda m, x, w, b: m.group_norm(x, 2, w, b), (X, (4,), (4,))),
    Family("layer_norm", lambda m, x, w, b: m.layer_norm(x, (6, 5), w, b), (X, (6, 5), (6, 5))),
    Family("instance_norm", lambda m, x, w, b: m.instance_norm(x, None, None, w, b), (X, (4,), (4,))),
)  # fmt: skip

each_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)


def bent(function: Function) -> Function:
    """A number from the function's result, whose gradient depends on the result."""

    def value(*tensors: Tensor) -> Tensor:
        y = function(*tensors)
        return (y.square() * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape)).sum()

    return value


def assert_all_close(ours: Any, theirs: Any, what: str) -> None:
    flat, other = (torch.utils._pytree.tree_leaves(t) for t in (ours, theirs))
    for a, b in zip(flat, other, strict=True):
        # What is zero but for rounding has no scale of its own.
        b = b if float(b.norm()) > 1e-12 else torch.zeros_like(b)
        if not float(b.norm()):
            assert float(a.norm()) < 1e-12, what
        else:
            assert_close(a, b, 1e-11, what)


@each_family
def test_grad(family: Family) -> None:
    tensors = family.tensors()
    places = tuple(range(len(tensors)))
    ours, theirs = (grad(bent(f), places)(*tensors) for f in (family.ours, family.theirs))
    assert_all_close(ours, theirs, "gradient")


@each_family
@pytest.mark.parametrize("shared", ["nothing", "parameters", "input"])
def test_vmap(family: Family, shared: str) -> None:
    """All tensors mapped, the input alone (an ensemble's batch), or the parameters alone (an ensemble)."""
    single, mapped = family.tensors(), family.tensors(3)
    if shared == "input" and len(single) == 1:
        pytest.skip("has no parameters")
    maps = [shared == "nothing" or (i == 0) == (shared == "parameters") for i in range(len(single))]
    tensors = [m if on else s for m, s, on in zip(mapped, single, maps, strict=True)]
    in_dims = tuple(0 if on else None for on in maps)
    ours, theirs = (vmap(f, in_dims)(*tensors) for f in (family.ours, family.theirs))
    assert_all_close(ours, theirs, "vmap")
    places = tuple(range(len(tensors)))
    ours, theirs = (
        vmap(grad(bent(f), places), in_dims)(*tensors) for f in (family.ours, family.theirs)
    )
    assert_all_close(ours, theirs, "gradients of each")
    ours, theirs = (
        grad(bent(vmap(f, in_dims)), places)(*tensors) for f in (family.ours, family.theirs)
    )
    assert_all_close(ours, theirs, "gradient of all")


@each_family
def test_vmap_over_another_axis(family: Family) -> None:
    mapped = [t.movedim(0, -1) for t in family.tensors(3)]
    ours, theirs = (vmap(f, -1, out_dims=1)(*mapped) for f in (family.ours, family.theirs))
    assert_all_close(ours, theirs, "vmap")


@each_family
def test_jvp(family: Family) -> None:
    tensors = family.tensors()
    tangents = [torch.cos(9 * t) for t in tensors]
    ours, theirs = (jvp(f, tuple(tensors), tuple(tangents)) for f in (family.ours, family.theirs))
    assert_all_close(ours, theirs, "jvp")
    for place in range(len(tensors)):

        def one(function: Function, place: int = place) -> Any:
            def of(t: Tensor) -> Tensor:
                return function(*tensors[:place], t, *tensors[place + 1 :])

            return jvp(of, (tensors[place],), (tangents[place],))

        assert_all_close(one(family.ours), one(family.theirs), f"jvp of input {place}")


@each_family
def test_forward_mode_outside_of_torch_func(family: Family) -> None:
    tensors = family.tensors()
    tangent = torch.cos(9 * tensors[0])
    found = []
    for function in (family.ours, family.theirs):
        with forward_ad.dual_level():
            y = function(forward_ad.make_dual(tensors[0], tangent), *tensors[1:])
            found.append(forward_ad.unpack_dual(y).tangent)
    assert_all_close(*found, "tangent")


SMALL = (
    Family("conv2d", lambda m, x, w: m.conv2d(x, w), ((1, 2, 3, 3), (2, 2, 2, 2))),
    Family("conv_transpose1d", lambda m, x, w: m.conv_transpose1d(x, w, stride=2), ((1, 2, 3), (2, 2, 3))),
    Family("max_pool2d", lambda m, x: m.max_pool2d(x, 2, 1), ((1, 2, 3, 3),)),
    Family("avg_pool2d", lambda m, x: m.avg_pool2d(x, 2, 1), ((1, 2, 3, 3),)),
    Family("batch_norm", lambda m, x: m.batch_norm(x, None, None, training=True), ((2, 2, 3),)),
    Family("group_norm", lambda m, x: m.group_norm(x, 1), ((2, 2, 3),)),
)  # fmt: skip


@pytest.mark.parametrize("family", SMALL, ids=lambda family: family.name)
def test_jacobians_and_hessians(family: Family) -> None:
    """Forward over reverse, reverse over reverse, and vmap over both."""
    tensors = family.tensors()
    for jacobian in (jacrev, jacfwd):
        ours, theirs = (jacobian(f)(*tensors) for f in (family.ours, family.theirs))
        assert_all_close(ours, theirs, jacobian.__name__)
    for second in (hessian, lambda f: jacrev(jacrev(f))):
        ours, theirs = (second(bent(f))(*tensors) for f in (family.ours, family.theirs))
        assert_all_close(ours, theirs, "hessian")


def test_gradients_of_every_sample() -> None:
    """What differential privacy asks for: one gradient a sample, of a whole network."""
    torch.manual_seed(0)
    theirs = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular"), nn.GroupNorm(2, 4), nn.ReLU(),
        nn.MaxPool2d(2), nn.Conv2d(4, 4, 3, groups=4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3),
    ).double()  # fmt: skip
    ours = cnnops.convert(theirs, copy=True).model
    x, target = torch.randn(5, 2, 9, 8).double(), torch.tensor([0, 1, 2, 1, 0])

    def gradients(net: nn.Module) -> Any:
        parameters = {name: p.detach() for name, p in net.named_parameters()}

        def loss(parameters: Any, image: Tensor, label: Tensor) -> Tensor:
            y = functional_call(net, parameters, (image.unsqueeze(0),))
            return F.cross_entropy(y, label.unsqueeze(0))

        return vmap(grad(loss), (None, 0, 0))(parameters, x, target)

    assert_all_close(gradients(ours), gradients(theirs), "gradients of each sample")


def test_an_ensemble_of_networks() -> None:
    """vmap over stacked parameters: groups of one convolution."""
    nets = [cnnops.nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect").double() for _ in range(4)]
    parameters, buffers = torch.func.stack_module_state(nets)  # type: ignore[arg-type]
    x = torch.randn(2, 2, 5, 6).double()

    def one(parameters: Any, buffers: Any, x: Tensor) -> Tensor:
        y: Tensor = functional_call(nets[0], (parameters, buffers), (x,))
        return y

    together = vmap(one, (0, 0, None))(parameters, buffers, x)
    assert_all_close(together, torch.stack([net(x) for net in nets]), "ensemble")


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_stacks_of_gradients(family: Family) -> None:
    """``is_grads_batched``, which jacobians of torch.autograd are made of."""
    found = []
    for function in (family.ours, family.theirs):
        tensors = [t.requires_grad_() for t in family.tensors()]
        y = function(*tensors)
        rows = torch.arange(2.0 * y.numel()).double().sin().view(2, *y.shape)
        found.append(torch.autograd.grad(y, tensors, rows, is_grads_batched=True))
    assert_all_close(*found, "stack of gradients")


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_no_images_at_all() -> None:
    """Maps of empty batches, and of one image each."""
    w = torch.rand(3, 4, 3, 3).double()
    for size in ((3, 0, 4, 6, 5), (1, 2, 4, 6, 5)):
        x = torch.rand(size).double()
        for ours, theirs in (
            (C.max_pool2d, F.max_pool2d), (C.avg_pool2d, F.avg_pool2d),
        ):  # fmt: skip
            assert (
                vmap(lambda t, f=ours: f(t, 2))(x).shape
                == vmap(lambda t, f=theirs: f(t, 2))(x).shape
            )
        assert vmap(lambda t: C.conv2d(t, w))(x).shape == (*size[:2], 3, 4, 3)


def test_running_statistics_cannot_be_mapped() -> None:
    """As in torch: each map would have to write its own into the one tensor."""
    mean, var = torch.zeros(4), torch.ones(4)
    for module in (C, F):
        with pytest.raises((RuntimeError, ValueError)):
            vmap(lambda x, m=module: m.batch_norm(x, mean, var, training=True))(torch.rand(3, *X))
    assert torch.equal(mean, torch.zeros(4)) and torch.equal(var, torch.ones(4))

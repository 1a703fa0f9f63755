"""Group, layer and instance norm in every engine: rows, running statistics, derivatives, layers, errors."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import (
    ENGINES,
    GROUP_NORM_CASES,
    LAYER_NORM_CASES,
    TOLERANCE,
    Case,
    assert_close,
    check,
    device_of,
    grid,
    needs_emulator,
)
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

import cnnops
import cnnops.functional as C
from cnnops import nn
from cnnops.cuda import emulate

CASES = (*GROUP_NORM_CASES, *LAYER_NORM_CASES)


@pytest.mark.parametrize("case, engine, dtype", grid(CASES))
def test_rows(case: Case, engine: str, dtype: torch.dtype) -> None:
    check(case, engine, dtype)


@needs_emulator
@pytest.mark.parametrize("case", [c for c in CASES if c.schedules], ids=lambda c: c.id)
def test_thread_order_does_not_matter(case: Case) -> None:
    with emulate.schedule("all"):
        check(case, "emulate", torch.float32)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_strides_are_those_of_torch(last: bool, engine: str) -> None:
    """Of results and gradients: only group norm keeps channels-last."""
    x = torch.randn(2, 4, 3, 5)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    ours = x.to(device_of(engine)).requires_grad_()
    theirs = x.requires_grad_()
    for name, arguments in (("group_norm", (2,)), ("layer_norm", ((5,),)), ("instance_norm", ())):
        with cnnops.engine(engine):
            y = getattr(C, name)(ours, *arguments)
            (grad_x,) = torch.autograd.grad(y, ours, torch.ones_like(y))
        z = getattr(F, name)(theirs, *arguments)
        (grad_z,) = torch.autograd.grad(z, theirs, torch.ones_like(z))
        assert y.stride() == z.stride() and grad_x.stride() == grad_z.stride(), name


@pytest.mark.parametrize("engine", ENGINES)
def test_normalised_values(engine: str) -> None:
    """Mean 0 and biased variance 1 of what is normalised together, then gamma and beta."""
    device = device_of(engine)
    x = 3 * torch.randn(4, 6, 5, 7, device=device) + 2
    gamma, beta = torch.full((6,), 2.0, device=device), torch.full((6,), -1.0, device=device)
    row = torch.full((7,), 2.0, device=device), torch.full((7,), -1.0, device=device)
    with cnnops.engine(engine):
        group, layer = C.group_norm(x, 3, eps=1e-12), C.layer_norm(x, (7,), eps=1e-12)
        instance = C.instance_norm(x, eps=1e-12)
        scaled = (
            (group, C.group_norm(x, 3, gamma, beta, 1e-12)),
            (layer, C.layer_norm(x, (7,), *row, 1e-12)),
            (instance, C.instance_norm(x, None, None, gamma, beta, eps=1e-12)),
        )
    for plain, after in scaled:
        assert (after.double() - (2 * plain.double() - 1)).abs().max() < 1e-5
    together = group.unflatten(1, (3, 2)).flatten(2), layer, instance.flatten(2)
    for values in together:
        assert values.double().mean(-1).abs().max() < 1e-6
        assert (values.double().var(-1, correction=0) - 1).abs().max() < 1e-5


@pytest.mark.parametrize("engine", ENGINES)
def test_same_input_gives_same_bits(engine: str) -> None:
    device = device_of(engine)
    x = torch.randn(5, 12, 13, 11, device=device)
    w, b = (torch.randn(12, device=device, requires_grad=True) for _ in range(2))
    runs = []
    for threads in (1, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        found = []
        try:
            for form in (torch.contiguous_format, torch.channels_last):
                image = x.contiguous(memory_format=form).requires_grad_()
                rows = x.movedim(1, -1).contiguous().requires_grad_()
                with cnnops.engine(engine):
                    y, z = C.group_norm(image, 4, w, b), C.layer_norm(rows, (12,), w, b)
                    found += [y, *torch.autograd.grad(y, (image, w, b), y.detach())]
                    found += [z, *torch.autograd.grad(z, (rows, w, b), z.detach())]
        finally:
            torch.set_num_threads(before)
        runs.append(found)
    if engine == "aten":  # PyTorch's own sums depend on how many threads share them
        return
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("engine", ENGINES)
def test_one_value_is_its_own_mean(engine: str) -> None:
    """The result is the bias, and nothing depends on the input."""
    device = device_of(engine)
    x = torch.randn(3, 4, 1, device=device, requires_grad=True)
    bias = torch.randn(4, device=device)
    row = torch.randn(1, device=device)
    with cnnops.engine(engine):
        for y, z in (
            (C.group_norm(x, 4, None, bias), bias.view(4, 1).expand(x.shape)),
            (C.layer_norm(x, (1,), None, row), row.expand(x.shape)),
        ):
            (grad_x,) = torch.autograd.grad(y, x, torch.randn_like(y))
            # PyTorch multiplies by rstd = 1/sqrt(eps) what should have cancelled.
            assert (y - z).abs().max() < (1e-3 if engine == "aten" else 1e-6)
            assert grad_x.abs().max() < 1e-3


# ---- running statistics of instance norm ----------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("momentum", [0.1, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_running_statistics(dtype: torch.dtype, momentum: float, engine: str) -> None:
    """Means and unbiased variances of the batch's instances, averaged, over several steps."""
    device = device_of(engine)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    ours = torch.zeros(3, dtype=wide, device=device), torch.ones(3, dtype=wide, device=device)
    theirs = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    for step in range(4):
        x = ((step + 1) * torch.randn(5, 3, 4, 6) + step).to(dtype)
        with cnnops.engine(engine):
            C.instance_norm(x.to(device), *ours, momentum=momentum)
        F.instance_norm(x.double(), *theirs, momentum=momentum)
        for name, a, b in zip(("mean", "variance"), ours, theirs, strict=True):
            assert_close(a, b, 2 * TOLERANCE[wide].output, f"running {name}, step {step}")


def test_strided_running_statistics_of_another_dtype() -> None:
    """They may be views of any floating-point dtype, and the values between theirs stay."""
    x = torch.randn(4, 3, 5, 5)
    store = torch.ones(6, dtype=torch.float64)
    mean, var = store[::2], torch.ones(3, dtype=torch.float64)
    reference = torch.ones(3), torch.ones(3)
    F.instance_norm(x, *reference)
    C.instance_norm(x, mean, var)
    assert_close(mean, reference[0], 2e-6, "mean")
    assert_close(var, reference[1], 2e-6, "variance")
    assert store[1::2].tolist() == [1, 1, 1]
    assert_close(
        C.instance_norm(x, mean, var, use_input_stats=False),
        F.batch_norm(x.double(), mean, var),
        1e-6,
        "evaluation",
    )


def test_running_statistics_are_left_alone_by_evaluation_failure_and_empty_batches() -> None:
    mean, var = torch.ones(3), torch.ones(3)
    C.instance_norm(torch.randn(2, 3, 4), mean, var, use_input_stats=False)
    C.instance_norm(torch.randn(0, 3, 4), mean, var)
    C.instance_norm(torch.randn(2, 3, 0), mean, var)
    with pytest.raises(RuntimeError, match="weight: expected"):
        C.instance_norm(torch.randn(2, 3, 4), mean, var, torch.ones(2))
    with pytest.raises(RuntimeError, match="running_var: expected"):
        C.instance_norm(torch.randn(2, 3, 4), mean, torch.ones(2))
    assert mean.tolist() == var.tolist() == [1, 1, 1]


# ---- derivatives ----------------------------------------------------------------------------------------

DIFFERENTIABLE: dict[str, Callable[..., Tensor]] = {
    "group_norm": lambda x, w, b: C.group_norm(x, 2, w, b),
    "group_norm_silu": lambda x, w, b: C.group_norm_act(x, 2, w, b, activation="silu"),
    "instance_norm": lambda x, w, b: C.instance_norm(x, None, None, w, b),
    "layer_norm": lambda x, w, b: C.layer_norm(x, (4,), w, b),
}


@pytest.mark.parametrize("given", ["x", "x_weight", "x_bias", "x_weight_bias"])
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_first_and_second_derivatives(name: str, given: str) -> None:
    x = torch.randn(2, 4, 4, dtype=torch.float64, requires_grad=True)
    weight, bias = (torch.randn(4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    inputs = (x, weight if "weight" in given else None, bias if "bias" in given else None)
    with cnnops.engine("cpu"):
        assert torch.autograd.gradcheck(DIFFERENTIABLE[name], inputs, check_forward_ad=True)
        assert torch.autograd.gradgradcheck(DIFFERENTIABLE[name], inputs)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_third_derivative(name: str) -> None:
    """Of a loss that is not linear, so that output gradients themselves depend on the input."""
    x = torch.randn(2, 4, 4, dtype=torch.float64, requires_grad=True)
    weight, bias = (torch.randn(4, dtype=torch.float64) for _ in range(2))

    def third(function: Callable[..., Tensor]) -> Tensor:
        y = function(x, weight, bias)
        for _ in range(3):
            (y,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
        return y

    with cnnops.engine("cpu"):
        ours = third(DIFFERENTIABLE[name])
    assert_close(ours, third(lambda *t: _composed(name, *t)), 1e-9, "third derivative")


def _composed(name: str, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    groups = {"instance_norm": 4, "layer_norm": 4}.get(name, 2)
    z = x if name == "layer_norm" else x.unflatten(1, (groups, -1)).flatten(2)
    var, mean = torch.var_mean(z, -1, correction=0, keepdim=True)
    xhat = ((z - mean) * torch.rsqrt(var + 1e-5)).view_as(x)
    size = (4,) if name == "layer_norm" else (4, 1)
    y = xhat * weight.view(size) + bias.view(size)
    return F.silu(y) if name.endswith("silu") else y


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_func_transforms(name: str) -> None:
    """Per-sample gradients, mapped parameters and Hessians."""
    function = DIFFERENTIABLE[name]
    x = torch.randn(3, 2, 4, 4, dtype=torch.float64)
    weight, bias = (torch.randn(3, 4, dtype=torch.float64) for _ in range(2))

    def loss(f: Callable[..., Tensor], x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return f(x, w, b).pow(3).sum()

    def found(f: Callable[..., Tensor]) -> list[Any]:
        one = x[0], weight[0], bias[0]
        return [
            torch.func.vmap(f, (0, None, None))(x, *one[1:]),
            torch.func.vmap(f)(x, weight, bias),
            *torch.func.vmap(torch.func.grad(lambda *t: loss(f, *t), (0, 1, 2)), (0, None, None))(
                x, *one[1:]
            ),
            torch.func.hessian(lambda t: loss(f, t, *one[1:]))(one[0]),
        ]

    with cnnops.engine("cpu"):
        ours = found(function)
    for a, b in zip(ours, found(lambda *t: _composed(name, *t)), strict=True):
        assert_close(a, b, 1e-10, name)


@pytest.mark.parametrize("name", ["group_norm", "group_norm_silu", "layer_norm", "instance_norm"])
def test_no_more_bytes_are_kept_than_by_torch(name: str) -> None:
    x = torch.randn(2, 4, 6, 4, requires_grad=True)
    weight, bias = (torch.randn(4, requires_grad=True) for _ in range(2))
    theirs = {
        "group_norm": lambda: F.group_norm(x, 2, weight, bias),
        "group_norm_silu": lambda: F.silu(F.group_norm(x, 2, weight, bias)),
        "layer_norm": lambda: F.layer_norm(x, (4,), weight, bias),
        "instance_norm": lambda: F.instance_norm(x, None, None, weight, bias),
    }[name]

    def kept(function: Callable[[], Tensor]) -> int:
        found: dict[int, int] = {}

        def pack(t: Tensor) -> Tensor:
            found[t.data_ptr()] = t.numel() * t.element_size()
            return t

        with saved_tensors_hooks(pack, lambda t: t):
            function()
        return sum(found.values())

    with cnnops.engine("cpu"):
        assert 0 < kept(lambda: DIFFERENTIABLE[name](x, weight, bias)) <= kept(theirs)


# ---- PyTorch's interface --------------------------------------------------------------------------------

LAYERS: dict[str, tuple[tuple[Any, ...], dict[str, Any], tuple[int, ...]]] = {
    "GroupNorm": ((2, 4), {}, (2, 4, 3, 5)),
    "GroupNorm-plain": ((2, 4), {"affine": False}, (2, 4, 3, 5)),
    "GroupNorm-no_bias": ((2, 12), {"bias": False}, (3, 12)),
    "LayerNorm": ((5,), {}, (2, 4, 3, 5)),
    "LayerNorm-image": (((4, 3, 5),), {}, (2, 4, 3, 5)),
    "LayerNorm-plain": ((5,), {"elementwise_affine": False}, (2, 5)),
    "LayerNorm-no_bias": ((5,), {"bias": False}, (5,)),
    "InstanceNorm1d": ((4,), {}, (2, 4, 7)),
    "InstanceNorm1d-unbatched": ((4,), {"affine": True}, (4, 7)),
    "InstanceNorm2d": ((4,), {"affine": True, "track_running_stats": True}, (2, 4, 3, 5)),
    "InstanceNorm2d-unbatched": ((4,), {"track_running_stats": True}, (4, 3, 5)),
    "InstanceNorm2d-no_momentum": ((4,), {"track_running_stats": True, "momentum": None},
        (2, 4, 3, 5)),
    "InstanceNorm3d": ((4,), {"affine": True}, (2, 4, 3, 2, 5)),
    "InstanceNorm3d-unbatched": ((4,), {}, (4, 3, 2, 5)),
}  # fmt: skip


def test_signatures() -> None:
    for name in ("group_norm", "layer_norm", "instance_norm"):
        ours, theirs = (
            [(p.name, p.default, p.kind) for p in inspect.signature(f).parameters.values()]
            for f in (getattr(C, name), getattr(F, name))
        )
        assert ours == theirs, name
    for name in {name.partition("-")[0] for name in LAYERS}:
        for lazy in ("", "Lazy")[: 2 if name.startswith("Instance") else 1]:
            ours, theirs = getattr(nn, lazy + name), getattr(torch.nn, lazy + name)
            assert issubclass(ours, theirs)
            assert inspect.signature(ours) == inspect.signature(theirs)


@pytest.mark.parametrize("name", LAYERS)
def test_layers(name: str) -> None:
    """Same attributes, state, results and gradients, in training and evaluation."""
    arguments, options, size = LAYERS[name]
    kind = name.partition("-")[0]
    ours = getattr(nn, kind)(*arguments, **options)
    theirs = getattr(torch.nn, kind)(*arguments, **options)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter)
    assert repr(ours) == repr(theirs)
    ours.load_state_dict(theirs.state_dict())
    for layer in (ours, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        theirs_now = copy.deepcopy(theirs)
        for training in (True, True, False):
            layer.train(training)
            theirs_now.train(training)
            x = torch.randn(size)
            results = []
            for each in (layer, theirs_now):
                leaf = x.clone().requires_grad_()
                y = each(leaf)
                leaves = (leaf, *each.parameters())
                results.append((y, *torch.autograd.grad(y.square().sum(), leaves)))
            for a, b in zip(*results, strict=True):
                assert (a - b).abs().max() <= 2e-5 * max(1, float(b.detach().abs().max()))
        state = theirs_now.state_dict()
        assert list(layer.state_dict()) == list(state)
        for key, value in layer.state_dict().items():
            assert torch.allclose(value.double(), state[key].double(), rtol=1e-5, atol=1e-6), key
        theirs_now.load_state_dict(layer.state_dict())


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("track", [False, True])
def test_lazy_layers(track: bool, dims: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first forward already is ours, and what the layer becomes is."""
    kind = f"InstanceNorm{dims}d"
    ours = getattr(nn, "Lazy" + kind)(affine=True, track_running_stats=track)
    theirs = getattr(torch.nn, "Lazy" + kind)(affine=True, track_running_stats=track)
    x = torch.randn(2, 3, *(4,) * dims)
    z = theirs(x)
    monkeypatch.setattr(F, "instance_norm", lambda *_: pytest.fail("PyTorch's was called"))
    assert_close(ours(x), z, 1e-6, kind)
    assert type(ours) is getattr(nn, kind)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert_close(ours(x[0]), z[0], 1e-6, "unbatched")


def test_layers_check_as_torch_does() -> None:
    with pytest.warns(UserWarning, match="does not match num_features"):
        nn.InstanceNorm1d(5)(torch.randn(2, 4, 3))
    with pytest.raises(ValueError, match="num_features"):
        nn.InstanceNorm1d(5, affine=True)(torch.randn(2, 4, 3))
    for dims in (1, 2, 3):
        with pytest.raises(ValueError, match="expected"):
            getattr(nn, f"InstanceNorm{dims}d")(4)(torch.randn(4))


X, V, W5 = torch.ones(2, 4, 3), torch.ones(4), torch.ones(3)

MISTAKES: dict[str, tuple[str, tuple[Any, ...], dict[str, Any]]] = {
    "groups 0": ("group_norm", (X, 0), {}),
    "groups -1": ("group_norm", (X, -1), {}),
    "groups 3": ("group_norm", (X, 3), {}),
    "groups 2.0": ("group_norm", (X, 2.0), {}),
    "groups True": ("group_norm", (X, True), {}),
    "one dimension": ("group_norm", (V, 2), {}),
    "one value": ("group_norm", (torch.ones(1, 4, 1), 4), {}),
    "one value of two": ("group_norm", (torch.ones(1, 2), 2), {}),
    "weight of 3": ("group_norm", (X, 2, W5), {}),
    "weight 4 x 1": ("group_norm", (X, 2, V[:, None]), {}),
    "bias of 3": ("group_norm", (X, 2, None, W5), {}),
    "double weight": ("group_norm", (X, 2, V.double()), {}),
    "half weight": ("group_norm", (X, 2, V.half()), {}),
    "mixed parameters": ("group_norm", (X.half(), 2, V.half(), V), {}),
    "float weight beside double": ("group_norm", (X.double(), 2, V), {}),
    "weight elsewhere": ("group_norm", (X, 2, V.to("meta")), {}),
    "weight a list": ("group_norm", (X, 2, [1.0] * 4), {}),
    "eps a string": ("group_norm", (X, 2), {"eps": "a"}),
    "eps None": ("group_norm", (X, 2), {"eps": None}),
    "integers": ("group_norm", (X.int(), 2), {}),
    "row an int": ("layer_norm", (X, 3), {}),
    "row empty": ("layer_norm", (X, ()), {}),
    "row of 4": ("layer_norm", (X, (4,)), {}),
    "row too long": ("layer_norm", (X, (1, 2, 4, 3)), {}),
    "row a float": ("layer_norm", (X, (3.0,)), {}),
    "row a bool": ("layer_norm", (X, (True,)), {}),
    "row a string": ("layer_norm", (X, "a"), {}),
    "row None": ("layer_norm", (X, None), {}),
    "row weight": ("layer_norm", (X, (3,), V), {}),
    "row bias": ("layer_norm", (X, (3,), None, V), {}),
    "row of no dimension": ("layer_norm", (torch.tensor(1.0), (1,)), {}),
    "row double weight": ("layer_norm", (X, (3,), W5.double()), {}),
    "row input a list": ("layer_norm", ([1.0], (1,)), {}),
    "row integers": ("layer_norm", (X.int(), (3,)), {}),
    "one place": ("instance_norm", (X[..., :1],), {}),
    "no place": ("instance_norm", (X[..., 0],), {}),
    "no channel": ("instance_norm", (V, V, V), {"use_input_stats": False}),
    "no statistics": ("instance_norm", (X,), {"use_input_stats": False}),
    "only a mean for evaluation": ("instance_norm", (X, V), {"use_input_stats": False}),
    "only a mean": ("instance_norm", (X, V), {}),
    "only a variance": ("instance_norm", (X, None, V), {}),
    "mean of 3": ("instance_norm", (X, W5, V), {}),
    "mean with a gradient": ("instance_norm", (X, V.clone().requires_grad_(), V), {}),
    "weight of 3 of instances": ("instance_norm", (X, None, None, W5), {}),
    "momentum None": ("instance_norm", (X,), {"momentum": None}),
    "use_input_stats 1": ("instance_norm", (X,), {"use_input_stats": 1}),
    "instance integers": ("instance_norm", (X.int(),), {}),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_errors_have_the_type_of_torch(mistake: str) -> None:
    name, arguments, options = MISTAKES[mistake]
    with pytest.raises(Exception) as theirs:  # noqa: PT011
        getattr(F, name)(*arguments, **options)
    with cnnops.fallback("silent"), pytest.raises(theirs.type) as ours:
        getattr(C, name)(*arguments, **options)
    assert ours.type is theirs.type
    assert "expected" in str(ours.value) or "integers" in mistake
    assert all(t.eq(1).all() for t in (X, V, W5))


def test_unknown_activation() -> None:
    with pytest.raises(ValueError, match="activation: expected one of none, relu"):
        C.group_norm_act(X, 2, activation="softmax")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_autocast_on_the_cpu_leaves_dtypes_alone(dtype: torch.dtype) -> None:
    x, w = X.to(dtype), V.to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        assert C.group_norm(x, 2, w).dtype == F.group_norm(x, 2, w).dtype == dtype
        assert C.layer_norm(x, (3,)).dtype == F.layer_norm(x, (3,)).dtype == dtype
        assert C.instance_norm(x).dtype == F.instance_norm(x).dtype == dtype


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_autocast_on_a_gpu_widens_as_torch_does(dtype: torch.dtype) -> None:
    x, w = X.to("cuda", dtype), V.to("cuda", dtype)
    with torch.autocast("cuda", torch.bfloat16):
        assert C.group_norm(x, 2, w).dtype == F.group_norm(x, 2, w).dtype
        assert C.layer_norm(x, (3,)).dtype == F.layer_norm(x, (3,)).dtype
        assert C.instance_norm(x).dtype == F.instance_norm(x).dtype

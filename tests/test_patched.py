"""`cnnops.patched`: calls of torch.nn.functional are this package's for as long as the block lasts."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import assert_close
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import cnnops
import cnnops.functional as C


def ops(function: Callable[..., Any], *args: Any) -> list[str]:
    return [choice.op for choice in cnnops.explain(function, *args)]


def x(*size: int) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(0))


def indices(dims: int) -> tuple[Tensor, Tensor]:
    pool = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[dims - 1]
    y: tuple[Tensor, Tensor] = pool(x(1, 2, *(4,) * dims), 2, return_indices=True)
    return y


Call = tuple[Callable[[Callable[..., Any]], Any], str]


def calls(d: int) -> dict[str, Call]:
    """For each function of `d` dimensions a call of it, and an operation that comes of that."""
    image = x(1, 2, *(4,) * d)
    return {
        f"conv{d}d": (lambda f: f(image, x(3, 2, *(3,) * d), padding=1), "conv_fprop"),
        f"conv_transpose{d}d": (lambda f: f(image, x(2, 3, *(3,) * d)), "conv_dgrad"),
        f"max_pool{d}d": (lambda f: f(image, 2), "max_pool_fwd"),
        f"avg_pool{d}d": (lambda f: f(image, 2), "avg_pool_fwd"),
        f"lp_pool{d}d": (lambda f: f(image.abs(), 2.0, 2), "avg_pool_fwd"),
        f"adaptive_avg_pool{d}d": (lambda f: f(image, 3), "avg_pool_fwd"),
        f"adaptive_max_pool{d}d": (lambda f: f(image, 3), "max_pool_fwd"),
        f"max_unpool{d}d": (lambda f: f(*indices(d), 2), "max_unpool_fwd"),
    }


def normalised(f: Callable[..., Any]) -> Any:
    return f(x(2, 3, 4), torch.zeros(3), torch.ones(3), training=True)


CALLS: dict[str, Call] = {
    **calls(1),
    **calls(2),
    **calls(3),
    "batch_norm": (normalised, "batch_norm_train"),
    "group_norm": (lambda f: f(x(2, 4, 4), 2), "group_norm_fwd"),
    "layer_norm": (lambda f: f(x(2, 4, 4), [4]), "layer_norm_fwd"),
    "instance_norm": (lambda f: f(x(2, 4, 4)), "group_norm_fwd"),
}


def test_every_function_that_both_have() -> None:
    assert CALLS.keys() == {name for name in C.__all__ if hasattr(F, name)}


@pytest.mark.parametrize("name", CALLS)
def test_calls_reach_ours(name: str) -> None:
    call, op = CALLS[name]
    function = getattr(F, name)
    expected = call(function)
    found: list[Any] = []

    def inside() -> None:
        with cnnops.patched():
            found.append(call(function))

    assert op in ops(inside)
    assert_close(found[0], expected, 2e-6, name)
    assert not ops(lambda: call(function)), "outside of the block"
    assert torch.equal(found[0], call(getattr(C, name))), "the same as by its own name"


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize(
    "name, size", [("max_pool", "kernel_size"), ("adaptive_max_pool", "output_size")]
)
def test_indices(name: str, size: str, dims: int) -> None:
    image, function = x(1, 2, *(4,) * dims), f"{name}{dims}d"
    expected = getattr(F, function)(image, 2, return_indices=True)
    with cnnops.patched():
        found = [
            getattr(F, function)(image, 2, return_indices=True),
            getattr(F, function)(input=image, return_indices=True, **{size: 2}),
            getattr(F, f"{function}_with_indices")(image, 2),
        ]
    for values in found:
        assert all(torch.equal(a, b) for a, b in zip(values, expected, strict=True))


def test_torch_has_the_same_functions() -> None:
    image, w = x(1, 2, 4, 4), x(3, 2, 3, 3)
    with cnnops.patched():
        assert ops(torch.conv2d, image, w) == ["conv_fprop"]
        assert ops(torch.conv_transpose2d, image, x(2, 3, 3, 3)) == ["conv_dgrad"]
        assert ops(torch.adaptive_avg_pool1d, image[0], 2) == ["avg_pool_fwd"]
        assert not ops(torch.relu, image)


def test_layers_of_torch() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.MaxPool2d(2), nn.GroupNorm(2, 4)
    )
    y = model(x(2, 3, 8, 8))

    @cnnops.patched()
    def run(image: Tensor) -> Tensor:
        found: Tensor = model(image)
        return found

    assert ops(run, x(2, 3, 8, 8)) == [
        "conv_fprop",
        "batch_norm_train",
        "max_pool_fwd",
        "group_norm_fwd",
    ]
    assert_close(run(x(2, 3, 8, 8)), y, 2e-6, "layers")
    image = x(2, 3, 8, 8).requires_grad_()
    z = run(image)
    backward = ops(z.square().sum().backward)
    assert {"conv_dgrad", "conv_wgrad", "batch_norm_bwd", "max_pool_bwd"} <= set(backward)


def test_blocks_nest_and_end() -> None:
    image, w = x(1, 2, 4, 4), x(3, 2, 3, 3)
    once = cnnops.patched()
    with once, once, cnnops.patched():
        assert ops(F.conv2d, image, w) == ["conv_fprop"]
        with cnnops.engine("aten"):
            assert str(cnnops.explain(F.conv2d, image, w)[0]) == "conv_fprop: aten (aten)"
    assert not ops(F.conv2d, image, w)
    with pytest.raises(RuntimeError, match="expected"), cnnops.patched():
        F.conv2d(image, w[:, :1])
    assert not ops(F.conv2d, image, w), "after an exception"

    @cnnops.patched()
    def fails(depth: int) -> None:
        if depth:
            fails(depth - 1)
        raise KeyError

    with pytest.raises(KeyError):
        fails(2)
    assert not ops(F.conv2d, image, w)


def test_other_threads_are_not_concerned() -> None:
    image, w = x(1, 2, 4, 4), x(3, 2, 3, 3)
    found: list[str] = []
    with cnnops.patched():
        thread = threading.Thread(target=lambda: found.extend(ops(F.conv2d, image, w)))
        thread.start()
        thread.join()
        assert not found and ops(F.conv2d, image, w)


class Marked(Tensor):
    pass


def test_what_ours_cannot_take() -> None:
    image, w = x(1, 2, 4, 4), x(3, 2, 3, 3)
    marked = image.as_subclass(Marked)
    whole = torch.ones(1, 1, 3, 3, dtype=torch.int64)
    with cnnops.patched():
        with pytest.raises(
            cnnops.UnsupportedError, match="conv2d: no kernel takes a tensor of the subclass"
        ):
            F.conv2d(marked, w)
        with pytest.raises(cnnops.UnsupportedError):
            F.conv2d(whole, whole)
        with cnnops.fallback("silent"), warnings.catch_warnings():
            warnings.simplefilter("error")
            assert type(F.conv2d(marked, w)) is Marked
            assert torch.equal(F.conv2d(whole, whole), torch.full((1, 1, 1, 1), 9))
        with (
            cnnops.fallback("warn"),
            pytest.warns(UserWarning, match="PyTorch's own op runs instead"),
        ):
            F.avg_pool2d(marked, 2)
    # With indices as without: what is called instead is PyTorch's function.
    with cnnops.patched(), cnnops.fallback("silent"):
        assert torch.equal(F.max_pool2d(marked, 2, return_indices=True)[0], F.max_pool2d(image, 2))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_decorate_their_function(reentrant: bool) -> None:
    layer = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    image = x(1, 3, 6, 6).requires_grad_()
    layer(image).square().sum().backward()
    expected, image.grad = image.grad, None
    y = checkpoint(cnnops.patched()(layer.forward), image, use_reentrant=reentrant)
    assert {"conv_fprop", "conv_dgrad"} <= set(ops(y.square().sum().backward))
    assert_close(image.grad, expected, 2e-6, "gradient")


def test_compiled_and_transformed() -> None:
    image, w = x(2, 2, 4, 4), x(3, 2, 3, 3)

    @cnnops.patched()
    def block(image: Tensor) -> Tensor:
        return F.conv2d(image, w).relu().sum()

    expected = torch.func.grad(lambda t: F.conv2d(t, w).relu().sum())(image)
    assert_close(torch.func.grad(block)(image), expected, 2e-6, "gradient")
    assert "conv_fprop" in ops(torch.func.vmap(block), image[:, None])

    def plain(image: Tensor) -> Tensor:
        return F.conv2d(image, w).relu().sum()

    seen: list[str] = []

    def backend(graph: Any, _: Any) -> Any:
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    compiled: Any = torch.compile(plain, backend=backend, fullgraph=True)
    with cnnops.patched():
        assert_close(compiled(image), plain(image), 2e-6, "compiled")
    assert any("cnnops.conv_fprop" in target for target in seen)
    torch._dynamo.reset()

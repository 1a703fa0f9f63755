"""Mistakes: PyTorch's exception types, "expected …, got …", and nothing written."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import ENGINES, device_of
from torch import Tensor

import cnnops
import cnnops.functional as C
from cnnops import registry


class Mistake(NamedTuple):
    """A call that PyTorch refuses; `error` is given where ours is not torch's type."""

    id: str
    function: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = {}
    error: type[Exception] | None = None


X, W, B = torch.ones(2, 4, 8, 8), torch.ones(6, 4, 3, 3), torch.ones(6)
CONV = [
    Mistake("channels", "conv2d", (X[:, :3], W)),
    Mistake("channels_of_groups", "conv2d", (X, W), {"groups": 2}),
    Mistake("groups_do_not_divide", "conv2d", (X, torch.ones(5, 2, 3, 3)), {"groups": 2}),
    Mistake("no_groups", "conv2d", (X, W), {"groups": 0}),
    Mistake("no_filters", "conv2d", (X, W[:0])),
    Mistake("kernel_of_no_taps", "conv2d", (X, W[..., :0])),
    Mistake("kernel_beyond_input", "conv2d", (X, torch.ones(6, 4, 9, 3))),
    Mistake("dilated_beyond_input", "conv2d", (X, W), {"dilation": 4}),
    Mistake("empty_plane", "conv2d", (X[:, :, :0], W), {"padding": 3}),
    Mistake("input_dimensions", "conv2d", (X[0, 0], W)),
    Mistake("too_many_dimensions", "conv2d", (X[None], W)),
    Mistake("weight_dimensions", "conv2d", (X, W[0])),
    Mistake("bias_length", "conv2d", (X, W, B[:4])),
    Mistake("bias_dimensions", "conv2d", (X, W, B[:, None])),
    Mistake("weight_dtype", "conv2d", (X, W.double())),
    Mistake("bias_dtype", "conv2d", (X, W, B.half())),
    Mistake("input_dtype", "conv2d", (X.long(), W)),
    Mistake("stride_0", "conv2d", (X, W), {"stride": 0}),
    Mistake("stride_negative", "conv2d", (X, W), {"stride": (1, -1)}),
    Mistake("stride_too_long", "conv2d", (X, W), {"stride": (1, 1, 1)}),
    Mistake("stride_empty", "conv2d", (X, W), {"stride": ()}),
    Mistake("stride_float", "conv2d", (X, W), {"stride": 1.5}),
    Mistake("stride_bool", "conv2d", (X, W), {"stride": True}),
    Mistake("stride_text", "conv2d", (X, W), {"stride": "2"}),
    Mistake("stride_none", "conv2d", (X, W), {"stride": None}),
    Mistake("dilation_0", "conv2d", (X, W), {"dilation": 0}),
    Mistake("dilation_float", "conv2d", (X, W), {"dilation": (1.0, 1.0)}),
    Mistake("padding_negative", "conv2d", (X, W), {"padding": -1}),
    Mistake("padding_text", "conv2d", (X, W), {"padding": "full"}),
    Mistake("padding_too_long", "conv2d", (X, W), {"padding": (1, 1, 1)}),
    Mistake("padding_float", "conv2d", (X, W), {"padding": 0.5}),
    Mistake("same_strided", "conv2d", (X, W), {"padding": "same", "stride": 2}),
    Mistake("groups_float", "conv2d", (X, W), {"groups": 1.0}),
    Mistake("input_array", "conv2d", (np.ones((2, 4, 8, 8)), W)),
    Mistake("weight_none", "conv2d", (X, None)),
    Mistake("bias_list", "conv2d", (X, W, [0.0] * 6)),
]
POOL = [
    *(
        Mistake(f"{id}_{function[:3]}", function, args, kwargs)
        for function in ("max_pool2d", "avg_pool2d")
        for id, args, kwargs in [
            ("too_many_dimensions", (X[None], 2), {}),
            ("no_channels", (X[:, :0], 2), {}),
            ("empty_plane", (X[..., :0], 2), {}),
            ("unbatched_no_channels", (X[0, :0], 2), {}),
            ("kernel_0", (X, 0), {}),
            ("kernel_negative", (X, (2, -1)), {}),
            ("kernel_beyond_input", (X, 9), {}),
            ("kernel_too_long", (X, (2, 2, 2)), {}),
            ("kernel_empty", (X, ()), {}),
            ("kernel_float", (X, 2.0), {}),
            ("kernel_bool", (X, True), {}),
            ("kernel_none", (X, None), {}),
            ("stride_0", (X, 2, 0), {}),
            ("stride_text", (X, 2, "2"), {}),
            ("stride_too_long", (X, 2, (1, 1, 1)), {}),
            ("padding_negative", (X, 2, 2, -1), {}),
            ("padding_beyond_half", (X, 3, 2, 2), {}),
            ("padding_none", (X, 2, 2, None), {}),
            ("ceil_mode_int", (X, 2), {"ceil_mode": 1}),
            ("input_array", (np.ones((2, 4, 8, 8)), 2), {}),
        ]
    ),
    Mistake("dimensions_max", "max_pool2d", (X[0, 0], 2)),
    # torch.nn.functional.avg_pool2d stumbles over the missing axis with an IndexError.
    Mistake("dimensions_avg", "avg_pool2d", (X[0, 0], 2), error=RuntimeError),
    Mistake("padding_beyond_half_dilated", "max_pool2d", (X, 2, 1, 2, 3)),
    Mistake("dilation_0", "max_pool2d", (X, 2), {"dilation": 0}),
    Mistake("divisor_0", "avg_pool2d", (X, 2), {"divisor_override": 0}),
    Mistake("divisor_float", "avg_pool2d", (X, 2), {"divisor_override": 2.5}),
    Mistake("count_include_pad_text", "avg_pool2d", (X, 2), {"count_include_pad": "no"}),
    Mistake("dimensions_adaptive", "adaptive_avg_pool2d", (X[0, 0], 2)),
    Mistake("too_many_dimensions_adaptive", "adaptive_avg_pool2d", (X[None], 2)),
    Mistake("empty_plane_adaptive", "adaptive_avg_pool2d", (X[..., :0], 2)),
    Mistake("size_negative", "adaptive_avg_pool2d", (X, -1)),
    Mistake("size_too_long", "adaptive_avg_pool2d", (X, (1, 1, 1))),
    Mistake("size_of_one_axis", "adaptive_avg_pool2d", (X, (1,))),
    Mistake("size_float", "adaptive_avg_pool2d", (X, 1.5)),
    Mistake("size_floats", "adaptive_avg_pool2d", (X, (1.0, 1.0))),
    Mistake("size_none", "adaptive_avg_pool2d", (X, None)),
    Mistake("input_array_adaptive", "adaptive_avg_pool2d", (np.ones((2, 4, 8, 8)), 2)),
]  # fmt: skip
M, V = torch.zeros(4), torch.ones(4)
NORM = [
    Mistake("one_value", "batch_norm", (X[:1, :, :1, :1], M, V), {"training": True}),
    Mistake("one_value_two_dims", "batch_norm", (X[:1, :, 0, 0], M, V), {"training": True}),
    Mistake("dimensions", "batch_norm", (M, M, V), {"training": True}),
    Mistake("dimensions_eval", "batch_norm", (M[0], M, V)),
    Mistake("no_statistics", "batch_norm", (X, None, None)),
    Mistake("no_variance", "batch_norm", (X, M, None)),
    Mistake("no_mean", "batch_norm", (X, None, V)),
    Mistake("mean_alone", "batch_norm", (X, M, None), {"training": True}),
    Mistake("variance_alone", "batch_norm", (X, None, V), {"training": True}),
    Mistake("mean_length", "batch_norm", (X, M[:3], V)),
    Mistake("variance_length", "batch_norm", (X, M, V[:3]), {"training": True}),
    Mistake("mean_dimensions", "batch_norm", (X, M[None], V[None]), {"training": True}),
    Mistake("weight_length", "batch_norm", (X, M, V, V[:3], V), {"training": True}),
    Mistake("bias_length", "batch_norm", (X, M, V, V, V[:3])),
    Mistake("statistics_with_gradient", "batch_norm", (X, M.clone().requires_grad_(), V)),
    Mistake("statistics_dtype", "batch_norm", (X, M.double(), V.double()), {"training": True}),
    Mistake("weight_dtype", "batch_norm", (X, M, V, V.half(), V.half()), {"training": True}),
    Mistake("bias_dtype", "batch_norm", (X, M, V, V, V.double())),
    Mistake("input_dtype", "batch_norm", (X.double(), M, V), {"training": True}),
    Mistake("half_bias_beside_float_weight", "batch_norm", (X.half(), M, V, V, V.half())),
    Mistake("half_statistics_beside_float_weight", "batch_norm", (X.half(), M.half(), V.half(), V, V)),
    Mistake("eps_0", "batch_norm", (X, M, V), {"training": True, "eps": 0.0}),
    Mistake("eps_negative", "batch_norm", (X, M, V), {"training": True, "eps": -1e-5}),
    Mistake("momentum_none", "batch_norm", (X, M, V), {"training": True, "momentum": None}),
    Mistake("momentum_text", "batch_norm", (X, M, V), {"momentum": "0.1"}),
    Mistake("training_int", "batch_norm", (X, M, V), {"training": 1}),
    Mistake("input_array", "batch_norm", (np.ones((2, 4, 8, 8)), M, V)),
    Mistake("weight_list", "batch_norm", (X, M, V, [1.0] * 4)),
]  # fmt: skip


def _sized(dims: int) -> tuple[Tensor, Tensor]:
    """An input ``2 4 5 …`` and a weight ``4 4 3 …`` of so many axes: for both directions of convolution."""
    return torch.ones(2, 4, *(5,) * dims), torch.ones(4, 4, *(3,) * dims)


def _of_every_dimension() -> Iterator[Mistake]:
    """What 1-D, 2-D and 3-D have in common. In float64: float32 goes to oneDNN, which has ways of its own."""
    for dims in (1, 2, 3):
        x, w = (t.double() for t in _sized(dims))
        other, _ = _sized(dims % 3 + 1)
        long = (1,) * (dims + 1)
        for function in (f"conv{dims}d", f"conv_transpose{dims}d"):
            yield Mistake("input_dimensions", function, (torch.ones(4, 5).double()[0], w))
            yield Mistake("other_dimensions", function, (other.double(), w))
            yield Mistake("weight_dimensions", function, (x, w[..., 0]))
            yield Mistake("channels", function, (x[:, :3], w))
            yield Mistake("bias_length", function, (x, w, torch.ones(3).double()))
            yield Mistake("weight_dtype", function, (x, w.float()))
            yield Mistake("stride_0", function, (x, w), {"stride": 0})
            yield Mistake("stride_too_long", function, (x, w), {"stride": long})
            yield Mistake("stride_float", function, (x, w), {"stride": 1.5})
            yield Mistake("padding_negative", function, (x, w), {"padding": -1})
            yield Mistake("padding_too_long", function, (x, w), {"padding": long})
            yield Mistake("dilation_0", function, (x, w), {"dilation": 0})
            yield Mistake("groups_0", function, (x, w), {"groups": 0})
            yield Mistake("groups_do_not_divide", function, (x, w), {"groups": 3})
            yield Mistake("empty_plane", function, (x[..., :0], w))
            yield Mistake("input_array", function, (x.numpy(), w))
        function = f"conv_transpose{dims}d"
        yield Mistake("padding_text", function, (x, w), {"padding": "same"})
        yield Mistake("nothing_left", function, (x, w), {"padding": 4})
        yield Mistake("output_padding_of_stride", function, (x, w), {"output_padding": 1})
        yield Mistake(
            "output_padding_negative", function, (x, w), {"output_padding": -1, "stride": 2}
        )
        yield Mistake("output_padding_too_long", function, (x, w), {"output_padding": long})
        yield Mistake("output_padding_float", function, (x, w), {"output_padding": 0.5})
        for function, first in (
            (f"max_pool{dims}d", 2), (f"avg_pool{dims}d", 2), (f"lp_pool{dims}d", 2.0),
            (f"adaptive_max_pool{dims}d", 2), (f"adaptive_avg_pool{dims}d", 2),
        ):  # fmt: skip
            rest = (first, 2) if function.startswith("lp") else (first,)
            yield Mistake("too_many_dimensions", function, (x[None, None], *rest))
            yield Mistake("empty_plane", function, (x[..., :0], *rest))
            yield Mistake("size_float", function, (x, *rest[:-1], 1.5))
            yield Mistake("size_too_long", function, (x, *rest[:-1], (1,) * (dims + 1)))
            yield Mistake("input_array", function, (x.numpy(), *rest))
        for function in (f"max_pool{dims}d", f"avg_pool{dims}d"):
            yield Mistake("kernel_0", function, (x, 0))
            yield Mistake("kernel_beyond_input", function, (x, 6))
            yield Mistake("stride_0", function, (x, 2, 0))
            yield Mistake("padding_beyond_half", function, (x, 3, 2, 2))
            yield Mistake("padding_negative", function, (x, 2, 2, -1))
        for function in (f"adaptive_max_pool{dims}d", f"adaptive_avg_pool{dims}d"):
            yield Mistake("size_negative", function, (x, -1))
            yield Mistake("size_none", function, (x, None))
        function, places = f"max_unpool{dims}d", torch.zeros(x.shape, dtype=torch.int64)
        yield Mistake("indices_dtype", function, (x, places.int(), 2))
        yield Mistake("indices_size", function, (x, places[:1], 2))
        yield Mistake("indices_beyond", function, (x, places + 10**dims, 2))
        yield Mistake("indices_negative", function, (x, places - 1, 2))
        yield Mistake("output_size", function, (x, places, 2, 2, 0, (3,) * dims))
        yield Mistake("output_size_long", function, (x, places, 2, 2, 0, (10,) * (dims + 3)))
        yield Mistake("kernel_float", function, (x, places, 1.5))


GROUPS = [
    Mistake("channels", "group_norm", (X, 3)),
    Mistake("no_groups", "group_norm", (X, 0)),
    Mistake("dimensions", "group_norm", (M, 1)),
    Mistake("weight_length", "group_norm", (X, 2, M[:3])),
    Mistake("bias_length", "group_norm", (X, 2, M, M[:2])),
    Mistake("one_value", "group_norm", (X[:1, :, :1, :1], 4)),
    Mistake("groups_float", "group_norm", (X, 2.0)),
    Mistake("eps_text", "group_norm", (X, 2), {"eps": "small"}),
    Mistake("no_shape", "layer_norm", (X, ())),
    Mistake("shape", "layer_norm", (X, (8, 4))),
    Mistake("shape_too_long", "layer_norm", (V, (1, 4))),
    Mistake("shape_int", "layer_norm", (X, 8)),
    Mistake("weight_size", "layer_norm", (X, (8, 8), V)),
    Mistake("bias_size", "layer_norm", (X, (8,), None, V)),
    Mistake("one_value", "instance_norm", (X[..., :1, :1],)),
    Mistake("mean_length", "instance_norm", (X, M[:3], V)),
    Mistake("weight_length", "instance_norm", (X, None, None, V[:3])),
    Mistake("no_statistics", "instance_norm", (X, None, None), {"use_input_stats": False}),
]  # fmt: skip
EVERY = list(_of_every_dimension())
MISTAKES = [
    pytest.param(m, id=f"{m.function}-{m.id}") for m in (*CONV, *POOL, *NORM, *GROUPS, *EVERY)
]


def _fresh(value: Any, device: str) -> Any:
    """A copy, so that no call can spoil the next one's arguments."""
    if not isinstance(value, Tensor):
        return value
    return value.detach().to(device, copy=True).requires_grad_(value.requires_grad)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(mistake: Mistake, engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The type is torch's or a subclass of it; no kernel is chosen and no argument written."""
    with pytest.raises(Exception) as theirs:  # noqa: PT011
        getattr(F, mistake.function)(*mistake.args, **mistake.kwargs)
    chosen: list[str] = []
    choose = registry.choose

    def record(op: str, *rest: Any) -> Callable[..., None]:
        chosen.append(op)
        return choose(op, *rest)

    monkeypatch.setattr(registry, "choose", record)
    args = [_fresh(value, device_of(engine)) for value in mistake.args]
    before = [_fresh(value, device_of(engine)) for value in args]
    expected = mistake.error or theirs.type
    if expected is AttributeError:  # what torch's Python does with something that is no tensor
        expected = TypeError
    with cnnops.engine(engine), pytest.raises(expected, match="expected .*got") as ours:
        getattr(C, mistake.function)(*args, **mistake.kwargs)
    assert mistake.error is None or not issubclass(ours.type, theirs.type)
    assert not chosen
    for a, b in zip(args, before, strict=True):
        assert not isinstance(a, Tensor) or torch.equal(a, b)


@pytest.mark.parametrize(
    "change, error",
    [
        ({"activation": "swish"}, ValueError),
        ({"activation": None}, ValueError),
        ({"residual": X[:1]}, RuntimeError),
        ({"residual": X.double()}, RuntimeError),
        ({"residual": [1.0]}, TypeError),
    ],
)
def test_mistakes_of_the_fused_form(change: dict[str, Any], error: type[Exception]) -> None:
    mean, var = M.clone(), V.clone()
    with pytest.raises(error, match="expected .*got"):
        C.batch_norm_act(X, mean, var, training=True, **change)
    assert torch.equal(mean, M) and torch.equal(var, V)


def test_a_device_that_does_not_fit() -> None:
    with pytest.raises(
        RuntimeError, match="weight: expected a tensor on cpu, as the input, got meta"
    ):
        C.conv2d(X, W.to("meta"))
    with pytest.raises(RuntimeError, match="running_mean: expected a tensor on cpu"):
        C.batch_norm(X, M.to("meta"), V, training=True)


def test_failure_inside_of_a_network_keeps_earlier_layers_gradients() -> None:
    """An error in a later layer leaves nothing behind that a correct second try would trip over."""
    w = W.clone().requires_grad_()
    y = C.conv2d(X, w)
    with pytest.raises(RuntimeError):
        C.conv2d(y, W)
    C.max_pool2d(y, 2).sum().backward()
    assert w.grad is not None and w.grad.shape == w.shape

"""Batch norm with running statistics as part of the layer before it:

    γ·(conv(x, w) + b - μ)/sqrt(σ² + ε) + β  =  conv(x, s·w) + β + s·(b - μ),    s = γ/sqrt(σ² + ε)

s goes into the weights and not into the epilogue's scale. Products are formed in float64 and rounded once, so
that weights of a half type carry one rounding error each, which average out in a sum; a scale of a half type
would be off by the same relative error for a whole channel. And without a scale the layer's gradients need no
more than convolution's own. What a scale is for are channels whose folded weights would leave the range of
float16: they are kept near 1, and the power of two that was taken out, which is exact, is the scale.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import Module

import cnnops.nn
from cnnops.fusion.kinds import attributes, layer_kind
from cnnops.fusion.patterns import NORMS
from cnnops.fusion.tracing import altered
from cnnops.nn.conv_act import FoldedLinear
from cnnops.ops import DTYPES

CONVOLUTIONS: dict[type[Module], type[Module]] = {
    getattr(of, f"{name}{d}d"): getattr(cnnops.nn, f"{name}Act{d}d")
    for of in (nn, cnnops.nn)
    for name in ("Conv", "ConvTranspose")
    for d in (1, 2, 3)
}
"""Layers that take an epilogue -> those with one."""
_OF_EPILOGUES = {"activation", "adds_in_place", "norm_folded", "fused", "scale"}
"""Attributes that these have beside those of the layer."""


class Folded(NamedTuple):
    """Weights with batch norm in them. `scale`: None, or what the sums have to be multiplied by."""

    weight: Tensor
    bias: Tensor
    scale: Tensor | None


def refusal(layer: Any, norm: Any) -> str:
    """Why `norm` cannot become part of `layer`, whose result it takes; "" where it can."""
    transposed = isinstance(layer, nn.modules.conv._ConvTransposeNd)
    linear = isinstance(layer, nn.Linear)
    channels = layer.out_features if linear else layer.out_channels
    dims, of = NORMS[layer_kind(norm)], 1 if linear else layer.weight.dim() - 2
    if altered(norm):
        return altered(norm)
    if norm.training:
        return "is in training mode"
    if norm.running_mean is None or norm.running_var is None:
        return "has no running statistics"
    if dims not in (None, of) or norm.num_features != channels:
        return f"is no batch norm over the {channels} channels of its input"
    if transposed and layer.padding_mode != "zeros":
        return f"follows a transposed convolution of padding mode {layer.padding_mode}"
    tensors = [
        t for t in (norm.weight, norm.bias, norm.running_mean, norm.running_var) if t is not None
    ]
    half = layer.weight.dtype.itemsize == 2
    for t in tensors:
        if t.dtype != layer.weight.dtype and not (half and t.dtype == torch.float32):
            return f"is {t.dtype} behind a layer of {layer.weight.dtype}"
        if t.device != layer.weight.device:
            return f"is on {t.device} behind a layer on {layer.weight.device}"
    return ""


def layer_refusal(layer: Any) -> str:
    """Why nothing can become part of `layer`; "" where something can."""
    if altered(layer):
        return altered(layer)
    tensors = [t for t in (layer.weight, layer.bias) if t is not None]
    taken = attributes(layer) & ({"fused"} if isinstance(layer, nn.Linear) else _OF_EPILOGUES)
    if taken:
        return f"has an attribute {min(taken)} of its own"
    if layer.weight.dtype not in DTYPES or any(t.dtype != layer.weight.dtype for t in tensors):
        return f"has parameters of {', '.join(sorted({str(t.dtype) for t in tensors}))}"
    return ""


def folded(layer: Any, norm: Any) -> Folded:
    """The parameters of `layer` with `norm` in them, as new tensors."""
    w = layer.weight.detach()
    wide = [
        None if t is None else t.detach().double()
        for t in (norm.running_mean, norm.running_var, norm.weight, norm.bias, layer.bias)
    ]
    mean, var, gamma, beta, bias = wide
    assert mean is not None and var is not None
    s = torch.rsqrt(var + norm.eps)
    s = s if gamma is None else s * gamma
    shift = -mean if bias is None else bias - mean
    new_bias = s * shift if beta is None else s * shift + beta
    # The channels of the result are the first axis of w, of a transposed convolution the second, by groups.
    product = w.double()
    if isinstance(layer, nn.modules.conv._ConvTransposeNd):
        g = layer.groups
        groups = product.view(g, w.shape[0] // g, *w.shape[1:])
        factors = s.view(g, 1, -1, *(1,) * (w.dim() - 2))
        product, sums = groups * factors, [1, *range(3, w.dim() + 1)]
    else:
        product, sums = product * s.view(-1, *(1,) * (w.dim() - 1)), list(range(1, w.dim()))
    scale = None
    if w.dtype == torch.float16 and product.numel():
        peak = product.abs().amax(sums, keepdim=True)
        # Beyond 2^15 there is no room for rounding up, and below 2^-14 smaller weights lose digits.
        outside = ((peak > 2.0**15) | (peak < 2.0**-14)) & (peak > 0) & peak.isfinite()
        if bool(outside.any()):
            exponent = torch.where(outside, peak.log2().floor().clamp(-24, 15), 0)
            factor = torch.exp2(exponent)
            product, scale = product / factor, factor.flatten().to(w.dtype)
    form = torch.preserve_format
    weight = torch.empty_like(w, memory_format=form).copy_(product.reshape(w.shape))
    return Folded(weight, new_bias.to(w.dtype), scale)


def with_epilogue(layer: Any, norm: Any, activation: str, in_place: bool) -> Module:
    """`layer`, a convolution, with `norm` (or None) folded into it and an activation; its parameters are new
    tensors where there is a norm, else those of `layer`.
    """
    new = _like(layer, CONVOLUTIONS[layer_kind(layer)])
    new.activation, new.adds_in_place, new.norm_folded = activation, in_place, norm is not None
    new.fused = ()
    new.register_buffer("scale", None)
    if norm is not None:
        parameters = folded(layer, norm)
        _set(new, layer, parameters)
        new.scale = parameters.scale
    return new  # type: ignore[no-any-return]


def linear_with(layer: Any, norm: Any) -> Module:
    """`layer`, a dense one, with `norm` folded into it."""
    new = _like(layer, FoldedLinear)
    _set(new, layer, folded(layer, norm))
    return new  # type: ignore[no-any-return]


def norm_with(norm: Any, kind: type[Module], activation: str) -> Module:
    """`norm` with an activation, on the same parameters and statistics."""
    new = _like(norm, kind)
    new.activation = activation
    return new  # type: ignore[no-any-return]


def _like(module: Module, kind: type[Module]) -> Any:
    """A `kind` with the attributes, parameters and buffers of `module`; what is set there stays there."""
    new: Any = kind.__new__(kind)
    attributes = {k: v.copy() if isinstance(v, dict) else v for k, v in vars(module).items()}
    attributes.pop("_compiled_call_impl", None)  # would go on calling `module`
    new.__dict__ = attributes
    return new


def _set(new: Any, layer: Any, parameters: Folded) -> None:
    grad = layer.weight.requires_grad
    new.weight = nn.Parameter(parameters.weight, requires_grad=grad)
    new.bias = nn.Parameter(parameters.bias, requires_grad=grad)

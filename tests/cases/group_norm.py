"""Group, instance and layer norm: the rows, and what torch makes of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import cnnops.functional as C
from cases.base import ALL, FLOAT32, Case, Size, laid_out, moved, normal
from cases.norm import ACTIVATIONS


@dataclass(frozen=True, kw_only=True)
class _AffineCase(Case):
    """`affine` names the parameters that are there; `half_parameters`: in half types they are half too
    instead of float32. `spread` and `shift` are the input's.
    """

    affine: tuple[str, ...] = ("weight", "bias")
    eps: float = 1e-5
    half_parameters: bool = False
    spread: float = 1.0
    shift: float = 0.5

    @property
    def parameters(self) -> Size:
        raise NotImplementedError

    def tensors(self, dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
        half = dtype in (torch.float16, torch.bfloat16)
        of_parameters = torch.float32 if half and not self.half_parameters else dtype
        x = laid_out(self.x, self.layout, lambda size: self._scaled(size).to(dtype))
        found = [x]
        if "weight" in self.affine:
            weight = 1 + normal(2, torch.float64)(self.parameters) / 4
            found.append(weight.to(of_parameters))
        if "bias" in self.affine:
            found.append(normal(3, of_parameters)(self.parameters))
        return [moved(t, device) for t in found]

    def _scaled(self, size: Size) -> Tensor:
        return normal(1, torch.float64)(size) * self.spread + self.shift

    def _split(self, rest: Sequence[Tensor]) -> tuple[Tensor | None, Tensor | None]:
        named = dict(zip(self.affine, rest, strict=True))
        return named.get("weight"), named.get("bias")


@dataclass(frozen=True, kw_only=True)
class GroupNormCase(_AffineCase):
    """Group norm with an activation; `instance`: through instance norm, whose groups are the channels."""

    groups: int = 2
    activation: str = "none"
    instance: bool = False

    @property
    def parameters(self) -> Size:
        return self.x[1:2]

    def ours(self, x: Tensor, *rest: Tensor) -> Tensor:
        weight, bias = self._split(rest)
        if self.instance:
            return C.instance_norm(x, None, None, weight, bias, eps=self.eps)
        return C.group_norm_act(x, self.groups, weight, bias, self.eps, self.activation)

    def theirs(self, x: Tensor, *rest: Tensor) -> Tensor:
        weight, bias = self._split(rest)
        if self.instance:
            return F.instance_norm(x, None, None, weight, bias, eps=self.eps)
        if weight is None and bias is not None:  # PyTorch has no gradient of that
            weight = torch.ones_like(bias)
        z = F.group_norm(x, self.groups, weight, bias, self.eps)
        return ACTIVATIONS[self.activation](z)


@dataclass(frozen=True, kw_only=True)
class LayerNormCase(_AffineCase):
    """Layer norm over the last `axes` axes."""

    axes: int = 1

    @property
    def parameters(self) -> Size:
        return self.x[len(self.x) - self.axes :]

    def ours(self, x: Tensor, *rest: Tensor) -> Tensor:
        return C.layer_norm(x, self.parameters, *self._split(rest), self.eps)

    def theirs(self, x: Tensor, *rest: Tensor) -> Tensor:
        return F.layer_norm(x, self.parameters, *self._split(rest), self.eps)


_LARGE_MEAN = {"shift": 100.0, "spread": 0.01, "eps": 1e-8, "aten_limit": 2e-2}

GROUP_NORM_CASES = (
    GroupNormCase("group", (3, 6, 5, 7), "the usual one", dtypes=ALL, schedules=True),
    GroupNormCase("one_group", (3, 6, 5, 7), "a layer norm with parameters per channel", groups=1),
    GroupNormCase("a_group_each", (3, 6, 5, 7), "an instance norm", groups=6, dtypes=ALL),
    GroupNormCase("instance", (3, 6, 5, 7), "instance norm itself", instance=True, dtypes=ALL),
    GroupNormCase("instance_channels_last", (3, 6, 5, 7), "its result is contiguous nevertheless",
        instance=True, layout="channels_last"),
    *(
        GroupNormCase(f"group_{activation}", (2, 6, 5, 4), "activation in the same pass",
            activation=activation, groups=3, schedules=activation == "relu",
            dtypes=ALL if activation in ("relu", "gelu") else FLOAT32)
        for activation in ACTIVATIONS if activation != "none"
    ),
    *(
        GroupNormCase(f"channels_last_{activation}", (2, 6, 5, 4), "activation in the same pass",
            activation=activation, groups=3, layout="channels_last",
            dtypes=ALL if activation == "relu" else FLOAT32)
        for activation in ACTIVATIONS if activation != "none"
    ),
    GroupNormCase("plain", (3, 6, 5, 4), "no weight, no bias", affine=(), dtypes=ALL),
    GroupNormCase("plain_silu", (3, 6, 5, 4), "activation of xhat", affine=(), activation="silu"),
    GroupNormCase("weight_only", (3, 6, 5, 4), "no bias, as PyTorch's layers offer",
        affine=("weight",), activation="relu", dtypes=ALL),
    GroupNormCase("bias_only", (3, 6, 5, 4), "no weight, which the functions allow",
        affine=("bias",), dtypes=ALL),
    GroupNormCase("half_parameters", (3, 6, 5, 7), "all tensors of the half type",
        half_parameters=True, activation="relu", dtypes=ALL),
    GroupNormCase("group_large_eps", (3, 6, 4, 4), "eps of the variance's order", eps=0.5),
    GroupNormCase("group_large_mean", (3, 6, 8, 8),
        "mean 100, deviation 0.01: E[x²] - E[x]² would be noise", **_LARGE_MEAN),
    GroupNormCase("channels_last_large_mean", (3, 6, 8, 8),
        "the same, channels innermost, where PyTorch's result is noise indeed",
        layout="channels_last", **_LARGE_MEAN | {"aten_limit": math.inf}),
    GroupNormCase("two_dims_large_mean", (3, 48), "the same, in rows", **_LARGE_MEAN),
    GroupNormCase("group_constant", (3, 4, 4, 5), "variance 0: rstd is 1/sqrt(eps)",
        spread=0.0, aten_limit=1e-4),
    GroupNormCase("group_two_dims", (9, 12), "N x C: rows of channels", groups=3,
        activation="relu", dtypes=ALL),
    GroupNormCase("two_values", (9, 8), "the fewest values that have a variance", groups=4, eps=0.1),
    GroupNormCase("group_three_dims", (3, 6, 11), "N x C x L", dtypes=ALL),
    GroupNormCase("group_five_dims", (2, 6, 4, 3, 5), "N x C x D x H x W", groups=3),
    GroupNormCase("group_channels_last_3d", (2, 6, 4, 3, 5), "channels innermost of three axes",
        groups=3, layout="channels_last", dtypes=ALL),
    GroupNormCase("six_dims", (2, 4, 2, 3, 2, 3), "more axes than convolutions have"),
    GroupNormCase("group_one_image", (1, 12, 9, 9), "a batch of one", groups=4),
    GroupNormCase("many_channels", (2, 96, 3, 5), "32 groups, as in diffusion models", groups=32),
    GroupNormCase("groups_of_33", (2, 66, 5, 7), "odd groups, odd planes"),
    GroupNormCase("group_long_plane", (2, 4, 67, 65), "groups of several blocks", schedules=True),
    GroupNormCase("group_held", (1, 16, 30, 24), "groups that do not fit in the registers of a block",
        activation="silu", dtypes=ALL),
    GroupNormCase("group_held_odd", (1, 10, 29, 27), "the same, in planes of no whole packs", dtypes=ALL),
    GroupNormCase("group_held_channels_last", (1, 16, 26, 21), "the same, channels innermost",
        layout="channels_last", activation="relu", dtypes=ALL),
    GroupNormCase("group_held_offset", (1, 12, 28, 28), "the same, off alignment",
        layout="offset", dtypes=(torch.float32, torch.bfloat16)),
    GroupNormCase("group_many_images", (70, 6, 3, 3), "many short groups", groups=3),
    GroupNormCase("group_many_rows", (300, 24), "N x C: rows in several tasks", groups=4),
    GroupNormCase("group_channels_last", (3, 8, 6, 5), "channels innermost",
        layout="channels_last", dtypes=ALL, schedules=True),
    GroupNormCase("channels_last_one_group", (3, 8, 6, 5), "all channels in one group",
        layout="channels_last", groups=1),
    GroupNormCase("channels_last_each", (3, 8, 6, 5), "a channel is a group",
        layout="channels_last", groups=8, dtypes=ALL),
    GroupNormCase("channels_last_wide", (2, 192, 4, 3), "more channels than are done side by side",
        layout="channels_last", groups=32),
    GroupNormCase("channels_last_groups_of_33", (2, 66, 7, 5), "odd groups innermost",
        layout="channels_last"),
    GroupNormCase("group_channels_last_long", (2, 6, 33, 31), "channels-last, many blocks",
        layout="channels_last", schedules=True),
    GroupNormCase("group_mixed_gradient", (3, 8, 6, 5), "channels-last, its gradient contiguous",
        layout="channels_last", grad="contiguous", activation="relu"),
    GroupNormCase("group_sliced", (3, 4, 6, 5), "every second channel of a wider image",
        layout="sliced", activation="relu", dtypes=ALL),
    GroupNormCase("group_transposed", (3, 4, 6, 5), "columns and rows swapped in memory",
        layout="transposed"),
    GroupNormCase("two_dims_transposed", (6, 8), "channels with the batch innermost",
        layout="transposed"),
    GroupNormCase("group_expanded", (3, 4, 6, 5), "one image as a whole batch", layout="expanded"),
    GroupNormCase("group_expanded_gradient", (3, 4, 6, 8), "the gradient of a sum", grad="expanded"),
    GroupNormCase("group_offset", (3, 4, 8, 8), "starts off alignment",
        layout="offset", activation="relu", dtypes=ALL),
    GroupNormCase("group_offset_channels_last", (3, 8, 6, 5), "channels-last off alignment",
        layout="channels_last_offset", dtypes=ALL),
    GroupNormCase("group_empty_batch", (0, 4, 4, 4), "no image: gradients are zeros",
        activation="relu"),
    GroupNormCase("empty_planes", (2, 4, 0, 4), "no place: gradients are zeros"),
)  # fmt: skip

LAYER_NORM_CASES = (
    LayerNormCase("layer", (4, 5, 24), "the usual one: over the last axis", dtypes=ALL, schedules=True),
    LayerNormCase("layer_two_axes", (3, 4, 5, 6), "rows of two axes", axes=2, dtypes=ALL),
    LayerNormCase("layer_image", (3, 4, 5, 6), "over channels and places", axes=3),
    LayerNormCase("layer_all", (5, 7), "a single row", axes=2),
    LayerNormCase("layer_one_dim", (13,), "a row without a batch"),
    LayerNormCase("layer_plain", (4, 5, 24), "no weight, no bias", affine=(), dtypes=ALL),
    LayerNormCase("layer_weight_only", (4, 5, 24), "bias=False, as in LLMs",
        affine=("weight",), dtypes=ALL),
    LayerNormCase("layer_bias_only", (4, 5, 24), "no weight, which the function allows",
        affine=("bias",), dtypes=ALL),
    LayerNormCase("layer_half_parameters", (4, 5, 24), "all tensors of the half type",
        half_parameters=True, dtypes=ALL),
    LayerNormCase("layer_odd", (7, 33), "odd rows", dtypes=ALL),
    LayerNormCase("layer_two_values", (7, 2), "the fewest values that have a variance", eps=0.1),
    LayerNormCase("layer_large_eps", (6, 24), "eps of the variance's order", eps=0.5),
    LayerNormCase("layer_large_mean", (6, 96), "mean 100, deviation 0.01: E[x²] - E[x]² would be noise",
        **_LARGE_MEAN),
    LayerNormCase("layer_constant", (6, 24), "variance 0", spread=0.0, aten_limit=1e-4),
    LayerNormCase("layer_many_rows", (1500, 16), "rows in several blocks", schedules=True),
    LayerNormCase("layer_long", (3, 2, 2500), "rows of several blocks", dtypes=ALL, schedules=True),
    LayerNormCase("layer_longer", (40, 5003), "so long that gradients of parameters are made apart",
        dtypes=(torch.float32, torch.float64)),
    LayerNormCase("layer_longest", (2, 9001), "rows that fit in a block forward only", dtypes=ALL),
    LayerNormCase("layer_longer_large_mean", (3, 5003), "the same, far from zero", **_LARGE_MEAN),
    LayerNormCase("layer_of_channels_last", (3, 8, 6, 5), "over the last axis of a channels-last image",
        layout="channels_last", dtypes=ALL),
    LayerNormCase("layer_transposed", (3, 24, 16), "rows with others in between", layout="transposed"),
    LayerNormCase("layer_sliced", (3, 4, 6, 5), "rows of a wider image", layout="sliced", axes=2),
    LayerNormCase("layer_expanded", (3, 4, 24), "rows that share memory", layout="expanded"),
    LayerNormCase("layer_expanded_gradient", (3, 4, 24), "the gradient of a sum", grad="expanded"),
    LayerNormCase("layer_offset", (3, 4, 24), "starts off alignment", layout="offset", dtypes=ALL),
    LayerNormCase("layer_empty_batch", (0, 4, 24), "no row: gradients are zeros"),
)  # fmt: skip

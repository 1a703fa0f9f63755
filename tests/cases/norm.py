"""Normalisation: the rows, and what torch makes of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import cnnops.functional as C
from cases.base import ALL, FLOAT32, Case, Size, laid_out, moved, normal


@dataclass(frozen=True, kw_only=True)
class NormCase(Case):
    """Batch norm, with `spread` and `shift` of the input; `mode` is train or eval.

    `half_parameters`: in half types, per-channel tensors are half too instead of float32.
    """

    mode: str = "train"
    affine: bool = True
    track: bool = True
    momentum: float = 0.1
    eps: float = 1e-5
    residual: bool = False
    activation: str = "none"
    half_parameters: bool = False
    spread: float = 1.0
    shift: float = 0.5

    @property
    def training(self) -> bool:
        return self.mode == "train"

    def tensors(self, dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
        half = dtype in (torch.float16, torch.bfloat16)
        per_channel = torch.float32 if half and not self.half_parameters else dtype
        x = laid_out(self.x, self.layout, lambda size: self._scaled(size).to(dtype))
        found = [x]
        if self.affine:
            found.append((1 + normal(2, torch.float64)(self.x[1:2]) / 4).to(per_channel))
            found.append(normal(3, per_channel)(self.x[1:2]))
        if self.residual:
            found.append(laid_out(self.x, self.layout, normal(4, dtype)))
        return [moved(t, device) for t in found]

    def _scaled(self, size: Size) -> Tensor:
        return normal(1, torch.float64)(size) * self.spread + self.shift

    def statistics(self, like: Tensor) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """Running mean and variance, of the dtype that goes with input `like`, the same at every call."""
        if self.training and not self.track:
            return None, None
        half = like.dtype in (torch.float16, torch.bfloat16)
        dtype = torch.float32 if half and not self.half_parameters else like.dtype
        # Rounded to the coarsest type: the float64 reference starts from the same numbers.
        mean, noise = (normal(seed, torch.bfloat16)(self.x[1:2]).to(dtype) for seed in (5, 6))
        return mean.to(like.device), (noise.abs() + 0.5).to(like.device)

    def _split(self, rest: Sequence[Tensor]) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        tensors = list(rest)
        weight, bias = (tensors.pop(0), tensors.pop(0)) if self.affine else (None, None)
        return weight, bias, tensors.pop(0) if self.residual else None

    def ours(self, x: Tensor, *rest: Tensor, statistics: Any = None) -> Tensor:
        weight, bias, residual = self._split(rest)
        mean, var = statistics or self.statistics(x)
        return C.batch_norm_act(
            x,
            mean,
            var,
            weight,
            bias,
            self.training,
            self.momentum,
            self.eps,
            residual,
            self.activation,
        )

    def theirs(self, x: Tensor, *rest: Tensor, statistics: Any = None) -> Tensor:
        weight, bias, residual = self._split(rest)
        mean, var = statistics or self.statistics(x)
        z = F.batch_norm(x, mean, var, weight, bias, self.training, self.momentum, self.eps)
        return ACTIVATIONS[self.activation](z if residual is None else z + residual)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda z: z,
    "relu": F.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "gelu": F.gelu,
    "hardswish": F.hardswish,
    "leaky_relu": F.leaky_relu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}


def _activations() -> Iterable[NormCase]:
    for activation in ACTIVATIONS:
        for mode in ("train", "eval"):
            yield NormCase(
                f"{mode}_residual_{activation}",
                (2, 3, 6, 5),
                "residual and activation in the same pass",
                mode=mode,
                residual=True,
                activation=activation,
                # Most have the backward told y, rounded to the type, in place of the residual.
                dtypes=FLOAT32 if activation in ("silu", "hardswish") else ALL,
                schedules=activation in ("relu", "tanh"),
            )


NORM_CASES = (
    NormCase("train", (4, 3, 6, 5), "the usual one", dtypes=ALL, schedules=True),
    NormCase("eval", (4, 3, 6, 5), "with running statistics",
        mode="eval", dtypes=ALL, schedules=True),
    *_activations(),
    NormCase("train_relu", (3, 5, 4, 7), "activation without residual", activation="relu"),
    NormCase("eval_relu", (3, 5, 4, 7), "activation without residual",
        activation="relu", mode="eval"),
    NormCase("train_plain", (4, 3, 6, 5), "no weight, no bias",
        affine=False, activation="silu", residual=True),
    NormCase("eval_plain", (4, 3, 6, 5), "no weight, no bias",
        affine=False, mode="eval", dtypes=ALL),
    NormCase("untracked", (4, 3, 6, 5), "no running statistics at all", track=False),
    NormCase("half_parameters", (4, 3, 6, 5), "all tensors of the half type",
        half_parameters=True, activation="relu", dtypes=ALL),
    NormCase("eval_half_parameters", (4, 3, 6, 5), "all tensors of the half type",
        half_parameters=True, mode="eval", dtypes=ALL),
    NormCase("momentum_0", (3, 3, 4, 4), "running statistics stay", momentum=0.0),
    NormCase("momentum_1", (3, 3, 4, 4), "running statistics become the batch's", momentum=1.0),
    NormCase("large_eps", (3, 3, 4, 4), "eps of the variance's order", eps=0.5),
    NormCase("large_mean", (4, 3, 8, 8), "mean 100, deviation 0.01: E[x²] - E[x]² would be noise",
        shift=100.0, spread=0.01, eps=1e-8, aten_limit=1e-3),
    NormCase("constant", (3, 3, 4, 5), "variance 0: rstd is 1/sqrt(eps)", spread=0.0, aten_limit=1e-4),
    NormCase("two_values", (2, 3, 1, 1), "the fewest values that have a variance",
        eps=0.1),
    NormCase("two_dims", (9, 5), "N x D, behind a dense layer", residual=True, activation="relu"),
    NormCase("three_dims", (3, 5, 11), "N x C x L", dtypes=ALL),
    NormCase("five_dims", (2, 3, 4, 3, 5), "N x C x D x H x W"),
    NormCase("channels_last_3d", (2, 8, 4, 3, 5), "N x C x D x H x W, channels innermost",
        layout="channels_last", residual=True, activation="relu", dtypes=ALL, schedules=True),
    NormCase("eval_channels_last_3d", (2, 6, 3, 4, 5), "N x C x D x H x W, channels innermost",
        layout="channels_last", mode="eval", activation="relu"),
    NormCase("sliced_3d", (2, 3, 4, 3, 5), "every second channel, a column less", layout="sliced"),
    NormCase("told_channels_last_long", (4, 6, 33, 31), "y beside x, channels-last, many blocks",
        layout="channels_last", residual=True, activation="sigmoid", schedules=True),
    NormCase("told_plain", (3, 4, 6, 5), "neither weight nor bias, y in place of the residual",
        affine=False, residual=True, activation="leaky_relu"),
    NormCase("told_mixed_gradient", (3, 8, 6, 5), "y channels-last, its gradient contiguous",
        layout="channels_last", grad="contiguous", residual=True, activation="relu6"),
    NormCase("one_channel", (2, 1, 13, 7), "C = 1"),
    NormCase("channels_33", (2, 33, 5, 7), "odd planes, odd channels"),
    NormCase("one_image", (1, 7, 9, 9), "a batch of one"),
    NormCase("long_plane", (2, 2, 67, 65), "planes of several blocks", schedules=True),
    NormCase("many_images", (70, 3, 3, 3), "many short planes"),
    NormCase("channels_last", (3, 8, 6, 5), "channels innermost",
        layout="channels_last", residual=True, activation="relu", dtypes=ALL, schedules=True),
    NormCase("channels_last_33", (2, 33, 7, 5), "odd channels innermost", layout="channels_last"),
    NormCase("eval_channels_last", (3, 8, 6, 5), "channels innermost",
        layout="channels_last", mode="eval", activation="relu", dtypes=ALL),
    NormCase("channels_last_long", (4, 6, 33, 31), "channels-last, many blocks",
        layout="channels_last", schedules=True),
    NormCase("mixed_gradient", (3, 8, 6, 5), "channels-last, its gradient contiguous",
        layout="channels_last", grad="contiguous"),
    NormCase("sliced", (3, 4, 6, 5), "every second channel of a wider image",
        layout="sliced", residual=True, activation="relu"),
    NormCase("eval_sliced", (3, 4, 6, 5), "every second channel of a wider image",
        layout="sliced", mode="eval"),
    NormCase("transposed", (3, 4, 6, 5), "columns and rows swapped in memory", layout="transposed"),
    NormCase("expanded", (3, 4, 6, 5), "one image as a whole batch", layout="expanded"),
    NormCase("expanded_gradient", (3, 4, 6, 8), "the gradient of a sum",
        mode="eval", grad="expanded"),
    NormCase("offset", (3, 4, 8, 8), "starts off alignment",
        layout="offset", residual=True, activation="relu", dtypes=ALL),
    NormCase("offset_channels_last", (3, 8, 6, 5), "channels-last off alignment",
        layout="channels_last_offset"),
    NormCase("cluster", (3, 2, 61, 56), "a channel held by several blocks, the last with fewer sites",
        residual=True, activation="relu", dtypes=ALL, schedules=True),
    NormCase("cluster_channels_last", (4, 24, 23, 19), "channels-last held by several blocks, idle lanes",
        layout="channels_last", residual=True, activation="silu", dtypes=ALL),
    NormCase("cluster_told", (4, 16, 24, 20), "three tensors held in half types",
        layout="channels_last", residual=True, activation="tanh", dtypes=ALL),
    NormCase("cluster_odd", (2, 2, 61, 59), "packs of one value", dtypes=ALL),
    NormCase("cluster_offset", (3, 2, 48, 52), "held by several blocks, off alignment",
        layout="offset", activation="gelu", dtypes=ALL),
    NormCase("split", (2, 1, 310, 250), "two passes: blocks merge the partial results of their channel",
        residual=True, activation="leaky_relu", aten_limit=1e-5),
    NormCase("split_channels_last", (2, 8, 150, 130), "two passes, channels-last",
        layout="channels_last", activation="relu", aten_limit=2e-6, schedules=True),
    NormCase("empty_batch", (0, 3, 4, 4), "no image: gradients are zeros"),
    NormCase("eval_empty_batch", (0, 3, 4, 4), "no image",
        mode="eval", residual=True, activation="relu"),
)  # fmt: skip

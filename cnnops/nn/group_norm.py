"""Layers of normalisation by statistics of each image alone."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from cnnops import functional


class GroupNorm(nn.GroupNorm):
    """``torch.nn.GroupNorm``: input ``N C *``; see `cnnops.functional.group_norm`."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.group_norm(input, self.num_groups, self.weight, self.bias, self.eps)


class LayerNorm(nn.LayerNorm):
    """``torch.nn.LayerNorm``: input ``* normalized_shape``; see `cnnops.functional.layer_norm`."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


def _apply_instance_norm(self: Any, input: Tensor) -> Tensor:
    """What all instance norms of ``torch.nn`` compute by, behind their checks."""
    return functional.instance_norm(
        input, self.running_mean, self.running_var, self.weight, self.bias,
        self.training or not self.track_running_stats,
        0.0 if self.momentum is None else self.momentum, self.eps,
    )  # fmt: skip


class InstanceNorm1d(nn.InstanceNorm1d):
    """``torch.nn.InstanceNorm1d``: input ``N C W`` or ``C W``; see `cnnops.functional.instance_norm`."""

    _apply_instance_norm = _apply_instance_norm


class InstanceNorm2d(nn.InstanceNorm2d):
    """``torch.nn.InstanceNorm2d``: input ``N C H W`` or ``C H W``; see `cnnops.functional.instance_norm`."""

    _apply_instance_norm = _apply_instance_norm


class InstanceNorm3d(nn.InstanceNorm3d):
    """``torch.nn.InstanceNorm3d``: input ``N C D H W`` or ``C D H W``; see
    `cnnops.functional.instance_norm`.
    """

    _apply_instance_norm = _apply_instance_norm


# A lazy layer becomes one of those above when it sees its first input. `forward` is looked up before that,
# but what it calls is looked up after it.


class LazyInstanceNorm1d(nn.LazyInstanceNorm1d):
    """``torch.nn.LazyInstanceNorm1d``, which becomes an `InstanceNorm1d`."""

    cls_to_become = InstanceNorm1d


class LazyInstanceNorm2d(nn.LazyInstanceNorm2d):
    """``torch.nn.LazyInstanceNorm2d``, which becomes an `InstanceNorm2d`."""

    cls_to_become = InstanceNorm2d


class LazyInstanceNorm3d(nn.LazyInstanceNorm3d):
    """``torch.nn.LazyInstanceNorm3d``, which becomes an `InstanceNorm3d`."""

    cls_to_become = InstanceNorm3d

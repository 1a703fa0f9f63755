"""Engine "aten": every operation by PyTorch's own, under the same signatures as the kernels.

It is the reference that kernels are measured against, what runs where no kernel takes a problem, and the way
to cuDNN on a GPU. Max-pooling offsets are converted to and from PyTorch's flat indices, so that a forward in
one engine and its backward in another fit together.
"""

from __future__ import annotations

import torch

from cnnops.aten.conv import conv_bgrad, conv_dgrad, conv_fold, conv_fprop, conv_wgrad
from cnnops.aten.group_norm import (
    group_norm_bwd,
    group_norm_fwd,
    layer_norm_bwd,
    layer_norm_fwd,
)
from cnnops.aten.norm import (
    batch_norm_bwd,
    batch_norm_infer,
    batch_norm_stats,
    batch_norm_train,
)
from cnnops.aten.pool import (
    avg_pool_bwd,
    avg_pool_fwd,
    max_pool_bwd,
    max_pool_fwd,
    max_pool_gather,
    max_unpool_bwd,
    max_unpool_fwd,
)
from cnnops.shapes import Shape

__all__ = [
    "avg_pool_bwd",
    "avg_pool_fwd",
    "batch_norm_bwd",
    "batch_norm_infer",
    "batch_norm_stats",
    "batch_norm_train",
    "conv_bgrad",
    "conv_dgrad",
    "conv_fold",
    "conv_fprop",
    "conv_wgrad",
    "group_norm_bwd",
    "group_norm_fwd",
    "layer_norm_bwd",
    "layer_norm_fwd",
    "max_pool_bwd",
    "max_pool_fwd",
    "max_pool_gather",
    "max_unpool_bwd",
    "max_unpool_fwd",
    "supports",
]


def supports(op: str, shape: Shape, dtype: torch.dtype) -> str | None:
    """Nothing is refused here: what PyTorch cannot do, it says itself."""
    return None

"""``torch.nn.functional``'s names, arguments, defaults and results, computed by the kernels of this package.

Every function takes float32, float64, float16 and bfloat16 tensors of any strides, contiguous or
channels-last, and returns the layout that PyTorch would. Other dtypes go to PyTorch's own function, as does
whatever no kernel of the engine in force takes; `cnnops.fallback` says how loudly. Mistakes raise
PyTorch's exception types with "expected …, got …", before anything is written.
"""

from cnnops.functional.conv import (
    conv1d,
    conv2d,
    conv3d,
    conv_act,
    conv_batch_norm_act,
    conv_transpose1d,
    conv_transpose2d,
    conv_transpose3d,
    conv_transpose_act,
)
from cnnops.functional.group_norm import (
    group_norm,
    group_norm_act,
    instance_norm,
    layer_norm,
)
from cnnops.functional.norm import batch_norm, batch_norm_act
from cnnops.functional.pool import (
    adaptive_avg_pool1d,
    adaptive_avg_pool2d,
    adaptive_avg_pool3d,
    adaptive_max_pool1d,
    adaptive_max_pool2d,
    adaptive_max_pool3d,
    avg_pool1d,
    avg_pool2d,
    avg_pool3d,
    lp_pool1d,
    lp_pool2d,
    lp_pool3d,
    max_pool1d,
    max_pool2d,
    max_pool3d,
    max_unpool1d,
    max_unpool2d,
    max_unpool3d,
)

__all__ = [
    "adaptive_avg_pool1d",
    "adaptive_avg_pool2d",
    "adaptive_avg_pool3d",
    "adaptive_max_pool1d",
    "adaptive_max_pool2d",
    "adaptive_max_pool3d",
    "avg_pool1d",
    "avg_pool2d",
    "avg_pool3d",
    "batch_norm",
    "batch_norm_act",
    "conv1d",
    "conv2d",
    "conv3d",
    "conv_act",
    "conv_batch_norm_act",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
    "conv_transpose_act",
    "group_norm",
    "group_norm_act",
    "instance_norm",
    "layer_norm",
    "lp_pool1d",
    "lp_pool2d",
    "lp_pool3d",
    "max_pool1d",
    "max_pool2d",
    "max_pool3d",
    "max_unpool1d",
    "max_unpool2d",
    "max_unpool3d",
]

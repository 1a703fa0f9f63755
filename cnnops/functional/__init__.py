"""``torch.nn.functional``'s names, arguments, defaults and results, computed by the kernels of this package.

Every function takes float32, float64, float16 and bfloat16 tensors of any strides, contiguous or
channels-last, and returns the layout that PyTorch would. Other dtypes go to PyTorch's own function, as does
whatever no kernel of the engine in force takes; `cnnops.fallback` says how loudly. Mistakes raise
PyTorch's exception types with "expected …, got …", before anything is written.
"""

from cnnops.functional.conv import conv2d
from cnnops.functional.norm import batch_norm, batch_norm_act
from cnnops.functional.pool import adaptive_avg_pool2d, avg_pool2d, max_pool2d

__all__ = [
    "adaptive_avg_pool2d",
    "avg_pool2d",
    "batch_norm",
    "batch_norm_act",
    "conv2d",
    "max_pool2d",
]

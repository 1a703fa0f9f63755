"""``torch.nn``'s layers on the kernels of this package: subclasses with the same constructor, the same
attributes and the same state_dict. Only the computation is replaced.
"""

from cnnops.nn.conv import Conv2d
from cnnops.nn.norm import BatchNorm2d
from cnnops.nn.pool import AdaptiveAvgPool2d, AvgPool2d, MaxPool2d

__all__ = ["AdaptiveAvgPool2d", "AvgPool2d", "BatchNorm2d", "Conv2d", "MaxPool2d"]

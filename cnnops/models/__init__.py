"""Networks built from `cnnops.nn`'s layers, or from `torch.nn`'s where ``layers=torch.nn`` is asked for."""

from __future__ import annotations

from cnnops.models.lenet import LeNet5, LeNet5Original

LeNet = LeNet5 | LeNet5Original

MODELS: dict[str, type[LeNet5] | type[LeNet5Original]] = {
    "lenet5": LeNet5,
    "lenet5-original": LeNet5Original,
}
"""Names on the command line."""

__all__ = ["MODELS", "LeNet", "LeNet5", "LeNet5Original"]

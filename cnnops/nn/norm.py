"""Layers of normalisation."""

from __future__ import annotations

from torch import Tensor, nn

from cnnops import functional


class BatchNorm2d(nn.BatchNorm2d):
    """``torch.nn.BatchNorm2d``: input ``N C H W``; see `cnnops.functional.batch_norm`.

    The batch is counted only once its forward has succeeded, so that a failed one changes nothing.
    """

    def forward(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)
        tracked = self.training and self.track_running_stats
        momentum = 0.0 if self.momentum is None else self.momentum
        if tracked and self.momentum is None and self.num_batches_tracked is not None:
            momentum = 1.0 / (float(self.num_batches_tracked) + 1.0)  # mean of all batches
        # Outside of training, statistics that were never tracked are the batch's own.
        own = self.training or (self.running_mean is None and self.running_var is None)
        used = tracked or not self.training
        y = functional.batch_norm(
            input, self.running_mean if used else None, self.running_var if used else None, self.weight,
            self.bias, own, momentum, self.eps,
        )  # fmt: skip
        if tracked and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        return y

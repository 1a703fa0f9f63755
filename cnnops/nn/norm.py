"""Layers of batch normalisation."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from cnnops import functional
from cnnops.epilogue import expect_activation
from cnnops.ops.sync_norm import group_of, sync_batch_norm


class _BatchNorm(nn.modules.batchnorm._BatchNorm):
    """What all layers share: when to take which statistics, and what is counted.

    The batch is counted only once its forward has succeeded, so that a failed one changes nothing.
    """

    def forward(self, input: Tensor) -> Tensor:
        return self._forward(input, None, "none")

    def _forward(self, input: Tensor, residual: Tensor | None, activation: str) -> Tensor:
        self._check_input_dim(input)  # type: ignore[no-untyped-call]
        tracked = self.training and self.track_running_stats
        momentum = 0.0 if self.momentum is None else self.momentum
        if tracked and self.momentum is None and self.num_batches_tracked is not None:
            momentum = 1.0 / (float(self.num_batches_tracked) + 1.0)  # mean of all batches
        # Outside of training, statistics that were never tracked are the batch's own.
        own = self.training or (self.running_mean is None and self.running_var is None)
        used = tracked or not self.training
        y = self._normalise(
            input, self.running_mean if used else None, self.running_var if used else None, own, momentum,
            residual, activation,
        )  # fmt: skip
        if tracked and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        return y

    def _normalise(
        self, input: Tensor, mean: Tensor | None, var: Tensor | None, training: bool, momentum: float,
        residual: Tensor | None, activation: str,
    ) -> Tensor:  # fmt: skip
        return functional.batch_norm_act(
            input, mean, var, self.weight, self.bias, training, momentum, self.eps, residual, activation
        )  # fmt: skip


class BatchNorm1d(_BatchNorm, nn.BatchNorm1d):
    """``torch.nn.BatchNorm1d``: input ``N C`` or ``N C L``; see `cnnops.functional.batch_norm`."""


class BatchNorm2d(_BatchNorm, nn.BatchNorm2d):
    """``torch.nn.BatchNorm2d``: input ``N C H W``; see `cnnops.functional.batch_norm`."""


class BatchNorm3d(_BatchNorm, nn.BatchNorm3d):
    """``torch.nn.BatchNorm3d``: input ``N C D H W``; see `cnnops.functional.batch_norm`."""


class LazyBatchNorm1d(_BatchNorm, nn.LazyBatchNorm1d):
    """``torch.nn.LazyBatchNorm1d``, which becomes this package's `BatchNorm1d`."""

    cls_to_become = BatchNorm1d


class LazyBatchNorm2d(_BatchNorm, nn.LazyBatchNorm2d):
    """``torch.nn.LazyBatchNorm2d``, which becomes this package's `BatchNorm2d`."""

    cls_to_become = BatchNorm2d


class LazyBatchNorm3d(_BatchNorm, nn.LazyBatchNorm3d):
    """``torch.nn.LazyBatchNorm3d``, which becomes this package's `BatchNorm3d`."""

    cls_to_become = BatchNorm3d


# ---- with residual and activation -------------------------------------------------------------------------


class _Act(_BatchNorm):
    """Batch norm, residual addition and activation in one pass over memory."""

    def __init__(self, *args: Any, activation: str = "relu", **kwargs: Any) -> None:
        expect_activation(activation)
        super().__init__(*args, **kwargs)
        self.activation = activation

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        return self._forward(input, residual, self.activation)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation}"  # type: ignore[no-untyped-call]


class BatchNormAct1d(_Act, BatchNorm1d):
    """``act(BatchNorm1d(input) + residual)`` in one pass over memory; `residual` may be left out.

    Arguments and state_dict are `BatchNorm1d`'s; `activation`: see `cnnops.functional.batch_norm_act`.
    Raises ValueError for an unknown one.
    """


class BatchNormAct2d(_Act, BatchNorm2d):
    """``act(BatchNorm2d(input) + residual)`` in one pass over memory; `residual` may be left out.

    Arguments and state_dict are `BatchNorm2d`'s; `activation`: see `cnnops.functional.batch_norm_act`.
    Raises ValueError for an unknown one.
    """


class BatchNormAct3d(_Act, BatchNorm3d):
    """``act(BatchNorm3d(input) + residual)`` in one pass over memory; `residual` may be left out.

    Arguments and state_dict are `BatchNorm3d`'s; `activation`: see `cnnops.functional.batch_norm_act`.
    Raises ValueError for an unknown one.
    """


# ---- over several processes -------------------------------------------------------------------------------


class SyncBatchNorm(_BatchNorm, nn.SyncBatchNorm):
    """``torch.nn.SyncBatchNorm``, on CPUs too: batch norm whose statistics in training are those of all
    processes' batches together. Input ``N C *``.

    Batches may differ in size from process to process, and be empty in some. In evaluation, in a group of one
    process and without a process group this is `cnnops.functional.batch_norm`. Gradients of weight and bias
    are the local batch's part, which DistributedDataParallel averages, as it does all others.

    DistributedDataParallel turns models with a SyncBatchNorm on CPUs down, as PyTorch's cannot work there:
    wrap the model first and convert ``wrapped.module`` then.

    Raises ValueError where all batches together have one value a channel, and as ``nn.SyncBatchNorm`` does.
    """

    def _normalise(
        self, input: Tensor, mean: Tensor | None, var: Tensor | None, training: bool, momentum: float,
        residual: Tensor | None, activation: str,
    ) -> Tensor:  # fmt: skip
        self._check_non_zero_input_channels(input)
        group = group_of(self.process_group) if self.training else None
        if group is None:
            return super()._normalise(input, mean, var, training, momentum, residual, activation)
        return sync_batch_norm(
            input, mean, var, self.weight, self.bias, momentum, self.eps, residual, activation, group
        )  # fmt: skip

    @classmethod
    def convert_sync_batchnorm(cls, module: nn.Module, process_group: Any = None) -> nn.Module:
        """`module` with every batch norm in it, PyTorch's or this package's, made a layer of this class.

        A module that is itself a batch norm is not changed: its successor is returned. Layers with an
        activation become `SyncBatchNormAct`. Parameters and buffers stay the same tensors.
        """
        result = module
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            options = (
                module.num_features, module.eps, module.momentum, module.affine, module.track_running_stats,
                process_group,
            )  # fmt: skip
            if isinstance(module, _Act):
                result = SyncBatchNormAct(*options, activation=module.activation)
            else:
                result = cls(*options)
            result.weight, result.bias = module.weight, module.bias
            result.running_mean, result.running_var = module.running_mean, module.running_var
            result.num_batches_tracked = module.num_batches_tracked
            result.training = module.training
        for name, child in module.named_children():
            result.add_module(name, cls.convert_sync_batchnorm(child, process_group))
        return result


class SyncBatchNormAct(_Act, SyncBatchNorm):
    """``act(SyncBatchNorm(input) + residual)``; `residual` may be left out.

    Arguments and state_dict are `SyncBatchNorm`'s; `activation`: see `cnnops.functional.batch_norm_act`.
    Raises ValueError for an unknown one.
    """

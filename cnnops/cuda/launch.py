"""The one seam through which every kernel is started, on a GPU or under the emulator."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from cnnops.cuda import emulate, jit
from cnnops.cuda.kernel import Launch

_traces: list[tuple[list[Launch], bool]] = []


def launch(
    plan: Launch,
    inputs: Sequence[torch.Tensor | None],
    outputs: Sequence[torch.Tensor | None],
    updates: Sequence[torch.Tensor | None] = (),
) -> None:
    """Run `plan` on its tensors: compiled by NVRTC where they are on a GPU, under the emulator on a CPU.

    The launch goes to torch's current stream of the tensors' device and returns without waiting for it.
    """
    if 0 in plan.grid:
        return
    if _traces:
        for plans, _ in _traces:
            plans.append(plan)
        if not all(run for _, run in _traces):
            return
    tensors = (*inputs, *outputs, *updates)
    for tensor in tensors:
        if tensor is not None:
            break
    else:
        raise RuntimeError(f"{plan.kernel}: expected a tensor, got none")
    if tensor.is_cuda:
        jit.execute(plan, tensors, tensor.get_device())
    else:
        emulate.execute(plan, tensors)


@contextmanager
def trace(run: bool = True) -> Iterator[list[Launch]]:
    """Collect the launches of a block, in order. With ``run=False`` they are collected but not run, and
    results hold whatever was in memory: this finds the kernels that a model needs, to compile them ahead.
    """
    entry: tuple[list[Launch], bool] = ([], run)
    _traces.append(entry)
    try:
        yield entry[0]
    finally:
        _traces[:] = [other for other in _traces if other is not entry]

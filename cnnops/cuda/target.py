"""The GPU that launches are planned for: the one a tensor is on, or one that tensors elsewhere stand for.

Launchers ask here, so that a machine without a GPU can find out what another one's will launch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import NamedTuple

import torch


class Target(NamedTuple):
    """What decides which kernels are launched, and how many of their blocks."""

    capability: tuple[int, int]
    multiprocessors: int
    """Of these only the number of blocks of a launch depends, never a kernel nor a result."""

    @property
    def arch(self) -> str:
        """The architecture to compile for: with its own features ("90a") from Hopper on."""
        major, minor = self.capability
        return f"{major}{minor}a" if major >= 9 else f"{major}{minor}"

    @classmethod
    def of_arch(cls, arch: str) -> Target:
        """What is compiled for ``sm_<arch>`` is for this GPU."""
        return cls(divmod(int(arch.removesuffix("a")), 10), H100.multiprocessors)


H100 = Target((9, 0), 132)
_stand_in = H100


@lru_cache(None)
def of_gpu(index: int) -> Target:
    """The GPU of this number."""
    count = torch.cuda.get_device_properties(index).multi_processor_count
    return Target(torch.cuda.get_device_capability(index), int(count))


def target_of(device: torch.device) -> Target:
    """The GPU `device`; for another device what stands for one, an H100 unless `standing_for` says else."""
    return of_gpu(device.index) if device.type == "cuda" else _stand_in


@contextmanager
def standing_for(target: Target) -> Iterator[None]:
    """Within the block, launches of tensors that are on no GPU are planned for this one."""
    global _stand_in
    former, _stand_in = _stand_in, target
    try:
        yield
    finally:
        _stand_in = former

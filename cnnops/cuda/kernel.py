"""What a kernel launch is, said once for both executors (`jit` on a GPU, `emulate` on the CPU).

A kernel file `kernels/<name>.cu` holds ``extern "C"`` entries whose parameters come in one order: pointers
to inputs (``const T*``), to outputs, to tensors updated in place, and last one struct of scalars by value.
`Launch` carries all that decides a launch but the tensors, so that it can be made once a problem and kept.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from cnnops.cuda.tensor_map import TensorMap

ELEMENT = {
    torch.float32: "float",
    torch.float64: "double",
    torch.float16: "half_t",
    torch.bfloat16: "bfloat_t",
}
"""Names that `kernels/common.cuh` gives the element types."""

ACCUMULATOR = {
    torch.float32: "float",
    torch.float64: "double",
    torch.float16: "float",
    torch.bfloat16: "float",
}
"""Half types accumulate in float, the others in themselves."""

INT32_MAX = 2**31 - 1

CLUSTERS = (1, 2, 4, 8, 16)
"""Sizes of thread-block clusters; every GPU that has clusters runs up to 8 blocks, some 16 (H100, B200)."""


@lru_cache(None)
def kernels_dir() -> Path:
    """The folder of CUDA sources: `cnnops/kernels` in a wheel, the checkout's `kernels` otherwise."""
    package = Path(__file__).resolve().parents[1]
    for candidate in (package / "kernels", package.parent / "kernels"):
        if (candidate / "common.cuh").is_file():
            return candidate
    raise FileNotFoundError(f"expected CUDA sources in {package / 'kernels'}, got none")


@dataclass(frozen=True)
class Kernel:
    """One entry of one source under one set of compile-time constants.

    `source` is a name in kernels/, or the absolute path of a file from elsewhere. Source and constants are
    the unit of compilation: entries that share both share one binary.
    """

    source: str
    entry: str
    constants: tuple[tuple[str, str | int], ...]

    @property
    def defines(self) -> tuple[str, ...]:
        return tuple(f"-D{name}={value}" for name, value in self.constants)

    def __str__(self) -> str:
        return f"{self.source}:{self.entry} [{' '.join(d[2:] for d in self.defines)}]"


@dataclass(frozen=True)
class Launch:
    """A launch without its tensors.

    `inputs`, `outputs` and `updates` name the pointer parameters in the entry's order: inputs are only read,
    every element of an output is written, updates are read and written. A None tensor is a null pointer.
    `tensor_maps`, of some of these tensors, follow the pointers as parameters of type TensorMap by value.
    `params` is the trailing struct, a ctypes.Structure whose fields mirror the `.cu` file's struct; its size
    is checked there against the constant ``PARAMS_BYTES``, which `launch_of` adds; it must not change once
    the launch has run. `cluster` blocks along x form a thread-block cluster (kernels/ptx_cluster.cuh), which
    runs together; more than one needs a GPU of capability 9.0 or newer. `prepared` and `encoded` are for the
    executor: what it found out about this launch the first time, and its tensor maps by the addresses of the
    tensors.
    """

    kernel: Kernel
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    params: ctypes.Structure = field(compare=False)
    updates: tuple[str, ...] = ()
    shared_bytes: int = 0
    tensor_maps: tuple[TensorMap, ...] = ()
    cluster: int = 1
    prepared: dict[int, Any] = field(default_factory=dict, compare=False, repr=False)
    encoded: dict[tuple[int, ...], Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def names(self) -> tuple[str, ...]:
        return self.inputs + self.outputs + self.updates


def launch_of(
    source: str,
    entry: str,
    constants: dict[str, str | int],
    params: ctypes.Structure,
    *,
    grid: Sequence[int],
    block: Sequence[int],
    inputs: Sequence[str],
    outputs: Sequence[str],
    updates: Sequence[str] = (),
    shared_bytes: int = 0,
    tensor_maps: Sequence[TensorMap] = (),
    cluster: int | None = None,
) -> Launch:
    """A `Launch`; grid and block may have one to three axes (x first).

    `cluster` is for kernels that include ptx_cluster.cuh and declare their entry
    ``__cluster_dims__(CLUSTER, 1, 1)``: it becomes the constant ``CLUSTER``. Raises ValueError unless it is a
    power of two up to 16 that divides the grid's x. More than 8 are not portable: a GPU may refuse them.
    """
    sized = {**constants, "PARAMS_BYTES": ctypes.sizeof(params)}
    three = [tuple(int(v) for v in (*axes, 1, 1)[:3]) for axes in (grid, block)]
    if cluster is not None:
        if cluster not in CLUSTERS:
            raise ValueError(
                f"{source}:{entry}: cluster: expected a power of two from 1 to 16, got {cluster}"
            )
        if three[0][0] % cluster:
            raise ValueError(
                f"{source}:{entry}: grid: expected x to be a multiple of the cluster's {cluster} blocks, "
                f"got {three[0][0]}"
            )
        sized["CLUSTER"] = cluster
    return Launch(
        Kernel(source, entry, tuple(sorted(sized.items()))),
        three[0],  # type: ignore[arg-type]
        three[1],  # type: ignore[arg-type]
        tuple(inputs),
        tuple(outputs),
        params,
        tuple(updates),
        shared_bytes,
        tuple(tensor_maps),
        cluster or 1,
    )


def alignment(tensor: torch.Tensor) -> int:
    """The largest power of two, at most 16, that divides the address of the tensor's first element."""
    address = tensor.data_ptr() | 16
    return address & -address


class FastDiv(ctypes.Structure):
    """`struct FastDiv` of common.cuh: division of 0 <= n < 2^31 by a number known at launch.

    ``n / d = (umulhi(n, multiplier) + n) >> shift`` with ``shift = ceil(log2 d)`` and ``multiplier =
    floor(2^32 · (2^shift - d) / d) + 1`` (Granlund and Montgomery, 1994, figure 4.1 with N = 32).
    """

    _fields_ = [
        ("divisor", ctypes.c_uint32),
        ("multiplier", ctypes.c_uint32),
        ("shift", ctypes.c_uint32),
    ]

    def __init__(self, divisor: int = 1) -> None:
        shift = max(divisor - 1, 0).bit_length()
        super().__init__(divisor, (((1 << shift) - divisor) << 32) // divisor + 1, shift)

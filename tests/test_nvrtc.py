"""Every kernel that the rows of cases.py need compiles for real GPUs, and keeps its values in registers.

The launches are collected without being run: the launchers' choices need sizes, strides and alignment only.
"""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from cases import CONV_CASES, NORM_CASES, POOL_CASES

import cnnops
from cnnops.cuda import jit
from cnnops.cuda.kernel import Kernel
from cnnops.cuda.launch import trace
from cnnops.registry import GPU, ROWS

pytest.importorskip("cuda.bindings.nvrtc", reason="NVRTC is missing: pip install 'cnnops[test]'")

ARCHITECTURES = ("80", "90a")
SOURCES = sorted({f"{row.algorithm}.cu" for row in ROWS if row.engines == GPU})


@lru_cache(None)
def kernels() -> dict[str, list[Kernel]]:
    """One kernel a set of constants, by source, over all rows, dtypes and algorithms."""
    found: dict[tuple[str, object], Kernel] = {}
    for algorithm in (None, "conv_im2col"):
        with cnnops.engine("emulate"), cnnops.algorithm(algorithm), trace(run=False) as launches:
            for case in CONV_CASES if algorithm else (*CONV_CASES, *POOL_CASES, *NORM_CASES):
                for dtype in case.dtypes:
                    tensors = [t.requires_grad_() for t in case.tensors(dtype)]
                    y = case.ours(*tensors)
                    torch.autograd.grad(y, tensors, torch.ones_like(y))
        for launch in launches:
            kernel = launch.kernel
            found.setdefault((kernel.source, kernel.constants), kernel)
    return {source: [k for k in found.values() if k.source == source] for source in SOURCES}


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("source", SOURCES)
def test_compiles_without_spills(source: str, arch: str) -> None:
    assert kernels()[source], f"no row of cases.py reaches {source}"
    spilling = []
    for kernel in kernels()[source]:
        _, log = jit.compile_cubin(kernel.source, kernel.constants, arch)
        entries = jit.resources(log)
        assert kernel.entry in {entry.entry for entry in entries}, f"{kernel}:\n{log}"
        spilling += [
            f"{kernel}: {entry}"
            for entry in entries
            if entry.stack_bytes or entry.spill_store_bytes
        ]
    assert not spilling, "\n".join(spilling)

"""The machine code of kernels/conv_depthwise.cu: what its loops issue for an output, as disassembled.

A loop says itself how many outputs an iteration has: as many as its stores have elements. wgrad's loop stores
nothing; an iteration there is a step, which reads the TILE x VECTOR of grad_y that a thread owns.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import sass
import torch

from cnnops.cuda import conv_depthwise, jit
from cnnops.cuda.kernel import Launch
from cnnops.cuda.launch import trace
from cnnops.shapes import ConvShape

needs_nvrtc = pytest.mark.skipif(
    sass.disassembler() is None, reason="nvdisasm is missing: pip install 'cnnops[test]'"
)


class Form(NamedTuple):
    """A layer of N 32, and what a step of its loops loads of the source: bytes of each access."""

    channels: int
    taps: int
    dtype: torch.dtype
    layout: torch.memory_format
    loads: tuple[int, ...]
    pack: int
    """Bytes of what a thread reads and writes at once of the result."""


FORMS = {
    # A place's channels: 4 of them, as their 9 weights and sums of 3 rows take registers. 6 columns for 4.
    "3x3 bf16 channels-last": Form(144, 3, torch.bfloat16, torch.channels_last, (8,) * 6, 8),
    # Of the packs to the left and to the right, one column each is loaded.
    "3x3 fp32 NCHW": Form(144, 3, torch.float32, torch.contiguous_format, (4, 16, 4), 16),
    "7x7 fp32 NCHW": Form(96, 7, torch.float32, torch.contiguous_format, (16, 16, 16), 16),
}


def launch_of(form: Form, op: str) -> Launch:
    """The launch that walks."""
    size, K = (32, form.channels, 56, 56), form.channels
    shape = ConvShape.of(size, (K, 1, form.taps, form.taps), None, 1, form.taps // 2, 1, K)
    x = torch.empty(size, dtype=form.dtype, device="meta").to(memory_format=form.layout)
    w = torch.empty(shape.w_size, dtype=form.dtype, device="meta")
    with trace(run=False) as launches:
        if op == "fprop":
            conv_depthwise.conv_fprop(shape, x, w, None, torch.empty_like(x))
        elif op == "dgrad":
            conv_depthwise.conv_dgrad(shape, x, w, None, torch.empty_like(x))
        else:
            conv_depthwise.conv_wgrad(shape, x, x, w)
    return launches[0]


def access_bytes(loop: tuple[str, ...], opcode: str) -> list[int]:
    """Of each access of this kind by a thread: LDG.E.128 has 16, LDG.E has 4."""
    accesses = [text.split()[0].split(".") for text in loop if text.startswith(f"{opcode}.")]
    bits = [[int(word) for word in words if word.isdigit()] or [32] for words in accesses]
    return [found // 8 for (found,) in bits]


@needs_nvrtc
@pytest.mark.parametrize(
    "op, arch",
    [("fprop", "80"), ("fprop", "90a"), ("dgrad", "90a"), ("wgrad", "80"), ("wgrad", "90a")],
)
@pytest.mark.parametrize("name", FORMS)
def test_loops(name: str, op: str, arch: str) -> None:
    """R·S multiply-adds an output, and one for its scale and bias where results are written; accesses as
    wide as packs; nothing in local memory."""
    pytest.importorskip("cuda.bindings.nvrtc")
    form = FORMS[name]
    kernel = launch_of(form, op).kernel
    cubin, _ = jit.compile_cubin(kernel.source, kernel.constants, arch)
    code = sass.code(cubin)
    everything = sass.count(code.instructions)
    assert not everything["LDL"] and not everything["STL"]

    constants, taps = dict(kernel.constants), form.taps**2
    of_step = int(constants["TILE"]) * int(constants["VECTOR"])
    packs = [form.pack] * (of_step * form.dtype.itemsize // form.pack)
    if op == "wgrad":
        loop = code.main_loop("FFMA")
        assert sorted(access_bytes(loop, "LDG")) == sorted((*form.loads, *packs))
        assert sass.count(loop)["FFMA"] == of_step * taps
        return
    # Unrolled, as many steps as rows are under way; and one step, for what is left of a strip.
    walks = [loop for loop in code.loops if sass.count(loop)["FFMA"]]
    for loop, steps in zip(walks, (1, form.taps), strict=True):
        assert access_bytes(loop, "STG") == steps * packs
        assert sorted(access_bytes(loop, "LDG")) == sorted(steps * form.loads)
        outputs = sum(access_bytes(loop, "STG")) // form.dtype.itemsize
        assert sass.count(loop)["FFMA"] == outputs * (taps + 1)

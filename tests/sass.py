"""Reading machine code: what NVRTC's cubin holds, by NVIDIA's disassembler, which needs no GPU.

``python -m tests.sass`` writes tests/igemm_tiles.csv: what the tiles of cnnops/cuda/conv_igemm.py cost.
"""

from __future__ import annotations

import csv
import itertools
import re
import subprocess
import tempfile
from collections import Counter
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch

from cnnops.cuda import conv_igemm, jit
from cnnops.cuda.launch import trace
from cnnops.shapes import ConvShape

_LABEL = re.compile(r"^(\.L_\w+):")
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?P<text>.*?)\s*;")
_BRANCH = re.compile(r"\bBRA\b.*`\((?P<label>\.L_\w+)\)")
_GUARD = re.compile(r"^@!?U?P\w+\s+")


@lru_cache(None)
def disassembler() -> Path | None:
    """nvdisasm of the package nvidia-cuda-nvdisasm, or None."""
    spec = find_spec("nvidia")
    places = list(spec.submodule_search_locations or ()) if spec else []
    found = [path for place in places for path in Path(place).glob("*/bin/nvdisasm")]
    return found[0] if found else None


class Code(NamedTuple):
    """Instructions in order, without their guards, and the loops among them, innermost first."""

    instructions: tuple[str, ...]
    loops: tuple[tuple[str, ...], ...]

    def main_loop(self, opcode: str) -> tuple[str, ...]:
        """The innermost loop that has `opcode`."""
        return next(loop for loop in self.loops if count(loop)[opcode])


def count(instructions: tuple[str, ...]) -> Counter[str]:
    """How often each opcode comes, without its modifiers."""
    return Counter(re.split(r"[.\s]", text)[0] for text in instructions)


def code(cubin: bytes) -> Code:
    """What the one entry of `cubin` executes."""
    tool = disassembler()
    assert tool is not None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "-c", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    instructions: list[str] = []
    labels: dict[str, int] = {}
    loops: list[tuple[str, ...]] = []
    for line in text.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif found := _INSTRUCTION.match(line):
            instructions.append(_GUARD.sub("", found["text"]))
            branch = _BRANCH.search(found["text"])
            if branch and branch["label"] in labels:  # backwards
                loops.append(tuple(instructions[labels[branch["label"]] :]))
    return Code(tuple(instructions), tuple(sorted(loops, key=len)))


# ---- the tiles of conv_igemm.py --------------------------------------------------------------------------

TILES = Path(__file__).with_name("igemm_tiles.csv")
ARCH = "90a"
COMMAND = "if that is meant, run: python -m tests.sass"


class Row(NamedTuple):
    """A tile's forward kernel, channels-last, for sm_90a. Shared memory in bytes, static and dynamic;
    `blocks`: on a multiprocessor, by registers and 227 KB; instructions of the main loop, and mma among them.
    """

    tile: str
    element: str
    registers: int
    shared: int
    blocks: int
    instructions: int
    mma: int
    local: int

    @property
    def share(self) -> float:
        return self.mma / self.instructions


def compiled_tiles(every: int = 1) -> list[Row]:
    """All tiles in float16 and, as TF32, in float32; or of these only one in so many."""
    rows = []
    tiles = itertools.product((torch.float16, torch.float32), conv_igemm.TILES)
    for dtype, tile in itertools.islice(tiles, 0, None, every):
        groups, c = (8, tile.columns) if tile.groups > 1 else (1, 256)
        shape = ConvShape.of(
            (32, c * groups, 28, 28), (c * groups, c, 3, 3), padding=1, groups=groups
        )
        x, w, y = (
            torch.empty(size, dtype=dtype, device="meta").to(memory_format=torch.channels_last)
            for size in (shape.x_size, shape.w_size, shape.y_size)
        )
        with conv_igemm.forced(str(tile)), trace(run=False) as launches:
            conv_igemm.conv_fprop(shape, x, w, None, y)
        kernel, threads = launches[0].kernel, launches[0].block[0]
        cubin, log = jit.compile_cubin(kernel.source, kernel.constants, ARCH)
        (cost,) = jit.resources(log)
        found = code(cubin)
        loop, local = count(found.main_loop("HMMA")), count(found.instructions)
        shared = cost.shared_bytes + launches[0].shared_bytes
        registers = -(-cost.registers // 8) * 8
        blocks = min(65536 // (registers * threads), 227 * 1024 // (shared + 1024))
        rows.append(
            Row(
                str(tile), dict(kernel.constants)["ELEMENT"], cost.registers, shared, blocks,  # type: ignore[arg-type]
                loop.total(), loop["HMMA"], local["LDL"] + local["STL"],
            )
        )  # fmt: skip
    return rows


def read_tiles() -> list[Row]:
    with TILES.open(newline="") as file:
        rows = list(csv.reader(file))[1:]
    return [Row(*row[:2], *map(int, row[2:-1])) for row in rows]


def record() -> None:
    """Write what the tiles compile to."""
    with TILES.open("w", newline="") as file:
        out = csv.writer(file, lineterminator="\n")
        out.writerow([*Row._fields, "share"])
        out.writerows([*row, f"{row.share:.2f}"] for row in compiled_tiles())


if __name__ == "__main__":
    record()

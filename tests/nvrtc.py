"""The table of what every kernel costs on every architecture: ``python -m tests.nvrtc record`` rewrites it.

A kernel is compiled together with the entries that share its constants: a `Unit`. The units are found by
tracing launches without running them: over the rows of tests/cases in every algorithm, and over `beyond`, the
problems that no test has the time to run but whose tiles and 64-bit offsets a user gets.

``tests/nvrtc_resources.csv`` has a line for each entry of each unit, and a column for each architecture. A
cell is ``registers:spill:stack:shared``, the bytes spilled by a thread (stores and loads), of its stack frame
and of the block's static shared memory; zeros at its end are left off. Of `FULL` every unit is recorded; of
`SAMPLED`, of all units of one source, element type and set of entries the one with the most registers on
`FULL`'s first, so that compiling all of it again takes minutes and not a quarter of an hour.

The head of the table has a digest of every source with its headers. The same NVRTC makes the same of the same
source, and another one much the same: where the digest is that of the table, the tests compile a sample of
`FULL`'s units again (of `Table.sample` in turns, and every `ONE_IN`-th of the others), and `SAMPLED`'s in
turns, and otherwise all of them. Where the NVRTC is the table's, too, it is every `KNOWN_ONE_IN`-th of these.

A launcher that serves fewer architectures says so in a constant ``ARCHITECTURES``: a tuple like `ALL` for the
whole module, or a dict from an entry's name to such a tuple (entries that it does not name: all).
"""

from __future__ import annotations

import csv
import importlib.util
import mmap
import os
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import repeat
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))

from cases import CASES, Case, NormCase, PoolCase, run
from igemm import tf32

import cnnops
from cnnops import functional as C
from cnnops.cache import digest_of
from cnnops.cuda import conv_fold, conv_igemm, conv_igemm_planes, conv_igemm_sm90, jit
from cnnops.cuda.cache import sources
from cnnops.cuda.kernel import Kernel, kernels_dir
from cnnops.cuda.launch import trace
from cnnops.epilogue import ACTIVATIONS
from cnnops.ops.norm import batch_norm_stats
from cnnops.registry import BATCH_NORM, CONV, GPU, GROUP_NORM, POOL, ROWS, UNPOOL
from cnnops.shapes import ConvShape

TABLE = Path(__file__).with_name("nvrtc_resources.csv")
COMMAND = "python -m tests.nvrtc record"
FULL = ("80", "90a")
SAMPLED = ("86", "89", "100a")
ALL = ("80", "86", "89", "90a", "100a")
REGISTERS_MAY_GROW = 8
"""Registers are allotted to a warp's threads by eights: this much may come and go with an edit."""
ONE_IN = 100
KNOWN_ONE_IN = 5

FAMILIES = ((*CONV, "conv_fold"), POOL, UNPOOL, BATCH_NORM, GROUP_NORM)


@lru_cache(None)
def supported() -> tuple[str, ...]:
    """Those of `ALL` that the installed NVRTC can compile for."""
    from cuda.bindings import nvrtc

    _, count = nvrtc.nvrtcGetNumSupportedArchs()
    _, numbers = nvrtc.nvrtcGetSupportedArchs()
    return tuple(arch for arch in ALL if int(arch.rstrip("a")) in numbers[:count])


class Unit(NamedTuple):
    """One compilation: a source, and its constants as the table writes them (`variant`)."""

    source: str
    variant: str


def variant(kernel: Kernel) -> str:
    """The constants but for zeros and the size of the params struct, which any edit of it changes."""
    return " ".join(f"{n}={v}" for n, v in kernel.constants if n != "PARAMS_BYTES" and v != 0)


# ---- which kernels there are -----------------------------------------------------------------------------

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
# Chosen so that every tile of conv_direct.py is somebody's: N C H W, K C/g R S, stride, padding, groups.
CONVOLUTIONS = (
    ((32, 64, 56, 56), (64, 64, 3, 3), 1, 1, 1),
    ((32, 256, 14, 14), (256, 256, 3, 3), 1, 1, 1),
    ((32, 256, 28, 28), (256, 8, 3, 3), 1, 1, 32),
    ((32, 256, 28, 28), (256, 32, 3, 3), 1, 1, 8),
    ((64, 16, 112, 112), (4, 16, 3, 3), 1, 1, 1),
)
FAR = 2**31
"""Elements between the images of a tensor that 32-bit offsets cannot walk."""


@lru_cache(None)
def _address_space() -> Tensor:
    """Bytes that nobody touches: address space without memory behind it."""
    no_reserve = 0x4000  # MAP_NORESERVE, which the mmap module does not name
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    return torch.frombuffer(mmap.mmap(-1, (FAR + 2**20) * 8, flags=flags), dtype=torch.uint8)


def far_apart(
    size: Sequence[int],
    dtype: torch.dtype,
    form: torch.memory_format = torch.contiguous_format,
) -> Tensor:
    """A tensor of two images, `FAR` apart."""
    dense = torch.empty(size, device="meta", memory_format=form).stride()
    return _address_space().view(dtype).as_strided(size, (FAR, *dense[1:]))


def _backward(y: Tensor, leaves: Sequence[Tensor], far: bool = False) -> None:
    grad = far_apart(y.shape, y.dtype) if far else torch.empty_like(y)
    torch.autograd.grad(y, leaves, grad)


def _with_epilogues(dtype: torch.dtype, form: torch.memory_format) -> None:
    """Every activation behind each of the ways to write a result."""
    x = torch.empty(2, 64, 14, 14, dtype=dtype).contiguous(memory_format=form)
    small = torch.empty(1, 512, 4, 4, dtype=dtype).contiguous(memory_format=form)
    per_channel = torch.empty(64, dtype=dtype)
    for activation in ACTIVATIONS:
        for image, filters, options in (
            (x, (64, 64, 3, 3), {"padding": 1}),
            (x, (64, 1, 3, 3), {"padding": 1, "groups": 64}),
            (small, (64, 512, 3, 3), {"padding": 1}),
        ):
            w = torch.empty(filters, dtype=dtype).contiguous(memory_format=form)
            y = C.conv_act(
                image, w, per_channel, **options, scale=per_channel, activation=activation
            )
            C.conv_act(image, w, **options, residual=y, activation=activation)
        w = torch.empty((64, 64, 2, 2), dtype=dtype).contiguous(memory_format=form)
        C.conv_transpose_act(x, w, per_channel, 2, activation=activation)
    w = torch.empty((64, 64, 3, 3), dtype=dtype).contiguous(memory_format=form)
    C.conv_batch_norm_act(x, w, None, None, None, training=True, padding=1)


def _tiles(dtype: torch.dtype) -> None:
    """Every tile of conv_igemm.py in all passes, in both layouts, those of planes, and those of wgmma, in
    phases, too.
    """
    if dtype not in conv_igemm.DTYPES:
        return
    for wide in conv_igemm_sm90.TILES:
        for stride in (1, 2):
            x = torch.empty((8, 256, 14, 14), dtype=dtype, memory_format=torch.channels_last)
            w = torch.empty((256, 256, 3, 3), dtype=dtype, memory_format=torch.channels_last)
            leaves = x.requires_grad_(), w.requires_grad_()
            with conv_igemm.forced(str(wide)):
                _backward(C.conv2d(x, w, None, stride, 1), leaves)
    for planes in conv_igemm_planes.TILES:
        for taps in (3, 5):
            x = torch.empty((2, 128, 28, 28), dtype=dtype, requires_grad=True)
            w = torch.empty((128, 128, taps, taps), dtype=dtype, requires_grad=True)
            with conv_igemm.forced(str(planes)):
                _backward(C.conv2d(x, w, None, 1, taps // 2), (x, w))
    for tile in conv_igemm.TILES:
        for form in (torch.contiguous_format, torch.channels_last):
            groups = 8 if tile.groups > 1 else 1
            c, k = (tile.columns * groups, tile.columns) if groups > 1 else (256, 256)
            x = torch.empty((2, c, 14, 14), dtype=dtype, memory_format=form, requires_grad=True)
            w = torch.empty((c, k, 3, 3), dtype=dtype, memory_format=form, requires_grad=True)
            with conv_igemm.forced(str(tile)):
                _backward(C.conv2d(x, w, None, 1, 1, 1, groups), (x, w))


def _pooled(dtype: torch.dtype) -> None:
    """Windows of stride 1 over images that fill a GPU, by tiles of several rows, and rows off alignment."""
    for size, window, pad in (
        ((32, 64, 112, 112), 3, 0),
        ((64, 512, 39, 39), 4, 1),
        ((64, 512, 39, 39), 13, 6),
    ):
        for form in (torch.contiguous_format, torch.channels_last):
            dense = torch.empty(size, device="meta", memory_format=form).stride()
            x = _address_space().view(dtype).as_strided(size, dense).requires_grad_()
            for pool in (C.max_pool2d, C.avg_pool2d):
                y = pool(x, window, 1, pad)
                grad = _address_space().view(dtype).as_strided(y.shape, y.stride())
                torch.autograd.grad(y, x, grad)


def beyond(family: Sequence[str], algorithm: str) -> None:
    """Problems of the sizes that networks have, and of more than 2^31 elements, without their numbers."""
    one_image = algorithm == "conv_im2col"  # whose products PyTorch does compute
    for dtype in DTYPES:
        # The layout in which the type is mostly met.
        last = dtype in (torch.float16, torch.bfloat16)
        form = torch.channels_last if last else torch.contiguous_format
        if "conv_fprop" in family:
            for size, filters, stride, padding, groups in CONVOLUTIONS:
                size = (1, *size[1:]) if one_image else size
                x, w = (torch.empty(s, dtype=dtype, memory_format=form) for s in (size, filters))
                leaves = x.requires_grad_(), w.requires_grad_()
                _backward(C.conv2d(x, w, None, stride, padding, 1, groups), leaves)
            _with_epilogues(dtype, form)
            if algorithm == "conv_igemm":
                _tiles(dtype)
                x = far_apart((2, 64, 8, 8), dtype, torch.channels_last).requires_grad_()
                w = torch.empty((64, 64, 3, 3), dtype=dtype, memory_format=torch.channels_last)
                y = C.conv2d(x, w.requires_grad_(), None, 2, 1)
                _backward(y, (x, w), far=True)
                x = far_apart((2, 16, 16, 16), dtype)
                w = torch.empty((16, 16, 3, 3), dtype=dtype)
                with conv_igemm.forced("planes8x16x16"):
                    C.conv2d(x, w, None, 1, 1)
            if algorithm == "conv_depthwise":
                for make in (torch.empty, far_apart):
                    x = make((2, 64, 16, 16), dtype=dtype).requires_grad_()
                    w = torch.empty((64, 1, 31, 31), dtype=dtype, requires_grad=True)
                    _backward(C.conv2d(x, w, None, 1, 15, 1, 64), (x, w), far=make is far_apart)
            for filters, groups in (((8, 8, 3, 3), 1), ((8, 1, 3, 3), 8)):
                x = far_apart((2, 8, 8, 8), dtype).requires_grad_()
                w = torch.empty(filters, dtype=dtype, requires_grad=True)
                bias = torch.empty(8, dtype=dtype, requires_grad=True)
                _backward(C.conv2d(x, w, bias, 1, 1, 1, groups), (x, w, bias), far=True)
            if algorithm == "conv_fold":
                shape = ConvShape.of((2, 8, 8, 8), (8, 8, 3, 3), padding=1, padding_mode="reflect")
                padded = far_apart(shape.padded.x_size, dtype)
                conv_fold.conv_fold(shape, padded, torch.empty(shape.x_size, dtype=dtype))
            continue
        x = far_apart((2, 8, 8, 8), dtype).requires_grad_()
        if family == POOL:
            for y in (C.max_pool2d(x, 2), C.avg_pool2d(x, 3, 2), C.adaptive_avg_pool2d(x, 1)):
                _backward(y, (x,), far=True)
            _pooled(dtype)
        elif family == UNPOOL:
            places = torch.zeros((2, 8, 8, 8), dtype=torch.int64)
            _backward(C.max_unpool2d(x, places, 1), (x,), far=True)
        elif family == GROUP_NORM:
            _backward(C.group_norm(x, 2), (x,), far=True)
            _backward(C.layer_norm(x, (8, 8)), (x,), far=True)
            image = torch.empty((8, 64, 28, 28), dtype=dtype, requires_grad=True)
            last = image.detach().contiguous(memory_format=form).requires_grad_()
            row = torch.empty((32, 20000), dtype=dtype, requires_grad=True)
            for tensor, y in (
                (last, C.group_norm_act(last, 32)),
                (image, C.layer_norm(image.permute(0, 2, 3, 1), (64,))),
                (row, C.layer_norm(row, (20000,))),
            ):
                _backward(y, (tensor,))
        elif family == BATCH_NORM:
            batch_norm_stats(x, "emulate")
            for training in (True, False):
                statistics = torch.empty(8, dtype=dtype), torch.empty(8, dtype=dtype)
                _backward(C.batch_norm(x, *statistics, training=training), (x,), far=True)


@lru_cache(None)
def family_of(case: Case) -> frozenset[str]:
    """The operations that a row needs."""
    with cnnops.engine("aten"):
        choices = cnnops.explain(run, case.ours, case.tensors(torch.float32), case.grad)
    return frozenset(choice.op for choice in choices)


def _rows(ops: Set[str]) -> None:
    """The rows of tests/cases that need one of `ops`, with gradients, and second ones of max pooling."""
    for case in CASES:
        if not family_of(case) & ops:
            continue
        for dtype in case.dtypes:
            tensors = case.tensors(dtype)
            run(case.ours, tensors, case.grad)
            if isinstance(case, NormCase) and tensors[0].numel():
                batch_norm_stats(tensors[0], "emulate")
            if isinstance(case, PoolCase) and case.kind in ("max", "adaptive_max"):
                leaf = tensors[0].requires_grad_()
                y = case.ours(leaf)
                grad = torch.ones_like(y).requires_grad_()
                (first,) = torch.autograd.grad(y, leaf, grad, create_graph=True)
                torch.autograd.grad(first, grad, torch.ones_like(first))


MODULES = {row.algorithm: row.module for row in ROWS if row.engines == GPU}


@contextmanager
def _wgmma(at_hand: bool) -> Iterator[None]:
    """Whether tensors that have no GPU stand for a Hopper's."""
    former = conv_igemm_sm90.multiprocessors
    if not at_hand:
        conv_igemm_sm90.multiprocessors = lambda device: 0  # type: ignore[assignment]
    try:
        yield
    finally:
        conv_igemm_sm90.multiprocessors = former


@lru_cache(None)
def units() -> dict[Unit, tuple[Kernel, frozenset[str]]]:
    """Every unit: one of its kernels, and all entries that are launched from it."""
    found: dict[Unit, Kernel] = {}
    entries: dict[Unit, set[str]] = defaultdict(set)
    with cnnops.engine("emulate"), cnnops.fallback("silent"), tf32():
        for algorithm, wgmma in [*((name, True) for name in MODULES), ("conv_igemm", False)]:
            ops = {row.op for row in ROWS if row.algorithm == algorithm}
            with cnnops.algorithm(algorithm), _wgmma(wgmma), trace(run=False) as launches:
                _rows(ops)
                for family in FAMILIES:
                    if ops & set(family):
                        beyond(family, algorithm)
            for launch in launches:
                unit = Unit(launch.kernel.source, variant(launch.kernel))
                found.setdefault(unit, launch.kernel)
                entries[unit].add(launch.kernel.entry)
    return {unit: (found[unit], frozenset(entries[unit])) for unit in sorted(found)}


def architectures(unit: Unit) -> tuple[str, ...]:
    """What the launcher of the unit's source claims for the entries that it launches from it, in `ALL`."""
    module = f"cnnops.cuda.{Path(unit.source).stem}"
    known = importlib.util.find_spec(module) is not None
    stated = getattr(importlib.import_module(module), "ARCHITECTURES", ALL) if known else ALL
    if isinstance(stated, Mapping):
        claims = [stated.get(entry, ALL) for entry in units()[unit][1]]
        return tuple(arch for arch in ALL if any(arch in claim for claim in claims))
    return tuple(arch for arch in ALL if arch in stated)


# ---- what they cost --------------------------------------------------------------------------------------


class Cell(NamedTuple):
    """What one entry takes on one architecture; bytes but for the registers."""

    registers: int
    spill: int
    stack: int
    shared: int

    @classmethod
    def read(cls, text: str) -> Cell:
        numbers = [int(n) for n in text.split(":")]
        return cls(*numbers, *(0,) * (4 - len(numbers)))

    def __str__(self) -> str:
        return ":".join(map(str, self)).removesuffix(":0").removesuffix(":0").removesuffix(":0")


def compiled(unit: Unit, arch: str) -> dict[str, Cell]:
    """Each entry's cell. Raises CompileError where NVRTC refuses the unit."""
    kernel, launched = units()[unit]
    _, log = jit.compile_cubin(kernel.source, kernel.constants, arch)
    cells = {
        e.entry: Cell(
            e.registers, e.spill_store_bytes + e.spill_load_bytes, e.stack_bytes, e.shared_bytes
        )
        for e in jit.resources(log)
    }
    assert launched <= set(cells), f"{kernel} for sm_{arch}:\n{log}"
    return cells


@dataclass
class Table:
    """Cells by unit, entry and architecture; `nvrtc` is the version that they are of."""

    nvrtc: tuple[int, int]
    digests: dict[str, str] = field(default_factory=dict)
    cells: dict[Unit, dict[str, dict[str, Cell]]] = field(default_factory=dict)

    def put(self, unit: Unit, arch: str, cells: Mapping[str, Cell]) -> None:
        for entry, cell in cells.items():
            self.cells.setdefault(unit, {}).setdefault(entry, {})[arch] = cell

    def recorded(self, arch: str) -> list[Unit]:
        return [u for u, rows in self.cells.items() if any(arch in row for row in rows.values())]

    def is_of(self, source: str) -> bool:
        """Whether the table was made of just this source."""
        return self.digests.get(source) == digest(source)

    def knows(self, source: str) -> bool:
        """Whether it was, too, by this NVRTC."""
        return self.nvrtc == jit.nvrtc_version() and self.is_of(source)

    def sample(self, arch: str) -> list[Unit]:
        """The units that stand for all on `arch`."""
        kinds: dict[object, list[Unit]] = defaultdict(list)
        for unit, rows in self.cells.items():
            if arch in architectures(unit):
                element = next((w for w in unit.variant.split() if w.startswith("ELEMENT=")), "")
                kinds[unit.source, element, tuple(sorted(rows))].append(unit)

        def registers(unit: Unit) -> int:
            return max(next(iter(row.values())).registers for row in self.cells[unit].values())

        return sorted(max(kind, key=registers) for kind in kinds.values())


def digest(source: str) -> str:
    """Of a source and the headers that it includes."""
    return digest_of(files=sources(kernels_dir() / source, kernels_dir()))[:16]


def read() -> Table:
    with TABLE.open(newline="") as file:
        major, minor = file.readline().split()[2].rstrip(";").split(".")
        lines = file.readlines()
        heads = [line.split() for line in lines if line.startswith("#")]
        table = Table((int(major), int(minor)), {h[1].rstrip(":"): h[-1] for h in heads})
        for row in csv.DictReader(line for line in lines if not line.startswith("#")):
            unit = Unit(row["source"], row["constants"])
            table.cells.setdefault(unit, {})[row["entry"]] = {
                arch: Cell.read(row[arch]) for arch in ALL if row[arch]
            }
    return table


def write(table: Table) -> None:
    counts = defaultdict(int)
    for unit in table.cells:
        counts[unit.source] += 1
    with TABLE.open("w", newline="") as file:
        print(
            "# NVRTC {}.{}; written by `{}`; a cell is registers:spill:stack:shared".format(
                *table.nvrtc, COMMAND
            ),
            file=file,
        )
        for source, count in sorted(counts.items()):
            print(f"# {source}: {count} sets of constants, of {digest(source)}", file=file)
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["source", "entry", *ALL, "constants"])
        lines = (
            [unit.source, entry, *(row.get(arch, "") for arch in ALL), unit.variant]
            for unit, entries in table.cells.items()
            for entry, row in entries.items()
        )
        rows.writerows(sorted(lines, key=lambda line: (line[0], line[1], line[-1])))


# ---- comparing and recording -----------------------------------------------------------------------------


def differences(table: Table, unit: Unit, arch: str, cells: Mapping[str, Cell]) -> list[str]:
    """What is worse than in the table, or not in it, a line each."""
    wrong = []
    rows = table.cells.get(unit, {})
    for entry in sorted({*cells, *rows}):
        what = f"{unit.source}:{entry} [{unit.variant}] for sm_{arch}"
        before, now = rows.get(entry, {}).get(arch), cells.get(entry)
        if before is None or now is None:
            wrong.append(
                f"{what}: {'not in the table' if now else 'in the table, but no longer compiled'}"
            )
            continue
        if now.spill > before.spill or now.stack > before.stack:
            wrong.append(
                f"{what}: expected at most {before.spill} bytes spilled and {before.stack} of stack, got "
                f"{now.spill} and {now.stack}"
            )
        most = before.registers + REGISTERS_MAY_GROW
        if table.nvrtc == jit.nvrtc_version() and now.registers > most:
            wrong.append(f"{what}: expected at most {most} registers, got {now.registers}")
    return wrong


def record() -> None:
    """Compile what the table does not know and rewrite it. After an edit of common.cuh that is everything:
    some fifteen minutes of CPU time, on all cores.
    """
    table, known = Table(jit.nvrtc_version()), read()
    same = {source for source in known.digests if known.knows(source)}
    pool = ThreadPoolExecutor(os.cpu_count())

    def cells_of(unit: Unit, arch: str) -> dict[str, Cell]:
        rows = known.cells.get(unit, {}) if unit.source in same else {}
        found = {entry: row[arch] for entry, row in rows.items() if arch in row}
        return found if found and set(found) == set(rows) else compiled(unit, arch)

    for arch in (*FULL, *SAMPLED):
        every = arch in FULL
        chosen = [u for u in units() if arch in architectures(u)] if every else table.sample(arch)
        print(f"sm_{arch}: {len(chosen)} sets of constants", flush=True)
        for unit, cells in zip(chosen, pool.map(cells_of, chosen, repeat(arch)), strict=True):
            table.put(unit, arch, cells)
    write(table)
    spilling = [
        f"  {unit.source}:{entry} for sm_{arch}: {cell.spill} and {cell.stack} bytes [{unit.variant}]"
        for unit, rows in table.cells.items()
        for entry, row in rows.items()
        for arch, cell in row.items()
        if cell.spill or cell.stack
    ]
    print(
        f"{TABLE.name}: {TABLE.stat().st_size >> 10} KiB, {len(spilling)} entries spill or have a stack"
    )
    print(*spilling, sep="\n")


if __name__ == "__main__":
    if sys.argv[1:] != ["record"]:
        raise SystemExit(f"expected `{COMMAND}`, got {' '.join(sys.argv[1:]) or 'no command'}")
    record()

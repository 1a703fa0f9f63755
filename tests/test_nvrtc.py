"""Every kernel compiles for every GPU that it is for, and costs no more than tests/nvrtc_resources.csv says.

tests/nvrtc.py tells how kernels are found, which of them are compiled for which architecture, and what the
table's columns are. Registers, spills and stack must not grow unnoticed: whoever means a change rewrites the
table, and the difference is there to be read.
"""

from __future__ import annotations

import ctypes
import shutil
from pathlib import Path

import pytest
import torch
from cases import needs_emulator

pytest.importorskip("cuda.bindings.nvrtc", reason="NVRTC is missing: pip install 'cnnops[test]'")

import nvrtc
from nvrtc import Cell, Table, Unit

from cnnops.cuda import conv_direct, conv_igemm, emulate, jit
from cnnops.cuda.kernel import ACCUMULATOR, ELEMENT, kernels_dir, launch_of
from cnnops.registry import GPU, ROWS

TABLE = nvrtc.read()
SOURCES = sorted({unit.source for unit in TABLE.cells})
REWRITE = f"if that is meant, run: {nvrtc.COMMAND}"


def test_every_algorithm_is_in_the_table() -> None:
    assert {f"{row.algorithm}.cu" for row in ROWS if row.engines == GPU} <= {*SOURCES}


def test_the_table_lists_what_is_compiled() -> None:
    units = nvrtc.units()
    wrong = [f"not in the table: {unit}" for unit in units if unit not in TABLE.cells]
    wrong += [f"in the table, but nobody's: {unit}" for unit in TABLE.cells if unit not in units]
    if not wrong:
        for arch in nvrtc.ALL:
            wanted = {u for u in units if arch in nvrtc.architectures(u)}
            if arch in nvrtc.SAMPLED:
                wanted = set(TABLE.sample(arch))
            recorded = set(TABLE.recorded(arch))
            wrong += [f"no cell for sm_{arch}: {unit}" for unit in wanted - recorded]
            wrong += [f"unused cell for sm_{arch}: {unit}" for unit in recorded - wanted]
    assert not wrong, "\n".join([*wrong, REWRITE])


def test_registers_are_compared_where_nvrtc_is_the_tables() -> None:
    here = jit.nvrtc_version()
    if here != TABLE.nvrtc:
        pytest.skip(
            "registers are compared under NVRTC {}.{} only, this is {}.{}: just spills and stack are".format(
                *TABLE.nvrtc, *here
            )
        )
    unit = next(iter(TABLE.cells))
    (entry, row) = next(iter(TABLE.cells[unit].items()))
    more = row["80"]._replace(registers=row["80"].registers + nvrtc.REGISTERS_MAY_GROW + 1)
    others = {name: other["80"] for name, other in TABLE.cells[unit].items()}
    assert nvrtc.differences(TABLE, unit, "80", others) == []
    (told,) = nvrtc.differences(TABLE, unit, "80", {**others, entry: more})
    assert "registers, got" in told


@pytest.mark.slow
@pytest.mark.parametrize("arch", nvrtc.ALL)
@pytest.mark.parametrize("source", SOURCES)
def test_compiles_within_its_resources(source: str, arch: str) -> None:
    if arch not in nvrtc.supported():
        pytest.skip(f"NVRTC {jit.nvrtc_version()} does not know sm_{arch}")
    recorded = [unit for unit in TABLE.recorded(arch) if unit.source == source]
    if TABLE.is_of(source) and arch in nvrtc.SAMPLED:  # in turns
        recorded = recorded[nvrtc.SAMPLED.index(arch) :: len(nvrtc.SAMPLED)] or recorded[:1]
    elif TABLE.is_of(source):
        turn = nvrtc.FULL.index(arch)
        chosen = [unit for unit in TABLE.sample(arch) if unit.source == source]
        chosen = chosen[turn :: len(nvrtc.FULL)] or chosen
        recorded = [u for i, u in enumerate(recorded) if u in chosen or i % nvrtc.ONE_IN == 0]
    if TABLE.knows(source):  # the very same code: a few units show that it is so here, too
        recorded = (
            recorded[nvrtc.ALL.index(arch) % nvrtc.KNOWN_ONE_IN :: nvrtc.KNOWN_ONE_IN]
            or recorded[:1]
        )
    assert recorded or not any(
        arch in nvrtc.architectures(unit) for unit in nvrtc.units() if unit.source == source
    ), f"no row of tests/cases reaches {source}"
    wrong = []
    for unit in recorded:
        if unit in nvrtc.units():  # else test_the_table_lists_what_is_compiled tells
            wrong += nvrtc.differences(TABLE, unit, arch, nvrtc.compiled(unit, arch))
    assert not wrong, "\n".join([*wrong, REWRITE])


def test_every_tile_is_compiled() -> None:
    """Of conv_direct's tiles, each in each type: `nvrtc.CONVOLUTIONS` must have a problem that picks it. And
    conv_igemm's, which are forced.
    """
    wanted = {
        (ELEMENT[dtype], tile.block_m, tile.block_n, tile.block_k)
        for dtype in ELEMENT
        for tile in conv_direct.TILES[ACCUMULATOR[dtype]]
    }
    wanted |= {
        (ELEMENT[dtype], tile.block_m, tile.block_n, conv_igemm.STEP_BYTES // dtype.itemsize)
        for dtype in conv_igemm.DTYPES
        for tile in conv_igemm.TILES
    }
    for kernel, _ in nvrtc.units().values():
        constants = dict(kernel.constants)
        names = ("ELEMENT", "BLOCK_M", "BLOCK_N", "BLOCK_K")
        wanted.discard(tuple(constants.get(name) for name in names))
    assert not wanted


def test_every_type_and_wide_offsets_are_compiled() -> None:
    for source in SOURCES:
        variants = [unit.variant for unit in nvrtc.units() if unit.source == source]
        known = (
            (torch.float32, torch.float16, torch.bfloat16) if "igemm" in source else tuple(ELEMENT)
        )
        for element in (ELEMENT[dtype] for dtype in known):
            assert any(f"ELEMENT={element}" in v for v in variants), (source, element)
        wide = any("WIDE=1" in v or "INDEX=long long" in v for v in variants)
        assert wide or source == "conv_im2col.cu", (
            source
        )  # whose problems are small by its own `supports`


# ---- the gate itself -------------------------------------------------------------------------------------


def test_differences_are_told() -> None:
    unit, one = Unit("a.cu", "ELEMENT=float"), Cell(40, 0, 0, 512)
    table = Table(jit.nvrtc_version(), {}, {unit: {"run": {"80": one}}})

    def told(cells: dict[str, Cell]) -> str:
        return "\n".join(nvrtc.differences(table, unit, "80", cells))

    assert told({"run": one}) == ""
    assert told({"run": one._replace(registers=48)}) == ""
    assert "expected at most 48 registers, got 49" in told({"run": one._replace(registers=49)})
    assert (
        "a.cu:run [ELEMENT=float] for sm_80: expected at most 0 bytes spilled and 0 of stack, got 4 and 0"
        in (told({"run": one._replace(spill=4)}))
    )
    assert "got 0 and 8" in told({"run": one._replace(stack=8)})
    assert "a.cu:walk [ELEMENT=float] for sm_80: not in the table" in told(
        {"run": one, "walk": one}
    )
    assert "no longer compiled" in told({})
    table.nvrtc = (0, 0)  # of another NVRTC
    assert told({"run": one._replace(registers=255)}) == ""
    assert "got 4 and 0" in told({"run": one._replace(registers=255, spill=4)})


def test_an_edited_source_is_not_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A digest is of the source and its headers: an edit of either compiles everything again."""
    table = Table(jit.nvrtc_version(), {source: nvrtc.digest(source) for source in SOURCES})
    assert all(table.knows(source) for source in SOURCES) and not table.knows("common.cuh")
    shutil.copytree(kernels_dir(), tmp_path / "kernels")
    monkeypatch.setattr(nvrtc, "kernels_dir", lambda: tmp_path / "kernels")
    assert all(table.knows(source) for source in SOURCES)
    with (tmp_path / "kernels" / "common.cuh").open("a") as header:
        header.write("// changed\n")
    assert not any(table.knows(source) for source in SOURCES)
    monkeypatch.undo()
    table.nvrtc = (0, 0)
    assert not any(table.knows(source) for source in SOURCES)


@pytest.mark.parametrize("cell", [(64, 0, 0, 0), (96, 0, 0, 512), (255, 16, 0, 0), (10, 0, 8, 0)])
def test_cells_are_read_as_they_were_written(cell: tuple[int, int, int, int]) -> None:
    assert Cell.read(str(Cell(*cell))) == cell
    assert str(Cell(64, 0, 0, 0)) == "64"


def test_the_table_is_as_record_writes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = nvrtc.TABLE.read_text()
    monkeypatch.setattr(nvrtc, "TABLE", tmp_path / "table.csv")
    nvrtc.write(TABLE)

    def content(text: str) -> list[str]:
        lines = text.splitlines()
        return [lines[0], *(line for line in lines if not line.startswith("#"))]

    assert content(nvrtc.TABLE.read_text()) == content(before)


class NoParams(ctypes.Structure):
    _fields_ = []


@needs_emulator
def test_a_forgotten_header_is_found(tmp_path: Path) -> None:
    """What the emulator's own header happens to define hides that a kernel includes no file that does."""
    file = tmp_path / "copy.cu"
    file.write_text(
        'extern "C" __global__ void copy(const float* x, float* y) {\n'
        "  y[threadIdx.x] = x[threadIdx.x] * EMULATOR;\n}\n"
    )
    plan = launch_of(
        str(file), "copy", {}, NoParams(), grid=[1], block=[4], inputs=["x"], outputs=["y"]
    )
    x, y = torch.arange(4.0), torch.empty(4)
    emulate.execute(plan, [x, y])
    assert torch.equal(x, y)
    with pytest.raises(jit.CompileError, match=r"copy\.cu\(2\).*EMULATOR"):
        jit.compile_cubin(str(file), plan.kernel.constants, "80")

"""Compiled code of the CPU engine on disk: found again, made anew when anything it is made of has changed,
and never needed."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numba import njit

from cnnops.cache import DiskCache
from cnnops.cpu import code, conv, pool, task
from cnnops.cpu.task import Task, layout, unpack


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where entries are kept, in place of the user's."""
    task._drivers()  # they come from there
    place = tmp_path / "cache" / "cpu"
    monkeypatch.setattr(code, "_cache", DiskCache("cpu", ".o", place=lambda: place))
    return place


def adding(term: int) -> Task:
    """Writes 1000 + term."""
    args = layout("int64*")

    def test_adding(address: int, index: int, scratch: int) -> None:
        (to,) = unpack(address, args)
        to[0] = 1000 + term

    return Task(test_adding, args)


def result(kernel: Task) -> int:
    place = np.zeros(1, np.int64)
    kernel.run(1, 0, place.ctypes.data)
    return int(place[0])


def entries(folder: Path) -> list[Path]:
    return sorted(folder.glob("test_adding-*.o"))


# ---- what is kept ----------------------------------------------------------------------------------------


def test_entries_are_found_again(folder: Path) -> None:
    first, again, other = adding(1), adding(1), adding(2)
    assert [first.from_cache, again.from_cache, other.from_cache] == [False, True, False]
    assert [result(kernel) for kernel in (first, again, other)] == [1001, 1001, 1002]
    assert len(entries(folder)) == 2
    assert code.stats() == {"compiled": 2, "loaded_from_cache": 1}


PROGRAM = """
import sys
import cnnops.cpu
assert "numba" not in sys.modules and cnnops.cpu.stats() == {"compiled": 0, "loaded_from_cache": 0}
import torch
from cnnops.cpu import code, pool
from cnnops.shapes import PoolShape
x = torch.randn(2, 64, 64, 64)
shape = PoolShape.of(x.shape, 2)
y, offsets = torch.empty(shape.y_size), torch.empty(shape.y_size, dtype=torch.uint8)
pool.max_pool_fwd(shape, x, y, offsets)
assert torch.equal(y, torch.nn.functional.max_pool2d(x, 2))
print(*cnnops.cpu.stats().values(), code.cache_path())
"""


def run_program(**environment: str) -> tuple[int, int, Path]:
    """Functions compiled and found on disk by a process of its own, and where."""
    inherited = {name: value for name, value in os.environ.items() if name != "NUMBA_CACHE_DIR"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**inherited, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr
    compiled, found, place = done.stdout.split()
    return int(compiled), int(found), Path(place)


def test_second_process_compiles_nothing(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    compiled, found, place = run_program(CNNOPS_CACHE_DIR=str(kept), PYTHONHASHSEED="1")
    assert compiled > 0 and found == 0 and place == kept / "cpu"
    again = run_program(CNNOPS_CACHE_DIR=str(kept), PYTHONHASHSEED="2")
    assert again == (0, compiled, place)
    # numba's own setting wins, and another CPU's code is no good here.
    other = run_program(
        CNNOPS_CACHE_DIR=str(kept), NUMBA_CACHE_DIR=str(tmp_path / "numba"), NUMBA_OPT="2"
    )
    assert other == (compiled, 0, tmp_path / "numba" / "cnnops")


# ---- what decides an entry -------------------------------------------------------------------------------


def test_sources_are_what_a_module_imports() -> None:
    def names(module: object) -> set[str]:
        return {path.name for path in code.sources(Path(module.__file__))}

    assert {"conv.py", "simd.py", "task.py", "code.py", "epilogue.py", "shapes.py"} <= names(conv)
    assert {"pool.py", "vectors.py", "simd.py", "task.py"} <= names(pool)
    assert "pool.py" not in names(conv) and "conv.py" not in names(pool)
    here = {path.name for path in code.sources(Path(__file__))}
    assert {"test_cpu_code.py", "pool.py", "conv.py", "cache.py"} <= here


@pytest.mark.parametrize(
    "line",
    [
        "from cnnops.cpu.other import name",
        "from cnnops.cpu import (\n    more,\n    other as alias,\n)",
        "import os, cnnops.cpu.other as alias",
        "def f():\n    from cnnops.cpu import more, other",
    ],
)
def test_edits_of_imported_files_count(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(code, "_PACKAGE", tmp_path)
    folder = tmp_path / "cpu"
    folder.mkdir()
    for name, text in (
        ("kernel", line),
        ("other", "import cnnops.deep"),
        ("more", ""),
        ("not", ""),
    ):
        (folder / f"{name}.py").write_text(text)
    (tmp_path / "deep.py").write_text("")

    def digest() -> str:
        code.sources.cache_clear()
        return code._text_of.__wrapped__(folder / "kernel.py")

    try:
        seen = [digest()]
        for path in (folder / "kernel.py", folder / "other.py", tmp_path / "deep.py"):
            path.write_text(path.read_text() + "\n# another line\n")
            seen.append(digest())
        assert len(set(seen)) == 4
        (folder / "not.py").write_text("# nobody imports it")
        assert digest() == seen[-1]
    finally:
        code.sources.cache_clear()


def test_free_variables_count() -> None:
    def closed_over(*values: object) -> str:
        def kernel() -> object:
            return values

        return repr(code.describe(kernel))

    def tuple_of(value: object) -> tuple[object, ...]:
        return (value,)

    def named(text: str) -> Callable[[], str]:
        return lambda: text

    seen = [
        closed_over(value)
        for value in (1, 2, 1.0, True, None, "1", b"1", (1, 2), (1, (2,)), np.float32, np.float64)
    ]
    seen += [closed_over(array) for array in (np.zeros(2), np.ones(2), np.ones((1, 2)), np.int8(1))]
    seen += [closed_over(wrap(named(text))) for text in ("a", "b") for wrap in (tuple_of, njit)]
    assert len(set(seen)) == len(seen)
    assert closed_over(1) == closed_over(1) and closed_over(named("a")) == closed_over(named("a"))
    assert "0x" not in "".join(seen)  # addresses differ from process to process
    with pytest.raises(TypeError, match="a kernel's free variable: expected .*, got <object"):
        closed_over(object())


def test_functions_without_a_file_are_not_kept(folder: Path) -> None:
    """Of two that are typed at a prompt nothing tells one from the other."""
    for term in (1, 2):
        names = {"unpack": unpack, "args": layout("int64*"), "TERM": term}
        text = "def test_adding(address, index, scratch):\n    unpack(address, args)[0][0] = 1000 + TERM"
        exec(text, names)
        made = Task(names["test_adding"], names["args"])
        assert result(made) == 1000 + term and not made.from_cache
    assert not entries(folder)


# ---- disks that fail -------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "not an object"])
def test_damaged_entries_are_made_anew(damage: str, folder: Path) -> None:
    adding(1)
    (path,) = entries(folder)
    whole = path.read_bytes()
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    path.write_bytes(
        {"cut": whole[:-7], "flipped": flipped, "empty": b"", "not an object": b"hello"}[damage]
    )
    made = adding(1)
    assert result(made) == 1001 and not made.from_cache
    assert adding(1).from_cache


def test_a_file_in_the_place_of_the_folder_costs_only_time(folder: Path) -> None:
    folder.parent.mkdir()
    folder.touch()
    assert not adding(7).from_cache
    assert result(adding(7)) == 1007


def test_a_folder_that_cannot_be_written_is_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where an administrator has compiled everything for all users."""
    adding(1)

    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, "not yours")

    monkeypatch.setattr(os, "access", lambda *_: False)
    monkeypatch.setattr(os, "utime", refuse)
    found, made = adding(1), adding(2)
    assert found.from_cache and not made.from_cache
    assert result(found) == 1001 and result(made) == 1002
    assert len(entries(folder)) == 1


@pytest.mark.parametrize("call", ["write_bytes", "open"])
def test_a_full_disk_costs_only_time(
    call: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, call, refuse)
        made = adding(1)
    assert result(made) == 1001 and not made.from_cache
    assert not entries(folder) and not list(folder.glob(".building-*"))
    assert code.stats()["compiled"] == 1

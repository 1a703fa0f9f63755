"""Machine code of numba functions, kept on disk.

numba's own cache costs 10 to 20 ms a function: it brings back a library that others could be linked with. A
kernel is called by its address alone, so what is kept here is the object file, and LLVM has it ready in less
than a millisecond.

An entry's name is a digest of all that decides its content: the text of the file that the function is in and
of all files of this package that this one imports, directly or not; the values that the function is closed
over; the compiler and the CPU.
"""

# mypy: allow-untyped-defs, allow-untyped-calls
from __future__ import annotations

import os
import platform
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from inspect import unwrap
from pathlib import Path
from types import FunctionType
from typing import Any

import llvmlite
import llvmlite.binding as llvm
import numba
import numpy as np
from numba import types
from numba.core.registry import cpu_target
from numba.core.runtime import rtsys

from cnnops.cache import DiskCache, cache_dir, digest_of
from cnnops.cpu import compiler

_PACKAGE = Path(__file__).resolve().parents[1]
_IMPORT = re.compile(
    r"^[ \t]*(?:from[ \t]+(cnnops[\w.]*)[ \t]+import[ \t]+(\([^)]*\)|[^\n]*)|import[ \t]+([^\n]*))",
    re.MULTILINE,
)


@dataclass(frozen=True)
class Compiled:
    """Where a function is in memory, and whether its code was found on disk."""

    address: int
    from_cache: bool


# ---- what decides the code of a function ------------------------------------------------------------------


def _module(name: str) -> Path | None:
    """The file of a module of this package."""
    path = _PACKAGE.joinpath(*name.split(".")[1:])
    for file in (path.with_suffix(".py"), path / "__init__.py"):
        if file.is_file():
            return file
    return None


def _imports(text: str) -> set[Path]:
    """The files of this package that a module with this text imports."""
    found = set()
    for package, names, modules in _IMPORT.findall(text):
        if package:
            for name in re.findall(r"\w+", names):
                found.add(_module(f"{package}.{name}") or _module(package))
        else:
            found |= {_module(name) for name in re.findall(r"\bcnnops\.[\w.]+", modules)}
    return {path for path in found if path is not None}


@lru_cache(None)
def sources(path: Path) -> tuple[Path, ...]:
    """`path` and all files of this package that it imports, directly or not, in a fixed order."""
    found: set[Path] = set()
    waiting = {path}
    while waiting:
        file = waiting.pop()
        found.add(file)
        waiting |= _imports(file.read_text()) - found
    return tuple(sorted(found))


@lru_cache(None)
def _text_of(path: Path) -> str:
    return digest_of(files=sources(path))


def describe(value: Any) -> object:
    """What a function is closed over, as something whose repr is the same in every process."""
    if value is None or isinstance(value, (bool, int, float, str, bytes, types.Type)):
        return value
    if isinstance(value, type):
        return value.__module__, value.__qualname__
    if isinstance(value, (tuple, list)):
        return type(value).__name__, *map(describe, value)
    if isinstance(value, (np.ndarray, np.generic)):
        return type(value).__name__, value.dtype.str, value.shape, value.tobytes()
    function = unwrap(value)  # of what numba has made of it: njit's dispatcher, or an intrinsic
    if isinstance(function, FunctionType):
        code = function.__code__
        cells = [describe(cell.cell_contents) for cell in function.__closure__ or ()]
        at = (function.__module__, function.__qualname__, code.co_firstlineno, code.co_code)
        return *at, _text_of(Path(code.co_filename)), cells
    raise TypeError(
        f"a kernel's free variable: expected a number, name, type, array, function or tuple of such, got "
        f"{value!r}"
    )


@lru_cache(None)
def _toolchain() -> tuple[object, ...]:
    cpu = (
        llvm.get_process_triple(),
        llvm.get_host_cpu_name(),
        llvm.get_host_cpu_features().flatten(),
    )
    # What numba is told about code, such as NUMBA_OPT or NUMBA_CPU_NAME.
    told = sorted(pair for pair in os.environ.items() if pair[0].startswith("NUMBA_"))
    told = [pair for pair in told if pair[0] not in ("NUMBA_CACHE_DIR", "NUMBA_NUM_THREADS")]
    return platform.python_version(), numba.__version__, llvmlite.__version__, *cpu, *told


# ---- compiling and loading --------------------------------------------------------------------------------


def _folder() -> Path:
    """Where numba's users have asked for compiled code to be kept, else a folder of the cache directory."""
    named = os.environ.get("NUMBA_CACHE_DIR")
    return Path(named) / "cnnops" if named else cache_dir() / "cpu"


_cache = DiskCache("cpu", ".o", 256 << 20, _folder)


@lru_cache(None)
def _context() -> Any:
    """numba's target; it also tells LLVM where functions of Python's and numba's are that code may call."""
    context = cpu_target.target_context
    rtsys.initialize(context)
    return context


def _object_file(function: Callable[..., None], arguments: int) -> bytes:
    """The name of the compiled function, a line feed, and the object file that it is in."""
    name, binary = compiler.kernel(function, types.void(*(types.int64,) * arguments))
    return b"\n".join((name.encode(), binary))


_engines: list[Any] = []
"""They own the code."""


def _load(content: bytes) -> int:
    _context()
    name, _, binary = content.partition(b"\n")
    # An engine for each: other processes have given other functions the same name.
    machine = llvm.Target.from_default_triple().create_target_machine(jit=True)
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
    engine.add_object_file(llvm.ObjectFileRef.from_data(binary))
    engine.finalize_object()
    _engines.append(engine)
    return int(engine.get_function_address(name.decode()))


def compiled(function: Callable[..., None], arguments: int) -> Compiled:
    """`function` of so many int64, which returns nothing, as machine code."""
    file = Path(function.__code__.co_filename)
    if not file.is_file():  # typed at a prompt: nothing tells one version from another
        return Compiled(_load(_object_file(function, arguments)), False)
    digest = digest_of(arguments, describe(function), _toolchain())
    name = f"{function.__name__.strip('_')}-{digest}"
    content, found = _cache.kept(name, lambda: _object_file(function, arguments))
    return Compiled(_load(content), found)


def stats() -> dict[str, int]:
    """How many functions of this engine were compiled in this process, and how many came from the disk."""
    counts = _cache.stats()
    return {name: int(counts[name]) for name in ("compiled", "loaded_from_cache")}


def bytes_made() -> int:
    """Bytes of the entries that this process has written."""
    return int(_cache.stats()["bytes_written"])


def is_kept() -> bool:
    """Whether later processes find what this one compiles."""
    try:
        return _cache.folder() == _folder()
    except OSError:
        return False


def cache_path() -> Path:
    """The folder of compiled functions."""
    return _cache.folder()

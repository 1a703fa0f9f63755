"""How a kernel of this engine is compiled and run.

A `Task` is one serial numba function ``void(address, index, scratch)``: `address` leads to its arguments
(read with `unpack`), `index` says which part of the work to do, `scratch` is memory of its own. One driver,
compiled once, runs the indices of any task on all threads. So each kernel is compiled once, without numba's
parallel passes (they cost seconds), small problems run serially at no price, and the part a thread happens
to take never decides a result.

Compiled code is kept on disk by numba. Its key there is the function's own text and free variables; the
digest of this package's sources rides along in `layout`, so that an edit anywhere here reaches every kernel.
"""

# mypy: allow-untyped-defs, allow-untyped-calls
from __future__ import annotations

import ctypes
import hashlib
import os
import struct
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from pathlib import Path

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import njit, prange, types
from numba.extending import intrinsic

SERIAL_WORK = 30_000
"""Below so many estimated cycles a second thread costs more than it brings."""

_NUMBA = {
    "int64": types.int64,
    "float32": types.float32,
    "float64": types.float64,
    "int32*": types.CPointer(types.int32),
    "int64*": types.CPointer(types.int64),
    "uint8*": types.CPointer(types.uint8),
    "float32*": types.CPointer(types.float32),
    "float64*": types.CPointer(types.float64),
}

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
"""Types that the engine takes; kernels read the first two, the others go through float32."""

NAME = {
    torch.float32: "float32",
    torch.float64: "float64",
    torch.uint8: "uint8",
    torch.int32: "int32",
}
"""Names of element types, as the kernels' factories and `unpack` take them."""


def supports(op: str, shape: object, dtype: torch.dtype) -> str | None:
    """None where `op` takes the problem, or the reason why it does not. Every shape is taken."""
    return (
        None
        if dtype in FLOATS
        else f"expected a floating-point dtype of 16 to 64 bits, got {dtype}"
    )


def native(t: torch.Tensor) -> torch.Tensor:
    """`t` in a type that kernels read: half types become float32."""
    return t if t.dtype in NAME else t.float()


def native_result(t: torch.Tensor, dtype: torch.dtype, contiguous: bool = False) -> torch.Tensor:
    """Where kernels write what becomes `t`: `t` itself, or a tensor of its own if the type (or, when
    asked for, an order of elements other than row-major) forbids that; the caller copies it to `t` then."""
    if t.dtype == dtype and (t.is_contiguous() or not contiguous):
        return t
    if contiguous:
        return torch.empty(t.shape, dtype=dtype)
    return torch.empty_like(t, dtype=dtype)


def strides(t: torch.Tensor) -> tuple[int, ...]:
    """Strides of ``N C *spatial`` as of ``N C D H W``, zero for axes that are not there."""
    n, c, *places = t.stride()
    return (n, c, *(0,) * (3 - len(places)), *places)


@lru_cache(None)
def _digest() -> str:
    sources = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]


def layout(fields: str) -> str:
    """`fields`, such as "float32* int64*3 float64" with ``*n`` for n in a row, as `unpack` takes them."""
    words = []
    for field in fields.split():
        name, star, count = field.rpartition("*")
        words += [name] * int(count) if star and count else [field]
    return " ".join([*words, f"#{_digest()}"])


def collapse(sizes: Sequence[int], strides: Sequence[int]) -> tuple[list[int], list[int]]:
    """The same nest of loops, neighbours made one where memory allows; as many axes, ones in front."""
    outer: list[tuple[int, int]] = []
    for size, stride in zip(sizes, strides, strict=True):
        if size == 1:
            continue
        if outer and outer[-1][1] == size * stride:
            outer[-1] = (outer[-1][0] * size, stride)
        else:
            outer.append((size, stride))
    filled = [(1, 0)] * (len(sizes) - len(outer)) + outer
    return [size for size, _ in filled], [stride for _, stride in filled]


def _fields(text: str) -> list[str]:
    return text.split()[:-1]


# ---- inside kernels ---------------------------------------------------------------------------------------


@intrinsic(prefer_literal=True)
def unpack(typing_context, address, layout):
    """The arguments behind `address`, one a field of `layout`, as a tuple."""
    members = types.Tuple([_NUMBA[name] for name in _fields(layout.literal_value)])

    def generate(context, builder, signature, values):
        fields = []
        for index, member in enumerate(members):
            kind = context.get_value_type(member)
            place = builder.add(values[0], ir.Constant(ir.IntType(64), 8 * index))
            fields.append(builder.load(builder.inttoptr(place, kind.as_pointer())))
        return context.make_tuple(builder, members, fields)

    return members(types.int64, layout), generate


@intrinsic(prefer_literal=True)
def pointer(typing_context, address, name):
    """`address` as a pointer to elements of the type called `name`."""
    result = _NUMBA[name.literal_value + "*"]

    def generate(context, builder, signature, values):
        return builder.inttoptr(values[0], context.get_value_type(result))

    return result(types.int64, name), generate


@intrinsic
def ahead(typing_context, base, count):
    """The pointer `count` elements behind `base`."""

    def generate(context, builder, signature, values):
        return builder.gep(values[0], [values[1]])

    return base(base, types.int64), generate


@intrinsic
def given(typing_context, base):
    """Whether the pointer is one: an argument passed as None is null."""

    def generate(context, builder, signature, values):
        return builder.icmp_unsigned("!=", values[0], ir.Constant(values[0].type, None))

    return types.boolean(base), generate


@njit(error_model="numpy", boundscheck=False)
def inside(first, step, size, count):
    """The i in ``0 … count`` with ``0 <= first + i * step < size``, as start and stop."""
    start = min(max((step - 1 - first) // step, 0), count)
    return start, max(min((size - first + step - 1) // step, count), start)


# ---- running ----------------------------------------------------------------------------------------------


@intrinsic
def _call(typing_context, function, address, index, scratch):
    i64 = ir.IntType(64)

    def generate(context, builder, signature, values):
        kind = ir.FunctionType(ir.VoidType(), [i64, i64, i64])
        builder.call(builder.inttoptr(values[0], kind.as_pointer()), values[1:])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.int64), generate


@intrinsic
def _take(typing_context, counter):
    """The counter's value before it is raised by one, as one atomic step."""

    def generate(context, builder, signature, values):
        i64 = ir.IntType(64)
        place = builder.inttoptr(values[0], i64.as_pointer())
        return builder.atomic_rmw("add", place, ir.Constant(i64, 1), "monotonic")

    return types.int64(types.int64), generate


@njit(nogil=True, cache=True)
def _serial(function, block, count, scratch_bytes):
    scratch = np.empty(scratch_bytes + 64, np.uint8)
    start = (scratch.ctypes.data + 63) // 64 * 64
    for index in range(count):
        _call(function, block + 8, index, start)
    return scratch[0]  # numba frees an array behind its last use: this is it


@njit(nogil=True, cache=True, parallel=True)
def _parallel(function, block, count, scratch_bytes, workers):
    # Workers take indices from a counter: a core that is busy elsewhere takes fewer.
    room = (scratch_bytes + 127) // 64 * 64
    scratch = np.empty(room * workers + 64, np.uint8)
    start = (scratch.ctypes.data + 63) // 64 * 64
    for worker in prange(workers):
        index = _take(block)
        while index < count:
            _call(function, block + 8, index, start + worker * room)
            index = _take(block)
    return scratch[0]


_forked = False
"""True in a forked child: OpenMP threads do not survive a fork, so a child computes serially."""


def _after_fork() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


class Task:
    """A kernel, compiled when made: its function and the layout of its arguments.

    Make one inside a factory under ``lru_cache`` whose parameters are the kernel's free variables.
    """

    made: list[Task] = []

    def __init__(self, function: Callable[[int, int, int], None], layout: str) -> None:
        words = _fields(layout)
        self.name = function.__name__
        compile = numba.cfunc(
            types.void(types.int64, types.int64, types.int64),
            nopython=True,
            cache=True,
            error_model="numpy",
            boundscheck=False,
            fastmath={"contract"},
        )
        self._kernel = compile(function)
        self._address: int = self._kernel.address
        # The driver's counter comes first, then one 8-byte slot an argument.
        self._struct = struct.Struct(
            "q" + "".join("d" if word == "float64" else "q" for word in words)
        )
        self._block = ctypes.c_char * self._struct.size
        Task.made.append(self)

    @property
    def from_cache(self) -> bool:
        return bool(self._kernel.cache_hits)

    def run(self, count: int, work: float, *values: float, scratch_bytes: int = 0) -> None:
        """Do the indices 0 to `count`; `work` estimates the cycles of all of them together.

        Pointers are passed as ints (`Tensor.data_ptr`, 0 for none); whoever calls keeps their owners alive.
        """
        block = self._block()
        self._struct.pack_into(block, 0, 0, *values)
        address = ctypes.addressof(block)
        workers = min(count, torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS)
        if workers < 2 or work < SERIAL_WORK or _forked:
            _serial(self._address, address, count, scratch_bytes)
            return
        former = numba.get_num_threads()
        if former > workers:
            numba.set_num_threads(workers)
        try:
            with _entry():
                _parallel(self._address, address, count, scratch_bytes, workers)
        finally:
            if former > workers:
                numba.set_num_threads(former)


_one_at_a_time = threading.Lock()


@lru_cache(None)
def _layer() -> str:
    """numba's threading layer, settled by a first parallel run."""
    with _one_at_a_time:
        _parallel(0, 0, 0, 0, 0)
        return str(numba.threading_layer())


def _entry() -> AbstractContextManager[object]:
    """What to hold while threads run: numba's own layer aborts the process when two callers enter it."""
    return _one_at_a_time if _layer() == "workqueue" else nullcontext()


def stats() -> dict[str, int]:
    """How many functions of this engine were compiled in this process, and how many came from the disk."""
    loaded = sum(task.from_cache for task in Task.made)
    compiled = len(Task.made) - loaded
    for driver in (_serial, _parallel):
        loaded += sum(driver.stats.cache_hits.values())
        compiled += sum(driver.stats.cache_misses.values())
    return {"compiled": compiled, "loaded_from_cache": loaded}


def cache_path() -> Path:
    """The folder of compiled functions: beside this file, or numba's own if that cannot be written."""
    return Path(_serial.stats.cache_path)

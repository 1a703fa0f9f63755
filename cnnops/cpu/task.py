"""How a kernel of this engine is compiled and run.

A `Task` is one serial numba function ``void(address, index, scratch)``: `address` leads to its arguments
(read with `unpack`), `index` says which part of the work to do, `scratch` is memory of its own. One driver,
`_drive`, does the indices of any task, on all threads where that pays. So each kernel is compiled once,
without numba's parallel passes (they cost seconds), small problems run serially at no price, and the part a
thread happens to take never decides a result.

Threads are those of torch's own OpenMP: `_drive` enters a parallel region of the very library that torch has
loaded, so there is one pool of threads, not two that take the cores from each other, and every thread that
calls has a team of its own, as it has for torch's operations. Compiled code is kept by `cnnops.cpu.code`.
"""

# mypy: allow-untyped-defs, allow-untyped-calls
from __future__ import annotations

import ctypes
import os
import struct
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from cnnops.cpu import code
from cnnops.cpu.compiler import routine
from cnnops.cpu.simd import LINE

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


def layout(fields: str) -> str:
    """`fields`, such as "float32* int64*3 float64" with ``*n`` for n in a row, as `unpack` takes them."""
    words = []
    for field in fields.split():
        name, star, count = field.rpartition("*")
        words += [name] * int(count) if star and count else [field]
    return " ".join(words)


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


# ---- inside kernels ---------------------------------------------------------------------------------------


@intrinsic(prefer_literal=True)
def unpack(typing_context, address, layout):
    """The arguments behind `address`, one a field of `layout`, as a tuple."""
    members = types.Tuple([_NUMBA[name] for name in layout.literal_value.split()])

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


@routine
def inside(first, step, size, count):
    """The i in ``0 … count`` with ``0 <= first + i * step < size``, as start and stop."""
    start = min(max((step - 1 - first) // step, 0), count)
    return start, max(min((size - first + step - 1) // step, count), start)


# ---- running ----------------------------------------------------------------------------------------------
# A driver is given one block of memory: the fields of _HEAD, then the kernel's arguments. The first field is
# the address of those of _TASK, which do not change between calls.

_HEAD = layout("int64*7")
_HEAD_FIELDS = "7q"
_HEAD_BYTES = struct.calcsize(_HEAD_FIELDS)
_WORKERS, _THREADS, _SCRATCH, _ROOM, _SHARES = range(2, 7)
_TASK = layout("int64*4")

# A call of a `Program` is its table, scratch and room, and then addresses. The table: how many tasks there
# are, and words in the longest block; then of each how many words its block has, how many of them are
# addresses, the block, and of each such word its place in the block, the number of its address, and how many
# bytes it lies behind that.

_CALL = "int64* int64 int64"
_CALL_BYTES = 24

MOST_SHARES = 64
"""Threads beyond so many begin in another's share."""

_JOB_WORDS = (1 + MOST_SHARES) * LINE // 8
"""A job, shared by the threads of a team: the block's address and the next thread's number; then, each in a
cache line of its own, how many indices of each share are taken."""


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


@intrinsic
def _new_job(typing_context, block):
    """The address of a job on the stack."""

    def generate(context, builder, signature, values):
        i64 = ir.IntType(64)
        job = cgutils.alloca_once(builder, ir.ArrayType(i64, _JOB_WORDS))
        for word, value in enumerate((values[0], ir.Constant(i64, 0))):
            builder.store(value, cgutils.gep_inbounds(builder, job, 0, word))
        for share in range(MOST_SHARES):
            taken = cgutils.gep_inbounds(builder, job, 0, (1 + share) * LINE // 8)
            builder.store(ir.Constant(i64, 0), taken)
        return builder.ptrtoint(job, i64)

    return types.int64(types.int64), generate


@intrinsic
def _new_words(typing_context, count):
    """The address of so many words on the stack."""

    def generate(context, builder, signature, values):
        i64 = ir.IntType(64)
        return builder.ptrtoint(builder.alloca(i64, values[0]), i64)

    return types.int64(types.int64), generate


@intrinsic
def _parallel_region(typing_context, enter, team, job, threads):
    """``GOMP_parallel(team, job, threads, 0)``: every thread of the team calls ``team(job)``."""
    i64, i32 = ir.IntType(64), ir.IntType(32)

    def generate(context, builder, signature, values):
        enter, team, job, threads = values
        kind = ir.FunctionType(ir.VoidType(), [i64, i64, i32, i32])
        count = builder.trunc(threads, i32)
        builder.call(builder.inttoptr(enter, kind.as_pointer()), [team, job, count, i32(0)])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.int64), generate


@intrinsic
def _number_from(typing_context, function):
    """What ``int function(void)`` at this address says."""
    i64 = ir.IntType(64)

    def generate(context, builder, signature, values):
        kind = ir.FunctionType(ir.IntType(32), [])
        number = builder.call(builder.inttoptr(values[0], kind.as_pointer()), [])
        return builder.sext(number, i64)

    return types.int64(types.int64), generate


def _team(job: int) -> None:
    """What every thread of a team does: take the indices of its own share one by one, the same in every run,
    so that it finds in its core's cache what it wrote there; then what others have not yet come to, so that a
    core that is busy elsewhere does less. A team may be larger than the workers asked for, or smaller.
    """
    block = pointer(job, "int64")[0]
    task, count, workers, _, scratch, room, shares = unpack(block, _HEAD)
    kernel, _, _, thread_number = unpack(task, _TASK)
    number = _number_from(thread_number) if thread_number else _take(job + 8)
    if number < workers:
        for turn in range(shares):
            share = (number + turn) % shares
            first, taken = count * share // shares, job + (1 + share) * LINE
            stop = count * (share + 1) // shares
            index = first + _take(taken)
            while index < stop:
                _call(kernel, block + _HEAD_BYTES, index, scratch + number * room)
                index = first + _take(taken)


@routine
def _drive_one(block):
    task, count, workers, threads, scratch, _, _ = unpack(block, _HEAD)
    kernel, enter, team, _ = unpack(task, _TASK)
    if workers < 2:
        for index in range(count):
            _call(kernel, block + _HEAD_BYTES, index, scratch)
    else:
        _parallel_region(enter, team, _new_job(block), threads)


def _drive(block: int) -> None:
    _drive_one(block)


def _drive_all(call: int) -> None:
    """Drive the tasks of a `Program` in turn: each one's block is copied, gets addresses, and is driven."""
    table, scratch, room = unpack(call, _CALL)
    addresses = pointer(call + _CALL_BYTES, "int64")
    block = _new_words(table[1])
    words = pointer(block, "int64")
    at = 2
    for _ in range(table[0]):
        size, places = table[at], table[at + 1]
        at += 2
        for word in range(size):
            words[word] = table[at + word]
        at += size
        for _ in range(places):
            words[table[at]] = addresses[table[at + 1]] + table[at + 2]
            at += 3
        words[_SCRATCH], words[_ROOM] = scratch, room
        _drive_one(block)


class _Drivers:
    """The compiled drivers, and the address of what they need of OpenMP: 0 where torch has none."""

    def __init__(self) -> None:
        # ctypes lets go of the GIL; one argument, of no declared type, is the fastest call that it has.
        team = code.compiled(_team, 1).address
        self.drive = ctypes.CFUNCTYPE(None)(code.compiled(_drive, 1).address)
        self.drive_all = ctypes.CFUNCTYPE(None)(code.compiled(_drive_all, 1).address)
        self.help = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(team)
        openmp = _openmp()
        self.openmp = bool(openmp)
        enter, thread_number = openmp or (0, 0)
        self.addresses = enter, team, thread_number


def _openmp() -> tuple[int, int] | None:
    """Where ``GOMP_parallel`` and ``omp_get_thread_num`` are in the OpenMP library that torch runs on.

    GCC's library has them, and LLVM's and Intel's have them for programs that GCC has compiled. None where
    torch has been built without OpenMP, or for a system whose compilers call it otherwise.
    """
    try:
        library = ctypes.CDLL(torch._C.__file__)  # what this links to is searched, too
        names = (library.GOMP_parallel, library.omp_get_thread_num)
    except (OSError, AttributeError, TypeError):
        return None
    enter, number = (ctypes.cast(name, ctypes.c_void_p).value or 0 for name in names)
    return (enter, number) if enter and number else None


_drivers = lru_cache(None)(_Drivers)


# ---- threads where torch has no OpenMP --------------------------------------------------------------------


@lru_cache(None)
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count() or 1, "cnnops")


def _drive_by_pool(block: bytes, workers: int) -> None:
    """As `_drive`, by Python's threads. The caller does whatever none of them has begun by then: it never
    waits for a thread that others keep busy."""
    address = ctypes.cast(ctypes.c_char_p(block), ctypes.c_void_p).value or 0
    job = (ctypes.c_int64 * _JOB_WORDS)(address)
    helpers: list[Future[None]] = []
    try:
        for _ in range(workers - 1):
            helpers.append(_pool().submit(_drivers().help, ctypes.addressof(job)))
    except RuntimeError:  # the interpreter is shutting down: no new threads
        pass
    _drivers().help(ctypes.addressof(job))
    for helper in helpers:
        if not helper.cancel():
            helper.result()


# ---- forked processes -------------------------------------------------------------------------------------

_forked = 0
"""In a forked process, the thread that the fork has left: the threads of its team are gone, and OpenMP would
wait for them. It computes serially; threads that are started later have teams of their own."""


def _after_fork() -> None:
    global _forked
    _forked = threading.get_ident()
    _pool.cache_clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


# ---- scratch ----------------------------------------------------------------------------------------------

PAGE = 4096
KEPT_BYTES = 8 * 1024 * 1024
"""Scratch of up to so many bytes a worker is kept between calls."""


class _Scratch(threading.local):
    """Memory for the workers of the calling thread's tasks, kept until the thread ends.

    Its pages are there when the next call comes: new ones cost more than many a kernel.
    """

    def __init__(self) -> None:
        self.pages: tuple[int, int, object] = 0, 0, None
        self.shared: tuple[int, int, object] = 0, 0, None


def _pages(size: int) -> tuple[int, int, object]:
    """New memory: its size, the address of the first page in it, and its owner."""
    memory = np.empty(size + PAGE, np.uint8)
    return size, -(-memory.ctypes.data // PAGE) * PAGE, memory


_scratch = _Scratch()


class Shared:
    """So many bytes, from a new page on, for what the tasks of an operation leave each other. They are
    another's with the next one that is made in this thread."""

    def __init__(self, size: int) -> None:
        memory = _scratch.shared
        if memory[0] < size:
            memory = _pages(size)
            if size <= KEPT_BYTES:
                _scratch.shared = memory
        self.size = size
        _, self.address, self._owner = memory


# ---- tasks ------------------------------------------------------------------------------------------------


class Table:
    """An array that kernels read, with its address."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array
        self.address: int = array.ctypes.data


Memory = torch.Tensor | Shared | Table | None


class At(NamedTuple):
    """The place so many bytes behind where `memory` begins."""

    memory: Memory
    offset: int


Value = float | Memory | At
"""What a kernel may be given: a number, or memory, by whose address it is told; 0 for None."""


def _address(value: Any) -> Any:
    """The address of memory; numbers as they are."""
    if value is None:
        return 0
    if isinstance(value, torch.Tensor):
        return value.data_ptr()
    if isinstance(value, At):
        return 0 if value.memory is None else _address(value.memory) + value.offset
    return value.address if isinstance(value, (Table, Shared)) else value


def _team_for(count: int, work: float) -> tuple[int, int]:
    """How many threads work, and how many there are to be."""
    if count < 2 or work < SERIAL_WORK or (_forked and _forked == threading.get_ident()):
        return 1, 1
    # All of torch's threads, also for fewer indices: libgomp ends threads that a smaller team has no place
    # for, and the next operation has to make them again.
    threads = torch.get_num_threads()
    return min(count, threads), threads


def _scratch_for(workers: int, scratch_bytes: int) -> tuple[int, int, object]:
    """Where scratch is, how many bytes each worker has of it, and its owner, to be kept while it is used."""
    if not scratch_bytes:
        return 0, 0, None
    room = (scratch_bytes + PAGE - 1) & -PAGE
    pages = _scratch.pages
    if pages[0] < room * workers:
        pages = _pages(room * workers)
        if room <= KEPT_BYTES:
            _scratch.pages = pages
    return pages[1], room, pages


@dataclass(frozen=True)
class Run:
    """How a task was run."""

    task: Task
    count: int
    work: float
    values: tuple[Value, ...]
    scratch_bytes: int


class _Watched(threading.local):
    """What `watched` found in this thread so far, None outside of it."""

    runs: list[Run] | None = None


_watched = _Watched()


@contextmanager
def watched() -> Iterator[list[Run]]:
    """Within the block, what this thread's tasks are run with is listed."""
    runs: list[Run] = []
    _watched.runs = runs
    try:
        yield runs
    finally:
        _watched.runs = None


class Task:
    """A kernel, compiled when made: its function and the layout of its arguments.

    Make one inside a factory under ``lru_cache`` whose parameters are the kernel's free variables. Indices
    are taken `in_order` where one may wait for those below it; see `cnnops.cpu.phases`.
    """

    def __init__(
        self, function: Callable[[int, int, int], None], layout: str, in_order: bool = False
    ) -> None:
        self.name = function.__name__
        kernel = code.compiled(function, 3)
        self.from_cache = kernel.from_cache
        fields = "".join("d" if word == "float64" else "q" for word in layout.split())
        self.pack = struct.Struct(_HEAD_FIELDS + fields).pack
        drivers = _drivers()
        self._drive, self.openmp = drivers.drive, drivers.openmp
        self._constants = (ctypes.c_int64 * 4)(kernel.address, *drivers.addresses)
        self.address = ctypes.addressof(self._constants)
        self.most_shares = 1 if in_order else MOST_SHARES

    def run(self, count: int, work: float, *values: Value, scratch_bytes: int = 0) -> None:
        """Do the indices 0 to `count`; `work` estimates the cycles of all of them together."""
        if _watched.runs is not None:
            _watched.runs.append(Run(self, count, work, values, scratch_bytes))
        workers, threads = _team_for(count, work)
        scratch, room, owner = _scratch_for(workers, scratch_bytes)
        shares = min(workers, self.most_shares)
        plain = [value if type(value) is int else _address(value) for value in values]
        block = self.pack(self.address, count, workers, threads, scratch, room, shares, *plain)
        self.start(block, workers)

    def start(self, block: bytes, workers: int) -> None:
        """Drive a block of memory."""
        if _only_compiling:
            return
        if workers < 2 or self.openmp:
            self._drive(block)
        else:
            _drive_by_pool(block, workers)


class Program:
    """What tasks are run with, one after the other, but for some addresses: these are given later."""

    def __init__(
        self, runs: Sequence[Run], places: Sequence[Mapping[int, tuple[int, int]]], addresses: int
    ) -> None:
        """`places` says of each run which of its values lie how many bytes behind which of the addresses."""
        self._blocks: list[tuple[Task, int, int]] = []
        table = [len(runs), 0]
        for run, behind in zip(runs, places, strict=True):
            workers, threads = _team_for(run.count, run.work)
            head = (run.task.address, run.count, workers, threads, 0, 0)
            plain = [0 if i in behind else _address(value) for i, value in enumerate(run.values)]
            block = run.task.pack(*head, min(workers, run.task.most_shares), *plain)
            words = len(block) // 8
            table += [words, len(behind)]
            self._blocks.append((run.task, len(table), workers))
            table += struct.unpack(f"{words}q", block)
            for index, (number, offset) in behind.items():
                table += [_HEAD_BYTES // 8 + index, number, offset]
            table[1] = max(table[1], words)
        self._table = (ctypes.c_int64 * len(table))(*table)
        # A forked process has one thread: see `_forked`.
        self._alone = (ctypes.c_int64 * len(table))(*table)
        for _, start, _ in self._blocks:
            for word in (_WORKERS, _THREADS, _SHARES):
                self._alone[start + word] = 1
        self._workers = max((workers for *_, workers in self._blocks), default=1)
        self._scratch_bytes = max((run.scratch_bytes for run in runs), default=0)
        self._drive = _drivers().drive_all
        self._openmp = all(run.task.openmp for run in runs)
        self._pack = struct.Struct(f"{_CALL_BYTES // 8 + addresses}q").pack
        # Tables and constants are to stay; what has an address of its own every time is not.
        self._kept = [
            [value for i, value in enumerate(run.values) if i not in behind]
            for run, behind in zip(runs, places, strict=True)
        ]

    def run(self, addresses: Sequence[int]) -> None:
        """Do what the runs did, with memory at these addresses."""
        if _only_compiling:
            return
        workers, table = self._workers, self._table
        if _forked and _forked == threading.get_ident():
            workers, table = 1, self._alone
        scratch, room, owner = _scratch_for(workers, self._scratch_bytes)
        if workers < 2 or self._openmp:
            self._drive(self._pack(ctypes.addressof(table), scratch, room, *addresses))
            return
        for each, start, workers in self._blocks:
            size, places = table[start - 2 : start]
            block = table[start : start + size]
            block[_SCRATCH], block[_ROOM] = scratch, room
            for at in range(start + size, start + size + 3 * places, 3):
                word, number, offset = table[at : at + 3]
                block[word] = addresses[number] + offset
            each.start(struct.pack(f"{size}q", *block), workers)


_only_compiling = False


@contextmanager
def compiling_only() -> Iterator[None]:
    """Within the block kernels are compiled, but none runs: results hold what memory held."""
    global _only_compiling
    former, _only_compiling = _only_compiling, True
    try:
        yield
    finally:
        _only_compiling = former

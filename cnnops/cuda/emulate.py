"""Run CUDA kernels on the CPU, checked: the same `.cu` files, compiled by g++, one fiber a CUDA thread.

`execute` takes what `cnnops.cuda.launch.launch` takes on a GPU. The runtime library in `kernels/emulator/`
sees every load and store, every barrier and every shuffle, and ends a launch that does what a GPU would not
forgive: an access outside of a tensor or shared variable, a write to an input, a misaligned vector, a data
race (in shared memory or, within and across blocks, in the outputs), a read of what nothing has written,
warps that part before a collective, a barrier that some threads miss, an asynchronous copy or multiplication
used before its wait, undefined C++ arithmetic, a stack that overflows, a loop that never ends. All of these
raise `KernelError` with the line of the kernel.

Kernels run on copies of their tensors: a launch that fails leaves the caller's tensors as they were.

    with emulate.schedule("all"): ...    every launch under three thread orders, results compared bitwise
    emulate.last_counters()              memory traffic and barriers of the last launch
    with emulate.profile() as launches:  sectors, bank conflicts and the like, line by line

What it does not model: rounding inside tensor cores, the weak ordering that `__threadfence` is for, and
communication between blocks of one launch, which it reports as a race, unless they are of one cluster.
"""

from __future__ import annotations

import ctypes
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import torch

from cnnops.cuda import tensor_map
from cnnops.cuda.cache import CompileError
from cnnops.cuda.emulator_build import (
    ANCHOR,
    MAX_SHARED,
    available,
    kernel_library,
    places,
    places_of_each,
    runtime_library,
    shared_variables,
    stats,
)
from cnnops.cuda.emulator_profile import Counters, Profile, TensorTraffic, Traffic, read_profile
from cnnops.cuda.kernel import Kernel, Launch

__all__ = [
    "CompileError", "Counters", "KernelError", "Profile", "TensorTraffic", "Traffic", "available", "execute",
    "last_counters", "profile", "schedule", "stats", "time_limit",
]  # fmt: skip

SCHEDULES = ("forward", "reverse", "random")
_WRAPPERS = re.compile(r"ptx\w*\.cuh")

_lock = threading.RLock()


class KernelError(RuntimeError):
    """A kernel did something wrong under the emulator.

    `places` are the (file, line) of the fault and of the calls that led to it, innermost first; `block` and
    `thread` are the indices of who did it. All are empty when the fault is the launch's, not a thread's.
    """

    def __init__(
        self,
        message: str,
        places: Sequence[tuple[str, int]] = (),
        block: tuple[int, ...] = (),
        thread: tuple[int, ...] = (),
    ) -> None:
        super().__init__(message)
        self.places, self.block, self.thread = tuple(places), block, thread


# ---- settings, process-wide ------------------------------------------------------------------------------


class _Settings:
    schedule = "forward"
    seed = 0
    seconds = 60.0
    profiles: list[Profile] | None = None


_settings = _Settings()


@contextmanager
def schedule(name: str, seed: int = 0) -> Iterator[None]:
    """Order of threads and blocks within the context: "forward", "reverse", "random" (by `seed`) or "all".

    "all" runs every launch under the three orders and raises KernelError unless all give the same bits.
    Raises ValueError for another name.
    """
    if name not in (*SCHEDULES, "all"):
        raise ValueError(f"schedule: expected one of {', '.join(SCHEDULES)} or all, got {name!r}")
    former = _settings.schedule, _settings.seed
    _settings.schedule, _settings.seed = name, seed
    try:
        yield
    finally:
        _settings.schedule, _settings.seed = former


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Within the context a block that takes this much CPU time is reported as an endless loop (60 s else).

    The blocks of a cluster share their time.
    """
    former, _settings.seconds = _settings.seconds, seconds
    try:
        yield
    finally:
        _settings.seconds = former


@contextmanager
def profile() -> Iterator[list[Profile]]:
    """Within the context launches are profiled: a `Profile` of each is added to the list that this yields.

    Profiled launches take several times as long. Under ``schedule("all")`` a launch adds three profiles.
    """
    former, _settings.profiles = _settings.profiles, []
    try:
        yield _settings.profiles
    finally:
        _settings.profiles = former


_counters = Counters(*[0] * len(Counters._fields))


def last_counters() -> Counters:
    """Counters of the launch that ended last in this process."""
    return _counters


# ---- structures shared with kernels/emulator/launch.cpp --------------------------------------------------


class _Place(ctypes.Structure):
    _fields_ = [("file", ctypes.c_char_p), ("line", ctypes.c_int)]


class _Report(ctypes.Structure):
    _fields_ = [
        ("message", ctypes.c_char * 2048),
        ("in_thread", ctypes.c_int32),
        ("block", ctypes.c_uint32 * 3),
        ("thread", ctypes.c_uint32 * 3),
        ("place", _Place),
        ("frame_count", ctypes.c_uint32),
        ("frames", ctypes.c_uint64 * 32),
        ("other", ctypes.c_uint64),
    ]


class _SharedVariable(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char_p),
        ("offset", ctypes.c_uint32),
        ("bytes", ctypes.c_uint32),
        ("dynamic", ctypes.c_uint32),
    ]


class _Tensor(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char_p),
        ("source", ctypes.c_void_p),
        ("result", ctypes.c_void_p),
        ("bytes", ctypes.c_uint64),
        ("log2_element", ctypes.c_uint32),
        ("phase", ctypes.c_uint32),
        ("role", ctypes.c_uint32),
        ("written", ctypes.c_void_p),
    ]


class _LaunchInfo(ctypes.Structure):
    _fields_ = [
        ("module", ctypes.c_void_p),
        ("entry", ctypes.c_void_p),
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("dynamic_shared", ctypes.c_uint32),
        ("max_threads", ctypes.c_uint32),
        ("schedule", ctypes.c_uint32),
        ("tensor_count", ctypes.c_uint32),
        ("seed", ctypes.c_uint64),
        ("seconds", ctypes.c_double),
        ("tensors", ctypes.POINTER(_Tensor)),
        ("tensor_maps", ctypes.POINTER(ctypes.c_void_p)),
        ("tensor_map_count", ctypes.c_uint64),
        ("params", ctypes.c_void_p),
        ("profile", ctypes.c_uint32),
        ("cluster", ctypes.c_uint32),
        ("declared_cluster", ctypes.c_uint32),
    ]


class _Counters(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in Counters._fields]


class _Parameter(ctypes.Structure):
    _fields_ = [
        ("bytes", ctypes.c_uint),
        ("pointee_bytes", ctypes.c_uint),
        ("pointee_const", ctypes.c_uint),
    ]


class _Signature(ctypes.Structure):
    _fields_ = [
        ("count", ctypes.c_uint),
        ("max_threads", ctypes.c_uint),
        ("cluster", ctypes.c_uint),
        ("parameter", _Parameter * 32),
    ]


# ---- loaded libraries ------------------------------------------------------------------------------------


@lru_cache(None)
def _runtime() -> tuple[ctypes.CDLL, Path]:
    path = runtime_library()
    library = ctypes.CDLL(str(path))
    library.emulator_register.restype = ctypes.c_void_p
    return library, path


@dataclass(frozen=True)
class _Module:
    library: ctypes.CDLL
    path: Path
    handle: int


@lru_cache(None)
def _module(source: str, constants: tuple[tuple[str, str | int], ...]) -> _Module:
    runtime, runtime_path = _runtime()
    path = kernel_library(source, constants, runtime_path)
    library = ctypes.CDLL(str(path))
    offsets = {name: offset for name, offset, _ in shared_variables(path)}
    variables = [
        _SharedVariable(name.encode(), offset, size, int(size == MAX_SHARED))
        for name, offset, size in shared_variables(path)
        if name != ANCHOR
    ]
    array = (_SharedVariable * len(variables))(*variables)
    anchor = ctypes.cast(library.emulator_module_anchor, ctypes.c_void_p)
    handle = runtime.emulator_register(anchor, offsets[ANCHOR], array, len(variables))
    return _Module(library, path, handle)


@dataclass(frozen=True)
class _Entry:
    module: _Module
    call: int
    signature: _Signature


@lru_cache(None)
def _entry(kernel: Kernel) -> _Entry:
    with _lock:
        module = _module(kernel.source, kernel.constants)
    try:
        call = getattr(module.library, f"emulator_call_{kernel.entry}")
        signature = _Signature.in_dll(module.library, f"emulator_signature_{kernel.entry}")
    except (AttributeError, ValueError):
        raise CompileError(
            f'{kernel}: expected an extern "C" __global__ function, got none'
        ) from None
    address = ctypes.cast(call, ctypes.c_void_p).value
    assert address is not None
    return _Entry(module, address, signature)


# ---- launching -------------------------------------------------------------------------------------------

_INPUT, _OUTPUT, _UPDATE = range(3)


@dataclass(frozen=True)
class _Argument:
    """One pointer parameter and the tensor behind it."""

    name: str
    role: int
    tensor: torch.Tensor | None

    @property
    def elements(self) -> int:
        """From the first element to the last one, gaps of a strided view included."""
        t = self.tensor
        if t is None or t.numel() == 0:
            return 0
        return 1 + sum((n - 1) * s for n, s in zip(t.size(), t.stride(), strict=True))

    def strided(self, flat: torch.Tensor) -> torch.Tensor:
        """The elements of the tensor, in `flat` which holds its whole range."""
        assert self.tensor is not None
        return flat.as_strided(self.tensor.size(), self.tensor.stride(), 0)


def _check_disjoint(plan: Launch, arguments: Sequence[_Argument]) -> None:
    """Nothing written may share memory with another tensor or itself: parameters are __restrict__."""
    dense = []
    for argument in arguments:
        tensor = argument.tensor
        if tensor is None:
            continue
        if argument.role != _INPUT and any(
            n > 1 and s == 0 for n, s in zip(tensor.size(), tensor.stride(), strict=True)
        ):
            raise ValueError(
                f"{plan.kernel}: {argument.name}: expected no expanded dimension in a result"
            )
        if tensor.numel() == argument.elements:
            begin = tensor.data_ptr()
            dense.append((begin, begin + tensor.numel() * tensor.element_size(), argument))
    for begin, end, argument in dense:
        for other_begin, other_end, other in dense:
            if (
                argument.role != _INPUT
                and other is not argument
                and begin < other_end
                and other_begin < end
            ):
                raise ValueError(f"{plan.kernel}: {argument.name} shares memory with {other.name}")


def _arguments(
    plan: Launch, entry: _Entry, tensors: Sequence[torch.Tensor | None]
) -> list[_Argument]:
    """Tensors with names and roles, checked against the plan and the entry's C++ signature."""
    names, signature = plan.names, entry.signature
    if len(tensors) != len(names):
        raise ValueError(
            f"{plan.kernel}: expected {len(names)} tensors ({', '.join(names)}), got {len(tensors)}"
        )
    roles = (
        [_INPUT] * len(plan.inputs) + [_OUTPUT] * len(plan.outputs) + [_UPDATE] * len(plan.updates)
    )
    has_params, maps = ctypes.sizeof(plan.params) > 0, len(plan.tensor_maps)
    if signature.count != len(names) + maps + has_params:
        raise ValueError(
            f"{plan.kernel}: expected the entry's {signature.count} parameters, got {len(names)} tensors"
            f"{f', {maps} tensor maps' if maps else ''}{' and a params struct' if has_params else ''}"
        )
    by_value = [tensor_map.BYTES] * maps + [ctypes.sizeof(plan.params)] * has_params
    for i, size in enumerate(by_value, len(names)):
        if signature.parameter[i].bytes != size:
            what = "params" if i == len(names) + maps else plan.tensor_maps[i - len(names)].tensor
            raise ValueError(
                f"{plan.kernel}: {what}: expected {signature.parameter[i].bytes} bytes, got {size}"
            )
    arguments = [_Argument(*three) for three in zip(names, roles, tensors, strict=True)]
    _check_disjoint(plan, arguments)
    for argument, parameter in zip(arguments, signature.parameter, strict=False):
        if bool(parameter.pointee_const) != (argument.role == _INPUT):
            wanted = "const T*" if argument.role == _INPUT else "T*"
            raise ValueError(
                f"{plan.kernel}: {argument.name}: expected a parameter of type {wanted}"
            )
        tensor = argument.tensor
        if tensor is None:
            continue
        if tensor.device.type != "cpu":
            raise ValueError(
                f"{plan.kernel}: {argument.name}: expected a CPU tensor, got {tensor.device}"
            )
        if tensor.element_size() != parameter.pointee_bytes:
            raise ValueError(
                f"{plan.kernel}: {argument.name}: expected elements of {parameter.pointee_bytes} bytes, got "
                f"{tensor.dtype}"
            )
    return arguments


def _places(module: _Module, offsets: Sequence[int]) -> list[tuple[str, int]]:
    """As `places`, without the lines inside of instruction wrappers: who called them is to blame."""
    found = places(module.path, offsets)
    return [place for place in found if not _WRAPPERS.fullmatch(place[0])] or found


def _error(plan: Launch, module: _Module, report: _Report) -> KernelError:
    message = report.message.decode(errors="replace")
    if not report.in_thread:
        return KernelError(f"{plan.kernel}: {message}")
    chain = _places(module, report.frames[: report.frame_count])
    if report.place.file:  # a collective states its own place
        stated = (Path(report.place.file.decode()).name, report.place.line)
        chain = [stated, *(place for place in chain if place != stated)]
    if report.other:
        other = _places(module, [report.other])
        message += "".join(f", at {file}:{line}" for file, line in other[:1])
    block, thread = tuple(report.block), tuple(report.thread)
    who = f"block ({','.join(map(str, block))}), thread ({','.join(map(str, thread))})"
    callers = "".join(f", called from {file}:{line}" for file, line in chain[1:])
    where = "".join(f"{file}:{line}: " for file, line in chain[:1])
    return KernelError(f"{where}{message} [{who} of {plan.kernel}{callers}]", chain, block, thread)


@dataclass(frozen=True)
class _Result:
    """What one run left in an output or update, element by element of its range."""

    argument: _Argument
    content: torch.Tensor  # uint8
    written: torch.Tensor  # uint8, one an element


class _Aligned:
    """Bytes at an address that is a multiple of 64, as a kernel's parameters may need it."""

    def __init__(self, content: bytes) -> None:
        self.buffer = ctypes.create_string_buffer(len(content) + 64)
        self.address = ctypes.addressof(self.buffer)
        self.address += -self.address % 64
        ctypes.memmove(self.address, content, len(content))


def _run_once(
    plan: Launch, entry: _Entry, arguments: Sequence[_Argument], schedule: str, seed: int
) -> list[_Result]:
    """Run the launch on copies of its tensors. Raises KernelError when it fails."""
    global _counters
    table = (_Tensor * max(1, len(arguments)))()
    results = []
    for row, argument in zip(table, arguments, strict=False):
        row.name, row.role = argument.name.encode(), argument.role
        tensor = argument.tensor
        if tensor is None or tensor.numel() == 0:
            continue
        row.source, row.phase = tensor.data_ptr(), tensor.data_ptr() % 256
        row.bytes = argument.elements * tensor.element_size()
        row.log2_element = tensor.element_size().bit_length() - 1
        if argument.role != _INPUT:
            content = torch.empty(row.bytes, dtype=torch.uint8)
            written = torch.empty(argument.elements, dtype=torch.uint8)
            row.result, row.written = content.data_ptr(), written.data_ptr()
            results.append(_Result(argument, content, written))
    params = _Aligned(bytes(plan.params))
    tensors = dict(zip(plan.names, (argument.tensor for argument in arguments), strict=True))
    maps = [
        _Aligned(tensor_map.packed(m, tensors[m.tensor], plan.names.index(m.tensor)))
        for m in plan.tensor_maps
    ]
    info = _LaunchInfo(
        module=entry.module.handle,
        entry=entry.call,
        grid=plan.grid,
        block=plan.block,
        dynamic_shared=plan.shared_bytes,
        max_threads=entry.signature.max_threads,
        schedule=SCHEDULES.index(schedule),
        tensor_count=len(arguments),
        seed=seed,
        seconds=_settings.seconds,
        tensors=table,
        tensor_maps=(ctypes.c_void_p * len(maps))(*(m.address for m in maps)),
        tensor_map_count=len(maps),
        params=params.address if ctypes.sizeof(plan.params) else None,
        profile=_settings.profiles is not None,
        cluster=plan.cluster,
        declared_cluster=entry.signature.cluster,
    )
    report, counters = _Report(), _Counters()
    runtime, _ = _runtime()
    with _lock:
        failed = runtime.emulator_launch(
            ctypes.byref(info), ctypes.byref(report), ctypes.byref(counters)
        )
        _counters = Counters(*(getattr(counters, name) for name in Counters._fields))
        if _settings.profiles is not None and not failed:
            spans = [(argument.tensor, argument.elements) for argument in arguments]
            each = partial(places_of_each, entry.module.path)
            _settings.profiles.append(read_profile(runtime, plan, spans, _counters, each))
    if failed:
        raise _error(plan, entry.module, report)
    return results


def _compare(plan: Launch, one: Sequence[_Result], two: Sequence[_Result], name: str) -> None:
    for a, b in zip(one, two, strict=True):
        tensor = a.argument.tensor
        assert tensor is not None
        size = tensor.element_size()
        differ = a.argument.strided((a.content.view(-1, size) != b.content.view(-1, size)).any(1))
        if differ.any():
            first = differ.nonzero()[0].tolist()
            raise KernelError(
                f"{plan.kernel}: {a.argument.name}{first} differs between the schedules {SCHEDULES[0]} "
                f"and {name}, as do {int(differ.sum()) - 1} more of {differ.numel()} elements"
            )


def execute(plan: Launch, tensors: Sequence[torch.Tensor | None]) -> None:
    """Run `plan` on CPU tensors, in the order of ``plan.names``; its first use compiles the kernel.

    Raises KernelError when the kernel does something wrong (the tensors are then as before, but for a kernel
    whose only fault is that it left elements of an output unwritten: they are NaN, or all ones), CompileError
    when g++ refuses the kernel, ValueError when plan, tensors and the entry's parameters do not fit together,
    and RuntimeError where kernels cannot be emulated (see `available`).
    """
    entry = _entry(plan.kernel)
    arguments = _arguments(plan, entry, tensors)
    chosen, seed = _settings.schedule, _settings.seed
    results = _run_once(plan, entry, arguments, SCHEDULES[0] if chosen == "all" else chosen, seed)
    if chosen == "all":
        for name in SCHEDULES[1:]:
            _compare(plan, results, _run_once(plan, entry, arguments, name, seed), name)
    unwritten = []
    for result in results:
        argument, tensor = result.argument, result.argument.tensor
        assert tensor is not None
        with torch.no_grad():
            tensor.copy_(argument.strided(result.content.view(tensor.dtype)))
        missing = argument.strided(result.written) == 0
        if argument.role == _OUTPUT and missing.any():
            first = list(missing.nonzero()[0].tolist())
            unwritten.append(
                f"{argument.name}{first} and {int(missing.sum()) - 1} more of {missing.numel()} elements"
            )
    if unwritten:
        raise KernelError(f"{plan.kernel}: never written: {'; '.join(unwritten)}")

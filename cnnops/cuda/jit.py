"""CUDA source to cubin to launch: NVRTC (no driver, no toolkit needed), a disk cache, CuPy's launcher.

A cubin is named by the digest of source, headers, constants, flags and architecture, and lies in one of two
places of the cache directory:

    cubin/                  what processes compiled when they needed it; the name tells NVRTC's version, too,
                            so that another version compiles anew
    ahead-nvrtc13.0/        what ``cnnops compile`` made, by the version of NVRTC: any process uses it,
                            whichever NVRTC it has, or none

The only module that asks torch for a stream, and the only one that knows compiler flags.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, wraps
from pathlib import Path
from typing import Any

import torch

from cnnops.cache import DiskCache, cache_dir, digest_of
from cnnops.cuda import tensor_map
from cnnops.cuda.cache import CompileError, sources
from cnnops.cuda.kernel import Kernel, Launch, kernels_dir
from cnnops.cuda.target import Target, of_gpu

# fp32 results are IEEE's but for contraction to FMA: subnormals kept, division and square root rounded right.
FLAGS = ("-std=c++17", "-ftz=false", "-prec-div=true", "-prec-sqrt=true", "-fmad=true")
_RESOURCES = re.compile(
    r"Compiling entry function '(?P<entry>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads"
    r".*?Used (?P<registers>\d+) registers(?:[^\n]*?(?P<shared>\d+) bytes smem)?",
    re.DOTALL,
)
OLDEST = 80
"""The first architecture with all that kernels use: bfloat16's arithmetic, cp.async."""
# CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED, for which CuPy has no name.
NON_PORTABLE_CLUSTER_SIZE_ALLOWED = 14
PORTABLE_CLUSTER = 8
_lock = threading.Lock()
_cubins = DiskCache("cubin", ".cubin")


@dataclass(frozen=True)
class Resources:
    """What ptxas reports of one entry, for one architecture."""

    entry: str
    registers: int
    shared_bytes: int
    stack_bytes: int
    spill_store_bytes: int
    spill_load_bytes: int


def stats() -> dict[str, float]:
    """Cubins compiled, cubins found on disk, and seconds spent compiling, since this process started."""
    counts = [cache.stats() for cache in (_cubins, *_caches_ahead.values())]
    return {name: sum(count[name] for count in counts) for name in counts[0]}


def _once(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` remembered by its arguments. Of threads that ask for the same at the same time one calls it,
    and the others wait; if it raises, the next one tries again."""
    made: dict[Any, Any] = {}
    locks: dict[Any, threading.Lock] = {}

    @wraps(function)
    def get(*key: Any) -> Any:
        if key not in made:
            with locks.setdefault(key, threading.Lock()):
                if key not in made:
                    made[key] = function(*key)
        return made[key]

    return get


def _nvrtc() -> Any:
    try:
        from cuda.bindings import nvrtc
    except ImportError as error:
        raise RuntimeError(
            "NVRTC: expected the package cuda-core with CUDA bindings, got none; install it with: "
            + install_command()
        ) from error
    return nvrtc


def install_command() -> str:
    """The pip command that makes the `cuda` engine complete for the torch that is installed."""
    return f"pip install 'cnnops[cuda{(torch.version.cuda or '13').partition('.')[0]}]'"


def _call(function: Any, *args: Any) -> Any:
    """Call an NVRTC binding; its first result is the error code, the rest is what it returns."""
    code, *results = function(*args)
    if int(code) != 0:
        raise CompileError(f"{function.__name__}: {_nvrtc().nvrtcGetErrorString(code)[1].decode()}")
    return results[0] if results else None


@lru_cache(None)
def nvrtc_version() -> tuple[int, int]:
    nvrtc = _nvrtc()
    code, major, minor = nvrtc.nvrtcVersion()
    if int(code) != 0:
        raise RuntimeError(f"nvrtcVersion: {code}")
    return major, minor


def compile_cubin(
    source: str, constants: Sequence[tuple[str, str | int]], arch: str
) -> tuple[bytes, str]:
    """Compile ``kernels/<source>`` for ``sm_<arch>``: the cubin and NVRTC's log with ptxas's resource lines.

    A `source` from elsewhere is an absolute path; it finds the headers of kernels/ too. Needs no GPU and no
    driver. Raises CompileError with file, constants and log when NVRTC refuses.
    """
    nvrtc, path = _nvrtc(), kernels_dir() / source
    options = [
        f"-arch=sm_{arch}", *FLAGS, "--ptxas-options=-v", f"-I{path.parent}", f"-I{kernels_dir()}",
        *(f"-D{name}={value}" for name, value in constants),
    ]  # fmt: skip
    program = _call(nvrtc.nvrtcCreateProgram, path.read_bytes(), source.encode(), 0, [], [])
    try:
        (code,) = nvrtc.nvrtcCompileProgram(program, len(options), [o.encode() for o in options])
        log = b" " * _call(nvrtc.nvrtcGetProgramLogSize, program)
        _call(nvrtc.nvrtcGetProgramLog, program, log)
        text = log.rstrip(b"\0 \n").decode(errors="replace")
        if int(code) != 0:
            raise CompileError(f"{source} for sm_{arch} with {' '.join(options)}:\n{text}")
        cubin = b" " * _call(nvrtc.nvrtcGetCUBINSize, program)
        _call(nvrtc.nvrtcGetCUBIN, program, cubin)
        return cubin, text
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def resources(log: str) -> list[Resources]:
    """Registers, shared memory and spills of every entry, read from the log of `compile_cubin`."""
    return [
        Resources(
            m["entry"],
            int(m["registers"]),
            int(m["shared"] or 0),
            int(m["stack"]),
            int(m["stores"]),
            int(m["loads"]),
        )
        for m in _RESOURCES.finditer(log)
    ]


# ---- cubins on disk --------------------------------------------------------------------------------------


@lru_cache(4096)
def _digest(source: str, constants: tuple[tuple[str, str | int], ...], arch: str) -> str:
    """SHA-256 of all that decides the cubin but the compiler: sources with headers, constants, flags,
    architecture."""
    return digest_of(constants, FLAGS, arch, files=sources(kernels_dir() / source, kernels_dir()))


def _name(kernel: Kernel, arch: str) -> str:
    return f"{Path(kernel.source).stem}-{_digest(kernel.source, kernel.constants, arch)}"


def _nvrtc_name() -> str:
    return "nvrtc{}.{}".format(*nvrtc_version())


_AHEAD = re.compile(r"ahead-nvrtc(\d+)\.(\d+)")
_caches_ahead: dict[str, DiskCache] = {}


def _cache_ahead(folder: str) -> DiskCache:
    """What was compiled ahead of time is never dropped for lack of room."""
    return _caches_ahead.setdefault(folder, DiskCache(folder, ".cubin", limit=None))


def ahead_folders(newest: int | None = None) -> list[str]:
    """The folders of the cache directory that ``cnnops compile`` has filled, the newest NVRTC's first; of
    CUDA `newest` and older, if that is given: a driver takes no cubin of a newer CUDA."""
    try:
        names = [path.name for path in cache_dir().iterdir()]
    except OSError:
        return []
    found = [(int(m[1]), int(m[2]), m[0]) for m in map(_AHEAD.fullmatch, names) if m]
    return [name for major, _, name in sorted(found, reverse=True) if major <= (newest or major)]


def architectures() -> tuple[str, ...]:
    """Those that the installed NVRTC compiles for and the kernels are written for, as `arch_of` names them.

    Raises RuntimeError without NVRTC.
    """
    nvrtc_version()
    count = _call(_nvrtc().nvrtcGetNumSupportedArchs)
    numbers = _call(_nvrtc().nvrtcGetSupportedArchs)[:count]
    return tuple(Target(divmod(n, 10), 0).arch for n in numbers if n >= OLDEST)


def expect_to_keep() -> None:
    """Raises OSError where `compile_ahead` cannot keep anything, RuntimeError without NVRTC."""
    _cache_ahead(f"ahead-{_nvrtc_name()}").writable()


def compile_ahead(kernel: Kernel, arch: str) -> int:
    """Compile `kernel`'s source and constants for ``sm_<arch>`` and keep the cubin where every process finds
    it; its bytes, or 0 if that has been done before.

    Raises CompileError where NVRTC refuses, OSError where the cubin cannot be kept.
    """
    cache, name = _cache_ahead(f"ahead-{_nvrtc_name()}"), _name(kernel, arch)
    if cache.find(name) is not None:
        return 0
    cubin = compile_cubin(kernel.source, kernel.constants, arch)[0]
    cache.store(name, cubin)
    return len(cubin)


def cubin_ahead(kernel: Kernel, arch: str, newest: int | None = None) -> bytes | None:
    """What `compile_ahead` has kept, be it in another process by another NVRTC; `newest`: as of
    `ahead_folders`. Neither NVRTC nor a GPU is asked."""
    name = _name(kernel, arch)
    found = (_cache_ahead(folder).find(name) for folder in ahead_folders(newest))
    return next((cubin for cubin in found if cubin is not None), None)


def cubin_for(kernel: Kernel, arch: str, newest: int | None = None) -> bytes:
    """The cubin of `kernel`'s source and constants for ``sm_<arch>``: compiled ahead of time, or in another
    process, or now. `newest`: as of `ahead_folders`.

    Raises CompileError where NVRTC refuses, RuntimeError where it is missing but needed.
    """
    cubin = cubin_ahead(kernel, arch, newest)
    if cubin is not None:
        return cubin

    try:
        name = f"{_name(kernel, arch)}-{_nvrtc_name()}"
    except RuntimeError as error:
        what = f"{kernel.source} [{' '.join(kernel.defines)}] for sm_{arch}"
        raise RuntimeError(f"{what}: not compiled ahead of time, and {error}") from error
    return _cubins.kept(name, lambda: compile_cubin(kernel.source, kernel.constants, arch)[0])[0]


# ---- launching (needs a GPU) -----------------------------------------------------------------------------


def unavailable() -> str | None:
    """None where the `cuda` engine works, else the reason with the command that would mend it."""
    if not torch.cuda.is_available():
        if torch.version.cuda is None:
            return (
                f"this torch is built without CUDA: install one that is, then {install_command()}"
            )
        return "torch sees no NVIDIA GPU"
    try:
        import cupy

        theirs = cupy.cuda.runtime.runtimeGetVersion() // 1000
    except ModuleNotFoundError as error:
        if error.name == "cupy":
            return f"CuPy is missing: {install_command()}"
        return _broken(error)
    except (
        Exception
    ) as error:  # of a library that is missing, of a NumPy that it was not built for, ...
        return _broken(error)
    major = int(torch.version.cuda.partition(".")[0]) if torch.version.cuda else 0
    if theirs != major:
        return (
            f"CuPy is built for CUDA {theirs}, torch for CUDA {major}: "
            f"pip uninstall cupy-cuda{theirs}x && {install_command()}"
        )
    try:
        nvrtc_version()
    except RuntimeError as error:
        if not ahead_folders():  # else there may be nothing to compile
            return str(error)
    return None


def _broken(error: Exception) -> str:
    said = str(error).strip().partition("\n")[0]
    return f"CuPy cannot be imported ({type(error).__name__}: {said}): {install_command()}"


@lru_cache(None)
def _require_cuda() -> None:
    reason = unavailable()
    if reason is not None:
        raise RuntimeError(f"engine 'cuda': {reason}")


def arch_of(device_index: int) -> str:
    """The architecture to compile for: with its own features ("90a") from Hopper on."""
    return of_gpu(device_index).arch


def _make_current(device_index: int) -> None:
    """Bind the device's context to this thread: in a new one none is, until the CUDA runtime is asked."""
    from cupy.cuda import runtime

    runtime.setDevice(device_index)


@_once
def _module(source: str, constants: tuple[tuple[str, str | int], ...], device_index: int) -> Any:
    from cupy.cuda import function, runtime

    newest = runtime.driverGetVersion() // 1000
    cubin = cubin_for(Kernel(source, "", constants), arch_of(device_index), newest)
    module = function.Module()
    module.load(cubin)
    return module


@_once
def _function(kernel: Kernel, shared_bytes: int, device_index: int) -> Any:
    _require_cuda()
    from cupy.cuda import driver

    _make_current(device_index)
    function = _module(kernel.source, kernel.constants, device_index).get_function(kernel.entry)
    # The limit belongs to the entry, whatever launch asked for it: it must not fall again.
    with _lock:
        if shared_bytes > _shared_limits.get((kernel, device_index), 48 * 1024):
            driver.funcSetAttribute(
                function.ptr, driver.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, shared_bytes
            )
            _shared_limits[kernel, device_index] = shared_bytes
    return function


_shared_limits: dict[tuple[Kernel, int], int] = {}


@lru_cache(256)
def _stream(pointer: int, device_index: int) -> Any:
    from cupy.cuda import ExternalStream

    return ExternalStream(pointer, device_index)


def _by_value(content: bytes) -> Any:
    """A struct as the zero-dimensional array that CuPy passes by value."""
    import numpy as np

    return np.frombuffer(content, dtype=f"V{len(content)}").reshape(())


def _prepare(plan: Launch, device_index: int) -> tuple[Any, Any]:
    """The kernel and the params struct."""
    arch = arch_of(device_index) if plan.cluster > 1 else ""
    if plan.cluster > 1 and int(arch.rstrip("a")) < 90:
        raise RuntimeError(
            f"{plan.kernel}: clusters of {plan.cluster} blocks: expected a GPU of compute capability 9.0 or "
            f"newer, got {arch[:-1]}.{arch[-1]}"
        )
    function = _function(plan.kernel, plan.shared_bytes, device_index)
    if plan.cluster > PORTABLE_CLUSTER:
        from cupy.cuda import driver

        _make_current(device_index)
        driver.funcSetAttribute(function.ptr, NON_PORTABLE_CLUSTER_SIZE_ALLOWED, 1)
    return function, _by_value(bytes(plan.params))


MOST_ADDRESSES = 256
"""Sets of addresses of a launch whose tensor maps are kept: they recur, since torch keeps freed memory."""


def _tensor_maps(
    plan: Launch,
    tensors: Sequence[torch.Tensor | None],
    pointers: Sequence[int],
    device_index: int,
) -> list[Any]:
    """The launch's tensor maps for tensors at these addresses. No tensor is held: a plan has one problem's
    sizes and strides, so that what lies at an address has its map, whichever tensor it is.
    """
    addresses = tuple(pointers)
    maps = plan.encoded.get(addresses)
    if maps is None:
        _make_current(device_index)  # the driver encodes them
        named = dict(zip(plan.names, tensors, strict=True))
        maps = [_by_value(tensor_map.encoded(m, named[m.tensor])) for m in plan.tensor_maps]
        if len(plan.encoded) >= MOST_ADDRESSES:
            plan.encoded.clear()
        plan.encoded[addresses] = maps
    return maps


def execute(plan: Launch, tensors: Sequence[torch.Tensor | None], device_index: int) -> None:
    """Launch on torch's current stream of the device; compiles or loads the kernel at its first use."""
    if device_index != torch.cuda.current_device():
        with torch.cuda.device(device_index):
            execute(plan, tensors, device_index)
        return
    prepared = plan.prepared.get(device_index)
    if prepared is None:
        prepared = plan.prepared[device_index] = _prepare(plan, device_index)
    function, params = prepared
    pointers = [0 if t is None else t.data_ptr() for t in tensors]
    maps = _tensor_maps(plan, tensors, pointers, device_index) if plan.tensor_maps else ()
    stream = _stream(torch._C._cuda_getCurrentRawStream(device_index), device_index)
    function(plan.grid, plan.block, (*pointers, *maps, params), plan.shared_bytes, stream)

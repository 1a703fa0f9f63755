"""`cnnops info`: versions, which engines work here, what would make the others work, compiled kernels."""

from __future__ import annotations

import platform
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from pathlib import Path

import torch

from cnnops import system
from cnnops.cache import cache_dir
from cnnops.config import ENGINES

_USES = {
    "cuda": "the CUDA kernels on the GPU: the default for CUDA tensors",
    "emulate": "the CUDA kernels on the CPU, every memory access checked: slow",
    "cpu": "numba kernels on all cores: the default for CPU tensors",
    "aten": "PyTorch's own operations",
}


# ---- engines ---------------------------------------------------------------------------------------------


def unavailable(engine: str) -> str | None:
    """None where `engine` works on this machine, else why not and the command that would change it."""
    from cnnops.cuda import emulate, jit

    if engine == "cuda":
        return jit.unavailable() if gpu() else "there is no NVIDIA GPU in this machine"
    return emulate.available() if engine == "emulate" else None


# ---- counts ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class KernelCounts:
    """Kernels that were compiled, and kernels that were read from a cache on disk instead."""

    compiled: int
    loaded: int

    def since(self, former: KernelCounts) -> KernelCounts:
        return KernelCounts(self.compiled - former.compiled, self.loaded - former.loaded)

    def sentence(self) -> str:
        then = " (0 on the next run)" if self.compiled else ""
        return f"kernels compiled in this run: {self.compiled}{then}, read from the cache: {self.loaded}"


def kernel_counts() -> KernelCounts:
    """All engines' counts since this process started. An engine not imported yet has compiled nothing."""
    counts = [
        sys.modules[name].stats()
        for name in ("cnnops.cuda.jit", "cnnops.cuda.emulate", "cnnops.cpu.code")
        if name in sys.modules
    ]
    return KernelCounts(
        sum(int(count["compiled"]) for count in counts),
        sum(int(count["loaded_from_cache"]) for count in counts),
    )


def cached_kernels() -> dict[str, tuple[Path, int]]:
    """For every engine that compiles: where its compiled kernels lie, and how many there are. Beside them
    "ahead", where ``cnnops compile --arch`` has made some: those of the newest NVRTC."""
    from cnnops.cpu import code
    from cnnops.cuda import jit

    compiled = cache_dir()
    places = {
        "cuda": (compiled / "cubin", "*.cubin"),
        "emulate": (compiled / "emulator", "*.so"),
        "cpu": (code.cache_path(), "*.o"),
    }
    for name in jit.ahead_folders()[:1]:
        places["ahead"] = (compiled / name, "*.cubin")
    return {
        engine: (folder, sum(1 for _ in folder.glob(pattern)))
        for engine, (folder, pattern) in places.items()
    }


def compared_with_hardware() -> dict[str, list[str]]:
    """What came of the comparison with a GPU -> the wrappers of which that is so."""
    from cnnops.cuda import golden

    found: dict[str, list[str]] = {}
    for wrapper, text in golden.status().items():
        found.setdefault(text, []).append(wrapper)
    return found


# ---- versions --------------------------------------------------------------------------------------------


@lru_cache(None)
def gpu() -> str:
    """The names of the NVIDIA GPUs in this machine, whether torch can use them or not; "" for none."""
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        return ", ".join(torch.cuda.get_device_name(index) for index in range(count))
    names = system.output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader")
    return ", ".join(names.splitlines())


def _installed(*distributions: str) -> str:
    """Versions of those of the distributions that are installed."""
    found = []
    for name in distributions:
        try:
            found.append(f"{metadata.version(name)} ({name})")
        except metadata.PackageNotFoundError:
            continue
    return ", ".join(found) or "not installed"


def _nvrtc() -> str:
    from cnnops.cuda import jit

    try:
        return ".".join(map(str, jit.nvrtc_version()))
    except RuntimeError:
        return "not installed"


def _gxx() -> str:
    from cnnops.cuda import emulator_build

    try:
        return emulator_build.compiler()[1]
    except RuntimeError:
        return "not installed"


def _cpu() -> str:
    cores = system.cores()
    return f"{system.cpu_model()}, {cores} core{'s' * (cores > 1)} for this process"


def versions() -> dict[str, str]:
    """What there is of everything that this package builds on."""
    import numba

    import cnnops

    return {
        "cnnops": f"{cnnops.__version__} in {Path(__file__).parent}",
        "Python": platform.python_version(),
        "torch": f"{torch.__version__} (CUDA {torch.version.cuda or 'none'})",
        "numba": numba.__version__,
        "CuPy": _installed("cupy-cuda12x", "cupy-cuda13x", "cupy"),
        "NVRTC": _nvrtc(),
        "g++": _gxx(),
        "CPU": _cpu(),
        "GPU": gpu() or "none",
    }


# ---- report ----------------------------------------------------------------------------------------------


def report() -> Iterator[str]:
    """The lines that `cnnops info` prints."""
    for name, version in versions().items():
        yield f"{name:<9}{version}"
    yield "\nengine   works"
    for engine in ENGINES:
        reason = unavailable(engine)
        yield f"{engine:<9}{'no     ' + reason if reason else 'yes    ' + _USES[engine]}"
    yield "\nwhat the emulator computes in place of a GPU's instructions (kernels/ptx*.cuh)"
    for text, wrappers in compared_with_hardware().items():
        yield from textwrap.wrap(f"{text}: {', '.join(wrappers)}", 106, subsequent_indent="  ")
    yield "\nengine   compiled kernels kept on disk"
    try:
        kept = cached_kernels()
    except OSError as error:
        yield f"none: the cache directory cannot be used ({error})"
        return
    for engine, (folder, count) in kept.items():
        yield f"{engine:<9}{count:<7}{folder}"

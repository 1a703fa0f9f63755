"""`cnnops info`: versions, which engines work here, what would make the others work, compiled kernels."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from pathlib import Path

import torch

from cnnops.config import ENGINES
from cnnops.cuda.cache import cache_dir

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
        for name in ("cnnops.cuda.jit", "cnnops.cuda.emulate", "cnnops.cpu.task")
        if name in sys.modules
    ]
    return KernelCounts(
        sum(int(count["compiled"]) for count in counts),
        sum(int(count["loaded_from_cache"]) for count in counts),
    )


def cached_kernels() -> dict[str, tuple[Path, int]]:
    """For every engine that compiles: where its compiled kernels lie, and how many there are."""
    from cnnops.cpu import task

    compiled = cache_dir()
    places = {
        "cuda": (compiled / "cubin", "*.cubin"),
        "emulate": (compiled / "emulator", "*.so"),
        "cpu": (task.cache_path(), "*.nbc"),
    }
    return {
        engine: (folder, sum(1 for _ in folder.glob(pattern)))
        for engine, (folder, pattern) in places.items()
    }


# ---- versions --------------------------------------------------------------------------------------------


@lru_cache(None)
def gpu() -> str:
    """The names of the NVIDIA GPUs in this machine, whether torch can use them or not; "" for none."""
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        return ", ".join(torch.cuda.get_device_name(index) for index in range(count))
    names = _output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader")
    return ", ".join(names.splitlines())


def _output(*command: str) -> str:
    """What `command` prints, or "" where it is missing or fails."""
    if shutil.which(command[0]) is None:
        return ""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


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
    try:
        model = re.search(
            r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE
        )
    except OSError:
        model = None
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return f"{model[1] if model else platform.machine()}, {cores} core{'s' * (cores > 1)} for this process"


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
    yield "\nengine   compiled kernels kept on disk"
    try:
        kept = cached_kernels()
    except OSError as error:
        yield f"none: the cache directory cannot be used ({error})"
        return
    for engine, (folder, count) in kept.items():
        yield f"{engine:<9}{count:<7}{folder}"

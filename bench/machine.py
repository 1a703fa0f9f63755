"""What a run was measured on: device, versions, commit, clocks, and the ceilings that this device reaches."""

from __future__ import annotations

import platform
import re
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch

import cnnops
from cnnops import system

ROOT = Path(__file__).resolve().parents[1]
SMI = {
    "sm_mhz": "clocks.sm",
    "memory_mhz": "clocks.mem",
    "power_w": "power.draw",
    "celsius": "temperature.gpu",
}


def describe(device: torch.device, commit: str | None = None) -> dict[str, Any]:
    """The "machine" of a result file. `commit` is for copies of a checkout that left git's folder behind."""
    gpu = device.type == "cuda"
    cupy = [v for name in ("cupy-cuda13x", "cupy-cuda12x", "cupy") if (v := _version(name))]
    cpu = f"{system.cpu_model()} ({system.cores()} threads)"
    return {
        "device": torch.cuda.get_device_name(device) if gpu else cpu,
        "kind": "gpu" if gpu else "cpu",
        "cpu": None if gpu else _cpu(),
        "driver": _smi("driver_version") if gpu else None,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "cudnn": torch.backends.cudnn.version() if gpu else None,
        "cupy": cupy[0] if cupy else None,
        "python": platform.python_version(),
        "cnnops": cnnops.__version__,
        "commit": commit or _git("rev-parse", "--short", "HEAD") or "unknown",
        "dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "threads": system.cores(),
        "clocks": clocks() if gpu else {},
    }


def _cpu() -> str:
    """Microarchitecture and vectors. LLVM, by which the kernels are compiled, knows the former; of processors
    that call themselves "AMD EPYC" there are many.
    """
    import llvmlite.binding as llvm

    from cnnops.cpu.simd import simd_bits

    return f"{llvm.get_host_cpu_name()}, {simd_bits()}-bit vectors"


def slug(machine: dict[str, Any]) -> str:
    """The name of a run's file: date, device, commit."""
    device = re.sub(r"[^a-z0-9]+", "-", machine["device"].lower()).strip("-")
    return f"{re.sub('[^0-9]', '', machine['date'])[:12]}-{device}-{machine['commit']}"


def clocks() -> dict[str, list[float]]:
    """What the GPU says of its clocks, power and temperature just now; {} where nothing tells."""
    values = _smi(",".join(SMI.values())).split(",")
    try:
        return {name: [float(value)] for name, value in zip(SMI, values, strict=True)}
    except ValueError:
        return {}


def pin_threads() -> None:
    """Give torch and numba the same number of threads, one a core of this process."""
    import numba

    torch.set_num_threads(system.cores())
    numba.set_num_threads(min(system.cores(), numba.config.NUMBA_NUM_THREADS))


def ceilings(device: torch.device, seconds: float = 3.0) -> dict[str, Any]:
    """The "ceilings" of a result file: bytes a second of a large copy, counting both its sides, and flops a
    second of a large matrix product, by precision. What this device reaches, not what its sheet says.
    """
    gpu = device.type == "cuda"
    share = seconds / 6
    copied = _copy_bytes_per_second(device, share)
    flops: dict[str, float] = {}
    sizes = {"float64": 4096, "float32": 8192, "tf32": 8192, "float16": 8192, "bfloat16": 8192}
    for name in sizes if gpu else ("float64", "float32"):
        n = sizes[name] if gpu else 1024
        dtype = torch.float32 if name == "tf32" else getattr(torch, name)
        a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
        former = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
        try:
            flops[name] = 2 * n**3 / _seconds(lambda a=a, b=b: a @ b, device, share)
        finally:
            torch.backends.cuda.matmul.allow_tf32 = former
    return {"bytes_per_s": copied, "flops_per_s": flops}


def _copy_bytes_per_second(device: torch.device, seconds: float) -> float:
    source = torch.randn((1 << 28) if device.type == "cuda" else (1 << 25), device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _seconds(lambda: target.copy_(source), device, seconds)


def _seconds(run: Any, device: torch.device, budget: float) -> float:
    """The median time of `run`, from at least three runs after two that do not count."""
    times: list[float] = []
    start = perf_counter()
    while len(times) < 5 or perf_counter() - start < budget:
        before = perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(perf_counter() - before)
    return median(times[2:])


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _smi(query: str) -> str:
    return system.output(
        "nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits"
    ).partition("\n")[0]


def _git(*arguments: str) -> str:
    return system.output("git", "-C", str(ROOT), *arguments)

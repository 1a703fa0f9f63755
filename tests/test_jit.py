"""NVRTC, the disk cache and the launcher's arguments: all that can be shown of them without a GPU."""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import cnnops
from cnnops.cache import DiskCache
from cnnops.cuda import jit
from cnnops.cuda.kernel import FastDiv, Kernel, kernels_dir, launch_of
from cnnops.cuda.launch import trace

pytest.importorskip("cuda.bindings.nvrtc", reason="NVRTC is missing: pip install 'cnnops[test]'")

SCALE = """
#include "common.cuh"
struct Params { FastDiv row; int n; };
static_assert(sizeof(Params) == PARAMS_BYTES, "kernel and launcher disagree");
extern "C" __global__ void scale(const half_t* __restrict__ x, half_t* __restrict__ y, const Params p) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < p.n) y[i] = convert<half_t>(FACTOR * convert<float>(x[i]));
}
"""


class Params(ctypes.Structure):
    _fields_ = [("row", FastDiv), ("n", ctypes.c_int)]


@pytest.fixture
def sandbox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of kernels holding scale.cu and the real headers, and an empty cache."""
    kernels = tmp_path / "kernels"
    kernels.mkdir()
    for header in ("common.cuh", "ptx.cuh"):
        (kernels / header).write_bytes((kernels_dir() / header).read_bytes())
    (kernels / "scale.cu").write_text(SCALE)
    monkeypatch.setattr(jit, "kernels_dir", lambda: kernels)
    monkeypatch.setattr(jit, "_digest", jit._digest.__wrapped__)
    monkeypatch.setenv("CNNOPS_CACHE_DIR", str(tmp_path / "cache"))
    return kernels


def kernel(factor: str = "2.0f") -> Kernel:
    return Kernel(
        "scale.cu", "scale", (("FACTOR", factor), ("PARAMS_BYTES", ctypes.sizeof(Params)))
    )


def counts() -> tuple[float, float]:
    now = jit.stats()
    return now["compiled"], now["loaded_from_cache"]


@pytest.mark.parametrize("arch", ["80", "90a", "100a"])
def test_compiles_without_a_driver(sandbox: Path, arch: str) -> None:
    cubin, log = jit.compile_cubin("scale.cu", kernel().constants, arch)
    assert cubin.startswith(b"\x7fELF")
    (entry,) = jit.resources(log)
    assert entry.entry == "scale" and 0 < entry.registers < 64
    assert entry.spill_store_bytes == entry.spill_load_bytes == 0


def test_resources_keeps_entries_apart() -> None:
    log = """ptxas info    : Compiling entry function 'a' for 'sm_90a'
ptxas info    : Function properties for a
ptxas         .     8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 255 registers, used 0 barriers
ptxas info    : Compiling entry function 'b' for 'sm_90a'
ptxas info    : Function properties for b
ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 16 registers, used 1 barriers, 32 bytes smem
"""
    assert jit.resources(log) == [
        jit.Resources("a", 255, 0, 8, 4, 12),
        jit.Resources("b", 16, 32, 0, 0, 0),
    ]


def test_second_use_is_read_from_disk(sandbox: Path) -> None:
    start = counts()
    first = jit.cubin_for(kernel(), "80")
    assert counts() == (start[0] + 1, start[1])
    assert jit.cubin_for(kernel(), "80") == first
    assert counts() == (start[0] + 1, start[1] + 1)


def test_whatever_decides_the_code_is_in_the_key(sandbox: Path) -> None:
    def key(k: Kernel = kernel(), arch: str = "80") -> str:  # noqa: B008
        return jit._digest(k.source, k.constants, arch)

    seen = {key(), key(kernel("3.0f")), key(arch="90a")}
    (sandbox / "scale.cu").write_text(SCALE + "// edited\n")
    seen.add(key())
    header = sandbox / "ptx.cuh"  # reached only through common.cuh
    header.write_text(header.read_text() + "// edited\n")
    seen.add(key())
    assert len(seen) == 5
    assert key() == key()


def test_damaged_entry_is_compiled_anew(sandbox: Path, tmp_path: Path) -> None:
    good = jit.cubin_for(kernel(), "80")
    (entry,) = (tmp_path / "cache" / "cubin").glob("*.cubin")
    for damage in (b"", b"short", entry.read_bytes()[:-1], good + b"\0" * 32):
        entry.write_bytes(damage)
        compiled = counts()[0]
        assert jit.cubin_for(kernel(), "80") == good
        assert counts()[0] == compiled + 1
        assert entry.read_bytes() == good + hashlib.sha256(good).digest()


def test_cache_is_private(sandbox: Path, tmp_path: Path) -> None:
    jit.cubin_for(kernel(), "80")
    assert (tmp_path / "cache").stat().st_mode & 0o777 == 0o700


def test_unusable_cache_directory_costs_only_time(
    sandbox: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("CNNOPS_CACHE_DIR", str(tmp_path / "file" / "below"))
    assert jit.cubin_for(kernel(), "80").startswith(b"\x7fELF")


def test_trim_keeps_what_was_used_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CNNOPS_CACHE_DIR", str(tmp_path))
    cache = DiskCache("things", ".bin", limit=2 * (10 + 32))

    def build(path: Path) -> None:
        path.write_bytes(b"x" * 10)

    for age, name in enumerate(("old", "middle")):
        os.utime(cache.entry(name, build), (1000 + age, 1000 + age))
    os.utime(cache.entry("old", build), (2000, 2000))  # used again
    cache.entry("new", build)
    assert sorted(p.stem for p in (tmp_path / "things").iterdir()) == ["new", "old"]
    assert cache.stats()["compiled"] == 3 and cache.stats()["loaded_from_cache"] == 1


def test_processes_share_one_cache(tmp_path: Path) -> None:
    """Four processes ask for the same kernel at once; each gets the same bytes, one file is left."""
    program = (
        "import hashlib; from cnnops.cuda import jit; from cnnops.cuda.kernel import Kernel\n"
        "jit.kernels_dir = lambda: __import__('pathlib').Path(r'%s')\n"
        "k = Kernel('scale.cu', 'scale', (('FACTOR', '2.0f'), ('PARAMS_BYTES', 16)))\n"
        "print(hashlib.sha256(jit.cubin_for(k, '80')).hexdigest())" % (tmp_path / "kernels")
    )
    (tmp_path / "kernels").mkdir()
    for header in ("common.cuh", "ptx.cuh"):
        (tmp_path / "kernels" / header).write_bytes((kernels_dir() / header).read_bytes())
    (tmp_path / "kernels" / "scale.cu").write_text(SCALE)
    environment = {**os.environ, "CNNOPS_CACHE_DIR": str(tmp_path / "cache")}
    children = [
        subprocess.Popen([sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE)
        for _ in range(4)
    ]
    printed = {child.communicate(timeout=300)[0] for child in children}
    assert len(printed) == 1 and all(child.returncode == 0 for child in children)
    assert len(list((tmp_path / "cache" / "cubin").iterdir())) == 1


def test_compile_error_names_file_line_and_constants(sandbox: Path) -> None:
    with pytest.raises(jit.CompileError) as caught:
        jit.compile_cubin("scale.cu", (("FACTOR", "missing_name"), ("PARAMS_BYTES", 16)), "80")
    message = str(caught.value)
    assert "scale.cu(7)" in message and "-DFACTOR=missing_name" in message and "sm_80" in message


def test_struct_that_disagrees_does_not_compile(sandbox: Path) -> None:
    with pytest.raises(jit.CompileError, match="kernel and launcher disagree"):
        jit.compile_cubin("scale.cu", (("FACTOR", "1.0f"), ("PARAMS_BYTES", 20)), "80")


def test_execute_hands_cupy_pointers_then_the_struct(monkeypatch: pytest.MonkeyPatch) -> None:
    """The launcher's side of the contract, seen by a stand-in for CuPy's function."""
    calls = []
    monkeypatch.setattr(jit, "_function", lambda kernel, shared, index: lambda *a: calls.append(a))
    monkeypatch.setattr(jit, "_stream", lambda pointer, index: ("stream", pointer, index))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda i: 77, raising=False)
    params = Params(FastDiv(7), 12)
    plan = launch_of(
        "scale.cu", "scale", {"FACTOR": "2.0f"}, params, grid=(3,), block=(32, 2),
        inputs=("x", "b"), outputs=("y",), shared_bytes=64,
    )  # fmt: skip
    x, y = torch.zeros(12), torch.zeros(12)
    jit.execute(plan, (x, None, y), 0)
    ((grid, block, args, shared, stream),) = calls
    assert (grid, block, shared, stream) == ((3, 1, 1), (32, 2, 1), 64, ("stream", 77, 0))
    assert args[:3] == (x.data_ptr(), 0, y.data_ptr())
    assert args[3].shape == () and args[3].tobytes() == bytes(params)
    assert dict(plan.kernel.constants) == {"FACTOR": "2.0f", "PARAMS_BYTES": ctypes.sizeof(params)}


@pytest.mark.parametrize("divisor", [1, 2, 3, 7, 49, 1000, 65535, 2**30, 2**31 - 1])
def test_fast_division_is_exact(divisor: int) -> None:
    d = FastDiv(divisor)
    near = {q * divisor + e for q in (0, 1, 2, 12345) for e in (-1, 0, 1)}
    for n in (n for n in near | {2**31 - 1} if 0 <= n < 2**31):
        high = (n * d.multiplier) >> 32
        assert high + n < 2**32 and (high + n) >> d.shift == n // divisor


@pytest.mark.skipif(torch.cuda.is_available(), reason="tells what is missing where there is no GPU")
def test_unavailable_says_what_to_do() -> None:
    reason = jit.unavailable()
    assert reason is not None
    if torch.version.cuda is None:
        assert "pip install 'cnnops[cuda13]'" in reason


def test_traces_end_one_by_one() -> None:
    """Also where two of them have collected the same: the inner one goes, the outer one stays."""
    x = torch.randn(1, 2, 4, 4)
    with cnnops.engine("emulate"), trace(run=False) as outer:
        with trace(run=False) as inner:
            pass
        cnnops.functional.avg_pool2d(x, 2)
    assert len(outer) == 1 and not inner

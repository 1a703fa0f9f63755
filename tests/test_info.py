"""`cnnops info`, and the counts that show that a second run compiles nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import cnnops
from cnnops import info
from cnnops.config import ENGINES
from cnnops.cuda import emulator_build, golden, jit


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_report_names_everything(tmp_path: Path) -> None:
    done = run("-m", "cnnops", "info", CNNOPS_CACHE_DIR=str(tmp_path / "cache"))
    assert (done.returncode, done.stderr) == (0, "")
    first_words = [line.partition(" ")[0] for line in done.stdout.splitlines()]
    for name in ("cnnops", "Python", "torch", "numba", "CuPy", "NVRTC", "g++", "CPU", "GPU"):
        assert first_words.count(name) == 1
    for engine in ENGINES:
        assert engine in first_words
    assert cnnops.__version__ in done.stdout and torch.__version__ in done.stdout
    assert f"emulate  0      {tmp_path / 'cache' / 'emulator'}" in done.stdout
    assert run("-m", "cnnops", "--version").stdout == f"{cnnops.__version__}\n"


def test_report_into_a_closed_pipe() -> None:
    done = subprocess.run(
        f"{sys.executable} -m cnnops info | head -1",
        shell=True,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.stdout.startswith(f"cnnops   {cnnops.__version__}") and done.stderr == ""


def test_unusable_cache_directory_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = run("-m", "cnnops", "info", CNNOPS_CACHE_DIR=str(tmp_path / "file" / "below"))
    assert done.returncode == 0 and done.stderr == ""
    assert "the cache directory cannot be used" in done.stdout


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Forget what is known of this machine, before and after."""
    for cached in (info.gpu, emulator_build.compiler):
        cached.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    for cached in (info.gpu, emulator_build.compiler):
        cached.cache_clear()


def test_without_gpp_the_command_is_said(machine: pytest.MonkeyPatch, tmp_path: Path) -> None:
    machine.setenv("PATH", str(tmp_path))
    machine.delenv("CXX", raising=False)
    assert "apt install g++" in (info.unavailable("emulate") or "")
    assert info.versions()["g++"] == "not installed"


def test_gpu_is_seen_even_if_torch_cannot_use_it(
    machine: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    machine.setattr(torch.cuda, "is_available", lambda: False)
    machine.setattr(torch.version, "cuda", None)
    machine.setenv("PATH", str(tmp_path))
    assert info.gpu() == "" and info.unavailable("cuda") == "there is no NVIDIA GPU in this machine"
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho NVIDIA One\necho NVIDIA Two\n")
    tool.chmod(0o755)
    info.gpu.cache_clear()
    assert info.gpu() == "NVIDIA One, NVIDIA Two"
    assert info.unavailable("cuda") == jit.unavailable()
    assert "pip install" in (info.unavailable("cuda") or "")
    tool.write_text("#!/bin/sh\necho no driver\nexit 9\n")
    info.gpu.cache_clear()
    assert info.gpu() == ""


def test_engines_without_needs_always_work() -> None:
    assert info.unavailable("cpu") is None and info.unavailable("aten") is None


def test_wrappers_are_listed_by_what_hardware_said(monkeypatch: pytest.MonkeyPatch) -> None:
    said = {
        "mma": "not yet compared with hardware",
        "ldmatrix": "agrees with X",
        "cvt": "agrees with X",
    }
    monkeypatch.setattr(golden, "status", lambda: said)
    assert info.compared_with_hardware() == {
        "not yet compared with hardware": ["mma"],
        "agrees with X": ["ldmatrix", "cvt"],
    }
    assert "agrees with X: ldmatrix, cvt" in list(info.report())


def test_sentence() -> None:
    counts = info.KernelCounts(5, 9).since(info.KernelCounts(2, 2))
    assert counts == info.KernelCounts(3, 7)
    assert counts.sentence() == (
        "kernels compiled in this run: 3 (0 on the next run), read from the cache: 7"
    )
    assert info.KernelCounts(0, 7).sentence() == (
        "kernels compiled in this run: 0, read from the cache: 7"
    )


PROGRAM = """
import torch
import cnnops
from cnnops import info
torch.manual_seed(0)
with cnnops.engine("{engine}"), cnnops.fallback("error"):
    net = torch.nn.Sequential(cnnops.nn.Conv2d(3, 4, 3), cnnops.nn.MaxPool2d(2))
    net(torch.randn(2, 3, 8, 8)).sum().backward()
counts = info.kernel_counts()
print(counts.compiled, counts.loaded)
print([count for _, count in info.cached_kernels().values()])
"""


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["cpu", "emulate"])
def test_second_run_compiles_nothing(engine: str, tmp_path: Path) -> None:
    reason = info.unavailable(engine)
    if reason is not None:
        pytest.skip(reason)
    fresh = {"CNNOPS_CACHE_DIR": str(tmp_path / "own"), "NUMBA_CACHE_DIR": str(tmp_path / "numba")}
    first, second = (run("-c", PROGRAM.format(engine=engine), **fresh) for _ in range(2))
    assert first.returncode == 0, first.stderr
    (made, found), (made_again, found_again) = (
        map(int, done.stdout.splitlines()[0].split()) for done in (first, second)
    )
    assert made > 3 and found == 0
    assert made_again == 0 and found_again == made
    cuda, emulated, cpu = eval(second.stdout.splitlines()[1])
    assert cuda == 0
    assert (emulated if engine == "emulate" else cpu) == made
    assert second.stdout.splitlines()[1] == first.stdout.splitlines()[1]

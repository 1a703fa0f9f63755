"""``cnnops compile``, as it is typed; and that the kernels it compiles are those that networks ask for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from cnnops.__main__ import main
from cnnops.cpu import conv, task
from cnnops.shapes import ConvShape


def shell(line: str, cache: Path, module: str = "-m cnnops") -> SimpleNamespace:
    """Run ``cnnops …`` by a real shell, with this cache."""
    command = f"'{sys.executable}' {module} {line}"
    environment = {name: v for name, v in os.environ.items() if name != "NUMBA_CACHE_DIR"}
    environment["CNNOPS_CACHE_DIR"] = str(cache)
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    done = subprocess.run(command, shell=True, env=environment, capture_output=True, text=True)
    return SimpleNamespace(code=done.returncode, out=done.stdout, err=done.stderr)


def tiny() -> nn.Module:
    """What compiles in some seconds."""
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2))


LINE = "compile --cpu --model test_precompile:tiny --input 1,12,12 --dtype float32 --batch 1,5"
USE = f"""
import torch
import cnnops.cpu
from cnnops.__main__ import main
from test_precompile import tiny
assert main("{LINE}".split()) == 0
network = cnnops.convert(tiny()).model
for batch in (1, 5):
    network(torch.randn(batch, 1, 12, 12)).sum().backward()
print(cnnops.cpu.stats()["compiled"])
"""


@pytest.mark.slow
def test_second_run_compiles_nothing_nor_does_the_network(tmp_path: Path) -> None:
    first = shell(LINE, tmp_path)
    assert (first.code, first.err) == (0, "")
    compiled = int(first.out.split()[0])
    kept = list((tmp_path / "cpu").glob("*.o"))
    assert compiled == len(kept) > 3
    size = sum(path.stat().st_size for path in kept) / 1e6
    assert first.out.startswith(
        f"{compiled} kernels compiled, 0 found in the cache, {size:.1f} MB, "
    )
    assert first.out.endswith(f" s: {tmp_path / 'cpu'}\n")
    used = shell(f"-c '{USE}'", tmp_path, module="")
    assert used.out.startswith(f"0 kernels compiled, {compiled} found in the cache, 0.0 MB, ")
    assert used.out.endswith("\n0\n"), used.err


def test_a_cache_that_cannot_be_written_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("CNNOPS_CACHE_DIR", str(tmp_path / "file"))
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    assert main("compile --cpu lenet5".split()) == 1
    said = "cnnops compile: the cache directory cannot be written\n"
    assert capsys.readouterr() == ("", said)


def test_no_kernel_runs() -> None:
    x, y = torch.ones(2, 3, 8, 8), torch.full((2, 4, 8, 8), 7.0)
    shape = ConvShape.of(x.shape, (4, 3, 3, 3), padding=1)
    with task.compiling_only():
        conv.conv_fprop(shape, x, torch.ones(4, 3, 3, 3), None, y)
    assert (y == 7).all()
    conv.conv_fprop(shape, x, torch.ones(4, 3, 3, 3), None, y)
    assert y[0, 0, 4, 4] == 27

"""``cnnops compile``, as it is typed; and that the kernels it compiles are those that networks ask for."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cnnops import precompile
from cnnops.__main__ import main
from cnnops.cpu import conv, task
from cnnops.epilogue import Epilogue
from cnnops.shapes import ConvShape, LayerShape


def shell(line: str, cache: Path, module: str = "-m cnnops") -> SimpleNamespace:
    """Run ``cnnops …`` by a real shell, with this cache."""
    command = f"'{sys.executable}' {module} {line}"
    environment = {name: v for name, v in os.environ.items() if name != "NUMBA_CACHE_DIR"}
    environment["CNNOPS_CACHE_DIR"] = str(cache)
    done = subprocess.run(command, shell=True, env=environment, capture_output=True, text=True)
    return SimpleNamespace(code=done.returncode, out=done.stdout, err=done.stderr)


USE = """
import torch
import cnnops.cpu, cnnops.models
for dtype in (torch.float32, torch.bfloat16):
    net = cnnops.models.LeNet5().to(dtype)
    for batch in (1, 32):
        net(torch.randn(batch, 1, 28, 28, dtype=dtype)).sum().backward()
print(cnnops.cpu.stats()["compiled"])
"""


@pytest.mark.slow
def test_second_run_compiles_nothing_nor_does_the_network(tmp_path: Path) -> None:
    first, second = (shell("compile --cpu lenet5", tmp_path) for _ in range(2))
    assert (first.code, first.err, second.code, second.err) == (0, "", 0, "")
    words = first.out.split()
    compiled = int(words[0])
    kept = len(list((tmp_path / "cpu").glob("*.o")))
    assert compiled == kept > 8
    assert first.out.startswith(f"{compiled} kernels compiled, 0 found in the cache, ")
    assert first.out.endswith(f" s: {tmp_path / 'cpu'}\n")
    assert second.out.startswith(f"0 kernels compiled, {compiled} found in the cache, ")
    used = shell(f"-c '{USE}'", tmp_path, module="")
    assert used.out == "0\n", used.err


@pytest.mark.parametrize(
    "line, said",
    [
        ("lenet5", "cnnops compile: expected --cpu: kernels of other engines are compiled when"),
        ("--cpu lenet6", "cnnops compile: MODEL: expected one of lenet5, .*, got 'lenet6'"),
        ("--cpu --batch 0", "cnnops compile: --batch: expected positive numbers .*, got '0'"),
        ("--cpu --batch 1,,2", "cnnops compile: --batch: expected positive .*, got '1,,2'"),
        ("--gpu", "cnnops: unrecognized arguments: --gpu"),
    ],
)
def test_mistakes_are_said_in_a_line(
    line: str, said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    try:
        status = main(["compile", *line.split()])
    except SystemExit as ended:
        status = ended.code
    out, err = capfd.readouterr()
    assert status == 2 and out == "" and len(err.splitlines()) == 1
    assert re.match(said, err)


def test_a_cache_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = shell("compile --cpu lenet5", tmp_path / "file")
    assert (done.code, done.out) == (1, "")
    assert done.err == "cnnops compile: the cache directory cannot be written\n"


def test_no_kernel_runs() -> None:
    x, y = torch.ones(2, 3, 8, 8), torch.full((2, 4, 8, 8), 7.0)
    shape = ConvShape.of(x.shape, (4, 3, 3, 3), padding=1)
    with task.compiling_only():
        conv.conv_fprop(shape, x, torch.ones(4, 3, 3, 3), None, y)
    assert (y == 7).all()
    conv.conv_fprop(shape, x, torch.ones(4, 3, 3, 3), None, y)
    assert y[0, 0, 4, 4] == 27


def test_problems_at_another_batch() -> None:
    """Tensors as large as the problem's follow it, channels-last or not, and those of an epilogue."""
    shape = ConvShape.of((2, 3, 8, 8), (4, 3, 3, 3), padding=1)
    more = precompile._at(shape, 32)
    assert more == ConvShape.of((32, 3, 8, 8), (4, 3, 3, 3), padding=1)
    x = torch.empty(2, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    y = torch.empty(2, 4, 8, 8, dtype=torch.bfloat16)
    w = torch.empty(4, 3, 3, 3)
    at_x, at_y, at_w = (precompile._like(t, shape, more) for t in (x, y, w))
    assert at_x.shape == (32, 3, 8, 8) and at_x.stride() == x.stride()
    assert at_y.shape == (32, 4, 8, 8) and at_y.dtype == y.dtype and at_w is w
    epilogue = precompile._like(Epilogue(None, y, "relu"), shape, more)
    assert epilogue.residual.shape == (32, 4, 8, 8) and epilogue.activation == "relu"
    assert precompile._at(LayerShape((2, 7), (5,)), 1) == LayerShape((1, 7), (5,))

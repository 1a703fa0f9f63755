"""Importing the package is light: everything heavy waits for the first call that needs it."""

from __future__ import annotations

import subprocess
import sys

import pytest

import cnnops
from cnnops import config


def _run(code: str, **environment: str) -> str:
    import os

    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_import_loads_no_engine() -> None:
    loaded = _run(
        "import torch, sys; before = set(sys.modules); import cnnops; "
        "print(*sorted(set(sys.modules) - before))"
    ).split()
    assert "cnnops.functional" in loaded
    heavy = {"numba", "llvmlite", "cupy", "cupyx", "cuda", "sklearn", "matplotlib", "torchvision"}
    assert not heavy & {name.partition(".")[0] for name in loaded}
    # torch's compiler, which costs a second, would come in through a careless import.
    assert not {"torch._dynamo", "torch._inductor"} & set(loaded)
    assert not [name for name in loaded if name.startswith(("cnnops.cpu.", "cnnops.cuda."))]


def test_import_starts_no_process_and_writes_no_file() -> None:
    """No compiler is asked for anything, and nothing is stored: audit hooks see it all."""
    code = """
import sys, torch
seen = []
def hook(event, args):
    if event in ("subprocess.Popen", "os.system", "os.posix_spawn", "os.mkdir"):
        seen.append((event, args))
    if event == "open" and isinstance(args[1], str) and args[1][0] in "wax":
        seen.append((event, args))
sys.dont_write_bytecode = True
sys.addaudithook(hook)
import cnnops
print(seen)
"""
    assert _run(code) == "[]"


def test_settings_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "from cnnops.config import settings; print(settings.engine, settings.winograd)"
    assert _run(code, CNNOPS_ENGINE="aten", CNNOPS_WINOGRAD="0") == "aten False"
    with pytest.raises(AssertionError, match="CNNOPS_WINOGRAD: expected 0 or 1, got 'off'"):
        _run(code, CNNOPS_WINOGRAD="off")
    for value, engine in (("aten", "aten"), ("cpu", "cpu"), ("", "")):
        monkeypatch.setenv("CNNOPS_ENGINE", value)
        assert config._Settings().engine == engine
    for value, allowed in (("0", False), ("", True), ("1", True)):
        monkeypatch.setenv("CNNOPS_WINOGRAD", value)
        assert config._Settings().winograd is allowed
    monkeypatch.setenv("CNNOPS_ENGINE", "gpu")
    expected = "expected one of cuda, emulate, cpu, aten or None, got 'gpu'"
    with pytest.raises(ValueError, match=expected):
        config._Settings()


def test_public_names() -> None:
    assert cnnops.__version__ == "0.1.0"
    for name in cnnops.__all__:
        assert hasattr(cnnops, name)
    for module in (cnnops.functional, cnnops.nn):
        assert all(getattr(module, name).__doc__ for name in module.__all__)

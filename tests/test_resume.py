"""`cnnops train` is killed, again and again, and ends in the weights of a run that nobody disturbed."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from small_networks import write_digits

from cnnops.__main__ import main
from cnnops.training import checkpoint

pytest.importorskip("matplotlib", reason="matplotlib is missing: pip install 'cnnops[demo]'")

KILLS = 10
STEPS = 36 * 11
ARGUMENTS = (
    "small_networks:tiny", "--engine", "cpu", "--epochs", "36", "--batch", "32", "--threads", "1",
    "--optimizer", "adam", "--augment", "shift=2,noise=0.05", "--checkpoint-every", "3", "--seed", "3",
)  # fmt: skip


def arguments(data: Path, out: Path, *more: str) -> list[str]:
    return ["train", *ARGUMENTS, "--data", str(data), "--out", str(out), *more]


def started(given: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "cnnops", *given],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parent,
        env={**os.environ, "CNNOPS_POLICY": "own"},
    )


def written(path: Path) -> int:
    """When the file was written, 0 where there is none (or just now none, between two renames)."""
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def wait_for_checkpoint(child: subprocess.Popen[str], path: Path, former: int) -> None:
    until = time.monotonic() + 120
    while written(path) in (0, former):
        assert child.poll() is None and time.monotonic() < until, child.communicate()
        time.sleep(0.002)


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="sends signals")
def test_ten_kills_change_nothing(tmp_path: Path) -> None:
    """At random points, in the midst of writing as elsewhere; then it goes on to the end."""
    data = write_digits(tmp_path / "data", 32 * 11 + 5)
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    assert main(arguments(data, whole)) == 0
    kept = checkpoint.load(whole / checkpoint.NEWEST)
    seconds = sum(kept["record"]["seconds"])

    delays = random.Random(0)
    newest = torn / checkpoint.NEWEST
    for _ in range(KILLS):
        former = written(newest)
        child = started(arguments(data, torn, "--resume"))
        wait_for_checkpoint(child, newest, former)
        # Twelfths, so that ten of them, and what is done before each, leave something to do.
        time.sleep(delays.random() * seconds / (KILLS + 2))
        child.kill()
        printed, errors = child.communicate(timeout=60)
        assert child.returncode == -signal.SIGKILL, (printed, errors)
    found = checkpoint.find(torn)
    assert found is not None and 0 < checkpoint.load(found)["step"] < STEPS

    child = started(arguments(data, torn, "--resume"))
    printed, errors = child.communicate(timeout=300)
    assert (child.returncode, errors) == (0, "") and "going on from step" in printed
    one, other = (checkpoint.load(folder / checkpoint.NEWEST) for folder in (whole, torn))
    for state in (one, other):
        state["record"].pop("seconds")
        assert state.pop("seconds") == 0 and state["step"] == STEPS
    for part in one:
        assert equal(one[part], other[part]), part
    assert sorted(p.name for p in torn.iterdir()) == sorted(p.name for p in whole.iterdir())
    assert "curves.png" in [p.name for p in torn.iterdir()]

"""The emulator as clang builds it: planted bugs of test_emulator.py, where a clang is installed.

The compiler is chosen by CXX when the emulator is first used, so that this runs in a process of its own.

What differs from g++: clang copies a structure without a check of its alignment, so that a misaligned pack
goes unseen (`MISSED`); an endless loop is reported without its line where it holds nothing but assembly, or
where time runs out inside the runtime (`WITHOUT_LINE`); and a local variable without a value is a NaN (an
int: 0xAAAAAAAA), where GCC 12 has -1.7e38 and GCC 11 whatever was there.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

OLDEST = 14
MISSED = ("misaligned_load", "misaligned_pack", "misaligned_shared")
WITHOUT_LINE = ("endless_loop", "endless_barriers", "spin_lock")


def clang() -> str | None:
    """A clang++ that is new enough, or None."""
    for name in ("clang++", *(f"clang++-{version}" for version in range(30, OLDEST - 1, -1))):
        path = shutil.which(name)
        if path is not None:
            asked = [path, "-dM", "-E", "-x", "c++", os.devnull]
            macros = subprocess.run(asked, capture_output=True, text=True).stdout.split("#define ")
            major = [m.split()[1] for m in macros if m.startswith("__clang_major__ ")]
            if major and int(major[0]) >= OLDEST:
                return path
    return None


PROGRAM = """
import re, sys
import test_emulator
from cnnops.cuda import emulate, emulator_build

assert emulator_build.compiler()[1].startswith("clang "), emulator_build.compiler()
missed, without_line = sys.argv[1].split(","), sys.argv[2].split(",")
found = 0
for entry, bug in test_emulator.PLANTED.items():
    if bug.file not in ("memory", "races", "collectives", "limits"):
        continue
    for schedule in ("all",) if entry == "last_one_wins" else ("forward", "random"):
        plan, tensors = test_emulator.planted(entry, bug=0)
        with emulate.schedule(schedule):
            emulate.execute(plan, tensors)
        plan, tensors = test_emulator.planted(entry, bug=1)
        try:
            with emulate.schedule(schedule), emulate.time_limit(0.05):
                emulate.execute(plan, tensors)
        except emulate.KernelError as error:
            told = str(error)
        else:
            told = "nothing"
        if entry in missed:
            assert not re.search(bug.report, told), f"{entry} is found by now: take it out of MISSED"
            continue
        assert re.search(bug.report, told), f"{entry}: expected {bug.report}, got {told}"
        placed = entry not in (*test_emulator.WITHOUT_PLACE, *without_line)
        assert not placed or re.match(r"\\w+\\.cuh?:[0-9]+: ", told), told
        found += 1
print(found)
"""


@pytest.mark.slow
def test_clang_finds_the_planted_bugs() -> None:
    path = clang()
    if path is None:
        pytest.skip(f"clang {OLDEST} or newer is not installed: apt install clang")
    here = Path(__file__).parent
    environment = {**os.environ, "CXX": path, "PYTHONPATH": f"{here}:{here.parent}"}
    command = [sys.executable, "-c", PROGRAM, ",".join(MISSED), ",".join(WITHOUT_LINE)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 80

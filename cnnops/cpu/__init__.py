"""The CPU engine: kernels in numba, on all cores. numba is imported with the kernels, not here."""

from __future__ import annotations

import sys


def stats() -> dict[str, int]:
    """How many functions of this engine were compiled in this process, and how many came from the disk.

    Once a program's shapes have all been seen, another run of it compiles nothing.
    """
    code = sys.modules.get("cnnops.cpu.code")
    return code.stats() if code else {"compiled": 0, "loaded_from_cache": 0}

"""Large results on a CPU in huge pages.

New memory is given out page by page as it is first written: 25,000 faults for 100 MB in pages of 4 KiB, which
take longer than most layers do. Linux takes huge pages only where it is told to, unless its administrator has
decided for all or none. Nothing else changes: whole huge pages within the tensor alone are asked for, so that
it takes no more memory than it would.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

from torch import Tensor

LEAST = 1 << 20
"""Elements of a tensor that is worth the call."""

_SETTINGS = Path("/sys/kernel/mm/transparent_hugepage")
_MADV_HUGEPAGE = 14


@lru_cache(None)
def _system() -> tuple[int, Callable[[int, int, int], int]] | None:
    """The size of a huge page, and the C library's ``madvise(address, bytes, advice)``; None where nobody has
    to ask, or may."""
    try:
        if (
            not sys.platform.startswith("linux")
            or "[madvise]" not in (_SETTINGS / "enabled").read_text()
        ):
            return None
        size = int((_SETTINGS / "hpage_pmd_size").read_text())
        advise = ctypes.CDLL(None).madvise
    except (OSError, ValueError, AttributeError):
        return None
    advise.argtypes = ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int
    return size, advise


def use_for(t: Tensor) -> Tensor:
    """`t`, a new tensor on a CPU that nothing was written to yet, in huge pages as far as it has whole ones.

    What the system answers makes no difference to anything but time.
    """
    if found := _system():
        size, advise = found
        start = -(-t.data_ptr() // size) * size
        end = (t.data_ptr() + t.untyped_storage().nbytes()) // size * size
        if end > start:
            advise(start, end - start, _MADV_HUGEPAGE)
    return t

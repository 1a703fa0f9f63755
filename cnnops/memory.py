"""The memory of tensors on a CPU: large results in huge pages, and what is freed kept for the next ones.

New memory is given out page by page as it is first written: 25,000 faults for 100 MB in pages of 4 KiB, which
take longer than most layers do. So large results ask for huge pages, always; and a process that wants no new
pages at all, once it has what it needs, says so (`keep_memory`).
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

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
"""glibc's names for `mallopt`: free bytes at the end of memory that are given back; the most blocks that have
pages of their own, which are given back with them."""


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


def use_huge_pages(t: Tensor) -> Tensor:
    """`t`, a new tensor on a CPU that nothing was written to yet, in huge pages as far as it has whole ones.

    Linux takes them only where it is told to, unless its administrator has decided for all or none. Whole
    pages within the tensor alone are asked for, so that it takes no more memory than it would. What the
    system answers makes no difference to anything but time.
    """
    if found := _system():
        size, advise = found
        start = -(-t.data_ptr() // size) * size
        end = (t.data_ptr() + t.untyped_storage().nbytes()) // size * size
        if end > start:
            advise(start, end - start, _MADV_HUGEPAGE)
    return t


def keep_memory() -> bool:
    """Keep the memory that tensors on the CPU give back for the next tensors, in this process, for good.

    By itself glibc, the C library of most Linux systems, hands large blocks back to the system as soon as
    they are free, and fetches new pages for the next tensor: in a training step on a CPU some ten thousand,
    PyTorch's own operations included. After this call there are hardly any. Steps of
    MobileNetV2 with 8 images of 224x224 and of VGG-16 with 2 took 0.7 of the time (2 cores of an Intel
    Emerald Rapids).

    The price: the process keeps as much memory as it ever needed at once, and gaps between blocks that
    others do not fit in. It concerns all of the process, not tensors alone. Environment variables do the
    same from outside: ``MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=2147483647``.

    Returns whether the C library knows how; False elsewhere, as on macOS, where nothing has changed.
    `cnnops train` calls it where it computes on a CPU.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))

"""What the two compilers of kernels, NVRTC and g++, share beside the cache on disk."""

from __future__ import annotations

import re
from pathlib import Path

_LOCAL_INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"', re.MULTILINE)


class CompileError(RuntimeError):
    """A compiler refused a kernel; the message holds file, constants and the compiler's own words."""


def sources(path: Path, *folders: Path) -> list[Path]:
    """`path` and every local header it includes, directly or not, in a fixed order.

    A header is looked for as the compilers do: beside the file that names it, then in `folders`.
    """
    found: dict[Path, None] = {}
    waiting = [path]
    while waiting:
        file = waiting.pop()
        if file not in found:
            found[file] = None
            for name in _LOCAL_INCLUDE.findall(file.read_text()):
                places = [folder / name for folder in (file.parent, *folders)]
                waiting += [place for place in places if place.is_file()][:1]
    return sorted(found)

"""Draws the pictures of these pages: ``python docs/drawings``. With ``--check`` nothing is written, and the
exit code is 1 where a file is not what is drawn.
"""

from __future__ import annotations

import sys
from pathlib import Path

import convolution
import cpu
import overview
import reductions

HERE = Path(__file__).parent


def main() -> int:
    stale = []
    for module in (overview, convolution, reductions, cpu):
        for name, canvas in module.drawings().items():
            path, text = HERE / f"{name}.svg", canvas.svg()
            if not path.exists() or path.read_text(encoding="utf-8") != text:
                stale.append(path.name)
                if "--check" not in sys.argv:
                    path.write_text(text, encoding="utf-8")
    if stale:
        done = "stale; python docs/drawings renews them" if "--check" in sys.argv else "drawn"
        print(f"{', '.join(stale)}: {done}")
    return 1 if stale and "--check" in sys.argv else 0


if __name__ == "__main__":
    sys.exit(main())

"""How far results are from the truth, beside PyTorch's own: every row, in float32 and both half types.

    python -m tests.numerics [--engine cpu|emulate|cuda] [--worst 20]

The truth is PyTorch in float64, from the same rounded inputs; a distance is norm-relative, the worst of the
output and all gradients of a row. A row passes where ours is at most `ALLOWED` times PyTorch's, or within
`LUCK`: no order of summing is the best for all data, and the last bits are luck.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import geometric_mean

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))

from cases import CASES, Case, device_of, run

import cnnops
from cnnops import tuned

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ALLOWED = {"cpu": 1.5, "cuda": 1.5, "emulate": 2.5}
"""Times PyTorch's own distance on the same device. The emulator sums in a GPU's order, one term after the
other in a thread, and PyTorch on a CPU, its rival here, in many short sums, which rounds less.
"""
LUCK = {torch.float32: 3e-7, torch.float16: 5e-4, torch.bfloat16: 4e-3}
"""The distance at which nobody is worse than another: half a unit in the last place of a half type, rounded
once; two to three units in float32, where it is what a few operations one after the other leave.
"""


@dataclass(frozen=True)
class Distance:
    """Of one row and type: ours and PyTorch's, each the worst of output and gradients."""

    case: Case
    engine: str
    dtype: torch.dtype
    ours: float
    theirs: float

    @property
    def passes(self) -> bool:
        return self.ours <= max(ALLOWED[self.engine] * self.theirs, LUCK[self.dtype])

    def __str__(self) -> str:
        kind = str(self.dtype).removeprefix("torch.")
        return f"{type(self.case).__name__:<14}{self.case.id:<34}{kind:<10}{self.ours:9.1e}{self.theirs:9.1e}"


def distance(values: Tensor, truth: Tensor) -> float:
    """``||values - truth|| / ||truth||`` over what is finite in the truth."""
    a, b = values.detach().double().cpu(), truth.detach()
    finite = b.isfinite()
    a, b = a.where(finite, 0), b.where(finite, 0)
    scale = float(b.norm())
    return float((a - b).norm()) / scale if scale else float((a - b).norm())


def measure(case: Case, engine: str, dtype: torch.dtype) -> Distance | None:
    """None where PyTorch has no such operation in the type."""
    tensors = case.tensors(dtype, device_of(engine))
    truth = run(case.theirs, [t.cpu().double() for t in tensors], case.grad)
    try:
        theirs = run(case.theirs, tensors, case.grad)
    except (RuntimeError, NotImplementedError):
        return None
    with cnnops.engine(engine):
        ours = run(case.ours, tensors, case.grad)
    pairs = list(zip(ours, theirs, truth, strict=True))
    # What is zero but for rounding has no scale of its own: the gradient of a bias before a norm.
    told = [(a, b, t) for a, b, t in pairs if t.numel() and float(t.nan_to_num().norm()) > 1e-6]
    return Distance(
        case,
        engine,
        dtype,
        max((distance(a, t) for a, _, t in told), default=0.0),
        max((distance(b, t) for _, b, t in told), default=0.0),
    )


def distances(engine: str, cases: Iterable[Case] = CASES) -> Iterator[Distance]:
    for case in cases:
        for dtype in DTYPES:
            if dtype in case.dtypes:
                found = measure(case, engine, dtype)
                if found is not None:
                    yield found


def table(found: list[Distance]) -> Iterator[str]:
    """One line a kind of row and type: rows, worst distances, and the mean ratio."""
    yield f"{'rows':<16}{'type':<10}{'rows':>5}{'worst':>9}{'torch':>9}{'ratio':>7}{'beyond':>8}"
    for kind in dict.fromkeys(type(d.case).__name__ for d in found):
        for dtype in DTYPES:
            some = [d for d in found if type(d.case).__name__ == kind and d.dtype == dtype]
            if not some:
                continue
            ratios = [d.ours / d.theirs for d in some if d.ours and d.theirs]
            yield (
                f"{kind:<16}{str(dtype).removeprefix('torch.'):<10}{len(some):>5}"
                f"{max(d.ours for d in some):>9.1e}{max(d.theirs for d in some):>9.1e}"
                f"{geometric_mean(ratios) if ratios else 1:>7.2f}{sum(not d.passes for d in some):>8}"
            )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.numerics", description=__doc__)
    parser.add_argument("--engine", default="cpu")
    parser.add_argument("--worst", type=int, default=20, help="how many of the worst rows to show")
    options = parser.parse_args()
    with tuned.only(), cnnops.policy("own"), cnnops.fallback("error"):
        found = list(distances(options.engine))
    print(*table(found), sep="\n")
    beyond = sorted(
        (d for d in found if not d.passes), key=lambda d: -d.ours / max(d.theirs, 1e-30)
    )
    if beyond:
        print("\nbeyond: row, type, ours, torch's", *map(str, beyond[: options.worst]), sep="\n")
    return int(bool(beyond))


if __name__ == "__main__":
    sys.exit(main())

"""No row is further from the truth than 1.5 times PyTorch's own distance; `numerics` tells what that is."""

from __future__ import annotations

import numerics
import pytest
import torch
from cases import CASES, CONV_CASES, ENGINES, NORM_CASES, POOL_CASES, Case

OWN = [engine for engine in ENGINES if engine != "aten"]
# Sums are of few kinds: every third row of the CPU's, every sixth of the emulator's, is enough here.
# `python -m tests.numerics` has them all.
ROWS = [
    pytest.param(
        case, *own.values, marks=own.marks, id=f"{type(case).__name__}-{case.id}-{own.values[0]}"
    )
    for own in (e if not isinstance(e, str) else pytest.param(e) for e in OWN)
    for case in CASES[:: {"cpu": 3, "emulate": 6}.get(own.values[0], 1)]
]


@pytest.mark.parametrize("case, engine", ROWS)
def test_as_near_as_pytorch(case: Case, engine: str) -> None:
    far = [str(found) for found in numerics.distances(engine, [case]) if not found.passes]
    assert not far, "\n".join(["row, type, ours, PyTorch's:", *far])


def test_a_worse_sum_would_be_noticed() -> None:
    """The limit is near: float32 results that went through bfloat16 are beyond it."""
    case = next(case for case in CASES if case.id == "tiles")
    found = numerics.measure(case, "cpu", torch.float32)
    assert found is not None and found.passes
    values = torch.linspace(1, 2, 1000, dtype=torch.float64)
    rounded = numerics.distance(values.bfloat16(), values)
    assert rounded > numerics.LUCK[torch.float32] * 1000
    assert not numerics.Distance(case, "cpu", torch.float32, rounded, found.theirs).passes


def test_the_table_counts_every_row() -> None:
    some = [
        case
        for case in CONV_CASES + POOL_CASES + NORM_CASES
        if case.id in ("plain", "max_2x2", "train")
    ]
    lines = list(numerics.table(list(numerics.distances("cpu", some))))
    assert len(lines) == 1 + 3 * len(numerics.DTYPES)
    assert all(line.split()[2] == "1" for line in lines[1:])

"""Which engines work on this machine, and the grid of rows, engines and dtypes that tests run over.

`pytest -m gpu` runs what needs an NVIDIA GPU; without one those tests are not collected. Where g++ is
missing, the CUDA kernels cannot run on the CPU, and the tests that would are skipped with that reason.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import cnnops


@pytest.fixture(autouse=True)
def settings() -> Iterator[None]:
    """Every test starts from the default engine, and no problem may slip away to PyTorch unnoticed."""
    with cnnops.engine(None), cnnops.fallback("error"), cnnops.algorithm(None):
        torch.manual_seed(0)
        yield

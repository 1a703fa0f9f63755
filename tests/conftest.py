"""What holds for every test.

Tests marked `gpu` need an NVIDIA GPU and do not exist where there is none. Where g++ is missing, the CUDA
kernels cannot run on the CPU, and the tests that would are skipped with that reason. Rows are in tests/cases.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator

import hypothesis
import pytest
import torch

import cnnops
from cnnops import tuned
from cnnops.ops import alike

# The same examples in every run, however slow the machine.
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.load_profile("repeatable")


@pytest.fixture(autouse=True, scope="session")
def no_tables() -> Iterator[None]:
    """What somebody has tuned on this machine changes no test."""
    with tuned.only():
        yield


@pytest.fixture(autouse=True, scope="session")
def all_bits() -> Iterator[None]:
    """On a GPU torch would let convolutions multiply float32 as TF32; tests that want that say so."""
    cudnn = torch.backends.cudnn
    former, cudnn.allow_tf32 = cudnn.allow_tf32, False
    yield
    cudnn.allow_tf32 = former


@pytest.fixture(autouse=True)
def settings() -> Iterator[None]:
    """Every test starts from the default engine, and no problem may slip away to PyTorch unnoticed. What
    calls did in another test, which may have changed it, is not repeated."""
    alike.forget()
    with (
        cnnops.engine(None),
        cnnops.fallback("error"),
        cnnops.algorithm(None),
        cnnops.policy("own"),
    ):
        torch.manual_seed(0)
        yield


def pytest_collection_finish() -> None:
    """What stands when tests begin, stays: to look for garbage in it would cost some of their time."""
    gc.freeze()


def pytest_configure(config: pytest.Config) -> None:
    # PyTorch's word about its own speed, from the reference of rows with an even kernel.
    config.addinivalue_line("filterwarnings", "ignore:Using padding='same' with even kernel")

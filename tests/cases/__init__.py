"""The problems that every engine is held to: frozen rows, each with the reason it is here.

A row knows its tensors (`tensors`), how this package computes it (`ours`) and how PyTorch does (`theirs`).
`run` gives the output and every gradient; `assert_close` compares them with the one table of tolerances.
All rows run in float32; those with ``dtypes=ALL`` in the other types too.
"""

from cases.base import (
    ALL,
    ENGINES,
    TOLERANCE,
    Case,
    assert_close,
    check,
    device_of,
    grid,
    laid_out,
    needs_emulator,
    normal,
    run,
)
from cases.conv import CONV_CASES, ConvCase
from cases.conv_act import CONV_ACT_CASES, ConvActCase
from cases.depthwise import DEPTHWISE_CASES
from cases.group_norm import (
    GROUP_NORM_CASES,
    LAYER_NORM_CASES,
    GroupNormCase,
    LayerNormCase,
)
from cases.norm import NORM_CASES, NormCase
from cases.pool import POOL_CASES, PoolCase

CASES: tuple[Case, ...] = (
    *CONV_CASES,
    *CONV_ACT_CASES,
    *DEPTHWISE_CASES,
    *POOL_CASES,
    *NORM_CASES,
    *GROUP_NORM_CASES,
    *LAYER_NORM_CASES,
)

__all__ = [
    "ALL",
    "CASES",
    "CONV_ACT_CASES",
    "CONV_CASES",
    "DEPTHWISE_CASES",
    "ENGINES",
    "GROUP_NORM_CASES",
    "LAYER_NORM_CASES",
    "NORM_CASES",
    "POOL_CASES",
    "TOLERANCE",
    "Case",
    "ConvActCase",
    "ConvCase",
    "GroupNormCase",
    "LayerNormCase",
    "NormCase",
    "PoolCase",
    "assert_close",
    "check",
    "device_of",
    "grid",
    "laid_out",
    "needs_emulator",
    "normal",
    "run",
]

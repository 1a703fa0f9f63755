"""What a golden item is, how it is run, and how results are compared."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from cnnops.cuda.kernel import Launch, launch_of
from cnnops.cuda.launch import launch

KERNELS = Path(__file__).parent / "kernels"
Tensors = dict[str, torch.Tensor]


# ---- rules -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """How near a result must be to another one of the same kernel. `why` states the reason for it."""

    why: str

    def distance(self, got: torch.Tensor, want: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """How far apart the elements are, float64; 0 is equal."""
        raise AssertionError("every rule states its distance")

    @property
    def limit(self) -> float:
        """The largest distance that the rule lets pass."""
        return 0.0


def _as_integers(x: torch.Tensor) -> torch.Tensor:
    """The bits of the elements as signed integers of their width."""
    kinds = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return x.contiguous().view(kinds[x.element_size()])


def _ordinal(x: torch.Tensor) -> torch.Tensor:
    """Floats numbered in their order, so that neighbours are 1 apart and both zeros are 0."""
    bits = _as_integers(x).to(torch.int64)
    lowest = -(1 << (8 * x.element_size() - 1))
    return torch.where(bits < 0, lowest - bits, bits)


@dataclass(frozen=True)
class Bits(Rule):
    """Every bit is the same."""

    def distance(self, got: torch.Tensor, want: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return (_as_integers(got) != _as_integers(want)).double()


@dataclass(frozen=True)
class BitsOrNaN(Rule):
    """Every bit is the same, but one NaN is as good as another."""

    def distance(self, got: torch.Tensor, want: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        both_nan = got.isnan() & want.isnan()
        return ((_as_integers(got) != _as_integers(want)) & ~both_nan).double()


@dataclass(frozen=True)
class Ulps(Rule):
    """At most `ulps` representable numbers apart; infinities and NaN where the other has them."""

    ulps: int = 0

    @property
    def limit(self) -> float:
        return float(self.ulps)

    def distance(self, got: torch.Tensor, want: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        apart = (_ordinal(got) - _ordinal(want)).abs().double()
        nan = got.isnan() | want.isnan()
        same = got.isnan() & want.isnan()
        return torch.where(nan, torch.where(same, 0.0, torch.inf), apart)


@dataclass(frozen=True)
class Within(Rule):
    """|got - want| <= tolerance · scale, where the item states the scale of each element."""

    tolerance: float = 0.0

    @property
    def limit(self) -> float:
        return self.tolerance

    def distance(self, got: torch.Tensor, want: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        apart = (got.double() - want.double()).abs() / scale.double().clamp(min=1e-300)
        return torch.where(apart.isnan(), torch.inf, apart)


# ---- items -----------------------------------------------------------------------------------------------


class Params(ctypes.Structure):
    """`struct Params` of golden.cuh."""

    _fields_ = [("n", ctypes.c_int)]


@dataclass(frozen=True)
class Item:
    """One micro-kernel: what it runs on, what is expected, and how near is right.

    `wrappers` are the functions of kernels/ptx*.cuh that it pins down; empty for what CUDA itself provides.
    `inputs` makes them from a generator, always the same ones. `expected` computes the outputs in torch or
    numpy, independently of the emulator; `scale`, for the rule `Within`, their scale. Outputs take shapes and
    dtypes from `expected`. `rules` replaces the rule for some outputs, by name. `arch` is what the
    instructions need: "80" or "90" and up, or "90a" and no other.
    """

    name: str
    wrappers: tuple[str, ...]
    source: str
    entry: str
    inputs: Callable[[torch.Generator], Tensors]
    expected: Callable[[Tensors], Tensors]
    rule: Rule
    rules: Mapping[str, Rule] = field(default_factory=dict)
    scale: Callable[[Tensors], Tensors] | None = None
    constants: Mapping[str, str | int] = field(default_factory=dict)
    block: int = 32
    elements: Callable[[Tensors], int] = lambda inputs: next(iter(inputs.values())).shape[0]
    grid: Callable[[Tensors], int] | None = None
    arch: str = "80"

    def make_inputs(self) -> Tensors:
        return self.inputs(torch.Generator().manual_seed(20260101))

    def plan(self, inputs: Tensors, outputs: Tensors) -> Launch:
        n = self.elements(inputs)
        blocks = self.grid(inputs) if self.grid else -(-n // self.block)
        return launch_of(
            str(KERNELS / self.source), self.entry, dict(self.constants), Params(n), grid=[blocks],
            block=[self.block], inputs=tuple(inputs), outputs=tuple(outputs),
        )  # fmt: skip

    def run(self, inputs: Tensors, device: str) -> Tensors:
        """The outputs on the CPU: of the GPU for "cuda", of the emulator for "cpu"."""
        outputs = {name: torch.empty_like(t) for name, t in self.expected(inputs).items()}
        there = [{name: t.to(device) for name, t in group.items()} for group in (inputs, outputs)]
        launch(self.plan(inputs, outputs), tuple(there[0].values()), tuple(there[1].values()))
        return {name: t.cpu() for name, t in there[1].items()}

    def compare(self, inputs: Tensors, got: Tensors, want: Tensors) -> Comparison:
        """Holds `got` against `want` by the item's rules."""
        scales = self.scale(inputs) if self.scale else {}
        wrong, total, largest, outputs = 0, 0, 0.0, []
        for name, reference in want.items():
            rule = self.rules.get(name, self.rule)
            apart = rule.distance(got[name], reference, scales.get(name, torch.ones(())))
            largest = max(largest, float(apart.max()))
            total += apart.numel()
            count = int((apart > rule.limit).sum())
            wrong += count
            outputs += [name] * bool(count)
        return Comparison(wrong, total, largest, tuple(outputs))


@dataclass(frozen=True)
class Comparison:
    """`wrong` of `total` elements, in `outputs`, are farther apart than the rule allows."""

    wrong: int
    total: int
    largest: float
    outputs: tuple[str, ...]

    def __str__(self) -> str:
        if not self.wrong:
            return f"0 of {self.total} differ, largest distance {self.largest:.3g}"
        return (
            f"{self.wrong} of {self.total} differ in {', '.join(self.outputs)}, "
            f"largest distance {self.largest:.3g}"
        )

"""What all rows have in common: tensors in every layout, how they are run, and how results are compared."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import cnnops
from cnnops.cuda import emulate

ALL = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
FLOAT32 = (torch.float32,)
HALVES = (torch.float16, torch.bfloat16)
Size = tuple[int, ...]
Ints = int | tuple[int, ...]


class Tolerance(NamedTuple):
    """Largest ``||ours - reference|| / ||reference||``, both from the same rounded inputs."""

    output: float
    gradient: float


TOLERANCE = {
    torch.float64: Tolerance(1e-14, 1e-14),
    torch.float32: Tolerance(1e-6, 2e-6),
    # Rounding the result alone costs up to 2^-11 and 2^-8 of it; gradients may be sums of rounded terms.
    torch.float16: Tolerance(5e-4, 1e-3),
    torch.bfloat16: Tolerance(4e-3, 6e-3),
}


def assert_close(ours: Tensor, reference: Tensor, limit: float, what: str) -> None:
    """Sizes, places of NaN and infinity are the same, and the rest is within `limit`, norm-relative."""
    assert ours.shape == reference.shape, what
    a, b = ours.detach().double().cpu(), reference.detach().double().cpu()
    wild = ~b.isfinite()
    assert torch.equal(a[wild].nan_to_num(), b[wild].nan_to_num()), f"{what}: NaN or infinity"
    a, b = a.masked_fill(wild, 0), b.masked_fill(wild, 0)
    error, scale = float((a - b).norm()), float(b.norm())
    assert error <= limit * scale, (
        f"{what}: off by {error / scale if scale else error:.2e}, limit {limit:.0e}"
    )


def run(
    function: Callable[..., Tensor], tensors: Sequence[Tensor], grad: str = "like"
) -> list[Tensor]:
    """The output of `function` and its gradients for every tensor, from one fixed random output gradient.

    `grad` lays that gradient out: "like" the output, "contiguous", or "expanded" from a single value.
    """
    leaves = [t.detach().requires_grad_() for t in tensors]
    y = function(*leaves)
    size = (1,) * y.dim() if grad == "expanded" else y.shape
    values = torch.randn(size, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    # Rounded to the coarsest type, so that all types and the reference get the same numbers.
    grad_y = values.to(torch.bfloat16).to(y.dtype).to(y.device)
    if grad == "like":
        grad_y = torch.empty_like(y).copy_(grad_y)
    return [y, *torch.autograd.grad(y, leaves, grad_y.expand(y.shape))]


def check(case: Case, engine: str, dtype: torch.dtype, slack: float = 1) -> None:
    """Output and gradients of the row in `engine`, against PyTorch in float64, within `slack` tolerances."""
    tensors = case.tensors(dtype, device_of(engine))
    with cnnops.engine(engine):
        ours = run(case.ours, tensors, case.grad)
    theirs = run(case.theirs, [t.cpu().double() for t in tensors], case.grad)
    tolerance = TOLERANCE[dtype]
    names = ("output", *(f"gradient of input {i}" for i in range(len(tensors))))
    for name, a, b, t in zip(names, ours, theirs, (None, *tensors), strict=True):
        assert t is None or a.dtype == t.dtype, name
        limit = tolerance.output if t is None else tolerance.gradient
        assert_close(a, b, slack * case.limit(engine, limit), f"{case.id}, {name}")


def laid_out(size: Size, layout: str, values: Callable[[Size], Tensor]) -> Tensor:
    """A tensor of this size with `values`, in one of the layouts that a caller may hand over.

    contiguous; channels_last; sliced: every second channel, without the last column of a wider one;
    transposed: last two axes swapped in memory; expanded: one image that stands for the whole batch;
    offset: contiguous, starting one element past an aligned address; channels_last_offset: both.
    """
    if layout == "expanded":
        return values((1, *size[1:])).expand(size)
    x = values(size)
    if layout == "contiguous":
        return x
    if layout == "sliced":
        wide = x.new_zeros(size[0], 2 * size[1], *size[2:-1], size[-1] + 1)
        view = wide[:, ::2, ..., :-1]
    elif layout == "transposed":
        view = x.new_zeros(*size[:-2], size[-1], size[-2]).transpose(-1, -2)
    elif layout in ("channels_last", "channels_last_offset", "offset"):
        shift = layout.endswith("offset")
        flat = x.new_zeros(math.prod(size) + shift)[int(shift) :]
        if layout == "offset":
            view = flat.view(size)
        else:
            view = flat.view(size[0], *size[2:], size[1]).movedim(-1, 1)
    else:
        raise ValueError(layout)
    return view.copy_(x)


def normal(seed: int, dtype: torch.dtype) -> Callable[[Size], Tensor]:
    """Standard normal numbers, rounded to `dtype`, the same for every type but for the rounding."""
    generator = torch.Generator().manual_seed(seed)
    return lambda size: torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)


@dataclass(frozen=True)
class Case:
    """What all rows have: the input's size and layout (`laid_out`), and the output gradient's (`run`).

    `schedules`: the row also runs under every thread order of the emulator. `aten_limit`: what to grant
    PyTorch's own operation where it is less exact than the table of tolerances asks.
    """

    id: str
    x: Size
    why: str
    _: KW_ONLY
    layout: str = "contiguous"
    grad: str = "like"
    dtypes: tuple[torch.dtype, ...] = FLOAT32
    schedules: bool = False
    aten_limit: float = 0.0

    def limit(self, engine: str, limit: float) -> float:
        return max(limit, self.aten_limit) if engine == "aten" else limit

    def tensors(self, dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
        raise NotImplementedError

    def ours(self, *tensors: Tensor) -> Tensor:
        raise NotImplementedError

    def theirs(self, *tensors: Tensor) -> Tensor:
        raise NotImplementedError


def moved(t: Tensor, device: str) -> Tensor:
    """`t` on another device, with its strides and, for one that starts off alignment, its offset."""
    if device == "cpu":
        return t
    last = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) if t.numel() else 0
    storage = torch.empty(t.storage_offset() + last + 1, dtype=t.dtype, device=device)
    view = storage.as_strided(t.shape, t.stride(), t.storage_offset())
    if 0 in t.stride():
        storage.fill_(0)
        view[:1].copy_(t[:1])
        return view
    return view.copy_(t)


# ---- the grid -------------------------------------------------------------------------------------------


needs_emulator = pytest.mark.skipif(
    bool(emulate.available()), reason=f"CUDA kernels cannot be emulated here: {emulate.available()}"
)


def _engines() -> list[Any]:
    found: list[Any] = ["aten", "cpu", pytest.param("emulate", marks=needs_emulator)]
    if torch.cuda.is_available():
        found.append(pytest.param("cuda", marks=pytest.mark.gpu))
    return found


ENGINES = _engines()
"""For ``parametrize``: every engine that this machine may run, and "emulate" skipped with the reason."""


def device_of(engine: str) -> str:
    return "cuda" if engine == "cuda" else "cpu"


def grid(cases: Iterable[Case]) -> list[Any]:
    """Rows x engines x dtypes, as parameters (case, engine, dtype).

    Under the emulator all types but float32, whose kernels differ in that alone, take turns; on the CPU they
    do so in rows of an activation other than ReLU.
    """
    parameters = []
    for i, case in enumerate(cases):
        turns = [dtype for dtype in case.dtypes if dtype != torch.float32]
        in_turns = ["emulate"]
        if getattr(case, "activation", "none") not in ("none", "relu"):
            in_turns.append("cpu")
        for engine in ENGINES:
            name, marks = (
                (engine, ()) if isinstance(engine, str) else (engine.values[0], engine.marks)
            )
            for dtype in case.dtypes:
                if name in in_turns and dtype in turns and dtype != turns[i % len(turns)]:
                    continue
                label = f"{case.id}-{name}-{str(dtype).removeprefix('torch.')}"
                parameters.append(pytest.param(case, name, dtype, id=label, marks=marks))
    return parameters

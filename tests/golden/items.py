"""The table of golden items for what `kernels/ptx.cuh` does synchronously; `async_items.py` has the rest.

Expectations follow the tables of the PTX ISA, element by element, and not the emulator's formulas.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import partial

import numpy as np
import torch

from cnnops.cuda.kernel import FastDiv

from .item import Bits, BitsOrNaN, Item, Rule, Tensors, Ulps, Within

EXACT = Bits("moves bits and computes nothing")
ROUNDED = BitsOrNaN("correctly rounded; PTX does not say which NaN results")


def _integers(shape: tuple[int, ...], most: int, generator: torch.Generator) -> torch.Tensor:
    """Whole numbers from -most to most, float64."""
    return torch.randint(-most, most + 1, shape, generator=generator).double()


def _random_bits(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return torch.randint(-(2**31), 2**31, shape, generator=generator).to(torch.int32)


# ---- conversions -----------------------------------------------------------------------------------------


def _all_halves(_: torch.Generator) -> Tensors:
    return {"x": torch.arange(-(2**15), 2**15).to(torch.int16)}


def _widened(inputs: Tensors) -> Tensors:
    x = inputs["x"]
    return {"half": x.view(torch.float16).float(), "bfloat": x.view(torch.bfloat16).float()}


def _edge_floats(kind: str, generator: torch.Generator) -> Tensors:
    """Ties between neighbours of the narrow type, what lies beside ties, specials, random bits."""
    special = [
        0.0, -0.0, math.inf, -math.inf, math.nan, 65504.0, 65519.996, 65520.0, 65536.0, -65520.0,
        3.4028235e38, -3.4028235e38, 3.3895314e38, 3.3961775e38, 2.0**-24, 2.0**-25, -(2.0**-25), 2.0**-14,
        2.0**-126, 2.0**-133, 2.0**-134, 2.0**-136, 2.0**-137, 2.0**-149,
    ]  # fmt: skip
    if kind == "half":  # all of them, every third one negative
        halves = torch.arange(0x7C00).to(torch.int16).view(torch.float16).float()
        ties = (halves[1:] + halves[:-1]) / 2
        ties[::3] *= -1
        bits = ties.view(torch.int32).long()
    else:  # 16 or 13 bits are dropped
        dropped = 16 if kind == "bfloat" else 13
        upper = torch.arange(
            -(2 ** (31 - dropped)), 2 ** (31 - dropped), 13 if kind == "bfloat" else 101
        )
        bits = upper * 2**dropped + 2 ** (dropped - 1)
    beside = [bits, *(bits[i::16] + d for i, d in enumerate((-1, 1)))]
    bits = torch.cat([*beside, _random_bits((2048,), generator)]).to(torch.int32)
    return {"x": torch.cat([torch.tensor(special), bits.view(torch.float32)])}


def _tf32(x: torch.Tensor) -> torch.Tensor:
    """Nearest number with 11 significant bits, ties away from zero, by arithmetic in float64."""
    exponent = torch.frexp(x.double())[1].clamp(min=-125)
    quantum = torch.ldexp(torch.ones_like(x, dtype=torch.float64), exponent - 11)
    rounded = torch.copysign((x.double().abs() / quantum + 0.5).floor() * quantum, x.double())
    return torch.where(x.isfinite(), rounded, x.double()).float()


def _narrowed_pairs(inputs: Tensors) -> Tensors:
    pairs = torch.stack([inputs["x"], inputs["x"].roll(-1)], 1)
    return {"half2": pairs.half(), "bfloat2": pairs.bfloat16()}


NARROW: dict[str, tuple[str, str, Callable[[torch.Tensor], torch.Tensor]]] = {
    "half": ("float_to_half", "unsigned short", torch.Tensor.half),
    "bfloat": ("float_to_bfloat", "unsigned short", torch.Tensor.bfloat16),
    "tf32": ("float_to_tf32", "unsigned", _tf32),
}


def _narrow_item(kind: str) -> Item:
    function, bits, reference = NARROW[kind]
    return Item(
        f"narrow_{kind}", (function,), "conversions.cu", "narrow", partial(_edge_floats, kind),
        lambda inputs: {"y": reference(inputs["x"])}, ROUNDED, block=256,
        constants={"CONVERT": function, "BITS": bits},
    )  # fmt: skip


CONVERSIONS = [
    Item(
        "widen", ("to_float",), "conversions.cu", "widen", _all_halves, _widened, ROUNDED, block=256,
        rules={"bfloat": EXACT},
    ),
    *(_narrow_item(kind) for kind in NARROW),
    Item(
        "narrow_pairs", ("floats_to_half2", "floats_to_bfloat2"), "conversions.cu", "narrow_pairs",
        partial(_edge_floats, "bfloat"), _narrowed_pairs, ROUNDED, block=256,
    ),
]  # fmt: skip


# ---- memory ----------------------------------------------------------------------------------------------


def _words(count: int, generator: torch.Generator) -> Tensors:
    return {"x": _random_bits((count,), generator)}


def _loaded(inputs: Tensors) -> Tensors:
    x = inputs["x"]
    return {"one": x[: x.numel() // 4], "two": x[: x.numel() // 2], "four": x.clone()}


def _addresses(_: Tensors) -> Tensors:
    row = torch.arange(64, dtype=torch.int32)
    return {"y": torch.stack([12 * row + 8, 12 * row % 128], 1)}


MEMORY = [
    Item(
        "load_once", ("load_once",), "memory.cu", "loads", partial(_words, 1024), _loaded, EXACT,
        grid=lambda inputs: inputs["x"].numel() // 128,
    ),
    Item(
        "prefetch_l2", ("prefetch_l2",), "memory.cu", "prefetched", partial(_words, 300),
        lambda inputs: {"y": inputs["x"].flip(0)}, EXACT,
    ),
    Item(
        "shared_address", ("shared_address",), "memory.cu", "shared_addresses", partial(_words, 64),
        _addresses, EXACT, block=64,
    ),
]  # fmt: skip


# ---- ldmatrix and stmatrix -------------------------------------------------------------------------------

BLOCKS, TILE_ROWS = 8, 64


def _rows(generator: torch.Generator) -> torch.Tensor:
    """For each lane of each block the row that it names; no row twice."""
    order = [torch.randperm(TILE_ROWS, generator=generator)[:32] for _ in range(BLOCKS)]
    return torch.stack(order).to(torch.int32)


def _tile_inputs(generator: torch.Generator) -> Tensors:
    """Every element of a tile is another number."""
    numbers = [torch.randperm(2**16, generator=generator)[: TILE_ROWS * 8] for _ in range(BLOCKS)]
    return {"x": torch.stack(numbers).to(torch.int16), "rows": _rows(generator)}


def _places(count: int, transposed: bool) -> Iterator[tuple[int, int, int, int, int]]:
    """(lane, register, half of it, lane that names the row, column in the row) of every element."""
    for lane in range(32):
        for matrix in range(count):
            for half in range(2):
                row, column = lane // 4, 2 * (lane % 4) + half
                if transposed:
                    row, column = column, row
                yield lane, matrix, half, 8 * matrix + row, column


def _loaded_matrices(count: int, transposed: bool, inputs: Tensors) -> Tensors:
    tile, rows = inputs["x"].view(BLOCKS, TILE_ROWS, 8), inputs["rows"].long()
    halves = torch.zeros(BLOCKS, 32, count, 2, dtype=torch.int16)
    for block in range(BLOCKS):
        for lane, matrix, half, source, column in _places(count, transposed):
            halves[block, lane, matrix, half] = tile[block, rows[block, source], column]
    return {"registers": halves.view(torch.int32).squeeze(-1)}


def _register_inputs(count: int, generator: torch.Generator) -> Tensors:
    return {"registers": _random_bits((BLOCKS, 32, count), generator), "rows": _rows(generator)}


def _stored_matrices(count: int, transposed: bool, inputs: Tensors) -> Tensors:
    halves, rows = (
        inputs["registers"].view(torch.int16).view(BLOCKS, 32, count, 2),
        inputs["rows"].long(),
    )
    tile = torch.zeros(BLOCKS, TILE_ROWS, 8, dtype=torch.int16)
    for block in range(BLOCKS):
        for lane, matrix, half, target, column in _places(count, transposed):
            tile[block, rows[block, target], column] = halves[block, lane, matrix, half]
    return {"y": tile}


def _matrix_items(count: int, transposed: bool) -> Iterator[Item]:
    suffix, trans = f"_x{count}{'_trans' * transposed}", "_trans" * transposed
    constants = {"COUNT": count, "TRANSPOSED": int(transposed)}
    yield Item(
        f"ldmatrix{suffix}", (f"ldmatrix{trans}",), "matrices.cu", "load_matrices", _tile_inputs,
        partial(_loaded_matrices, count, transposed), EXACT, constants=constants, grid=lambda _: BLOCKS,
    )  # fmt: skip
    yield Item(
        f"stmatrix{suffix}", (f"stmatrix{trans}",), "matrices.cu", "store_matrices",
        partial(_register_inputs, count), partial(_stored_matrices, count, transposed), EXACT,
        constants=constants, grid=lambda _: BLOCKS, arch="90",
    )  # fmt: skip


MATRICES = [
    item for count in (1, 2, 4) for trans in (False, True) for item in _matrix_items(count, trans)
]


# ---- mma -------------------------------------------------------------------------------------------------

# (row, column) of element i in the fragments of group g = lane // 4 and place t = lane % 4, as in the PTX
# ISA's sections on the fragments of mma.m16n8k16 (16-bit elements), mma.m16n8k8 (tf32) and mma.m8n8k4 (f64).
Layout = Callable[[int, int, int], tuple[int, int]]


def _a_k16(g: int, t: int, i: int) -> tuple[int, int]:
    return (g if i in (0, 1, 4, 5) else g + 8), 2 * t + i % 2 + (0 if i < 4 else 8)


def _b_k16(g: int, t: int, i: int) -> tuple[int, int]:
    return 2 * t + i % 2 + (0 if i < 2 else 8), g


def _a_k8(g: int, t: int, i: int) -> tuple[int, int]:
    return (g if i in (0, 2) else g + 8), (t if i in (0, 1) else t + 4)


def _b_k8(g: int, t: int, i: int) -> tuple[int, int]:
    return (t if i == 0 else t + 4), g


def _d_m16(g: int, t: int, i: int) -> tuple[int, int]:
    return (g if i < 2 else g + 8), 2 * t + i % 2


def _matrix(fragments: torch.Tensor, layout: Layout, rows: int, columns: int) -> torch.Tensor:
    """Matrices of warps from their fragments, lanes x elements."""
    warps = fragments.view(-1, 32, fragments.shape[-1])
    matrix = torch.full((warps.shape[0], rows, columns), math.nan, dtype=torch.float64)
    for lane in range(32):
        for i in range(warps.shape[2]):
            row, column = layout(lane // 4, lane % 4, i)
            matrix[:, row, column] = warps[:, lane, i].double()
    return matrix


def _fragments(matrix: torch.Tensor, layout: Layout, elements: int) -> torch.Tensor:
    places = [[layout(lane // 4, lane % 4, i) for i in range(elements)] for lane in range(32)]
    columns = [torch.stack([matrix[:, r, c] for r, c in row], 1) for row in places]
    return torch.stack(columns, 1).flatten(0, 1)


DTYPE = {"f16": torch.float16, "bf16": torch.bfloat16, "tf32": torch.float32}


def _operands(kind: str, inputs: Tensors) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A, B and C of every warp, float64."""
    a, b = inputs["a"], inputs["b"]
    if kind == "tf32":
        a, b = ((x & ~0x1FFF).view(torch.float32) for x in (a, b))  # the lower 13 bits do not count
        return (
            _matrix(a, _a_k8, 16, 8),
            _matrix(b, _b_k8, 8, 8),
            _matrix(inputs["c"], _d_m16, 16, 8),
        )
    a, b = (x.view(DTYPE[kind]) for x in (a, b))
    return (
        _matrix(a, _a_k16, 16, 16),
        _matrix(b, _b_k16, 16, 8),
        _matrix(inputs["c"], _d_m16, 16, 8),
    )


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a.unsqueeze(-1) * b.unsqueeze(-3)).sum(-2)


def _multiplied(kind: str, inputs: Tensors) -> Tensors:
    a, b, c = _operands(kind, inputs)
    return {"d": _fragments(_product(a, b) + c, _d_m16, 4).float()}


def _mma_scale(kind: str, inputs: Tensors) -> Tensors:
    a, b, c = (matrix.abs() for matrix in _operands(kind, inputs))
    return {"d": _fragments(_product(a, b) + c, _d_m16, 4)}


WARPS = 8


def _mma_inputs(
    kind: str, values: Callable[..., tuple[torch.Tensor, ...]], generator: torch.Generator
) -> Tensors:
    """Registers of A, B and C, from `values` of so many elements a lane."""
    packed = 1 if kind == "tf32" else 2
    lanes = 32 * WARPS
    a, b, c = values((lanes, 4 * packed), (lanes, 2 * packed), (lanes, 4), generator)
    a, b = (x.to(DTYPE[kind]).view(torch.int32) for x in (a, b))
    return {"a": a, "b": b, "c": c.float()}


def _integer_values(most: int, *args: object) -> tuple[torch.Tensor, ...]:
    *shapes, generator = args
    return tuple(
        _integers(s, m, generator) for s, m in zip(shapes, (most, most, 1000), strict=True)
    )


def _subnormal_values(kind: str, *args: object) -> tuple[torch.Tensor, ...]:
    a, b, c, generator = args
    most, exponent = {"f16": (1023, -24), "bf16": (127, -133), "tf32": (1023, -136)}[kind]
    large = 10 if kind == "f16" else 100
    x = _integers(a, most, generator) * 2.0**exponent
    return x, _integers(b, 8, generator) * 2.0**large, torch.zeros(c)


def _random_values(kind: str, *args: object) -> tuple[torch.Tensor, ...]:
    """Normal, times powers of two from 2^-8 to 2^8. tf32: rounded, so that no bits are dropped."""
    *shapes, generator = args
    exponents = [torch.randint(-8, 9, s, generator=generator) for s in shapes]
    values = [
        torch.ldexp(torch.randn(s, generator=generator), e)
        for s, e in zip(shapes, exponents, strict=True)
    ]
    if kind == "tf32":
        values[:2] = [_tf32(x) for x in values[:2]]
    return tuple(values)


def _special_values(*args: object) -> tuple[torch.Tensor, ...]:
    """Small integers with an infinity or NaN here and there."""
    generator = args[-1]
    values = _integer_values(4, *args)
    for x, special in zip(values, (math.inf, -math.inf, math.nan), strict=True):
        x[torch.rand(x.shape, generator=generator) < 0.02] = special
    return values


def _unrounded_values(*args: object) -> tuple[torch.Tensor, ...]:
    """Integers of 10 bits with something in the lower 13 bits of the float."""
    a, b, c = _integer_values(511, *args)
    generator = args[-1]
    for x in (a, b):
        bits = x.float().view(torch.int32)
        bits |= torch.randint(0, 2**13, bits.shape, generator=generator).to(torch.int32)
        x.copy_(bits.view(torch.float32))
    return a, b, c


SUMS_EXACT = Bits("every product and every partial sum is a float, in any order of addition")
SUMS_ROUNDED = Within("hardware drops bits below the largest addend, in no stated order", 2.0**-18)
SPECIAL = BitsOrNaN("sums are exact, infinite or NaN; PTX does not say which NaN")


def _mma_items(kind: str) -> Iterator[Item]:
    wrapper = f"mma_m16n8k{8 if kind == 'tf32' else 16}_{kind}"
    kinds: dict[str, tuple[Callable[..., tuple[torch.Tensor, ...]], Rule]] = {
        "integers": (partial(_integer_values, 500 if kind == "tf32" else 100), SUMS_EXACT),
        "subnormals": (partial(_subnormal_values, kind), SUMS_EXACT),
        "random": (partial(_random_values, kind), SUMS_ROUNDED),
        "specials": (_special_values, SPECIAL),
    }
    if kind == "tf32":
        kinds["unrounded"] = (_unrounded_values, SUMS_EXACT)
    for name, (values, rule) in kinds.items():
        yield Item(
            f"{wrapper}_{name}", (wrapper,), "mma.cu", "multiply", partial(_mma_inputs, kind, values),
            partial(_multiplied, kind), rule, scale=partial(_mma_scale, kind), constants={"MMA": wrapper},
        )  # fmt: skip


def _a_f64(g: int, t: int, i: int) -> tuple[int, int]:
    return g, t


def _b_f64(g: int, t: int, i: int) -> tuple[int, int]:
    return t, g


def _d_f64(g: int, t: int, i: int) -> tuple[int, int]:
    return g, 2 * t + i


def _inputs_f64(random: bool, generator: torch.Generator) -> Tensors:
    shapes = {"a": (32 * WARPS, 1), "b": (32 * WARPS, 1), "c": (32 * WARPS, 2)}
    if not random:
        return {name: _integers(shape, 1000, generator) for name, shape in shapes.items()}
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in shapes.items()
    }


def _multiplied_f64(absolute: bool, inputs: Tensors) -> Tensors:
    a, b = _matrix(inputs["a"], _a_f64, 8, 4), _matrix(inputs["b"], _b_f64, 4, 8)
    c = _matrix(inputs["c"], _d_f64, 8, 8)
    if absolute:
        a, b, c = a.abs(), b.abs(), c.abs()
    return {"d": _fragments(_product(a, b) + c, _d_f64, 2)}


MMA = [
    *(item for kind in DTYPE for item in _mma_items(kind)),
    *(
        Item(
            f"mma_m8n8k4_f64_{'random' if random else 'integers'}", ("mma_m8n8k4_f64",), "mma.cu",
            "multiply_f64", partial(_inputs_f64, random), partial(_multiplied_f64, False),
            Within("four fused multiply-adds, in no stated order", 2.0**-50) if random else SUMS_EXACT,
            scale=partial(_multiplied_f64, True),
        )
        for random in (False, True)
    ),
]  # fmt: skip


# ---- what CUDA itself provides ---------------------------------------------------------------------------


def _reals(dtype: torch.dtype, generator: torch.Generator) -> Tensors:
    """x over the whole range of exp and where tanh and erf bend, y positive, both with specials."""
    most = 104.0 if dtype == torch.float32 else 745.0
    spread = torch.rand(1024, generator=generator, dtype=torch.float64) * 2 - 1
    near = torch.randn(1024, generator=generator, dtype=torch.float64) * 2
    tiny = torch.ldexp(spread[:256], torch.randint(-140, 0, (256,), generator=generator))
    special = torch.tensor(
        [0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, math.nan, 88.73, -87.34, 0.5, -0.5]
    )
    x = torch.cat([spread * most, near, tiny, special.double()]).to(dtype)
    y = torch.ldexp(
        torch.rand(x.numel(), generator=generator, dtype=torch.float64) + 0.5,
        torch.randint(-120, 120, (x.numel(),), generator=generator),
    ).to(dtype)
    y[-8:] = torch.tensor([0.0, math.inf, 3.0, 7.0, 0.0, math.inf, 1.0, -0.0], dtype=dtype)
    return {"x": x, "y": y}


def _functions(inputs: Tensors) -> Tensors:
    x, y = inputs["x"], inputs["y"]
    wide = x.double()
    return {
        "exponential": wide.exp().to(x.dtype),
        "hyperbolic": wide.tanh().to(x.dtype),
        "error": wide.erf().to(x.dtype),
        "root": torch.from_numpy(np.sqrt(y.numpy())),  # torch's own may be one ulp off
        "quotient": x / y,
        "down": x.floor(),
    }


def _mantissas(dtype: torch.dtype, generator: torch.Generator) -> Tensors:
    """Numbers from 1 to 2 in size, so that for float a double holds x y + 1 exactly."""
    signs = torch.where(torch.rand(2, 1024, generator=generator) < 0.5, -1.0, 1.0).to(dtype)
    x, y = (1 + torch.rand(2, 1024, generator=generator, dtype=dtype)) * signs
    return {"x": x, "y": y}


def _fused(inputs: Tensors) -> Tensors:
    pairs = zip(inputs["x"].tolist(), inputs["y"].tolist(), strict=True)
    exact = [float(Fraction(x) * Fraction(y) + 1) for x, y in pairs]
    return {"fused": torch.tensor(exact, dtype=torch.float64).to(inputs["x"].dtype)}


DIVISORS = (1, 2, 3, 5, 7, 9, 13, 16, 56, 57, 112, 224, 225, 1000, 65535, 65537, 2**30, 2**31 - 1)


def _divisions(generator: torch.Generator) -> Tensors:
    rows = [FastDiv(d) for d in DIVISORS for _ in range(64)]
    fields = torch.tensor([[r.divisor, r.multiplier, r.shift] for r in rows])
    n = torch.randint(0, 2**31, (len(rows),), generator=generator)
    n[::8], n[1::8] = 2**31 - 1, 0
    n[2::8] = n[2::8] // fields[2::8, 0] * fields[2::8, 0]  # multiples, and one less
    n[3::8] = (n[3::8] // fields[3::8, 0] * fields[3::8, 0] - 1).clamp(min=0)
    fields = torch.where(fields >= 2**31, fields - 2**32, fields)
    return {"n": n.to(torch.int32), "divisors": fields.to(torch.int32)}


def _divided(inputs: Tensors) -> Tensors:
    n, multiplier = inputs["n"].tolist(), (inputs["divisors"][:, 1].long() & 0xFFFFFFFF).tolist()
    divisor = inputs["divisors"][:, 0].tolist()
    high = [(i * 2654435761 % 2**32) * m >> 32 for i, m in zip(n, multiplier, strict=True)]
    return {
        "quotient": torch.tensor(
            [i // d for i, d in zip(n, divisor, strict=True)], dtype=torch.int32
        ),
        "remainder": torch.tensor(
            [i % d for i, d in zip(n, divisor, strict=True)], dtype=torch.int32
        ),
        "high": torch.tensor([h - 2**32 * (h >= 2**31) for h in high], dtype=torch.int32),
    }


def _shuffled(inputs: Tensors) -> Tensors:
    x, lanes = inputs["x"], torch.arange(32)
    total = x
    for offset in (16, 8, 4, 2, 1):
        total = total + total[lanes ^ offset]
    return {"y": torch.stack([x[lanes ^ (1 << j)] for j in range(5)], 1), "sum": total}


def _arithmetic_items(real: str, dtype: torch.dtype, ulps: int, why: str) -> Iterator[Item]:
    by_library = Ulps(why, ulps)
    yield Item(
        f"functions_{real}", (), "arithmetic.cu", "functions", partial(_reals, dtype), _functions, by_library,
        rules={name: ROUNDED for name in ("root", "quotient", "down")}, constants={"REAL": real}, block=128,
    )  # fmt: skip
    yield Item(
        f"fma_{real}", (), "arithmetic.cu", "fused", partial(_mantissas, dtype), _fused, ROUNDED,
        constants={"REAL": real}, block=128,
    )  # fmt: skip


ARITHMETIC = [
    *_arithmetic_items(
        "float", torch.float32, 3, "CUDA states 2 ulps for expf, tanhf and erff; 1 more for the C library's"
    ),
    *_arithmetic_items(
        "double", torch.float64, 4, "CUDA states 2 ulps for exp, tanh and erf; 2 more for the C library's"
    ),
    Item("fast_division", (), "arithmetic.cu", "divisions", _divisions, _divided, EXACT, block=64),
    Item(
        "shuffles", (), "arithmetic.cu", "shuffles",
        lambda generator: {"x": torch.randn(32, generator=generator)}, _shuffled,
        Bits("the order of additions is the program's"),
    ),
]  # fmt: skip


# ---- the table -------------------------------------------------------------------------------------------


def _asynchronous() -> list[Item]:
    """Items of kernels/ptx_async.cuh, ptx_sm90.cuh and ptx_cluster.cuh, where there are any."""
    if importlib.util.find_spec(f"{__package__}.async_items") is None:
        return []
    from .async_items import ITEMS as items
    from .cluster_items import ITEMS as of_clusters

    return [*items, *of_clusters]


ITEMS: dict[str, Item] = {
    item.name: item
    for item in (*CONVERSIONS, *MEMORY, *MATRICES, *MMA, *ARITHMETIC, *_asynchronous())
}

"""kernels/pool.cu and unpool.cu under the emulator, called as the table calls them.

Every launch runs under the three thread orders. Gradients are small whole numbers, so that sums are exact and
results must be PyTorch's to the last bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass

import pytest
import torch
import torch.nn.functional as F
from cases import needs_emulator
from cases.base import ALL, Size, laid_out, normal
from torch import Tensor

from cnnops.cuda import emulate, pool, unpool
from cnnops.cuda.kernel import Launch
from cnnops.cuda.launch import trace
from cnnops.shapes import NormShape, PoolShape, UnpoolShape

pytestmark = needs_emulator

LAYOUTS = ("contiguous", "channels_last", "sliced", "transposed", "expanded", "offset")
FORGETFUL = (pool._plan, unpool._problem, unpool._forward, unpool._backward)


@pytest.fixture(autouse=True)
def every_order() -> Iterator[None]:
    with emulate.schedule("all"):
        yield


@pytest.fixture
def constants(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """For tests that change a launcher's constants: plans are made anew, before and after."""
    for plans in FORGETFUL:
        plans.cache_clear()
    yield monkeypatch
    for plans in FORGETFUL:
        plans.cache_clear()


def result(size: Sequence[int], dtype: torch.dtype, like: Tensor) -> Tensor:
    """An empty tensor, contiguous or channels-last as a result of `like` would be, and aligned as `like`."""
    shift = int(like.data_ptr() % 16 != 0)
    flat = torch.empty(math.prod(size) + shift, dtype=dtype, device=like.device)[shift:]
    if like.shape[1] > 1 and like.stride(1) == 1:
        return flat.view(size[0], *size[2:], size[1]).movedim(-1, 1)
    return flat.view(tuple(size))


def whole_numbers(size: Sequence[int], dtype: torch.dtype, like: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return result(size, dtype, like).copy_(torch.randint(-3, 4, tuple(size), generator=generator))


def same(ours: Tensor, theirs: Tensor) -> bool:
    """Equal as numbers, and NaN in the same places."""
    return torch.equal(ours.double().nan_to_num(7e3), theirs.double().nan_to_num(7e3))


def variant(plan: Launch) -> dict[str, str | int]:
    return dict(plan.kernel.constants)


# ---- adaptive maxima -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Adaptive:
    """`values`: of the input, "normal", "ties", "nan" or "-inf"; `offset`: other than the smallest type."""

    id: str
    x: Size
    output: Size
    why: str
    _: KW_ONLY
    layout: str = "contiguous"
    values: str = "normal"
    dtypes: tuple[torch.dtype, ...] = (torch.float32,)
    offset: torch.dtype | None = None

    @property
    def shape(self) -> PoolShape:
        return PoolShape.adaptive(self.x, self.output)

    def input(self, dtype: torch.dtype) -> Tensor:
        def values(size: Size) -> Tensor:
            x = normal(1, dtype)(size)
            chance = torch.rand(size, generator=torch.Generator().manual_seed(2))
            return {
                "normal": x,
                "ties": x.round().clamp(-1, 1),
                "nan": x.masked_fill(chance < 0.2, math.nan),
                "-inf": x.masked_fill(chance < 0.9, -math.inf),
            }[self.values]

        return laid_out(self.x, self.layout, values)

    def offsets(self, like: Tensor) -> Tensor:
        dtype = self.offset or (torch.uint8 if self.shape.places <= 255 else torch.int32)
        return result(self.shape.y_size, dtype, like)


ADAPTIVE = (
    Adaptive("uneven", (2, 3, 7, 11), (3, 4), "windows of several sizes that overlap", dtypes=ALL),
    Adaptive("packs", (2, 3, 7, 16), (3, 5), "backward a pack of places meets several windows", dtypes=ALL),
    Adaptive("nan", (2, 3, 7, 12), (3, 5), "the last NaN of a window wins", values="nan"),
    Adaptive("ties", (2, 3, 7, 12), (3, 5), "the first of equal maxima wins", values="ties"),
    Adaptive("minus_inf", (2, 3, 7, 12), (3, 5), "windows of nothing but -inf",
        values="-inf"),
    Adaptive("larger", (2, 3, 4, 5), (9, 7), "an output larger than the input"),
    Adaptive("larger_and_smaller", (2, 8, 4, 9), (6, 4), "one axis each way", layout="channels_last",
        values="ties"),
    Adaptive("even", (2, 3, 8, 6), (4, 3), "windows of one size: the form of ordinary ones", dtypes=ALL),
    Adaptive("identity", (2, 3, 5, 4), (5, 4), "windows of one place"),
    Adaptive("channels_last", (2, 8, 7, 12), (3, 5), "packs of channels", layout="channels_last",
        values="nan", dtypes=ALL),
    Adaptive("channels_last_33", (1, 33, 7, 5), (3, 2), "an odd number of channels", layout="channels_last"),
    Adaptive("channels_last_offset", (2, 8, 7, 5), (3, 2), "no packs", layout="channels_last_offset"),
    Adaptive("sliced", (2, 3, 7, 12), (3, 5), "every second channel of a wider image", layout="sliced"),
    Adaptive("transposed", (2, 3, 7, 12), (3, 5), "rows and columns swapped", layout="transposed"),
    Adaptive("expanded", (3, 2, 7, 12), (3, 5), "one image as a whole batch", layout="expanded"),
    Adaptive("offset", (2, 4, 7, 12), (3, 5), "starts off alignment", layout="offset", dtypes=ALL),
    Adaptive("wide_offsets", (2, 3, 7, 11), (3, 4), "int32 though a byte would do", offset=torch.int32),
    Adaptive("global", (2, 3, 6, 20), (1, 1), "one window: several threads share it", dtypes=ALL),
    Adaptive("global_nan", (2, 3, 17, 20), (1, 1), "which NaN, when threads merge; int32", values="nan"),
    Adaptive("global_ties", (2, 3, 17, 20), (1, 1), "which maximum, when threads merge", values="ties"),
    Adaptive("global_minus_inf", (2, 3, 17, 20), (1, 1), "the first place, whoever looks at it",
        values="-inf"),
    Adaptive("global_channels_last", (2, 8, 9, 10), (1, 1), "lanes along channels", layout="channels_last",
        values="nan"),
    Adaptive("global_transposed", (2, 3, 7, 20), (1, 1), "axes that are no run", layout="transposed"),
    Adaptive("few_outputs", (2, 3, 17, 20), (2, 1), "large windows of which only one axis is whole",
        values="ties"),
    Adaptive("few_uneven_outputs", (2, 3, 17, 41), (2, 3), "large windows that overlap", values="nan"),
    Adaptive("1d", (2, 3, 40), (7,), "one spatial axis", dtypes=ALL),
    Adaptive("1d_global", (2, 3, 300), (1,), "one spatial axis, one window", values="nan"),
    Adaptive("1d_channels_last", (2, 8, 11), (4,), "one spatial axis, channels innermost",
        layout="channels_last"),
    Adaptive("3d", (2, 3, 6, 7, 8), (4, 3, 5), "three spatial axes", values="nan", dtypes=ALL),
    Adaptive("3d_channels_last", (2, 4, 5, 6, 7), (3, 4, 2), "three spatial axes, channels innermost",
        layout="channels_last", values="ties"),
    Adaptive("3d_planes", (2, 2, 7, 5, 4), (3, 1, 1), "whole planes, uneven in depth", values="-inf"),
    Adaptive("3d_global", (2, 3, 4, 6, 8), (1, 1, 1), "three axes, one window"),
    Adaptive("3d_offset", (1, 2, 5, 6, 4), (2, 4, 3), "three axes off alignment", layout="offset"),
)  # fmt: skip


def indices_of(shape: PoolShape, offsets: Tensor) -> Tensor:
    """PyTorch's indices: places of the plane, row by row, of offsets into adaptive windows."""
    rest, places = offsets.long(), []
    for window in reversed(shape.kernel):
        places.append(rest % window)
        rest = rest // window
    indices = torch.zeros_like(rest)
    for axis, (size, out) in enumerate(zip(shape.spatial, shape.output, strict=True)):
        starts = torch.arange(out) * size // out
        across = starts.view([-1 if axis == a else 1 for a in range(shape.dims)])
        indices = indices * size + across + places[shape.dims - 1 - axis]
    return indices


def check_adaptive(case: Adaptive, dtype: torch.dtype) -> list[Launch]:
    """Maxima, offsets, gradients and the gather are PyTorch's; returns what was launched."""
    shape, x = case.shape, case.input(dtype)
    y, offsets = result(shape.y_size, dtype, x), case.offsets(x)
    with trace() as plans:
        pool.max_pool_fwd(shape, x, y, offsets)
        leaf = x.detach().clone(memory_format=torch.contiguous_format).double().requires_grad_()
        adaptive = getattr(F, f"adaptive_max_pool{shape.dims}d")
        expected, indices = adaptive(leaf, shape.output, return_indices=True)
        assert same(y, expected.detach())
        assert torch.equal(indices_of(shape, offsets), indices)

        grad_y = whole_numbers(shape.y_size, dtype, x)
        grad_x = result(shape.x_size, dtype, x)
        pool.max_pool_bwd(shape, grad_y, offsets, grad_x)
        (grad,) = torch.autograd.grad(expected, leaf, grad_y.double())
        assert torch.equal(grad_x.double(), grad)

        gathered = result(shape.y_size, dtype, x)
        pool.max_pool_gather(shape, x, offsets, gathered)
        assert same(gathered, expected.detach())
    return plans


@pytest.mark.parametrize(
    "case, dtype",
    [
        pytest.param(case, dtype, id=f"{case.id}-{str(dtype).removeprefix('torch.')}")
        for case in ADAPTIVE
        for dtype in case.dtypes
    ],
)
def test_adaptive_maxima(case: Adaptive, dtype: torch.dtype) -> None:
    check_adaptive(case, dtype)


def test_without_offsets_the_maxima_are_the_same() -> None:
    for case in (ADAPTIVE[0], next(case for case in ADAPTIVE if case.id == "global")):
        x = case.input(torch.float32)
        y, alone = (result(case.shape.y_size, torch.float32, x) for _ in range(2))
        pool.max_pool_fwd(case.shape, x, y, case.offsets(x))
        pool.max_pool_fwd(case.shape, x, alone, None)
        assert torch.equal(y, alone)


@pytest.mark.parametrize("id", ["packs", "channels_last", "global_nan", "3d"])
def test_adaptive_maxima_with_64_bit_indices(id: str, constants: pytest.MonkeyPatch) -> None:
    """As for tensors of more than 2^31 elements: the same code with wide offsets and plain divisions."""
    constants.setattr(pool, "INT32_MAX", 1)
    case = next(case for case in ADAPTIVE if case.id == id)
    plans = check_adaptive(case, torch.float32)
    assert {variant(plan)["INDEX"] for plan in plans} == {"long long"}


# ---- large windows, backward -----------------------------------------------------------------------------

LARGE = {
    "overlapping": PoolShape.of((1, 2, 12, 32), (10, 27), 1),
    "strided": PoolShape.of((1, 2, 21, 24), 9, (5, 7), 4, ceil_mode=True),
    "dilated": PoolShape.of((1, 2, 21, 24), (9, 8), 5, (4, 3), (1, 2)),
    "dilated_apart": PoolShape.of((1, 2, 12, 40), (2, 9), (6, 5), (1, 4), (3, 4)),
    "whole_plane": PoolShape.of((2, 3, 9, 12), (9, 12)),
    "whole_volume": PoolShape.of((2, 3, 3, 7, 8), (3, 7, 8)),
    "whole_planes": PoolShape.of((1, 2, 5, 3, 28), (3, 3, 28), 1),
    "1d": PoolShape.of((2, 3, 160), 50, 11, 25),
    "3d": PoolShape.of((1, 2, 7, 9, 12), (5, 6, 9), (2, 5, 3), (2, 3, 4)),
}
"""Windows too large to unroll: each thread owns a pack of places and looks for the windows that meet it."""


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "offset"])
@pytest.mark.parametrize("name", LARGE)
def test_backward_of_large_windows(name: str, layout: str) -> None:
    shape = LARGE[name]
    x = laid_out(shape.x_size, layout, normal(1, torch.float32))
    y = result(shape.y_size, x.dtype, x)
    offsets = result(y.shape, torch.uint8 if shape.places <= 255 else torch.int32, x)
    grad_y, grad_x = whole_numbers(y.shape, x.dtype, x), result(x.shape, x.dtype, x)
    arguments = shape.kernel, shape.stride, [p for p, _ in shape.padding]

    pool.max_pool_fwd(shape, x, y, offsets)
    with trace() as plans:
        pool.max_pool_bwd(shape, grad_y, offsets, grad_x)
    assert not variant(plans[0])["FIXED"]
    assert variant(plans[0])["TILE"] == (4 if layout == "contiguous" else 1)
    leaf = x.contiguous().double().requires_grad_()
    largest = getattr(F, f"max_pool{shape.dims}d")
    expected = largest(leaf, *arguments, shape.dilation, ceil_mode=shape.ceil_mode)
    assert torch.equal(y.double(), expected)
    (grad,) = torch.autograd.grad(expected, leaf, grad_y.double())
    assert torch.equal(grad_x.double(), grad)

    if shape.dilation == (1,) * shape.dims:
        average = getattr(F, f"avg_pool{shape.dims}d")
        expected = average(leaf, *arguments, shape.ceil_mode, False)
        (grad,) = torch.autograd.grad(expected, leaf, grad_y.double())
        averaged = PoolShape.of(x.shape, *arguments, 1, shape.ceil_mode, False)
        pool.avg_pool_bwd(averaged, grad_y, grad_x)
        torch.testing.assert_close(grad_x.double(), grad, rtol=1e-5, atol=1e-5)


# ---- tiles of several rows, and rows that are no whole packs ---------------------------------------------

TILES = {
    "odd_rows": PoolShape.of((2, 3, 11, 13), 3, 1, 1),
    "bands": PoolShape.of((2, 5, 19, 33), 4, 1, 1),
    "large": PoolShape.of((1, 2, 20, 21), 13, 1, 6),
    "larger": PoolShape.of((1, 2, 9, 21), (3, 17), 1, (1, 8)),
    "tall": PoolShape.of((1, 2, 40, 16), (17, 2), 1, (8, 1)),
    "strided": PoolShape.of((2, 3, 17, 19), 3, 2, 1),
    "strided_rows": PoolShape.of((2, 3, 17, 40), (3, 5), (2, 1), (1, 2)),
    "strided_columns": PoolShape.of((2, 3, 17, 38), (3, 5), (1, 2), (1, 2)),
    "threes": PoolShape.of((2, 3, 20, 23), 3, 3),
    "fives": PoolShape.of((2, 3, 20, 57), 5),
    "ceil": PoolShape.of((2, 3, 12, 14), 3, 2, 0, ceil_mode=True),
    "dilated_rows": PoolShape.of((2, 3, 16, 17), 3, 1, 1, (2, 1)),
    "dilated_columns": PoolShape.of((2, 3, 16, 17), 3, 1, 1, (1, 2)),
    "one_plane": PoolShape.of((1, 1, 18, 15), 2, 1),
    "one_row": PoolShape.of((3, 2, 3, 31), 3, 1),
    "long_rows": PoolShape.of((1, 2, 6, 1101), 3, 1),
    "1d": PoolShape.of((3, 5, 61), 8, 1, 4),
    "1d_long": PoolShape.of((1, 2, 2311), 3, 1),
    "3d": PoolShape.of((2, 2, 5, 9, 11), 3, 1, 1),
    "3d_strided": PoolShape.of((1, 3, 9, 10, 15), 3, (2, 2, 1), 1),
}
"""Small, but in the forms of large ones."""


def ordinary_indices(shape: PoolShape, offsets: Tensor) -> Tensor:
    """PyTorch's indices of offsets into ordinary windows."""
    rest, indices, scale = offsets.long(), torch.zeros_like(offsets.long()), 1
    for axis in reversed(range(shape.dims)):
        place = rest % shape.kernel[axis] * shape.dilation[axis]
        rest = rest // shape.kernel[axis]
        starts = torch.arange(shape.output[axis]) * shape.stride[axis] - shape.padding[axis][0]
        across = starts.view([-1 if axis == a else 1 for a in range(shape.dims)])
        indices += (across + place) * scale
        scale *= shape.spatial[axis]
    return indices


def check_tiles(
    shape: PoolShape, layout: str, dtype: torch.dtype
) -> dict[str, dict[str, str | int]]:
    """Maxima and averages, forward and backward, against PyTorch; returns the constants of each entry."""
    generator = torch.Generator().manual_seed(5)
    arguments = shape.kernel, shape.stride, [p for p, _ in shape.padding]

    def values(size: Size) -> Tensor:
        """Equal ones, runs of -inf, and some NaN."""
        x = torch.randint(-4, 5, size, generator=generator).to(dtype)
        chance = torch.rand(size, generator=generator)
        return x.masked_fill(chance < 0.4, -math.inf).masked_fill(chance < 0.02, math.nan)

    x = laid_out(shape.x_size, layout, values)
    y = result(shape.y_size, dtype, x)
    offsets = result(y.shape, torch.uint8 if shape.places <= 255 else torch.int32, x)
    grad_y, grad_x = whole_numbers(y.shape, dtype, x), result(x.shape, dtype, x)
    with trace() as plans:
        pool.max_pool_fwd(shape, x, y, offsets)
        leaf = x.contiguous().double().requires_grad_()
        largest = getattr(F, f"max_pool{shape.dims}d")
        expected, indices = largest(leaf, *arguments, shape.dilation, shape.ceil_mode, True)
        assert same(y, expected.detach())
        assert torch.equal(ordinary_indices(shape, offsets), indices)
        pool.max_pool_bwd(shape, grad_y, offsets, grad_x)
        (grad,) = torch.autograd.grad(expected, leaf, grad_y.double())
        assert torch.equal(grad_x.double(), grad)

        if shape.dilation == (1,) * shape.dims:
            x = laid_out(shape.x_size, layout, normal(6, dtype))
            x[-1, -1, ..., x.shape[-1] // 2] = (
                math.inf
            )  # goes no further than the windows that cover it
            leaf = x.contiguous().double().requires_grad_()
            average = getattr(F, f"avg_pool{shape.dims}d")
            for counted in (True, False):
                averaged = PoolShape.of(x.shape, *arguments, 1, shape.ceil_mode, counted)
                expected = average(leaf, *arguments, shape.ceil_mode, counted)
                (grad,) = torch.autograd.grad(expected, leaf, grad_y.double())
                pool.avg_pool_fwd(averaged, x, y)
                pool.avg_pool_bwd(averaged, grad_y, grad_x)
                close = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 1e-2)
                assert_close = torch.testing.assert_close
                assert_close(y.double(), expected.detach(), rtol=close, atol=close, equal_nan=True)
                assert_close(grad_x.double(), grad, rtol=close, atol=close)
    return {plan.kernel.entry: variant(plan) for plan in plans}


@pytest.mark.parametrize(
    "name, layout, dtype",
    [
        *((name, "contiguous", torch.float32) for name in TILES),
        *((name, "contiguous", torch.bfloat16) for name in list(TILES)[::5]),
        *((name, "contiguous", torch.float64) for name in ("bands", "large", "strided", "1d")),
        ("odd_rows", "contiguous", torch.float16),
        *(
            (name, layout, torch.float32)
            for name, layouts in (
                ("odd_rows", ("channels_last", "offset", "sliced", "transposed")),
                ("bands", ("channels_last", "sliced")),
                ("large", ("channels_last",)),
                ("strided_columns", ("channels_last", "transposed")),
                ("threes", ("offset",)),
                ("3d", ("channels_last",)),
            )
            for layout in layouts
        ),
        ("odd_rows", "channels_last", torch.bfloat16),
        ("bands", "offset", torch.bfloat16),
    ],
)
def test_tiles(name: str, layout: str, dtype: torch.dtype, constants: pytest.MonkeyPatch) -> None:
    constants.setattr(pool, "FULL_GPU", 1)
    check_tiles(TILES[name], layout, dtype)


@pytest.mark.parametrize("name", ["odd_rows", "large", "3d"])
def test_tiles_with_64_bit_indices(name: str, constants: pytest.MonkeyPatch) -> None:
    constants.setattr(pool, "FULL_GPU", 1)
    constants.setattr(pool, "INT32_MAX", 1)
    found = check_tiles(TILES[name], "contiguous", torch.float32)
    assert {entry["INDEX"] for entry in found.values()} == {"long long"}


@pytest.mark.parametrize("name", ["odd_rows", "1d"])
def test_tiles_of_a_batch_of_several_chunks(name: str, constants: pytest.MonkeyPatch) -> None:
    constants.setattr(pool, "FULL_GPU", 1)
    constants.setattr(pool, "MAX_TILES", 100)
    check_tiles(TILES[name], "contiguous", torch.float32)


# ---- which form ------------------------------------------------------------------------------------------


def forms(shape: PoolShape, layout: str) -> dict[str, dict[str, str | int]]:
    """The constants of each entry that max pooling, forward and backward, launches."""
    x = laid_out(shape.x_size, layout, lambda size: torch.empty(size))
    y, offsets = (result(shape.y_size, dtype, x) for dtype in (torch.float32, torch.uint8))
    with trace(run=False) as plans:
        pool.max_pool_fwd(shape, x, y, offsets)
        pool.max_pool_bwd(shape, y, offsets, x)
    return {plan.kernel.entry: variant(plan) for plan in plans}


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_ordinary_windows_are_unrolled_in_packs_whatever_the_number_of_axes(dims: int) -> None:
    size = (2, 8, *(8, 12, 16)[-dims:])
    for window, stride, padding in ((2, 2, 0), (3, 2, 1), (3, 1, 1)):
        shape = PoolShape.of(size, window, stride, padding)
        for constants in forms(shape, "contiguous").values():
            assert constants["FIXED"] and constants["X_VEC"] == 4
        for constants in forms(shape, "channels_last").values():
            assert constants["FIXED"] and constants["C_VEC"] == 4


def test_the_global_maximum_is_shared_and_its_gradient_written_in_packs() -> None:
    for size in ((2, 3, 64), (2, 3, 6, 10), (2, 3, 2, 6, 6)):
        found = forms(PoolShape.adaptive(size, 1), "contiguous")
        assert found["max_pool_reduce"]["X_VEC"] == 4 and found["max_pool_bwd"]["X_VEC"] == 4


# ---- unpooling: references -------------------------------------------------------------------------------


def unpooled(x: Tensor, indices: Tensor, output: Size) -> Tensor:
    """One value after the other, so that the last one stays; indices outside of the plane are passed over."""
    N, C = x.shape[:2]
    y = torch.zeros(N, C, math.prod(output), dtype=x.dtype)
    values, places = x.reshape(N, C, -1), indices.reshape(N, C, -1)
    for m in range(values.shape[2]):
        inside = (places[..., m] >= 0) & (places[..., m] < y.shape[2])
        n, c = inside.nonzero(as_tuple=True)
        y[n, c, places[n, c, m]] = values[n, c, m]
    return y.view(N, C, *output)


def pooled_from(grad_y: Tensor, indices: Tensor) -> Tensor:
    plane = grad_y.flatten(2)
    inside = (indices >= 0) & (indices < plane.shape[2])
    places = indices.flatten(2).clamp(0, plane.shape[2] - 1)
    return plane.gather(2, places).view(indices.shape).masked_fill(~inside, 0)


def scattered(size: Size, layout: str, places: int) -> Tensor:
    """Indices with duplicates, some of them outside of a plane of `places`."""
    generator = torch.Generator().manual_seed(4)

    def values(size: Size) -> Tensor:
        indices = torch.randint(-2, places + 2, size, generator=generator)
        wild = torch.tensor([-(2**63), 2**63 - 1, 2**32, -(2**32), 2**31])
        chosen = torch.randint(0, 40, size, generator=generator)
        return torch.where(chosen < 5, wild[chosen.clamp(max=4)], indices)

    return laid_out(size, layout, values)


def check_unpool(x: Tensor, indices: Tensor, output: Size, like: Tensor) -> list[Launch]:
    """Both passes against the references; returns what was launched."""
    shape = UnpoolShape.of(x.shape, indices.shape, output)
    y, grad_x = result(shape.y_size, x.dtype, like), result(shape.x_size, x.dtype, like)
    grad_y = whole_numbers(shape.y_size, x.dtype, like)
    with trace() as plans:
        unpool.max_unpool_fwd(shape, x, indices, y)
        unpool.max_unpool_bwd(shape, grad_y, indices, grad_x)
    assert same(y, unpooled(x, indices, output))
    assert torch.equal(grad_x, pooled_from(grad_y, indices))
    return plans


# ---- unpooling -------------------------------------------------------------------------------------------

UNPOOL_SIZES: dict[str, tuple[Size, Size]] = {
    "1d": ((2, 3, 11), (24,)),
    "2d": ((2, 8, 4, 5), (8, 10)),
    "2d_odd": ((2, 3, 3, 4), (7, 9)),
    "3d": ((2, 5, 2, 3, 4), (4, 6, 8)),
    "one_channel": ((3, 1, 4, 4), (8, 8)),
    "one_place": ((2, 3, 3, 3), (1, 1)),
    "one_value": ((2, 3, 1, 1), (4, 4)),
}


@pytest.mark.parametrize(
    "name, layout",
    [
        (name, layout)
        for name, (size, _) in UNPOOL_SIZES.items()
        for layout in LAYOUTS
        if len(size) > 3 or layout != "transposed"  # with one spatial axis that is channels_last
    ],
)
def test_unpooling(name: str, layout: str) -> None:
    """Duplicates and indices outside of the plane, in planes of which a block has slots for several."""
    size, output = UNPOOL_SIZES[name]
    x = laid_out(size, layout, normal(1, torch.float32))
    indices = scattered(size, layout, math.prod(output))
    plans = check_unpool(x, indices, output, x)
    assert [plan.kernel.entry for plan in plans] == ["max_unpool_fwd", "max_unpool_bwd"]


@pytest.mark.parametrize("slots", [64, 128])
@pytest.mark.parametrize(
    "layout", ["contiguous", "channels_last", "sliced", "channels_last_offset"]
)
@pytest.mark.parametrize("name", ["1d", "2d", "2d_odd", "3d"])
def test_unpooling_in_parts(
    name: str, layout: str, slots: int, constants: pytest.MonkeyPatch
) -> None:
    """The same with fewer slots, and for each part of a plane segments of indices that do not concern it."""
    constants.setattr(unpool, "SLOTS", slots)
    constants.setattr(unpool, "SEGMENT", 32)
    size, output = UNPOOL_SIZES[name]
    x = laid_out(size, layout, normal(1, torch.float32))
    places = math.prod(output)
    for indices in (scattered(size, layout, places), x.argsort(-1) * 2 + 1):
        plans = check_unpool(x, indices, output, x)
        planes = 8 if layout.startswith("channels_last") and size[1] > 4 else 4
        planes = planes if layout.startswith("channels_last") else 1
        parts = planes * places > slots
        assert ("max_unpool_ranges" in {plan.kernel.entry for plan in plans}) == parts


@pytest.mark.parametrize("place", [0, 63, 64, 127])
def test_a_segment_meets_a_part_in_its_first_or_last_place(
    place: int, constants: pytest.MonkeyPatch
) -> None:
    constants.setattr(unpool, "SLOTS", 64)
    x = normal(1, torch.float32)((1, 1, 40))
    check_unpool(x, torch.full(x.shape, place), (128,), x)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_batch_of_several_chunks(layout: str, constants: pytest.MonkeyPatch) -> None:
    """As where the values of all images are too many for 32-bit numbers."""
    constants.setattr(unpool, "MAX_TILES", 130)
    size = (5, 3, 4, 5)
    x = laid_out(size, layout, normal(1, torch.float32))
    *_, bwd = check_unpool(x, scattered(size, layout, 80), (8, 10), x)
    assert bwd.grid[1] == 3


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", ALL)
def test_unpooling_of_every_type(dtype: torch.dtype, layout: str) -> None:
    """Bits are moved, not computed with: NaN, infinity and zeros of both signs arrive as they are."""
    size = (2, 16, 4, 6)
    x = laid_out(size, layout, normal(1, dtype))
    x[0, :, 0, :4] = torch.tensor([math.nan, math.inf, -math.inf, -0.0])
    indices = laid_out(size, layout, lambda size: torch.arange(24).view(4, 6).expand(size) * 4)
    check_unpool(x, indices, (8, 12), x)
    y = result((2, 16, 8, 12), dtype, x)
    unpool.max_unpool_fwd(UnpoolShape.of(size, size, (8, 12)), x, indices, y)
    assert y[0, 0].flatten()[12].item() == 0 and y[0, 0].flatten()[12].signbit()


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_what_pooling_gives_comes_back(dims: int, layout: str) -> None:
    """Indices of PyTorch's own pooling, forward and backward against its own unpooling."""
    size = (2, 8, *(6, 8, 10)[-dims:])
    x = laid_out(size, layout, normal(1, torch.float32))
    values, indices = getattr(F, f"max_pool{dims}d")(x, 2, return_indices=True)
    values = result(values.shape, x.dtype, x).copy_(values)
    indices = result(values.shape, torch.int64, x).copy_(indices)
    shape = UnpoolShape.of(values.shape, indices.shape, size[2:])
    y, grad_x = result(size, x.dtype, x), result(values.shape, x.dtype, x)
    grad_y = whole_numbers(size, x.dtype, x)
    unpool.max_unpool_fwd(shape, values, indices, y)
    unpool.max_unpool_bwd(shape, grad_y, indices, grad_x)
    leaf = values.double().requires_grad_()
    expected = getattr(F, f"max_unpool{dims}d")(leaf, indices, 2, output_size=size[2:])
    (grad,) = torch.autograd.grad(expected, leaf, grad_y.double())
    assert torch.equal(y.double(), expected) and torch.equal(grad_x.double(), grad)


@pytest.mark.parametrize(
    "layouts", [("channels_last", "contiguous"), ("contiguous", "channels_last")]
)
def test_tensors_of_different_layouts(layouts: tuple[str, str]) -> None:
    size, output = (2, 8, 4, 5), (8, 10)
    x = laid_out(size, layouts[0], normal(1, torch.float32))
    for like in (x, torch.empty(2, 8, 1, 1)):
        check_unpool(x, scattered(size, layouts[1], 80), output, like)


def test_results_with_gaps() -> None:
    """Every second channel and all columns but the last of wider tensors are written, and nothing beside."""
    size, output = (2, 3, 4, 5), (8, 10)
    x, indices = normal(1, torch.float32)(size), scattered(size, "contiguous", 80)
    shape = UnpoolShape.of(size, size, output)
    y = laid_out(shape.y_size, "sliced", lambda size: torch.full(size, 7.0))
    unpool.max_unpool_fwd(shape, x, indices, y)
    assert torch.equal(y, unpooled(x, indices, output))
    whole = y.as_strided((y.untyped_storage().nbytes() // 4,), (1,), 0)
    assert float(whole.sum()) == pytest.approx(float(y.sum()))


def test_large_planes_are_read_about_twice() -> None:
    """In parts: of 2x2 pooling's indices most segments concern one part, and the workspace is small."""
    plane = torch.randn(1, 1, 192, 192)
    x, indices = F.max_pool2d(plane, 2, return_indices=True)
    y = torch.empty_like(plane)
    with emulate.schedule("forward"), emulate.profile() as profiles:
        unpool.max_unpool_fwd(UnpoolShape.of(x.shape, x.shape, (192, 192)), x, indices, y)
    assert torch.equal(y, F.max_unpool2d(x, indices, 2))
    ranges, fwd = profiles
    assert ranges.launch.kernel.entry == "max_unpool_ranges"
    assert ranges.counters.global_bytes_read == 8 * x.numel()
    assert ranges.counters.global_bytes_written <= 8 * x.numel() / 32
    assert fwd.counters.global_bytes_read < 4 * x.numel() + 1.5 * 8 * x.numel()
    assert fwd.counters.global_bytes_written == 4 * y.numel()


def test_small_planes_are_read_once() -> None:
    plane = torch.randn(3, 2, 40, 40)
    x, indices = F.max_pool2d(plane, 2, return_indices=True)
    y = torch.empty_like(plane)
    with emulate.schedule("forward"), emulate.profile() as profiles:
        unpool.max_unpool_fwd(UnpoolShape.of(x.shape, x.shape, (40, 40)), x, indices, y)
    (fwd,) = profiles
    moved = fwd.counters.global_bytes_read + fwd.counters.global_bytes_written
    assert moved == UnpoolShape.of(x.shape, x.shape, (40, 40)).bytes_moved(4)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_unpooling_with_64_bit_indices(layout: str, constants: pytest.MonkeyPatch) -> None:
    constants.setattr(unpool, "INT32_MAX", 1)
    constants.setattr(unpool, "SLOTS", 64)
    size = (2, 8, 4, 5)
    x = laid_out(size, layout, normal(1, torch.float32))
    plans = check_unpool(x, scattered(size, layout, 80), (8, 10), x)
    assert len(plans) == 3 and {variant(plan)["INDEX"] for plan in plans} == {"long long"}


# ---- sizes that no test can hold -------------------------------------------------------------------------


def far_apart(size: Size, dtype: torch.dtype = torch.float32, step: int = 2**31) -> Tensor:
    """Two images so many elements apart, without memory."""
    dense = torch.empty(size, device="meta").stride()
    return torch.empty_strided(size, (step, *dense[1:]), dtype=dtype, device="meta")


@pytest.mark.parametrize("step, index", [(2**31, "long long"), (2**30, "int")])
def test_tensors_of_more_than_2_to_the_31_elements_get_64_bit_indices(
    step: int, index: str
) -> None:
    small, large = (2, 3, 4, 5), (2, 3, 8, 11)
    unpooling, pooling = UnpoolShape.of(small, small, (8, 11)), PoolShape.adaptive(large, (4, 5))
    x, y = torch.empty(small, device="meta"), torch.empty(large, device="meta")
    far_x, far_y = far_apart(small, step=step), far_apart(large, step=step)
    indices = torch.empty(small, dtype=torch.int64, device="meta")
    far_indices = far_apart(small, torch.int64, step)
    offsets, far_offsets = indices.to(torch.uint8), far_apart(small, torch.uint8, step)
    with trace(run=False) as plans:
        unpool.max_unpool_fwd(unpooling, far_x, indices, y)
        unpool.max_unpool_fwd(unpooling, x, far_indices, y)
        unpool.max_unpool_fwd(unpooling, x, indices, far_y)
        unpool.max_unpool_bwd(unpooling, far_y, indices, x)
        pool.max_pool_fwd(pooling, far_y, x, offsets)
        pool.max_pool_fwd(pooling, y, far_x, offsets)
        pool.max_pool_bwd(pooling, x, far_offsets, y)
        pool.max_pool_gather(pooling, y, offsets, far_x)
    assert [variant(plan)["INDEX"] for plan in plans] == [index] * 8


def test_adaptive_windows_whose_bounds_need_64_bits() -> None:
    """floor(p·H/P) is computed in products of sizes."""
    for size, output, index in ((46000, 46001, "int"), (47000, 47001, "long long")):
        shape = PoolShape.adaptive((1, 1, size), output)
        x, y = torch.empty(1, 1, size, device="meta"), torch.empty(1, 1, output, device="meta")
        with trace(run=False) as plans:
            pool.max_pool_fwd(shape, x, y, None)
        assert variant(plans[0])["INDEX"] == index


def test_what_is_supported() -> None:
    shape = UnpoolShape.of((2, 3, 4, 4), (2, 3, 4, 4), (8, 8))
    for dtype in ALL:
        assert unpool.supports("max_unpool_fwd", shape, dtype) is None
    reason = unpool.supports("max_unpool_fwd", shape, torch.int32)
    assert reason and "expected float32" in reason
    reason = unpool.supports("max_unpool_fwd", NormShape.of((2, 3, 4)), torch.float32)
    assert reason and "expected an UnpoolShape, got NormShape" in reason
    for size, output in (((1, 1, 4), 2**26 + 1), ((1, 2**26, 64), 64)):
        large = UnpoolShape.of(size, size, (output,))
        reason = unpool.supports("max_unpool_fwd", large, torch.float32)
        assert reason and "expected at most" in reason

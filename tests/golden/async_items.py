"""The golden items of `kernels/ptx_async.cuh` and `kernels/ptx_sm90.cuh`, and the problems they are made of.

Most of the kernels are those of tests/emulated, which the tests of the emulator run on more of the same. What
is expected comes from torch's indexing and multiplication alone.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cnnops.cuda.kernel import ELEMENT, Launch, launch_of
from cnnops.cuda.tensor_map import Swizzle, TensorMap, im2col, tiled

from .item import KERNELS, Bits, Item, Params, Tensors, Within

EMULATED = Path(__file__).parents[1] / "emulated"
EXACT = Bits("moves bits and computes nothing")
SUMS_EXACT = Bits("sums of small whole numbers are exact in any order")
SUMS = Within("products exact, sums rounded or cut at about the 21st bit of the largest", 2.0**-17)
HALF, BFLOAT, FLOAT, DOUBLE = torch.float16, torch.bfloat16, torch.float32, torch.float64

Plan = Callable[[Tensors, Tensors], Launch]


@dataclass(frozen=True)
class AsyncItem(Item):
    """An item whose launch takes more than `Item` knows of: tensor maps, dynamic shared memory."""

    make_plan: Plan = lambda inputs, outputs: NotImplemented

    def plan(self, inputs: Tensors, outputs: Tensors) -> Launch:
        return self.make_plan(inputs, outputs)


# ---- boxes of tensors: tiles.cu --------------------------------------------------------------------------


class Tile(NamedTuple):
    """Sizes outermost first, as torch has them; the others innermost first, as TMA does."""

    size: tuple[int, ...]
    dtype: torch.dtype
    at: tuple[int, ...]
    box: tuple[int, ...]
    swizzle: Swizzle = Swizzle.NONE
    steps: tuple[int, ...] = (1,) * 5


TILES = {
    "2d_inside": Tile((20, 32), FLOAT, (4, 3), (16, 8)),
    "2d_around_an_edge": Tile((20, 32), FLOAT, (-5, 17), (32, 8), Swizzle.B128),
    "2d_all_outside": Tile((20, 32), FLOAT, (32, 0), (4, 4)),
    "2d_half": Tile((64, 40), HALF, (8, 60), (32, 16), Swizzle.B64),
    "2d_bfloat": Tile((64, 40), BFLOAT, (30, -3), (16, 64), Swizzle.B32),
    "2d_steps": Tile((40, 24), FLOAT, (0, 1), (8, 17), Swizzle.NONE, (1, 3)),
    "2d_double": Tile((9, 10), DOUBLE, (3, 2), (2, 7)),
    "3d": Tile((6, 5, 24), HALF, (4, -1, 3), (16, 4, 5), Swizzle.B32),
    "4d": Tile((3, 7, 9, 64), HALF, (32, 5, -2, 1), (64, 8, 4, 2), Swizzle.B128),
    "4d_steps": Tile((3, 7, 9, 32), HALF, (0, 0, -1, 1), (32, 8, 6, 2), Swizzle.B64, (1, 2, 3, 1)),
    "5d": Tile((2, 3, 4, 5, 8), FLOAT, (4, 3, -1, 1, 0), (4, 3, 4, 2, 3)),
}


class Boxes(ctypes.Structure):
    """`struct Params` of tiles.cu."""

    _fields_ = [
        ("from_", ctypes.c_int * 5),
        ("to", ctypes.c_int * 5),
        ("offsets", ctypes.c_int * 3),
        ("bytes", ctypes.c_int),
    ]


def map_of(name: str, x: torch.Tensor, **arguments: Any) -> TensorMap:
    """A tiled map of all of `x`, whose last dimension is contiguous."""
    strides = [s * x.element_size() for s in x.stride()[-2::-1]]
    return tiled(name, x.dtype, x.shape[::-1], strides, **arguments)


def map_of_tile(tile: Tile, x: torch.Tensor) -> TensorMap:
    return map_of("x", x, box=tile.box, element_strides=tile.steps[: x.dim()], swizzle=tile.swizzle)


def box_of(x: torch.Tensor, tile: Tile) -> torch.Tensor:
    """The box of `x`, zero outside of the tensor, by torch's indexing."""
    for d, (start, size) in enumerate(zip(tile.at, tile.box, strict=True)):
        dim = x.dim() - 1 - d
        index = torch.arange(start, start + size, tile.steps[d])
        inside = (index >= 0) & (index < x.shape[dim])
        x = x.index_select(dim, index.clamp(0, x.shape[dim] - 1))
        x = torch.where(inside.view(-1, *[1] * d), x, torch.zeros((), dtype=x.dtype))
    return x


def box_plan(
    entry: str,
    maps: Sequence[TensorMap],
    at: Sequence[int],
    to: Sequence[int] = (),
    offsets: Sequence[int] = (),
    updates: Sequence[str] = (),
    shown: Swizzle | None = None,
) -> Launch:
    """An entry of tiles.cu, with y as an output unless it is named in `updates`.

    `shown` overrides the swizzle by which load_box reads shared memory.
    """
    first = maps[0]
    constants = {
        "ELEMENT": ELEMENT[first.dtype], "RANK": len(first.sizes),
        "SWIZZLE": int(first.swizzle if shown is None else shown), "IM2COL": int(bool(first.lower)),
    }  # fmt: skip
    return launch_of(
        str(EMULATED / "tiles.cu"), entry, constants,
        Boxes(tuple(at), tuple(to), tuple(offsets), first.box_bytes), grid=[1], block=[32], inputs=["x"],
        outputs=[] if updates else ["y"], updates=updates, shared_bytes=first.box_bytes, tensor_maps=maps,
    )  # fmt: skip


def _random(
    size: Sequence[int], dtype: torch.dtype, generator: torch.Generator, name: str = "x"
) -> Tensors:
    return {name: torch.randn(tuple(size), generator=generator, dtype=DOUBLE).to(dtype)}


def _load_plan(tile: Tile, inputs: Tensors, outputs: Tensors) -> Launch:
    return box_plan("load_box", [map_of_tile(tile, inputs["x"])], tile.at)


# A box is stored into a tensor that is smaller by an element or two on each side, but for the innermost.
def _inner(x: torch.Tensor) -> torch.Tensor:
    for dim in range(x.dim() - 1):
        x = x.narrow(dim, 1, x.shape[dim] - 2)
    return x.contiguous()


def _store_plan(tile: Tile, inputs: Tensors, outputs: Tensors) -> Launch:
    to = (0, *(-1,) * (len(tile.box) - 1))
    maps = [map_of(name, t, box=tile.box, swizzle=tile.swizzle)
            for name, t in (("x", inputs["x"]), ("y", outputs["y"]))]  # fmt: skip
    return box_plan("copy_box", maps, tile.at, to)


def _tile_items() -> Iterator[Item]:
    loads = (
        "tma_load", "tma_prefetch", "mbarrier_init", "fence_mbarrier_init", "mbarrier_arrive_expect_tx",
        "mbarrier_wait",
    )  # fmt: skip
    stores = ("tma_store", "bulk_commit", "bulk_wait_read")
    for name, tile in TILES.items():
        inputs = partial(_random, tile.size, tile.dtype)
        yield AsyncItem(
            f"tma_load_{name}", loads, "tiles.cu", "load_box", inputs,
            lambda inputs, tile=tile: {"y": box_of(inputs["x"], tile)}, EXACT, arch="90a",
            make_plan=partial(_load_plan, tile),
        )  # fmt: skip
        if max(tile.steps) == 1 and min(tile.box) > 2:
            yield AsyncItem(
                f"tma_store_{name}", stores, "tiles.cu", "copy_box", inputs,
                lambda inputs, tile=tile: {"y": _inner(box_of(inputs["x"], tile))}, EXACT, arch="90a",
                make_plan=partial(_store_plan, tile),
            )  # fmt: skip
    for swizzle in Swizzle:
        width = (swizzle.width or 16) // 4
        shape = Tile((16, width), FLOAT, (0, 0), (width, 16), swizzle)
        yield AsyncItem(
            f"swizzle_{swizzle.name.lower()}", loads, "tiles.cu", "load_box",
            partial(_random, shape.size, FLOAT), partial(swizzled, swizzle), EXACT, arch="90a",
            make_plan=lambda inputs, outputs, shape=shape: box_plan(
                "load_box", [map_of_tile(shape, inputs["x"])], shape.at, shown=Swizzle.NONE
            ),
        )  # fmt: skip


def swizzled(swizzle: Swizzle, inputs: Tensors) -> Tensors:
    """Where each 16-byte piece of x goes, with lines of 128 bytes told apart by the address alone."""
    pieces = inputs["x"].reshape(-1, 4)
    at = torch.arange(len(pieces))
    y = torch.empty_like(pieces)
    y[at ^ (at // 8 % max(swizzle.width // 16, 1))] = pieces
    return {"y": y.view(inputs["x"].shape)}


def bytes_plan(n: int) -> Launch:
    """y = x by plain bulk copies, for `n` floats."""
    constants = {"ELEMENT": "float", "RANK": 2, "SWIZZLE": 0, "IM2COL": 0}
    return launch_of(
        str(EMULATED / "tiles.cu"), "copy_bytes", constants, Boxes(bytes=4 * n), grid=[1], block=[32],
        inputs=["x"], outputs=["y"], shared_bytes=2048,
    )  # fmt: skip


# ---- columns of pixels: tiles.cu -------------------------------------------------------------------------


class Im2col(NamedTuple):
    """A convolution's input and one copy of it, outermost first."""

    size: tuple[int, ...]  # N [D] [H] W C
    taps: tuple[int, ...]  # [T] [R] S
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    channels: int
    pixels: int
    swizzle: Swizzle = Swizzle.NONE

    @property
    def reach(self) -> list[int]:
        return [d * (t - 1) for d, t in zip(self.dilation, self.taps, strict=True)]

    @property
    def outputs(self) -> list[int]:
        """[Z] [P] Q"""
        rows = zip(self.size[1:-1], self.padding, self.reach, self.stride, strict=True)
        return [(n + 2 * p - r - 1) // s + 1 for n, p, r, s in rows]

    def map_of(self, x: torch.Tensor) -> TensorMap:
        upper = [p - r for p, r in zip(self.padding, self.reach, strict=True)]
        return im2col(
            "x", x.dtype, x.shape[::-1], [x.element_size() * s for s in x.stride()[-2::-1]],
            [-p for p in self.padding[::-1]], upper[::-1], self.channels, self.pixels,
            (1, *self.stride[::-1], 1), self.swizzle,
        )  # fmt: skip

    def corner_of(self, first: int) -> list[int]:
        """The window of output number `first`: where it begins, innermost first, and its image."""
        image, corner = first, []
        for n, s, p in zip(self.outputs[::-1], self.stride[::-1], self.padding[::-1], strict=True):
            corner.append(image % n * s - p)
            image //= n
        return [*corner, image]

    def offsets_of(self, tap: Sequence[int]) -> list[int]:
        return [t * d for t, d in zip(tap, self.dilation, strict=True)][::-1]

    def plan(self, x: torch.Tensor, first: int, channel: int, tap: Sequence[int]) -> Launch:
        """Loads the pixels from output number `first` on, from `channel` on, for one filter tap."""
        at = (channel, *self.corner_of(first))
        return box_plan("load_box", [self.map_of(x)], at, offsets=self.offsets_of(tap))

    def expected(
        self, x: torch.Tensor, first: int, channel: int, tap: Sequence[int]
    ) -> torch.Tensor:
        found = columns(x, self, tap)
        padded = torch.zeros(len(found) + self.pixels, x.shape[-1] + self.channels, dtype=x.dtype)
        padded[: len(found), : x.shape[-1]] = found
        return padded[first : first + self.pixels, channel : channel + self.channels].contiguous()


IM2COL = {
    "1d": Im2col((3, 19, 8), (3,), (1,), (1,), (1,), 8, 32),
    "1d_strided": Im2col((3, 19, 8), (5,), (2,), (3,), (2,), 4, 16),
    "2d": Im2col((2, 9, 7, 64), (3, 3), (1, 1), (1, 1), (1, 1), 32, 64, Swizzle.B128),
    "2d_strided": Im2col((2, 9, 12, 16), (3, 2), (2, 3), (1, 0), (1, 2), 8, 24, Swizzle.B32),
    "2d_beyond_channels": Im2col((1, 6, 6, 12), (2, 3), (1, 2), (0, 2), (3, 1), 16, 40, Swizzle.B64),
    "3d": Im2col((2, 5, 6, 4, 8), (3, 2, 3), (1, 2, 1), (1, 0, 1), (1, 1, 1), 8, 50),
    "3d_dilated": Im2col((1, 8, 5, 9, 4), (2, 3, 2), (2, 1, 3), (2, 2, 0), (3, 2, 1), 4, 128),
}  # fmt: skip


def columns(x: torch.Tensor, case: Im2col, tap: Sequence[int]) -> torch.Tensor:
    """All output pixels x C of one filter tap: shifted, strided views of the padded x."""
    padding = [v for p in reversed(case.padding) for v in (p, p)]
    padded = torch.nn.functional.pad(x, (0, 0, *padding))
    for d, (t, count) in enumerate(zip(tap, case.outputs, strict=True)):
        index = t * case.dilation[d] + case.stride[d] * torch.arange(count)
        padded = padded.index_select(1 + d, index)
    return padded.reshape(-1, x.shape[-1])


def _im2col_items() -> Iterator[Item]:
    for name, case in IM2COL.items():
        taps = list(itertools.product(*map(range, case.taps)))
        first, tap = case.outputs[-1] + 1, taps[len(taps) // 2 + 1]
        yield AsyncItem(
            f"tma_load_im2col_{name}", ("tma_load_im2col",), "tiles.cu", "load_box",
            partial(_random, case.size, FLOAT),
            lambda inputs, case=case, first=first, tap=tap: {
                "y": case.expected(inputs["x"], first, 0, tap)
            },
            EXACT, arch="90a",
            make_plan=lambda inputs, outputs, case=case, first=first, tap=tap: case.plan(
                inputs["x"], first, 0, tap
            ),
        )  # fmt: skip


# ---- products: products.cu -------------------------------------------------------------------------------


class Product(NamedTuple):
    dtype: torch.dtype
    n: int
    swizzle: Swizzle
    a_major: int = 0  # 0: K, 1: M
    b_major: int = 0  # 0: K, 1: N
    a_in_registers: int = 0

    def __str__(self) -> str:
        majors = "km"[self.a_major] + "kn"[self.b_major]
        where = "_a_in_registers" if self.a_in_registers else ""
        return f"{ELEMENT[self.dtype]}_n{self.n}_{self.swizzle.name.lower()}_{majors}{where}"

    @property
    def k(self) -> int:
        return 128 // self.dtype.itemsize

    def in_memory(self, a: torch.Tensor, b: torch.Tensor) -> Tensors:
        """A of 64 x K and B of K x N as they lie in memory."""
        a, b = a.to(self.dtype), b.to(self.dtype)
        return {
            "a": a.T.contiguous() if self.a_major else a,
            "b": b if self.b_major else b.T.contiguous(),
        }

    def operands(self, inputs: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
        """A and B again, as float64, as tensor cores see them."""
        a = inputs["a"].T if self.a_major else inputs["a"]
        b = inputs["b"] if self.b_major else inputs["b"].T
        if self.dtype == FLOAT:  # tf32: the lower 13 bits do not count
            a, b = ((t.contiguous().view(torch.int32) & ~0x1FFF).view(FLOAT) for t in (a, b))
        return a.double(), b.double()

    def plan(self, inputs: Tensors, outputs: Tensors) -> Launch:
        width = (self.swizzle.width or 16) // self.dtype.itemsize
        maps = [
            map_of(name, t, box=(width, len(t)), swizzle=self.swizzle) for name, t in inputs.items()
        ]
        constants: Mapping[str, str | int] = {
            "ELEMENT": ELEMENT[self.dtype], "N_SIZE": self.n, "K_SIZE": self.k,
            "SWIZZLE": int(self.swizzle), "A_MAJOR": self.a_major, "B_MAJOR": self.b_major,
            "A_IN_REGISTERS": self.a_in_registers,
        }  # fmt: skip
        return launch_of(
            str(EMULATED / "products.cu"), "product", dict(constants), _Empty(), grid=[1], block=[128],
            inputs=["a", "b"], outputs=["y"], shared_bytes=64 << 10, tensor_maps=maps,
        )  # fmt: skip


class _Empty(ctypes.Structure):
    _fields_: list[tuple[str, Any]] = []


PRODUCTS = (
    Product(HALF, 8, Swizzle.NONE),
    Product(HALF, 64, Swizzle.B128),
    Product(HALF, 256, Swizzle.B128, 0, 1),
    Product(HALF, 16, Swizzle.B32, 1, 1),
    Product(HALF, 32, Swizzle.NONE, 1, 1),
    Product(HALF, 96, Swizzle.B64, 1, 0),
    Product(BFLOAT, 128, Swizzle.B128, 1, 1),
    Product(BFLOAT, 160, Swizzle.B64, 0, 0),
    Product(BFLOAT, 192, Swizzle.B64, 0, 1, 1),
    Product(HALF, 64, Swizzle.B128, 0, 0, 1),
    Product(FLOAT, 64, Swizzle.B128),
    Product(FLOAT, 8, Swizzle.NONE),
    Product(FLOAT, 160, Swizzle.B32),
    Product(FLOAT, 32, Swizzle.B64, 0, 0, 1),
)
WITH_RANDOM_NUMBERS = (0, 6, 11, 13)


def _factors(product: Product, random: bool, generator: torch.Generator) -> Tensors:
    def matrix(*size: int) -> torch.Tensor:
        if random:
            return torch.randn(size, generator=generator)
        return torch.randint(-7, 8, size, generator=generator).float()

    return product.in_memory(matrix(64, product.k), matrix(product.k, product.n))


def _multiplied(product: Product, absolute: bool, inputs: Tensors) -> Tensors:
    a, b = product.operands(inputs)
    return {"y": (a.abs() @ b.abs() if absolute else a @ b).float()}


def _product_items() -> Iterator[Item]:
    wrappers = (
        "wgmma", "wgmma_descriptor", "wgmma_fence", "wgmma_commit", "wgmma_wait", "wgmma_pin",
    )  # fmt: skip
    for i, product in enumerate(PRODUCTS):
        for random in (False, True) if i in WITH_RANDOM_NUMBERS else (False,):
            yield AsyncItem(
                f"wgmma_{product}{'_random' if random else ''}", wrappers, "products.cu", "product",
                partial(_factors, product, random), partial(_multiplied, product, False),
                SUMS if random else SUMS_EXACT, scale=partial(_multiplied, product, True), arch="90a",
                make_plan=product.plan,
            )  # fmt: skip


# ---- a whole convolution: implicit_gemm.cu ---------------------------------------------------------------


class Convolution(ctypes.Structure):
    """`struct Params` of implicit_gemm.cu."""

    _fields_ = [
        (name, ctypes.c_int)
        for name in ("N", "P", "Q", "C", "K", "R", "S", "stride", "padding", "dilation")
    ]


class Conv(NamedTuple):
    x: tuple[int, int, int, int]  # N H W C
    w: tuple[int, int, int, int]  # K R S C
    stride: int
    padding: int
    dilation: int

    def plan(self, inputs: Tensors, outputs: Tensors, stages: int = 3, bug: int = 0) -> Launch:
        x, w = inputs["x"], inputs["w"]
        n, _, _, c = self.x
        k, r, s, _ = self.w
        _, p, q, _ = outputs["y"].shape
        case = Im2col(
            self.x, (r, s), (self.stride,) * 2, (self.padding,) * 2, (self.dilation,) * 2, 64, 64,
            Swizzle.B128,
        )  # fmt: skip
        w_map = map_of("w", w.view(k, r * s, c), box=(64, 1, 64), swizzle=Swizzle.B128)
        params = Convolution(n, p, q, c, k, r, s, self.stride, self.padding, self.dilation)
        return launch_of(
            str(EMULATED / "implicit_gemm.cu"), "convolution", {"STAGES": stages, "BUG": bug}, params,
            grid=[-(-n * p * q // 64), -(-k // 64)], block=[256], inputs=["x", "w"], outputs=["y"],
            shared_bytes=stages * 2 * 64 * 64 * 2, tensor_maps=[case.map_of(x), w_map],
        )  # fmt: skip

    def inputs(self, generator: torch.Generator) -> Tensors:
        return {
            name: torch.randint(-3, 4, size, generator=generator).half()
            for name, size in (("x", self.x), ("w", self.w))
        }

    def expected(self, inputs: Tensors) -> Tensors:
        x, w = (inputs[name].permute(0, 3, 1, 2).double() for name in "xw")
        y = torch.nn.functional.conv2d(x, w, None, self.stride, self.padding, self.dilation)
        return {"y": y.permute(0, 2, 3, 1).float().contiguous()}


CONVOLUTIONS = {
    "3x3": Conv((2, 9, 8, 64), (64, 3, 3, 64), 1, 1, 1),
    "strided": Conv((2, 11, 9, 72), (40, 3, 2, 72), 2, 1, 1),
    "dilated": Conv((1, 12, 12, 136), (96, 3, 3, 136), 1, 2, 2),
    "1x1": Conv((3, 5, 5, 8), (8, 1, 1, 8), 1, 0, 1),
}


def _convolution_items() -> Iterator[Item]:
    wrappers = (
        "setmaxnreg_inc", "setmaxnreg_dec", "elect_one", "mbarrier_arrive", "tma_load_im2col", "wgmma",
    )  # fmt: skip
    for name in ("3x3", "strided"):
        conv = CONVOLUTIONS[name]
        yield AsyncItem(
            f"implicit_gemm_{name}", wrappers, "implicit_gemm.cu", "convolution", conv.inputs, conv.expected,
            SUMS_EXACT, arch="90a", make_plan=conv.plan,
        )  # fmt: skip


# ---- barriers and small copies ---------------------------------------------------------------------------


class Planted(ctypes.Structure):
    """`struct Params` of planted.cuh."""

    _fields_ = [("n", ctypes.c_int), ("huge", ctypes.c_int), ("zero", ctypes.c_int)]


BOX = ((16, 8), (64,), (16, 8))
MAPS = tiled("x", FLOAT, *BOX), tiled("y", FLOAT, *BOX)


def planted_plan(file: str, entry: str, bug: int, n: int = 128) -> Launch:
    """An entry of async.cu or hopper.cu: 128 threads on `n` floats, of hopper.cu as 8 lines of 16."""
    return launch_of(
        str(EMULATED / f"{file}.cu"), entry, {"BUG": bug}, Planted(n, 2**31 - 1, 0), grid=[1], block=[128],
        inputs=["x"], outputs=["y"], tensor_maps=MAPS if file == "hopper" else (),
    )  # fmt: skip


def _clean_twin(
    file: str,
    entry: str,
    wrappers: tuple[str, ...],
    expected: Callable[[torch.Tensor], torch.Tensor],
) -> Item:
    """The correct version of a kernel with a planted bug."""
    return AsyncItem(
        f"{file}_{entry}", wrappers, f"{file}.cu", entry,
        lambda generator: {"x": torch.randint(-99, 100, (128,), generator=generator).float()},
        lambda inputs: {"y": expected(inputs["x"])}, EXACT, arch="80" if file == "async" else "90a",
        make_plan=lambda inputs, outputs: planted_plan(file, entry, 0),
    )  # fmt: skip


def _second_half(factor: float, x: torch.Tensor) -> torch.Tensor:
    """What warps 2 and 3 make of what warps 0 and 1 hand them."""
    return torch.cat([torch.zeros(64), factor * x[:64].flip(0)])


def _copied(bytes_: int, inputs: Tensors) -> Tensors:
    x = inputs["x"].view(torch.uint8).view(-1, bytes_)
    kept = torch.arange(bytes_) < inputs["sizes"].view(-1, 1)
    return {"y": torch.where(kept, x, torch.zeros_like(x)).view(torch.int32).view(-1, bytes_ // 4)}


def _copies(bytes_: int, generator: torch.Generator) -> Tensors:
    words = torch.randint(-(2**31), 2**31, (64, bytes_ // 4), generator=generator)
    return {
        "x": words.to(torch.int32),
        "sizes": torch.randint(0, bytes_ + 1, (64,), generator=generator).to(torch.int32),
    }


def _elections(inputs: Tensors) -> Tensors:
    masks = inputs["masks"]
    lanes = [(mask & 0xFFFFFFFF).bit_count() for mask in masks.tolist()]
    return {"elected": torch.ones_like(masks), "alike": torch.tensor(lanes, dtype=masks.dtype)}


def _barrier_items() -> Iterator[Item]:
    for bytes_ in (4, 8, 16):
        yield Item(
            f"cp_async_{bytes_}", ("cp_async", "cp_async_wait_all"), "copies.cu", "copy",
            partial(_copies, bytes_), partial(_copied, bytes_), EXACT, constants={"PIECE": bytes_},
        )  # fmt: skip
    groups = ("cp_async", "cp_async_commit", "cp_async_wait")
    for stages in (2, 4):
        yield AsyncItem(
            f"cp_async_pipeline_{stages}", groups, "async.cu", f"copy_by_{stages}_stages",
            partial(_random, (2100,), FLOAT), lambda inputs: {"y": inputs["x"].clone()}, EXACT,
            make_plan=lambda inputs, outputs, stages=stages: planted_plan(
                "async", f"copy_by_{stages}_stages", 0, 2100
            ),
        )  # fmt: skip
    yield _clean_twin(
        "async", "barrier_missing", ("bar_sync", "bar_arrive"), partial(_second_half, 1)
    )
    yield _clean_twin("async", "ping_pong", ("bar_sync", "bar_arrive"), partial(_second_half, 28))
    barriers = "mbarrier_init", "mbarrier_arrive", "mbarrier_wait"
    yield _clean_twin("hopper", "written_after_arrival", barriers, lambda x: x.flip(0))
    yield _clean_twin("hopper", "initialised_twice", (*barriers, "mbarrier_inval"), torch.clone)
    yield _clean_twin("hopper", "try_wait_taken_for_wait", ("mbarrier_try_wait",), torch.clone)
    yield _clean_twin(
        "hopper", "not_released", ("tma_load", *barriers),
        lambda x: torch.cat([3 * x[32:], torch.zeros(32)]),
    )  # fmt: skip
    yield _clean_twin(
        "hopper", "store_without_fence", ("fence_proxy_async", "tma_store"), torch.clone
    )
    yield AsyncItem(
        "bulk_copies", ("bulk_load", "bulk_store", "bulk_commit", "bulk_wait", "bulk_wait_read"), "tiles.cu",
        "copy_bytes", partial(_random, (2000,), FLOAT), lambda inputs: {"y": inputs["x"].clone()}, EXACT,
        arch="90a", make_plan=lambda inputs, outputs: bytes_plan(2000),
    )  # fmt: skip
    masks = torch.tensor([-1, 1, 0x10, 0x7FFF0000, 0x0F0F0F0F, 0x33], dtype=torch.int32)
    yield AsyncItem(
        "elections", ("elect_one",), "warps.cu", "elections", lambda _: {"masks": masks.clone()}, _elections,
        EXACT, arch="90a", make_plan=lambda inputs, outputs: launch_of(
            str(KERNELS / "warps.cu"), "elections", {}, Params(len(masks)), grid=[1], block=[32],
            inputs=["masks"], outputs=["elected", "alike"],
        ),
    )  # fmt: skip
    yield Item(
        "one_grid_after_another", ("griddepcontrol_wait", "griddepcontrol_launch_dependents"), "warps.cu",
        "one_grid_after_another", partial(_random, (64,), FLOAT), lambda inputs: {"y": inputs["x"].clone()},
        EXACT, arch="90a",
    )  # fmt: skip


ITEMS = [
    *_barrier_items(),
    *_tile_items(),
    *_im2col_items(),
    *_product_items(),
    *_convolution_items(),
]

"""Tensor maps: what a bulk copy (TMA, sm_90) must know of a tensor and of the boxes that it moves.

`tiled` and `im2col` take the arguments of the driver's cuTensorMapEncodeTiled and cuTensorMapEncodeIm2col
and check them by the driver's rules. A `Launch` carries the maps, each for one of its tensors; when it runs,
a map is encoded by the driver on a GPU and packed into a structure of `kernels/emulator/tensor_maps.h` under
the emulator. A kernel receives it as ``const __grid_constant__ TensorMap``, behind its tensors.

Dimensions come innermost first, as the driver and the instructions have them: C W H N for a tensor that lies
as N H W C. There is no interleaving, and what lies outside of a tensor reads as zero.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from typing import Any, NoReturn

import torch

BYTES = 128
_MAGIC = 0x4D544E43  # TENSOR_MAP_MAGIC of kernels/emulator/tensor_maps.h
_DTYPES = {
    torch.float32: "FLOAT32",
    torch.float64: "FLOAT64",
    torch.float16: "FLOAT16",
    torch.bfloat16: "BFLOAT16",
    torch.uint8: "UINT8",
    torch.int32: "INT32",
    torch.int64: "INT64",
}


class Swizzle(IntEnum):
    """How 16-byte pieces are arranged in shared memory: `enum Swizzle` of kernels/ptx_sm90.cuh."""

    NONE = 0
    B32 = 1
    B64 = 2
    B128 = 3

    @property
    def width(self) -> int:
        """Bytes of the innermost dimension of a box; 0: as many as one likes."""
        return 16 << self if self else 0


class L2Promotion(IntEnum):
    """Bytes that a miss in L2 fetches: CUtensorMapL2promotion."""

    NONE = 0
    B64 = 1
    B128 = 2
    B256 = 3


@dataclass(frozen=True)
class TensorMap:
    """A map of `tensor`, which is one of the names of the launch. Made by `tiled` and `im2col`."""

    tensor: str
    dtype: torch.dtype
    sizes: tuple[int, ...]  # in elements, innermost first
    strides: tuple[int, ...]  # in bytes, from the second dimension on
    box: tuple[int, ...]  # in elements; im2col: channels and pixels
    steps: tuple[int, ...]  # through the tensor, in elements
    swizzle: Swizzle
    l2_promotion: L2Promotion
    offset: int  # in bytes, of the map's first element in the tensor
    lower: tuple[int, ...] = ()  # im2col: corners of the bounding box, w h d
    upper: tuple[int, ...] = ()

    @property
    def box_bytes(self) -> int:
        """What one copy moves: the bytes to expect on the mbarrier."""
        counts = list(self.box)
        if not self.lower:
            counts = [self.box[0]] + [
                -(-n // s) for n, s in zip(self.box[1:], self.steps[1:], strict=True)
            ]
        total = self.dtype.itemsize
        for count in counts:
            total *= count
        return total

    def address(self, tensor: torch.Tensor | None) -> int:
        """Where the map's first element is. Raises RuntimeError if `tensor` is not what the map says."""
        if tensor is None or tensor.dtype != self.dtype:
            got = "no tensor" if tensor is None else tensor.dtype
            _refuse(self.tensor, "dtype", self.dtype, got)
        item = self.dtype.itemsize
        ends = self.offset + self.sizes[0] * item
        ends += sum((n - 1) * s for n, s in zip(self.sizes[1:], self.strides, strict=True))
        last = sum((n - 1) * s for n, s in zip(tensor.size(), tensor.stride(), strict=True))
        if tensor.numel() == 0 or ends > (last + 1) * item:
            bytes_ = (last + 1) * item if tensor.numel() else 0
            _refuse(self.tensor, "globalDim, globalStrides", f"at most {bytes_} bytes", ends)
        address = tensor.data_ptr() + self.offset
        if address % 16:
            _refuse(self.tensor, "globalAddress", "a multiple of 16", hex(address))
        return address


def _refuse(tensor: str, argument: str, expected: object, got: object) -> NoReturn:
    raise RuntimeError(f"tensor map of {tensor}: {argument}: expected {expected}, got {got}")


def _check(
    tensor: str,
    dtype: torch.dtype,
    sizes: Sequence[int],
    strides: Sequence[int],
    steps: Sequence[int],
    inner: int,
    swizzle: Swizzle,
    ranks: tuple[int, int],
) -> None:
    """The rules that both kinds of maps share; `inner` is the width of a box."""
    rank = len(sizes)
    if dtype not in _DTYPES:
        _refuse(tensor, "tensorDataType", f"one of {', '.join(map(str, _DTYPES))}", dtype)
    if not ranks[0] <= rank <= ranks[1]:
        _refuse(tensor, "tensorRank", f"{ranks[0]} to {ranks[1]}", rank)
    if len(strides) != rank - 1 or len(steps) != rank:
        lengths = f"{len(strides)} and {len(steps)}"
        _refuse(tensor, "globalStrides, elementStrides", f"{rank - 1} and {rank} of them", lengths)
    if not all(1 <= n <= 2**32 for n in sizes):
        _refuse(tensor, "globalDim", "1 to 2^32", tuple(sizes))
    if not all(0 <= s < 2**40 and s % 16 == 0 for s in strides):
        _refuse(tensor, "globalStrides", "multiples of 16 below 2^40", tuple(strides))
    if not all(1 <= s <= 8 for s in steps):
        _refuse(tensor, "elementStrides", "1 to 8", tuple(steps))
    if steps[0] != 1:  # the driver ignores it
        _refuse(tensor, "elementStrides[0]", 1, steps[0])
    width = inner * dtype.itemsize
    if width % 16:
        _refuse(tensor, "inner dimension of the box", "a multiple of 16 bytes", width)
    # The driver takes narrower boxes, too, and pads their lines in shared memory to the swizzle's width.
    if swizzle.width and width != swizzle.width:
        _refuse(
            tensor, f"inner dimension of a box with {swizzle!r}", f"{swizzle.width} bytes", width
        )


def tiled(
    tensor: str,
    dtype: torch.dtype,
    sizes: Sequence[int],
    strides: Sequence[int],
    box: Sequence[int],
    element_strides: Sequence[int] | None = None,
    swizzle: Swizzle = Swizzle.NONE,
    l2_promotion: L2Promotion = L2Promotion.B128,
    offset: int = 0,
) -> TensorMap:
    """A map for tma_load and tma_store of boxes, as cuTensorMapEncodeTiled makes it.

    `sizes` of one to five dimensions and `box` are in elements, innermost first; `strides`, in bytes, are
    those of the second dimension and up. A box is traversed in steps of `element_strides` elements, of which
    the first is 1. Raises RuntimeError for what the driver would refuse, and for a box narrower than its
    swizzle.
    """
    steps = tuple(element_strides or (1,) * len(sizes))
    _check(tensor, dtype, sizes, strides, steps, box[0] if box else 0, swizzle, (1, 5))
    if len(box) != len(sizes) or not all(1 <= n <= 256 for n in box):
        _refuse(tensor, "boxDim", f"{len(sizes)} numbers from 1 to 256", tuple(box))
    return TensorMap(
        tensor, dtype, tuple(sizes), tuple(strides), tuple(box), steps, swizzle, l2_promotion, offset
    )  # fmt: skip


def im2col(
    tensor: str,
    dtype: torch.dtype,
    sizes: Sequence[int],
    strides: Sequence[int],
    lower: Sequence[int],
    upper: Sequence[int],
    channels: int,
    pixels: int,
    element_strides: Sequence[int] | None = None,
    swizzle: Swizzle = Swizzle.NONE,
    l2_promotion: L2Promotion = L2Promotion.B128,
    offset: int = 0,
) -> TensorMap:
    """A map for tma_load_im2col, as cuTensorMapEncodeIm2col makes it: columns of pixels for a convolution.

    Three to five dimensions: C W [H [D]] N. Corners are those of the box in which the filter's corner moves,
    w first: `lower` is minus the padding, `upper`, counted from the last pixel, padding - dilation (S - 1).
    `element_strides` are 1, the convolution's strides (w first), 1. One copy moves `channels` (at most 256)
    of `pixels` (at most 1024). Raises RuntimeError as `tiled` does.
    """
    steps = tuple(element_strides or (1,) * len(sizes))
    _check(tensor, dtype, sizes, strides, steps, channels, swizzle, (3, 5))
    bits = 16 // (len(sizes) - 2) if len(sizes) < 5 else 5
    for name, corner in (("pixelBoxLowerCorner", lower), ("pixelBoxUpperCorner", upper)):
        limit = 1 << bits - 1
        if len(corner) != len(sizes) - 2 or not all(-limit <= v < limit for v in corner):
            expected = f"{len(sizes) - 2} numbers from {-limit} to {limit - 1}"
            _refuse(tensor, name, expected, tuple(corner))
    for low, high, size in zip(lower, upper, sizes[1:-1], strict=True):
        if low > size - 1 + high:
            _refuse(tensor, "pixelBoxUpperCorner", "a bounding box that is not empty", tuple(upper))
    if not 1 <= channels <= 256:
        _refuse(tensor, "channelsPerPixel", "1 to 256", channels)
    if not 1 <= pixels <= 1024:
        _refuse(tensor, "pixelsPerColumn", "1 to 1024", pixels)
    return TensorMap(
        tensor, dtype, tuple(sizes), tuple(strides), (channels, pixels), steps, swizzle, l2_promotion, offset,
        tuple(lower), tuple(upper),
    )  # fmt: skip


# ---- for the emulator ------------------------------------------------------------------------------------


class Packed(ctypes.Structure):
    """PackedTensorMap of kernels/emulator/tensor_maps.h."""

    _fields_ = [
        ("magic", ctypes.c_uint32),
        ("rank", ctypes.c_uint8),
        ("element_bytes", ctypes.c_uint8),
        ("swizzle", ctypes.c_uint8),
        ("im2col", ctypes.c_uint8),
        ("address", ctypes.c_uint64),
        ("sizes", ctypes.c_uint64 * 5),
        ("strides", ctypes.c_uint64 * 4),
        ("box", ctypes.c_uint16 * 5),
        ("steps", ctypes.c_uint8 * 5),
        ("unused", ctypes.c_uint8),
        ("lower", ctypes.c_int16 * 3),
        ("upper", ctypes.c_int16 * 3),
        ("tensor", ctypes.c_uint32),
        ("number", ctypes.c_uint32),
    ]


def packed(map_: TensorMap, tensor: torch.Tensor | None, index: int) -> bytes:
    """What the emulator takes for a map of `tensor`, number `index` of the launch: 128 bytes."""
    map_.address(tensor)
    content = Packed(
        _MAGIC, len(map_.sizes), map_.dtype.itemsize, map_.swizzle, bool(map_.lower), map_.offset, map_.sizes,
        map_.strides, map_.box, map_.steps, 0, map_.lower, map_.upper, index,
    )  # fmt: skip
    return bytes(content).ljust(BYTES, b"\0")


# ---- for a GPU -------------------------------------------------------------------------------------------


@lru_cache(4096)
def _encoded(map_: TensorMap, address: int) -> bytes:
    from cuda.bindings import driver

    def words(values: Sequence[int]) -> list[Any]:
        return [driver.cuuint32_t(v) for v in values]

    def long_words(values: Sequence[int]) -> list[Any]:
        return [driver.cuuint64_t(v) for v in values]

    types, interleave = driver.CUtensorMapDataType, driver.CUtensorMapInterleave
    fill = driver.CUtensorMapFloatOOBfill
    first = (
        getattr(types, f"CU_TENSOR_MAP_DATA_TYPE_{_DTYPES[map_.dtype]}"), len(map_.sizes), address,
        long_words(map_.sizes), long_words(map_.strides),
    )  # fmt: skip
    last = (
        words(map_.steps), interleave.CU_TENSOR_MAP_INTERLEAVE_NONE, driver.CUtensorMapSwizzle(map_.swizzle),
        driver.CUtensorMapL2promotion(map_.l2_promotion), fill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )  # fmt: skip
    if map_.lower:
        code, encoded = driver.cuTensorMapEncodeIm2col(
            *first, list(map_.lower), list(map_.upper), *map_.box, *last
        )
    else:
        code, encoded = driver.cuTensorMapEncodeTiled(*first, words(map_.box), *last)
    if int(code) != 0:
        raise RuntimeError(f"{map_}: expected the driver to encode it, got {code}")
    return struct.pack("<16Q", *(int(word) for word in encoded.opaque))


def encoded(map_: TensorMap, tensor: torch.Tensor | None) -> bytes:
    """The driver's encoding of the map for the address of `tensor`: 128 bytes, kept for the next call."""
    return _encoded(map_, map_.address(tensor))

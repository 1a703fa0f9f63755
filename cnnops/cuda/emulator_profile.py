"""What a launch under the emulator has done: counters, and its memory traffic as a GPU would see it.

A request is one instruction of one warp. Global memory moves sectors of 32 bytes: a request of 32
neighbouring floats moves 4, of 32 floats in different rows 32. Shared memory has 32 banks of 4 bytes: a
request takes one wavefront, accesses of 8 and 16 bytes two and four, and as many more as different words of
one bank collide.

Only addresses are looked at. What caches keep, and what the memory system overlaps, is for a GPU to tell; but
two counts bound it. A sector that one block asks for twice may come from its L1 the second time, one that two
blocks ask for may not: different pairs of a block and a sector come through L2, however good L1 is. And the
different sectors of the launch come from memory, or from what the launches before have left in L2. Writes
pass L1: each request's sectors go to L2.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from cnnops.cuda.kernel import Launch

SECTOR = 32
"""Bytes."""


class Counters(NamedTuple):
    """What one launch did, counted over all its threads; mma instructions are counted once a warp, wgmma
    once a warpgroup."""

    global_bytes_read: int
    global_bytes_written: int
    shared_accesses: int
    block_barriers: int
    warp_operations: int
    switches: int
    mma_instructions: int
    wgmma_instructions: int


@dataclass(frozen=True)
class Traffic:
    """All requests from one place in a kernel file.

    `units` are sectors, or wavefronts where `shared`; `least` is how many there would be if the lanes' bytes
    were neighbours, or no banks collided. `lanes` counts the accesses of single threads, and `packs` those of
    them that are of 16 bytes. `block_sectors` counts the different pairs of a block and a sector: a line that
    asks for nothing twice has as many as `units`, and of shared memory there are none. A bulk copy is a
    request of one lane; what it does to shared memory is not counted.
    """

    place: str
    shared: bool
    writes: bool
    requests: int
    lanes: int
    units: int
    least: int
    block_sectors: int
    packs: int

    @property
    def kind(self) -> str:
        return f"{'shared' if self.shared else 'global'} {'write' if self.writes else 'read'}"

    @property
    def pack_share(self) -> float:
        """Of the accesses, those of 16 bytes: 1 for a line that is vectorised."""
        return self.packs / max(1, self.lanes)


@dataclass(frozen=True)
class TensorTraffic:
    """All requests that read one tensor of a launch, or all that write it. Atomics count as writes.

    In sectors: `requested` of all requests, `block_sectors` once a block, `sectors` once a launch. `address`
    is that of the tensor's first element, the same in every launch that is given this tensor, and `bytes`
    what it spans.
    """

    name: str
    writes: bool
    address: int
    bytes: int
    requested: int
    block_sectors: int
    sectors: int

    @property
    def kind(self) -> str:
        return "write" if self.writes else "read"


@dataclass(frozen=True)
class Profile:
    """One launch. ``print(profile)`` shows it."""

    launch: Launch
    counters: Counters
    traffic: tuple[Traffic, ...]
    tensors: tuple[TensorTraffic, ...]

    def _sum(self, shared: bool, name: str) -> int:
        return sum(getattr(t, name) for t in self.traffic if t.shared == shared)

    @property
    def global_requests(self) -> int:
        return self._sum(False, "requests")

    @property
    def global_sectors(self) -> int:
        return self._sum(False, "units")

    @property
    def sectors_per_request(self) -> float:
        return self.global_sectors / max(1, self.global_requests)

    @property
    def l2_sectors(self) -> int:
        """The fewest that pass between L1 and L2: reads once a block, writes with every request."""
        return sum(t.requested if t.writes else t.block_sectors for t in self.tensors)

    @property
    def memory_sectors(self) -> int:
        """The fewest that pass between L2 and memory if L2 holds none of the tensors at first."""
        return sum(t.sectors for t in self.tensors)

    @property
    def shared_requests(self) -> int:
        return self._sum(True, "requests")

    @property
    def shared_wavefronts(self) -> int:
        return self._sum(True, "units")

    @property
    def bank_conflicts(self) -> int:
        """Wavefronts that shared memory would not need without bank conflicts."""
        return self.shared_wavefronts - self._sum(True, "least")

    def lines(self) -> Iterator[str]:
        counters = self.counters
        yield str(self.launch.kernel)
        yield (
            f"  global   {self.global_requests} requests, {self.global_sectors} sectors, "
            f"{self.sectors_per_request:.2f} a request"
        )
        yield f"  least    {self.l2_sectors} sectors through L2, {self.memory_sectors} of memory"
        yield (
            f"  shared   {self.shared_requests} requests, {self.shared_wavefronts} wavefronts, "
            f"{self.bank_conflicts} of them by bank conflicts"
        )
        yield (
            f"  {counters.block_barriers} block barriers, {counters.mma_instructions} mma, "
            f"{counters.wgmma_instructions} wgmma, "
            f"{counters.warp_operations} warp operations counted by lane"
        )
        yield (
            f"  {'place':<28}{'':<14}{'requests':>10}{'lanes':>7}{'units':>10}{'at best':>10}"
            f"{'by block':>10}{'16 bytes':>10}"
        )
        for t in self.traffic:
            of_global = "" if t.shared else f"{t.block_sectors:>10}{t.pack_share:>10.0%}"
            yield (
                f"  {t.place:<28}{t.kind:<14}{t.requests:>10}{t.lanes / t.requests:>7.1f}"
                f"{t.units:>10}{t.least:>10}{of_global}"
            )
        yield f"  {'tensor, in sectors':<28}{'':<14}{'requests':>10}{'by block':>10}{'of launch':>10}"
        for tensor in self.tensors:
            yield (
                f"  {tensor.name:<28}{tensor.kind:<14}{tensor.requested:>10}"
                f"{tensor.block_sectors:>10}{tensor.sectors:>10}"
            )

    def __str__(self) -> str:
        return "\n".join(self.lines())


# ---- what the runtime library has counted: the structures of kernels/emulator/profile.h --------------------


class _Traffic(ctypes.Structure):
    _fields_ = [
        ("code", ctypes.c_uint64),
        ("shared", ctypes.c_uint32),
        ("writes", ctypes.c_uint32),
        *(
            (name, ctypes.c_uint64)
            for name in ("requests", "lanes", "units", "least", "block_sectors", "packs")
        ),
    ]


class _TensorTraffic(ctypes.Structure):
    _fields_ = [
        ("tensor", ctypes.c_uint32),
        ("writes", ctypes.c_uint32),
        *((name, ctypes.c_uint64) for name in ("requested", "block_sectors", "sectors")),
    ]


def read_profile(
    runtime: ctypes.CDLL,
    plan: Launch,
    tensors: Sequence[tuple[torch.Tensor | None, int]],
    counters: Counters,
    places: Callable[[Sequence[int]], list[list[tuple[str, int]]]],
) -> Profile:
    """The profile of the launch that has just run: `plan` on `tensors`, each with the elements it spans.

    `places` gives for each code offset the (file, line) of the instruction and of the functions it was
    inlined into, innermost first: of these the first in the kernel's own file is named.
    """
    source = Path(plan.kernel.source).name
    lines = (_Traffic * runtime.emulator_line_traffic(None, 0))()
    runtime.emulator_line_traffic(lines, len(lines))
    traffic = []
    chains = places([row.code - 1 for row in lines])  # of calls, not of their return addresses
    for row, chain in zip(lines, chains, strict=True):
        file, line = next(
            (place for place in chain if place[0] == source), (chain or [("?", 0)])[0]
        )
        kind = bool(row.shared), bool(row.writes)
        counts = row.requests, row.lanes, row.units, row.least, row.block_sectors, row.packs
        traffic.append(Traffic(f"{file}:{line}", *kind, *counts))

    sides = (_TensorTraffic * runtime.emulator_tensor_traffic(None, 0))()
    runtime.emulator_tensor_traffic(sides, len(sides))
    of_tensors = []
    for side in sides:
        tensor, elements = tensors[side.tensor]
        assert tensor is not None
        of_tensors.append(
            TensorTraffic(
                name=plan.names[side.tensor],
                writes=bool(side.writes),
                address=tensor.data_ptr(),
                bytes=elements * tensor.element_size(),
                requested=side.requested,
                block_sectors=side.block_sectors,
                sectors=side.sectors,
            )
        )
    return Profile(plan, counters, tuple(traffic), tuple(of_tensors))

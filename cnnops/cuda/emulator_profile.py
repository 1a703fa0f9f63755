"""What a launch under the emulator has done: counters, and its memory traffic as a GPU would see it.

A request is one instruction of one warp. Global memory moves sectors of 32 bytes: a request of 32
neighbouring floats moves 4, of 32 floats in different rows 32. Shared memory has 32 banks of 4 bytes: a
request takes one wavefront, accesses of 8 and 16 bytes two and four, and as many more as different words of
one bank collide.

Only addresses are looked at. What caches keep, and what the memory system overlaps, is for a GPU to tell.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from cnnops.cuda.kernel import Launch


class Counters(NamedTuple):
    """What one launch did, counted over all its threads; mma instructions are counted once a warp."""

    global_bytes_read: int
    global_bytes_written: int
    shared_accesses: int
    block_barriers: int
    warp_operations: int
    switches: int
    mma_instructions: int


@dataclass(frozen=True)
class Traffic:
    """All requests from one place in a kernel file.

    `units` are sectors, or wavefronts where `shared`; `least` is how many there would be if the lanes' bytes
    were neighbours, or no banks collided. `lanes` counts the accesses of single threads.
    """

    place: str
    shared: bool
    writes: bool
    requests: int
    lanes: int
    units: int
    least: int

    @property
    def kind(self) -> str:
        return f"{'shared' if self.shared else 'global'} {'write' if self.writes else 'read'}"


@dataclass(frozen=True)
class Profile:
    """One launch. ``print(profile)`` shows it."""

    launch: Launch
    counters: Counters
    traffic: tuple[Traffic, ...]

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
        yield (
            f"  shared   {self.shared_requests} requests, {self.shared_wavefronts} wavefronts, "
            f"{self.bank_conflicts} of them by bank conflicts"
        )
        yield (
            f"  {counters.block_barriers} block barriers, {counters.mma_instructions} mma, "
            f"{counters.warp_operations} warp operations counted by lane"
        )
        yield f"  {'place':<28}{'':<14}{'requests':>10}{'lanes':>7}{'units':>10}{'at best':>10}"
        for t in self.traffic:
            yield (
                f"  {t.place:<28}{t.kind:<14}{t.requests:>10}{t.lanes / t.requests:>7.1f}"
                f"{t.units:>10}{t.least:>10}"
            )

    def __str__(self) -> str:
        return "\n".join(self.lines())

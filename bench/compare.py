"""Two runs compared, time by time: what became slower or faster by more than the noise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from bench.runs import OURS, Run, Timing, duration, geomean, print_table, stamp, terminal

if TYPE_CHECKING:
    from rich.console import Console

NOISE = 0.03
"""Two medians that differ by no more than this share are taken for equal, however narrow their intervals."""


@dataclass(frozen=True)
class Change:
    """One row, rival and variant in two runs."""

    id: str
    rival: str
    variant: str
    before: Timing
    after: Timing

    @property
    def ratio(self) -> float:
        """Time after over time before: above 1, it became slower."""
        return self.after.median_s / self.before.median_s

    @property
    def beyond_noise(self) -> bool:
        """The samples' 10-to-90 % intervals lie apart, and the medians by more than `NOISE`.

        One sample, as a dry run takes, has no interval and shows no change.
        """
        if min(self.before.samples, self.after.samples) < 2:
            return False
        apart = self.before.p90_s < self.after.p10_s or self.after.p90_s < self.before.p10_s
        return apart and abs(self.ratio - 1) > NOISE

    @property
    def regression(self) -> bool:
        return self.beyond_noise and self.ratio > 1

    @property
    def improvement(self) -> bool:
        return self.beyond_noise and self.ratio < 1


def _timings(run: Run) -> dict[tuple[str, str, str], Timing]:
    return {
        (m.id, rival, variant): timing
        for m in run.measured
        for rival, variants in m.times.items()
        for variant, timing in variants.items()
    }


def compare(a: Run, b: Run, force: bool = False) -> list[Change]:
    """How every time that both runs have changed from `a` to `b`, the largest slow-down first.

    Raises ValueError where they come from different devices, unless `force`.
    """
    devices = a.machine["device"], b.machine["device"]
    if devices[0] != devices[1] and not force:
        raise ValueError(f"expected two runs on one device, got {devices[0]} and {devices[1]}")
    before, after = _timings(a), _timings(b)
    for row in resized(a, b):
        before = {key: timing for key, timing in before.items() if key[0] != row}
    changes = [Change(*key, before[key], after[key]) for key in before if key in after]
    return sorted(changes, key=lambda change: -change.ratio)


def resized(a: Run, b: Run) -> list[str]:
    """Rows that both runs have, but not of the same sizes: a CPU's are scaled down to what it can do."""
    sizes = {row.id: row.problem for row in a.rows}
    return [row.id for row in b.rows if sizes.get(row.id, row.problem) != row.problem]


def only_in(a: Run, b: Run) -> list[str]:
    """What `a` has a time for and `b` has not: "id: rival, variant"."""
    missing = _timings(a).keys() - _timings(b).keys()
    return [f"{row}: {rival}, {variant}" for row, rival, variant in sorted(missing)]


def print_comparison(a: Run, b: Run, force: bool = False, out: Console | None = None) -> bool:
    """Print what changed from `a` to `b`; True where cnnops became slower.

    Rivals are the control: no change of cnnops makes them slower, so where they moved, the machine did, or
    PyTorch. They are listed, but are no regressions.
    """
    changes, out = compare(a, b, force), out or terminal()
    out.print(f"before  {stamp(a)}\nafter   {stamp(b)}", style="bold")
    for key in sorted(a.settings.keys() | b.settings.keys()):
        if a.settings.get(key) != b.settings.get(key):
            out.print(f"{key}: {a.settings.get(key)} before, {b.settings.get(key)} after")
    out.print()
    ours = [change for change in changes if change.rival in OURS]
    slower = [change for change in ours if change.regression]
    faster = [change for change in reversed(ours) if change.improvement]
    others = [change for change in changes if change.rival not in OURS and change.beyond_noise]
    for title, listed in (
        ("slower", slower),
        ("faster", faster),
        ("changed without our doing: the machine, or PyTorch", others),
    ):
        if listed:
            head = ["row", "rival", "variant", "before", "after", "after / before"]
            body = [
                [
                    c.id, c.rival, c.variant, duration(c.before.median_s), duration(c.after.median_s),
                    f"{c.ratio:.2f}",
                ]
                for c in listed
            ]  # fmt: skip
            print_table(out, f"{title} ({len(listed)})", [head, *body])
    for rival in dict.fromkeys(change.rival for change in changes):
        mean = geomean(change.ratio for change in changes if change.rival == rival)
        out.print(f"{rival}: after / before {mean}")
    for lines, which in ((only_in(a, b), "before"), (only_in(b, a), "after")):
        if lines:
            out.print(f"\nonly {which} ({len(lines)})")
            for line in lines:
                out.print(f"  {line}")
    if rows := resized(a, b):
        out.print(f"\nnot compared, of other sizes in the two runs ({len(rows)})")
        for row in rows:
            out.print(f"  {row}")
    if not changes:
        out.print("the two runs have no time in common")
    out.print(
        f"\n{len(slower)} slower, {len(faster)} faster, {len(ours) - len(slower) - len(faster)} within noise"
    )
    return bool(slower)

"""What the memory-bound kernels move, counted by the emulator, against the least that they could.

Rows are problems of `bench/traffic.py`: layers of `bench/suites.py` and their like, scaled down to sizes that
take the same variants of the kernels. The least traffic of a direction is every tensor read or written once;
of each direction are held

    memory     The different sectors of 32 bytes that each launch reads and writes, of all launches: at most
               1.15 times the least. A tensor that is read in two passes counts twice, though L2 may have it.
    l2         Sectors that must pass between L1 and L2: at most 1.15 times. A block reads once what windows
               share; what two blocks read passes twice, and so does what two requests write.
    l1         Sectors that requests touch: at most 9.8 times. So much faster than memory L1 is, by 132 x 128
               bytes a cycle.
    coalesced  The same, by the fewest sectors that hold as many bytes: at most 1.15 times.
    conflicts  Cycles of shared memory lost to bank conflicts: at most 5 % of those that memory takes.
    shared     All cycles of shared memory: at most as many as memory takes.

A bound that is wider gives the reason, and may not be a tenth wider than what is counted: a kernel that has
become better takes its excuse along. ``python -m bench.traffic maxpool`` prints the numbers, and
bench/notes.md has the times on a GPU that they predict.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, fields

import pytest
import torch
from cases import needs_emulator

from bench.traffic import (
    FORMS,
    Form,
    Ratios,
    problem_named,
    profiles,
    ratios,
    scaled,
)
from cnnops.cuda.emulate import Profile, Traffic

pytestmark = needs_emulator

NCHW, NHWC = "contiguous", "channels_last"
FP32_NCHW, BF16_NCHW = Form(NCHW, torch.float32), Form(NCHW, torch.bfloat16)
TIMED = FP32_NCHW, Form(NHWC, torch.bfloat16)


@dataclass(frozen=True)
class Bound:
    """The most that a row may have of each of its `Ratios`, and why, if not the usual."""

    why: str = ""
    memory: float = 1.15
    l2: float = 1.15
    l1: float = 9.8
    coalesced: float = 1.15
    conflicts: float = 0.05
    shared: float = 1.0

    def wider(self) -> dict[str, float]:
        """What is not as usual."""
        names = [f.name for f in fields(Bound) if f.name != "why"]
        return {n: getattr(self, n) for n in names if getattr(self, n) != getattr(USUAL, n)}


USUAL = Bound()


@dataclass(frozen=True)
class Row:
    """A problem, counted in `forms`. `bounds`, if not the usual: of a direction in a layout, of a form, or of
    all forms of a layout."""

    problem: str
    bounds: dict[tuple[str, str] | Form | str, Bound] = field(default_factory=dict)
    forms: tuple[Form, ...] = FORMS

    def bound(self, form: Form, direction: str) -> Bound:
        keys = (form.layout, direction), form, form.layout
        return next((self.bounds[key] for key in keys if key in self.bounds), USUAL)


# What is asked for again lies in L1 or L2: these cost requests, and not yet memory's time.
STRIDED = Bound(
    "packs of 16 bytes lie 32 apart: two requests ask for the halves of a sector", coalesced=1.95
)
NARROW = Bound("8 lanes share a window: 16 bytes of bf16 a request and plane", coalesced=2.9)
FAR_PACKS = Bound("neighbouring lanes' packs are 11 columns apart", coalesced=2.1)
FAR_HALVES = Bound("the same, where packs are half as wide as sectors", coalesced=4.1)
STRIDED_3D = Bound(
    "as STRIDED; and blocks of neighbouring planes read those that their windows share",
    l2=1.4,
    coalesced=2,
)
DILATED_3D = Bound(
    "as STRIDED_3D, and results are staged 2 bytes a lane", l2=1.3, coalesced=2.05, conflicts=0.07
)
SHARED_ROWS = Bound("blocks above and below read the rows that their windows share", l2=1.25)
STAGED = Bound("results of bf16 are staged 2 bytes a lane, two lanes to a bank", conflicts=0.11)
WINDOW_ROWS = Bound("a block is part of a row of y: others read rows of its windows, too", l2=1.4)
WINDOW_ROWS_3 = Bound("as WINDOW_ROWS, with windows of stride 1", l2=1.6)
SPREAD = Bound("each place of grad_x reads the one value of grad_y, which 7 blocks share", l2=2.05)
ODD_PLANES = Bound(
    "planes of 49 values: most runs of a warp begin within a sector, which is another block's as well",
    l2=1.6,
    coalesced=1.75,
)
PADDED_ROWS = Bound(
    "rows of padded begin off alignment: blocks share sectors, and each row is a run of its own",
    l2=1.5,
    coalesced=2.1,
)
# These take more of memory's time.
TWO_PASSES = Bound(
    "two passes: what shares a statistic is more than a block or a cluster holds",
    memory=1.75,
    l2=1.8,
)
GATHERED = Bound(
    "planes of y are done in parts, each from all indices; and maxima lie on two rows of y, at random",
    memory=1.5,
    l2=1.65,
    coalesced=1.75,
    conflicts=0.17,
)
# Depthwise convolution, whose tiles read what lies beside them, too.
OF_PACKS = Bound("of the packs beside a tile, a column or two is read", coalesced=1.4)
ROWS_OF_14 = Bound(
    "a warp's rows of 56 bytes begin within sectors, and blocks within a plane",
    l2=1.35,
    coalesced=2.1,
)
ROWS_OF_7 = Bound("rows of 28 bytes, in planes of 196: as ROWS_OF_14", l2=1.75, coalesced=3.1)
ODD_ROWS = Bound("rows of y have an odd length: one value a store", l2=1.85, coalesced=1.55)
ODD_SOURCE = Bound("the same rows, read: one value a load, lanes 8 apart", coalesced=5.1)
PARTIAL_3 = Bound("partial gradients: 9 sums of a block for its 16 tiles of 7x7", l2=1.25)
PARTIAL_5 = Bound("partial gradients: 25 sums", l2=1.3)
PARTIAL_7 = Bound("partial gradients: 49 sums of a block for its 4 tiles of 7 columns", l2=1.4)
PARTIAL_7_SMALL = Bound(
    "the same, where a tile has 4 of a plane's 7 rows: half as much as x and y", memory=1.85, l2=2.1
)
STAGED_49 = Bound("a block stages 49 weights a channel for 4 such tiles", l2=1.3)

ROWS = (
    Row("resnet50/maxpool", {NCHW: STRIDED, NHWC: WINDOW_ROWS}),
    Row("resnet50/avgpool", {NCHW: NARROW, NHWC: SPREAD}),
    Row("kernelbench/42_max_pool2d", {NCHW: SHARED_ROWS}, FORMS[:2]),
    Row("kernelbench/43_max_pool3d", {NCHW: DILATED_3D}, FORMS[:2]),
    Row("kernelbench/44_avg_pool1d", {}, FORMS[:2]),
    Row("kernelbench/45_avg_pool2d", {FP32_NCHW: FAR_PACKS, BF16_NCHW: FAR_HALVES}, FORMS[:2]),
    Row("kernelbench/46_avg_pool3d", {NCHW: STRIDED_3D}, FORMS[:2]),
    Row("sweep_pool/avg_overlapping_K3", {BF16_NCHW: STAGED, NHWC: WINDOW_ROWS_3}),
    Row("resnet50/bn1", {FP32_NCHW: TWO_PASSES}, FORMS[:2]),
    Row("resnet50/layer1.0.bn3", {}, FORMS[:2]),
    Row("resnet50/layer2.0.bn2", {NHWC: TWO_PASSES}),
    Row("resnet50/layer4.0.bn3", {NCHW: ODD_PLANES}),
    Row("kernelbench/33_batch_norm", {NCHW: TWO_PASSES}, FORMS[:2]),
    Row("sweep_norm/eval"),
    Row("sweep_norm/eval_add_relu"),
    Row("batch_norm/2048@7", {NCHW: ODD_PLANES}),
    Row("group_norm/256@28"),
    Row("group_norm/64@112", {NCHW: TWO_PASSES, NHWC: TWO_PASSES}),
    Row("instance_norm/64@56", {}, FORMS[:2]),
    Row("layer_norm/96@56"),
    Row("unpool/64@56", {NCHW: GATHERED, NHWC: GATHERED}),
    Row("fold/64@56", {NCHW: PADDED_ROWS}),
    Row("mobilenetv2/stage2.0.depthwise", {NCHW: STRIDED, (NCHW, "dgrad"): USUAL}, TIMED),
    Row("mobilenetv2/stage2.1.depthwise", {BF16_NCHW: OF_PACKS}),
    Row("mobilenetv2/stage5.1.depthwise", {NCHW: ROWS_OF_14}, TIMED),
    Row("mobilenetv2/stage6.1.depthwise", {NCHW: ROWS_OF_7, (NHWC, "wgrad"): PARTIAL_3}, TIMED),
    Row("efficientnet_b0/stage3.1.depthwise", {NCHW: OF_PACKS, (NHWC, "wgrad"): PARTIAL_5}, TIMED),
    Row("convnext_t/stage1.0.depthwise", {(NHWC, "wgrad"): PARTIAL_7}, TIMED),
    Row(
        "convnext_t/stage4.0.depthwise",
        {NHWC: STAGED_49, (NHWC, "wgrad"): PARTIAL_7_SMALL},
        TIMED[1:],
    ),
    Row("reports/causal_1d", {NCHW: ODD_ROWS, (NCHW, "dgrad"): ODD_SOURCE}, FORMS[1:2]),
    Row("kernelbench/82_conv2d", {}, FORMS[:1]),
)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.problem)
def test_traffic(row: Row) -> None:
    counted: dict[Bound, list[Ratios]] = {}
    for form in row.forms:
        for direction, step in scaled(problem_named(row.problem), form).items():
            bound = row.bound(form, direction)
            launches = profiles(step)
            found = ratios(step, launches)
            counted.setdefault(bound, []).append(found)
            for name, ratio in found._asdict().items():
                most = getattr(bound, name)
                assert ratio <= most, (
                    f"{direction}, {form}: {name} is {ratio:.2f}, at most {most} expected. {bound.why}; "
                    f"{worst(launches, name)}"
                )
    for bound, several in counted.items():
        for name, most in bound.wider().items():
            ratio = max(getattr(found, name) for found in several)
            assert ratio > most / 1.1, (
                f"{name} is {ratio:.2f} at most: {most} is too wide. {bound.why}"
            )


def test_wider_bounds_have_reasons() -> None:
    for row in ROWS:
        for bound in row.bounds.values():
            assert bound == USUAL or (bound.why and bound.wider()), row.problem


def worst(launches: Iterable[Profile], name: str) -> str:
    """Where to look: the line of a kernel that moves most of what `name` counts too much."""
    shared = name in ("conflicts", "shared")
    lines = [t for launch in launches for t in launch.traffic if t.shared == shared]
    excess = {"coalesced": _beyond, "conflicts": _beyond, "l2": _through_l2}.get(name, _touched)
    t = max(lines, key=excess)
    return f"{t.place} ({t.kind}): {t.units} in {t.requests} requests, {t.least} at best"


def _beyond(t: Traffic) -> int:
    return t.units - t.least


def _through_l2(t: Traffic) -> int:
    return t.units if t.writes else t.block_sectors


def _touched(t: Traffic) -> int:
    return t.units

"""What a CPU's run says of the parts of networks: convolutions by direction, pooling, norms, whole steps.

A CPU is measured in both layouts, and nobody is held to one that suits the other: the speed-up of a problem
is torch's time in its faster layout over that of cnnops in its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from bench.plots import sizes
from bench.runs import (
    CNNOPS,
    FUSED,
    ONE_THREAD,
    Measured,
    MeasuredModel,
    MeasuredRow,
    Run,
    filled,
    geomean,
    groups,
)

LAYOUTS = ("contiguous", "channels_last")


@dataclass(frozen=True)
class Part:
    """Work of one kind: rows of `suites`, or networks of these names, in some directions, or phases."""

    name: str
    suites: tuple[str, ...]
    kind: str
    """That of `kind_of`, or "network"."""
    directions: tuple[str, ...]
    ours: str = CNNOPS
    """Whose times are held against torch's."""


_NETWORKS = (
    "lenet5", "lenet5_original", "alexnet", "vgg16", "resnet50", "mobilenetv2", "convnext_t"
)  # fmt: skip
_DEPTHWISE = ("mobilenetv2", "convnext_t")
_FUSED = (
    "lenet5", "alexnet", "vgg16", "resnet18", "resnet50", "mobilenetv2", "efficientnet-b0"
)  # fmt: skip
PARTS = (
    Part("ResNet-50: convolutions, fprop", ("resnet50",), "convolution", ("fprop",)),
    Part("ResNet-50: convolutions, dgrad", ("resnet50",), "convolution", ("dgrad",)),
    Part("ResNet-50: convolutions, wgrad", ("resnet50",), "convolution", ("wgrad",)),
    Part("VGG-16, AlexNet: convolutions", ("vgg16", "alexnet"), "convolution", ("fprop", "dgrad", "wgrad")),
    Part("MobileNetV2, ConvNeXt: depthwise, forward", _DEPTHWISE, "depthwise", ("fprop",)),
    Part("MobileNetV2, ConvNeXt: depthwise, backward", _DEPTHWISE, "depthwise", ("dgrad", "wgrad")),
    Part("pooling, forward", _NETWORKS, "pooling", ("fwd",)),
    Part("pooling, backward", _NETWORKS, "pooling", ("bwd",)),
    Part("batch norm with activation, forward", _NETWORKS, "norm", ("fwd",)),
    Part("batch norm with activation, backward", _NETWORKS, "norm", ("bwd",)),
    Part("group norm, layer norm: forward", ("group_norms",), "group_norm", ("fwd",)),
    Part("group norm, layer norm: backward", ("group_norms",), "group_norm", ("bwd",)),
    Part("3x3 convolutions of 1 MFLOP to 10 GFLOP", ("scaling",), "convolution", ("fprop", "dgrad", "wgrad")),
    Part("LeNet-5, ResNet-18, MobileNetV2: training step", ("lenet5", "resnet18", "mobilenetv2"), "network",
         ("train",)),
    Part("ResNet-18, MobileNetV2: training step, norms fused", ("resnet18", "mobilenetv2"), "network",
         ("train",), FUSED),
    Part("networks: inference, fused", _FUSED, "network", ("infer",), FUSED),
)  # fmt: skip
"""The lines of the table, in order."""

CAPTION = (
    "in float32, cnnops and torch each in its faster layout, problem by problem; then both in one"
)


def kind_of(op: str, problem: str) -> str:
    """What a row computes, as `Part` names it: a depthwise convolution has as many groups as channels."""
    if op == "conv2d":
        size = sizes(problem)
        return "depthwise" if 1 < size["C"] == size.get("groups") else "convolution"
    named = {"batch_norm_act": "norm", "layer_norm": "group_norm"}
    return named.get(op, "pooling" if "pool" in op else op)


def parts_of(suite: str, kind: str, direction: str) -> list[Part]:
    """The parts that a row, or a network in one phase, belongs to."""
    return [p for p in PARTS if suite in p.suites and kind == p.kind and direction in p.directions]


def _parts(measured: Measured) -> list[Part]:
    """Those that it belongs to; of fused networks' only where such were asked for."""
    if isinstance(measured, MeasuredRow):
        kind = kind_of(measured.op, measured.problem)
        found = parts_of(measured.suite, kind, measured.direction)
    else:
        assert isinstance(measured, MeasuredModel)
        found = parts_of(measured.model, "network", measured.phase)
    asked = (CNNOPS, *measured.times, *measured.absent)
    return [part for part in found if part.ours in asked]


def least(rows: Sequence[Measured], rival: str | None = None) -> float | None:
    """The least time of a problem, whose rows differ in layout: that of `rival`, or of the best one."""
    times = [row.seconds(rival or row.best_rival) for row in rows]
    return min((t for t in times if t is not None), default=None)


def speed_up(rows: Sequence[Measured], ours: str = CNNOPS) -> float | None:
    """Of one problem, each side in its faster layout; None where either has no time."""
    mine, theirs = least(rows, ours), least(rows)
    return theirs / mine if mine and theirs else None


def _by_part(run: Run) -> dict[Part, list[Measured]]:
    """The float32 rows and networks of a CPU's run by the parts that they belong to, in the table's order."""
    found: dict[Part, list[Measured]] = {}
    for measured in run.measured if run.machine["kind"] == "cpu" else ():
        for part in _parts(measured) if measured.dtype == "float32" else ():
            found.setdefault(part, []).append(measured)
    return {part: found[part] for part in sorted(found, key=PARTS.index)}


def _problems(part: Part, rows: Sequence[Measured]) -> dict[tuple[str, ...], float | None]:
    return {p.key: speed_up(p.rows, part.ours) for p in groups(rows, "suite", "name")}


def ratios_by_part(run: Run) -> dict[str, list[float | None]]:
    """The speed-up of every problem of a CPU's parts; {} where `run` tells of none."""
    return {part.name: list(_problems(part, rows).values()) for part, rows in _by_part(run).items()}


def by_part(run: Run) -> list[list[str]]:
    """Speed-ups of a CPU's parts as cells, the first line the head; [] where `run` tells of none."""
    lines = []
    for part, rows in _by_part(run).items():
        problems = _problems(part, rows)
        compared = {key: ratio for key, ratio in problems.items() if ratio is not None}
        layouts = {group.key: group.against_best(part.ours) for group in groups(rows, "layout")}
        means = geomean(problems.values()), *(layouts.get((layout,)) for layout in LAYOUTS)
        last = "–"
        if compared:
            key = min(compared, key=compared.__getitem__)
            several = len({suite for suite, _ in problems}) > 1
            last = f"{'/'.join(key) if several else key[1]}: {compared[key]:.2f}"
        lines.append([part.name, str(len(problems)), *(str(mean or "–") for mean in means), last])
    return filled([["part", "problems", "speed-up", *LAYOUTS, "worst"], *lines]) if lines else []


def by_size(run: Run) -> list[list[str]]:
    """How fast small and large convolutions are on a CPU, and what threads bring, in cells as `by_part`.

    GFLOP/s are those of either side's faster layout. Threads: the time on one over that on all, in the faster
    layout of cnnops.
    """
    rows = [row for row in run.rows if row.suite == "scaling"]
    if run.machine["kind"] != "cpu" or not rows:
        return []
    cases = {row.case: row.flops for row in sorted(rows, key=lambda row: row.flops)}
    lines = []
    for (direction,), members in ((g.key, g.rows) for g in groups(rows, "direction")):
        rates: list[list[str]] = [[], []]
        threads = []
        for case, flops in cases.items():
            problem = [row for row in members if row.case == case]
            for line, seconds in zip(rates, (least(problem, CNNOPS), least(problem)), strict=True):
                line.append(f"{flops / seconds / 1e9:.3g}" if seconds else "–")
            faster = min(problem, key=lambda row: row.seconds(CNNOPS) or math.inf, default=None)
            ratio = faster.ratio(ONE_THREAD) if faster else None
            threads.append(f"{ratio:.2f}" if ratio else "–")
        lines += [
            [f"{direction}: cnnops, GFLOP/s", *rates[0]],
            [f"{direction}: torch, GFLOP/s", *rates[1]],
            [f"{direction}: cnnops, {run.machine['threads']} threads over one", *threads],
        ]
    head = ["3x3 convolution", *(case.replace("_", " ") for case in cases)]
    return [head, *(line for line in lines if set(line[1:]) != {"–"})]

"""Pooling and normalisation on a GPU."""

from __future__ import annotations

from canvas import BLUE, EMPTY, GREEN, GREY, ORANGE, RED, VIOLET, Canvas


def pool() -> Canvas:
    c = Canvas(760, 300, "How windows of a tile share their work")
    side = 30
    c.text(20, 24, "3x3, stride 1: a tile of x", bold=True)
    for row in range(4):
        for column in range(6):
            c.box(20 + column * side, 40 + row * side, side, side, BLUE, edge=GREY)
    c.box(20, 40, 3 * side, 3 * side, EMPTY, opacity=0, thick=2)
    c.box(20 + side, 40 + side, 3 * side, 3 * side, EMPTY, opacity=0, thick=2, dashed=True)
    c.text(20, 182, "(4 + 2) x (2 + 2) elements are read", size=11)
    c.text(20, 197, "for 8 outputs: 3 each, not 9", size=11)
    c.arrow(210, 100, 248, 100)
    c.text(260, 24, "1. joined down columns", bold=True)
    for row in range(2):
        for column in range(6):
            c.box(260 + column * side, 60 + row * 50, side, 3 * 14, VIOLET, edge=GREY)
    c.text(260, 182, "rows 1 and 2 are in both", size=11)
    c.text(260, 197, "windows: joined once", size=11)
    c.arrow(450, 100, 488, 100)
    c.text(500, 24, "2. joined along rows: y", bold=True)
    for row in range(2):
        for column in range(4):
            c.box(500 + column * 44, 60 + row * 50, 40, 42, ORANGE, edge=GREY)
    c.text(500, 182, "a window costs some R + S joins,", size=11)
    c.text(500, 197, "not R·S; maxima keep their place", size=11)
    c.text(
        20,
        236,
        "backward, gathered: a thread owns places of grad_x and asks the windows that cover them",
        bold=True,
    )
    for i in range(10):
        c.box(20 + i * 34, 250, 30, 24, ORANGE if 4 <= i <= 6 else EMPTY, edge=GREY)
    c.text(380, 260, "grad_x[place] = Σ grad_y of those windows whose", size=11)
    c.text(380, 276, "offset names the place: written once, no atomics", size=11)
    return c


def unpool() -> Canvas:
    c = Canvas(760, 230, "Slots of max unpooling")
    c.text(20, 24, "values and their places", bold=True)
    for i, (value, place) in enumerate(((0.7, 5), (0.2, 1), (0.9, 5), (0.4, 12))):
        y = 40 + i * 34
        c.box(20, y, 60, 26, BLUE, f"{value}")
        c.box(84, y, 80, 26, GREEN, f"place {place}")
        c.text(170, y + 17, f"m = {i}", size=11)
    c.arrow(214, 100, 258, 100)
    c.text(270, 24, "slots: the largest m + 1 that asks", bold=True)
    asked = {1: "2", 5: "3", 12: "4"}
    for i in range(16):
        c.box(
            270 + (i % 8) * 34,
            44 + (i // 8) * 40,
            34,
            30,
            VIOLET if i in asked else EMPTY,
            asked.get(i, "0"),
            edge=GREY,
        )
    c.text(270, 142, "in shared memory, by an integer maximum:", size=11)
    c.text(270, 157, "of m = 0 and m = 2 the later one stays", size=11)
    c.arrow(548, 100, 582, 100)
    c.text(590, 24, "y, written once", bold=True)
    values = {1: "0.2", 5: "0.9", 12: "0.4"}
    for i in range(16):
        c.box(
            590 + (i % 4) * 36,
            44 + (i // 4) * 30,
            36,
            30,
            ORANGE if i in values else EMPTY,
            values.get(i, "0"),
            edge=GREY,
            size=11,
        )
    c.text(
        20,
        204,
        "Planes too large for shared memory are done in parts: warps first note the range of places that",
        size=11,
    )
    c.text(
        20,
        220,
        "each segment of indices has; a block reads the segments whose range meets its part.",
        size=11,
    )
    return c


def batch_norm() -> Canvas:
    c = Canvas(760, 330, "Forms of batch norm and what they move")
    c.text(20, 24, "split: x is read twice, 3X in all", bold=True)
    c.box(20, 40, 110, 40, BLUE, "x in memory")
    c.box(180, 40, 120, 40, VIOLET, "train_stats|(mean, M2) a part", size=11)
    c.box(350, 40, 130, 40, VIOLET, "train_apply|merges the parts", size=11)
    c.box(530, 40, 110, 40, ORANGE, "y in memory")
    c.arrow(130, 60, 178, 60)
    c.arrow(300, 60, 348, 60)
    c.arrow(480, 60, 528, 60)
    c.path([(75, 80), (75, 100), (415, 100), (415, 82)])
    c.text(240, 114, "x again, backwards: its end is still in L2", middle=True, size=11, color=GREY)

    c.text(20, 146, "held: a slab stays in shared memory, 2X in all: the floor", bold=True)
    c.box(20, 162, 110, 40, BLUE, "x in memory")
    c.box(180, 156, 300, 56, EMPTY, dashed=True)
    c.box(190, 164, 110, 40, GREEN, "slab of a channel|up to 220 KB", size=11)
    c.box(350, 164, 120, 40, VIOLET, "sums, then|normalise", size=11)
    c.box(530, 162, 110, 40, ORANGE, "y in memory")
    c.arrow(130, 184, 188, 184)
    c.text(158, 178, "cp.async", middle=True, size=9)
    c.line(300, 176, 348, 176, arrow=True)
    c.line(300, 194, 348, 194, arrow=True)
    c.text(324, 170, "sums", middle=True, size=9)
    c.text(324, 206, "again", middle=True, size=9)
    c.arrow(470, 184, 528, 184)
    c.text(650, 184, "one block a", size=11, color=GREY)
    c.text(650, 198, "channel", size=11, color=GREY)

    c.text(
        20,
        240,
        "held by a cluster (sm_90): blocks share the slab and read each other's sums",
        bold=True,
    )
    for b in range(4):
        x = 20 + b * 150
        c.box(x, 256, 130, 44, EMPTY, dashed=True)
        c.box(x + 8, 264, 56, 28, GREEN, f"sites {b}", size=11)
        c.box(x + 70, 264, 52, 28, VIOLET, "sums", size=11)
    c.line(104, 304, 570, 304)
    for b in range(4):
        c.line(116 + b * 150, 292, 116 + b * 150, 304)
    c.text(
        340,
        318,
        "distributed shared memory, merged in the order of ranks: the same bits in every block",
        middle=True,
        size=11,
    )
    c.box(626, 256, 116, 44, RED, "too large for any|cluster: split", size=11)
    return c


def group_norm() -> Canvas:
    c = Canvas(760, 260, "One picture for group, instance and layer norm")
    c.text(20, 24, "lines by sites, in packs of V elements", bold=True)
    titles = [("group norm, NCHW", "line: a channel of an image|pack: V places of it", True),
              ("group norm, channels-last", "line: a channel of an image|pack: V channels at a place", False),
              ("layer norm", "line: a row|pack: V values of it", True)]  # fmt: skip
    for i, (title, what, along) in enumerate(titles):
        x = 20 + i * 250
        c.text(x, 50, title, size=12, bold=True)
        for row in range(6):
            for column in range(10):
                slab = row < 3 if i < 2 else row == 1
                c.box(x + column * 20, 60 + row * 18, 20, 18, BLUE if slab else EMPTY, edge=GREY)
        if along:
            c.box(x + 4 * 20, 60 + 18, 80, 18, ORANGE, opacity=0.8, thick=2)
        else:
            c.box(x + 4 * 20, 60, 20, 72, ORANGE, opacity=0.8, thick=2)
        for n, line in enumerate(what.split("|")):
            c.text(x, 190 + n * 15, line, size=11)
    c.text(
        20, 234, "blue: a slab, whose mean and variance are taken (3 channels, or one row)", size=11
    )
    c.text(740, 234, "orange: a pack, at most 16 bytes", size=11, end=True)
    c.text(
        20,
        250,
        "A slab that fits into a block (registers or 94 KB of shared memory) is read once; others twice.",
        size=11,
    )
    return c


def drawings() -> dict[str, Canvas]:
    return {make.__name__: make() for make in (pool, unpool, batch_norm, group_norm)}

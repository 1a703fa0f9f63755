"""Convolution on a GPU: the matrix product, its tiles and rings, and the kernels that are none."""

from __future__ import annotations

from canvas import BLUE, EMPTY, GREEN, GREY, ORANGE, RED, VIOLET, Canvas


def product() -> Canvas:
    """M x N x K, and where an element of the gathered operand comes from."""
    c = Canvas(760, 380, "Convolution as a matrix product that is read in place")
    c.text(20, 24, "x: one image, 3x3 windows", bold=True)
    side = 22
    for row in range(8):
        for column in range(8):
            halo = row in (0, 7) or column in (0, 7)
            c.box(20 + column * side, 40 + row * side, side, side, EMPTY if halo else BLUE, edge=GREY,
                  dashed=halo)  # fmt: skip
    c.box(20 + 2 * side, 40 + 1 * side, 3 * side, 3 * side, RED, opacity=0.6, thick=2)
    c.text(20, 234, "dashed: padding, which is read as", size=11, color=GREY)
    c.text(20, 248, "zero or as the padding mode says", size=11, color=GREY)

    mx, my, mw, mh = 320, 150, 190, 200
    c.box(mx, my, mw, mh, BLUE)
    c.box(mx, my + 64, mw, 14, RED, opacity=0.6, thick=2)
    c.text(mx + mw / 2, my + 40, "gathered", middle=True)
    c.text(mx + mw / 2, my + 128, "M rows: places n, p, q", middle=True, size=11)
    c.text(mx + mw / 2, my + 146, "K steps: entries c, r, s", middle=True, size=11)
    c.text(mx + mw / 2, my + 168, "never stored", middle=True, size=11, color=GREY)
    c.path([(20 + 5 * side, 84), (270, 84), (270, my + 71), (mx - 2, my + 71)])
    c.text(282, 70, "a row is the window", size=11)
    c.text(282, 84, "of one place", size=11)

    nx, nw = 540, 110
    c.box(nx, 30, nw, 100, GREEN)
    c.text(660, 70, "plain: w", size=11)
    c.text(660, 85, "K steps", size=11)
    c.text(660, 100, "N columns: k", size=11)
    c.box(nx, my, nw, mh, ORANGE)
    c.text(nx + nw / 2, my + 150, "result: y", middle=True)
    c.box(nx + 30, my + 50, 50, 60, EMPTY, "BLOCK_M|x|BLOCK_N", size=9, thick=2)
    c.line(nx + 30, 30, nx + 30, 130, dashed=True)
    c.line(nx + 80, 30, nx + 80, 130, dashed=True)
    c.line(mx, my + 50, mx + mw, my + 50, dashed=True)
    c.line(mx, my + 110, mx + mw, my + 110, dashed=True)
    c.box(mx + 66, my + 50, 26, 60, EMPTY, thick=2, opacity=0.4)
    c.box(nx + 30, 70, 50, 22, EMPTY, thick=2, opacity=0.4)
    c.text(mx + 100, my + 104, "BLOCK_K", size=9)
    c.text(660, my + 70, "a block's tile", size=11)
    c.text(660, my + 85, "walks along K", size=11)
    c.text(20, 300, "address(place, entry) =", code=True, size=11)
    c.text(20, 316, "  source(place) + source(entry)", code=True, size=11)
    c.text(20, 336, "only M + K numbers are decoded,", size=11)
    c.text(20, 350, "not M x K", size=11)
    return c


def phases() -> Canvas:
    c = Canvas(760, 210, "Phases of a strided input gradient")
    c.text(
        20,
        24,
        "dgrad, stride 2, 3 taps, along one axis: grad_x[h] gets w[r] · grad_y[(h + pad - r) / 2]",
        bold=True,
    )
    side = 44
    for h in range(12):
        fill = BLUE if h % 2 else ORANGE
        c.box(110 + h * side, 120, side - 4, 30, fill, f"h {h}", size=11)
    for p in range(6):
        x = 110 + (2 * p) * side
        c.box(x + 10, 46, side * 1.4, 30, GREEN, f"grad_y {p}", size=11)
        middle = x + 10 + side * 0.7
        for h in (2 * p - 1, 2 * p, 2 * p + 1):  # r = 0, 1, 2
            if 0 <= h < 12:
                c.arrow(middle, 76, 110 + h * side + side / 2 - 2, 118, color=GREY)
    c.text(100, 66, "places p", end=True)
    c.text(100, 140, "places h", end=True)
    c.text(20, 180, "orange: h + pad is odd, one tap (r = 1)", size=11)
    c.text(300, 180, "blue: h + pad is even, two taps (r = 0, 2)", size=11)
    c.text(
        20,
        198,
        "Each phase is a correlation of stride 1 with its taps: no product with an inserted zero",
        size=11,
    )
    return c


def direct() -> Canvas:
    c = Canvas(760, 270, "The tile of conv_direct")
    c.text(20, 24, "shared memory, two buffers", bold=True)
    for b in range(2):
        y = 42 + b * 100
        c.box(20, y, 150, 40, BLUE, "gathered|BLOCK_M x BLOCK_K", size=11)
        c.box(20, y + 46, 150, 30, GREEN, "plain BLOCK_K x BLOCK_N", size=11)
        c.text(180, y + 44, "multiplied" if b == 0 else "filled from registers", size=11)
    c.text(
        20, 252, "the step after next is decoded meanwhile; one barrier a step", size=11, color=GREY
    )

    c.text(330, 24, "registers: thread (tm, tn) owns THREAD_M x THREAD_N", bold=True)
    for i in range(16):
        for j in range(12):
            mine = i // 2 % 4 == 1 and j // 2 % 3 == 1
            c.box(330 + j * 16, 44 + i * 12, 16, 12, ORANGE if mine else EMPTY, edge=GREY)
    notes = ("orange: one thread's results, in", "runs of 16 bytes that lie", "THREADS_M (THREADS_N) runs",
             "apart: reads of shared memory",
             "are contiguous or broadcast,", "stores come in runs")  # fmt: skip
    for i, note in enumerate(notes):
        c.text(540, 90 + i * 16, note, size=11)
    return c


def ring() -> Canvas:
    c = Canvas(760, 300, "The ring of conv_igemm")
    c.text(
        20,
        24,
        "the ring of STAGES = 4 slots in shared memory, at the time that stage s is multiplied",
        bold=True,
    )
    slots = [("s", "multiplied", ORANGE), ("s + 1", "on its way", BLUE), ("s + 2", "on its way", BLUE),
             ("s + 3", "asked for now", BLUE)]  # fmt: skip
    for i, (name, state, fill) in enumerate(slots):
        x = 20 + i * 150
        c.box(x, 40, 140, 46, fill, f"stage {name}|{state}")
    c.text(
        20,
        104,
        "s + 3 goes into the slot that s - 1 has left; the steps of s + 4 are decoded meanwhile",
        size=11,
        color=GREY,
    )

    y = 120
    for i, (name, fill) in enumerate(
        [("global", GREEN), ("ring", BLUE), ("fragments", VIOLET), ("sums", ORANGE), ("slab", VIOLET),
         ("global", GREEN)]
    ):  # fmt: skip
        c.box(20 + i * 130, y, 70, 34, fill, name, size=11)
    for i, name in enumerate(["cp.async", "ldmatrix", "mma", "", "16 B"]):
        c.arrow(90 + i * 130, y + 17, 148 + i * 130, y + 17)
        c.text(119 + i * 130, y + 8, name, size=9, middle=True)

    c.text(20, 186, "time", bold=True)
    c.arrow(60, 182, 740, 182)
    rows = [("copies", BLUE, 0), ("products", ORANGE, 3)]
    for row, (name, fill, late) in enumerate(rows):
        c.text(20, 214 + row * 34, name, size=11)
        for i in range(9 if not late else 7):
            x = 80 + (i + late) * 62
            c.box(x, 200 + row * 34, 60, 22, fill, f"s{i}", size=11)
    for i in range(6):
        c.line(80 + (i + 4) * 62 - 1, 196, 80 + (i + 4) * 62 - 1, 260, dashed=True, color=GREY)
    c.text(
        80,
        284,
        "dashed: the one barrier a stage. Copies run three stages ahead of the products.",
        size=11,
    )
    return c


def sm90() -> Canvas:
    c = Canvas(760, 386, "Cluster, roles and ring of conv_igemm_sm90")
    c.text(20, 24, "a cluster of two blocks: neighbouring rows, the same columns", bold=True)
    for b in range(2):
        x = 20 + b * 370
        left, ring = (x + 12, x + 166) if b == 0 else (x + 238, x + 10)  # rings side by side
        toward = (left + 100, ring - 4) if b == 0 else (left, ring + 178)
        c.box(x, 40, 350, 190, EMPTY, dashed=True)
        c.text(
            x + 10 if b == 0 else x + 340, 56, f"block of rank {b}", size=11, color=GREY, end=b == 1
        )
        c.box(left, 66, 100, 60, VIOLET, "producer|one thread,|few registers", size=11)
        c.box(left, 140, 100, 34, ORANGE, "consumers 0|half the rows", size=10)
        c.box(left, 182, 100, 34, ORANGE, "consumers 1|half the rows", size=10)
        for s in range(3):
            c.box(ring + s * 60, 66, 54, 34, BLUE, f"A {s}", size=11)
            c.box(ring + s * 60, 102, 54, 18, GREEN, "B, half 0", size=9)
            c.box(ring + s * 60, 120, 54, 18, GREEN, "B, half 1", size=9)
        c.arrow(toward[0], 84, toward[1], 84)
        c.text(sum(toward) / 2, 76, "TMA", size=9, middle=True)
        c.arrow(toward[1], 138, toward[0], 156)
        c.arrow(toward[1], 142, toward[0], 196)
        notes = ("wgmma reads operands here", "full[s]: their bytes have come", "empty[s]: all consumers of",
                 "the cluster have left it")  # fmt: skip
        for i, note in enumerate(notes):
            c.text(ring, 158 + i * 17, note, size=10)
    c.arrow(362, 111, 396, 111)
    c.arrow(398, 129, 364, 129)
    c.text(
        380,
        248,
        "each block copies its half of B and multicasts it to both",
        middle=True,
        size=11,
        color=GREY,
    )

    c.text(20, 274, "time", bold=True)
    c.arrow(60, 270, 740, 270)
    tiles = ["t0 s0", "t0 s1", "t0 s2", "t1 s0", "t1 s1", "t1 s2", "t2 s0", "t2 s1"]
    for i, name in enumerate(tiles):
        c.box(100 + i * 72, 282, 70, 20, BLUE, name, size=10)
    for i, name in enumerate(tiles[:3] + [""] + tiles[3:6]):
        if name:
            c.box(172 + i * 72, 308, 70, 20, ORANGE, name, size=10)
    c.box(388, 334, 70, 20, VIOLET, "t0", size=10)
    c.box(460, 360, 150, 16, GREEN, "t0", size=10)
    for i, name in enumerate(["copies", "products", "results", "stores"]):
        c.text(20, 297 + i * 26 - (4 if i == 3 else 0), name, size=11)
    return c


def planes() -> Canvas:
    c = Canvas(760, 300, "The patch of conv_igemm_planes")
    side = 20
    c.text(20, 24, "a patch of x, in eight planes (channels)", bold=True)
    for plane in (2, 1, 0):
        dx, dy = plane * 12, -plane * 6
        for row in range(8):
            for column in range(10):
                halo = row in (0, 7) or column in (0, 9)
                c.box(
                    20 + dx + column * side,
                    60 + dy + row * side,
                    side,
                    side,
                    RED if halo else BLUE,
                    edge=GREY,
                )
    c.box(20 + 3 * side, 60 + 2 * side, 3 * side, 3 * side, EMPTY, opacity=0.5, thick=2)
    c.text(20, 244, "blue: TILE_H x TILE_W places (here 6 x 8)", size=11)
    c.text(20, 260, "red: the halo, TAPS - 1 in all", size=11)
    c.text(20, 276, "each element is fetched once a chunk,", size=11)
    c.text(20, 290, "and read from shared memory at 9 taps", size=11)
    c.arrow(258, 130, 300, 130)
    c.text(310, 24, "multiplied at each tap, as offsets", bold=True)
    for tap in range(9):
        x, y = 310 + (tap % 3) * 74, 44 + (tap // 3) * 60
        c.box(x, y, 60, 48, EMPTY, edge=GREY)
        c.box(
            x + (tap % 3) * 5, y + (tap // 3) * 5, 50, 38, BLUE, f"r{tap // 3} s{tap % 3}", size=10
        )
    c.text(310, 244, "mma's A: lane (g, t) reads plane t", size=11)
    c.text(310, 260, "at place g plus the tap's offset", size=11)
    c.arrow(530, 130, 566, 130)
    c.text(570, 24, "filters, packed once a call", bold=True)
    for tap in range(9):
        c.box(580, 44 + tap * 18, 150, 18, GREEN, f"tap {tap}: [K][8 words]", size=10)
    c.text(580, 228, "zeros fill up K and C", size=11, color=GREY)
    c.text(580, 260, "next patch: on its way into", size=11)
    c.text(580, 275, "registers meanwhile", size=11)
    return c


def im2col() -> Canvas:
    c = Canvas(760, 260, "Columns of conv_im2col")
    side = 20
    c.text(20, 24, "x", bold=True)
    c.cells(20, 40, 7, 6, side, BLUE)
    c.box(20 + 2 * side, 40 + side, 3 * side, 3 * side, RED, opacity=0.6, thick=2)
    c.text(20, 180, "a thread takes one place (or a", size=11)
    c.text(20, 195, "pack of neighbours), and walks", size=11)
    c.text(20, 210, "through its taps in turns", size=11)
    c.arrow(170, 95, 228, 95)
    c.text(200, 86, "conv_im2col", middle=True, size=9)
    c.text(240, 24, "col: (c, tap) x place, some images at a time", bold=True)
    c.box(240, 40, 200, 150, BLUE)
    c.box(320, 40, 14, 150, RED, opacity=0.6, thick=2)
    c.text(240, 208, "stays in L2 until the product reads it", size=11)
    c.text(240, 223, "R·S times as large as x", size=11)
    c.text(474, 100, "x", middle=True, size=16)
    c.box(500, 60, 90, 100, GREEN, "w|K x (c, tap)", size=11)
    c.text(545, 180, "torch.matmul", middle=True, size=11)
    c.arrow(592, 110, 626, 110)
    c.box(630, 60, 110, 100, ORANGE, "y|K x place")
    c.text(630, 180, "conv_finish_im2col:", size=11)
    c.text(630, 195, "scale, bias, residual,", size=11)
    c.text(630, 210, "activation, in place", size=11)
    c.text(
        240,
        246,
        "1x1 convolutions of dense tensors need no columns: they are their own",
        size=11,
        color=GREY,
    )
    return c


def depthwise() -> Canvas:
    c = Canvas(760, 300, "The walk of conv_depthwise")
    side = 22
    c.text(20, 24, "x: a thread walks down a strip", bold=True)
    for row in range(9):
        for column in range(10):
            fill = (
                EMPTY if not 2 <= column <= 7 else RED if row == 4 else BLUE if row < 4 else EMPTY
            )
            c.box(20 + column * side, 40 + row * side, side, side, fill, edge=GREY)
    c.arrow(250, 60, 250, 230)
    c.text(20, 258, "red: the row that this step loads, once;", size=11)
    c.text(20, 274, "TILE + S - 1 columns of it", size=11)
    c.text(300, 24, "registers: LIVE = 3 rows of sums", bold=True)
    names = [("row p - 1", "+ w[2]·row", "done: stored after this step"), ("row p", "+ w[1]·row", "moves up"),
             ("row p + 1", "+ w[0]·row", "begun")]  # fmt: skip
    for i, (name, product, fate) in enumerate(names):
        y = 54 + i * 54
        for column in range(4):
            c.box(300 + column * 34, y, 34, 26, ORANGE, edge=GREY)
        c.text(300, y - 4, name, size=11)
        c.text(446, y + 12, product, code=True, size=11)
        c.text(446, y + 27, fate, size=11, color=GREY)
    c.text(
        290,
        226,
        "A row of x serves all the result rows it reaches: each element is loaded once",
        size=11,
    )
    c.text(
        290,
        242,
        "a strip, each sum lives in registers. Strides and dgrad change which tap meets",
        size=11,
    )
    c.text(
        290, 258, "which row, and both are constants: no product with an inserted zero.", size=11
    )
    c.box(640, 50, 100, 76, GREEN, "w[r, s]|registers, or|shared memory", size=11)
    return c


def large() -> Canvas:
    c = Canvas(760, 250, "The sliding window of conv_depthwise_large")
    c.text(20, 24, "image row a + i in shared memory, padding included", bold=True)
    for i in range(24):
        fill = RED if i >= 20 else BLUE if 4 <= i < 20 else EMPTY
        c.box(20 + i * 30, 40, 30, 30, fill, edge=GREY)
    c.text(20, 88, "blue: columns in registers from before", size=11)
    c.text(740, 88, "red: the 4 columns loaded in this step", size=11, end=True)
    c.text(20, 120, "filter row i", bold=True)
    for i in range(12):
        c.box(20 + i * 30, 132, 30, 26, GREEN if 4 <= i < 8 else EMPTY, edge=GREY)
    c.text(400, 150, "4 filter columns, loaded in this step", size=11)
    c.text(20, 188, "own: TILE = 16 neighbours of one row, in registers", bold=True)
    for i in range(16):
        c.box(20 + i * 30, 200, 30, 26, ORANGE, edge=GREY)
    c.text(520, 210, "4 x 16 multiply-adds", size=11)
    c.text(520, 225, "for 2 loads of 16 bytes", size=11)
    return c


def fold() -> Canvas:
    c = Canvas(760, 190, "Folding a padded gradient back")
    c.text(
        20,
        24,
        "reflect, pad 2, along one axis of H = 8: gradients of the padded input …",
        bold=True,
    )
    side = 50
    for u in range(12):
        outside = u < 2 or u >= 10
        source = 2 - u if u < 2 else (7 - (u - 9) if u >= 10 else u - 2)
        c.box(80 + u * side, 40, side - 4, 30, RED if outside else BLUE, f"of x {source}", size=11)
        h = source
        if outside:
            c.arrow(80 + u * side + 23, 70, 80 + (h + 2) * side + (13 if u < 2 else 33), 118)
        else:
            c.arrow(80 + u * side + 23, 70, 80 + u * side + 23, 118, color=GREY)
    for h in range(8):
        c.box(80 + (h + 2) * side, 120, side - 4, 30, ORANGE, f"x {h}", size=11)
    c.text(
        20,
        178,
        "… folded onto the elements that the padding was made of: each gathered by one thread, in order",
        size=11,
    )
    return c


def drawings() -> dict[str, Canvas]:
    makers = (product, phases, direct, ring, sm90, planes, im2col, depthwise, large, fold)
    return {f"conv_{make.__name__}": make() for make in makers}

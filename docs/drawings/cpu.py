"""The CPU engine."""

from __future__ import annotations

from canvas import BLUE, EMPTY, GREEN, GREY, ORANGE, RED, VIOLET, Canvas


def rows() -> Canvas:
    c = Canvas(760, 290, "The micro-kernel of convolution by rows of channels")
    c.text(20, 24, "x, channels last: 6 places", bold=True)
    for row in range(6):
        for column in range(7):
            c.box(20 + column * 22, 40 + row * 26, 22, 26, RED if column == 2 else BLUE, edge=GREY)
    c.text(20, 216, "one element of each place is", size=11)
    c.text(20, 231, "broadcast to a whole vector", size=11)
    c.text(230, 24, "filters, packed: vectors of K", bold=True)
    for row in range(7):
        for column in range(4):
            c.box(230 + column * 50, 40 + row * 22, 50, 22, RED if row == 2 else GREEN, edge=GREY)
    c.text(230, 216, "[block of K] [taps, C] [vectors]:", size=11)
    c.text(230, 231, "read one behind the other", size=11)
    c.text(470, 24, "registers: 6 x 4 vectors of sums", bold=True)
    for row in range(6):
        for column in range(4):
            c.box(470 + column * 62, 40 + row * 26, 62, 26, ORANGE, edge=GREY)
    c.text(470, 216, "24 sums, 4 vectors of filters, 1 broadcast:", size=11)
    c.text(470, 231, "of 32 AVX-512 registers", size=11)
    c.text(
        20,
        266,
        "Each of C x taps: 4 loads, 6 broadcasts, 24 multiply-adds. A tap is an offset into the block.",
        size=11,
    )
    return c


def planes() -> Canvas:
    c = Canvas(760, 220, "One tap, channels in planes")
    c.text(20, 24, "x in planes: [C] [places]", bold=True)
    for row in range(6):
        for column in range(8):
            c.box(
                20 + column * 26,
                40 + row * 22,
                26,
                22,
                GREEN if 2 <= column < 6 else BLUE,
                edge=GREY,
            )
    c.text(20, 194, "green: a task's panel, copied once", size=11)
    c.arrow(236, 104, 286, 104)
    c.text(300, 24, "filters, broadcast", bold=True)
    for row in range(5):
        for column in range(6):
            c.box(
                300 + column * 26, 50 + row * 22, 26, 22, RED if column == 3 else VIOLET, edge=GREY
            )
    c.text(300, 194, "read where they lie: w[k, c]", size=11)
    c.arrow(464, 104, 506, 104)
    c.text(520, 24, "y in planes: vectors of places", bold=True)
    for row in range(5):
        for column in range(4):
            c.box(520 + column * 50, 50 + row * 22, 50, 22, ORANGE, edge=GREY)
    c.text(520, 194, "sums go straight to y", size=11)
    return c


def winograd() -> Canvas:
    c = Canvas(760, 320, "Winograd's F(4x4, 3x3)")
    side = 18
    c.text(20, 24, "d: 6x6 inputs", bold=True)
    for row in range(6):
        for column in range(6):
            inner = 1 <= row <= 4 and 1 <= column <= 4
            c.box(
                20 + column * side, 40 + row * side, side, side, BLUE if inner else RED, edge=GREY
            )
    c.text(20, 168, "tiles overlap by 2", size=11)
    c.arrow(134, 94, 186, 94)
    c.text(160, 84, "Bᵀ d B", middle=True, size=10)
    c.text(196, 24, "V: 36 numbers", bold=True)
    c.cells(196, 40, 6, 6, side, VIOLET)
    c.text(20, 204, "g: 3x3 taps", bold=True)
    c.cells(20, 216, 3, 3, side, GREEN)
    c.arrow(84, 242, 186, 242)
    c.text(135, 232, "G g Gᵀ", middle=True, size=10)
    c.text(196, 184, "U: 36 numbers", bold=True)
    c.cells(196, 196, 6, 6, side, VIOLET)
    c.text(20, 300, "of each pair of channels", size=11)

    c.text(360, 24, "36 matrix products, over channels", bold=True)
    for n in (2, 1, 0):
        c.box(
            360 + n * 10, 60 + n * 10, 70, 90, VIOLET, "" if n != 0 else "V[ξ]|tiles x C", size=11
        )
        c.box(456 + n * 10, 60 + n * 10, 70, 60, VIOLET, "" if n != 0 else "U[ξ]|C x K", size=11)
    c.text(360, 194, "36 products where a direct convolution", size=11)
    c.text(360, 209, "of 16 outputs has 9 x 16 = 144", size=11)
    c.path([(304, 94), (356, 94)])
    c.path([(304, 250), (340, 250), (340, 134), (356, 134)])
    c.arrow(550, 94, 606, 94)
    c.text(578, 84, "Aᵀ M A", middle=True, size=10)
    c.text(620, 24, "y: 4x4 outputs", bold=True)
    c.cells(620, 58, 4, 4, side, ORANGE)
    c.text(360, 250, "The sum over channels is taken before Aᵀ … A, so that", size=11)
    c.text(360, 266, "transforms cost little once there are many channels.", size=11)
    return c


def depthwise() -> Canvas:
    c = Canvas(760, 240, "Depthwise convolution with channels as lanes")
    c.text(20, 24, "x: places by vectors of channels", bold=True)
    for column in range(8):
        c.box(
            20 + column * 60,
            44,
            56,
            30,
            BLUE if column < 6 else EMPTY,
            f"place {column}",
            size=11,
            edge=GREY,
        )
    for column in range(4):
        c.box(20 + column * 60, 130, 56, 30, ORANGE, f"q {column}", size=11)
        for tap in range(3):
            c.line(48 + (column + tap) * 60, 74, 48 + column * 60, 130, color=GREY)
    c.text(410, 98, "y[q] += w[s] · x[q + s], lane by lane", code=True, size=11)
    c.text(410, 116, "a vector is loaded once for all the", size=11)
    c.text(410, 132, "outputs and taps that meet it", size=11)
    c.text(20, 178, "a run of neighbouring outputs, in registers", size=11)
    c.text(
        20,
        206,
        "Channels-last memory is read in place. Planes come to scratch row by row, as vectors of channels,",
        size=11,
    )
    c.text(
        20,
        222,
        "in a ring of as many rows as are read together; half types are widened there.",
        size=11,
    )
    return c


def tasks() -> Canvas:
    c = Canvas(760, 230, "Tasks on torch's threads")
    c.text(20, 24, "a task: one serial function, void(address, index, scratch)", bold=True)
    for i in range(10):
        c.box(20 + i * 44, 40, 40, 30, GREEN, f"{i}")
    c.text(470, 60, "indices of work, cut by the shape alone", size=11)
    order = [[0, 1, 2, 3, 4, 8], [5, 6, 7, 9]]
    for t, indices in enumerate(order):
        y = 100 + t * 40
        c.text(20, y + 20, f"thread {t}", size=11)
        for n, index in enumerate(indices):
            c.box(90 + n * 64, y, 60, 30, ORANGE, f"index {index}", size=11)
    c.text(490, 112, "threads of torch's own OpenMP take their", size=11)
    c.text(490, 127, "own share first, the same in every run,", size=11)
    c.text(490, 142, "then what others have not come to; who", size=11)
    c.text(490, 157, "takes what decides no bit of a result", size=11)
    c.text(
        20,
        204,
        "Machine code of a task lies in the cache as an object file, under a digest of its sources,",
        size=11,
    )
    c.text(
        20,
        220,
        "the compiler and the CPU; a later process loads it in less than a millisecond.",
        size=11,
    )
    return c


def drawings() -> dict[str, Canvas]:
    return {f"cpu_{make.__name__}": make() for make in (rows, planes, winograd, depthwise, tasks)}

"""How a call travels, and how the emulator sees a kernel."""

from __future__ import annotations

from canvas import BLUE, GREEN, GREY, ORANGE, RED, VIOLET, Canvas


def call() -> Canvas:
    c = Canvas(760, 330, "How a call travels from Python to a kernel")
    steps = [
        ("functional/conv.py", "arguments, as torch has them", BLUE),
        ("ops/conv.py", "shapes, autograd, result tensors", BLUE),
        ("registry.py", "which row takes the problem", VIOLET),
    ]
    for i, (name, what, fill) in enumerate(steps):
        x = 20 + i * 250
        c.box(x, 30, 220, 54, fill)
        c.text(x + 110, 50, name, middle=True, code=True)
        c.text(x + 110, 70, what, middle=True, size=11)
        if i:
            c.arrow(x - 30, 57, x - 2, 57)
    c.text(616, 112, "tuned.py: what tune() has measured", end=True, size=11, color=GREY)
    ways = [
        (20, "cuda/conv_igemm.py", "constants, grid, params", GREEN),
        (275, "cpu/conv.py", "plan, tasks", GREEN),
        (530, "aten/conv.py", "PyTorch's own", GREEN),
    ]
    for x, name, what, fill in ways:
        c.box(x, 150, 210, 50, fill)
        c.text(x + 105, 168, name, middle=True, code=True)
        c.text(x + 105, 187, what, middle=True, size=11)
        c.path([(630, 84), (630, 134), (x + 105, 134), (x + 105, 148)])
    c.box(20, 230, 210, 30, VIOLET, "cuda/launch.py")
    c.arrow(125, 200, 125, 228)
    c.box(20, 284, 100, 32, ORANGE, "cuda/jit.py|NVRTC, CuPy", size=11)
    c.box(130, 284, 100, 32, ORANGE, "emulate.py|g++, fibers", size=11)
    c.arrow(90, 260, 70, 282)
    c.arrow(160, 260, 180, 282)
    c.text(275, 297, "engine cuda: on the GPU", size=11)
    c.text(275, 312, "engine emulate: on the CPU, every access checked", size=11)
    c.box(275, 230, 210, 30, ORANGE, "numba and LLVM, torch's threads", size=11)
    c.arrow(380, 200, 380, 228)
    c.text(
        275, 280, "kernels/conv_igemm.cu is the same text for both of these:", size=11, color=GREY
    )
    return c


def emulator() -> Canvas:
    c = Canvas(760, 340, "How the emulator runs a kernel")
    c.box(20, 30, 150, 60, BLUE, "kernels/pool.cu|-D constants|as on a GPU")
    c.arrow(170, 60, 208, 60)
    c.box(210, 30, 170, 60, VIOLET, "g++, every load and|store a call-back|(-fsanitize=thread)")
    c.arrow(380, 60, 418, 60)
    c.box(420, 30, 130, 60, GREEN, "a library, kept|in the cache")
    c.arrow(550, 60, 588, 60)
    c.box(590, 30, 150, 60, ORANGE, "one fiber|a CUDA thread")

    c.text(20, 130, "one block: threads run until they wait, then another one is picked", bold=True)
    for t in range(8):
        y = 148 + t * 17
        c.text(20, y + 11, f"thread {t}", size=10)
        start = 80 + t * 26
        c.box(start, y, 26, 13, ORANGE)
        again = 300 + ((5 * t) % 8) * 26
        c.box(again, y, 26, 13, ORANGE)
    c.line(294, 142, 294, 286, dashed=True)
    c.text(294, 300, "__syncthreads()", middle=True, code=True, size=11)
    c.text(180, 318, "forwards", middle=True, size=11, color=GREY)
    c.text(405, 318, "at random: results must be the same bits", middle=True, size=11, color=GREY)

    c.text(548, 130, "of each byte it knows", bold=True)
    notes = ["whose it is: bounds, rights", "who wrote it, who has read it:", "races, by vector clocks",
             "if it was written at all", "what copy is under way to it",
             "its sector, its bank: a profile"]  # fmt: skip
    for i, note in enumerate(notes):
        c.text(548 + 12 * (i == 2), 152 + i * 19, note, size=11)
    c.box(548, 272, 192, 46, RED, "KernelError: file, line,|block, thread", size=11)
    return c


def drawings() -> dict[str, Canvas]:
    return {"call": call(), "emulator": emulator()}

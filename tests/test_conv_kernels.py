"""The convolution kernels themselves, called as the registry calls them: padding modes and their folding,
negative padding, the bias of dgrad. What stands on them, in cnnops.ops, has tests of its own.

The reference is PyTorch's in float64: ``F.pad``, then a convolution, and autograd through both.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from cases import ENGINES, TOLERANCE, assert_close, device_of, laid_out, normal
from cases.base import moved
from torch import Tensor

from cnnops.cuda import conv_direct, conv_fold, conv_im2col, emulate
from cnnops.cuda.kernel import Launch
from cnnops.cuda.launch import trace
from cnnops.shapes import ConvShape, NormShape, Padding

Size = tuple[int, ...]

pytestmark = pytest.mark.parametrize("engine", [e for e in ENGINES if not isinstance(e, str)])

MODES = ("reflect", "replicate", "circular")
LAYOUTS = ("channels_last", "sliced", "expanded", "transposed", "offset")


@dataclass(frozen=True)
class Problem:
    """A convolution's sizes and arguments but for the padding, and which module computes it in which form."""

    id: str
    module: ModuleType
    form: str  # what the names of conv_direct's entries end in
    x: Size
    w: Size
    stride: int | Size = 1
    dilation: int | Size = 1
    groups: int = 1

    def shape(self, padding: Padding, mode: str = "zeros") -> ConvShape:
        return ConvShape.of(
            self.x, self.w, None, self.stride, padding, self.dilation, self.groups, mode
        )


TILED = (
    ((2, 5, 9), (6, 5, 4), 2),
    ((2, 8, 6, 7), (12, 4, 3, 2), (1, 2), (2, 1), 2),
    ((2, 3, 4, 5, 4), (5, 3, 2, 3, 3), (1, 2, 1)),
)
THIN = (
    ((2, 4, 9), (4, 1, 7), 1, 1, 4),
    ((2, 6, 6, 7), (9, 2, 3, 3), (2, 1), (1, 2), 3),
    ((2, 4, 4, 5, 4), (4, 1, 3, 2, 3), 1, 1, 4),
)
PROBLEMS = [
    Problem(f"{name}_{len(arguments[0]) - 2}d", module, form, *arguments)
    for name, module, form, rows in (
        ("tiled", conv_direct, "direct", TILED),
        ("thin", conv_direct, "thin", THIN),
        ("im2col", conv_im2col, "", TILED),
    )
    for arguments in rows
]
PLANES = [p for p in PROBLEMS if len(p.x) == 4]

PADDING: dict[int, Padding] = {1: ((3, 2),), 2: ((2, 1), (0, 3)), 3: ((1, 2), (0, 0), (3, 1))}


def problems(chosen: Sequence[Problem] = PROBLEMS) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("problem", chosen, ids=lambda p: p.id)


for_modes = pytest.mark.parametrize("mode", MODES)


@pytest.fixture(autouse=True)
def every_thread_order() -> Iterator[None]:
    """Under the emulator every launch runs under three thread orders, which must agree bit by bit."""
    with emulate.schedule("all"):
        yield


# ---- calling the kernels, and what to expect of them -----------------------------------------------------


def made(
    size: Sequence[int],
    seed: int,
    engine: str,
    dtype: torch.dtype = torch.float32,
    layout: str = "",
) -> Tensor:
    """Random numbers, rounded to bfloat16 so that every type has the same."""
    values = normal(seed, torch.bfloat16)
    laid = laid_out(tuple(size), layout or "contiguous", lambda s: values(s).to(dtype))
    return moved(laid, device_of(engine))


def filled(
    module: ModuleType, op: str, shape: ConvShape, *inputs: Tensor | None, last: bool = False
) -> Tensor:
    """The result of a kernel that supports the problem, in memory that held NaN before."""
    size = {
        "conv_fprop": shape.y_size, "conv_dgrad": shape.x_size, "conv_wgrad": shape.w_size,
        "conv_bgrad": shape.y_size[1:2], "conv_fold": shape.x_size,
    }[op]  # fmt: skip
    first = inputs[0]
    assert first is not None
    assert module.supports(op, shape, first.dtype) is None
    result = torch.full(size, float("nan"), dtype=first.dtype, device=first.device)
    if last:
        result = result.movedim(1, -1).contiguous().movedim(-1, 1)
    getattr(module, op)(shape, *inputs, result)
    return result


def padded(shape: ConvShape, x: Tensor) -> Tensor:
    pads = [p for pair in reversed(shape.padding) for p in pair]
    return F.pad(x, pads, "constant" if shape.padding_mode == "zeros" else shape.padding_mode)


def expected(
    shape: ConvShape, x: Tensor, w: Tensor, grad_y: Tensor, bias: Tensor, shift: Tensor
) -> dict[str, Tensor]:
    """The results of all passes in float64; `bias` is fprop's, `shift` dgrad's."""
    tensors = (x, w, grad_y, bias, shift)
    x, w, grad_y, bias, shift = (t.double().cpu().clone() for t in tensors)
    leaves = x.requires_grad_(), w.requires_grad_()
    conv = (F.conv1d, F.conv2d, F.conv3d)[shape.dims - 1]
    y = conv(padded(shape, x), w, bias, shape.stride, 0, shape.dilation, shape.groups)
    grad_x, grad_w = torch.autograd.grad(y, leaves, grad_y)
    grad_x = grad_x + shift.view(-1, *(1,) * shape.dims)
    return {"conv_fprop": y, "conv_dgrad": grad_x, "conv_wgrad": grad_w}


def check(
    problem: Problem, shape: ConvShape, engine: str, dtype: torch.dtype = torch.float32,
    layout: str = "", ops: Sequence[str] = ("conv_fprop", "conv_wgrad"),
) -> dict[str, list[Launch]]:  # fmt: skip
    """Compute and compare the passes `ops`, with the bias of those that take one. Their launches, by pass."""
    x = made(shape.x_size, 1, engine, dtype, layout)
    w = made(shape.w_size, 2, engine, dtype, "" if layout == "expanded" else layout)
    grad_y = made(shape.y_size, 3, engine, dtype, layout)
    bias, shift = made((shape.K,), 4, engine, dtype), made((2 * shape.C,), 5, engine, dtype)[::2]
    wanted = expected(shape, x, w, grad_y, bias, shift)
    inputs = {
        "conv_fprop": (x, w, bias), "conv_dgrad": (grad_y, w, shift), "conv_wgrad": (grad_y, x)
    }  # fmt: skip
    found = {}
    for op in ops:
        with trace() as found[op]:
            got = filled(problem.module, op, shape, *inputs[op], last=layout == "channels_last")
        if problem.form:
            assert found[op][0].kernel.entry == f"{op}_{problem.form}"
        tolerance = TOLERANCE[dtype]
        limit = tolerance.output if op == "conv_fprop" else tolerance.gradient
        assert_close(got, wanted[op], limit, f"{problem.id}, {op}")
    return found


# ---- padding modes, read in place ------------------------------------------------------------------------


@for_modes
@problems()
def test_padding_modes(problem: Problem, mode: str, engine: str) -> None:
    shape = problem.shape(PADDING[len(problem.x) - 2], mode)
    for launches in check(problem, shape, engine).values():
        assert dict(launches[0].kernel.constants)["PADDING"] == mode.upper()


@pytest.mark.parametrize("dtype", [d for d in TOLERANCE if d != torch.float32], ids=str)
@problems(PLANES)
def test_padding_in_every_type(problem: Problem, dtype: torch.dtype, engine: str) -> None:
    check(problem, problem.shape(PADDING[2], "reflect"), engine, dtype, "channels_last")


@pytest.mark.parametrize("layout", LAYOUTS)
@problems(PLANES)
def test_padding_in_every_layout(problem: Problem, layout: str, engine: str) -> None:
    check(problem, problem.shape(PADDING[2], "circular"), engine, layout=layout)


@for_modes
@problems(PLANES)
def test_padding_as_wide_as_may_be(problem: Problem, mode: str, engine: str) -> None:
    """Up to the other border and back, a whole turn around, a border more often than there are places."""
    h, w = problem.x[2:]
    most = {"reflect": -1, "replicate": 9, "circular": 0}[mode]
    check(problem, problem.shape(((h + most, h + most), (w + most, 0)), mode), engine)


@pytest.mark.parametrize("mode", ["replicate", "circular"])
@problems(PLANES)
def test_padding_of_a_single_place(problem: Problem, mode: str, engine: str) -> None:
    """Whatever a window sees of a line of one place is that place."""
    line = replace(
        problem, x=(*problem.x[:2], 1, problem.x[3]), w=(*problem.w[:2], 3, 2), dilation=1
    )
    check(line, line.shape(((1, 1), (1, 0)), mode), engine)


@problems(PLANES)
def test_a_mode_without_padding_is_no_other_kernel(problem: Problem, engine: str) -> None:
    shape = problem.shape(((0, 0), (0, 0)), "reflect")
    for launches in check(problem, shape, engine).values():
        assert dict(launches[0].kernel.constants)["PADDING"] == 0


@pytest.mark.parametrize("vector", [True, False], ids=["packs", "elements"])
@for_modes
def test_padding_in_packs_of_channels(mode: str, vector: bool, engine: str) -> None:
    """Channels-last, channels in packs of 16 bytes: tiled, depthwise, and as columns."""
    c = 16 if vector else 15
    for module, form, w, groups in (
        (conv_direct, "direct", (8, c, 3, 3), 1),
        (conv_direct, "thin", (c, 1, 3, 3), c),
        (conv_im2col, "", (8, c, 3, 3), 1),
    ):
        problem = Problem("packs", module, form, (2, c, 5, 4), w, groups=groups)
        shape = problem.shape(((1, 1), (2, 1)), mode)
        found = check(problem, shape, engine, layout="channels_last")["conv_fprop"][0].kernel
        constants = dict(found.constants)
        width = constants["GATHER_VECTOR"] if form == "direct" else constants["VECTOR"]
        assert width == (4 if vector else 1)


def test_circular_convolution_commutes_with_turning(engine: str) -> None:
    """Place by place the sums are the same, in the same order: not a bit differs."""
    x, w = made((2, 6, 7, 8), 1, engine), made((7, 6, 3, 5), 2, engine)
    shape = ConvShape.of(x.shape, w.shape, None, 1, (1, 2), padding_mode="circular")
    turned = x.roll((3, 5), (2, 3))
    for module in (conv_direct, conv_im2col):
        y = filled(module, "conv_fprop", shape, x, w, None)
        assert torch.equal(
            filled(module, "conv_fprop", shape, turned, w, None), y.roll((3, 5), (2, 3))
        )


@pytest.mark.parametrize("mode", ["zeros", "replicate", "circular"])
@problems([p for p in PROBLEMS if len(p.x) == 3])
def test_padding_beyond_31_bits(problem: Problem, mode: str, engine: str) -> None:
    """The one place of an axis is as far from its padding as only offsets of 64 bits can tell."""
    dense = made((1, problem.x[1], 1), 1, engine)
    x = dense.as_strided(dense.shape, (0, 1, 2**33))
    padding = ((9, 8),) if mode == "replicate" else ((1, 1),)
    shape = replace(problem, x=tuple(x.shape), w=(*problem.w[:2], 3)).shape(padding, mode)
    w, grad_y = made(shape.w_size, 2, engine), made(shape.y_size, 3, engine)
    bias, shift = made((shape.K,), 4, engine), made((shape.C,), 5, engine)
    wanted = expected(shape, dense, w, grad_y, bias, shift)
    with trace() as launches:
        y = filled(problem.module, "conv_fprop", shape, x, w, bias)
        grad_w = filled(problem.module, "conv_wgrad", shape, grad_y, x)
    assert all(dict(plan.kernel.constants)["WIDE"] for plan in launches)
    assert_close(y, wanted["conv_fprop"], TOLERANCE[torch.float32].output, "y")
    assert_close(grad_w, wanted["conv_wgrad"], TOLERANCE[torch.float32].gradient, "grad_w")


# ---- folding the gradient of the padding -----------------------------------------------------------------

FOLDS: list[tuple[Size, Padding]] = [
    ((2, 3, 9), ((4, 3),)),
    ((2, 3, 6, 7), ((2, 1), (0, 3))),
    ((2, 3, 4, 5, 4), ((1, 2), (0, 0), (3, 1))),
]


def unfolded(size: Size, padding: Padding, mode: str) -> ConvShape:
    """A 1x1 convolution, whose padded input is all that folding knows of it."""
    filters = (1, size[1], *(1,) * len(padding))
    return ConvShape.of(size, filters, None, 1, padding, padding_mode=mode)


def check_fold(
    shape: ConvShape, engine: str, dtype: torch.dtype = torch.float32, layout: str = "", last: bool = False
) -> dict[str, str | int]:  # fmt: skip
    """Fold and compare; the constants of the launch."""
    gradient = made(shape.padded.x_size, 1, engine, dtype, layout)
    x = torch.zeros(shape.x_size, dtype=torch.float64, requires_grad=True)
    (wanted,) = torch.autograd.grad(padded(shape, x), x, gradient.double().cpu())
    with trace() as launches:
        got = filled(conv_fold, "conv_fold", shape, gradient, last=last)
    assert_close(got, wanted, TOLERANCE[dtype].gradient, "fold")
    return dict(launches[0].kernel.constants)


@for_modes
@pytest.mark.parametrize("size, padding", FOLDS, ids=["1d", "2d", "3d"])
def test_fold(size: Size, padding: Padding, mode: str, engine: str) -> None:
    shape = unfolded(size, padding, mode)
    check_fold(shape, engine)
    assert check_fold(shape, engine, layout="channels_last", last=True)["CHANNELS_FAST"]


@for_modes
def test_fold_of_padding_as_wide_as_may_be(mode: str, engine: str) -> None:
    h, w = {"reflect": (4, 5), "replicate": (9, 8), "circular": (5, 6)}[mode]
    check_fold(unfolded((2, 3, 5, 6), ((h, h), (w, w)), mode), engine)
    check_fold(unfolded((2, 3, 5, 6), ((h, 0), (0, w)), mode), engine)
    if mode != "reflect":
        check_fold(unfolded((2, 3, 1, 6), ((1, 1), (w, 1)), mode), engine)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@for_modes
def test_fold_in_packs(mode: str, dtype: torch.dtype, engine: str) -> None:
    """16 bytes in one access: of channels, and of columns where the pad leaves them on their boundary."""
    width = 16 // dtype.itemsize
    shape = unfolded((2, 2 * width, 5, 2 * width), ((2, 1), (width, 2 * width - width)), mode)
    constants = check_fold(shape, engine, dtype)
    assert (constants["VECTOR"], constants["CHANNELS_FAST"]) == (width, 0)
    constants = check_fold(shape, engine, dtype, "channels_last", last=True)
    assert (constants["VECTOR"], constants["CHANNELS_FAST"]) == (width, 1)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fold_in_every_layout(layout: str, engine: str) -> None:
    shape = unfolded((3, 4, 6, 8), ((2, 3), (4, 4)), "reflect")
    check_fold(shape, engine, layout=layout)
    check_fold(shape, engine, layout=layout, last=True)


def test_fold_of_more_packs_than_one_block_takes(engine: str) -> None:
    check_fold(unfolded((3, 7, 13, 11), ((1, 1), (1, 1)), "circular"), engine)


def test_fold_in_chunks_of_the_batch(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for tensors of more than 2^31 packs, in miniature; and with the offsets that they take."""
    monkeypatch.setattr(conv_fold, "MAX_PACKS", 200)
    monkeypatch.setattr(conv_fold, "INT32_MAX", 1000)
    shape = unfolded((5, 3, 5, 6), ((1, 2), (2, 1)), "reflect")
    with trace(run=False) as launches:
        filled(conv_fold, "conv_fold", shape, made(shape.padded.x_size, 1, engine))
    assert launches[0].grid[1] == 3
    assert check_fold(shape, engine)["WIDE"]


@for_modes
@problems(PLANES)
def test_dgrad_and_fold_are_the_gradient_of_a_padded_input(
    problem: Problem, mode: str, engine: str
) -> None:
    shape = problem.shape(PADDING[2], mode)
    w, grad_y = made(shape.w_size, 2, engine), made(shape.y_size, 3, engine)
    zeros = torch.zeros(max(shape.C, shape.K), dtype=torch.float64)
    x = torch.zeros(shape.x_size)
    wanted = expected(shape, x, w, grad_y, zeros[: shape.K], zeros[: shape.C])["conv_dgrad"]
    of_padded = filled(problem.module, "conv_dgrad", shape.padded, grad_y, w, None)
    grad_x = filled(conv_fold, "conv_fold", shape, of_padded)
    assert_close(grad_x, wanted, TOLERANCE[torch.float32].gradient, "grad_x")


# ---- dgrad with a bias: transposed convolution -----------------------------------------------------------

PLAIN: dict[int, Padding] = {1: ((1, 1),), 2: ((1, 0), (1, 2)), 3: ((1, 0), (0, 0), (1, 1))}
DGRAD = ("conv_dgrad",)


@problems()
def test_bias_of_dgrad(problem: Problem, engine: str) -> None:
    check(problem, problem.shape(PLAIN[len(problem.x) - 2]), engine, ops=DGRAD)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@problems(PLANES)
def test_bias_of_dgrad_in_every_type(problem: Problem, dtype: torch.dtype, engine: str) -> None:
    shape = problem.shape(PLAIN[2])
    check(problem, shape, engine, dtype, "channels_last", ops=DGRAD)


@problems(PLANES)
def test_bias_where_no_window_reaches(problem: Problem, engine: str) -> None:
    """A stride beyond the kernel leaves whole phases without a tap: they are the bias."""
    apart = replace(problem, w=(*problem.w[:2], 1, 2), stride=(3, 4), dilation=1)
    shape = apart.shape(((0, 0), (0, 0)))
    check(apart, shape, engine, ops=DGRAD)
    grad_y, w = made(shape.y_size, 3, engine), made(shape.w_size, 2, engine)
    bias = made((shape.C,), 5, engine)
    grad_x = filled(apart.module, "conv_dgrad", shape, grad_y, w, bias)
    free = grad_x[:, :, 1:3, 2:4]
    assert torch.equal(free, bias.view(1, -1, 1, 1).expand_as(free))


@pytest.mark.parametrize("layout", ["", "channels_last"], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("stride", [1, 2])
def test_bias_of_dgrad_in_parts(stride: int, layout: str, engine: str) -> None:
    """Sums over the filters in three parts: the bias is added once, by channels of grad_x."""
    problem = Problem("parts", conv_direct, "direct", (2, 10, 6, 5), (72, 5, 3, 3), stride, 1, 2)
    with conv_direct.forced("32x32x16/3"):
        shape = problem.shape(((1, 1), (1, 1)))
        (launches,) = check(problem, shape, engine, layout=layout, ops=DGRAD).values()
    parts = 3 if stride == 1 else 1  # a phase has a quarter of the terms: too few to part
    assert launches[0].params.splits.divisor == parts
    assert [plan.kernel.entry for plan in launches[1:]] == ["conv_reduce_direct"] * (parts > 1)


@pytest.mark.parametrize("layout", ["", "channels_last"], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("groups", [1, 3])
def test_bias_of_a_pointwise_dgrad(groups: int, layout: str, engine: str) -> None:
    """A 1x1 convolution is its own columns: the product itself adds the bias."""
    w = (12, 6 // groups, 1, 1)
    for module in (conv_direct, conv_im2col):
        problem = Problem("pointwise", module, "", (2, 6, 4, 4), w, groups=groups)
        found = check(problem, problem.shape(((0, 0), (0, 0))), engine, layout=layout, ops=DGRAD)
        assert module is conv_direct or not found["conv_dgrad"]


def test_dgrad_is_transposed_convolution(engine: str) -> None:
    """output_padding of a stride and more, as dilation allows it, becomes negative padding."""
    options = {"stride": 2, "padding": 1, "output_padding": (2, 1), "dilation": 3, "groups": 2}
    x, w, bias = (
        made(size, seed, engine) for seed, size in enumerate(((2, 6, 4, 5), (6, 4, 3, 2), (8,)))
    )
    shape = ConvShape.transposed(x.shape, w.shape, bias.shape, **options)
    assert shape.padding[0] == (1, -1) and shape.y_size == tuple(x.shape)
    wanted = F.conv_transpose2d(*(t.double().cpu() for t in (x, w, bias)), **options)
    for module in (conv_direct, conv_im2col):
        got = filled(module, "conv_dgrad", shape, x, w, bias)
        assert_close(got, wanted, TOLERANCE[torch.float32].output, module.__name__)


# ---- negative padding: cropped input ---------------------------------------------------------------------

CROPS: dict[int, list[Padding]] = {
    1: [((-2, -1),), ((-3, 2),)],
    2: [
        ((-1, -1), (-1, 0)),
        ((2, -2), (-3, 4)),
        ((-6, 9), (1, 1)),
    ],  # the last sees nothing of its rows
    3: [((-1, 1), (0, -1), (1, -1))],
}


@problems()
def test_negative_padding_crops(problem: Problem, engine: str) -> None:
    small = replace(problem, w=(*problem.w[:2], *(2,) * len(problem.w[2:])), dilation=1)
    for padding in CROPS[len(problem.x) - 2]:
        check(small, small.shape(padding), engine, ops=("conv_fprop", "conv_wgrad", "conv_dgrad"))


@problems(PLANES)
def test_cropped_elements_have_no_gradient(problem: Problem, engine: str) -> None:
    shape = replace(problem, w=(*problem.w[:2], 2, 2), stride=1, dilation=1).shape(
        ((-2, 0), (1, -3))
    )
    grad_y, w = made(shape.y_size, 3, engine), made(shape.w_size, 2, engine)
    bias = made((shape.C,), 5, engine)
    for added, value in ((None, torch.zeros_like(bias)), (bias, bias)):
        grad_x = filled(problem.module, "conv_dgrad", shape, grad_y, w, added)
        for cropped in (grad_x[:, :, :2], grad_x[..., -3:]):
            assert torch.equal(cropped, value.view(1, -1, 1, 1).expand_as(cropped))
        assert (grad_x[:, :, 2:, :-3] != value.view(1, -1, 1, 1)).all()


# ---- the gradient of a bias, and what is refused ---------------------------------------------------------


def test_bgrad_needs_no_more_than_the_size_of_y(engine: str) -> None:
    grad_y = made((2, 6, 5, 4), 1, engine)
    wanted = grad_y.double().sum((0, 2, 3))
    shapes = [
        ConvShape.of((2, 4, 5, 4), (6, 2, 3, 3), None, 1, ((1, 1), (2, 0)), groups=2, padding_mode="reflect"),
        ConvShape.of((2, 1, 9, 3), (6, 1, 2, 1), None, (2, 1), ((1, 0), (0, 1))),
        ConvShape(2, 6, 6, (5, 4), (1, 1), (1, 1), ((0, 0), (0, 0)), (1, 1)),
    ]  # fmt: skip
    for shape in shapes:
        got = filled(conv_direct, "conv_bgrad", shape, grad_y)
        assert_close(got, wanted, TOLERANCE[torch.float32].gradient, str(shape))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_bgrad_in_parts(engine: str, layout: str) -> None:
    """Few channels of many places: their sums come in parts, which a second launch adds up."""
    for i, (size, dtype) in enumerate(
        (
            ((6, 2, 120, 61), torch.float32),
            ((6, 3, 101, 61), torch.float64),
            ((9, 5, 41, 41), torch.bfloat16),
            ((4, 3, 20000), torch.float16),
        )
    ):
        layout = layout if len(size) > 3 else "contiguous"
        grad_y = laid_out(size, layout, normal(i, dtype)).abs()  # so that sums are large
        grad_y = grad_y.to("cuda" if engine == "cuda" else "cpu")
        shape = ConvShape.of(size, (size[1], size[1], *(1,) * (len(size) - 2)))
        grad_bias = torch.full((size[1],), float("nan"), dtype=dtype, device=grad_y.device)
        with trace() as launches:
            conv_direct.conv_bgrad(shape, grad_y, grad_bias)
        assert [launch.kernel.entry for launch in launches] == [
            "conv_bgrad_direct",
            "conv_reduce_direct",
        ]
        wanted = grad_y.double().flatten(2).sum((0, 2))
        assert_close(grad_bias, wanted, TOLERANCE[dtype].gradient, f"{size} {dtype}")


def test_what_is_refused(engine: str) -> None:
    shape = ConvShape.of((2, 4, 5, 4), (6, 4, 3, 3), None, 1, 1, padding_mode="reflect")
    for module in (conv_direct, conv_im2col):
        assert "expected shape.padded" in module.supports("conv_dgrad", shape, torch.float32)
        assert module.supports("conv_dgrad", shape.padded, torch.float32) is None
    assert "padding_mode zeros" in conv_fold.supports("conv_fold", shape.padded, torch.float32)
    assert "int32" in conv_fold.supports("conv_fold", shape, torch.int32)
    other = NormShape(2, 4, (5, 4))
    assert "NormShape" in conv_fold.supports("conv_fold", other, torch.float32)
    far = ConvShape.of((1, 1, 2), (1, 1, 2), None, 1, ((2**28, 2**28),), padding_mode="replicate")
    assert "padded size" in conv_direct.supports("conv_fprop", far, torch.float32)
    zeros = replace(far, padding_mode="zeros")
    assert conv_direct.supports("conv_fprop", zeros, torch.float32) is None
    assert "values an image" in conv_fold.supports(
        "conv_fold", replace(far, spatial=(2**31,)), torch.float32
    )
    assert "padded size" in conv_fold.supports(
        "conv_fold", replace(far, padding=((2**29, 2**29),)), torch.float32
    )

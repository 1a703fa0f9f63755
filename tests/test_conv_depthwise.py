"""kernels/conv_depthwise.cu and conv_depthwise_large.cu under the emulator, called as the table calls them;
every launch in three thread orders.

The reference is PyTorch's convolution in float64 and autograd through it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from cases import TOLERANCE, ConvCase, assert_close, laid_out, needs_emulator, normal
from cases.base import Ints, Size
from cases.depthwise import DEPTHWISE_CASES
from torch import Tensor

from cnnops.cuda import conv_depthwise, emulate, jit
from cnnops.cuda.kernel import Launch
from cnnops.cuda.launch import trace
from cnnops.epilogue import Epilogue
from cnnops.shapes import ConvShape, NormShape, Padding

pytestmark = needs_emulator

OPS = ("conv_fprop", "conv_dgrad", "conv_wgrad")
LAYOUTS = (
    "contiguous",
    "channels_last",
    "sliced",
    "transposed",
    "expanded",
    "offset",
    "channels_last_offset",
)


@pytest.fixture(autouse=True)
def every_order() -> Iterator[None]:
    with emulate.schedule("all"):
        yield


# ---- one problem -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tensors:
    """Operands of all passes, from numbers that every type can hold, in one layout."""

    shape: ConvShape
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"

    def made(self, size: Sequence[int], seed: int) -> Tensor:
        values = normal(seed, torch.bfloat16)
        return laid_out(tuple(size), self.layout, lambda s: values(s).to(self.dtype))

    @property
    def x(self) -> Tensor:
        return self.made(self.shape.x_size, 1)

    @property
    def w(self) -> Tensor:
        return normal(2, torch.bfloat16)(self.shape.w_size).to(self.dtype)

    @property
    def grad_y(self) -> Tensor:
        return self.made(self.shape.y_size, 3)

    def bias(self, length: int) -> Tensor:
        return normal(4, torch.bfloat16)((length,)).to(self.dtype)

    def result(self, size: Sequence[int]) -> Tensor:
        """As results are laid out: never expanded."""
        layout = "contiguous" if self.layout == "expanded" else self.layout
        return laid_out(
            tuple(size), layout, lambda s: torch.full(s, float("nan"), dtype=self.dtype)
        )


def expected(tensors: Tensors) -> dict[str, Tensor]:
    """The results of all passes in float64, without a bias."""
    shape = tensors.shape
    x, w, grad_y = (t.double().clone() for t in (tensors.x, tensors.w, tensors.grad_y))
    leaves = x.requires_grad_(), w.requires_grad_()
    pads = [p for pair in reversed(shape.padding) for p in pair]
    mode = "constant" if shape.padding_mode == "zeros" else shape.padding_mode
    conv = (F.conv1d, F.conv2d, F.conv3d)[shape.dims - 1]
    y = conv(F.pad(x, pads, mode), w, None, shape.stride, 0, shape.dilation, shape.groups)
    grads = torch.autograd.grad(y, leaves, grad_y)
    return dict(zip(OPS, (y.detach(), *grads), strict=True))


def computed(
    op: str, tensors: Tensors, bias: bool = False, epilogue: Epilogue | None = None
) -> Tensor:
    shape = tensors.shape
    assert conv_depthwise.supports(op, shape, tensors.dtype) is None
    if op == "conv_wgrad":
        grad_w = torch.full(shape.w_size, float("nan"), dtype=tensors.dtype)
        conv_depthwise.conv_wgrad(shape, tensors.grad_y, tensors.x, grad_w)
        return grad_w
    back = op == "conv_dgrad"
    result = tensors.result(shape.x_size if back else shape.y_size)
    added = tensors.bias(result.shape[1]) if bias else None
    source = tensors.grad_y if back else tensors.x
    getattr(conv_depthwise, op)(shape, source, tensors.w, added, result, epilogue)
    return result


def check(tensors: Tensors, ops: Sequence[str] = OPS, slack: float = 1) -> dict[str, list[Launch]]:
    """Compute and compare the passes, fprop and dgrad with a bias. Their launches, by pass."""
    wanted, found = expected(tensors), {}
    for op in ops:
        with trace() as found[op]:
            got = computed(op, tensors, bias=op != "conv_wgrad")
        reference = wanted[op]
        if op != "conv_wgrad":
            channels = reference.shape[1]
            reference = reference + tensors.bias(channels).double().view(
                -1, *(1,) * tensors.shape.dims
            )
        limit = TOLERANCE[tensors.dtype]
        assert_close(
            got, reference, slack * (limit.output if op == "conv_fprop" else limit.gradient), op
        )
    return found


def shape_of(
    x: Size, kernel: Size, stride: Ints = 1, padding: int | Size | Padding = 0, dilation: Ints = 1,
    multiplier: int = 1, mode: str = "zeros",
) -> ConvShape:  # fmt: skip
    filters = (multiplier * x[1], 1, *kernel)
    return ConvShape.of(x, filters, None, stride, padding, dilation, x[1], mode)


def constants(launch: Launch) -> dict[str, str | int]:
    return dict(launch.kernel.constants)


# ---- sizes, types, layouts -------------------------------------------------------------------------------


def shape_of_case(case: ConvCase) -> ConvShape:
    if case.transposed:
        step = case.stride, case.padding, case.output_padding
        return ConvShape.transposed(case.x, case.w, None, *step, case.groups, case.dilation)
    step = case.stride, case.padding, case.dilation
    return ConvShape.of(case.x, case.w, None, *step, case.groups, case.padding_mode)


@pytest.mark.parametrize("case", DEPTHWISE_CASES, ids=lambda case: case.id)
def test_rows(case: ConvCase) -> None:
    for dtype in case.dtypes:
        check(Tensors(shape_of_case(case), dtype, case.layout))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(layout: str) -> None:
    check(Tensors(shape_of((2, 8, 6, 8), (3, 3), 1, 1), layout=layout))


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_padding_modes(mode: str, layout: str) -> None:
    most = {"reflect": 4, "replicate": 7, "circular": 5}[mode]
    shape = shape_of((1, 4, 5, 8), (3, 3), 1, ((most, 1), (2, 1)), mode=mode)
    check(Tensors(shape, layout=layout), ("conv_fprop", "conv_wgrad"))
    assert "shape.padded" in (conv_depthwise.supports("conv_dgrad", shape, torch.float32) or "")


@pytest.mark.parametrize("padding", [((-1, 2), (-2, -1)), ((5, -3), (-4, 6))], ids=str)
def test_negative_padding_crops(padding: Padding) -> None:
    layout = "contiguous" if padding[0][0] > 0 else "channels_last"
    check(Tensors(shape_of((1, 4, 8, 12), (3, 2), (1, 2), padding), layout=layout))


def test_mixed_layouts() -> None:
    """x channels-last and y contiguous: any strides are right."""
    shape = shape_of((2, 4, 6, 8), (3, 3), 1, 1)
    tensors = Tensors(shape)
    y = tensors.result(shape.y_size)
    x = tensors.x.contiguous(memory_format=torch.channels_last)
    conv_depthwise.conv_fprop(shape, x, tensors.w, None, y)
    assert_close(y, expected(tensors)["conv_fprop"], TOLERANCE[torch.float32].output, "y")


@pytest.mark.parametrize("x, kernel", [((2, 4, 5, 8), (3, 4)), ((2, 3, 200), (4,))], ids=str)
def test_rows_of_odd_length(x: Size, kernel: Size) -> None:
    """Pairs of columns are read at once, though results are written one by one."""
    for dtype in (torch.float32, torch.bfloat16):
        found = check(Tensors(shape_of(x, kernel), dtype), ("conv_fprop", "conv_wgrad"))
        for launches in found.values():
            widths = [constants(launches[0])[name] for name in ("TILE", "X_VEC", "Y_VEC")]
            assert widths == [2, 2, 1]


def test_partial_sums_lie_as_lanes_write_them() -> None:
    """In channels-last filters are neighbours: each sector of a partial gradient is written once."""
    shape = shape_of((8, 64, 14, 14), (3, 3), 1, 1)
    tensors = Tensors(shape, layout="channels_last")
    with emulate.schedule("forward"), emulate.profile() as profiles:
        computed("conv_wgrad", tensors)
    first, second = profiles
    (written,) = (t for t in first.tensors if t.writes)
    (read,) = (t for t in second.tensors if not t.writes)
    assert written.requested == written.sectors and read.requested == read.sectors


def test_offsets_beyond_31_bits() -> None:
    shape = shape_of((2, 4, 5, 8), (3, 3), 1, 1)
    tensors = Tensors(shape)
    far = tensors.x.as_strided(shape.x_size, (0, *tensors.x.stride()[1:]))
    plan = conv_depthwise._plan(
        "fprop", shape, torch.float32, ((2**31, *far.stride()[1:]), 16), tensors.w.stride(),
        conv_depthwise.layout_of(tensors.grad_y), "none",
    )  # fmt: skip
    assert constants(plan.first)["INDEX"] == "long long"
    one = shape_of((1, 4, 1, 8), (1, 3), 1, (0, 1))
    x = Tensors(one).x
    y = torch.empty(one.y_size)
    with trace() as launches:
        conv_depthwise.conv_fprop(
            one, x.as_strided(one.x_size, (2**33, 8, 2**33, 1)), Tensors(one).w, None, y
        )
    assert_close(y, expected(Tensors(one))["conv_fprop"], TOLERANCE[torch.float32].output, "y")
    assert launches


def test_large_kernel_with_a_padding_mode() -> None:
    shape = shape_of((1, 4, 12, 12), (9, 9), 1, 4, multiplier=2, mode="circular")
    for layout in ("contiguous", "channels_last"):
        check(Tensors(shape, layout=layout), ("conv_fprop", "conv_wgrad"))


def test_large_kernel_in_half_precision() -> None:
    for layout in ("channels_last", "offset"):
        check(Tensors(shape_of((2, 4, 11, 13), (9, 7), 1, 3), torch.bfloat16, layout))


def test_what_is_refused() -> None:
    def reason(shape: ConvShape | NormShape, dtype: torch.dtype = torch.float32) -> str:
        return conv_depthwise.supports("conv_fprop", shape, dtype) or ""

    plain = shape_of((2, 4, 6, 8), (3, 3))
    assert not reason(plain) and "dtype" in reason(plain, torch.int32)
    assert "expected a convolution" in reason(NormShape(2, 4, (5, 4)))
    assert "groups" in reason(ConvShape.of((2, 4, 6, 8), (4, 2, 3, 3), groups=2))
    assert "groups" in reason(ConvShape.of((2, 1, 6, 8), (4, 1, 3, 3)))
    assert "taps" in reason(shape_of((1, 2, 20, 20), (9, 9), 2))
    assert "taps" in reason(shape_of((1, 2, 1, 400), (1, 80)))
    assert "along h" in reason(shape_of((1, 2, 20, 20), (3, 3), 2, 0, 2))


# ---- what follows the sums ---------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("op", ["conv_fprop", "conv_dgrad"])
def test_epilogue(op: str, layout: str) -> None:
    for dtype, activation in ((torch.float32, "silu"), (torch.bfloat16, "relu6")):
        tensors = Tensors(shape_of((2, 8, 6, 8), (3, 3), 1, 1), dtype, layout)
        plain = expected(tensors)[op]
        residual = laid_out(plain.shape, layout, normal(7, dtype))
        scale, bias = normal(8, dtype)((8,)), tensors.bias(8)
        stretched = (t.double().view(-1, 1, 1) for t in (scale, bias))
        act = {"silu": F.silu, "relu6": F.relu6}[activation]
        wanted = act(plain * next(stretched) + next(stretched) + residual.double())
        got = computed(op, tensors, True, Epilogue(scale, residual, activation))
        assert_close(got, wanted, TOLERANCE[dtype].gradient, f"{op}, {activation}")


def test_residual_off_alignment() -> None:
    """A residual that narrower packs alone can read."""
    tensors = Tensors(shape_of((1, 4, 6, 8), (3, 3), 1, 1))
    residual = laid_out(tensors.shape.y_size, "offset", normal(7, torch.float32))
    got = computed("conv_fprop", tensors, False, Epilogue(residual=residual))
    wanted = expected(tensors)["conv_fprop"] + residual.double()
    assert_close(got, wanted, TOLERANCE[torch.float32].output, "y")


def test_moments() -> None:
    tensors = Tensors(shape_of((2, 8, 6, 8), (3, 3), 1, 1), torch.bfloat16)
    mean, var = torch.empty(8), torch.empty(8)
    y = computed("conv_fprop", tensors, False, Epilogue(mean=mean, var=var)).double()
    assert_close(mean, y.mean((0, 2, 3)), 1e-6, "mean")
    assert_close(var, y.var((0, 2, 3), correction=0), 1e-6, "var")


# ---- sums in parts, and in one order -------------------------------------------------------------------


@pytest.mark.parametrize("kernel", [3, 9])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_parts_of_wgrad(layout: str, kernel: int) -> None:
    tensors = Tensors(shape_of((3, 8, 12, 16), (kernel, kernel), 1, kernel // 2), layout=layout)
    launches = check(tensors, ("conv_wgrad",), slack=2)["conv_wgrad"]
    assert [launch.kernel.entry for launch in launches][1:] == ["conv_reduce_depthwise"]
    assert torch.equal(computed("conv_wgrad", tensors), computed("conv_wgrad", tensors))


# ---- counts --------------------------------------------------------------------------------------------


# What L1 is asked for, of the least that memory moves: the result once, and of the source a tile's columns
# (NCHW: three packs) in each row of its strip.
@pytest.mark.parametrize(
    ("layout", "dtype", "kernel", "stride", "asked"),
    [
        ("contiguous", torch.float32, 3, 1, 2.1), ("contiguous", torch.float32, 7, 1, 2.1),
        ("channels_last", torch.bfloat16, 3, 1, 1.35), ("channels_last", torch.bfloat16, 3, 2, 1.25),
        ("channels_last", torch.bfloat16, 7, 1, 1.6),
    ],
)  # fmt: skip
def test_traffic(
    layout: str, dtype: torch.dtype, kernel: int, stride: int, asked: float, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    monkeypatch.setattr(conv_depthwise, "SMS", 3)  # for a batch of 1, as 132 are for one of 44
    conv_depthwise._plan.cache_clear()
    tensors = Tensors(
        shape_of((1, 64, 56, 56), (kernel, kernel), stride, kernel // 2), dtype, layout
    )
    size = dtype.itemsize
    with emulate.schedule("forward"):
        for op in OPS if stride == 1 else OPS[1:2]:
            with emulate.profile() as profiles:
                computed(op, tensors)
            lines = [t for t in profiles[0].traffic if not t.shared]
            least = size * (tensors.x.numel() + tensors.grad_y.numel())
            assert 32 * sum(t.least for t in lines) <= asked * least, op
            if op == "conv_wgrad":
                continue
            written = size * (tensors.x if op == "conv_dgrad" else tensors.grad_y).numel()
            assert 32 * sum(t.units for t in lines if t.writes) == written, (
                "sectors in parts, or twice"
            )
            # Staging filters may collide; the walk itself does not touch shared memory.
            assert profiles[0].bank_conflicts <= 0.05 * 2.5 * sum(t.units for t in lines), op
    conv_depthwise._plan.cache_clear()


def test_large_kernels_do_not_collide() -> None:
    """Loads of four neighbours, rows of lanes and planes of channels an odd number of packs apart."""
    for layout in ("contiguous", "channels_last"):
        tensors = Tensors(shape_of((1, 16, 32, 32), (9, 9), 1, 4), layout=layout)
        with emulate.schedule("forward"), emulate.profile() as profiles:
            computed("conv_fprop", tensors)
        reads = [t for t in profiles[0].traffic if t.shared and not t.writes]
        assert sum(t.units for t in reads) <= 1.01 * sum(t.least for t in reads)


def test_no_spills() -> None:
    pytest.importorskip("cuda.bindings")
    for arch, kernel, stride, dtype, layout in (
        ("80", 3, 1, torch.bfloat16, "channels_last"), ("90a", 5, 2, torch.float32, "channels_last"),
        ("80", 7, 1, torch.bfloat16, "contiguous"), ("90a", 31, 1, torch.float32, "contiguous"),
    ):  # fmt: skip
        shape = shape_of((32, 96, 56, 56), (kernel, kernel), stride, kernel // 2)
        inner = layout == "channels_last"
        form = torch.channels_last if inner else torch.contiguous_format
        strides = [
            torch.empty(size, device="meta", memory_format=form).stride()
            for size in (shape.x_size, shape.y_size)
        ]
        w = torch.empty(shape.w_size, device="meta").stride()
        for op in ("fprop", "dgrad", "wgrad"):
            plan = conv_depthwise._plan(
                op, shape, dtype, (strides[0], 16), w, (strides[1], 16), "none"
            )
            _, log = jit.compile_cubin(plan.first.kernel.source, plan.first.kernel.constants, arch)
            (entry,) = jit.resources(log)
            assert entry.spill_store_bytes == entry.stack_bytes == 0, plan.first.kernel

"""The byte budgets of the kernel guide: ``python docs/budgets.py`` writes them; with ``--check`` it compares.

A budget is what no kernel can do without: every tensor read or written once, and the arithmetic of the plain
algorithm. Sizes come from `cnnops.shapes`, ceilings from `cnnops.summary.GPUS`; nothing here was measured.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
if __name__ == "__main__":
    sys.path[0] = str(HERE.parent)

from cnnops.shapes import (  # noqa: E402
    ConvShape,
    GroupShape,
    LayerShape,
    NormShape,
    PoolShape,
    UnpoolShape,
)
from cnnops.summary import GPUS  # noqa: E402

H100 = GPUS["h100"]
ITEMSIZE = {"fp32": 4, "tf32": 4, "bf16": 2}
PRECISION = {"fp32": "float32", "tf32": "tf32", "bf16": "bfloat16"}
HEAD = [
    "| layer | pass | type | moved | arithmetic | memory takes | arithmetic takes |",
    "| --- | --- | --- | --: | --: | --: | --: |",
]


@dataclass(frozen=True)
class Budget:
    """A layer in one pass and type, the bytes that it must move, and its operations if they count."""

    layer: str
    direction: str
    dtype: str
    moved: int
    flops: int = 0

    def line(self) -> str:
        memory = self.moved / H100.bytes_per_s
        work = self.flops / H100.flops_per_s[PRECISION[self.dtype]]
        cells = [self.layer, self.direction, self.dtype, f"{self.moved / 1e6:.0f} MB"]
        cells += [f"{self.flops / 1e9:.1f} GFLOP" if self.flops else "–"]
        times = [_microseconds(memory), _microseconds(work) if self.flops else "–"]
        binds = 1 if work > memory else 0
        times[binds] = f"**{times[binds]}**"
        return f"| {' | '.join(cells + times)} |"


def _microseconds(seconds: float) -> str:
    return f"{seconds * 1e6:.3g} µs"


def _conv(layer: str, shape: ConvShape, *types: str) -> list[Budget]:
    """All three passes move the same tensors and do the same arithmetic."""
    return [
        Budget(layer, "each", t, shape.bytes_moved("fprop", ITEMSIZE[t]), shape.flops)
        for t in types
    ]


def _dense(size: int, channels: int, taps: int, images: int = 32) -> ConvShape:
    return ConvShape.of(
        (images, channels, size, size), (channels, channels, taps, taps), padding=taps // 2
    )


def _depthwise(size: int, channels: int, taps: int, images: int = 32) -> ConvShape:
    return ConvShape.of(
        (images, channels, size, size),
        (channels, 1, taps, taps),
        padding=taps // 2,
        groups=channels,
    )


def _norm(layer: str, shape: NormShape | GroupShape | LayerShape) -> list[Budget]:
    """Statistics held on the chip: x read and y written; grad_y and x read, grad_x written."""
    return [
        Budget(layer, name, t, shape.bytes_moved(ITEMSIZE[t], reads, 1))
        for t in ("fp32", "bf16")
        for name, reads in (("fwd", 1), ("bwd", 2))
    ]


def budgets() -> dict[str, list[Budget]]:
    """By kernel file, each for a layer of a real network or of the size that its file's header speaks of."""
    resnet = "ResNet-50 layer1, 3x3, 64@56x56, N 32"
    middle = _dense(56, 64, 3)
    columns = middle.N * 64 * 9 * 56 * 56
    pooled = PoolShape.of((32, 64, 112, 112), 3, stride=2, padding=1)
    stem = "ResNet-50 stem, 3x3 stride 2, 64@112x112, N 32"
    unpooled = UnpoolShape.of((32, 64, 56, 56), (32, 64, 56, 56), (112, 112))
    folded = 4 * 32 * 64 * (58 * 58 + 56 * 56)
    return {
        "conv_direct.cu": _conv(resnet, middle, "fp32"),
        "conv_igemm.cu": _conv(resnet, middle, "tf32", "bf16"),
        "conv_igemm_planes.cu": _conv(resnet, middle, "tf32", "bf16"),
        "conv_igemm_sm90.cu": _conv(
            "ResNet-50 layer3, 3x3, 256@14x14, N 32", _dense(14, 256, 3), "tf32", "bf16"
        ),
        "conv_im2col.cu": [
            Budget(f"{resnet}: in place", "fprop", "fp32", middle.bytes_moved("fprop", 4), middle.flops),
            Budget("the same through columns", "fprop", "fp32",
                   middle.bytes_moved("fprop", 4) + 2 * 4 * columns, middle.flops),
        ],
        "conv_depthwise.cu":
            _conv("MobileNetV2 stage 2, 3x3, 144@56x56, N 32", _depthwise(56, 144, 3), "fp32")
        + _conv("ConvNeXt-T stage 1, 7x7, 96@56x56, N 32", _depthwise(56, 96, 7), "fp32"),
        "conv_depthwise_large.cu": _conv("31x31, 384@32x32, N 64", _depthwise(32, 384, 31, 64), "fp32"),
        "conv_fold.cu": [Budget("64@56x56, pad 1, N 32", "dgrad", "fp32", folded)],
        "pool.cu": [
            Budget(f"{stem}, max", name, t, pooled.bytes_moved(ITEMSIZE[t], 1))
            for t in ("fp32", "bf16") for name in ("fwd", "bwd")
        ],
        "unpool.cu": [Budget("64@56x56 to 112x112, N 32", "fwd", "fp32", unpooled.bytes_moved(4))],
        "batch_norm.cu": _norm("256@56x56, N 32, training", NormShape.of((32, 256, 56, 56), training=True)),
        "group_norm.cu": _norm("32 groups of 256@28x28, N 8", GroupShape.of((8, 256, 28, 28), 32))
        + _norm("layer norm over C = 96, 56x56, N 8", LayerShape.of((8, 56, 56, 96), (96,))),
    }  # fmt: skip


def rewritten(text: str) -> str:
    """A page with the table behind each ``<!-- budget: FILE -->`` made new."""
    for file, lines in budgets().items():
        begin, end = f"<!-- budget: {file} -->", "<!-- end -->"
        before, found, rest = text.partition(begin)
        if found:
            table = "\n".join([*HEAD, *(line.line() for line in lines)])
            text = f"{before}{begin}\n\n{table}\n\n{end}{rest.partition(end)[2]}"
    return text


def main() -> int:
    stale = []
    for path in sorted((HERE / "kernels").glob("*.md")):
        text = path.read_text(encoding="utf-8")
        if (renewed := rewritten(text)) != text:
            stale.append(path.name)
            if "--check" not in sys.argv:
                path.write_text(renewed, encoding="utf-8")
    if stale:
        print(f"{', '.join(stale)}: {'stale' if '--check' in sys.argv else 'written'}")
    return 1 if stale and "--check" in sys.argv else 0


if __name__ == "__main__":
    sys.exit(main())

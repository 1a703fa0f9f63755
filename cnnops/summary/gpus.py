"""What GPUs can do at best, by their data sheets: the ceilings that floors of times are computed with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """Bytes a second from memory, and flops a second by precision: dtypes and "tf32".

    float32 is ordinary arithmetic; all others are tensor cores' rates, without sparsity.
    """

    name: str
    bytes_per_s: float
    flops_per_s: Mapping[str, float]
    source: str

    def sentence(self, precisions: Iterable[str]) -> str:
        """Which ceilings a floor was computed with."""
        flops = (f"{self.flops_per_s[p] / 1e12:g} TFLOP/s in {p}" for p in precisions)
        return ", ".join([f"{self.name}: {self.bytes_per_s / 1e12:g} TB/s", *flops, self.source])


def _gpu(
    name: str,
    terabytes: float,
    float32: float,
    tf32: float,
    half: float,
    float64: float,
    sheet: str,
) -> Gpu:
    teraflops = {
        "float32": float32, "tf32": tf32, "float16": half, "bfloat16": half, "float64": float64
    }  # fmt: skip
    flops = {precision: value * 1e12 for precision, value in teraflops.items()}
    return Gpu(name, terabytes * 1e12, flops, f"by NVIDIA's data sheet of the {sheet}")


GPUS: dict[str, Gpu] = {
    "h100": _gpu("H100 SXM 80 GB", 3.35, 67, 494.5, 989, 67, "H100"),
    "h100-pcie": _gpu("H100 PCIe 80 GB", 2.0, 51, 378, 756, 51, "H100"),
    "h200": _gpu("H200 SXM 141 GB", 4.8, 67, 494.5, 989, 67, "H200"),
    "a100": _gpu("A100 SXM 80 GB", 2.039, 19.5, 156, 312, 19.5, "A100"),
    "a100-40gb": _gpu("A100 SXM 40 GB", 1.555, 19.5, 156, 312, 19.5, "A100"),
}
"""Names on the command line."""

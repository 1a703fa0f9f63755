"""`cnnops demo`: LeNet-5 learns real digits on these kernels, and is held against stock PyTorch.

`prepare` checks all that a user may have got wrong before any work is done. `run` tells the story in
order: train, compare with stock layers, send digits through the CUDA kernels, draw, count what was
compiled.
"""

from __future__ import annotations

import importlib.util
import os
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import cnnops
from cnnops import data, info
from cnnops.demo import figure
from cnnops.demo.training import evaluate, train
from cnnops.models import LENETS, LeNet

if TYPE_CHECKING:
    from rich.console import Console

ENGINES = ("cuda", "cpu", "aten")
TOLERANCE = 1e-4
"""Largest ``|ours - stock| / |stock|`` (norms over all logits) that counts as agreement in float32."""
CHECKED_DIGITS = 16


@dataclass(frozen=True)
class Plan:
    """All that a run needs, checked. `note` tells why the engine is not the one a user may expect."""

    engine: str
    model: str
    epochs: int
    digits: data.Digits
    seed: int
    out: Path
    note: str = ""


def prepare(
    engine: str | None, model: str, epochs: int | None, folder: Path | None, seed: int, out: Path
) -> Plan:
    """The checked plan. Raises ValueError, with a line fit for the user, for whatever cannot work.

    `engine` None is the one ``CNNOPS_ENGINE`` names, else cuda where it works, else cpu. `folder` None is
    scikit-learn's digits. `epochs` None is 12 on those; MNIST has forty times the images, so 3 there.
    """
    if model not in LENETS:
        raise ValueError(f"--model: expected one of {', '.join(LENETS)}, got {model!r}")
    if epochs is not None and epochs < 1:
        raise ValueError(f"--epochs: expected at least 1, got {epochs}")
    if not 0 <= seed < 2**63:
        raise ValueError(f"--seed: expected 0 to 2**63 - 1, got {seed}")
    if out.is_dir() or not out.parent.is_dir():
        raise ValueError(f"--out: expected a file in a folder that exists, got {out}")
    if not os.access(out if out.exists() else out.parent, os.W_OK):
        raise ValueError(f"--out: expected a place that can be written, got {out}")
    for name in ("matplotlib",) if folder else ("matplotlib", "sklearn"):
        if importlib.util.find_spec(name) is None:
            raise ValueError(f"the demo needs {name}: pip install 'cnnops[demo]'")
    chosen, note = _choose_engine(engine or os.environ.get("CNNOPS_ENGINE"))
    digits = data.mnist(folder) if folder else data.scikit_digits()
    return Plan(chosen, model, epochs or (3 if folder else 12), digits, seed, out, note)


def _choose_engine(wish: str | None) -> tuple[str, str]:
    """The engine to train with, and a note where a GPU is there but cannot be used."""
    if wish and wish not in ENGINES:
        raise ValueError(f"--engine: expected one of {', '.join(ENGINES)}, got {wish!r}")
    reason = info.unavailable("cuda")
    if wish == "cuda" and reason is not None:
        raise ValueError(f"engine 'cuda': {reason}")
    if wish:
        return wish, ""
    if reason is None:
        return "cuda", ""
    return "cpu", f"the GPU is left out: {reason}" if info.gpu() else ""


def run(plan: Plan, console: Console) -> bool:
    """Tell the whole story; True when every comparison agreed."""
    digits, start = plan.digits, info.kernel_counts()
    console.print(
        f"{plan.model} on {digits.source}: {len(digits.train_labels)} to learn from, "
        f"{len(digits.test_labels)} to test on; engine {plan.engine}, seed {plan.seed}"
    )
    if plan.note:
        console.print(plan.note)

    # "error": were a layer to fall back to PyTorch, the comparison below would hold PyTorch against itself.
    with cnnops.engine(plan.engine), cnnops.fallback("error"):
        model, history = train(
            plan.model, digits, plan.epochs, plan.seed, _device(plan.engine), console
        )
        with _all_bits():
            logits = evaluate(model, digits.test_images)
    predicted = logits.argmax(1)
    hits = int((predicted == digits.test_labels).sum())
    later = statistics.median(history.seconds[1:] or history.seconds)
    console.print(
        f"\ntest accuracy   {100 * hits / len(predicted):.2f} % ({hits} of {len(predicted)})"
        f" after {sum(history.seconds):.1f} s of training"
        f"\ntime per epoch  {later:.2f} s (the first {history.seconds[0]:.2f} s)"
    )

    stock = LENETS[plan.model](layers=nn)
    stock.load_state_dict(model.state_dict())
    reference = evaluate(stock, digits.test_images)
    agreed = _compare(
        console, "stock PyTorch", "the same weights in torch.nn's layers", logits, reference
    )
    agreed &= _check_kernels(
        console, model, digits.test_images[:CHECKED_DIGITS], reference[:CHECKED_DIGITS]
    )

    figure.save(plan.out, plan.model, history, model.conv1.weight, predicted, digits.test_labels)
    console.print(
        f"\nsaved {plan.out.resolve()}: loss curve, first-layer filters, confusion matrix"
    )
    console.print(info.kernel_counts().since(start).sentence())
    return agreed


def _device(engine: str) -> torch.device:
    return torch.device("cuda" if engine == "cuda" else "cpu")


@contextmanager
def _all_bits() -> Iterator[None]:
    """Convolutions multiply float32 as it is, though torch may let them use TF32: for comparisons."""
    libraries: Any = torch.backends  # whose types know of no conv
    backends = libraries.cudnn.conv, libraries.mkldnn.conv
    former = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in zip(backends, former, strict=True):
            backend.fp32_precision = precision


def _compare(console: Console, label: str, what: str, logits: Tensor, reference: Tensor) -> bool:
    """Print how far apart the logits are, and whether that is agreement."""
    agreed = bool((logits - reference).norm() <= TOLERANCE * reference.norm())
    largest = (logits - reference).abs().max().item()
    console.print(
        f"{label:<16}{what} {'agree' if agreed else 'DISAGREE'}: "
        f"largest difference {largest:.1e}, logits reach {reference.abs().max().item():.1f}"
    )
    return agreed


def _check_kernels(console: Console, model: LeNet, images: Tensor, reference: Tensor) -> bool:
    """Send `images` through the CUDA kernels, on the GPU or else under the emulator, and compare."""
    engine = next((e for e in ("cuda", "emulate") if info.unavailable(e) is None), None)
    if engine is None:
        console.print(f"CUDA kernels    not run: {info.unavailable('emulate')}")
        return True
    where = "on the GPU" if engine == "cuda" else "under the emulator"
    with _all_bits(), cnnops.engine(engine), cnnops.fallback("error"):
        logits = evaluate(model.to(_device(engine)), images)
    return _compare(
        console, "CUDA kernels", f"{len(images)} test digits {where}", logits, reference
    )

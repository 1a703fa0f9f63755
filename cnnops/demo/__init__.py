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
from cnnops import info
from cnnops.data import DataError, DataSet
from cnnops.data.digits import idx_files, scikit
from cnnops.demo import figure
from cnnops.files import check_writable
from cnnops.models import LENETS
from cnnops.training import network
from cnnops.training.loop import Training
from cnnops.training.plan import Recipe, checked, choose_engine

if TYPE_CHECKING:
    from rich.console import Console

PEAK_RATE = {"lenet5": 2e-3, "lenet5-original": 8e-3}
TOLERANCE = 1e-4
"""Largest ``|ours - stock| / |stock|`` (norms over all logits) that counts as agreement in float32."""
CHECKED_DIGITS = 16


@dataclass(frozen=True)
class Plan:
    """All that a run needs, checked. `note` tells why the engine is not the one a user may expect."""

    recipe: Recipe
    digits: DataSet
    out: Path
    note: str = ""


def prepare(
    engine: str | None, model: str, epochs: int | None, folder: Path | None, seed: int, out: Path
) -> Plan:
    """The checked plan. Raises ValueError, with a line fit for the user, for whatever cannot work.

    `engine` None is the one ``CNNOPS_ENGINE`` names, else cuda where it works, else cpu. `folder` None is
    scikit-learn's digits. `epochs` None is 12 on those; MNIST has forty times the images, so 3 there.

    On the CPU one thread does it all: a batch is too little work to share, and threads on a busy machine
    would mostly wait for one another. It also makes the result the same for any number of cores.
    """
    if model not in LENETS:
        raise ValueError(f"--model: expected one of {', '.join(LENETS)}, got {model!r}")
    chosen, note = choose_engine(engine or os.environ.get("CNNOPS_ENGINE"))
    if epochs is None:
        epochs = 3 if folder else 12
    size = LENETS[model].input_size
    recipe = checked(
        Recipe(
            model, str(folder or ""), epochs, rate=PEAK_RATE[model], engine=chosen, seed=seed,
            channels=1, size=size,
        )
    )  # fmt: skip
    check_writable(out, "--out")
    for name in ("matplotlib",) if folder else ("matplotlib", "sklearn"):
        if importlib.util.find_spec(name) is None:
            raise ValueError(f"the demo needs {name}: pip install 'cnnops[demo]'")
    if folder and not folder.is_dir():
        raise DataError(f"data: expected a folder with MNIST's files, got {folder}")
    return Plan(recipe, idx_files(folder, 1, size) if folder else scikit(1, size), out, note)


def run(plan: Plan, console: Console) -> bool:
    """Tell the whole story; True when every comparison agreed. Raises ValueError where it cannot draw."""
    recipe, digits, start = plan.recipe, plan.digits, info.kernel_counts()
    console.print(
        f"{recipe.model} on {digits.source}: {len(digits.train)} to learn from, "
        f"{len(digits.test)} to test on; engine {recipe.engine}, seed {recipe.seed}"
    )
    if plan.note:
        console.print(plan.note)

    images, truth = digits.test.images(torch.arange(len(digits.test))), digits.test.labels
    training = Training(recipe, digits)
    model, record = training.model, training.record
    # "error": were a layer to fall back to PyTorch, the comparison below would hold PyTorch against itself.
    with cnnops.fallback("error"):
        training.run(console)
        with _all_bits(), cnnops.engine(recipe.engine):
            logits = logits_of(model, images)
    predicted = logits.argmax(1)
    hits = int((predicted == truth).sum())
    later = statistics.median(record.seconds[1:] or record.seconds)
    console.print(
        f"\ntest accuracy   {100 * hits / len(predicted):.2f} % ({hits} of {len(predicted)})"
        f" after {sum(record.seconds):.1f} s of training"
        f"\ntime per epoch  {later:.2f} s (the first {record.seconds[0]:.2f} s)"
    )

    stock = LENETS[recipe.model](layers=nn)
    stock.load_state_dict(model.state_dict())
    reference = logits_of(stock, images)
    agreed = _compare(
        console, "stock PyTorch", "the same weights in torch.nn's layers", logits, reference
    )
    agreed &= _check_kernels(console, model, images[:CHECKED_DIGITS], reference[:CHECKED_DIGITS])

    filters = network.first_filters(model)
    assert filters is not None
    figure.save(plan.out, recipe.model, record, filters, predicted, truth)
    console.print(
        f"\nsaved {plan.out.resolve()}: loss curve, first-layer filters, confusion matrix"
    )
    console.print(info.kernel_counts().since(start).sentence())
    return agreed


@torch.no_grad()
def logits_of(model: nn.Module, images: Tensor, batch: int = 256) -> Tensor:
    """The model's logits ``N x 10`` for images ``N x 1 x H x W``, on the CPU."""
    device = next(model.parameters()).device
    return torch.cat([model(x.to(device)).cpu() for x in images.split(batch)])


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


def _check_kernels(console: Console, model: nn.Module, images: Tensor, reference: Tensor) -> bool:
    """Send `images` through the CUDA kernels, on the GPU or else under the emulator, and compare."""
    engine = next((e for e in ("cuda", "emulate") if info.unavailable(e) is None), None)
    if engine is None:
        console.print(f"CUDA kernels    not run: {info.unavailable('emulate')}")
        return True
    where = "on the GPU" if engine == "cuda" else "under the emulator"
    with _all_bits(), cnnops.engine(engine), cnnops.fallback("error"):
        logits = logits_of(model.to("cuda" if engine == "cuda" else "cpu"), images)
    return _compare(
        console, "CUDA kernels", f"{len(images)} test digits {where}", logits, reference
    )

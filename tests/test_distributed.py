"""`cnnops train` in several processes, started by torchrun: the curve of one, and no waiting for the dead."""

from __future__ import annotations

import csv
import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from small_networks import write_digits

from cnnops.data.digits import idx_files
from cnnops.training.batches import OrderedBatches, ShuffledBatches, mixed
from cnnops.training.loop import Training
from cnnops.training.plan import Recipe

pytest.importorskip("matplotlib", reason="matplotlib is missing: pip install 'cnnops[demo]'")
Console = pytest.importorskip("rich.console").Console
needs_processes = pytest.mark.skipif(
    sys.platform != "linux" or not (dist.is_available() and dist.is_gloo_available()),
    reason="needs Linux and a torch with gloo",
)


def torchrun(processes: int, data: Path, out: Path, *more: str) -> subprocess.Popen[str]:
    """On a port of its own choosing."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    arguments = ["--engine", "cpu", "--threads", "1", "--data", str(data), "--out", str(out)]
    return subprocess.Popen(
        [*command, str(processes), "-m", "cnnops", "train", "small_networks:tiny", *arguments, *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parent,
        env={**os.environ, "CNNOPS_POLICY": "own", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


EPOCHS, BATCH, RATE = 2, 96, 0.02
CURVE = (
    "--epochs",
    EPOCHS,
    "--batch",
    BATCH,
    "--rate",
    RATE,
    "--optimizer",
    "sgd",
    "--dropout",
    "0",
)
"""Dropout is a matter of the process: without it, the curve is not."""


@pytest.fixture(scope="module")
def noise(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_digits(tmp_path_factory.mktemp("data") / "noise", 1000)


@pytest.fixture(scope="module")
def alone(noise: Path) -> Training:
    """Trained in one process, on whole batches."""
    recipe = Recipe(
        "small_networks:tiny", epochs=EPOCHS, batch=BATCH, optimizer="sgd", rate=RATE, dropout=0.0,
        channels=1, size=(28, 28),
    )  # fmt: skip
    training = Training(recipe, idx_files(noise))
    training.run(Console(file=io.StringIO()))
    return training


@needs_processes
@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_the_curve_of_one_process(
    processes: int, alone: Training, noise: Path, tmp_path: Path
) -> None:
    child = torchrun(processes, noise, tmp_path, *map(str, CURVE))
    printed, errors = child.communicate(timeout=300)
    assert child.returncode == 0, errors
    assert f"engine cpu, {processes} processes" in printed
    assert printed.count("\nepoch 1/2") == printed.count("\nsaved in") == 1, "one process speaks"
    with open(tmp_path / "steps.csv") as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file)]
    expected = torch.tensor(alone.record.losses, dtype=torch.float64)
    assert len(losses) == 20
    torch.testing.assert_close(torch.tensor(losses).double(), expected, rtol=1e-4, atol=0)
    kept = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    for name, weight in alone.model.state_dict().items():  # those of batch norm, too
        torch.testing.assert_close(kept["model"][name], weight, rtol=1e-3, atol=1e-4, msg=name)
    images = float(kept["record"]["accuracies"][-1]) * 100
    assert abs(images - alone.record.accuracies[-1] * 100) < 1.5


def workers(launcher: int) -> dict[int, int]:
    """Process numbers of torchrun's children, by rank."""
    found = {}
    for child in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        for entry in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            if entry.startswith(b"RANK="):
                found[int(entry[5:])] = int(child)
    return found


@needs_processes
@pytest.mark.slow
def test_the_end_of_one_ends_the_others(noise: Path, tmp_path: Path) -> None:
    child = torchrun(2, noise, tmp_path, "--epochs", "5000", "--batch", "32")
    assert child.stdout is not None
    for line in child.stdout:
        if line.startswith("epoch"):
            break
    os.kill(workers(child.pid)[1], signal.SIGKILL)
    began = time.monotonic()
    _, errors = child.communicate(timeout=60)
    assert child.returncode != 0 and time.monotonic() - began < 60
    assert "cnnops train (process 0): another process has ended, or does not answer" in errors
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] >= 31


# ---- who gets which images -------------------------------------------------------------------------------


class Numbers:
    """A split whose images are their own numbers."""

    def __init__(self, images: int) -> None:
        self.labels = torch.arange(images)

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, index: int) -> torch.Tensor:
        return torch.full((1, 1, 1), float(index))

    def images(self, indices: torch.Tensor) -> torch.Tensor:
        return indices.float().view(-1, 1, 1, 1)


def unchanged(images: torch.Tensor, *_: object) -> torch.Tensor:
    return images


def epoch(batches: ShuffledBatches, number: int) -> Iterator[list[int]]:
    for step in range(number * batches.an_epoch, (number + 1) * batches.an_epoch):
        images, labels = batches[step]
        assert images.flatten().tolist() == labels.tolist()
        yield labels.tolist()


def test_parts_are_the_batch() -> None:
    split = Numbers(70)
    whole = ShuffledBatches(split, 16, 5, unchanged)
    assert (whole.batch, whole.an_epoch) == (16, 4)
    orders = [list(epoch(whole, number)) for number in range(3)]
    for order in orders:
        seen = [index for batch in order for index in batch]
        assert len(seen) == len(set(seen)) == 64, "no image twice an epoch, six left out"
    assert orders[0] != orders[1] != orders[2]
    assert orders[0] == list(epoch(ShuffledBatches(split, 16, 5, unchanged), 0))
    assert orders[0] != list(epoch(ShuffledBatches(split, 16, 6, unchanged), 0))
    for world in (2, 4):
        parts = [ShuffledBatches(split, 16, 5, unchanged, rank, world) for rank in range(world)]
        joined = [sum(batch, []) for batch in zip(*(epoch(p, 1) for p in parts), strict=True)]
        assert joined == orders[1]
    few = ShuffledBatches(Numbers(7), 16, 5, unchanged, 1, 2)
    assert (few.batch, few.an_epoch) == (6, 1), "fewer than a batch are one, as even as can be"


def test_all_test_images_are_seen_once() -> None:
    for world in (1, 3):
        parts = [OrderedBatches(Numbers(20), 4, rank, world) for rank in range(world)]
        seen = [i for part in parts for _, labels in part.all() for i in labels.tolist()]
        assert sorted(seen) == list(range(20))


def test_seeds_are_far_apart() -> None:
    seeds = {
        mixed(seed, step, rank) for seed in range(4) for step in range(50) for rank in range(4)
    }
    assert len(seeds) == 800 and all(0 <= seed < 2**63 for seed in seeds)

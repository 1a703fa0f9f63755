"""The demo's training loop: Adam under a one-cycle rate, on batches moved a little either way."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from cnnops.data import SIDE, Digits
from cnnops.models import LENETS, LeNet

if TYPE_CHECKING:
    from rich.console import Console

BATCH = 32
SHIFT = 2
"""Training batches are moved by up to so many places along either axis: this halves the errors."""
PEAK_RATE = {"lenet5": 2e-3, "lenet5-original": 8e-3}


@dataclass
class History:
    """What training leaves behind: a loss a step; seconds, and test accuracy from 0 to 1, an epoch."""

    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)


def train(
    name: str, digits: Digits, epochs: int, seed: int, device: torch.device, console: Console
) -> tuple[LeNet, History]:
    """A new model of that name, trained; weights, order of images and shifts all come from `seed`.

    Prints a line an epoch, below it a progress bar where `console` is a terminal. On the CPU one thread
    does it all: a batch is too little work to share, and threads on a busy machine would mostly wait for
    one another. It also makes the result the same for any number of cores.
    """
    images, labels = digits.train_images.to(device), digits.train_labels.to(device)
    steps = -(-len(labels) // BATCH)
    history = History()
    with torch.random.fork_rng(devices=[]), _one_thread():
        torch.manual_seed(seed)
        model = LENETS[name]().to(device)
        optimizer = torch.optim.Adam(model.parameters())
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, PEAK_RATE[name], total_steps=epochs * steps
        )
        with _progress(console, epochs * steps) as advance:
            for epoch in range(1, epochs + 1):
                began = time.perf_counter()
                for batch in torch.randperm(len(labels)).split(BATCH):
                    shifts = torch.randint(-SHIFT, SHIFT + 1, (2,)).tolist()
                    x = torch.roll(images[batch], shifts, dims=(2, 3))
                    loss = F.cross_entropy(model(fit(x, model)), labels[batch])
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    schedule.step()
                    history.losses.append(loss.item())
                    advance()
                history.seconds.append(time.perf_counter() - began)
                hits = evaluate(model, digits.test_images).argmax(1) == digits.test_labels
                history.accuracies.append(hits.double().mean().item())
                console.print(
                    f"epoch {epoch:2d}/{epochs}   "
                    f"loss {statistics.fmean(history.losses[-steps:]):.4f}   "
                    f"test {100 * history.accuracies[-1]:5.1f} %   {history.seconds[-1]:6.2f} s"
                )
    return model, history


@torch.no_grad()
def evaluate(model: LeNet, images: Tensor, batch: int = 256) -> Tensor:
    """The model's logits ``N x 10`` for ``N x 1 x 28 x 28`` images, on the CPU."""
    device = next(model.parameters()).device
    return torch.cat([model(fit(x.to(device), model)).cpu() for x in images.split(batch)])


def fit(images: Tensor, model: LeNet) -> Tensor:
    """28 x 28 images with the border of zeros that a 32 x 32 network was fed in 1998; else as they are."""
    border = (model.input_size[0] - SIDE) // 2
    return F.pad(images, (border,) * 4) if border else images


@contextmanager
def _one_thread() -> Iterator[None]:
    former = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(former)


@contextmanager
def _progress(console: Console, steps: int) -> Iterator[Callable[[], None]]:
    """A function to call once a step. Away from a terminal a bar would be litter, so there is none."""
    if not console.is_terminal:
        yield lambda: None
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("training"), BarColumn(), TextColumn("{task.percentage:3.0f} %")
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as progress:
        task = progress.add_task("training", total=steps)
        yield lambda: progress.advance(task)

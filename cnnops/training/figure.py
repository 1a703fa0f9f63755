"""Pictures of training: its curves, and what the first layer looks for. matplotlib is imported when used."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cnnops.files import written_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

POINTS = 1000
"""No curve has more: of longer histories, means of neighbouring steps are drawn."""


def canvas(title: str, panels: int) -> tuple[Figure, list[Axes]]:
    """An empty figure with so many panels side by side. Raises ModuleNotFoundError without matplotlib."""
    from matplotlib.figure import Figure  # not pyplot: no display, no state shared with the caller

    drawing = Figure(figsize=(4.6 * panels, 4.6), layout="constrained")
    drawing.suptitle(title)
    return drawing, list(drawing.subplots(1, panels, squeeze=False)[0])


def save(drawing: Figure, path: Path) -> None:
    """Write it as a PNG. Raises ValueError, and leaves the former file, where `path` cannot be written."""
    with written_whole(path) as file:
        drawing.savefig(file, format="png", dpi=120)


def draw_losses(axes: Axes, losses: Sequence[float]) -> None:
    """Training losses, one a step."""
    together = max(1, math.ceil(len(losses) / POINTS))
    starts = range(0, len(losses), together)
    means = [statistics.fmean(losses[start : start + together]) for start in starts]
    label = f"means of {together} steps" if together > 1 else "every step"
    axes.plot([start + 1 for start in starts], means, linewidth=0.8, label=label)
    if any(0 < mean < math.inf for mean in means):
        axes.set_yscale("log")
    axes.set(title="training loss", xlabel="step")
    axes.legend(loc="upper right")


def draw_accuracies(axes: Axes, ends: Sequence[int], accuracies: Sequence[float]) -> None:
    """Test accuracies, 0 to 1, after so many steps each."""
    axes.plot(ends, [100 * accuracy for accuracy in accuracies], "o-", markersize=3)
    axes.set(title="test accuracy, %", xlabel="step")
    axes.grid(axis="y", linewidth=0.4)


def draw_rates(axes: Axes, rates: Sequence[float]) -> None:
    """Learning rates, one a step."""
    every = max(1, math.ceil(len(rates) / POINTS))
    axes.plot(range(1, len(rates) + 1, every), rates[::every])
    axes.set(title="learning rate", xlabel="step")
    axes.set_ylim(bottom=0)


def draw_filters(axes: Axes, filters: Tensor) -> None:
    """The first layer's weight ``K x C x R x S``: in colours where C is 3, each filter on a scale of its own.

    Otherwise its mean over C, red where that is positive and blue where negative, all on one scale.
    """
    filters = filters.detach().float().cpu()
    K, C, R, S = filters.shape
    columns = math.ceil(math.sqrt(K))
    rows = math.ceil(K / columns)
    if C == 3:
        largest = filters.abs().amax((1, 2, 3), keepdim=True).clamp(min=1e-30)  # of zeros: grey
        shown = 0.5 + filters / (2 * largest)
    else:
        shown = filters.mean(1, keepdim=True)
    gap = 1.0 if C == 3 else math.nan  # white either way
    tiles = torch.full((rows * (R + 1) + 1, columns * (S + 1) + 1, shown.shape[1]), gap)
    for k in range(K):
        top, left = k // columns * (R + 1) + 1, k % columns * (S + 1) + 1
        tiles[top : top + R, left : left + S] = shown[k].permute(1, 2, 0)
    limit = shown.abs().max().item()  # of no use to colours
    picture = axes.imshow(tiles.numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit)
    if C != 3:
        axes.figure.colorbar(picture, ax=axes, shrink=0.8)
    axes.set(title=f"the {K} filters of the first layer", xticks=[], yticks=[])

"""The demo's picture: how the loss fell, what the first layer looks for, which digits are taken for which."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cnnops.training import figure
from cnnops.training.record import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def save(
    path: Path, title: str, record: Record, filters: Tensor, predicted: Tensor, truth: Tensor
) -> None:
    """Write one PNG. `filters` is the first layer's weight ``K x 1 x R x S``; labels are ``N``, 0 to 9.

    Raises ValueError, and leaves the former file, where `path` cannot be written.
    """
    accuracy = f"{100 * record.accuracies[-1]:.2f} % of {len(truth)} test digits"
    drawing, (losses, mosaic, confusion) = figure.canvas(f"{title}: {accuracy}", 3)
    figure.draw_losses(losses, record.losses)
    _draw_errors(losses.twinx(), record)
    figure.draw_filters(mosaic, filters)
    _draw_confusion(confusion, predicted, truth)
    figure.save(drawing, path)


def _draw_errors(axes: Axes, record: Record) -> None:
    percents = [100 * (1 - accuracy) for accuracy in record.accuracies]
    axes.plot(record.ends, percents, "o-", color="tab:red", markersize=3, label="test error, %")
    axes.set_ylim(bottom=0)
    axes.legend(loc="lower left")


def _draw_confusion(axes: Axes, predicted: Tensor, truth: Tensor) -> None:
    counts = torch.bincount(10 * truth + predicted, minlength=100).view(10, 10)
    shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
    axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    for row in range(10):
        for column in range(10):
            if counts[row, column]:
                colour = "white" if shares[row, column] > 0.5 else "black"
                text = str(int(counts[row, column]))
                axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=8)
    axes.set(title="confusion", xlabel="read as", ylabel="is", xticks=range(10), yticks=range(10))

"""The demo's picture: how the loss fell, what the first layer looks for, which digits are taken for which."""

from __future__ import annotations

import math
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cnnops.demo.training import History

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def save(
    path: Path, title: str, history: History, filters: Tensor, predicted: Tensor, truth: Tensor
) -> None:
    """Write one PNG. `filters` is the first layer's weight ``K x 1 x R x S``; labels are ``N``, 0 to 9."""
    from matplotlib.figure import Figure  # not pyplot: no display, no state shared with the caller

    drawing = Figure(figsize=(14, 4.6), layout="constrained")
    drawing.suptitle(f"{title}: {100 * history.accuracies[-1]:.2f} % of {len(truth)} test digits")
    loss, mosaic, confusion = drawing.subplots(1, 3)
    _draw_loss(loss, history)
    _draw_filters(mosaic, filters.detach().cpu())
    _draw_confusion(confusion, predicted, truth)
    # Beside the target and then renamed: an interrupted run leaves the former picture whole.
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "wb") as file:
            drawing.savefig(file, format="png", dpi=120)
        os.replace(partial, path)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise


def _draw_loss(axes: Axes, history: History) -> None:
    steps = len(history.losses) // len(history.seconds)
    epochs = [(step + 1) / steps for step in range(len(history.losses))]
    axes.semilogy(epochs, history.losses, linewidth=0.8, label="training loss, a step")
    axes.set(xlabel="epoch", title="cross-entropy and test error")
    errors = axes.twinx()
    marks = range(1, len(history.seconds) + 1)
    percents = [100 * (1 - accuracy) for accuracy in history.accuracies]
    errors.plot(marks, percents, "o-", color="tab:red", markersize=3, label="test error, %")
    errors.set_ylim(bottom=0)
    lines = [*axes.get_lines(), *errors.get_lines()]
    axes.legend(lines, [str(line.get_label()) for line in lines], loc="upper right")


def _draw_filters(axes: Axes, filters: Tensor) -> None:
    K, _, R, S = filters.shape
    columns = math.ceil(math.sqrt(K))
    rows = math.ceil(K / columns)
    tiles = torch.full((rows * (R + 1) + 1, columns * (S + 1) + 1), math.nan)
    for k in range(K):
        top, left = k // columns * (R + 1) + 1, k % columns * (S + 1) + 1
        tiles[top : top + R, left : left + S] = filters[k, 0]
    limit = filters.abs().max().item()
    picture = axes.imshow(tiles.numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit)
    axes.figure.colorbar(picture, ax=axes, shrink=0.8)
    axes.set(title=f"the {K} filters of the first layer", xticks=[], yticks=[])


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

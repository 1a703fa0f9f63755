"""`cnnops.summary`: what a network's layers hold, compute and see, and the least time that they take.

Nothing is computed. A copy of the model on the meta device, which has sizes but no memory, takes one step in
evaluation mode:

    collect.py    the step, watched: a row for every call of a layer
    costs.py      operations, least traffic and the kernel of a layer, by `cnnops.shapes` and the registry
    field.py      what every operation does to receptive fields; tracking.py carries them along
    gpus.py       ceilings of GPUs, for the floors of times
    report.py     a table, CSV, JSON, an HTML page; figure.py: a plot
    command.py    the command line
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from cnnops.summary.gpus import GPUS, Gpu


@dataclass(frozen=True)
class Row:
    """One call of a layer. What no formula is known for is None."""

    name: str
    """As in ``model.named_modules()``; "(model)" for the model itself."""
    call: int
    """1 for the layer's first call, 2 for its second, …"""
    type: str
    """Name of its class."""
    kind: str
    """conv, pool, norm, dense, activation or other."""
    output: tuple[tuple[int, ...], ...]
    """Size of every tensor that it returned, batch included."""
    memory_bytes: int
    """What these take. Memory that an earlier row or the input has (a view, an operation in place) is not
    counted again."""
    parameters: int
    """Numbers in its parameters; those that an earlier row has are not counted again."""
    operations: int | None
    """Multiply-adds of convolution and dense layers; in pooling a comparison or addition a place of every
    window; in normalisation one a value, and two more where statistics are the input's; in activations one a
    value and step."""
    receptive_field: int | tuple[int, ...] | None
    """How many places of the input a value sees, a tuple where axes differ; see `cnnops.summary.field`."""
    bytes_moved: int | None
    """The least traffic: input and weights read once, output written once."""
    floor_seconds: float | None
    """The least time by the GPU's ceilings: traffic or, in convolution and dense layers, arithmetic."""
    kernel: str | None
    """What runs in the engine cuda, for a layer of torch.nn once it is converted; "aten" is PyTorch's own."""
    precision: str | None
    """What convolution and dense layers multiply in: a dtype, or tf32."""


@dataclass(frozen=True)
class Summary:
    """What `cnnops.summary` found. Printing it shows a table; `csv`, `json` and `html` have all digits."""

    model: str
    input: tuple[int, ...]
    dtype: str
    gpu: Gpu
    rows: tuple[Row, ...]
    parameters: int
    """Of the whole model: also of modules that were not called."""
    uncounted: Mapping[str, int] = field(default_factory=dict)
    """Functions that compute more than value by value and were called outside of layers -> how often. No
    total has them."""

    def total(self, column: str, kind: str | None = None) -> float:
        """The sum of a column of numbers, over all rows or those of a kind; None counts as nothing."""
        rows = [row for row in self.rows if kind in (None, row.kind)]
        return sum(getattr(row, column) or 0 for row in rows)

    def share(self, column: str, kind: str) -> float:
        """How much of a column's total rows of a kind have, 0 to 1."""
        return self.total(column, kind) / (self.total(column) or 1)

    def __str__(self) -> str:
        from cnnops.summary import report

        return report.table(self)

    def csv(self) -> str:
        """One line a row under a head, with `Row`'s names and exact numbers; "" for None."""
        from cnnops.summary import report

        return report.csv_text(self)

    def json(self) -> str:
        """Everything, with exact numbers: see `cnnops.summary.report.document`."""
        from cnnops.summary import report

        return report.json_text(self)

    def html(self) -> str:
        """One page, complete in itself."""
        from cnnops.summary import report

        return report.html_text(self)

    def plot(self, path: str | Path) -> None:
        """Draw memory, parameters and operations by layer into a file: PNG, SVG or PDF by its suffix.

        Raises ValueError for another suffix, a place that cannot be written, or without matplotlib.
        """
        from cnnops.summary import figure

        figure.save(self, Path(path))


def summary(
    model: torch.nn.Module,
    input_size: Sequence[int] | None = None,
    *,
    batch: int = 1,
    dtype: torch.dtype = torch.float32,
    gpu: str = "h100",
) -> Summary:
    """Every layer's output, memory, parameters, operations, receptive field, least time, and kernel.

    `input_size` is ``C *spatial``, one to three spatial axes, or whatever else follows the batch; None takes
    that of the model's attribute ``input_size``, which the networks of `cnnops.models` have. `dtype` is that
    of parameters and input, `gpu` a name in `cnnops.summary.GPUS`. The model is not touched, nor need it have
    been converted: what is looked at is a copy without memory, in evaluation mode, so that even a large
    network takes a fraction of a second.

    Raises TypeError unless `model` is a Module, ValueError for other arguments that make no sense, and for a
    forward that fails RuntimeError, ValueError or TypeError, naming the layer.
    """
    from cnnops.summary import collect

    return collect.summary(model, input_size, batch, dtype, gpu)


__all__ = ["GPUS", "Gpu", "Row", "Summary", "summary"]

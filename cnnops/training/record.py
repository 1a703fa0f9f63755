"""What a training run leaves behind: its history for checkpoints, tables, a picture, TensorBoard's files."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from cnnops.files import written_whole
from cnnops.training import figure

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

A_STEP = ("losses", "rates")
AN_EPOCH = ("ends", "accuracies", "seconds", "images")


@dataclass
class Record:
    """The history of a run, in plain lists: `losses` and `rates` grow with steps, the others with epochs."""

    losses: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    """How many steps had been done when each epoch ended."""
    accuracies: list[float] = field(default_factory=list)
    """Of the test images, 0 to 1."""
    seconds: list[float] = field(default_factory=list)
    images: list[int] = field(default_factory=list)
    """How many were learned from."""
    _board: SummaryWriter | None = field(default=None, repr=False, compare=False)

    def step(self, loss: float, rate: float) -> None:
        """A step was done: its training loss, and its learning rate."""
        self.losses.append(float(loss))
        self.rates.append(float(rate))
        if self._board:
            self._board.add_scalar("train/loss", self.losses[-1], len(self.losses))
            self._board.add_scalar("train/rate", self.rates[-1], len(self.losses))

    def epoch(self, accuracy: float, seconds: float, images: int) -> None:
        """An epoch was done: test accuracy 0 to 1, training's seconds, and the images learned from."""
        self.ends.append(len(self.losses))
        self.accuracies.append(float(accuracy))
        self.seconds.append(float(seconds))
        self.images.append(int(images))
        if self._board:
            self._board.add_scalar("test/accuracy", self.accuracies[-1], self.ends[-1])
            self._board.add_scalar("train/images_per_second", self.speeds()[-1], self.ends[-1])

    def epoch_losses(self) -> list[float]:
        """The mean training loss of every finished epoch."""
        starts = [0, *self.ends]
        return [_mean(self.losses[a:b]) for a, b in zip(starts, self.ends, strict=False)]

    def speeds(self) -> list[float]:
        """Images a second of every finished epoch."""
        return [n / s if s else math.nan for n, s in zip(self.images, self.seconds, strict=True)]

    def state_dict(self) -> dict[str, Any]:
        """Copies of the lists, by name."""
        return {name: list(getattr(self, name)) for name in A_STEP + AN_EPOCH}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there. Raises ValueError, and changes nothing, where it is no record's state."""
        for names in (A_STEP, AN_EPOCH):
            lengths = [len(state[n]) if isinstance(state.get(n), list) else None for n in names]
            if None in lengths or len(set(lengths)) > 1:
                raise ValueError(
                    f"record: expected lists of one length, {', '.join(names)}, got lengths {lengths}"
                )
        for name in A_STEP + AN_EPOCH:
            getattr(self, name)[:] = state[name]

    def tensorboard(self, folder: Path) -> bool:
        """Write steps and epochs to `folder`, too, from now on; False where TensorBoard is not installed.

        After `load_state_dict`: what a run that was cut off wrote there of later steps is passed over. Raises
        ValueError where `folder` can be neither made nor written.
        """
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return False
        try:
            self._board = SummaryWriter(str(folder), purge_step=len(self.losses) + 1)
        except OSError as error:
            raise ValueError(
                f"tensorboard: expected a folder that can be written, got {error}"
            ) from error
        return True

    def close(self) -> None:
        """Finish TensorBoard's files, where there are any."""
        if self._board:
            self._board.close()
            self._board = None

    def write_csv(self, path: Path) -> None:
        """A row an epoch. Raises ValueError, and leaves the former file, where `path` cannot be written."""
        columns: dict[str, Sequence[float]] = {
            "epoch": range(1, len(self.ends) + 1),
            "steps": self.ends,
            "rate": [self.rates[end - 1] if end else math.nan for end in self.ends],
            "loss": self.epoch_losses(),
            "test_accuracy": self.accuracies,
            "seconds": self.seconds,
            "images_per_second": self.speeds(),
        }
        _write_table(path, columns)

    def write_steps_csv(self, path: Path) -> None:
        """A row a step; else as `write_csv`."""
        steps = range(1, len(self.losses) + 1)
        _write_table(path, {"step": steps, "rate": self.rates, "loss": self.losses})

    def draw(self, path: Path, title: str, filters: Tensor | None = None) -> None:
        """A PNG of losses, test accuracies, rates and, where they are given, the first layer's filters.

        `filters` is that layer's weight, ``K x C x R x S``. Raises ValueError as `write_csv` does, and
        ModuleNotFoundError without matplotlib.
        """
        drawing, panels = figure.canvas(title, 3 if filters is None else 4)
        figure.draw_losses(panels[0], self.losses)
        figure.draw_accuracies(panels[1], self.ends, self.accuracies)
        figure.draw_rates(panels[2], self.rates)
        if filters is not None:
            figure.draw_filters(panels[3], filters)
        figure.save(drawing, path)


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values) if values else math.nan


def _write_table(path: Path, columns: dict[str, Sequence[float]]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(zip(*columns.values(), strict=True))
    with written_whole(path) as file:
        file.write(text.getvalue().encode())

"""What a training run leaves behind, and that no file of it is ever left half-written."""

from __future__ import annotations

import csv
import io
import math
import os
import pickle
import stat
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cnnops.files import check_writable, written_whole
from cnnops.training import figure
from cnnops.training.record import Record


def recorded(epochs: int = 2, record: Record | None = None) -> Record:
    """Four steps an epoch, and one of an epoch that has not ended."""
    record = record or Record()
    for _ in range(epochs):
        for _ in range(4):
            step = len(record.losses)
            record.step(2.0 / (step + 1), 0.1 * step)
        record.epoch(accuracy=0.5 + 0.1 * len(record.ends), seconds=2.0, images=128)
    record.step(torch.tensor(0.125), 0.0)
    return record


# ---- the history -----------------------------------------------------------------------------------------


def test_history_is_kept_in_plain_numbers() -> None:
    record = recorded()
    assert record.ends == [4, 8] and record.accuracies == [0.5, 0.6] and record.speeds() == [64, 64]
    assert record.epoch_losses() == pytest.approx([25 / 24, 533 / 1680])
    assert record.losses[-1] == 0.125 and {type(loss) for loss in record.losses} == {float}


def test_state_is_a_copy_that_another_record_goes_on_from() -> None:
    record, other = recorded(), Record()
    stored = io.BytesIO()
    torch.save(record.state_dict(), stored)
    stored.seek(0)
    other.load_state_dict(torch.load(stored, weights_only=True))
    assert other == record
    state = record.state_dict()
    recorded(1, other)
    assert record.state_dict() == state and other != record
    assert pickle.loads(pickle.dumps(other)) == other


@pytest.mark.parametrize("change", [{"rates": [1.0]}, {"seconds": None}, {"losses": 3}])
def test_what_is_no_state_is_refused(change: dict[str, object]) -> None:
    record, state = recorded(1), recorded().state_dict()
    before = record.state_dict()
    for bad in ({**state, **change}, {k: v for k, v in state.items() if k not in change}, {}):
        with pytest.raises(ValueError, match="^record: expected lists of one length, .*, got .*$"):
            record.load_state_dict(bad)
        assert record.state_dict() == before


# ---- tables ----------------------------------------------------------------------------------------------


def test_tables(tmp_path: Path) -> None:
    record = recorded()
    record.write_csv(tmp_path / "epochs.csv")
    assert (tmp_path / "epochs.csv").read_bytes().count(b"\n") == 3
    assert b"\r" not in (tmp_path / "epochs.csv").read_bytes()
    with open(tmp_path / "epochs.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2"] and rows[1]["steps"] == "8"
    assert float(rows[1]["rate"]) == record.rates[7] and float(rows[0]["test_accuracy"]) == 0.5
    assert [float(row["loss"]) for row in rows] == record.epoch_losses()
    assert (rows[0]["seconds"], rows[0]["images_per_second"]) == ("2.0", "64.0")

    record.write_steps_csv(tmp_path / "steps.csv")
    with open(tmp_path / "steps.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == list(range(1, 10))
    assert [float(row["loss"]) for row in rows] == record.losses
    assert [float(row["rate"]) for row in rows] == record.rates

    Record().write_csv(tmp_path / "empty.csv")
    header = "epoch,steps,rate,loss,test_accuracy,seconds,images_per_second\n"
    assert (tmp_path / "empty.csv").read_text() == header


# ---- the picture -----------------------------------------------------------------------------------------


def draw(record: Record, path: Path, filters: torch.Tensor | None = None) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is missing: pip install 'cnnops[demo]'")
    record.draw(path, "title", filters)


@pytest.mark.filterwarnings("error")
def test_picture_is_drawn_of_any_history(tmp_path: Path) -> None:
    diverged = Record([math.nan, math.inf, -1.0], [0.0] * 3, [3], [0.0], [0.0], [0])
    filters = torch.nn.Conv2d(3, 7, 3).weight
    draw(recorded(), tmp_path / "whole.png", filters)
    from matplotlib.image import imread

    assert imread(tmp_path / "whole.png").std() > 0.05
    for record in (Record(), diverged):
        draw(record, tmp_path / "whole.png")
        assert imread(tmp_path / "whole.png").ndim == 3
    assert [p.name for p in tmp_path.iterdir()] == ["whole.png"]


def axes() -> figure.Axes:
    pytest.importorskip("matplotlib", reason="matplotlib is missing: pip install 'cnnops[demo]'")
    return figure.canvas("title", 1)[1][0]


def test_long_histories_are_drawn_in_means() -> None:
    drawn = axes()
    losses = [float(step) for step in range(2500)]
    figure.draw_losses(drawn, losses)
    steps, means = drawn.get_lines()[0].get_data()
    assert list(steps[:2]) == [1, 4] and list(means[:2]) == [1, 4] and means[-1] == 2499
    assert drawn.get_legend().get_texts()[0].get_text() == "means of 3 steps"
    drawn = axes()
    figure.draw_rates(drawn, losses)
    assert list(drawn.get_lines()[0].get_ydata()) == losses[::3]


def test_filters_lie_in_a_mosaic() -> None:
    filters = torch.arange(-9.0, 11.0).view(5, 1, 2, 2)
    drawn = axes()
    figure.draw_filters(drawn, filters.requires_grad_())
    picture = drawn.get_images()[0]
    tiles = torch.from_numpy(picture.get_array().filled(math.nan))
    assert tiles.shape == (7, 10) and picture.get_clim() == (-10, 10)
    for k in range(5):
        top, left = k // 3 * 3 + 1, k % 3 * 3 + 1
        assert torch.equal(tiles[top : top + 2, left : left + 2], filters.detach()[k, 0])
    assert tiles.isnan().sum() == 70 - 20

    colours = torch.randn(2, 3, 2, 2)
    colours[1] = 0
    drawn = axes()
    figure.draw_filters(drawn, colours)
    tiles = torch.from_numpy(drawn.get_images()[0].get_array().data)
    expected = 0.5 + colours[0].permute(1, 2, 0) / colours[0].abs().max() / 2
    torch.testing.assert_close(tiles[1:3, 1:3].float(), expected)
    assert (tiles[1:3, 4:6] == 0.5).all() and (tiles[0] == 1).all()


# ---- nothing half-written --------------------------------------------------------------------------------


def test_files_appear_whole_or_not_at_all(tmp_path: Path) -> None:
    path, link = tmp_path / "table.csv", tmp_path / "link"
    link.symlink_to(path)
    umask = os.umask(0o022)
    try:
        with written_whole(link) as file:
            file.write(b"first")
            file.flush()
            assert not path.exists()
    finally:
        os.umask(umask)
    assert path.read_bytes() == b"first" and link.is_symlink()
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    for interruption in (KeyboardInterrupt, RuntimeError):
        with pytest.raises(interruption), written_whole(path) as file:
            file.write(b"half")
            raise interruption
    with pytest.raises(ValueError, match="^expected a place that can be written, got .*full"):
        with written_whole(path) as file:
            file.write(b"half")
            raise OSError(28, "the disk is full")
    assert path.read_bytes() == b"first"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "table.csv"]


@pytest.mark.parametrize(
    "write",
    [Record.write_csv, Record.write_steps_csv, draw],
    ids=["epochs", "steps", "picture"],
)
def test_what_cannot_be_written_is_said_in_a_line(
    tmp_path: Path, write: Callable[[Record, Path], None]
) -> None:
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "folder", tmp_path / "no" / "where", tmp_path / ("long" * 100)):
        with pytest.raises(ValueError, match="^expected a place that can be written, got .*$"):
            write(recorded(), path)
    assert [p.name for p in tmp_path.rglob("*")] == ["folder"]


def test_bad_places_are_found_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.csv"
    check_writable(path, "--csv")
    for bad in (tmp_path, tmp_path / "no" / "where", path / "below"):
        with pytest.raises(
            ValueError, match="^--csv: expected a file in a folder that exists, got"
        ):
            check_writable(bad, "--csv")
    assert not path.exists()
    path.write_text("former")
    check_writable(path, "--csv")
    # Root may write anywhere, so that modes of files would prove nothing.
    for locked in (tmp_path, path):
        monkeypatch.setattr(os, "access", lambda p, mode, locked=locked: p != locked)
        with pytest.raises(ValueError, match="^--csv: expected a place that can be written, got"):
            check_writable(path, "--csv")


# ---- TensorBoard -----------------------------------------------------------------------------------------


class Writer:
    """In the place of TensorBoard's, which is no dependency: it lists what it is given."""

    def __init__(self, folder: str, purge_step: int) -> None:
        if "locked" in folder:
            raise PermissionError(13, "Permission denied", folder)
        self.calls: list[tuple[object, ...]] = [(folder, purge_step)]

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.calls.append((name, value, step))

    def close(self) -> None:
        self.calls.append(("closed",))


def test_tensorboard_is_written_where_it_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    record = recorded(1)
    with pytest.raises(
        ValueError, match="^tensorboard: expected a folder that can be written, got .*$"
    ):
        record.tensorboard(tmp_path / "locked")
    assert record.tensorboard(tmp_path / "runs")
    calls = record._board.calls
    assert calls == [(str(tmp_path / "runs"), 6)], "five steps were done before"
    record.step(0.5, 0.25)
    record.epoch(0.75, 4.0, 64)
    record.close()
    record.step(0.1, 0.1)
    assert calls[1:] == [
        ("train/loss", 0.5, 6),
        ("train/rate", 0.25, 6),
        ("test/accuracy", 0.75, 6),
        ("train/images_per_second", 16.0, 6),
        ("closed",),
    ]
    assert record.state_dict().keys() == Record().state_dict().keys()


def test_tensorboard_is_left_out_where_it_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    record = Record()
    assert not record.tensorboard(tmp_path / "runs")
    recorded(1, record).close()
    assert list(tmp_path.iterdir()) == []

"""The training loop: one process's part of it, from any step to the end.

Nothing depends on the state of a random generator. The order of images, their changes and the dropout of a
step follow from the seed and the step, so a checkpoint at any step goes on bit by bit as if nothing had
happened.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import lr_scheduler

import cnnops
from cnnops.data import DataSet, augment
from cnnops.training import network
from cnnops.training.batches import Batch, OrderedBatches, ShuffledBatches, mixed
from cnnops.training.distributed import Peers
from cnnops.training.plan import AMP, Recipe
from cnnops.training.record import Record

if TYPE_CHECKING:
    from rich.console import Console

TEST_BATCH = 256
"""Images at a time in evaluation, by all processes together."""


class Diverged(ArithmeticError):
    """The training loss is no number any more."""


@dataclass(frozen=True)
class Score:
    """What came of showing a model so many images."""

    images: int
    hits: int
    hits_of_five: int
    """Images whose class was among the five most likely ones."""
    loss: float
    """The mean cross-entropy, without label smoothing."""


class Training:
    """A model, and all that changes as it learns.

    `data` has the channels and sizes that `recipe` names; `peers` are the processes to share the work with.
    Raises ValueError where the model does not fit the data, or the batch the processes.
    """

    def __init__(
        self, recipe: Recipe, data: DataSet, peers: Peers | None = None, workers: int = 0
    ) -> None:
        self.recipe, self.data, self.workers = recipe, data, workers
        self.peers = peers = peers or Peers()
        if recipe.batch % peers.world or len(data.train) < peers.world:
            raise ValueError(
                f"--batch: expected a multiple of the {peers.world} processes, and an image for each, "
                f"got {recipe.batch} of {len(data.train)} images"
            )
        self.device = peers.device(recipe.engine)
        self.layout = torch.channels_last if recipe.channels_last else torch.contiguous_format
        model = network.build(recipe, len(data.classes)).to(self.device)
        model = model.to(memory_format=self.layout)  # type: ignore[call-overload]
        self.model, self._called = peers.wrapped(model)
        self.batches = ShuffledBatches(
            data.train, recipe.batch, recipe.seed, augment.parse(recipe.augment), peers.rank, peers.world
        )  # fmt: skip
        self.steps = recipe.epochs * self.batches.an_epoch
        self.optimizer = _optimizer(recipe, model)
        self.schedule = _schedule(recipe, self.optimizer, self.batches.an_epoch)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=recipe.amp == "float16")
        self.record = Record()
        self.score: Score | None = None
        """Of the test images, at the end of the last epoch."""
        self.step = 0
        """Steps that are done."""
        self._seconds = 0.0  # of the epoch that has begun
        self._losses: list[Tensor] = []  # of this process, of steps that are not in the record yet
        self._rates: list[float] = []

    def state(self) -> dict[str, Any]:
        """All that a checkpoint needs; no step's loss may be outside of the record, as when `keep` runs."""
        return {
            "recipe": self.recipe.state(),
            "classes": list(self.data.classes),
            "images": [len(self.data.train), len(self.data.test)],
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "record": self.record.state_dict(),
            "step": self.step,
            "seconds": self._seconds,
        }

    def go_on_from(self, state: dict[str, Any]) -> None:
        """Take over what `state` returned. Raises ValueError where it does not fit the model or the data."""
        expected = state["images"], state["classes"]
        found = [len(self.data.train), len(self.data.test)], list(self.data.classes)
        if expected != found:
            raise ValueError(
                f"data: expected {sum(expected[0])} images of {len(expected[1])} classes, as when the run "
                f"began, got {sum(found[0])} of {len(found[1])}, or others"
            )
        fill(self.model, state)
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.scaler.load_state_dict(state["scaler"])
        self.record.load_state_dict(state["record"])
        self.step, self._seconds = state["step"], state["seconds"]

    def run(
        self,
        console: Console,
        every: int | None = None,
        keep: Callable[[Training], None] = lambda training: None,
        stopped: Callable[[], int] = lambda: 0,
    ) -> int:
        """Train to the end, or until `stopped` returns a signal's number in any process; returns that, or 0.

        Prints a line an epoch, below it a progress bar where `console` is a terminal. `keep` is called after
        every so many steps, None for every epoch, and at the end, however it comes.
        Raises Diverged when the loss is no number: then `keep` was not called with it.
        """
        every = every or self.batches.an_epoch
        pinned = self.device.type == "cuda"
        with self._settings(), _bar(console, self) as advance:
            self._called.train()
            began = time.perf_counter() - self._seconds
            for batch in self.batches.since(self.step, self.steps, self.workers, pinned):
                self._learn(batch)
                advance()
                signal = self.peers.largest(stopped())
                ended = self.step % self.batches.an_epoch == 0
                due = signal or self.step % every == 0 or self.step == self.steps
                if ended or due:
                    self._fill_record()
                    self._seconds = time.perf_counter() - began
                    if ended:
                        self._end_epoch(console)
                    if due:
                        keep(self)
                    began = time.perf_counter() - self._seconds
                if signal:
                    return signal
        return 0

    def _learn(self, batch: Batch) -> None:
        """One step."""
        torch.manual_seed(mixed(self.recipe.seed, self.step, self.peers.rank))  # for dropout
        images, labels = self._placed(batch)
        with self._autocast():
            logits = self._called(images)
            loss = F.cross_entropy(logits, labels, label_smoothing=self.recipe.label_smoothing)
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self._rates.append(float(self.optimizer.param_groups[0]["lr"]))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.schedule.step()
        self._losses.append(loss.detach())  # a number only when it is needed: that waits for a GPU
        self.step += 1

    def _fill_record(self) -> None:
        losses = self.peers.mean(torch.stack(self._losses)).tolist() if self._losses else []
        for loss, rate in zip(losses, self._rates, strict=True):
            if not math.isfinite(loss):
                step = len(self.record.losses) + 1
                raise Diverged(
                    f"step {step}: the loss is {loss}: a lower --rate or a longer --warmup may help"
                )
            self.record.step(loss, rate)
        self._losses.clear()
        self._rates.clear()

    def _end_epoch(self, console: Console) -> None:
        self.score = self.evaluate()
        images = self.batches.an_epoch * self.batches.batch
        self.record.epoch(self.score.hits / self.score.images, self._seconds, images)
        epochs = self.recipe.epochs
        console.print(
            f"epoch {len(self.record.ends):{len(str(epochs))}d}/{epochs}   "
            f"loss {self.record.epoch_losses()[-1]:.4f}   "
            f"test {100 * self.record.accuracies[-1]:5.1f} %   {self._seconds:6.2f} s   "
            f"{images / self._seconds:8,.0f} images/s"
        )
        self._seconds = 0.0

    def evaluate(self) -> Score:
        """How the model does on the test images, its layers in evaluation."""
        split, peers = self.data.test, self.peers
        ordered = OrderedBatches(split, max(1, TEST_BATCH // peers.world), peers.rank, peers.world)
        sums = torch.zeros(4, dtype=torch.float64, device=self.device)
        with self._settings():
            for logits, labels in self.answers(ordered):
                five = logits.topk(min(5, logits.shape[1])).indices
                right = five == labels.unsqueeze(1)
                loss = F.cross_entropy(logits.float(), labels, reduction="sum")
                sums += torch.stack(
                    (loss.new_tensor(len(labels)), right[:, 0].sum(), right.sum(), loss)
                )
        images, hits, of_five, loss = peers.sum(sums).tolist()
        return Score(int(images), int(hits), int(of_five), loss / images)

    def answers(self, batches: OrderedBatches) -> Iterator[Batch]:
        """Logits and labels, batch by batch."""
        self.model.eval()
        try:
            for batch in batches.all(self.workers, self.device.type == "cuda"):
                images, labels = self._placed(batch)
                with torch.no_grad(), self._autocast():
                    logits = self.model(images)
                yield logits, labels
        finally:
            self.model.train()

    def _placed(self, batch: Batch) -> Batch:
        images, labels = (t.to(self.device, non_blocking=True) for t in batch)
        return images.contiguous(memory_format=self.layout), labels

    def _autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(
            self.device.type, AMP.get(self.recipe.amp), enabled=bool(self.recipe.amp)
        )

    @contextmanager
    def _settings(self) -> Iterator[None]:
        """The recipe's engine and threads; the caller's generators are left alone."""
        former = torch.get_num_threads()
        torch.set_num_threads(self.recipe.threads)
        try:
            with (
                torch.random.fork_rng([self.device] if self.device.type == "cuda" else []),
                cnnops.engine(self.recipe.engine),
                warnings.catch_warnings(),
            ):
                # In float16 the scaler may skip the first steps, to find its scale.
                warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
                yield
        finally:
            torch.set_num_threads(former)


def fill(model: nn.Module, state: dict[str, Any]) -> None:
    """The checkpoint's weights into the model. Raises ValueError where they do not fit."""
    try:
        model.load_state_dict(state["model"])
    except RuntimeError as error:
        line = " ".join(str(error).split()[:30])
        raise ValueError(f"checkpoint: expected weights that fit the model, got {line}") from error


def _optimizer(recipe: Recipe, model: nn.Module) -> torch.optim.Optimizer:
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        # Filters and matrices are kept small; biases, and the scales of norms, need not be.
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(groups, recipe.rate, momentum=recipe.momentum)
    kind = torch.optim.Adam if recipe.optimizer == "adam" else torch.optim.AdamW
    return kind(groups, recipe.rate, betas=(recipe.momentum, 0.999))


def _schedule(
    recipe: Recipe, optimizer: torch.optim.Optimizer, an_epoch: int
) -> lr_scheduler.LRScheduler:
    """A step of it is one of the optimizer."""
    steps = recipe.epochs * an_epoch
    if recipe.schedule == "onecycle":
        rising = 0.3 if recipe.warmup is None else recipe.warmup / recipe.epochs
        return lr_scheduler.OneCycleLR(
            optimizer, recipe.rate, steps, pct_start=rising, cycle_momentum=False
        )
    warmup = round((recipe.warmup or 0) * an_epoch)
    rest = steps - warmup
    main: lr_scheduler.LRScheduler
    if recipe.schedule == "constant":
        main = lr_scheduler.ConstantLR(optimizer, 1.0, 0)
    elif recipe.schedule == "step":
        main = lr_scheduler.MultiStepLR(optimizer, [rest // 2, rest * 3 // 4])
    else:
        main = lr_scheduler.CosineAnnealingLR(optimizer, rest)
    if not warmup:
        return main
    rising_rate = lr_scheduler.LinearLR(optimizer, 1 / (warmup + 1), 1.0, warmup)
    return lr_scheduler.SequentialLR(optimizer, [rising_rate, main], [warmup])


@contextmanager
def _bar(console: Console, training: Training) -> Iterator[Callable[[], None]]:
    """A function to call once a step. Away from a terminal a bar would be litter, so there is none."""
    if not console.is_terminal:
        yield lambda: None
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("training"),
        BarColumn(),
        TextColumn("{task.percentage:3.0f} %"),
        TextColumn("{task.fields[speed]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=training.steps, completed=training.step, speed="")

        def advance() -> None:
            speed = progress.tasks[0].speed
            images = "" if speed is None else f"{speed * training.batches.batch:,.0f} images/s"
            progress.update(task, advance=1, speed=images)

        yield advance

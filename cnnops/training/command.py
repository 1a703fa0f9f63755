"""What ``cnnops train`` and ``cnnops eval`` do; their arguments are in `cnnops.training.arguments`."""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar, cast

from cnnops import data, info, keep_memory
from cnnops.data.digits import has_idx_files
from cnnops.models import MODELS
from cnnops.training import checkpoint, network, plan
from cnnops.training.distributed import PeerLost, Peers, joined, launched, leave
from cnnops.training.loop import Diverged, Score, Training, fill
from cnnops.training.plan import Recipe

if TYPE_CHECKING:
    from rich.console import Console

T = TypeVar("T")


# ---- train -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Job:
    """A run that is ready to begin, or, from a checkpoint's `state`, to go on."""

    recipe: Recipe
    images: data.DataSet
    out: Path
    state: dict[str, Any] | None
    lines: tuple[str, ...]
    """What to say before."""


def train(options: argparse.Namespace) -> int:
    """Run ``cnnops train``; its exit code: 0, 1 where training fails, 2 for bad input, 130 or 143 where
    Ctrl-C or SIGTERM ended it, its state kept."""
    say = _Speaker("cnnops train")
    if not launched():
        return _train(options, Peers(), say)
    try:
        with joined(options.timeout) as peers:
            code = _train(options, peers, say)
    except PeerLost as error:
        code = say.error(
            f"another process has ended, or does not answer; --resume goes on ({error})", 1
        )
    except KeyboardInterrupt:
        code = say.error("interrupted", 130)
    except BaseException:
        traceback.print_exc()
        code = 1
    leave(code)


def _train(options: argparse.Namespace, peers: Peers, say: _Speaker) -> int:
    try:
        job = _together(peers, lambda: _prepared(options, peers))
        training = _together(peers, lambda: _begun(job, options, peers))
    except _Refused as error:
        return say.error(str(error), 2, alone=peers.rank == 0)
    return _run(training, job, options, peers, say)


class _Refused(Exception):
    """Something that cannot work; the message is fit for a user's eyes."""


def _together(peers: Peers, work: Callable[[], T]) -> T:
    """What `work` returns, once it is done in every process. Raises _Refused in all if it fails in one."""
    result, problem = None, None
    try:
        result = work()
    except (ValueError, OSError) as error:
        problem = str(error)
    if problem := peers.agree(problem):
        raise _Refused(problem)
    return cast(T, result)


class _Speaker:
    """Words to the user: from the first process, or from whichever has to say something."""

    def __init__(self, command: str) -> None:
        rank = os.environ.get("RANK", "0") if launched() else ""
        self.name = f"{command} (process {rank})" if rank else command

    def error(self, line: str, code: int, alone: bool = True) -> int:
        if alone:
            print(f"{self.name}: {line}", file=sys.stderr, flush=True)
        return code


def _prepared(options: argparse.Namespace, peers: Peers) -> _Job:
    """All that can go wrong in this process alone. Raises ValueError with a line for the user."""
    plan.need("matplotlib", *([] if options.data else ["sklearn"]))
    for name, least in (("workers", 0), ("checkpoint_every", 1), ("timeout", 1)):
        value = getattr(options, name)
        if value is not None and not value >= least:
            raise ValueError(f"{plan.flag(name)}: expected at least {least}, got {value:g}")
    given = _given(options)
    out = options.out or Path("runs") / re.sub(r"[^\w.-]+", "-", options.model)
    kept, lines = checkpoint.find(out) if out.is_dir() else None, []
    if kept and not options.resume:
        raise ValueError(
            f"--out: expected a folder without a checkpoint, got {out}; --resume goes on from it"
        )
    state = checkpoint.load(kept) if kept else None
    if state is None:
        recipe, note = plan.complete(given), ""
        if "engine" not in given:
            _, note = plan.choose_engine(os.environ.get("CNNOPS_ENGINE"))
        lines += [note] if note else []
        lines += ["there is no checkpoint yet to resume from"] if options.resume else []
    else:
        recipe = plan.resumed(Recipe.of(state["recipe"]), given)
        lines.append(f"going on from step {state['step']} ({kept})")
    if recipe.data and not Path(recipe.data).is_dir():
        raise ValueError(
            f"--data: expected a folder with MNIST's files or images, got {recipe.data}"
        )
    recipe = network.fitted(recipe, small=not recipe.data or has_idx_files(Path(recipe.data)))
    peers.device(recipe.engine)
    return _Job(recipe, load(recipe), out, state, tuple(lines))


def _begun(job: _Job, options: argparse.Namespace, peers: Peers) -> Training:
    """The model, at its first step or where it was. Raises ValueError with a line for the user."""
    training = Training(job.recipe, job.images, peers, options.workers)
    if job.state is not None:
        training.go_on_from(job.state)
    if peers.rank == 0:
        plan.writable(job.out)
        for left in job.out.glob(".c[hu]*-[0-9]*"):  # by a process that was killed as it wrote
            left.unlink()
    return training


def _given(options: argparse.Namespace) -> dict[str, Any]:
    """The recipe's values that the command line has."""
    names = [field.name for field in fields(Recipe)]
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    if "data" in given:  # a later run may begin elsewhere
        given["data"] = str(Path(given["data"]).resolve())
    return given


def load(recipe: Recipe) -> data.DataSet:
    """The recipe's images. Raises `cnnops.data.DataError`."""
    assert recipe.channels is not None and recipe.size is not None
    folder = Path(recipe.data) if recipe.data else None
    return data.load(folder, recipe.channels, recipe.size, recipe.seed)


def _description(training: Training) -> Iterator[str]:
    recipe, images = training.recipe, training.data
    several = f", {training.peers.world} processes" if training.peers.world > 1 else ""
    yield (
        f"{recipe.model} on {images.source}: {len(images.train)} to learn from, {len(images.test)} to test "
        f"on, {len(images.classes)} classes; engine {recipe.engine}{several}, seed {recipe.seed}"
    )
    assert recipe.size is not None
    parameters = sum(p.numel() for p in training.model.parameters())
    yield (
        f"{parameters:,} parameters, images of {recipe.channels} x {recipe.size[0]} x {recipe.size[1]}; "
        f"{training.steps} steps of {training.batches.batch}, {recipe.optimizer}, "
        f"{recipe.schedule} at {recipe.rate:g}, augmentation {recipe.augment}"
    )


def _run(
    training: Training, job: _Job, options: argparse.Namespace, peers: Peers, say: _Speaker
) -> int:
    from rich.console import Console

    first = peers.rank == 0
    if training.device.type == "cpu":
        keep_memory()
    # Names and figures as they are: no wrapping, no markup, no colours of rich's own choosing.
    console = Console(soft_wrap=True, markup=False, highlight=False, emoji=False, quiet=not first)
    start = info.kernel_counts()
    for line in (*_description(training), *job.lines):
        console.print(line)

    def keep(training: Training) -> None:
        if first:
            with _writing(job.out):
                checkpoint.save(job.out, training.state())
                training.record.write_csv(job.out / "curves.csv")

    try:
        if first:
            with _writing(job.out):
                training.record.tensorboard(job.out / "tensorboard")
        with _signals() as stopped:
            number = training.run(console, options.checkpoint_every, keep, stopped)
        if first and not number:
            with _writing(job.out):
                _finish(training, job.out, console)
    except Diverged as error:
        return say.error(str(error), 1, alone=first)
    except data.DataError as error:
        return say.error(error.line, 2)
    except _Unwritable as error:
        return say.error(str(error), 2)
    finally:
        training.record.close()
    if number:
        name = "interrupted" if number == signal.SIGINT else "terminated"
        line = f"{name} after step {training.step} of {training.steps}: --resume goes on from there"
        return say.error(line, 128 + number, alone=first)
    console.print(info.kernel_counts().since(start).sentence())
    return 0


class _Unwritable(Exception):
    """Results cannot be written; the message is fit for a user's eyes."""


@contextmanager
def _writing(out: Path) -> Iterator[None]:
    try:
        yield
    except (ValueError, OSError) as error:
        raise _Unwritable(f"{out}: {error}; what was kept before is whole") from error


def _finish(training: Training, out: Path, console: Console) -> None:
    """The last words, and the picture."""
    record = training.record
    score = training.score or training.evaluate()
    filters = network.first_filters(training.model)
    title = f"{training.recipe.model}: {100 * score.hits / score.images:.2f} % of {score.images}"
    record.write_csv(out / "curves.csv")
    record.write_steps_csv(out / "steps.csv")
    record.draw(out / "curves.png", title, None if filters is None else filters.detach().cpu())
    console.print(
        f"\ntest accuracy   {_accuracy(score)} after {sum(record.seconds):.1f} s of training"
        f"\nthroughput      {sum(record.images) / sum(record.seconds):,.0f} images/s"
        f"\n\nsaved in {out}: {checkpoint.NEWEST}, curves.csv, steps.csv, curves.png"
    )


def _accuracy(score: Score) -> str:
    return f"{100 * score.hits / score.images:.2f} % ({score.hits} of {score.images})"


@contextmanager
def _signals() -> Iterator[Callable[[], int]]:
    """A function that tells which of SIGINT and SIGTERM has come, or 0. A second one acts at once."""
    seen = [0]

    def note(number: int, frame: FrameType | None) -> None:
        seen[0] = number
        signal.signal(number, former[number])

    former: Mapping[int, Any] = {
        number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield lambda: seen[0]
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


# ---- eval ------------------------------------------------------------------------------------------------


def evaluate(options: argparse.Namespace) -> int:
    """Run ``cnnops eval``; its exit code: 0, or 2 for bad input."""
    try:
        training, path = _loaded(options)
    except (ValueError, OSError) as error:
        print(f"cnnops eval: {error}", file=sys.stderr)
        return 2
    recipe, images = training.recipe, training.data
    print(
        f"{recipe.model} of {path}, step {training.step}, on {images.source}: {len(images.test)} images; "
        f"engine {recipe.engine}"
    )
    began = time.perf_counter()
    try:
        score = training.evaluate()
    except data.DataError as error:
        print(f"cnnops eval: {error.line}", file=sys.stderr)
        return 2
    seconds = time.perf_counter() - began
    print(f"test accuracy   {_accuracy(score)}")
    if len(images.classes) > 10:
        share = 100 * score.hits_of_five / score.images
        print(f"of five guesses {share:.2f} % ({score.hits_of_five} of {score.images})")
    print(f"test loss       {score.loss:.4f}")
    print(f"throughput      {score.images / seconds:,.0f} images/s")
    return 0


def _loaded(options: argparse.Namespace) -> tuple[Training, Path]:
    """The model of a checkpoint, and the images. Raises ValueError with a line for the user."""
    path = checkpoint.find(options.checkpoint)
    if path is None:
        raise ValueError(f"CHECKPOINT: expected a checkpoint, got {options.checkpoint}")
    if options.workers < 0:
        raise ValueError(f"--workers: expected at least 0, got {options.workers}")
    state = checkpoint.load(path)
    recipe = Recipe.of(state["recipe"])
    if options.model not in (None, recipe.model):
        raise ValueError(
            f"--model: expected {recipe.model}, of which {path} is, got {options.model}"
        )
    if options.model is None and recipe.model not in MODELS:
        raise ValueError(f"{path} is of {recipe.model}: to import that, say --model {recipe.model}")
    changes = {name: getattr(options, name) for name in ("data", "engine", "threads")}
    recipe = plan.checked(replace(recipe, **{k: v for k, v in changes.items() if v is not None}))
    images = load(recipe)
    if list(images.classes) != state["classes"]:
        raise ValueError(
            f"--data: expected the classes of the training, {_some(state['classes'])}, "
            f"got {_some(images.classes)}"
        )
    training = Training(recipe, images, workers=options.workers)
    fill(training.model, state)
    training.step = state["step"]
    return training, path


def _some(classes: Any) -> str:
    names = ", ".join(classes[:3])
    return f"{len(classes)} ({names}{', …' if len(classes) > 3 else ''})"

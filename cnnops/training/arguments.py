"""The arguments of ``cnnops train`` and ``cnnops eval``."""

from __future__ import annotations

import argparse
from pathlib import Path

from cnnops.data import augment
from cnnops.training.distributed import TIMEOUT
from cnnops.training.plan import AMP, ENGINES, OPTIMIZERS, RATES, SCHEDULES, Recipe


def add_train(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``cnnops train``. Those of the recipe are None unless given."""
    default = Recipe("")
    rates = ", ".join(f"{name} {rate:g}" for name, rate in RATES.items())
    parser.add_argument(
        "model", metavar="MODEL", help="name in cnnops.models, or package.module:callable"
    )
    group = parser.add_argument_group("images")
    add = group.add_argument
    add("--data", metavar="DIR", help="MNIST's idx files, or images in a folder a class, perhaps within "
        "train/ and val/ (default: scikit-learn's digits)")  # fmt: skip
    add("--size", type=_size, metavar="H,W", help="of what the model sees (default: what suits it)")
    add("--channels", type=int, help="1 for grey, 3 for colours (default: what the model has)")
    add(
        "--augment",
        type=_augment,
        metavar="CHANGES",
        help=f"such as shift=2,crop=4,flip,noise=0.05, or none (default: {default.augment})",
    )
    add("--workers", type=int, default=0, help="processes that prepare images (default: 0)")
    group = parser.add_argument_group("learning")
    add = group.add_argument
    add("--epochs", type=int, help="passes over the data (default: 12, with --data 3)")
    add("--batch", type=int, help="images a step, in all processes (default: 32, with --data 64)")
    add("--optimizer", help=f"{', '.join(OPTIMIZERS)} (default: {default.optimizer})")
    add("--rate", type=float, help=f"the largest learning rate (default: {rates})")
    add("--momentum", type=float, help="of sgd; Adam's first beta (default: 0.9)")
    add("--weight-decay", type=float, help="of filters and matrices (default: 0)")
    add("--schedule", help=f"{', '.join(SCHEDULES)} (default: {default.schedule})")
    add("--warmup", type=float, metavar="EPOCHS", help="in which the rate rises (default: 0; of onecycle "
        "30 %% of all)")  # fmt: skip
    add("--label-smoothing", type=float, help="0 to 1 (default: 0)")
    add(
        "--dropout",
        type=float,
        metavar="P",
        help="in place of the model's, or before its last dense layer",
    )
    add("--seed", type=int, help="decides every random choice (default: 0)")
    group = parser.add_argument_group("computing")
    add = group.add_argument
    add(
        "--engine",
        help="cuda, cpu, or aten for stock PyTorch (default: cuda where it works, else cpu)",
    )
    add("--amp", help=f"autocast to {' or '.join(AMP)}")
    add(
        "--channels-last", action="store_true", default=None, help="model and images in this layout"
    )
    add("--fuse-training", action="store_true", default=None, help="batch norm, residual and activation in "
        "one pass")  # fmt: skip
    add("--threads", type=int, help="of the CPU (default: as many as torch takes)")
    add("--timeout", type=float, default=TIMEOUT, metavar="SECONDS", help="to wait for a process, which "
        "then counts as lost (default: %(default)g)")  # fmt: skip
    group = parser.add_argument_group("results")
    add = group.add_argument
    add("--out", type=Path, metavar="DIR", help="checkpoints and curves (default: runs/MODEL)")
    add("--checkpoint-every", type=int, metavar="STEPS", help="(default: every epoch)")
    add(
        "--resume",
        action="store_true",
        help="go on from the checkpoint in --out, where there is one",
    )


def add_eval(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``cnnops eval``."""
    add = parser.add_argument
    add(
        "checkpoint", type=Path, metavar="CHECKPOINT", help="a file, or the --out of `cnnops train`"
    )
    add("--model", help="package.module:callable, where the checkpoint is of such a one: nothing that only "
        "the file names is imported")  # fmt: skip
    add("--data", metavar="DIR", help="test images (default: those of the training)")
    add("--engine", help=f"{', '.join(ENGINES)} (default: that of the training)")
    add("--threads", type=int, help="of the CPU (default: that of the training)")
    add("--workers", type=int, default=0, help="processes that read images (default: 0)")


def _size(text: str) -> tuple[int, int]:
    H, _, W = text.partition(",")
    if not (H.isascii() and H.isdecimal() and W.isascii() and W.isdecimal()):
        raise argparse.ArgumentTypeError(f"expected H,W as in 32,32, got {text!r}")
    return int(H), int(W)


def _augment(text: str) -> str:
    try:
        return str(augment.parse(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("augmentation: ")) from None

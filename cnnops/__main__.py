"""The command line: ``cnnops`` or ``python -m cnnops``."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import cnnops


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage before it, and exits with code 2."""

    def error(self, message: str) -> NoReturn:
        if os.environ.get("RANK", "0") == "0":  # of several processes by torchrun one will do
            print(f"{self.prog}: {message}", file=sys.stderr)
        raise SystemExit(2)


def _parser(command: str | None = None) -> _Parser:
    """The command line's parser, with the arguments of `command` where those are kept elsewhere."""
    parser = _Parser("cnnops", description="CUDA kernels for convolutional networks in PyTorch.")
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="command")
    commands.add_parser("info", help="what is installed, and which engines work here")
    demo = commands.add_parser(
        "demo", help="train LeNet-5 on real digits and check the kernels with it"
    )
    demo.add_argument("--engine", help="cuda, cpu or aten (default: cuda where it works, else cpu)")
    demo.add_argument(
        "--model", default="lenet5", help="lenet5 or lenet5-original (default: %(default)s)"
    )
    demo.add_argument(
        "--epochs", type=int, help="passes over the data (default: 12, with --data 3)"
    )
    demo.add_argument("--data", type=Path, metavar="DIR", help="folder with MNIST's four idx files")
    demo.add_argument(
        "--seed", type=int, default=0, help="decides every random choice (default: 0)"
    )
    demo.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        default=Path("cnnops_demo.png"),
        help="the picture (default: %(default)s)",
    )
    train = commands.add_parser(
        "train", help="train a network on digits, MNIST or a folder of images"
    )
    evaluate = commands.add_parser("eval", help="the accuracy of a network that was trained")
    tune = commands.add_parser(
        "tune", help="measure which kernel is the fastest for a model's layers"
    )
    compile = commands.add_parser(
        "compile", help="compile the kernels that networks need before anybody waits for them"
    )
    check = commands.add_parser(
        "check", help="compile and check a CUDA kernel of yours, without a GPU"
    )
    summary = commands.add_parser(
        "summary", help="a network layer by layer: sizes, parameters, operations, least times"
    )
    commands.add_parser(
        "bench", add_help=False, help="what benchmarks have found: tables, plots, comparisons"
    )
    if command in ("train", "eval"):
        from cnnops.training import arguments

        arguments.add_train(train)
        arguments.add_eval(evaluate)
    if command == "tune":
        from cnnops import tuning

        tuning.add_arguments(tune)
    if command == "compile":
        from cnnops import precompile

        precompile.add_arguments(compile)
    if command == "check":
        from cnnops import check as checking

        checking.add_arguments(check)
    if command == "summary":
        from cnnops.summary import command as summarising

        summarising.add_arguments(summary)
    return parser


def _demo(parser: _Parser, options: argparse.Namespace) -> int:
    from rich.console import Console

    from cnnops import demo

    try:
        plan = demo.prepare(
            options.engine, options.model, options.epochs, options.data, options.seed, options.out
        )
    except ValueError as error:
        parser.error(str(error))
    # Paths and figures as they are: no wrapping, no markup, no colours of rich's own choosing.
    console = Console(soft_wrap=True, markup=False, highlight=False, emoji=False)
    return 0 if demo.run(plan, console) else 1


def _bench(parser: _Parser, arguments: Sequence[str]) -> int:
    """`bench/report.py` of the checkout that this package is in."""
    root = Path(cnnops.__file__).resolve().parents[1]
    if not (root / "bench" / "report.py").is_file():
        parser.error(
            f"bench: expected a checkout with bench/ in it, got {root}; the wheel has none"
        )
    sys.path.insert(0, str(root))
    code: int = importlib.import_module("bench.report").main(arguments)
    return code


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; its exit code: 0 for success, 1 where results disagree, 2 for bad input."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    command = next((word for word in given if not word.startswith("-")), None)
    parser = _parser(command)
    try:
        if given[:1] == ["bench"]:
            return _bench(parser, given[1:])
        options = parser.parse_args(given)
        if options.version:
            print(cnnops.__version__)
        elif options.command == "info":
            from cnnops import info

            for line in info.report():
                print(line, flush=True)
        elif options.command == "demo":
            return _demo(parser, options)
        elif options.command == "train":
            from cnnops.training import command as training

            return training.train(options)
        elif options.command == "eval":
            from cnnops.training import command as training

            return training.evaluate(options)
        elif options.command == "tune":
            from cnnops import tuning

            return tuning.main(options)
        elif options.command == "compile":
            from cnnops import precompile

            return precompile.main(options)
        elif options.command == "check":
            from cnnops import check

            return check.main(options)
        elif options.command == "summary":
            from cnnops.summary import command as summarising

            return summarising.main(options)
        else:
            parser.error(
                "expected a command, such as info or demo (cnnops --help tells more), got none"
            )
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `cnnops info | head -1`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


if __name__ == "__main__":
    sys.exit(main())

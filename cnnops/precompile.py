"""``cnnops compile``: every kernel that some networks need, compiled before anybody waits for it.

Which variant of a kernel a layer needs is decided by the layer's sizes, so the networks themselves say
(`cnnops.problems`). For the CPU engine each problem is then posed to its kernel, which is compiled and does
not run. For a GPU, which need not be there, the launchers plan each problem's launches on tensors without
data as they would on that GPU, and NVRTC compiles what they name.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch

from cnnops import registry, system, tuned
from cnnops.cache import cache_dir
from cnnops.models import MODELS
from cnnops.problems import Network, Precision, Problem, written_down
from cnnops.registry import CONV
from cnnops.tuned import dtype_name

BATCHES = (1, 32)
"""One image, and enough of them that more would be cut up in the same way."""

DTYPES = {"cpu": (torch.float32, torch.bfloat16),
          "cuda": (torch.float32, torch.float16, torch.bfloat16)}  # fmt: skip
"""Types of elements that kernels are compiled for unless others are named."""

LAYOUTS = (False, True)
"""Whether images are channels-last."""

Advance = Callable[[str], None]


@dataclass(frozen=True)
class Compiled:
    """What has been done: kernels compiled and their bytes, kernels found, seconds."""

    compiled: int
    loaded: int
    bytes: int
    seconds: float

    def __str__(self) -> str:
        return (
            f"{self.compiled} kernels compiled, {self.loaded} found in the cache, "
            f"{self.bytes / 1e6:.1f} MB, {self.seconds:.1f} s"
        )


# ---- for this CPU ----------------------------------------------------------------------------------------


def compile_cpu(
    networks: Sequence[Network],
    batches: Sequence[int] = BATCHES,
    dtypes: Sequence[torch.dtype] = DTYPES["cpu"],
    advance: Advance = lambda text: None,
) -> Compiled:
    """Compile the kernels of the CPU engine that these networks need, contiguous and channels-last, in
    training and at inference. `advance` is called with a line after each network, type and layout."""
    from cnnops.cpu import code, task

    began, before = time.perf_counter(), code.stats()
    size = code.bytes_made()
    posed: set[Problem] = set()
    with task.compiling_only():
        for network, dtype, channels_last in product(networks, dtypes, LAYOUTS):
            with written_down("cpu") as problems:
                network.run(Precision(dtype), channels_last)
            new = [problem for problem in problems if problem not in posed]
            for at in (problem.at(batch) for problem in new for batch in batches):
                choice = registry.own_choice(at.op, "cpu", at.shape, at.dtype)
                if choice.engine == "cpu":
                    choice.function(at.shape, *at.tensors("cpu"))
            posed |= problems.keys()
            advance(f"{network.name}, {dtype_name(dtype)}: {code.stats()['compiled']} compiled")
    counts = code.stats()
    return Compiled(
        counts["compiled"] - before["compiled"],
        counts["loaded_from_cache"] - before["loaded_from_cache"],
        code.bytes_made() - size,
        time.perf_counter() - began,
    )


# ---- for a GPU -------------------------------------------------------------------------------------------


def problems_of(network: Network, dtypes: Sequence[torch.dtype]) -> dict[Problem, None]:
    """The problems of a network on GPUs: contiguous and channels-last, and types of 16 bits as parameters'
    types and under autocast."""
    precisions = [Precision(dtype) for dtype in dtypes]
    precisions += [Precision(dtype, True) for dtype in dtypes if dtype.itemsize == 2]
    with written_down("emulate") as problems:
        for precision, channels_last in product(precisions, LAYOUTS):
            network.run(precision, channels_last)
    return problems


def kernels_of(
    problems: Iterable[Problem], batches: Sequence[int], arch: str
) -> list[tuple[str, tuple[tuple[str, str | int], ...]]]:
    """Sources and constants of all kernels that a GPU of this architecture launches for the problems: float32
    multiplied as it is and as TF32, chosen by arithmetic and by each table of `cnnops.tune` that is in force
    here for some GPU."""
    from cnnops.cuda.launch import trace
    from cnnops.cuda.target import Target, standing_for

    tables = [tuned.only(), *(tuned.assuming(gpu) for gpu in tuned.gpus_known())]
    with standing_for(Target.of_arch(arch)), trace(run=False) as launches:
        for table in tables:
            with table:
                for problem, batch in product(problems, batches):
                    _plan(problem.at(batch))
    return sorted({(launch.kernel.source, launch.kernel.constants) for launch in launches})


def _plan(problem: Problem) -> None:
    """Have the launches of a problem planned."""
    both = problem.dtype == torch.float32 and problem.op in CONV
    for tf32 in (False, True) if both else (False,):
        choice = registry.own_choice(problem.op, "emulate", problem.shape, problem.dtype, tf32)
        if choice.engine == "emulate":
            choice.function(problem.shape, *problem.tensors("meta"))


def compile_cuda(
    networks: Sequence[Network],
    architectures: Sequence[str],
    batches: Sequence[int] = BATCHES,
    dtypes: Sequence[torch.dtype] = DTYPES["cuda"],
    started: Callable[[int], Advance] = lambda total: lambda text: None,
) -> Compiled:
    """Compile the CUDA kernels that these networks need on GPUs of these architectures ("80", "90a"), on all
    cores of this machine. ``started(total)`` is called when it is known how many there are, and what it
    returns with a line after each.

    Raises ValueError where a network fails, CompileError where NVRTC refuses a kernel, OSError where the
    cache directory cannot be written.
    """
    from cnnops.cuda import jit
    from cnnops.cuda.kernel import Kernel

    began = time.perf_counter()
    jit.expect_to_keep()
    problems: dict[Problem, None] = {}
    for network in networks:
        problems |= problems_of(network, dtypes)
    wanted = [
        (Kernel(source, "", constants), arch)
        for arch in architectures
        for source, constants in kernels_of(problems, batches, arch)
    ]
    advance, sizes = started(len(wanted)), []
    with ThreadPoolExecutor(system.cores()) as pool:
        try:
            tasks = {pool.submit(jit.compile_ahead, *kernel): kernel for kernel in wanted}
            for done in as_completed(tasks):
                sizes.append(done.result())
                kernel, arch = tasks[done]
                advance(f"{kernel.source} for sm_{arch}")
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    compiled = sum(size > 0 for size in sizes)
    seconds = time.perf_counter() - began
    return Compiled(compiled, len(sizes) - compiled, sum(sizes), seconds)


# ---- command line ----------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``cnnops compile``."""
    add = parser.add_argument
    parser.description = (
        "Compiles the kernels of networks into the cache directory (CNNOPS_CACHE_DIR), in training and at "
        "inference, contiguous and channels-last. With --arch no GPU is needed: kernels depend on a GPU's "
        "architecture alone, so that one set serves all GPUs of it, however many multiprocessors they have. "
        "Processes that find the directory compile nothing, whichever NVRTC they have, or none; they may run "
        "as another user, if root owns the directory and they can read it."
    )
    what = "names in cnnops.models, or package.module:callable (default: all of cnnops.models)"
    add("models", nargs="*", metavar="MODEL", help=what)
    add("--model", nargs="+", action="extend", default=[], metavar="MODEL", help="the same")
    add("--cpu", action="store_true", help="the kernels of the engine cpu, for this CPU")
    add(
        "--arch",
        nargs="+",
        default=[],
        metavar="ARCH",
        help="the CUDA kernels for GPUs of these architectures: 80 (A100), 86, 89, 90a (H100, H200), …",
    )
    add(
        "--batch",
        metavar="N,…",
        default=",".join(map(str, BATCHES)),
        help="numbers of images (default: %(default)s)",
    )
    add(
        "--dtype",
        metavar="DTYPE,…",
        help="types of elements (default: float32,bfloat16 with --cpu, and float16 with --arch)",
    )
    add(
        "--input",
        metavar="C,H,W",
        help="size of an image, for models that do not say (default: what each model says)",
    )


def main(options: argparse.Namespace) -> int:
    """Run ``cnnops compile``; its exit code: 0, 1 where a compiler is missing or refuses a kernel, or nothing
    can be kept, or 2 for bad input."""
    try:
        done = _run(options)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"cnnops compile: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    for compiled, path in done:
        print(f"{compiled}: {path}")
    return 0


def _run(options: argparse.Namespace) -> list[tuple[Compiled, Path]]:
    """What has been compiled, and where it is. All that the command line says is checked before."""
    if not options.cpu and not options.arch:
        raise ValueError("expected --cpu, --arch or both, got neither")
    batches = _numbers("--batch", options.batch, "positive numbers as in 1,32")
    dtypes = _dtypes(options.dtype)
    size = None
    if options.input is not None:
        size = _numbers("--input", options.input, "sizes as in 3,224,224")
    architectures = _architectures(options.arch)
    names = dict.fromkeys([*options.models, *options.model] or MODELS)
    networks = [Network.of(name, size) for name in names]
    done = []
    if options.cpu:
        done.append(_run_cpu(networks, batches, dtypes or DTYPES["cpu"]))
    if architectures:
        with _bar() as started:
            compiled = compile_cuda(
                networks, architectures, batches, dtypes or DTYPES["cuda"], started
            )
        done.append((compiled, cache_dir()))
    return done


def _run_cpu(
    networks: Sequence[Network], batches: Sequence[int], dtypes: Sequence[torch.dtype]
) -> tuple[Compiled, Path]:
    from cnnops.cpu import code

    if not code.is_kept():
        raise OSError("the cache directory cannot be written")
    with _bar() as started:
        advance = started(len(networks) * len(dtypes) * len(LAYOUTS))
        return compile_cpu(networks, batches, dtypes, advance), code.cache_path()


def _numbers(name: str, text: str, wanted: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(part.isascii() and part.isdecimal() and int(part) for part in parts):
        raise ValueError(f"{name}: expected {wanted}, got {text!r}")
    return tuple(map(int, parts))


def _dtypes(text: str | None) -> tuple[torch.dtype, ...]:
    """The types named; () for None."""
    known = {dtype_name(dtype): dtype for dtype in DTYPES["cuda"]}
    names = text.split(",") if text is not None else []
    for name in names:
        if name not in known:
            raise ValueError(f"--dtype: expected some of {','.join(known)}, got {text!r}")
    return tuple(known[name] for name in dict.fromkeys(names))


def _architectures(names: Sequence[str]) -> list[str]:
    """Raises ValueError for one that NVRTC does not know, or that no process looks for."""
    if not names:
        return []
    from cnnops.cuda import jit

    known = jit.architectures()
    for name in names:
        if name not in known:
            raise ValueError(f"--arch: expected some of {' '.join(known)}, got {name!r}")
    return list(dict.fromkeys(names))


@contextmanager
def _bar() -> Iterator[Callable[[int], Advance]]:
    """What draws a progress bar for so many steps on stderr, if that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=None)

        def started(total: int) -> Advance:
            progress.update(task, total=total)
            return lambda text: progress.update(task, advance=1, description=text)

        yield started

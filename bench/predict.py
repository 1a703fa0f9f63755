"""The tables of bench/notes.md: what kernels should take on a GPU, by counts and a model.

    python bench/predict.py                       # count everything and renew bench/notes.md: 10 minutes
    python bench/predict.py --only resnet50 fold  # the rows whose names hold one of these words
    python bench/predict.py --check               # exit 1 where a table is stale

Every row of bench/suites.py that is pooling, batch norm or depthwise convolution gets its predicted time
before a GPU is asked: the emulator counts what its launches move (bench/traffic.py), `predict` makes a time
of it, and of a convolution's multiply-adds, by the constants of `Gpu`. Measured times stand beside it once
bench/results/ has those of a GPU. Rows of equal sizes stand in the table once, under the first name; float16
moves what bfloat16 does. What is written by hand stays: the text around the tables, and their last column.

Convolutions on tensor cores are not counted: cnnops/cuda/conv_igemm.py chooses their tiles by a model of
time, and what that model says stands in a table of its own, which takes seconds and is renewed each time.
"""

from __future__ import annotations

import argparse
import functools
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import NoReturn

import torch

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # a script's own folder stands there otherwise

from bench import runs  # noqa: E402
from bench.suites import SUITES, Case  # noqa: E402
from bench.traffic import (  # noqa: E402
    FORMS,
    OTHERS,
    Counted,
    Form,
    Make,
    Problem,
    count,
    has_problem,
    problem_named,
    problem_of,
)
from cnnops.cuda import conv_igemm  # noqa: E402
from cnnops.cuda import conv_igemm_sm90 as sm90  # noqa: E402
from cnnops.shapes import ConvShape  # noqa: E402

NOTES = Path(__file__).resolve().parent / "notes.md"
BEGIN, END = "<!-- predicted: {} -->", "<!-- end -->"

# ---- the model -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gpu:
    """What a prediction is made of. Rates are a second; the defaults are an H100 80GB HBM3's."""

    launch: float = 3e-6
    """Seconds that a launch adds to its work. None overlaps with the one before."""
    memory: float = 0.9 * 3.35e12
    """Bytes: the share of its nominal rate that copies reach."""
    l2: float = 5.5e12
    """Bytes between L2 and all L1."""
    l1: float = 132 * 128 * 1.755e9
    """Bytes of the sectors that requests touch: 128 a cycle and multiprocessor."""
    wavefronts: float = 132 * 1.755e9
    """Of shared memory: one a cycle and multiprocessor."""
    ffma: float = 132 * 128 * 1.755e9
    """Multiply-adds in float32: one a cycle and lane."""
    l2_bytes: float = 50e6
    """What L2 keeps from launch to launch."""


@dataclass(frozen=True)
class Prediction:
    """Seconds. `least`: all that fits into L2 of a tensor is found there by the next launch; `most`: a tensor
    is found if all of it fits in, with what is moved beside it, and else nothing of it."""

    least: float
    most: float
    limit: str
    """What takes the most of that: "launch", "memory", "L2", "L1", "shared" or "FFMA"."""


def from_memory(launches: Sequence[Counted], gpu: Gpu, optimistic: bool) -> list[float]:
    """Bytes of each launch that come from memory or go there: without those reads that find their tensor in
    L2, where an earlier launch has left it."""
    totals = []
    for number, launch in enumerate(launches):
        total = 0.0
        for side in launch.sides:
            total += side.memory
            before = [i for i in range(number) if _touches(launches[i], side.tensor)]
            if side.writes or not before:
                continue
            # What competes for L2 since then, and in the two launches themselves.
            spans: dict[int, float] = {}
            for other in (s for each in launches[before[-1] : number + 1] for s in each.sides):
                spans[other.tensor] = max(spans.get(other.tensor, 0), min(other.memory, other.span))
            together = sum(spans.values())
            if together <= gpu.l2_bytes:
                total -= side.memory
            elif optimistic:
                total -= side.memory * gpu.l2_bytes / together
        totals.append(total)
    return totals


def _touches(launch: Counted, tensor: int) -> bool:
    return any(side.tensor == tensor for side in launch.sides)


def predict(launches: Sequence[Counted], gpu: Gpu) -> Prediction:
    """One launch follows another: each takes `Gpu.launch`, and the longest of what levels of memory, and
    multiply-adds, take."""
    best, worst = (from_memory(launches, gpu, optimistic) for optimistic in (True, False))
    taken = {"launch": gpu.launch * len(launches)}
    least = most = taken["launch"]
    for launch, low, high in zip(launches, best, worst, strict=True):
        others = {
            "L2": sum(side.l2 for side in launch.sides) / gpu.l2,
            "L1": launch.l1 / gpu.l1,
            "shared": launch.wavefronts / gpu.wavefronts,
            "FFMA": launch.multiplies / gpu.ffma,
        }
        parts = {"memory": high / gpu.memory, **others}
        limit = max(parts, key=lambda name: parts[name])
        taken[limit] = taken.get(limit, 0) + parts[limit]
        least += max(low / gpu.memory, *others.values())
        most += parts[limit]
    return Prediction(least, most, max(taken, key=lambda name: taken[name]))


# ---- rows ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """A problem with all rows of the suites that are this problem."""

    problem: Problem
    rows: Mapping[tuple[str, Form], tuple[str, ...]]
    """Direction and form -> ids of the rows; none where no suite has the problem."""

    @property
    def forms(self) -> tuple[Form, ...]:
        return tuple(form for form in FORMS if any(form == other for _, other in self.rows))

    @property
    def directions(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(direction for direction, _ in self.rows))


def _form(dtype: str, layout: str) -> Form:
    return Form(layout, torch.float32 if dtype == "float32" else torch.bfloat16)


def lines() -> list[Line]:
    """All lines of all tables, in the order of the suites."""
    same: dict[tuple[object, ...], list[Case]] = {}
    for case in (case for suite in SUITES.values() for case in suite):
        if has_problem(case):
            same.setdefault((case.op, case.x, case.w, case.options), []).append(case)
    found = []
    for cases in same.values():
        rows: dict[tuple[str, Form], tuple[str, ...]] = {}
        for row in (row for case in cases for row in case.rows()):
            key = row.direction, _form(row.dtype, row.layout)
            rows[key] = (*rows.get(key, ()), row.id)
        found.append(Line(problem_of(cases[0]), rows))
    for problem in OTHERS:
        directions = problem.steps(problem.full, Make(FORMS[0], "meta"))
        beside = {f for line in found if line.problem.kernel == problem.kernel for f in line.forms}
        forms = [form for form in FORMS if form in (beside or FORMS)]
        found.append(Line(problem, {(d, form): () for form in forms for d in directions}))
    return found


def kernels() -> list[str]:
    """The files in kernels/ that have a table."""
    return list(dict.fromkeys(line.problem.kernel for line in lines()))


# ---- tables ----------------------------------------------------------------------------------------------

_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
_LAYOUTS = {"contiguous": "NCHW", "channels_last": "NHWC"}
EXPLANATION = "explanation"


def _microseconds(seconds: float) -> str:
    return f"{seconds * 1e6:.0f}" if seconds >= 9.95e-6 else f"{seconds * 1e6:.1f}"


def cell(prediction: Prediction) -> str:
    """26 to 35, or 2630 L2: what limits it is named where that is not memory or launches."""
    least, most = _microseconds(prediction.least), _microseconds(prediction.most)
    limit = "" if prediction.limit in ("launch", "memory") else f" {prediction.limit}"
    return (least if least == most else f"{least} to {most}") + limit


def _by_dtype(forms: Iterable[Form]) -> dict[torch.dtype, list[Form]]:
    found: dict[torch.dtype, list[Form]] = {}
    for form in forms:
        found.setdefault(form.dtype, []).append(form)
    return found


def head(forms: Iterable[Form]) -> list[str]:
    """Names of columns: of each dtype the floor, then each layout's prediction and what was measured."""
    names = ["row", "problem", ""]
    for dtype, same in _by_dtype(forms).items():
        names.append(f"floor {_NAMES[dtype]}")
        for form in same:
            names += [_LAYOUTS[form.layout], "measured"]
    return [*names, EXPLANATION]


Predictions = Mapping[tuple[str, Form], tuple[float, Prediction]]
"""Direction and form -> seconds of the floor, and what is predicted."""


def cells(
    line: Line,
    direction: str,
    forms: Iterable[Form],
    found: Predictions,
    measured: Mapping[str, float],
) -> list[str]:
    """A row of a table, without its explanation."""
    row = [line.problem.id, line.problem.text, direction]
    for same in _by_dtype(forms).values():
        floors = [found[direction, form][0] for form in same if (direction, form) in found]
        row.append(_microseconds(floors[0]) if floors else "–")
        for form in same:
            known = (direction, form) in found
            times = [measured[id] for id in line.rows.get((direction, form), ()) if id in measured]
            row.append(cell(found[direction, form][1]) if known else "–")
            row.append(_microseconds(times[0]) if times else "–")
    return row


def predictions(
    name: str, forms: Sequence[Form], gpu: Gpu
) -> dict[tuple[str, Form], tuple[float, Prediction]]:
    """Of the problem of this name."""
    problem, found = problem_named(name), {}
    for form in forms:
        steps = problem.steps(problem.full, Make(form, "meta"))
        for direction, launches in count(problem, form).items():
            step = steps[direction]
            floor = max(step.least / gpu.memory, step.multiplies / gpu.ffma)
            found[direction, form] = floor, predict(launches, gpu)
    return found


def measured_times(folder: Path = runs.RESULTS) -> dict[str, float]:
    """Row -> seconds of cnnops in the newest run on a GPU; empty where there is none."""
    run = runs.latest("gpu", folder)
    times = {row.id: row.seconds(runs.CNNOPS) for row in run.rows} if run else {}
    return {id: seconds for id, seconds in times.items() if seconds is not None}


def _split(row: str) -> list[str]:
    return [cell.strip() for cell in row.strip().strip("|").split(" | ")]


def table(
    text: str, kernel: str, found: Mapping[str, Predictions], measured: Mapping[str, float]
) -> str:
    """The table of one kernel: of the problems in `found` anew, of others as it stands in `text`.

    Explanations are those of `text`.
    """
    former = {
        tuple(parts[:3:2]): parts for parts in map(_split, text.splitlines()) if len(parts) > 3
    }
    here = [line for line in lines() if line.problem.kernel == kernel]
    forms = [form for form in FORMS if any(form in line.forms for line in here)]
    names = head(forms)
    rows = [names, ["---" if n in ("row", "problem", "", EXPLANATION) else "--:" for n in names]]
    for line in here:
        for direction in line.directions:
            old = former.get((line.problem.id, direction))
            if line.problem.id in found:
                new = cells(line, direction, forms, found[line.problem.id], measured)
                rows.append([*new, old[-1] if old and len(old) == len(names) else ""])
            elif old:
                rows.append(old)
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def renewed(text: str, found: Mapping[str, Predictions], measured: Mapping[str, float]) -> str:
    """`text` with all its tables renewed. Raises ValueError where one has no place."""
    products = {PRODUCTS: product_table, WGMMA: wgmma_table}
    for kernel in (*kernels(), *products):
        begin = BEGIN.format(kernel)
        pattern = re.compile(f"({re.escape(begin)}\n)(.*?){END}", re.DOTALL)
        places = list(pattern.finditer(text))
        if len(places) != 1:
            raise ValueError(f"expected one {begin} and an {END} behind it, got {len(places)}")
        start, end = places[0].span(2)
        make = products.get(kernel)
        new = make(measured) if make else table(places[0][2], kernel, found, measured)
        text = text[:start] + new + text[end:]
    return text


# ---- convolutions on tensor cores ------------------------------------------------------------------------

PRODUCTS = "conv_igemm.cu"
PRODUCT_FORMS = (("bfloat16", "channels_last"), ("float32", "contiguous"))
PASSES = ("fprop", "dgrad", "wgrad")


def _estimates(case: Case, form: Form) -> list[conv_igemm.Estimate]:
    """Of the case's directions, as `PASSES` has them; none where the kernel does not take it."""
    shape, make = case.shape, Make(form, "meta")
    assert isinstance(shape, ConvShape)
    if any(conv_igemm.supports(f"conv_{op}", shape, form.dtype) for op in PASSES):
        return []
    x, w, y = make(shape.x_size), make(shape.w_size), make(shape.y_size)
    arguments = {"fprop": (x, w, y), "dgrad": (y, w, x), "wgrad": (y, x, w)}
    # Of a transposed convolution the forward pass is its twin's dgrad, and the other way round.
    order = ("dgrad", "fprop", "wgrad") if case.kind == "conv_transpose" else PASSES
    return [conv_igemm.estimate(f"conv_{op}", shape, *arguments[op]) for op in order]


def product_table(measured: Mapping[str, float]) -> str:
    """Predicted times of all convolutions that tensor cores take, each problem once."""
    head = ["row", "problem"]
    for name, layout in (("bf16", "NHWC"), ("TF32", "NCHW")):
        head += [f"floor {name}", *(f"{layout} {op}" for op in PASSES)]
    rows = [head, ["---", "---", *["--:"] * (len(head) - 2)]]
    seen: set[tuple[object, ...]] = set()
    for case in (case for suite in SUITES.values() for case in suite):
        key = case.op, case.x, case.w, case.options
        if case.kind not in ("conv", "conv_transpose") or key in seen:
            continue
        seen.add(key)
        row = [f"{case.suite}/{case.name}", case.problem]
        for dtype, layout in PRODUCT_FORMS:
            found = _estimates(case, _form(dtype, layout))
            row.append(_microseconds(found[0].floor) if found else "–")
            for i, op in enumerate(PASSES):
                id = f"{case.suite}/{case.name}/{op}/{dtype}/{layout}"
                text = _microseconds(found[i].seconds) if found else "–"
                row.append(f"{text}, {_microseconds(measured[id])}" if id in measured else text)
        if len(set(row[2:])) > 1:
            rows.append(row)
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


WGMMA = "conv_igemm_sm90.cu"
WGMMA_SUITES, WGMMA_BATCHES = ("resnet50", "vgg16", "alexnet"), (64, 256)


def wgmma_table(measured: Mapping[str, float]) -> str:
    """What a stage of each tile costs in a half type, and the layers of 64 channels and more of networks with
    stated targets, at both ends of their batches: tile and TFLOP/s, in bfloat16, channels-last.
    """
    head = ["tile", "KB a stage", "cycles of wgmma", "of L2", "stages", "cycles ahead"]
    rows = [head, ["---", *["--:"] * (len(head) - 1)]]
    for tile in sm90.TILES:
        stage = sm90.stage_of(tile)
        cycles = max(stage.products, stage.bytes / conv_igemm.L2_BYTES)
        rows.append(
            [str(tile), f"{stage.bytes / 1024:g}", f"{stage.products:g}",
             f"{stage.bytes / conv_igemm.L2_BYTES:.0f}", f"{stage.stages}",
             f"{(stage.stages - 1) * cycles:.0f}"]
        )  # fmt: skip
    text = "".join(f"| {' | '.join(row)} |\n" for row in rows)
    head = ["layer", "problem"]
    head += [f"{op} N={n}" for n in WGMMA_BATCHES for op in PASSES]
    rows = [head, ["---", "---", *["--:"] * (len(head) - 2)]]
    form = _form("bfloat16", "channels_last")
    for case in (case for suite in WGMMA_SUITES for case in SUITES[suite]):
        if case.kind != "conv" or case.x[1] < 64:
            continue
        row = [f"{case.suite}/{case.name}", case.problem.partition(" ")[2].partition("x")[2]]
        for n in WGMMA_BATCHES:
            batch = replace(case, x=(n, *case.x[1:]))
            assert isinstance(batch.shape, ConvShape)
            for found in _estimates(batch, form):
                row.append(f"{found.variant} {batch.shape.flops / found.seconds / 1e12:.0f}")
        rows.append(row)
    return text + "\n" + "".join(f"| {' | '.join(row)} |\n" for row in rows)


# ---- command line ----------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line and exits with code 2."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message}", file=sys.stderr)
        raise SystemExit(2)


def _parser() -> _Parser:
    parser = _Parser("bench/predict.py", description="Renew the predictions in bench/notes.md.")
    parser.add_argument("--check", action="store_true", help="exit 1 where a table is stale")
    parser.add_argument(
        "--only", nargs="+", metavar="WORD", default=[""], help="some rows, by name"
    )
    parser.add_argument("--notes", type=Path, default=NOTES, metavar="FILE", help="bench/notes.md")
    parser.add_argument(
        "--results", type=Path, default=runs.RESULTS, metavar="DIR", help="measured"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes that count")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; its exit code: 0, 1 for stale tables, 2 for bad input."""
    parser = _parser()
    options = parser.parse_args(argv)
    chosen = [line for line in lines() if any(word in line.problem.id for word in options.only)]
    try:
        if not chosen:
            raise ValueError(f"--only: expected part of a row's name, got {options.only}")
        found = _predicted(chosen, options.jobs)
        text = options.notes.read_text(encoding="utf-8")  # behind the counting: that takes minutes
        new = renewed(text, found, measured_times(options.results))
    except (ValueError, OSError) as error:
        parser.error(str(error))
    if new == text:
        return 0
    if not options.check:
        options.notes.write_text(new, encoding="utf-8")
        print(f"saved {options.notes}")
        return 0
    print(f"{options.notes}: tables are stale; python bench/predict.py renews them")
    for old, row in zip(*_different(text, new), strict=False):
        print(f"- {old}\n+ {row}")
    return 1


def _different(old: str, new: str) -> tuple[list[str], list[str]]:
    a, b = old.splitlines(), new.splitlines()
    return [row for row in a if row not in b], [row for row in b if row not in a]


def _predicted(chosen: Sequence[Line], jobs: int) -> dict[str, Predictions]:
    work = functools.partial(predictions, gpu=Gpu())
    names, forms = [line.problem.id for line in chosen], [line.forms for line in chosen]
    if min(jobs, len(chosen)) < 2:
        return dict(zip(names, map(work, names, forms), strict=True))
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        return dict(zip(names, pool.map(work, names, forms), strict=True))


if __name__ == "__main__":
    sys.exit(main())

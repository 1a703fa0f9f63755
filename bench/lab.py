"""Everything that a GPU is wanted for, in one command:  python bench/lab.py --minutes 9 --out DIR

Steps, the most valuable first, each in a process of its own with a share of the time:

    machine     what this is, and the ceilings that it reaches: copy bandwidth, matrix products
    golden      golden vectors: what the hardware makes of every wrapper in ptx.cuh
    tests       the GPU's tests, file by file
    layers      rows of bench/suites.py: kernels checked, then timed beside their rivals
    models      training steps and inference of whole networks
    sanitizer   compute-sanitizer on a case of every kernel
    profile     Nsight Compute on the rows named with --profile

A step that fails, crashes or hangs costs only itself: results are written row by row, the row that was under
way is noted as failed, and the step goes on behind it. Started again with the same --out, the lab takes up
where it was. At the end one result file lies in DIR, with DIR/golden.tar.gz, and a short table is printed.

It needs a checkout, torch, CuPy and NVRTC, but no installation and no network. Without a GPU, --cpu times the
CPU engine on layers and models scaled down to what a CPU does in milliseconds, those in float32 in both
layouts, and --dry-run walks through every step on tiny problems, under the emulator and on the CPU engine,
and times nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from io import StringIO
from itertools import zip_longest
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # a script's own folder stands there otherwise

os.environ.setdefault("CNNOPS_CACHE_DIR", str(Path(tempfile.gettempdir()) / "cnnops-lab-cache"))

from rich.console import Console  # noqa: E402

from bench import machine, models, parts, report, suites, timing  # noqa: E402
from bench.models import ModelRow  # noqa: E402
from bench.rivals import FUSED, ONE_THREAD, RIVALS, TORCH  # noqa: E402
from bench.suites import Row  # noqa: E402
from cnnops import keep_memory, system  # noqa: E402

SHARES = {
    "machine": 0.05, "golden": 0.12, "tests": 0.3, "layers": 0.6, "models": 0.5, "sanitizer": 0.8,
    "profile": 1.0,
}  # fmt: skip
"""Step -> the most it may take of the time that is left when it begins."""
CPU_SHARES = {"machine": 0.05, "layers": 0.75, "models": 1.0}
"""The same with --cpu: its steps."""

STALL_SECONDS = 90
"""A row that takes longer is given up."""
RESTARTS = 20
"""Rows that may crash or hang before their step is given up."""
DRY = {"most_flops": 1e5, "most_bytes": 1e5}
ON_CPU = {"most_flops": 2e8, "most_bytes": 2e7}
"""On a CPU, some milliseconds."""
NETWORKS_ON_CPU = {"most_flops": 4e9, "most_bytes": 2e8}
"""Layers of networks in float32 on a CPU, tens of milliseconds: all of ResNet-50's keep `CPU_IMAGES`."""
CPU_IMAGES = 8
"""And so many they have at most, LeNet-5 aside, whose images are small."""
PARALLEL_FLOPS = 5e7
"""From here on more than one thread should pay on a CPU: the suite "scaling" shows how much."""
FIRST = (
    "kernelbench", "reports", "resnet50", "mobilenetv2", "lenet5", "convnext_t", "alexnet", "vgg16",
    "efficientnet_b0", "lenet5_original", "group_norms", "scaling",
)  # fmt: skip
"""Suites in the order in which their rows are taken in turn; the sweeps follow."""

Options = argparse.Namespace


# ---- files between the steps -----------------------------------------------------------------------------


def part(options: Options, step: str) -> Path:
    """Where a step leaves its results, one JSON value a line."""
    return Path(options.out) / f"part-{step}.jsonl"


def add(options: Options, step: str, value: Any) -> None:
    with part(options, step).open("a", encoding="utf-8") as file:
        file.write("\n" + json.dumps(value) + "\n")  # the line before it may have been cut off


def found(options: Options, step: str) -> list[Any]:
    """What a step has left so far. A line that was cut off by a crash is dropped."""
    values = []
    path = part(options, step)
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            values.append(json.loads(line))
        except ValueError:
            continue
    return values


def _current(options: Options) -> Path:
    """Names the row that is under way."""
    return Path(options.out) / "part-current"


def _device(options: Options) -> Any:
    import torch

    return torch.device("cpu" if options.dry_run or options.cpu else "cuda")


def _left(options: Options) -> float:
    return float(options.deadline - time.time())


# ---- the steps --------------------------------------------------------------------------------------------


def step_machine(options: Options) -> None:
    device = _device(options)
    what = machine.describe(device, options.commit)
    ceilings = machine.ceilings(device, 0.3 if options.dry_run else 6.0)
    add(options, "machine", {"machine": what, "ceilings": ceilings})


def step_golden(options: Options) -> None:
    """Record the golden vectors. They travel as one archive."""
    folder = Path(tempfile.mkdtemp(prefix="golden-"))
    command = ["list"] if options.dry_run else ["record", "--out", str(folder)]
    done = _run([sys.executable, "-m", "tests.golden", *command], _left(options))
    with tarfile.open(Path(options.out) / "golden.tar.gz", "w:gz") as archive:
        archive.add(folder, arcname="golden")
    recorded = len(list(folder.rglob("*.npz")))
    shutil.rmtree(folder)
    add(options, "golden", {"recorded": recorded, "exit": done[0], "tail": done[1]})


def step_tests(options: Options) -> None:
    """The tests marked gpu, some files at once, and each with a limit of its own."""
    files = sorted((ROOT / "tests").glob("test_*.py"))
    selection = ["-m", "gpu"]
    if options.dry_run:
        files, selection = [ROOT / "tests" / "test_shapes.py"], []
    done = {result["file"] for result in found(options, "tests")}
    limit = max(20.0, _left(options))

    def run(file: Path) -> dict[str, Any] | None:
        name = str(file.relative_to(ROOT))
        if name in done:
            return None
        started = time.time()
        command = [
            "-m",
            "pytest",
            "-q",
            "--no-header",
            "--tb=short",
            "-rf",
            "-p",
            "no:cacheprovider",
            name,
        ]
        code, text = _run([sys.executable, *command, *selection], limit)
        counts = {
            word: int(match[1]) if (match := re.search(rf"(\d+) {word}", text)) else 0
            for word in ("passed", "failed", "skipped", "error")
        }
        if code == 5:  # pytest: nothing is marked gpu in this file
            return None
        counts["failed"] += counts.pop("error")
        return {
            "file": name,
            **counts,
            "exit": code,
            "seconds": time.time() - started,
            "tail": text[-6000:],
        }

    with ThreadPoolExecutor(max(1, min(6, system.cores() // 2))) as pool:
        for result in pool.map(run, files):
            if result is not None:
                add(options, "tests", result)
                print(
                    f"  {result['file']}: {result['passed']} passed, {result['failed']} failed",
                    flush=True,
                )


def _keep_memory(options: Options) -> None:
    """On a CPU pages fresh from the system take longer than many a layer, and it is chance whose they are."""
    if _device(options).type == "cpu" and not options.dry_run:
        keep_memory()


def step_layers(options: Options) -> None:
    import torch

    machine.pin_threads()
    device, done = _device(options), {row["id"] for row in found(options, "layers")}
    _keep_memory(options)
    ceilings = suites.Ceilings(**found(options, "machine")[0]["ceilings"])
    for row, rivals, engine in layer_rows(options):
        if row.id in done:
            continue
        if _left(options) < 2 * options.seconds:
            return
        _current(options).write_text(row.id)
        started = time.time()
        try:
            result = timing.measure(
                row, rivals, device, ceilings, options.seconds, tf32=options.tf32, engine=engine,
                timed=not options.dry_run,
            )  # fmt: skip
        except torch.OutOfMemoryError as error:
            result = _no_result(row, f"raised {type(error).__name__}: more memory than there is")
        except Exception as error:
            result = _no_result(row, f"raised {type(error).__name__}: {error}")
        add(options, "layers", result)
        print(f"  {_line(result)}  ({time.time() - started:.1f} s)", flush=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()


def layer_rows(options: Options) -> Iterator[tuple[Row, Sequence[str], str | None]]:
    """Rows in order of interest, with their rivals and the engine of cnnops (None: the device's own)."""
    rows = suites.rows(options.suites)
    rivals = [rival for rival in options.rivals if rival != FUSED]
    if options.cpu:
        for row in on_cpu(rows):
            scaling = row.case.suite == "scaling" and row.flops >= PARALLEL_FLOPS
            yield row, [*rivals, *([ONE_THREAD] if scaling else [])], None
        return
    if not options.dry_run:
        for row in by_interest(rows):
            slow = row.case.suite in ("kernelbench", "reports")
            yield row, [r for r in rivals if slow or not r.startswith("compile")], None
        return
    seen = set()
    for row in by_interest(rows):  # one row of each kind, on either engine
        kind = (row.case.op, row.direction, row.dtype == "float32")
        if kind in seen:
            continue
        seen.add(kind)
        small = Row(suites.reduced(row.case, **DRY), row.direction, row.dtype, row.layout)
        yield small, ("cnnops", "eager"), "emulate" if row.dtype == "float32" else "cpu"


def by_interest(rows: Iterable[Row]) -> list[Row]:
    """One row of every suite in turn, forward passes first; sweeps last."""
    tables: dict[str, list[Row]] = {}
    for row in rows:
        tables.setdefault(row.case.suite, []).append(row)
    order = sorted(tables, key=lambda name: FIRST.index(name) if name in FIRST else len(FIRST))
    forward = ("fprop", "fwd")
    for table in tables.values():
        table.sort(key=lambda row: row.direction not in forward)
    main = [tables[name] for name in order if name in FIRST]
    rest = [tables[name] for name in order if name not in FIRST]
    taken = [row for turn in (*zip_longest(*main), *zip_longest(*rest)) for row in turn]
    return [row for row in taken if row is not None]


def on_cpu(rows: Iterable[Row]) -> list[Row]:
    """Rows in the sizes that a CPU is asked for, those of which `bench.parts` tells first. Layers of networks
    in float32, and the suites "group_norms" and "scaling", come in both layouts, one right after the other.
    """
    told: list[Row] = []
    others: list[Row] = []
    for row in by_interest(rows):
        case = row.case
        if row.dtype != "float32" or case.suite not in (*suites.NETWORKS, "group_norms", "scaling"):
            case = suites.reduced(case, **ON_CPU)
            others.append(Row(case, row.direction, row.dtype, row.layout))
            continue
        if case.suite != "scaling":
            images = case.x[0] if case.suite.startswith("lenet5") else CPU_IMAGES
            fewer = replace(case, x=(images, *case.x[1:]))
            case = suites.reduced(fewer, **NETWORKS_ON_CPU)
        part = parts.parts_of(case.suite, parts.kind_of(case.op, case.problem), row.direction)
        layouts = parts.LAYOUTS if len(case.x) > 3 else (row.layout,)  # rows have no other
        both = (Row(case, row.direction, row.dtype, layout) for layout in layouts)
        (told if part else others).extend(both)
    return told + others


def _no_result(row: Row, why: str) -> dict[str, Any]:
    """A row that nobody was timed on."""
    case = row.case
    return {
        "id": row.id, "suite": case.suite, "case": case.name, "op": case.op, "direction": row.direction,
        "dtype": row.dtype, "layout": row.layout, "problem": row.problem, "count": case.count,
        "source": case.source, "flops": row.flops, "bytes": row.bytes_moved, "floor_s": 0.0, "times": {},
        "errors": {}, "absent": {"cnnops": why},
    }  # fmt: skip


def _line(result: dict[str, Any]) -> str:
    """One measured row or model, for those who watch."""
    words = [result["id"]]
    for rival, times in result["times"].items():
        words.append(f"{rival} {report.duration(times.get('cold', times['warm'])['median_s'])}")
    told = {r: why for r, why in result["absent"].items() if r == "cnnops" or report.failed(why)}
    return "  ".join(words + [f"{rival}: {why}" for rival, why in told.items()])


def step_models(options: Options) -> None:
    import torch

    machine.pin_threads()
    device, done = _device(options), {row["id"] for row in found(options, "models")}
    _keep_memory(options)
    for row in model_rows(options):
        if row.id in done or _left(options) < 4 * options.seconds:
            continue
        _current(options).write_text(row.id)
        names = ("cnnops", FUSED, "eager") if options.dry_run else options.rivals
        try:
            result = models.measure(
                row, names, device, 3 * options.seconds, timed=not options.dry_run
            )
        except Exception as error:
            result = _no_time(row, f"raised {type(error).__name__}: {error}")
        add(options, "models", result)
        print(f"  {_line(result)}", flush=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()


def model_rows(options: Options) -> list[ModelRow]:
    if options.dry_run:
        return [ModelRow("lenet5", phase, 2) for phase in ("infer", "train")]
    return models.rows(_device(options))


def _no_time(row: ModelRow, why: str) -> dict[str, Any]:
    """A network that nobody was timed on."""
    return {
        "id": row.id, "model": row.model, "phase": row.phase, "batch": row.batch, "dtype": row.dtype,
        "layout": row.layout, "times": {}, "errors": {}, "absent": {"cnnops": why},
    }  # fmt: skip


def step_sanitizer(options: Options) -> None:
    """Every kernel once under NVIDIA's own checkers, as a check of the emulator too."""
    tool = shutil.which("compute-sanitizer")
    command = _again(options, "kernels")
    if options.dry_run:
        code, text = _run(command, _left(options))
        add(
            options,
            "sanitizer",
            {"kernel": "all", "tool": "none", "ok": code == 0, "tail": text[-2000:]},
        )
        return
    if tool is None:
        print("  compute-sanitizer is not installed", flush=True)
        return
    for name in ("memcheck", "racecheck", "initcheck"):
        if _left(options) < 30:
            return
        code, text = _run([tool, "--tool", name, "--error-exitcode", "9", *command], _left(options))
        add(
            options,
            "sanitizer",
            {"kernel": "all", "tool": name, "ok": code == 0, "tail": text[-4000:]},
        )


def step_kernels(options: Options) -> None:
    """A small case of every operation and direction, computed once by cnnops: what the sanitizers look at."""
    device, seen = _device(options), set()
    ceilings = suites.Ceilings(1e12, {"float32": 1e13})
    for row in suites.rows():
        kind = (row.case.op, row.direction, row.dtype)
        if kind in seen or row.dtype not in ("float32", "bfloat16"):
            continue
        seen.add(kind)
        small = Row(suites.reduced(row.case, 1e6, 1e6), row.direction, row.dtype, row.layout)
        result = timing.measure(small, ("cnnops",), device, ceilings, 0, timed=False)
        print(_line(result), flush=True)


def step_profile(options: Options) -> None:
    """Nsight Compute's speed-of-light sections of the rows named."""
    tool = shutil.which("ncu")
    for name in options.profile or ():
        if tool is None or _left(options) < 20:
            add(
                options,
                "profile",
                {"row": name, "text": "no ncu" if tool is None else "no time left"},
            )
            continue
        command = [
            tool,
            "--set",
            "detailed",
            "--target-processes",
            "all",
            *_again(options, "one"),
            "--row",
            name,
        ]
        add(options, "profile", {"row": name, "text": _run(command, _left(options))[1][-60000:]})


def step_one(options: Options) -> None:
    """The row named with --row, computed once by cnnops: what the profiler looks at."""
    (row,) = [row for row in suites.rows() if row.id == options.row]
    ceilings = suites.Ceilings(1e12, {"float32": 1e13})
    print(
        _line(timing.measure(row, ("cnnops",), _device(options), ceilings, 0, timed=False)),
        flush=True,
    )


STEPS: dict[str, Callable[[Options], None]] = {
    "machine": step_machine, "golden": step_golden, "tests": step_tests, "layers": step_layers,
    "models": step_models, "sanitizer": step_sanitizer, "profile": step_profile, "kernels": step_kernels,
    "one": step_one,
}  # fmt: skip


# ---- running them -----------------------------------------------------------------------------------------


def _run(command: Sequence[str], seconds: float) -> tuple[int, str]:
    """Exit code and output of a command; 124 where it had to be ended."""
    try:
        done = subprocess.run(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
            timeout=max(1.0, seconds),
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        text = error.stdout or b""
        return 124, text.decode(errors="replace") if isinstance(text, bytes) else text
    return done.returncode, done.stdout


def _again(options: Options, step: str) -> list[str]:
    """The command that runs one step of this lab."""
    command = [
        sys.executable, str(Path(__file__).resolve()), "--step", step, "--out", str(options.out),
        "--deadline", str(options.deadline), "--seconds", str(options.seconds), "--rivals", *options.rivals,
    ]  # fmt: skip
    command += ["--suites", *options.suites] if options.suites else []
    command += ["--profile", *options.profile] if options.profile else []
    command += ["--commit", options.commit] if options.commit else []
    flags = {"--dry-run": options.dry_run, "--cpu": options.cpu, "--tf32": options.tf32}
    return command + [flag for flag, given in flags.items() if given]


def _supervise(options: Options, step: str, deadline: float) -> str | None:
    """Run a step until it is done or its time is up, again after a crash; what is wrong with it, if anything.

    A row that stays under way for too long counts as a crash.
    """
    trouble = None
    for _ in range(RESTARTS):
        _current(options).unlink(missing_ok=True)
        limited = argparse.Namespace(**{**vars(options), "deadline": deadline})
        process = subprocess.Popen(_again(limited, step), cwd=ROOT)
        while process.poll() is None:
            time.sleep(0.2)
            row = _current(options)
            stuck = row.is_file() and time.time() - row.stat().st_mtime > STALL_SECONDS
            if stuck or time.time() > deadline + 10:
                process.kill()
                process.wait()
        if process.returncode == 0:
            return trouble
        row = _current(options)
        if not row.is_file():
            return f"{step}: ended with exit code {process.returncode}"
        name = row.read_text()
        if time.time() > deadline:
            return trouble  # the row was merely the last one
        trouble = f"{step}: {name} ended its process with exit code {process.returncode}"
        _skip(options, step, name, trouble)
    return trouble


def _skip(options: Options, step: str, name: str, why: str) -> None:
    """Note the row that crashed, so that it is not tried again."""
    print(f"  {why}", flush=True)
    if step == "layers":
        (layer,) = [row for row, _, _ in layer_rows(options) if row.id == name]
        add(options, step, _no_result(layer, f"raised {why}"))
    elif step == "models":
        (network,) = [row for row in model_rows(options) if row.id == name]
        add(options, step, _no_time(network, f"raised {why}"))


def assemble(options: Options, troubles: Sequence[str]) -> Path:
    """The result file, from what the steps have left."""
    (first, *_) = found(options, "machine")
    golden = found(options, "golden")
    rows, networks = found(options, "layers"), found(options, "models")
    tests, checks = found(options, "tests"), found(options, "sanitizer")
    failures = list(troubles)
    # Exit code 1 says that tests failed, or vectors differ: the report lists those one by one.
    failures += [f"{t['file']}: ended with exit code {t['exit']}" for t in tests if t["exit"] > 1]
    failures += [f"golden: exit code {g['exit']}: {g['tail'][-300:]}" for g in golden if g["exit"]]
    what = first["machine"]
    if what["kind"] == "gpu":
        what["clocks"] = {k: v + machine.clocks().get(k, []) for k, v in what["clocks"].items()}
    content = {
        "schema": 1, **first,
        "settings": {
            "allow_tf32": options.tf32, "seconds_per_row": options.seconds, "dry_run": options.dry_run,
            "tune_files": os.environ.get("CNNOPS_TUNE_FILE", ""),
            "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", ""),
        },
        "rows": rows, "models": networks, "tests": tests, "golden": golden[0] if golden else {},
        "sanitizer": checks, "profile": found(options, "profile"), "failures": failures,
    }  # fmt: skip
    path = Path(options.out) / f"{machine.slug(what)}.json"
    path.write_text(text_of(content), encoding="utf-8")
    return path


def text_of(content: dict[str, Any]) -> str:
    """A result file's text: floats to five digits, a line for every row, as git likes it."""

    def rounded(value: Any) -> Any:
        if isinstance(value, float):
            return float(f"{value:.5g}")
        if isinstance(value, dict):
            return {key: rounded(v) for key, v in value.items()}
        return [rounded(v) for v in value] if isinstance(value, list) else value

    entries = []
    for key, value in rounded(content).items():
        if isinstance(value, list) and value:
            lines = ",\n".join(json.dumps(element) for element in value)
            entries.append(f"{json.dumps(key)}: [\n{lines}\n]")
        else:
            entries.append(f"{json.dumps(key)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(entries) + "\n}\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the lab; 0 where everything agreed, 1 where something failed, 2 for bad input."""
    options = _options(argv)
    if options.step:
        STEPS[options.step](options)
        return 0
    import torch

    if not (options.dry_run or options.cpu or torch.cuda.is_available()):
        print(
            "lab: expected an NVIDIA GPU that torch can use, got none; --cpu and --dry-run need none",
            file=sys.stderr,
        )
        return 2
    Path(options.out).mkdir(parents=True, exist_ok=True)
    options.deadline = time.time() + 60 * options.minutes
    troubles: list[str] = []
    shares = {**SHARES, **(CPU_SHARES if options.cpu else {})}
    for step in options.steps or (CPU_SHARES if options.cpu else SHARES):
        if step in ("machine", "golden", "sanitizer", "profile") and found(options, step):
            continue
        seconds = max(0.0, _left(options) - 5)
        print(f"== {step} ({seconds:.0f} s left)", flush=True)
        trouble = _supervise(options, step, time.time() + shares[step] * seconds)
        if trouble:
            troubles.append(trouble)
            print(f"  {trouble}", flush=True)
    if not found(options, "machine"):
        print("lab: nothing was measured", file=sys.stderr)
        return 1
    path = assemble(options, troubles)
    run = report.load(path)
    mine = [line for line in run.problems if not any(f": {rival}: " in line for rival in TORCH)]
    if options.dry_run:
        agreed = sum("cnnops" in result.times for result in (*run.rows, *run.models))
        report.console(run, Console(file=StringIO()))  # what it prints means nothing
        print(f"dry run: {agreed} rows and models computed and right", *mine, sep="\n")
    else:
        report.console(run)
    for leftover in Path(options.out).glob("part-*"):
        leftover.unlink()
    print(f"saved {path}")
    return 1 if mine else 0


def _options(argv: Sequence[str] | None) -> Options:
    parser = argparse.ArgumentParser(description="Measure and check everything, on a GPU.")
    parser.add_argument("--minutes", type=float, help="how long (default: 9, with --cpu 25)")
    parser.add_argument("--out", type=Path, required=True, help="folder for the result file")
    place = parser.add_mutually_exclusive_group()
    place.add_argument("--cpu", action="store_true", help="time the CPU engine, on smaller layers")
    place.add_argument(
        "--dry-run", action="store_true", help="walk through it without a GPU, on tiny problems"
    )
    steps = list(SHARES)
    parser.add_argument("--steps", nargs="+", choices=steps, metavar="STEP", help=", ".join(steps))
    parser.add_argument(
        "--suites", nargs="+", choices=list(suites.SUITES), metavar="SUITE", help="layers of these"
    )
    default = [rival for rival in RIVALS if not rival.startswith("compile")]
    parser.add_argument("--rivals", nargs="+", choices=RIVALS, default=default, help="who is timed")
    parser.add_argument(
        "--seconds", type=float, help="for a row's times (default: 0.5, with --cpu 0.25)"
    )
    parser.add_argument("--tf32", action="store_true", help="torch may multiply float32 as TF32")
    parser.add_argument("--profile", nargs="+", metavar="ROW", help="rows for Nsight Compute")
    parser.add_argument("--commit", help="the checkout's commit, where git cannot tell")
    parser.add_argument("--step", choices=list(STEPS), help=argparse.SUPPRESS)
    parser.add_argument("--row", help=argparse.SUPPRESS)
    parser.add_argument("--deadline", type=float, default=time.time() + 600, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.minutes is None:
        options.minutes = 25.0 if options.cpu else 9.0
    if options.seconds is None:
        options.seconds = 0.25 if options.cpu else 0.5
    return options


if __name__ == "__main__":
    sys.exit(main())

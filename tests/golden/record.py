"""Run items on this machine's GPU, in a worker process, so that one that fails stops none of the rest.

A worker runs one item after the other and prints a line of JSON for each. When it dies, hangs, or finds the
GPU unusable after a fault, the item it was at is counted as failed and a new worker goes on with the next.
"""

from __future__ import annotations

import json
import platform
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

import torch

from cnnops.cuda import emulate, jit

from .item import Comparison, Item, Tensors
from .items import ITEMS
from .vectors import Recording, save

SECONDS_PER_ITEM = 20.0  # the first of a worker also starts CUDA
ROOT = Path(__file__).resolve().parents[2]

Result = dict[str, Any]
"""What a worker says of one item: item, seconds, and either "failed" (why) or what `record_item` found."""


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, cwd=ROOT)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def machine() -> dict[str, str]:
    """What a recording says about where it was made."""
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    changed = _output("git", "status", "--porcelain", "--untracked-files=no")
    commit = _output("git", "rev-parse", "--short", "HEAD") or "unknown"
    return {
        "gpu": torch.cuda.get_device_name(),
        "arch": jit.arch_of(torch.cuda.current_device()),
        "driver": driver.partition("\n")[0] or "unknown",
        "cuda": str(torch.version.cuda),
        "nvrtc": ".".join(map(str, jit.nvrtc_version())),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit + ("+changes" if changed else ""),
    }


def has(item: Item, arch: str) -> bool:
    """Whether a GPU of the architecture `arch` ("80", "90a") has the item's instructions."""
    own, wanted = (name.rstrip("a") for name in (arch, item.arch))
    return int(own) >= int(wanted) and ("a" not in item.arch or own == wanted)


# ---- in the worker ---------------------------------------------------------------------------------------


def _summary(comparison: Comparison) -> dict[str, Any]:
    return {
        "wrong": comparison.wrong, "total": comparison.total, "largest": comparison.largest,
        "text": str(comparison),
    }  # fmt: skip


def record_item(item: Item, folder: Path, where: dict[str, str], device: str = "cuda") -> Result:
    """Runs the item and keeps what came out; compares with what is expected, and with the emulator."""
    inputs = item.make_inputs()
    outputs: Tensors = item.run(inputs, device)
    save(folder / f"{item.name}.npz", Recording(inputs, outputs, where))
    result: Result = {"expected": _summary(item.compare(inputs, outputs, item.expected(inputs)))}
    if emulate.available() is None:
        emulated = item.run(inputs, "cpu")
        result["emulator"] = _summary(item.compare(inputs, emulated, outputs))
    return result


def work(names: Sequence[str], folder: Path) -> int:
    """Runs items, one line of JSON each. Returns 1 when the GPU is of no use any more."""
    where = machine()
    for name in names:
        start, result = time.perf_counter(), {}
        print(json.dumps({"begins": name}), flush=True)
        try:
            result = record_item(ITEMS[name], folder, where)
        except Exception as error:
            result = {"failed": f"{type(error).__name__}: {error}"[:2000]}
        line = {"item": name, "seconds": time.perf_counter() - start, "machine": where, **result}
        print(json.dumps(line), flush=True)
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            return 1
    return 0


# ---- in the parent ---------------------------------------------------------------------------------------


def _lines(stream: IO[str], into: queue.Queue[str | None]) -> None:
    for line in stream:
        into.put(line)
    into.put(None)


WORKER = (sys.executable, "-m", "tests.golden", "work")


def _run_worker(command: Sequence[str], names: Sequence[str], seconds: float) -> Iterator[Result]:
    """Results of one worker, until it ends; the last one is a failure if it did not end well."""
    worker = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert worker.stdout is not None and worker.stderr is not None
    lines: queue.Queue[str | None] = queue.Queue()
    errors: list[str] = []
    readers = [
        threading.Thread(target=_lines, args=(worker.stdout, lines), daemon=True),
        threading.Thread(target=errors.extend, args=(worker.stderr,), daemon=True),
    ]
    for reader in readers:
        reader.start()
    running: str | None = names[0]  # to be blamed should the worker end; none between items
    while True:
        try:
            line = lines.get(timeout=seconds)
        except queue.Empty:
            worker.kill()
            worker.wait()
            yield {"item": running or names[-1], "failed": f"did not end in {seconds:g} s"}
            return
        if line is None:
            break
        if not line.startswith("{"):  # something that a library printed
            continue
        said = json.loads(line)
        running = said.get("begins")
        if "item" in said:
            yield said
    worker.wait()
    readers[1].join(timeout=5)
    if running is not None:
        last = "".join(errors[-5:]).strip() or "no message"
        yield {"item": running, "failed": f"the process ended with {worker.returncode}: {last}"}


def run_all(
    names: Sequence[str],
    folder: Path,
    tell: Callable[[Result], None],
    worker: Sequence[str] = WORKER,
    seconds: float = SECONDS_PER_ITEM,
) -> list[Result]:
    """Results of all items, in order; `tell` hears of each as it comes."""
    results: list[Result] = []
    left = list(names)
    while left:
        done = []
        command = [*worker, "--out", str(folder.resolve()), *left]
        for result in _run_worker(command, left, seconds):
            tell(result)
            results.append(result)
            done.append(result["item"])
        left = [name for name in left if name not in done]
    return results

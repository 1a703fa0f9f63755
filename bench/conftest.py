"""`make bench`: pytest-benchmark over a few rows of bench/suites.py, cnnops and torch side by side.

On a GPU rows have their full size, on a CPU they are scaled down. A result is checked against the reference
before it is timed. pytest-benchmark's clock is the host's; on a GPU the device's own times stand beside it.
For comparisons that count, with rivals interleaved, there is bench/lab.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from bench import machine, rivals, suites, timing
from bench.suites import Row

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MOST = {"most_flops": 2e8, "most_bytes": 2e7}
"""A row on a CPU: some milliseconds."""
NAMES = {"cnnops": "cnnops", "torch": "eager-benchmark" if DEVICE.type == "cuda" else "eager"}

Bench = Callable[[str, str], None]


@pytest.fixture(scope="session", autouse=True)
def threads() -> Iterator[None]:
    former = torch.get_num_threads()
    machine.pin_threads()
    yield
    torch.set_num_threads(former)


@pytest.fixture
def bench(benchmark: Any) -> Bench:
    """``bench(row_id, rival)`` checks and times a row."""
    rows = {row.id: row for row in suites.rows()}

    def run(name: str, rival: str) -> None:
        row = rows[name]
        if DEVICE.type == "cpu":
            row = Row(suites.reduced(row.case, **MOST), row.direction, row.dtype, row.layout)
        ready, absent = rivals.calls(row, [NAMES[rival]], DEVICE)
        assert not absent, f"{row.id}, {row.problem}: {absent}"
        call = ready[NAMES[rival]]
        benchmark.group = f"{row.id}: {row.problem}"
        with call.around():
            if DEVICE.type == "cpu":
                benchmark(call.run, 0)
            else:
                benchmark(_run_and_wait, call)
        benchmark.extra_info.update(error=call.error, bytes=row.bytes_moved, flops=row.flops)
        if DEVICE.type == "cuda":
            benchmark.extra_info["device"] = timing.take(ready, DEVICE, 0.5)[NAMES[rival]]

    return run


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """A line a row: both medians, and how many times faster cnnops is."""
    session = getattr(config, "_benchmarksession", None)
    groups: dict[str, dict[str, Any]] = {}
    for measured in session.benchmarks if session else []:
        if measured.stats is not None and measured.params:
            groups.setdefault(measured.group, {})[measured.params["rival"]] = measured
    lines = []
    for group, both in groups.items():
        if set(both) == set(NAMES):
            ours, theirs = (_seconds(both[rival]) for rival in NAMES)
            lines.append(f"{_text(ours):>10} {_text(theirs):>10} {theirs / ours:7.2f}x  {group}")
    if lines:
        what = machine.describe(DEVICE)
        terminalreporter.section("cnnops beside torch, medians")
        terminalreporter.write_line(
            f"{what['device']} · torch {what['torch']} · cnnops {what['cnnops']} at {what['commit']}"
            + (" with changes" if what["dirty"] else "")
        )
        terminalreporter.write_line(f"{'cnnops':>10} {'torch':>10} {'speed-up':>8}  row")
        for line in lines:
            terminalreporter.write_line(line)


def _run_and_wait(call: rivals.Call) -> None:
    call.run(0)
    torch.cuda.synchronize()


def _seconds(measured: Any) -> float:
    """The device's time where it was taken, else the host's."""
    device = measured.extra_info.get("device")
    return float(device["cold"]["median_s"] if device else measured.stats.median)


def _text(seconds: float) -> str:
    return f"{seconds * 1e6:.1f} µs" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"

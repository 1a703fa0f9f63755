"""How a time is taken: all rivals of a row in turn, in one run, until the row's share of seconds is spent.

On a GPU. CUDA events around each call; the medians of these are reported, with the 10th and 90th percentile.
Before every batch of work the stream sleeps, so that the host is ahead and its own time does not count.

    cold     one call after the L2 cache was overwritten, inputs rotating: what a layer inside a network sees
    warm     calls in a row on the same tensors, divided by their number
    graph    a CUDA graph of such calls, replayed: for kernels so short that launching them takes longer

On a CPU: the host's clock around enough calls to last some milliseconds: "warm". torch and numba have one
thread a core. One that waits spins for a while, as OpenMP has it by default: that makes both faster, and
costs the rival whose turn is next less than the noise. glibc is told to keep the memory of results
(`cnnops.keep_memory`) instead of giving it back to Linux: fresh pages would hit a rival by chance.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from statistics import quantiles
from time import perf_counter
from typing import Any

import torch

from bench.rivals import ONE_THREAD, Call, calls
from bench.suites import Ceilings, Row

Times = dict[str, dict[str, Any]]
"""Variant -> median_s, p10_s, p90_s, samples."""

LEAST = 7
"""Rounds that every rival gets, whatever they take."""
BATCH_SECONDS = 4e-3
"""How long a batch of warm calls should last."""
LAUNCH_BOUND = 60e-6
"""Calls shorter than this are also timed as a graph."""


def summary(samples: Sequence[float]) -> dict[str, Any]:
    """Median and spread of at least two samples, in seconds."""
    cuts = quantiles(samples, n=20, method="inclusive")
    return {"median_s": cuts[9], "p10_s": cuts[1], "p90_s": cuts[17], "samples": len(samples)}


def take(
    ready: Mapping[str, Call],
    device: torch.device,
    seconds: float,
    variants: Sequence[str] = ("cold", "warm", "graph"),
) -> dict[str, Times]:
    """Times of each rival, all taken within about `seconds`. Nothing else may use the device meanwhile."""
    if not ready:
        return {}
    gc.collect()
    gc.disable()  # a collection would fall on whoever is being timed
    try:
        if device.type == "cuda":
            return _on_gpu(ready, device, seconds, variants)
        return _on_cpu(ready, seconds)
    finally:
        gc.enable()


def _rounds(seconds: float, one_round: Callable[[int], None], least: int = LEAST) -> None:
    start = perf_counter()
    number = 0
    while number < least or perf_counter() - start < seconds:
        one_round(number)
        number += 1


def _turns(ready: Mapping[str, Call], number: int) -> list[tuple[str, Call]]:
    """The rivals, each round beginning with another one."""
    order = list(ready.items())
    first = number % len(order)
    return order[first:] + order[:first]


# ---- on a CPU ---------------------------------------------------------------------------------------------


def _on_cpu(ready: Mapping[str, Call], seconds: float) -> dict[str, Times]:
    repeats: dict[str, int] = {}
    for name, call in ready.items():
        with call.around():
            call.run(0)
            start = perf_counter()
            call.run(0)
            repeats[name] = max(1, min(1000, int(BATCH_SECONDS / (perf_counter() - start))))
    samples: dict[str, list[float]] = {name: [] for name in ready}

    def one_round(number: int) -> None:
        for name, call in _turns(ready, number):
            with call.around():
                start = perf_counter()
                for i in range(repeats[name]):
                    call.run(i)
                samples[name].append((perf_counter() - start) / repeats[name])

    _rounds(seconds, one_round)
    return {name: {"warm": summary(taken)} for name, taken in samples.items()}


# ---- on a GPU ---------------------------------------------------------------------------------------------


def _on_gpu(
    ready: Mapping[str, Call], device: torch.device, seconds: float, variants: Sequence[str]
) -> dict[str, Times]:
    times: dict[str, Times] = {name: {} for name in ready}
    if "cold" in variants:
        for name, taken in _cold(ready, device, seconds * 0.6).items():
            times[name]["cold"] = summary(taken)
    for name, taken in _warm(ready, device, seconds * 0.25).items():
        times[name]["warm"] = summary(taken)
    if "graph" not in variants:
        return times
    short = {n: c for n, c in ready.items() if times[n]["warm"]["median_s"] < LAUNCH_BOUND}
    for name, taken in _graphs(short, device, seconds * 0.15).items():
        times[name]["graph"] = summary(taken)
    return times


def _sleep(seconds: float) -> None:
    """Keep the stream busy, so that the host can queue work behind it."""
    torch.cuda._sleep(int(seconds * 1.8e9))  # cycles; the clock is at most some 2 GHz


def _cold(
    ready: Mapping[str, Call], device: torch.device, seconds: float
) -> dict[str, list[float]]:
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    flush = torch.empty(max(4 * cache, 1 << 28), dtype=torch.int8, device=device)
    samples: dict[str, list[float]] = {name: [] for name in ready}

    def one_round(number: int) -> None:
        marks: list[tuple[str, Any, Any]] = []
        _sleep(1e-3)
        for name, call in _turns(ready, number):
            with call.around():
                for i in range(3):
                    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                    flush.fill_(i)
                    begin.record()
                    call.run(3 * number + i)
                    end.record()
                    marks.append((name, begin, end))
        torch.cuda.synchronize(device)
        for name, begin, end in marks:
            samples[name].append(begin.elapsed_time(end) * 1e-3)

    _rounds(seconds, one_round)
    return samples


def _warm(
    ready: Mapping[str, Call], device: torch.device, seconds: float
) -> dict[str, list[float]]:
    plans: dict[
        str, tuple[int, float]
    ] = {}  # calls a batch, and how long the host takes to queue them
    for name, call in ready.items():
        with call.around():
            call.run(0)
            torch.cuda.synchronize(device)
            start = perf_counter()
            call.run(0)
            queued = perf_counter() - start
            torch.cuda.synchronize(device)
            repeats = max(1, min(50, int(BATCH_SECONDS / (perf_counter() - start))))
            plans[name] = repeats, min(0.02, 2 * repeats * queued)
    samples: dict[str, list[float]] = {name: [] for name in ready}

    def one_round(number: int) -> None:
        marks: list[tuple[str, Any, Any]] = []
        for name, call in _turns(ready, number):
            repeats, lead = plans[name]
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            with call.around():
                _sleep(lead)
                begin.record()
                for _ in range(repeats):
                    call.run(0)
                end.record()
            marks.append((name, begin, end))
        torch.cuda.synchronize(device)
        for name, begin, end in marks:
            samples[name].append(begin.elapsed_time(end) * 1e-3 / plans[name][0])

    _rounds(seconds, one_round)
    return samples


def _graphs(
    ready: Mapping[str, Call], device: torch.device, seconds: float
) -> dict[str, list[float]]:
    """Times of rivals whose calls can be captured. One that cannot is left out: it has its warm time."""
    length = 20
    graphs: dict[str, Any] = {}
    for name, call in ready.items():
        graph = torch.cuda.CUDAGraph()
        try:
            with call.around(), torch.cuda.graph(graph):
                for _ in range(length):
                    call.run(0)
        except RuntimeError:
            torch.cuda.synchronize(device)
            continue
        graphs[name] = graph
    samples: dict[str, list[float]] = {name: [] for name in graphs}

    def one_round(number: int) -> None:
        marks: list[tuple[str, Any, Any]] = []
        names = list(graphs)
        first = number % len(names)
        _sleep(5e-4)
        for name in names[first:] + names[:first]:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graphs[name].replay()
            end.record()
            marks.append((name, begin, end))
        torch.cuda.synchronize(device)
        for name, begin, end in marks:
            samples[name].append(begin.elapsed_time(end) * 1e-3 / length)

    if graphs:
        _rounds(seconds, one_round)
    return samples


# ---- rows -------------------------------------------------------------------------------------------------


def measure(
    row: Row,
    rivals: Sequence[str],
    device: torch.device,
    ceilings: Ceilings,
    seconds: float,
    *,
    tf32: bool = False,
    engine: str | None = None,
    timed: bool = True,
) -> dict[str, Any]:
    """One entry of a result file's "rows": checked results, then times. With ``timed=False``, for a dry run,
    every rival is prepared and checked, and called once.
    """
    case = row.case
    memory = float(torch.cuda.mem_get_info(device)[0]) / 3 if device.type == "cuda" else 2e9
    sets = 3 if device.type == "cuda" and row.bytes_moved < 2**30 else 1
    ready, absent = calls(row, rivals, device, sets=sets, tf32=tf32, memory=memory, engine=engine)
    # Torch drops the convolutions it has prepared when the number of threads changes: that rival comes last.
    serial = {name: call for name, call in ready.items() if name == ONE_THREAD}
    others = {name: call for name, call in ready.items() if name != ONE_THREAD}
    if timed:
        times = take(others, device, seconds) | take(serial, device, seconds / 2)
    else:
        times = once(ready)
    return {
        "id": row.id, "suite": case.suite, "case": case.name, "op": case.op, "direction": row.direction,
        "dtype": row.dtype, "layout": row.layout, "problem": row.problem, "count": case.count,
        "source": case.source, "flops": row.flops, "bytes": row.bytes_moved,
        "floor_s": row.floor_seconds(ceilings, tf32), "times": times,
        "errors": {name: call.error for name, call in ready.items()}, "absent": absent,
    }  # fmt: skip


def once(ready: Mapping[str, Call]) -> dict[str, Times]:
    """The time of one call each: for a dry run, which times nothing."""
    times: dict[str, Times] = {}
    for name, call in ready.items():
        with call.around():
            start = perf_counter()
            call.run(0)
            once = perf_counter() - start
        times[name] = {"warm": {"median_s": once, "p10_s": once, "p90_s": once, "samples": 1}}
    return times

"""How the CPU engine runs its kernels: threads, forked processes, scratch."""

from __future__ import annotations

import gc
import os
import random
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import cnnops
from cnnops.cpu import conv, task
from cnnops.cpu.task import SERIAL_WORK, Program, Run, Task, layout, pointer, unpack
from cnnops.shapes import ConvShape

WORDS = 2000
"""Of scratch that `marked` fills and reads again: long enough for threads to meet there if they share it."""


def make_marked() -> Task:
    args = layout("int64**2 int64")

    def test_marked(address: int, index: int, scratch: int) -> None:
        """Counts how often each index is done, and adds up what it has written to its scratch."""
        done, sums, words = unpack(address, args)
        mine = pointer(scratch, "int64")
        for i in range(words):
            mine[i] = index + i
        total = 0
        for i in range(words):
            total += mine[i]
        sums[index] = total
        done[index] += 1

    return Task(test_marked, args)


marked = lru_cache(None)(make_marked)


def check(
    kernel: Task, count: int, work: float = SERIAL_WORK, words: int = WORDS, scratch_bytes: int = 0
) -> None:
    done, sums = np.zeros(count, np.int64), np.zeros(count, np.int64)
    kernel.run(
        count,
        work,
        done.ctypes.data,
        sums.ctypes.data,
        words,
        scratch_bytes=scratch_bytes or 8 * words,
    )
    assert (done == 1).all()
    assert np.array_equal(sums, np.arange(count) * words + words * (words - 1) // 2)


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """Two at least, whatever the machine; and as many as before in the end."""
    former = torch.get_num_threads()
    torch.set_num_threads(max(2, former))
    yield
    torch.set_num_threads(former)


@pytest.fixture(params=["torch's OpenMP", "Python's threads"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Task:
    """`marked`, run by torch's threads, or as it is where torch has no OpenMP."""
    if request.param == "torch's OpenMP":
        if not task._openmp():
            pytest.skip("this torch runs on no OpenMP library that is known")
        return marked()
    monkeypatch.setattr(task, "_openmp", lambda: None)
    monkeypatch.setattr(task, "_drivers", lru_cache(None)(task._Drivers))
    return make_marked()


def problem() -> tuple[Callable[[torch.Tensor], None], torch.Tensor]:
    """A convolution that is worth several threads: what fills its result, and the result."""
    x, w = torch.randn(4, 16, 28, 28), torch.randn(16, 16, 3, 3)
    shape = ConvShape.of(x.shape, w.shape, padding=1)

    def fill(y: torch.Tensor) -> None:
        conv.conv_fprop(shape, x, w, None, y)

    y = torch.empty(shape.y_size)
    fill(y)
    return fill, y


# ---- threads ---------------------------------------------------------------------------------------------


def test_torch_on_linux_has_openmp() -> None:
    """Python's threads are for other systems."""
    if (
        sys.platform == "linux"
        and "OpenMP" in torch.__config__.parallel_info().split("backend:")[1]
    ):
        assert task._openmp()


def test_every_index_is_done_once(kernel: Task) -> None:
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for count in (0, 1, 2, 5, 300):
            check(kernel, count)


COUNTS = (20, 1, 300)


def programmed(kernel: Task) -> Program:
    """A run of each of these counts, with what is done and the sums behind it in a row of memory."""
    runs = [Run(kernel, n, SERIAL_WORK, (None, None, WORDS), 8 * WORDS) for n in COUNTS]
    places = [{0: (row, 0), 1: (row, 8 * n)} for row, n in enumerate(COUNTS)]
    return Program(runs, places, len(COUNTS))


def check_program(program: Program) -> None:
    """Twice, in other memory."""
    for _ in range(2):
        rows = [np.zeros((2, n), np.int64) for n in COUNTS]
        program.run([row.ctypes.data for row in rows])
        for done, sums in rows:
            expected = np.arange(len(sums)) * WORDS + WORDS * (WORDS - 1) // 2
            assert (done == 1).all() and np.array_equal(sums, expected)


def test_programs(kernel: Task) -> None:
    check_program(programmed(kernel))


def test_a_program_of_nothing() -> None:
    Program([], [], 1).run([0])


def test_small_work_stays_in_the_thread_that_calls(kernel: Task) -> None:
    args = layout("int64*")

    def test_scratch_of(address: int, index: int, scratch: int) -> None:
        (places,) = unpack(address, args)
        places[index] = scratch

    places = np.zeros(500, np.int64)
    small = Task(test_scratch_of, args)
    small.run(500, SERIAL_WORK - 1, places.ctypes.data, scratch_bytes=1)
    assert len(set(places.tolist())) == 1
    torch.set_num_threads(1)
    small.run(500, SERIAL_WORK, places.ctypes.data, scratch_bytes=1)
    assert len(set(places.tolist())) == 1


def test_number_of_threads_may_change_between_calls(kernel: Task) -> None:
    fill, y = problem()
    numbers = random.Random(0)
    for _ in range(40):
        torch.set_num_threads(numbers.randint(1, 3))
        check(kernel, numbers.randint(1, 9))
        again = torch.empty_like(y)
        fill(again)
        assert torch.equal(again, y)


def test_many_callers_beside_operations_of_torch(kernel: Task) -> None:
    """Eight threads, each with 1,000 calls, some of torch's own between them that run on the same threads."""
    fill, y = problem()
    ones = torch.ones(40_000)
    failures: list[BaseException] = []

    def call(seed: int) -> None:
        numbers = random.Random(seed)
        try:
            for _ in range(1000):
                check(kernel, numbers.randint(1, 9), words=50)
                if numbers.random() < 0.1:
                    assert ones.add(seed).sum().item() == 40_000 * (1 + seed)
                if numbers.random() < 0.05:
                    again = torch.empty_like(y)
                    fill(again)
                    assert torch.equal(again, y)
        except BaseException as failure:
            failures.append(failure)

    callers = [threading.Thread(target=call, args=(seed,)) for seed in range(8)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not failures


def test_callers_from_pools(kernel: Task) -> None:
    """More callers than threads, and callers whose caller waits for them in a pool of its own."""

    def nested(count: int) -> None:
        check(kernel, count)
        with ThreadPoolExecutor(2) as inner:
            for done in [inner.submit(check, kernel, count + n) for n in range(3)]:
                done.result()

    with ThreadPoolExecutor(6) as pool:
        for done in [pool.submit(nested, count) for count in range(20)]:
            done.result()


def test_without_new_threads_the_caller_does_it_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when the interpreter is about to end."""
    monkeypatch.setattr(task, "_openmp", lambda: None)
    monkeypatch.setattr(task, "_drivers", lru_cache(None)(task._Drivers))
    monkeypatch.setattr(task, "_pool", lru_cache(None)(task._pool.__wrapped__))
    task._pool().shutdown()
    check(make_marked(), 20)


# ---- processes -------------------------------------------------------------------------------------------

forks = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]


def in_child(function: Callable[[], None]) -> int:
    """The exit status of a forked process that calls `function`."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            function()
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def forked(function: Callable[..., None]) -> Callable[..., None]:
    for mark in forks:
        function = mark(function)
    return function


@forked
def test_forked_child_computes(kernel: Task) -> None:
    """A fork leaves the threads of a team behind, and OpenMP would wait for them for ever."""
    fill, y = problem()
    expected = bytes(y.numpy())  # torch's own operations hang in such a child

    def compute() -> None:
        again = torch.empty_like(y)
        fill(again)
        assert bytes(again.numpy()) == expected
        check(kernel, 20)

    for _ in range(2):
        check(kernel, 20)  # the parent's threads are as they were
        assert in_child(compute) == 0
    compute()


@forked
def test_forked_child_runs_programs(kernel: Task) -> None:
    program = programmed(kernel)
    check_program(program)
    assert in_child(lambda: check_program(program)) == 0
    check_program(program)


@forked
def test_threads_of_a_forked_child_compute(kernel: Task) -> None:
    """Those started in the child have teams of their own; and a child of the child's is as the child."""

    def in_thread() -> None:
        with ThreadPoolExecutor(1) as pool:
            for _ in range(3):
                pool.submit(check, kernel, 20).result()

    def compute() -> None:
        check(kernel, 20)
        in_thread()
        assert in_child(in_thread) == 0
        with ThreadPoolExecutor(1) as pool:
            pool.submit(check, kernel, 20).result()
            assert pool.submit(in_child, lambda: check(kernel, 20)).result() == 0

    check(kernel, 20)
    assert in_child(compute) == 0
    check(kernel, 20)


class Blurred(Dataset[torch.Tensor]):
    def __init__(self) -> None:
        self.images = torch.arange(8 * 3 * 64 * 64.0).view(8, 3, 64, 64)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> torch.Tensor:
        with cnnops.engine("cpu"):
            return cnnops.functional.avg_pool2d(self.images[index], 3, 1, 1)


@forked
def test_workers_of_a_data_loader_compute() -> None:
    images = Blurred()
    expected = torch.stack([images[n] for n in range(len(images))])
    for _ in range(2):
        check(marked(), 20)
        loader = DataLoader(images, 2, num_workers=2, multiprocessing_context="fork")
        assert torch.equal(torch.cat(list(loader)), expected)


RANK = """
import sys
import torch
import torch.distributed as dist
import cnnops
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
torch.set_num_threads(2)
torch.manual_seed(0)
x, w = torch.randn(8, 8, 24, 24, dtype=torch.float64), torch.randn(16, 8, 3, 3, dtype=torch.float64)
whole = torch.nn.functional.conv2d(x, w).sum((0, 2, 3))
with cnnops.engine("cpu"):
    for _ in range(10):
        part = cnnops.functional.conv2d(x[4 * rank :][:4], w).sum((0, 2, 3))
        dist.all_reduce(part)
        assert torch.allclose(part, whole, rtol=1e-12, atol=1e-9)
dist.destroy_process_group()
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed")
def test_processes_of_a_group_compute(tmp_path: Path) -> None:
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), str(tmp_path / "store")],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for rank in ranks:
        _, said = rank.communicate(timeout=300)
        assert rank.returncode == 0, said


# ---- scratch ---------------------------------------------------------------------------------------------


def test_scratch_is_kept_between_calls_up_to_a_bound() -> None:
    def pages() -> list[tuple[int, int]]:
        """Size and address of what this thread has after each of some calls."""
        found = []
        for size in (16_000, 1_000_000, 20_000, task.KEPT_BYTES, task.KEPT_BYTES + 1, 16_000):
            check(marked(), 8, scratch_bytes=size)
            found.append(task._scratch.pages[:2])
        return found

    with ThreadPoolExecutor(1) as pool:
        first, second, third, most, *rest = pool.submit(pages).result()
        assert first[0] < second[0] == third[0] < most[0] and second == third
        assert rest == [most] * 2  # more than the bound is not kept, and takes nothing away
        assert all(address % task.PAGE == 0 for _, address in (first, second, most))
        assert most[0] == task.KEPT_BYTES * min(8, torch.get_num_threads())
        with ThreadPoolExecutor(1) as other:
            assert other.submit(pages).result()[3][1] != most[1]


def test_scratch_ends_with_its_thread() -> None:
    def memory() -> weakref.ref[np.ndarray]:
        check(marked(), 8, scratch_bytes=1_000_000)
        return weakref.ref(task._scratch.pages[2])

    with ThreadPoolExecutor(1) as pool:
        kept = pool.submit(memory).result()
        assert kept() is not None
    gc.collect()
    assert kept() is None


# ---- what kernels are made of ----------------------------------------------------------------------------


def test_layout_names_each_argument() -> None:
    words = layout("float32**2 int64*3 float64").split()
    assert words == ["float32*"] * 2 + ["int64"] * 3 + ["float64"]


@pytest.mark.parametrize(
    "sizes, strides, expected",
    [
        ((2, 3, 4), (12, 4, 1), ([1, 1, 24], [0, 0, 1])),
        ((2, 3, 4), (24, 4, 1), ([1, 2, 12], [0, 24, 1])),
        ((2, 3, 4), (0, 0, 0), ([1, 1, 24], [0, 0, 0])),
        ((2, 1, 4), (4, 99, 1), ([1, 1, 8], [0, 0, 1])),
        ((3, 2, 4), (1, 13, 3), ([3, 2, 4], [1, 13, 3])),
    ],
)
def test_collapse(
    sizes: tuple[int, ...], strides: tuple[int, ...], expected: tuple[list[int], list[int]]
) -> None:
    assert task.collapse(sizes, strides) == expected

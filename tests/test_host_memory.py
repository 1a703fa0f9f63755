"""Large results are asked for in huge pages: which, where in them, and that nothing else depends on it. And
what is freed is kept where that is asked for."""

from __future__ import annotations

import platform
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import cnnops
import cnnops.functional as CF
from cnnops import memory

SIZE = 1 << 16
"""Stands for the size of a huge page, so that tensors of megabytes have several."""


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    """What the system was asked for: (address, bytes, advice)."""
    calls: list[tuple[int, int, int]] = []

    def advise(address: int, count: int, advice: int) -> int:
        calls.append((address, count, advice))
        return -1  # the system may refuse

    monkeypatch.setattr(memory, "_system", lambda: (SIZE, advise))
    return calls


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64])
def test_whole_pages_within(asked: list[tuple[int, int, int]], dtype: torch.dtype) -> None:
    t = torch.empty(memory.LEAST + 12345, dtype=dtype)
    assert memory.use_huge_pages(t) is t
    ((start, count, advice),) = asked
    begin, end = t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()
    assert advice == 14
    assert start % SIZE == count % SIZE == 0
    assert begin <= start < begin + SIZE
    assert end - SIZE < start + count <= end


def test_no_whole_page(asked: list[tuple[int, int, int]]) -> None:
    memory.use_huge_pages(torch.empty(SIZE // 2, dtype=torch.uint8))
    assert asked == []


def test_large_results_alone(asked: list[tuple[int, int, int]]) -> None:
    x = torch.randn(1, 4, 512, 512, requires_grad=True)
    w = torch.randn(4, 4, 1, 1)
    CF.max_pool2d(x.detach(), 2)  # a quarter as large
    assert asked == []
    y = CF.conv2d(x, w)
    assert len(asked) == 1 and y.numel() == memory.LEAST
    y.backward(torch.randn_like(y))
    assert len(asked) == 2
    torch.testing.assert_close(y, torch.nn.functional.conv2d(x, w), rtol=1e-5, atol=1e-5)


def test_fake_tensors_have_no_memory(asked: list[tuple[int, int, int]]) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        y = CF.conv2d(torch.empty(1, 4, 512, 512), torch.empty(4, 4, 1, 1))
    assert y.shape == (1, 4, 512, 512)
    assert CF.conv2d(
        torch.empty(1, 4, 512, 512, device="meta"), torch.empty(4, 4, 1, 1, device="meta")
    ).is_meta
    assert asked == []


@pytest.mark.parametrize("enabled", ["[always] madvise never", "always madvise [never]", None])
def test_nobody_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, enabled: str | None
) -> None:
    """Where the administrator has decided for all or none, or the system has no such pages."""
    if enabled:
        (tmp_path / "enabled").write_text(enabled)
        (tmp_path / "hpage_pmd_size").write_text("2097152")
    monkeypatch.setattr(memory, "_SETTINGS", tmp_path)
    monkeypatch.setattr(memory, "_system", memory._system.__wrapped__)
    assert memory._system() is None
    t = torch.ones(memory.LEAST)
    assert memory.use_huge_pages(t) is t


def test_the_system_takes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real call, whatever it answers, leaves memory as it was."""
    (tmp_path / "enabled").write_text("always [madvise] never")
    (tmp_path / "hpage_pmd_size").write_text("2097152")
    monkeypatch.setattr(memory, "_SETTINGS", tmp_path)
    monkeypatch.setattr(memory, "_system", memory._system.__wrapped__)
    t = torch.ones(8 * memory.LEAST)
    memory.use_huge_pages(t)
    assert bool((t == 1).all())
    with cnnops.engine("cpu"):
        assert bool((CF.avg_pool2d(t.view(1, 2, 2048, 2048), 1) == 1).all())


def test_freed_memory_is_kept() -> None:
    """In a process of its own: results of some megabytes, and of more than glibc ever keeps by itself, bring
    no new pages. Other threads still get what they need."""
    script = """
        import resource
        import sys
        import threading

        import torch

        import cnnops

        def faults():
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            for _ in range(5):
                results = [torch.ones(5_000_000) for _ in range(3)] + [torch.ones(20_000_000)]
                assert all(bool((t == 1).all()) for t in results)
                del results
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

        kept = cnnops.keep_memory()
        faults()
        print(int(kept), faults())
        found = []
        other = threading.Thread(target=lambda: found.append(faults()))
        other.start()
        other.join()
        assert found
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    told = subprocess.run(command, capture_output=True, text=True, check=True)
    kept, faults = map(int, told.stdout.split())
    assert kept == (platform.libc_ver()[0] == "glibc")
    assert faults < 1000 or not kept  # or, unless chance has it otherwise, 170,000


def test_a_library_that_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda _: object())
    assert cnnops.keep_memory() is False

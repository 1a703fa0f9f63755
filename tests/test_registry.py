"""The table of kernels: every row is reached by a row of tests/cases, and how one is chosen."""

from __future__ import annotations

import importlib
import inspect
import re
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from cases import CASES, Case, ConvCase, NormCase, PoolCase, device_of, needs_emulator, run

import cnnops
from cnnops import functional as C
from cnnops import registry
from cnnops.config import settings
from cnnops.cuda.kernel import kernels_dir
from cnnops.ops.norm import batch_norm_stats
from cnnops.registry import ROWS, UnsupportedError
from cnnops.shapes import ConvShape

# ---- coverage -------------------------------------------------------------------------------------------

Reached = tuple[str, str, str]


def _problems(case: Case) -> Iterator[tuple[str, registry.Shape]]:
    """What the row asks the table for, in forward, backward and, for max pooling, the second backward."""
    asked: list[tuple[str, registry.Shape]] = []
    choose = registry.choose

    def record(op: str, engine: str, shape: registry.Shape, dtype: torch.dtype) -> Any:
        asked.append((op, shape))
        return choose(op, engine, shape, dtype)

    with pytest.MonkeyPatch.context() as patch, cnnops.engine("aten"):
        patch.setattr(registry, "choose", record)
        tensors = case.tensors(torch.float32)
        run(case.ours, tensors, case.grad)
        if isinstance(case, NormCase) and tensors[0].numel():
            batch_norm_stats(tensors[0], "aten")
        if isinstance(case, PoolCase) and case.kind in ("max", "adaptive_max"):
            leaf = tensors[0].requires_grad_()
            y = case.ours(leaf)
            grad = torch.ones_like(y).requires_grad_()
            (first,) = torch.autograd.grad(y, leaf, grad, create_graph=True)
            torch.autograd.grad(first, grad, torch.ones_like(first))
    yield from asked


def test_every_row_is_reached_by_a_case() -> None:
    """Each (operation, engine, module) is what `choose` picks for a problem that a row of tests/cases poses.

    The tests of that row's family run it in each engine that this machine has; im2col under its own name.
    """
    missing = {(row.op, engine, row.module) for row in ROWS for engine in row.engines}
    for case in CASES:
        if not missing:
            break
        for op, shape in _problems(case):
            for algorithm in ("", *registry.algorithms()):
                for engine in ("cuda", "emulate", "cpu", "aten"):
                    choice = registry._choose(
                        op, engine, algorithm, shape, torch.float32, tf32=True
                    )
                    if choice.engine == engine:
                        missing.discard((op, engine, choice.row.module))
    assert not missing


@pytest.mark.parametrize("kind", [ConvCase, PoolCase, NormCase])
def test_ids_of_cases_are_unique(kind: type[Case]) -> None:
    ids = [case.id for case in CASES if isinstance(case, kind)]
    assert len(ids) == len(set(ids))
    assert all(case.why for case in CASES)


def test_every_engine_has_every_operation() -> None:
    for engine in ("cuda", "emulate", "cpu", "aten"):
        assert {row.op for row in ROWS if engine in row.engines} == {
            *registry.CONV, "conv_fold", *registry.POOL, *registry.UNPOOL, *registry.BATCH_NORM,
            *registry.GROUP_NORM,
        }  # fmt: skip


def test_every_kernel_file_has_a_row_and_a_line_in_the_readme() -> None:
    readme = (kernels_dir() / "README.md").read_text()
    modules = {row.algorithm: row.module for row in ROWS if "cuda" in row.engines}
    sources = {path.stem for path in kernels_dir().glob("*.cu")}
    assert set(modules) <= sources
    for stem in sources - set(modules):  # a second file of a launcher, or of a module beside it
        owners = [modules[name] for name in modules if stem.startswith(f"{name}_")]
        owners += [name for name in (f"cnnops.cuda.{stem}",) if find_spec(name)]
        launchers = [inspect.getsource(importlib.import_module(name)) for name in owners]
        assert any(f'"{stem}.cu"' in text for text in launchers), stem
    for source in kernels_dir().glob("*.cu*"):
        assert re.search(rf"^.*\b{re.escape(source.name)}\b", readme, re.MULTILINE), source.name


# ---- choosing -------------------------------------------------------------------------------------------


def test_algorithm_changes_what_runs() -> None:
    x, w = torch.randn(1, 2, 5, 5), torch.randn(3, 2, 3, 3)
    shape = ConvShape.of(x.shape, w.shape)
    for name in ("conv_direct", "conv_im2col"):
        with cnnops.algorithm(name):
            choice = registry._choose("conv_fprop", "cuda", settings.algorithm, shape, x.dtype)
            assert choice.row.module == f"cnnops.cuda.{name}"


def test_explain_names_every_operation_in_call_order() -> None:
    x = torch.randn(2, 3, 6, 6, requires_grad=True)
    w = torch.randn(4, 3, 3, 3, requires_grad=True)

    def step(x: torch.Tensor, *, w: torch.Tensor) -> None:
        C.max_pool2d(C.conv2d(x, w), 2).sum().backward()

    choices = cnnops.explain(step, x, w=w)
    ops = ["conv_fprop", "max_pool_fwd", "max_pool_bwd", "conv_dgrad", "conv_wgrad"]
    assert [choice.op for choice in choices] == ops
    assert {choice.engine for choice in choices} == {"cpu"}
    assert str(choices[0]) == "conv_fprop: conv (cpu)"
    assert cnnops.explain(lambda: None) == []


@pytest.fixture
def no_float64_pooling(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The cpu engine's pooling refuses float64."""
    from cnnops.cpu import pool

    def supports(op: str, shape: registry.Shape, dtype: torch.dtype) -> str | None:
        return "no float64 today" if dtype == torch.float64 else None

    monkeypatch.setattr(pool, "supports", supports)
    for cache in (registry._choose, registry._warn_once):
        cache.cache_clear()
    yield
    monkeypatch.undo()
    for cache in (registry._choose, registry._warn_once):
        cache.cache_clear()


@pytest.mark.usefixtures("no_float64_pooling")
def test_fallback() -> None:
    x = torch.randn(1, 1, 4, 4, dtype=torch.float64)
    expected = torch.nn.functional.avg_pool2d(x, 2)
    with pytest.raises(UnsupportedError, match="avg_pool_fwd in engine 'cpu'.*pool: no float64"):
        C.avg_pool2d(x, 2)
    with cnnops.fallback("warn"):
        with pytest.warns(UserWarning, match="no float64 today.*PyTorch's own op runs instead"):
            assert torch.equal(C.avg_pool2d(x, 2), expected)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a reason is told once
            C.avg_pool2d(x, 2)
    registry._warn_once.cache_clear()
    with cnnops.fallback("silent"), warnings.catch_warnings():
        warnings.simplefilter("error")
        (choice,) = cnnops.explain(C.avg_pool2d, x, 2)
    assert choice.engine == "aten"
    assert str(choice) == "avg_pool_fwd: aten (aten)\n  not pool: no float64 today"


# ---- settings -------------------------------------------------------------------------------------------


def test_settings_are_setters_and_contexts() -> None:
    with cnnops.engine("aten"):
        assert settings.engine == "aten"
        cnnops.engine("cpu")
        assert settings.engine == "cpu"
    assert settings.engine == ""
    with pytest.raises(ZeroDivisionError), cnnops.fallback("silent"):
        raise ZeroDivisionError
    assert settings.fallback == "error"


def test_winograd_is_on_unless_switched_off() -> None:
    assert settings.winograd
    with cnnops.winograd(False):
        assert settings.winograd is False
        cnnops.winograd(True)
        assert settings.winograd is True
    assert settings.winograd


@pytest.mark.parametrize("setting", [cnnops.engine, cnnops.fallback, cnnops.algorithm])
def test_unknown_settings(setting: Any) -> None:
    with pytest.raises(ValueError, match="expected one of .*, got 'best'"):
        setting("best")


@pytest.mark.parametrize(
    "chosen, device, engine",
    [
        (None, "cpu", "cpu"),
        (None, "cuda", "cuda"),
        (None, "meta", "aten"),
        ("emulate", "cpu", "emulate"),
        ("aten", "cuda", "aten"),
        ("aten", "cpu", "aten"),
    ],
)
def test_engine_of_a_device(chosen: str | None, device: str, engine: str) -> None:
    with cnnops.engine(chosen):
        assert registry.engine_for(torch.device(device)) == engine


@pytest.mark.parametrize("chosen, device", [("cuda", "cpu"), ("emulate", "cuda"), ("cpu", "meta")])
def test_engine_that_cannot_take_the_device(chosen: str, device: str) -> None:
    with cnnops.engine(chosen), pytest.raises(RuntimeError, match="expected tensors on .*, got"):
        registry.engine_for(torch.device(device))


@needs_emulator
def test_emulated_layers_keep_their_engine_through_backward() -> None:
    layer = torch.nn.Sequential(cnnops.nn.Conv2d(1, 2, 3), cnnops.nn.MaxPool2d(2))
    x = torch.randn(1, 1, 6, 6, device=device_of("emulate"))
    with cnnops.engine("emulate"):
        y = layer(x)
    choices = cnnops.explain(y.sum().backward)
    assert {choice.engine for choice in choices} == {"emulate"}

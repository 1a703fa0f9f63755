"""The forms that batch norm's launcher chooses from: all compute the same, and arithmetic takes one."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any

import pytest
import torch
from cases import TOLERANCE, NormCase, assert_close, check, needs_emulator
from cases.base import ALL, laid_out, normal
from cases.norm import ACTIVATIONS
from torch import Tensor

import cnnops
from cnnops.cuda import batch_norm, emulate
from cnnops.cuda.kernel import Launch
from cnnops.cuda.launch import trace
from cnnops.cuda.target import Target, standing_for
from cnnops.functional import batch_norm_act
from cnnops.shapes import NormShape

HOPPER, AMPERE = (batch_norm._device_of(Target.of_arch(arch)) for arch in ("90a", "80"))
FORMS = ("split", "held/1", "held/2", "held/4", "held/8")


def entries(launches: list[Launch]) -> list[str]:
    return [plan.kernel.entry.removeprefix("batch_norm_") for plan in launches]


CASES = (
    NormCase("ragged", (3, 2, 13, 7), "blocks of unlike, and of no sites", residual=True,
        activation="relu", dtypes=ALL, schedules=True),
    NormCase("odd", (2, 3, 5, 5), "packs of one value, in half types of two bytes", dtypes=ALL),
    NormCase("channels_last", (3, 40, 9, 7), "lanes without a slot", layout="channels_last",
        residual=True, activation="relu", dtypes=ALL, schedules=True),
    NormCase("offset", (3, 4, 8, 8), "unaligned", layout="offset", residual=True, activation="silu",
        dtypes=ALL),
    NormCase("offset_channels_last", (3, 8, 6, 5), "unaligned", layout="channels_last_offset"),
    NormCase("residual_gelu", (2, 4, 12, 8), "in half types three tensors are held", residual=True,
        activation="gelu", dtypes=ALL),
    NormCase("told_tanh", (2, 16, 12, 8), "y beside x, in half types three tensors are held",
        layout="channels_last", residual=True, activation="tanh", dtypes=ALL),
    NormCase("large_mean", (4, 3, 16, 16), "mean 1e4, deviation 1e-2", shift=1e4, spread=1e-2, eps=1e-8),
    NormCase("one_site", (2, 33, 1, 1), "fewer sites than blocks", eps=0.1, layout="channels_last"),
)  # fmt: skip


@needs_emulator
@pytest.mark.parametrize(
    ("case", "dtype", "form"),
    [
        pytest.param(c, d, f, id=f"{c.id}-{str(d).removeprefix('torch.')}-{f}")
        for i, c in enumerate(CASES)
        for d in c.dtypes
        if len(c.dtypes) < len(ALL) or d in (ALL[0], ALL[1 + i % 3])  # the others in turns
        for f in (FORMS if d == ALL[0] else (FORMS[0], FORMS[1 + i % 4]))
    ],
)
def test_every_form_computes_the_same(case: NormCase, dtype: torch.dtype, form: str) -> None:
    schedule = "all" if case.schedules and dtype == torch.float32 else "forward"
    with batch_norm.forced(form), emulate.schedule(schedule), trace() as launches:
        check(case, "emulate", dtype)
    forms = {"split" if plan.shared_bytes == 0 else f"held/{plan.cluster}" for plan in launches}
    sites = case.x[0] * case.x[2] * case.x[3]
    assert forms == {form} or sites < 64


@needs_emulator
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_clusters_with_every_activation(activation: str) -> None:
    case = NormCase("", (2, 3, 6, 5), "", residual=True, activation=activation)
    with batch_norm.forced("held/2"), trace() as launches:
        check(case, "emulate", torch.float32)
    assert entries(launches) == ["train_cluster", "bwd_cluster"]


@needs_emulator
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("form", ["split", "held/1", "held/4"])
def test_running_statistics_move_once(form: str, layout: str) -> None:
    case = NormCase("", (5, 8, 12, 12), "", layout=layout, momentum=0.5)
    (x, *rest), expected = case.tensors(torch.float32), []
    found = case.statistics(x)
    expected = [t.double() for t in found]
    case.theirs(x.double(), *(t.double() for t in rest), statistics=expected)
    with cnnops.engine("emulate"), batch_norm.forced(form), emulate.schedule("all"):
        case.ours(x, *rest, statistics=found)
    for ours, theirs in zip(found, expected, strict=True):
        assert_close(ours, theirs, TOLERANCE[torch.float32].output, form)


@needs_emulator
@pytest.mark.parametrize("form", FORMS[:3])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_channel_keeps_its_nan(layout: str, form: str) -> None:
    x = laid_out((2, 8, 5, 4), layout, normal(1, torch.float32))
    x[1, 3, 4, 3] = torch.nan
    x[0, 5, 0, 0] = torch.inf  # the first element, to which all others are relative
    with cnnops.engine("emulate"), batch_norm.forced(form):
        y = batch_norm_act(x, None, None, training=True, activation="relu")
    wild = y.isnan().all(3).all(2).all(0)
    assert wild.tolist() == [c in (3, 5) for c in range(8)]
    assert y[:, ~wild].isfinite().all()


# ---- which form, and how many launches -------------------------------------------------------------------


def planned(
    size: tuple[int, ...], dtype: torch.dtype, layout: str, residual: bool = False, activation: str = "relu"
) -> tuple[list[Launch], list[Launch]]:  # fmt: skip
    """The launches forward and backward of tensors without memory."""

    def make() -> Tensor:
        return laid_out(size, layout, lambda s: torch.empty(s, dtype=dtype, device="meta"))

    shape, beside = NormShape.of(size), make() if residual else None
    weight, bias, *grads = (torch.empty(size[1], device="meta") for _ in range(4))
    mean, rstd = (torch.empty(size[1], device="meta") for _ in range(2))
    with trace(run=False) as forward:
        batch_norm.batch_norm_train(
            shape,
            make(),
            weight,
            bias,
            beside,
            None,
            None,
            0.1,
            1e-5,
            activation,
            make(),
            mean,
            rstd,
        )
    with trace(run=False) as backward:
        batch_norm.batch_norm_bwd(
            shape, make(), make(), weight, bias, None, beside, mean, rstd, activation, True, make(), *grads,
            None,
        )  # fmt: skip
    return forward, backward


LAYERS: tuple[tuple[Any, ...], ...] = (
    # size, layout, blocks that hold a slab of float32 (forward, backward), then of bfloat16; 0: split
    ((32, 64, 112, 112), "contiguous", (8, 0), (8, 8)),
    ((32, 64, 56, 56), "contiguous", (4, 8), (4, 4)),
    ((32, 256, 56, 56), "contiguous", (4, 8), (2, 4)),
    ((32, 512, 28, 28), "contiguous", (1, 2), (1, 1)),
    ((32, 2048, 7, 7), "contiguous", (1, 1), (1, 1)),
    ((32, 256, 56, 56), "channels_last", (0, 0), (0, 0)),
    ((32, 512, 28, 28), "channels_last", (8, 8), (8, 8)),
    ((32, 1024, 14, 14), "channels_last", (4, 8), (8, 8)),
    ((32, 2048, 7, 7), "channels_last", (2, 2), (4, 4)),
    ((256, 256, 112, 112), "contiguous", (0, 0), (0, 0)),
)


@pytest.mark.parametrize(("size", "layout", "floats", "halves"), LAYERS)
def test_forms_of_layers(
    size: tuple[int, ...], layout: str, floats: tuple[int, int], halves: tuple[int, int]
) -> None:
    for dtype, expected in ((torch.float32, floats), (torch.bfloat16, halves)):
        plans = planned(size, dtype, layout)
        found = tuple(p[0].cluster if p[0].shared_bytes else 0 for p in plans)
        assert found == expected, dtype
        for plan in (*plans[0], *plans[1]):
            assert plan.shared_bytes <= HOPPER.shared
            assert plan.block[0] == 256 or plan.shared_bytes > HOPPER.shared // 3


@pytest.mark.parametrize(("size", "layout", "floats", "halves"), LAYERS)
def test_no_clusters_before_hopper(
    size: tuple[int, ...], layout: str, floats: Any, halves: Any
) -> None:
    with standing_for(Target.of_arch("80")):
        found = [planned(size, dtype, layout) for dtype in (torch.float32, torch.bfloat16)]
    for plans in chain(*found):
        assert all(p.cluster == 1 and p.shared_bytes <= AMPERE.shared for p in plans)
        assert not any(p.kernel.entry in batch_norm.ARCHITECTURES for p in plans)


def test_launches_of_two_passes() -> None:
    """Blocks merge the partial results of their own channels, but where these are many."""
    forward, backward = planned((64, 64, 112, 112), torch.float32, "contiguous")
    assert entries(forward) == ["train_stats", "train_apply"]
    assert entries(backward) == ["bwd_sums", "bwd_apply"]
    forward, backward = planned((32, 64, 112, 112), torch.float32, "channels_last")
    assert entries(forward) == ["train_stats", "train_merge", "train_apply"]
    assert entries(backward) == ["bwd_sums", "bwd_merge", "bwd_apply"]


@needs_emulator
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("asked", ["all", "statistics", "parameters"])
def test_many_partial_results(asked: str, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """So many that a launch of its own makes them fewer: 2 to 4."""
    last = layout == "channels_last"
    size = (2, 40, 62, 66) if last else (3, 2, 124, 132)
    monkeypatch.setattr(batch_norm, "SPLIT_SITES", 1)
    monkeypatch.setattr(batch_norm, "MERGED_PART", 16 if last else 256)
    case = NormCase("", size, "", layout=layout, shift=1e3)
    with batch_norm.forced("split"), trace() as launches:
        if asked == "all":
            check(case, "emulate", torch.float32)
        else:
            (x, *_), shape = case.tensors(torch.float32), NormShape.of(size)
            grad, mean, var = (
                laid_out(size, layout, normal(3, torch.float32)),
                *x.new_empty(2, size[1]),
            )
            batch_norm.batch_norm_stats(shape, x, mean, var)
            wanted = torch.var_mean(x.double(), (0, 2, 3), correction=0)
            assert_close(mean, wanted[1], 1e-6, "mean")
            assert_close(var, wanted[0], 1e-6, "variance")
    if asked == "parameters":
        rstd = (var + 1e-5).rsqrt()
        sums = x.new_empty(2, size[1])
        batch_norm.batch_norm_bwd(
            shape, grad, x, None, None, None, None, mean, rstd, "none", False, None, *sums, None
        )
        xhat = (x - mean[:, None, None]).double() * rstd[:, None, None]
        assert_close(sums[0], (grad * xhat).sum((0, 2, 3)), 2e-6, "gradient of weight")
        assert_close(sums[1], grad.double().sum((0, 2, 3)), 2e-6, "gradient of bias")
    merges = [plan for plan in launches if plan.kernel.entry.endswith("_merge")]
    assert entries(merges) == ["train_merge", "bwd_merge"][: 2 if asked == "all" else 1]
    assert all(plan.grid[1] in (2, 3, 4) for plan in merges)


@needs_emulator
@pytest.mark.parametrize("activation", ["none", "relu"])
def test_backward_without_sums_is_one_pass(activation: str) -> None:
    """With running statistics and frozen parameters."""
    x = torch.randn(2, 4, 5, 6, requires_grad=True)
    mean, var = torch.randn(4), torch.rand(4) + 0.5
    results = []
    for engine in ("emulate", "aten"):
        with cnnops.engine(engine):
            y = batch_norm_act(x, mean, var, activation=activation)
            with trace() as launches:
                results += torch.autograd.grad(y, x, torch.ones_like(y))
        if engine == "emulate":
            assert entries(launches) == ["bwd_apply"]
    assert_close(*results, 1e-6, activation)


# ---- variants --------------------------------------------------------------------------------------------


@pytest.fixture(params=["80", "90a"])
def target(request: pytest.FixtureRequest) -> Iterator[Target]:
    """What tensors stand for."""
    target = Target.of_arch(request.param)
    with standing_for(target):
        yield target


def test_variants_are_other_forms(target: Target) -> None:
    x = torch.empty(2, 64, 56, 56)
    shape, vectors = NormShape.of(x.shape), [torch.empty(64) for _ in range(4)]
    train = (x, *vectors[:2], None, *vectors[2:], 0.1, 1e-5, "relu", x, *vectors[:2])
    bwd = (x, x, *vectors[:2], None, None, *vectors[2:], "relu", True, x, *vectors[:2], None)
    for op, arguments in (("batch_norm_train", train), ("batch_norm_bwd", bwd)):
        names = batch_norm.variants(op, shape, *arguments)
        assert "split" in names and ("held/8" in names) == (target.arch == "90a")
        seen = set()
        for name in ("", *names, "", "held/3", "held"):
            with batch_norm.forced(name), trace(run=False) as launches:
                getattr(batch_norm, op)(shape, *arguments)
            seen.add((launches[0].kernel, launches[0].grid))
        assert len(seen) == len(names) + 1
    frozen = (*bwd[:9], False, x, None, None, None)
    assert batch_norm.variants("batch_norm_bwd", shape, *frozen) == ()
    assert batch_norm.variants("batch_norm_stats", shape, x, *vectors[:2]) == ()

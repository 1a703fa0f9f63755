"""SyncBatchNorm over processes that talk by gloo, each with its part of a batch: against PyTorch's batch norm
of the whole batch in one process.

Processes are started once for each number of them, run all rows, and leave their results in files.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from cases import TOLERANCE, assert_close, normal
from cases.norm import ACTIVATIONS
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from cnnops import nn

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch was built without gloo"
)

WORLDS = (2, 4)
PARTS = {2: (2, 5), 4: (3, 0, 1, 4)}
"""Images of each process's batch."""


@dataclass(frozen=True)
class SyncCase:
    id: str
    size: tuple[int, ...] = (4, 5, 3)
    dtype: torch.dtype = torch.float64
    options: dict[str, Any] = field(default_factory=dict)
    half_parameters: bool = False
    activation: str = ""
    residual: bool = False
    channels_last: bool = False
    shift: float = 0.5
    why: str = ""

    def layer(self) -> nn.SyncBatchNorm:
        C, dtype = self.size[0], self.dtype
        if self.activation:
            layer = nn.SyncBatchNormAct(C, **self.options, activation=self.activation)
        else:
            layer = nn.SyncBatchNorm(C, **self.options)
        half = dtype in (torch.float16, torch.bfloat16)
        layer.to(dtype if self.half_parameters or not half else torch.float32)
        with torch.no_grad():
            for seed, parameter in enumerate(layer.parameters()):
                parameter.copy_(normal(seed, torch.bfloat16)(parameter.shape))
        return layer

    def batch(self, images: int, seed: int) -> Tensor:
        """An input where `seed` is a multiple of ten, else a residual or a gradient."""
        shift = 0.25 if seed % 10 else self.shift
        x = normal(seed, torch.float64)((images, *self.size)) * 2 + shift
        return self.placed(x.to(self.dtype))

    def placed(self, x: Tensor) -> Tensor:
        return x.contiguous(memory_format=torch.channels_last) if self.channels_last else x


CASES = (
    SyncCase("float64"),
    SyncCase("float32", dtype=torch.float32),
    SyncCase("channels_last", dtype=torch.float32, channels_last=True),
    SyncCase("bfloat16", dtype=torch.bfloat16, why="float32 parameters"),
    SyncCase("float16", dtype=torch.float16, half_parameters=True, why="all of the half type"),
    SyncCase("two_dims", (6,)),
    SyncCase("five_dims", (3, 2, 3, 2)),
    SyncCase("not_affine", options={"affine": False}),
    SyncCase("not_affine_half", dtype=torch.bfloat16, options={"affine": False}),
    SyncCase("cumulative", options={"momentum": None}),
    SyncCase("untracked", options={"track_running_stats": False}),
    SyncCase("large_mean", shift=1e4, why="E[x²] - E[x]² would be noise"),
    SyncCase("relu", activation="relu"),
    SyncCase("relu_residual", activation="relu", residual=True),
    SyncCase("silu_residual", activation="silu", residual=True),
    SyncCase("plain_residual", activation="none", residual=True),
)
STEPS = 2


def _started(rank: int, world: int, folder: str) -> None:
    """What every process does."""
    torch.set_num_threads(1)
    address = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=world)
    results = {case.id: _trained(case, rank, world) for case in CASES}
    results["parallel"] = _parallel(rank, world)
    results["groups"] = _in_groups(rank, world)
    results["refused"] = _refused(rank)
    results["nothing"] = _nothing()
    gc.collect()
    torch.save(results, f"{folder}/{rank}")
    dist.destroy_process_group()


def _part(t: Tensor, rank: int, world: int) -> Tensor:
    return t.split(PARTS[world])[rank]


def _trained(case: SyncCase, rank: int, world: int) -> dict[str, Any]:
    layer = case.layer()
    found: dict[str, Any] = {}
    for step in range(STEPS):
        images = sum(PARTS[world])
        given = [case.batch(images, seed) for seed in (10 * step, 10 * step + 1, 10 * step + 2)]
        x, residual, grad = (case.placed(_part(t, rank, world)) for t in given)
        leaves = [x.clone().requires_grad_()]
        if case.residual:
            leaves.append(residual.clone().requires_grad_())
        y = layer(*leaves)
        wanted = [*leaves, *layer.parameters()]
        found[f"{step}"] = [y.detach(), *torch.autograd.grad(y, wanted, grad)]
        if case.channels_last and x.numel():
            assert y.is_contiguous(memory_format=torch.channels_last)
    found["statistics"] = [layer.running_mean, layer.running_var, layer.num_batches_tracked]
    layer.eval()
    with torch.no_grad():
        found["evaluated"] = layer(*[leaf.detach() for leaf in leaves])
    return found


def _network() -> torch.nn.Sequential:
    torch.manual_seed(1)
    return torch.nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, bias=False), torch.nn.BatchNorm2d(4), torch.nn.ReLU(),
        nn.MaxPool2d(2), nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6), torch.nn.ReLU(),
        torch.nn.Flatten(), torch.nn.Linear(6, 3),
    ).double()  # fmt: skip


def _images(world: int) -> tuple[Tensor, Tensor]:
    images = sum(PARTS[world])
    return normal(5, torch.float64)((images, 2, 6, 6)), torch.arange(images) % 3


def _parallel(rank: int, world: int) -> list[Tensor]:
    """Gradients that DistributedDataParallel averages; an empty batch takes part, too."""
    net = DistributedDataParallel(_network())
    net.module = nn.SyncBatchNorm.convert_sync_batchnorm(net.module)
    x, target = (_part(t, rank, world) for t in _images(world))
    loss = F.cross_entropy(net(x), target, reduction="sum") * (world / sum(PARTS[world]))
    loss.backward()
    return [p.grad for p in net.parameters() if p.grad is not None]


def _in_groups(rank: int, world: int) -> Tensor:
    """Two processes each are a group, with batches of its own."""
    groups = [dist.new_group([first, first + 1]) for first in range(0, world, 2)]
    layer = nn.SyncBatchNorm(3, process_group=groups[rank // 2]).double()
    x = normal(rank, torch.float64)((2, 3, 4)) + rank
    y: Tensor = layer(x)
    return y.detach()


def _refused(rank: int) -> str:
    """One value a channel in all, and a batch that is none, must leave no process waiting."""
    layer = nn.SyncBatchNorm(3)
    with pytest.raises(ValueError, match="expected at least 2D input"):
        layer(torch.ones(3))
    with pytest.raises(ValueError, match="more than 1 value per channel") as error:
        layer(torch.ones(int(rank == 0), 3))
    assert layer.num_batches_tracked is not None and layer.num_batches_tracked == 0
    return str(error.value)


def _nothing() -> list[Tensor | None]:
    """No process has an image."""
    layer = nn.SyncBatchNorm(3)
    x = torch.empty(0, 3, 4, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None and x.grad.shape == x.shape
    return [layer.running_mean, layer.running_var]


@pytest.fixture(scope="module", params=WORLDS, ids=lambda n: f"{n}_processes")
def ranks(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[list[dict[str, Any]]]:
    world: int = request.param
    folder: Path = tmp_path_factory.mktemp(f"ranks{world}")
    torch.multiprocessing.spawn(_started, (world, str(folder)), world)
    yield [torch.load(folder / str(rank), weights_only=True) for rank in range(world)]


# ---- the whole batch in one process ----------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_as_one_batch(ranks: list[dict[str, Any]], case: SyncCase) -> None:
    """Outputs, gradients of inputs and residuals, each process's part of the parameters' gradients, and
    running statistics, after two steps."""
    world = len(ranks)
    tolerance = TOLERANCE[case.dtype]
    slack = 1e3 if case.shift > 1e3 else 1.0
    reference = case.layer()
    weight, bias = (
        None if t is None else t.detach().double() for t in (reference.weight, reference.bias)
    )
    tracked = reference.running_mean is not None
    running = [torch.zeros(case.size[0]).double(), torch.ones(case.size[0]).double()]
    axes = (0, *range(2, len(case.size) + 1))
    per_channel = (-1, *(1,) * (len(case.size) - 1))
    for step in range(STEPS):
        images = sum(PARTS[world])
        seeds = (10 * step, 10 * step + 1, 10 * step + 2)
        x, residual, grad = (case.batch(images, seed).double() for seed in seeds)
        x.requires_grad_()
        momentum = case.options.get("momentum", 0.1)
        momentum = 1 / (step + 1) if momentum is None else momentum
        z = F.batch_norm(x, *running, weight, bias, True, momentum)
        z = z + residual if case.residual else z
        y = ACTIVATIONS[case.activation or "none"](z)
        grad_x, g = torch.autograd.grad(y, (x, z), grad)
        var, mean = torch.var_mean(x.detach(), axes, correction=0)
        xhat = (x.detach() - mean.view(per_channel)) * torch.rsqrt(var + 1e-5).view(per_channel)
        for rank, results in enumerate(ranks):
            ours = list(results[case.id][str(step)])
            parts = [y, grad_x, *([g] if case.residual else [])]
            theirs = [_part(t.detach(), rank, world) for t in parts]
            if weight is not None:
                local, hat = _part(g, rank, world), _part(xhat, rank, world)
                theirs += [(local * hat).sum(axes), local.sum(axes)]
            limits = [tolerance.output, *[2 * tolerance.gradient] * 4]
            for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
                assert a.dtype == case.dtype or i > 1
                assert_close(a, b, limits[i] * slack, f"step {step}, rank {rank}, result {i}")
    for results in ranks:
        statistics = results[case.id]["statistics"]
        if not tracked:
            assert statistics == [None] * 3
            continue
        for name, a, b in zip(("mean", "variance"), statistics, running, strict=False):
            dtype = (
                case.dtype if case.half_parameters or case.dtype == torch.float64 else torch.float32
            )
            assert_close(a, b, 2 * TOLERANCE[dtype].output * slack, f"running {name}")
        assert statistics[2] == STEPS
        assert all(map(torch.equal, statistics, ranks[0][case.id]["statistics"])), "ranks differ"


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_evaluation_is_batch_norms(ranks: list[dict[str, Any]], case: SyncCase) -> None:
    """With the running statistics, or untracked with the local batch's."""
    for rank, results in enumerate(ranks):
        layer = case.layer().double()
        if layer.running_mean is not None:
            for t, value in zip(layer.buffers(), results[case.id]["statistics"], strict=True):
                t.copy_(value)
        seeds = (10 * (STEPS - 1), 10 * (STEPS - 1) + 1)
        images = sum(PARTS[len(ranks)])
        x, residual = (_part(case.batch(images, seed), rank, len(ranks)).double() for seed in seeds)
        own = layer.running_mean is None
        if own and not x.numel():
            continue
        z = F.batch_norm(x, layer.running_mean, layer.running_var, layer.weight, layer.bias, own)
        y = ACTIVATIONS[case.activation or "none"](z + residual if case.residual else z)
        slack = 1e3 if case.shift > 1e3 else 1.0
        limit = TOLERANCE[case.dtype].output * slack
        assert_close(results[case.id]["evaluated"], y, limit, f"rank {rank}")


def test_data_parallel(ranks: list[dict[str, Any]]) -> None:
    """A network's gradients are those of the whole batch, in every process."""
    net = _network()
    x, target = _images(len(ranks))
    F.cross_entropy(net(x), target).backward()
    expected = [p.grad for p in net.parameters() if p.grad is not None]
    for rank, results in enumerate(ranks):
        assert len(results["parallel"]) == len(expected) == 8
        for i, (a, b) in enumerate(zip(results["parallel"], expected, strict=True)):
            assert_close(a, b, 1e-12, f"rank {rank}, parameter {i}")


def test_groups_know_nothing_of_each_other(ranks: list[dict[str, Any]]) -> None:
    for first in range(0, len(ranks), 2):
        pair = (first, first + 1)
        x = torch.cat([normal(rank, torch.float64)((2, 3, 4)) + rank for rank in pair])
        ours = torch.cat([ranks[rank]["groups"] for rank in pair])
        assert_close(ours, F.batch_norm(x, None, None, training=True), 1e-14, f"group of {first}")


def test_too_few_values(ranks: list[dict[str, Any]]) -> None:
    assert all("got 1 in all processes" in results["refused"] for results in ranks)
    for results in ranks:
        mean, var = results["nothing"]
        assert mean.tolist() == [0, 0, 0] and var.tolist() == [1, 1, 1]


# ---- in one process --------------------------------------------------------------------------------------


def test_without_a_process_group_it_is_batch_norm() -> None:
    ours, theirs = nn.SyncBatchNorm(3), torch.nn.BatchNorm1d(3)
    x = torch.randn(4, 3, 5)
    for training in (True, False):
        assert_close(
            ours.train(training)(x), theirs.train(training)(x), 1e-6, f"training {training}"
        )
    for name, value in theirs.state_dict().items():
        assert_close(ours.state_dict()[name], value, 1e-6, name)
    with pytest.raises(ValueError, match="number of input channels should be non-zero"):
        ours(torch.ones(2, 0, 3))


@pytest.mark.parametrize("kind", ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "SyncBatchNorm"])
@pytest.mark.parametrize("package", [torch.nn, nn], ids=["torch", "cnnops"])
def test_conversion(package: Any, kind: str) -> None:
    options = {"eps": 0.1, "momentum": None, "affine": kind != "BatchNorm2d"}
    layer = getattr(package, kind)(4, **options, track_running_stats=kind != "BatchNorm3d")
    net = torch.nn.Sequential(torch.nn.ReLU(), torch.nn.Sequential(layer)).eval()
    expected, tensors = repr(layer).partition("(")[2], [*layer.parameters(), *layer.buffers()]
    assert nn.SyncBatchNorm.convert_sync_batchnorm(net) is net
    found = net[1][0]
    assert type(found) is nn.SyncBatchNorm and not found.training
    assert repr(found) == f"SyncBatchNorm({expected}"
    now = [*found.parameters(), *found.buffers()]
    assert len(now) == len(tensors) and all(a is b for a, b in zip(now, tensors, strict=True))
    assert isinstance(found, torch.nn.SyncBatchNorm)


def test_conversion_keeps_the_activation() -> None:
    layer = nn.BatchNormAct2d(4, activation="silu")
    found = nn.SyncBatchNorm.convert_sync_batchnorm(layer)
    assert type(found) is nn.SyncBatchNormAct and found.activation == "silu"
    x, residual = torch.randn(2, 2, 4, 3, 3)
    assert torch.equal(found(x, residual), nn.BatchNormAct2d(4, activation="silu")(x, residual))
    again = nn.SyncBatchNorm.convert_sync_batchnorm(found)
    assert type(again) is nn.SyncBatchNormAct

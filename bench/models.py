"""Whole networks: training steps and inference of `cnnops.models`, against the same in stock layers."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cnnops
from bench import rivals, timing
from bench.rivals import CNNOPS, FUSED, Absent, Call
from bench.suites import BF16_LAST, F32, F32_LAST
from cnnops.models import MODELS
from cnnops.models.parts import StochasticDepth

LOGITS_LIMIT = {"float32": 1e-3, "bfloat16": 0.15, "float16": 0.05}
GRADIENTS_LIMIT = {"float32": 0.1, "bfloat16": 0.8, "float16": 0.5}
"""Largest norm-relative distance from stock layers in float32: rounding, carried through some fifty layers.
In gradients one ReLU that falls on the other side of zero shows as a per cent, a batch norm over two small
images as several. That gradients are right is for the tests to prove; here a wrong one would show."""


@dataclass(frozen=True)
class ModelRow:
    """One network in one phase: "infer" is a forward in evaluation, "train" a step of SGD with momentum.
    Half types run under autocast. There is no dropout of either kind.
    """

    model: str
    phase: str
    batch: int
    dtype: str = "float32"
    layout: str = "contiguous"
    """Of the images and the weights."""

    @property
    def id(self) -> str:
        return f"{self.model}/{self.phase}/{self.dtype}/{self.batch}/{self.layout}"


BATCHES = {
    "lenet5": 64, "resnet18": 64, "mobilenetv2": 64, "resnet50": 64, "convnext-tiny": 64,
    "efficientnet-b0": 64, "alexnet": 128, "lenet5-original": 64, "vgg16": 32,
}  # fmt: skip
CPU_BATCHES = {"lenet5": 64, "lenet5-original": 64, "resnet18": 8, "mobilenetv2": 8}
"""On a CPU; two images of any other."""


def rows(device: torch.device) -> list[ModelRow]:
    """All networks in both phases: on a GPU in float32 and, as half types are used there, in bfloat16 and
    channels-last; on a CPU in float32 in either layout, and with fewer images.
    """
    gpu = device.type == "cuda"
    return [
        ModelRow(model, phase, batch if gpu else CPU_BATCHES.get(model, 2), *form)
        for model, batch in BATCHES.items()
        for phase in ("infer", "train")
        for form in (F32, BF16_LAST if gpu else F32_LAST)
    ]


def _images(row: ModelRow, device: torch.device, side: int | None) -> Tensor:
    sizes = MODELS[row.model].input_size if side is None else (side, side)
    channels = 1 if row.model.startswith("lenet") else 3
    x = torch.randn(row.batch, channels, *sizes, device=device)
    return x.to(memory_format=torch.channels_last) if row.layout == "channels_last" else x


def _autocast(row: ModelRow, device: torch.device) -> AbstractContextManager[Any]:
    if row.dtype == "float32":
        return nullcontext()
    return torch.autocast(device.type, getattr(torch, row.dtype))


def _call(
    rival: str, row: ModelRow, stock: nn.Module, x: Tensor, labels: Tensor
) -> tuple[Call, list[Tensor]]:
    """A rival's Call, and what its first pass gave: logits, and in training the gradients behind them."""
    device = x.device
    if rival in (*CNNOPS, FUSED):
        model: nn.Module = MODELS[row.model](layers=cnnops.nn).to(device)
        policy = "auto" if rival == "cnnops-auto" else "own"
        around = partial(rivals.our_settings, policy, None, tf32=False)
    else:
        if rival == "cudnn-graph" or (rival == "eager-benchmark" and device.type != "cuda"):
            raise Absent("cuDNN's graphs are asked of single layers, its benchmark of GPUs")
        model = MODELS[row.model](layers=nn).to(device)
        around = partial(rivals.torch_settings, rival == "eager-benchmark", False)
    model.load_state_dict(copy.deepcopy(stock.state_dict()))
    if row.layout == "channels_last":
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    model.train(row.phase == "train")
    for module in model.modules():
        if isinstance(module, (nn.Dropout, StochasticDepth)):
            module.eval()  # its random numbers would differ
    forward: Any = model
    if rival == FUSED:
        done = (
            cnnops.fuse(model)
            if row.phase == "infer"
            else cnnops.convert(model, fuse_training=True)
        )
        if not done.fused:
            raise Absent("nothing in it is fused")
        forward = done.model
    if rival.startswith("compile"):
        mode = "max-autotune-no-cudagraphs" if rival.endswith("autotune") else "default"
        forward = torch.compile(model, mode=mode, dynamic=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)

    def infer(_: int) -> Tensor:
        with torch.no_grad(), _autocast(row, device):
            logits: Tensor = forward(x)
        return logits

    def backward() -> Tensor:
        with _autocast(row, device):
            logits: Tensor = forward(x)
        F.cross_entropy(logits.float(), labels).backward()
        return logits

    def train(_: int) -> None:
        optimizer.zero_grad()
        backward()
        optimizer.step()

    with around():
        if rival == "cnnops-auto" and not any(c.measured for c in cnnops.explain(infer, 0)):
            raise Absent(rivals.UNTUNED)
        if row.phase == "infer":
            return Call(infer, around), [infer(0)]
        logits = backward()
        found = [
            logits.detach(),
            *(p.grad.clone() for p in model.parameters() if p.grad is not None),
        ]
    return Call(train, around), found


def measure(
    row: ModelRow, names: Sequence[str], device: torch.device, seconds: float, *, timed: bool = True,
    side: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """One entry of a result file's "models". Logits, and in training all gradients together, must agree with
    stock layers in float32. `side` is the images' size where a dry run wants small ones.
    """
    torch.manual_seed(0)
    stock = MODELS[row.model](layers=nn).to(device)
    x = _images(row, device, side)
    labels = torch.randint(10, (row.batch,), device=device)
    right = _call("eager", ModelRow(row.model, row.phase, row.batch), stock, x, labels)[1]
    ready: dict[str, Call] = {}
    absent: dict[str, str] = {}
    for name in names:
        try:
            call, found = _call(name, row, stock, x, labels)
            call.error = rivals.distance(found[:1], right[:1])
            off = rivals.distance([_joined(found)], [_joined(right)]) if found[1:] else 0.0
        except Absent as reason:
            absent[name] = str(reason)
        except Exception as error:  # a rival's failure is a result, whatever it is
            absent[name] = rivals.raised(error)
        else:
            if call.error > LOGITS_LIMIT[row.dtype]:
                absent[name] = rivals.wrong(call.error, LOGITS_LIMIT[row.dtype])
            elif off > GRADIENTS_LIMIT[row.dtype]:
                absent[name] = rivals.wrong(off, GRADIENTS_LIMIT[row.dtype], "gradients")
            else:
                ready[name] = call
    times = timing.take(ready, device, seconds, ("warm",)) if timed else timing.once(ready)
    return {
        "id": row.id, "model": row.model, "phase": row.phase, "batch": row.batch, "dtype": row.dtype,
        "layout": row.layout, "times": times,
        "errors": {name: call.error for name, call in ready.items()}, "absent": absent,
    }  # fmt: skip


def _joined(found: Sequence[Tensor]) -> Tensor:
    """All gradients in one vector."""
    return torch.cat([g.flatten() for g in found[1:]])

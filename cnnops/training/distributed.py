"""Several processes that train one model, started by ``torchrun``: who they are, what they tell each other.

Each has an even part of every batch, and a copy of the model; gradients are averaged by
DistributedDataParallel, batch norms are `cnnops.nn.SyncBatchNorm`. Losses and scores are put together here.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import cnnops.nn

TIMEOUT = 25.0
"""Seconds to wait for another process. torchrun gives what hangs 30 s more before it kills it."""
START = timedelta(minutes=5)
"""How long processes may take to find each other: some import faster than others."""


class PeerLost(RuntimeError):
    """Another process has ended, or does not answer."""


@dataclass(frozen=True)
class Peers:
    """The processes of this run; without any argument, this one alone.

    What they tell each other on the CPU goes by gloo, gradients on GPUs by NCCL.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    group: Any = None

    def device(self, engine: str) -> torch.device:
        """Where this process computes with `engine`. Raises ValueError where it has no GPU of its own."""
        if engine == "cuda" or (engine == "aten" and torch.cuda.is_available()):
            if self.local_rank >= torch.cuda.device_count():
                raise ValueError(
                    f"engine {engine!r}: expected a GPU for each process of this machine, "
                    f"got {torch.cuda.device_count()}"
                )
            return torch.device("cuda", self.local_rank)
        return torch.device("cpu")

    def wrapped(self, model: nn.Module) -> tuple[nn.Module, nn.Module]:
        """The model, with batch norm over all processes, and what to call in training in its place."""
        if self.world == 1:
            return model, model
        # All have the same buffers: those of batch norm are made of all processes' images. It is converted
        # after wrapping, as DistributedDataParallel has opinions on PyTorch's own, which fails on CPUs.
        with warnings.catch_warnings():  # the argument's successor is not in every torch yet
            warnings.filterwarnings("ignore", ".*broadcast_buffers", FutureWarning)
            wrapped = DistributedDataParallel(
                model,
                process_group=self.group,
                broadcast_buffers=False,
                gradient_as_bucket_view=True,
            )
        wrapped.module = cnnops.nn.SyncBatchNorm.convert_sync_batchnorm(model, self.group)
        return wrapped.module, wrapped

    def sum(self, values: Tensor) -> Tensor:
        """The sum of all processes' values, float64 on the CPU."""
        total = values.double().cpu()
        if self.world > 1:
            dist.all_reduce(total, group=self.group)
        return total

    def mean(self, values: Tensor) -> Tensor:
        """Their mean, float64 on the CPU."""
        return self.sum(values) / self.world

    def largest(self, value: int) -> int:
        """The largest of all processes' values. All must ask: none gets ahead of the others."""
        if self.world == 1:
            return value
        seen = torch.tensor(value)
        dist.all_reduce(seen, dist.ReduceOp.MAX, group=self.group)
        return int(seen)

    def agree(self, problem: str | None) -> str | None:
        """The first process's problem that has one, so that all of them end."""
        if self.world == 1:
            return problem
        problems: list[str | None] = [None] * self.world
        dist.all_gather_object(problems, problem, group=self.group)
        return next((found for found in problems if found), None)


def launched() -> bool:
    """Whether this process is one of several, as torchrun's environment tells."""
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


@contextmanager
def joined(timeout: float = TIMEOUT) -> Iterator[Peers]:
    """The processes of this run; what they share is given back by `leave` alone.

    Raises PeerLost where one of them ends or does not answer for `timeout` seconds.
    """
    if not launched():
        yield Peers()
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if torch.cuda.is_available() and local < torch.cuda.device_count():
        torch.cuda.set_device(local)
    with _told():
        dist.init_process_group(backend, timeout=START)
        group = dist.new_group(timeout=timedelta(seconds=timeout))
        yield Peers(dist.get_rank(), dist.get_world_size(), local, group)


def leave(code: int) -> NoReturn:
    """End this process, one of several, at once.

    Not by way of destructors: one of a gloo group joins its threads while it holds the interpreter's lock,
    which these may be waiting for, and after an error NCCL waits for a process that is lost.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@contextmanager
def _told() -> Iterator[None]:
    """Errors of communication, which have many types and long texts, become a PeerLost."""
    try:
        yield
    except RuntimeError as error:
        text = str(error).strip()
        if isinstance(error, dist.DistError) or "gloo" in text.lower() or "NCCL" in text:
            raise PeerLost(text.partition("\n")[0]) from error
        raise

"""Which problems networks pose to the kernels: found by running the networks without computing anything.

A network runs at its own image size, as it is, fused for training, and fused for inference. Every call that
reaches the table of kernels is written down (`Problem`) and nothing is computed for it, so results hold
whatever memory held. For batches of other sizes the network does not run again: each problem is posed anew
(`Problem.at`), to a kernel's function with tensors that nobody has written.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import cnnops
from cnnops import registry
from cnnops.epilogue import Epilogue
from cnnops.models import MODELS, named
from cnnops.registry import Choice
from cnnops.shapes import LayerShape, Shape

CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
"""By the number of axes of a batch of images."""
SEEN_AT = 2
"""The batch that networks run with: one that training's batch norm takes at every size."""


# ---- problems --------------------------------------------------------------------------------------------


class Like(NamedTuple):
    """A tensor without its values; `offset` from where memory was allotted, in elements."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype

    @classmethod
    def of(cls, value: Any) -> Any:
        """What stands for an argument: tensors and those of an epilogue are replaced."""
        if isinstance(value, Epilogue):
            return Epilogue(*map(cls.of, value))
        if isinstance(value, Tensor):
            return cls(tuple(value.shape), value.stride(), int(value.storage_offset()), value.dtype)
        return value

    def tensor(self, device: str) -> Tensor:
        """An unwritten tensor that lies like it."""
        last = sum((n - 1) * s for n, s in zip(self.size, self.stride, strict=True))
        memory = torch.empty(self.offset + last + 1, dtype=self.dtype, device=device)
        return memory.as_strided(self.size, self.stride, self.offset)


def _sizes(shape: Shape) -> tuple[Sequence[int], Sequence[int]]:
    return shape.x_size, getattr(shape, "y_size", shape.x_size)


class Problem(NamedTuple):
    """A call of a kernel: see the signatures in `cnnops.registry`."""

    op: str
    shape: Shape
    dtype: torch.dtype
    arguments: tuple[Any, ...]
    """With a `Like` in every tensor's place."""

    def at(self, batch: int) -> Problem:
        """The problem with another batch than `SEEN_AT`: tensors as large as the problem's follow it."""
        if isinstance(self.shape, LayerShape):
            outer = self.shape.outer
            shape: Shape = replace(self.shape, outer=(outer[0] // SEEN_AT * batch, *outer[1:]))
        else:
            shape = replace(self.shape, N=self.shape.N // SEEN_AT * batch)
        sizes = list(zip(_sizes(self.shape), _sizes(shape), strict=True))

        def follow(value: Any) -> Any:
            if isinstance(value, Epilogue):
                return Epilogue(*map(follow, value))
            if isinstance(value, Like):
                for before, after in sizes:
                    if value.size == tuple(before):
                        return value._replace(size=tuple(after))
            return value

        return self._replace(shape=shape, arguments=tuple(map(follow, self.arguments)))

    def tensors(self, device: str) -> tuple[Any, ...]:
        """Arguments for a kernel's function."""

        def made(value: Any) -> Any:
            if isinstance(value, Epilogue):
                return Epilogue(*map(made, value))
            return value.tensor(device) if isinstance(value, Like) else value

        return tuple(map(made, self.arguments))


@contextmanager
def written_down(engine: str) -> Iterator[dict[Problem, None]]:
    """Within the block what runs in `engine` computes nothing: its problems, each once, are the result. What
    no kernel takes PyTorch computes."""
    problems: dict[Problem, None] = {}

    def observe(choice: Choice, _: str, shape: Shape, dtype: torch.dtype) -> Callable[..., None]:
        def note(shape: Shape, *arguments: Any) -> None:
            problems[Problem(choice.op, shape, dtype, tuple(map(Like.of, arguments)))] = None

        return note if choice.engine == engine else choice.function

    with cnnops.engine(engine), cnnops.fallback("silent"), registry.observed(observe):
        yield problems


# ---- networks --------------------------------------------------------------------------------------------


class Precision(NamedTuple):
    """In what a network computes: parameters of this type, or of float32 under autocast."""

    dtype: torch.dtype
    autocast: bool = False

    def context(self) -> AbstractContextManager[Any]:
        return torch.autocast("cpu", self.dtype) if self.autocast else nullcontext()


@dataclass(frozen=True)
class Network:
    """A network by its name on the command line, for images of `size`: channels, height, width."""

    name: str
    model: nn.Module
    size: tuple[int, ...]

    @classmethod
    def of(cls, name: str, size: tuple[int, ...] | None) -> Network:
        """Raises ValueError where the name leads to no network, or nobody says how large its images are."""
        # To draw parameters takes seconds. Networks of others may ask for the values of what they build.
        with named.at_home(), torch.device("meta") if name in MODELS else nullcontext():
            model = named.make(name, named.find(name))
        plane = getattr(model, "input_size", None)
        filters = next((p for p in model.parameters() if p.dim() > 2), None)
        if size is None and (plane is None or filters is None):
            raise ValueError(f"MODEL {name!r}: expected --input C,H,W, as the model does not say")
        if size is None and filters is not None:
            size = (filters.shape[1], *plane)  # type: ignore[misc]
        return cls(name, model, size or ())

    @cached_property
    def forms(self) -> dict[str, nn.Module]:
        """The network as it is, fused for training, and fused for inference."""
        plain = cnnops.convert(copy.deepcopy(self.model)).model
        training = cnnops.convert(copy.deepcopy(self.model), fuse_training=True).model
        return {
            "plain": plain,
            "training": training,
            "inference": cnnops.fuse(copy.deepcopy(self.model).eval()).model,
        }

    def run(self, precision: Precision, channels_last: bool) -> None:
        """All forms, in training and at inference. Raises ValueError where the network fails."""
        dtype = torch.float32 if precision.autocast else precision.dtype
        x = torch.zeros((SEEN_AT, *self.size), dtype=dtype)
        layout = CHANNELS_LAST.get(x.dim()) if channels_last else torch.contiguous_format
        if layout is None:
            return
        for use, form in self.forms.items():
            network = copy.deepcopy(form).to(dtype).to(memory_format=layout)  # type: ignore[call-overload]
            if any(p.is_meta for p in network.parameters()):
                network = network.to_empty(device="cpu")
            try:
                with named.at_home(), warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # of what has not been computed
                    _step(use, network, x.contiguous(memory_format=layout), precision)
            except Exception as error:  # the user's own code runs here
                raise ValueError(f"MODEL {self.name!r}: {named.said(error)}") from error


def _step(use: str, network: nn.Module, x: Tensor, precision: Precision) -> None:
    if use != "inference":
        network.train()
        with precision.context():
            results = tree_leaves(network(x))
        results = [t for t in results if isinstance(t, Tensor) and t.requires_grad]
        # Dense gradients, as losses have them.
        torch.autograd.backward(results, [torch.empty_like(t) for t in results])
    with torch.no_grad(), precision.context():
        network.eval()(x)

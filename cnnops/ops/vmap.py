"""What ``torch.func.vmap`` makes of the operations: many problems as one larger one.

A rule is ``rule(info, in_dims, *arguments) -> (results, out_dims)``, as ``torch.library.register_vmap`` has
it: ``info.batch_size`` maps, and where the mapped axis of every argument is, None for what all maps share.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Rule = Callable[..., tuple[Any, Any]]


def folded(x: Tensor, dim: int | None, maps: int, axis: int) -> Tensor:
    """`x` with the mapped axis `dim` as the slower part of `axis`; where there is none, `x` `maps` times."""
    x = x.unsqueeze(0).expand(maps, *x.shape) if dim is None else x.movedim(dim, 0)
    return x.movedim(0, axis).flatten(axis, axis + 1)


def unfolded(x: Tensor, maps: int, axis: int) -> Tensor:
    """The inverse of `folded`, but that the mapped axis stays where it is."""
    y: Tensor = x.unflatten(axis, (maps, x.shape[axis] // maps))
    return y


def in_batch(operation: Callable[..., Any], tensors: int) -> Rule:
    """The rule of an operation whose first `tensors` arguments all begin with the batch, and which treats
    every image alone: all maps are one batch. Sizes among its arguments do not name the batch.
    """

    def rule(info: Any, in_dims: Sequence[int | None], *arguments: Any) -> tuple[Any, Any]:
        maps = info.batch_size
        one = [folded(t, d, maps, 0) for t, d in zip(arguments[:tensors], in_dims, strict=False)]
        results = operation(*one, *arguments[tensors:])
        if isinstance(results, Tensor):
            return unfolded(results, maps, 0), 0
        return tuple(unfolded(r, maps, 0) for r in results), (0,) * len(results)

    return rule


def one_by_one(operation: Callable[..., Any]) -> Rule:
    """The rule of an operation for which nothing better is known: the maps in turn."""

    def rule(info: Any, in_dims: Sequence[int | None], *arguments: Any) -> tuple[Any, Any]:
        each = [
            operation(
                *(
                    a.select(d, i) if isinstance(d, int) else a
                    for a, d in zip(arguments, in_dims, strict=True)
                )
            )
            for i in range(info.batch_size)
        ]
        if isinstance(each[0], Tensor):
            return torch.stack(each), 0
        stacked = [torch.stack(results) for results in zip(*each, strict=True)]
        return type(each[0])(stacked), type(each[0])([0] * len(stacked))

    return rule

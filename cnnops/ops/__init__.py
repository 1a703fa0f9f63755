"""Operations between torch and the kernels: argument checks, allocation, autograd, torch.library.

One file a family, top to bottom in call order:

    conv(…)                      checks what torch checks, settles the engine
      autograd.Function          only where a gradient may be asked for; its backward calls its siblings
        torch.ops.cnnops.…       allocates the result; has a fake twin for torch.compile and meta tensors
          registry.choose(…)     the kernel

The Function stands outside of the torch.library op: the other way round costs a call 15 to 20 µs more.
Below is what the families share.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import Function

from cnnops import registry

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
"""Element types that kernels may take; PyTorch's own operations take all others."""

_LIBRARY = torch.library.Library("cnnops", "DEF")

Run = Callable[..., None]
S = TypeVar("S")


def compute(
    op: str, engine: str, shape: registry.Shape, dtype: torch.dtype, x: Tensor, *arguments: Any
) -> None:
    """Run the chosen kernel of `op` on its arguments; what it calls itself is kept from autocast."""
    function = registry.choose(op, engine, shape, dtype)
    if autocast_dtype(x) is not None:
        with torch.autocast(x.device.type, enabled=False):
            function(shape, x, *arguments)
    else:
        function(shape, x, *arguments)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast asks for on `x`'s device, None where it is off."""
    device = x.device.type
    if device in ("cpu", "cuda") and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return None


def define(schema: str, body: Callable[..., Any]) -> Callable[..., Any]:
    """Register a torch.library op and return it.

    ``body(run, *arguments)`` checks, allocates, calls ``run(op, engine, shape, dtype, *arguments)`` and
    returns the results. It serves twice: `run` computes for the CPU and CUDA keys, and does nothing for fake
    and meta tensors, so that what torch.compile is told cannot differ from what happens.
    """
    name = schema[: schema.index("(")]
    _LIBRARY.define(schema, tags=torch.Tag.pt2_compliant_tag)
    for key in ("CPU", "CUDA"):
        _LIBRARY.impl(name, partial(body, compute), key)
    torch.library.register_fake(f"cnnops::{name}", partial(body, lambda *_: None), lib=_LIBRARY)
    op: Callable[..., Any] = getattr(torch.ops.cnnops, name).default
    return op


def cached(of: Callable[..., S]) -> Callable[..., S]:
    """`of`, a constructor of shapes, remembered by its arguments; lists among them become tuples."""
    remembered = lru_cache(4096)(of)

    def shape(*arguments: Any) -> S:
        plain = [tuple(a) if isinstance(a, (list, torch.Size)) else a for a in arguments]
        try:
            return remembered(*plain)
        except TypeError:  # symbolic sizes, which torch.compile passes, cannot be hashed
            return of(*plain)

    return shape


def is_channels_last(x: Tensor) -> bool:
    """Whether torch's ``suggest_memory_format`` of a 4-D or 5-D `x` is channels-last.

    It is where strides grow from the channel outwards. The one ambiguous case, size 1 in every axis but the
    first, counts as contiguous.
    """
    if x.dim() not in (4, 5):
        return False
    sizes, strides = x.shape, x.stride()
    if strides[1] == 0:
        return False
    least = 0
    for axis in (1, *range(x.dim() - 1, 1, -1), 0):
        if sizes[axis] == 0 or strides[axis] < least:
            return False
        if axis == 0 and least == strides[1]:
            return False
        least = strides[axis] * sizes[axis] if sizes[axis] > 1 else strides[axis]
    return True


def empty(
    size: Sequence[int], like: Tensor, channels_last: bool = False, dtype: torch.dtype | None = None
) -> Tensor:
    """An uninitialised tensor of `like`'s device, and its dtype unless one is given."""
    form = torch.contiguous_format
    if channels_last and len(size) in (4, 5):
        form = torch.channels_last if len(size) == 4 else torch.channels_last_3d
    return torch.empty(size, dtype=dtype or like.dtype, device=like.device, memory_format=form)


def call(function: type[Function], op: Callable[..., Any], *arguments: Any) -> Any:
    """``op(*arguments)``, through `function` where a gradient of one of them may be asked for."""
    if torch.is_grad_enabled():
        for argument in arguments:
            if isinstance(argument, Tensor) and argument.requires_grad:
                return function.apply(*arguments)
    return op(*arguments)


def expect_tensor(name: str, value: object) -> None:
    """Raises TypeError unless `value` is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(value).__name__}")


def expect_bool(name: str, value: object) -> None:
    """Raises TypeError unless `value` is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected a bool, got {value!r}")


def expect_float(name: str, value: object) -> None:
    """Raises TypeError unless `value` is a float or an int."""
    if isinstance(value, bool) or not isinstance(value, (float, int)):
        raise TypeError(f"{name}: expected a float, got {value!r}")


def expect_same(x: Tensor, dtype: torch.dtype, **others: Tensor | None) -> None:
    """Raises RuntimeError unless all `others` have the dtype given and are on `x`'s device."""
    for name, t in others.items():
        if t is None:
            continue
        if t.dtype != dtype:
            raise RuntimeError(f"{name}: expected {dtype} for an input of {x.dtype}, got {t.dtype}")
        if t.device != x.device:
            raise RuntimeError(
                f"{name}: expected a tensor on {x.device}, as the input, got {t.device}"
            )


def batched(x: Tensor) -> tuple[Tensor, bool]:
    """A 3-D `x` with a batch of one in front, and whether it was added.

    Raises RuntimeError unless `x` is ``C H W`` or ``N C H W``.
    """
    if x.dim() == 4:
        return x, False
    if x.dim() == 3:
        return x.unsqueeze(0), True
    raise RuntimeError(
        f"input: expected 3 (unbatched) or 4 dimensions, got {x.dim()} ({list(x.shape)})"
    )

"""Calls on a CPU that are alike: with tensors of the same sizes, strides and types, and all else the same.

What such calls do is the same, too: what they check, which results they make, which kernels run and with
what. All that differs from call to call are addresses. It is found out once, and then repeated: most of a
small call's time went into finding out the same again. This is done twice,

    function(…)          `entrance`: nothing is checked or settled, and recorded by the shortest way
      autograd.Function
        operation(…)     `repeat`: results are made, and kernels run

as backwards, and functions that do more than one operation, come to the second alone. None is repeated while
somebody looks on (`looked_on`).

Whether tensors are like those of a former call is what torch.compile asks before it runs compiled code: its
guards compare a tensor's type, dispatch keys (of modes and transforms, too), dtype, device, sizes, strides
and requires_grad in a quarter of the time that it takes Python to read them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import (
    _are_functorch_transforms_active,
    _get_tracing_state,
    _len_torch_dispatch_stack,
)
from torch._C._autograd import _profiler_enabled
from torch._C._dynamo import guards
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.nn import Parameter

from cnnops import registry, tuned
from cnnops.config import settings

MOST = 1024
"""So many calls of one function are kept; then all are forgotten."""


def looked_on() -> bool:
    """Whether torch.compile, a trace, a profiler, a dispatch mode, a transform of torch.func, forward mode or
    `registry.observed` is to see what happens."""
    return (
        is_compiling()
        or _len_torch_dispatch_stack() > 0
        or _are_functorch_transforms_active()
        or _get_tracing_state() is not None
        or _profiler_enabled()
        or forward_ad._current_level >= 0
        or not registry.is_unobserved()
    )


class Call:
    """What is known of calls with tensors like these: None until it is found out, then what repeats them, or
    False."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        # None of the tensors is kept. A size of None would stand for any.
        sizes: Any = [list(t.shape) for t in tensors]
        strides: Any = [list(t.stride()) for t in tensors]
        self.fits: Callable[..., bool] = guards.TensorGuards(
            *tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides
        ).check
        self.found: Any = None
        self.tries = 0


class Calls:
    """What is known of the calls of one function."""

    def __init__(self) -> None:
        self._by_key: dict[Hashable, list[Call]] = {}
        self._count = 0
        self._adding = threading.Lock()
        _kept.append(self)

    def __iter__(self) -> Iterator[Call]:
        return (call for alike in list(self._by_key.values()) for call in alike)

    def find(self, key: Hashable, tensors: Sequence[Tensor]) -> Call | None:
        """What is known of calls with this key and tensors like these."""
        for call in self._by_key.get(key, ()):
            if call.fits(*tensors):
                return call
        return None

    def add(self, key: Hashable, tensors: Sequence[Tensor]) -> None:
        """Expect that such a call comes again."""
        # Nobody waits: what is not kept now comes again, and a forked process may have no thread left that
        # would let go.
        if not self._adding.acquire(blocking=False):
            return
        try:
            if self.find(key, tensors) is not None:
                return  # another thread's call was the first; a second entry would never be found
            if self._count >= MOST:
                self.forget()
            self._count += 1
            self._by_key.setdefault(key, []).append(Call(tensors))
        finally:
            self._adding.release()

    def forget(self) -> None:
        """Forget all calls."""
        self._by_key, self._count = {}, 0


_kept: list[Calls] = []


def forget() -> None:
    """Forget all calls, as what they did may not be what they would do now."""
    for calls in _kept:
        calls.forget()


tuned.when_changed(forget)


def told_apart(arguments: Sequence[Any]) -> tuple[Hashable, list[Tensor]]:
    """All that matters to a call but its tensors (the first one's size makes for short lists), and these."""
    tensors: list[Tensor] = []
    key = [settings.all, torch.get_num_threads(), torch.is_grad_enabled()]
    for argument in arguments:
        kind = type(argument)
        key.append(kind)  # True is not 1 here
        if kind is Tensor or kind is Parameter:
            tensors.append(argument)
        else:
            key.append(tuple(argument) if kind is list else argument)
    if tensors:
        key.append(tensors[0].shape)
    return tuple(key), tensors

"""Calls of ``torch.nn.functional`` that reach this package's functions, for as long as a block lasts."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Sequence
from contextlib import ContextDecorator
from functools import lru_cache, partial
from types import TracebackType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from cnnops import functional
from cnnops.config import settings
from cnnops.registry import UnsupportedError


def _with_indices(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    bound = inspect.signature(function).bind(*args, **{**kwargs, "return_indices": True})
    bound.arguments["return_indices"] = True
    return function(*bound.args, **bound.kwargs)


def _table() -> dict[Any, Callable[..., Any]]:
    table: dict[Any, Callable[..., Any]] = {}
    for name in functional.__all__:
        if hasattr(F, name):
            table[getattr(F, name)] = ours = getattr(functional, name)
            indexed = getattr(F, f"{name}_with_indices", None)
            if indexed is not None:
                table[indexed] = partial(_with_indices, ours)
    return table


_OURS = _table()
"""Functions of torch -> those of this package.

Max pooling has a second function, which it hands calls to that ask for indices. What torch has under two
names, such as ``torch.conv2d``, is one object.
"""


def _unsuitable(types: Sequence[type], tensors: Sequence[Any]) -> str:
    """Why this package's functions should not see these arguments; dtypes are theirs to judge."""
    for kind in types:
        if not issubclass(kind, torch.nn.Parameter) and kind is not Tensor:
            return f"a tensor of the subclass {kind.__name__}"
    for t in tensors:
        if isinstance(t, Tensor) and (t.layout != torch.strided or t.is_quantized or t.is_nested):
            return f"a tensor of layout {t.layout}" if not t.is_quantized else "a quantized tensor"
    return ""


@lru_cache(256)
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=4)


class _Mode(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        ours = _OURS.get(func)
        if ours is not None:
            why = _unsuitable(types, (*args, *kwargs.values()))
            if not why:
                return ours(*args, **kwargs)
            message = f"{func.__name__}: no kernel takes {why}"
            if settings.fallback == "error":
                raise UnsupportedError(message)
            if settings.fallback == "warn":
                _warn_once(f"{message}; PyTorch's own op runs instead")
        return func(*args, **kwargs)


class patched(ContextDecorator):  # noqa: N801 (used as a function)
    """Within ``with cnnops.patched():`` or a function decorated by ``@cnnops.patched()``, calls of
    ``torch.nn.functional`` that `cnnops.functional` has are computed by it, and so are ``torch.nn``'s layers
    that make them; with them those of ``torch`` that are the same function, such as ``torch.conv2d``. No
    model and no module of torch is changed.

    This concerns calls made by the thread that entered the block; threads that it starts (DataParallel's
    among them) are not concerned. Blocks nest, and an exception ends them as any. What is recorded for
    backward inside is computed by this package whenever backward runs; but a checkpoint calls its function
    again in the backward, and it is that function that has to be decorated. Arguments that this package
    cannot take, such as tensor subclasses and sparse tensors, go to PyTorch as `cnnops.fallback` says.

    For a model's layers `cnnops.convert` costs less: here every call of torch goes through Python.
    """

    def __init__(self) -> None:
        self._mode: Any = _Mode()

    def __enter__(self) -> None:
        self._mode.__enter__()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._mode.__exit__(kind, value, trace)

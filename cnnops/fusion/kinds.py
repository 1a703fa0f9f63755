"""Which layer a class computes as: a subclass that overrides nothing of what decides that is its base.

Such as one that only sets some arguments of `torch.nn.Conv2d` in an ``__init__`` of its own.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch.nn import Module

_HARMLESS = frozenset(
    (
        "__init__", "reset_parameters", "extra_repr", "__repr__", "__doc__", "__module__", "__qualname__",
        "__annotations__", "__annotate__", "__annotate_func__", "__annotations_cache__", "__constants__",
        "__dict__", "__weakref__", "__slotnames__", "__firstlineno__", "__static_attributes__",
        "__orig_bases__", "__parameters__", "__type_params__",
    )
)  # fmt: skip
"""What a class may define that computes nothing else: how it starts, what it prints, what Python adds."""


def layer_kind(module: Module | None, kind: type[Any] | None = None) -> type[Any]:
    """The class of torch.nn or cnnops.nn that `module` computes as; its own class where that, or one between
    it and theirs, defines anything that they define, too, or that may hide an attribute of `module`. `kind`:
    its class, where that is not the one to ask, as before a parametrization.
    """
    kind = kind or type(module)
    base = _base(kind)
    if module is None or base in (kind, Module) or type(kind) is not type:
        return kind
    names = _own_names(kind)
    overrides = names & attributes(module) or any(
        hasattr(base, name) or inspect.isdatadescriptor(getattr(kind, name)) for name in names
    )
    return kind if overrides else base


def in_place_of(kind: type[Any], target: type[Any]) -> type[Any] | None:
    """The class that a module of class `kind` gets in order to compute by `target`, a subclass of the layer
    that it computes as, or that layer. It is `target`; for a plain subclass, one of both; None if that
    defines what `target` does.
    """
    kind = former_class(kind)
    if _known(kind):
        return target
    if target is _base(kind):
        return kind
    if not issubclass(target, _base(kind)) or any(hasattr(target, n) for n in _own_names(kind)):
        return None
    return _swapped(kind, target)


def attributes(module: Module) -> set[str]:
    """Names of all that `module` itself has, beside what its class has."""
    return set().union(vars(module), module._parameters, module._buffers, module._modules)


class Swapped:
    """What a plain subclass of a layer becomes that computes by another. Bases: this, its own class, and the
    other layer, whose methods come before those of its own class's base.
    """

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(protocol)  # which would find the class by its name
        return _empty, type(self).__bases__[1:], *reduced[2:]


def former_class(kind: type[Any]) -> type[Any]:
    """What a `Swapped` class was made of; any other as it is."""
    return kind.__bases__[1] if Swapped in kind.__bases__ else kind


def computing_class(kind: type[Any]) -> type[Any]:
    """What a `Swapped` class computes by; any other as it is."""
    return kind.__bases__[2] if Swapped in kind.__bases__ else kind


def _known(kind: type[Any]) -> bool:
    """Whether `kind` is PyTorch's or ours."""
    return kind.__module__.startswith(("torch.nn.", "cnnops.nn."))


def _base(kind: type[Any]) -> type[Any]:
    return next((c for c in kind.__mro__ if _known(c)), Module)


def _own_names(kind: type[Any]) -> set[str]:
    """What the classes of `kind` define that are neither PyTorch's nor ours."""
    own = (c for c in kind.__mro__ if c not in (object, Swapped) and not _known(c))
    return {name for c in own for name in vars(c)} - _HARMLESS


_CLASSES: dict[tuple[type[Any], type[Any]], type[Any]] = {}


def _swapped(kind: type[Any], target: type[Any]) -> type[Any]:
    if (kind, target) not in _CLASSES:
        names = {k: getattr(kind, k) for k in ("__doc__", "__module__", "__qualname__")}
        _CLASSES[kind, target] = type(kind.__name__, (Swapped, kind, target), names)
    return _CLASSES[kind, target]


def _empty(kind: type[Any], target: type[Any]) -> Any:
    made: Any = _swapped(kind, target)
    return made.__new__(made)

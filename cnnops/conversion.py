"""Whole models: every layer of ``torch.nn`` that this package has, exchanged for its own.

A layer here is a subclass of torch's that computes by other kernels and keeps everything else, so a swap is
a change of class: parameters, buffers, hooks, parametrizations, names, devices, dtypes and flags stay where
they are, and an optimizer that holds the parameters notices nothing.
"""

from __future__ import annotations

import copy as copies
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch.nn
from torch.nn import Module
from torch.nn.utils import parametrize

import cnnops.nn
from cnnops.fusion.kinds import computing_class, in_place_of, layer_kind
from cnnops.fusion.training import TrainingFuser, plain_class, undo


@dataclass(frozen=True)
class Conversion:
    """What `convert` or `revert` did. Printing it shows the model as a tree, each layer with its fate.

    `swapped`: a module's name -> its former and its new class. `left`: the name of a module that computes
    something here or might -> why it stays as it is. `fused`: the name of a batch norm -> what `convert` put
    into it, or `revert` took out of it again.
    """

    model: Module
    swapped: dict[str, tuple[type[Module], type[Module]]] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    fused: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{type(self.model).__name__}{self._fate('')}"]
        for name, module in self.model.named_modules():
            if name:
                depth = name.count(".") + 1
                kind = type(module).__name__
                lines.append(f"{'  ' * depth}{name.rpartition('.')[2]}: {kind}{self._fate(name)}")
        total = f"{len(self.swapped)} swapped, {len(self.left)} left"
        total += f", {len(self.fused)} fused" if self.fused else ""
        return "\n".join([*lines, total])

    def _fate(self, name: str) -> str:
        fates = []
        if name in self.swapped:
            before, after = self.swapped[name]
            fates.append(f"{_origin(before)} -> {_origin(after)}")
        fates += [f"fused: {self.fused[name]}"] if name in self.fused else []
        fates += [f"left: {self.left[name]}"] if name in self.left else []
        return "".join(f"  {fate}" for fate in fates)


def convert(model: Module, copy: bool = False, fuse_training: bool = False) -> Conversion:
    """Exchange every layer of ``torch.nn`` in `model` that `cnnops.nn` has, in place or, with `copy`, in a
    deep copy, which the returned `Conversion` has as ``.model``.

    With `fuse_training`, batch norms with an activation behind them, and perhaps a residual addition between,
    become layers that do all of it in one pass, such as `cnnops.nn.BatchNormAct2d`, in training and in
    evaluation, under the same names in the state_dict. Activations in a Sequential become identities. A
    forward of one's own is rewritten, for which its module gets a subclass of its class, if tracing finds it
    the same in both modes: what it decides by the module's attributes is then decided for good. ``.fused``
    has what was done, ``.left`` what was not and why.

    Subclasses of torch's layers that override nothing but ``__init__`` and what they print compute by ours,
    too, and stay instances of their class. Other subclasses, which may compute something else, and scripted
    modules are left alone.
    What a module's forward calls as a function is not seen: `cnnops.patched` is for that. Converting twice
    changes nothing more. A model inside of torch.compile's or DistributedDataParallel's wrapper is converted
    in place as any other; what was compiled compiles anew.

    Raises TypeError unless `model` is a Module, and for a `copy` of one that is wrapped by
    DistributedDataParallel, which cannot be copied.
    """
    done = _exchange(model, _ours(), copy)
    if fuse_training:
        fuser = TrainingFuser(done.model)
        modules = dict(done.model.named_modules())
        for name, parts in fuser.fused.items():
            before = (
                done.swapped[name][0] if name in done.swapped else plain_class(type(modules[name]))
            )
            done.swapped[name] = before, type(modules[name])
            done.fused[name] = parts
        done.left.update(fuser.left)
    return done


def revert(model: Module, copy: bool = False) -> Conversion:
    """Undo `convert`, with and without `fuse_training`: every layer of `cnnops.nn` that ``torch.nn`` has,
    too, becomes torch's again. What `cnnops.fuse` made stays: the model that it was given is the way back.

    Raises TypeError unless `model` is a Module, and for a `copy` as `convert` does.
    """
    model = _expected(model, copy)
    undone = undo(model)
    done = _exchange(model, {ours: theirs for theirs, ours in _ours().items()}, False)
    done.fused.update(undone)
    return done


_ONLY_OURS = {getattr(cnnops.nn, name) for name in cnnops.nn.__all__ if not hasattr(torch.nn, name)}
"""Layers that torch.nn has no counterpart of: nothing to exchange, and nothing left undone."""


@lru_cache(None)
def _ours() -> dict[type[Module], type[Module]]:
    """Layers of torch.nn -> those of this package."""
    names = [name for name in cnnops.nn.__all__ if hasattr(torch.nn, name)]
    return {getattr(torch.nn, name): getattr(cnnops.nn, name) for name in names}


def _origin(kind: type[Module]) -> str:
    kind = computing_class(kind)
    return f"{kind.__module__.partition('.')[0]}.{kind.__name__}"


def _expected(model: Module, copy: bool) -> Module:
    """The model, or a copy of it."""
    if not isinstance(model, Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if copy and isinstance(model, torch.nn.parallel.DistributedDataParallel):
        raise TypeError(
            "copy: expected a model that nothing is wrapped around, got DistributedDataParallel: convert a "
            "copy of model.module and wrap that"
        )
    return copies.deepcopy(model) if copy else model


def _exchange(model: Module, into: dict[type[Module], type[Module]], copy: bool) -> Conversion:
    done = Conversion(_expected(model, copy))
    for name, module, kind in list(_layers(done.model)):
        base = layer_kind(module, kind)
        target = in_place_of(kind, into[base]) if base in into else None
        if target is not None:
            former = type(module)
            module.__class__ = target if former is kind else _parametrized(former, target)
            done.swapped[name] = kind, target
            continue
        layers = [theirs for theirs in into if isinstance(module, theirs)]
        if isinstance(module, torch.jit.ScriptModule):
            done.left[name] = "scripted: convert the model before scripting it"
        elif layers and base not in into.values() and base not in _ONLY_OURS:
            done.left[name] = f"{kind.__qualname__} is a subclass of {_origin(layers[-1])}"
    return done


def _layers(model: Module) -> Iterator[tuple[str, Module, type[Module]]]:
    """Every module with its name and its class, for a parametrized one the class before it was so."""
    for name, module in model.named_modules():
        kind = type(module)
        yield name, module, kind.__bases__[0] if parametrize.is_parametrized(module) else kind


def _parametrized(former: type[Any], target: type[Module]) -> type[Module]:
    """`target` with the properties that parametrizing has put into the class `former`."""
    own = {k: v for k, v in vars(former).items() if k not in ("__dict__", "__weakref__", "__doc__")}
    return type(f"Parametrized{target.__name__}", (target,), own)

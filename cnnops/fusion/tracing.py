"""What a module's forward does, as a graph of ``torch.fx``, or why that cannot be known.

Tracing runs forward once with stand-ins for its inputs. Whatever such a run would miss makes a module
untraceable here, where ``torch.fx`` alone would return a graph that computes something else: decisions and
random numbers that differ from run to run, tensors made on the way, blocks under autocast or without
gradients, attributes that forward changes, hooks. While it lasts, modules must not run in other threads.
"""

from __future__ import annotations

import inspect
import math
import operator
import sys
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn
from torch.nn import Module
from torch.nn.utils import parametrize

import cnnops.functional
from cnnops.fusion.steps import norm_add_act

HOOKS = (
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks",
    "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs",
    "_is_full_backward_hook",
)  # fmt: skip
"""Attributes of a module that make up its hooks; the first four have them."""
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


class Untraceable(Exception):
    """Why a forward cannot be known. `module`: whose."""

    def __init__(self, reason: str, module: Module) -> None:
        super().__init__(reason)
        self.module = module


def is_layer(module: Module) -> bool:
    """Whether `module` is one of PyTorch's own or ours, or a subclass: a single step of a graph."""
    return any(
        kind.__module__.startswith(("torch.nn.", "torch.ao.", "cnnops.nn."))
        and not issubclass(kind, CONTAINERS)
        for kind in type(module).__mro__
        if kind is not Module
    )


def is_sealed(module: Module) -> bool:
    """Whether nothing inside of `module` may be exchanged: what runs is not its forward."""
    return isinstance(module, torch.jit.ScriptModule) or is_wrapper(module)


def is_wrapper(module: Module) -> bool:
    """Whether `module` stands around a model: ``torch.compile``'s and the data-parallel ones."""
    wrappers = (
        "OptimizedModule", "DistributedDataParallel", "DataParallel", "FullyShardedDataParallel",
    )  # fmt: skip
    return any(
        kind.__name__ in wrappers and kind.__module__.startswith("torch.")
        for kind in type(module).__mro__
    )


def has_hooks(module: Module) -> bool:
    return any(getattr(module, name) for name in HOOKS[:4])


def altered(module: Module) -> str:
    """Why a call of `module` is not what its class says; "" where it is."""
    if has_hooks(module):
        return "has hooks"
    if parametrize.is_parametrized(module):
        return "is parametrized"
    if getattr(module, "_compiled_call_impl", None) is not None:
        return "is compiled"
    return "has a forward of its own" if "forward" in vars(module) else ""


def trace(module: Module, leaves: Set[int], shallow: bool = False, root: bool = True) -> fx.Graph:
    """The graph of `module`'s forward down to layers, to hooked modules, and to those with ids in `leaves`;
    with `shallow`, to the modules that it calls itself.

    Arguments with defaults are taken for their defaults, if this is the `root`. Raises Untraceable.
    """
    if isinstance(module, torch.jit.ScriptModule):
        raise Untraceable("is scripted", module)
    if "forward" in vars(module):
        raise Untraceable("its forward was replaced", module)
    if parametrize.is_parametrized(module):
        raise Untraceable("is parametrized", module)
    if type(module).forward is Module.forward:
        raise Untraceable("has no forward", module)
    defaults = _defaults(module, root)
    with _unchanged(module):
        with torch.enable_grad():
            first = _Tracer(leaves, shallow).run(module, defaults)
        with torch.no_grad():
            second = _Tracer(leaves, shallow).run(module, defaults)
    if str(first) != str(second):
        raise Untraceable("its forward differs from run to run", _differing(module, first, second))
    return first


def _differing(module: Module, first: fx.Graph, second: fx.Graph) -> Module:
    """The innermost module whose forward made the first step that is another in each graph."""
    for a, b in zip(first.nodes, second.nodes, strict=False):
        if a.format_node() != b.format_node():
            paths = [path for path, _ in a.meta.get("nn_module_stack", {}).values()]
            inside = [m for m in map(module.get_submodule, paths) if not is_layer(m)]
            return inside[-1] if inside else module
    return module


def _defaults(module: Module, root: bool) -> dict[str, Any]:
    defaults: dict[str, Any] = {}
    for p in inspect.signature(type(module).forward).parameters.values():
        if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
            raise Untraceable(f"its forward takes any number of arguments (*{p.name})", module)
        if p.default is not p.empty:
            if not root or not (p.default is None or isinstance(p.default, (bool, int, float))):
                raise Untraceable(f"its forward has an optional argument, {p.name}", module)
            defaults[p.name] = p.default
    return defaults


def _state() -> tuple[Any, ...]:
    """What holds around an operation and would not be part of the graph."""
    devices = ("cpu", "cuda")
    return (
        torch.is_grad_enabled(), torch.is_inference_mode_enabled(),
        *(torch.is_autocast_enabled(device) for device in devices),
        *(torch.get_autocast_dtype(device) for device in devices),
    )  # fmt: skip


class _Proxy(fx.Proxy):
    """A stand-in that does not let pass what a graph would lose: questions for types, changes in place."""

    @property
    def __class__(self) -> type:
        # What isinstance asks after; of a stand-in no answer is right.
        frame: Any = sys._getframe(1)
        while frame.f_globals.get("__name__") == "abc":  # asks for somebody else
            frame = frame.f_back
        if frame.f_globals.get("__name__", "").split(".")[0] not in ("torch", "cnnops"):
            raise TypeError("it asks for the type of what it computes")
        return type(self)

    @__class__.setter
    def __class__(self, kind: type) -> None:
        raise TypeError("it changes the type of what it computes")


def _in_place(operation: Any) -> Callable[[Any, Any], Any]:
    def method(self: Any, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", operation, (self, other), {})

    return method


for _name in (
    "iadd", "isub", "imul", "imatmul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor",
    "ilshift", "irshift",
):  # fmt: skip
    setattr(_Proxy, f"__{_name}__", _in_place(getattr(operator, _name)))


class _Tracer(fx.Tracer):
    """Without arguments it is what reads a pickled graph."""

    def __init__(self, leaves: Set[int] = frozenset(), shallow: bool = False) -> None:
        modules: Any = (math, cnnops.functional)
        super().__init__(autowrap_modules=modules, autowrap_functions=(norm_add_act,))
        self._leaves, self._shallow = leaves, shallow
        self._state = _state()
        self._at: list[Module] = []  # outermost first, those that the graph looks into

    def run(self, module: Module, defaults: dict[str, Any]) -> fx.Graph:
        self._at = [module]
        try:
            graph = self.trace(module, defaults or None)
            for node in graph.nodes:
                if isinstance(node.type, str):  # an annotation that nobody evaluated
                    node.type = None
                # Arguments that are taken for their defaults come back as name_1, name_2, …
                stem = str(node.target).rpartition("_")[0]
                if node.op == "placeholder" and stem in defaults and node.target not in defaults:
                    node.target = stem
        except Untraceable:
            raise
        except Exception as error:
            line = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise Untraceable(f"its forward cannot be traced: {line}", self._at[-1]) from error
        return graph

    def is_leaf_module(self, m: Module, module_qualified_name: str) -> bool:
        return (
            self._shallow or id(m) in self._leaves or is_layer(m) or is_sealed(m) or bool(altered(m))
        )  # fmt: skip

    def call_module(self, m: Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if self.is_leaf_module(m, ""):
            return super().call_module(m, forward, args, kwargs)
        self._at.append(m)
        result = super().call_module(m, forward, args, kwargs)
        self._at.pop()  # not after an exception: then this is where it happened
        return result

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _state() != self._state:
            raise Untraceable("its forward switches autocast or gradients", self._at[-1])
        return super().create_node(*args, **kwargs)

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, torch.Tensor) and not isinstance(a, nn.Parameter):
            if a not in self.tensor_attrs:
                raise Untraceable("its forward makes a tensor", self._at[-1])
        return super().create_arg(a)


@contextmanager
def _unchanged(module: Module) -> Iterator[None]:
    """Puts back the attributes of `module` and of those below it. Raises Untraceable if any had changed."""
    saved = [(m, {k: (v, _copied(v)) for k, v in vars(m).items()}) for m in module.modules()]
    changed: Module | None = None
    try:
        yield
    finally:
        for m, attributes in saved:
            now = vars(m)
            if not _same(now, {k: v for k, (v, _) in attributes.items()}):
                changed = m
                now.clear()
                now.update({k: v for k, (v, _) in attributes.items()})
            for value, content in attributes.values():
                if isinstance(value, (list, dict)) and not _same(value, content):
                    changed = m
                    value.clear()
                    value.extend(content) if isinstance(value, list) else value.update(content)
    if changed is not None:
        raise Untraceable("its forward changes attributes", changed)


def _copied(value: Any) -> Any:
    return value.copy() if isinstance(value, (list, dict)) else None


def _same(a: Any, b: Any) -> bool:
    """Whether two lists or dicts hold the same objects."""
    if len(a) != len(b):
        return False
    if isinstance(a, list):
        return all(x is y for x, y in zip(a, b, strict=True))
    return all(k in b and b[k] is v for k, v in a.items())

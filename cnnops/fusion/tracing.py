"""What a module's forward does, as a graph of ``torch.fx``, or why that cannot be known.

Tracing runs forward once with stand-ins for its inputs. Whatever such a run would miss makes a module
untraceable here, where ``torch.fx`` alone would return a graph that computes something else: decisions and
random numbers that differ from run to run, tensors made on the way, blocks under autocast or without
gradients, attributes that forward changes, hooks. While it lasts, modules must not run in other threads.

Functions that forward calls are looked into. Where that fails, a function of the user's own becomes a step of
the graph, which calls it as it is; of such a step nothing is known but what it is given.
"""

from __future__ import annotations

import functools
import inspect
import math
import operator
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Set
from contextlib import contextmanager
from itertools import pairwise
from types import FunctionType
from typing import Any

import torch
from torch import fx, nn
from torch.nn import Module
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_leaves

import cnnops.functional
from cnnops.fusion.steps import expect_default, expect_given, norm_add_act

HOOKS = (
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks",
    "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs",
    "_is_full_backward_hook",
)  # fmt: skip
"""Attributes of a module that make up its hooks; the first four have them."""
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


Place = tuple[dict[str, Any], str]
"""Where a forward finds a function that it calls: globals and a name."""


class Untraceable(Exception):
    """Why a forward cannot be known. `module`: whose. `functions`: those inside of which it was found."""

    def __init__(self, reason: str, module: Module) -> None:
        super().__init__(reason)
        self.module = module
        self.functions: list[Place] = []


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


def _has_own_call(module: Module) -> bool:
    """Whether calling `module` runs a method of the user's, of which its forward is but a part."""
    kind = next(kind for kind in type(module).__mro__ if "__call__" in vars(kind))
    return not kind.__module__.startswith("torch.") and not isinstance(module, fx.GraphModule)


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


def is_users(function: Any) -> bool:
    """Whether `function` is written in Python, and neither PyTorch's nor ours."""
    return isinstance(function, FunctionType) and (function.__module__ or "").partition(".")[0] not in (
        "torch", "cnnops",
    )  # fmt: skip


def arguments_of(sample: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A model's argument, a tuple or list of them, or a dict of keyword arguments -> both kinds."""
    if isinstance(sample, dict):
        return (), sample
    return (tuple(sample) if isinstance(sample, (tuple, list)) else (sample,)), {}


def trace(
    module: Module,
    leaves: Set[int],
    shallow: bool = False,
    root: bool = True,
    sample: Any = None,
) -> fx.Graph:
    """The graph of `module`'s forward down to layers, to hooked modules, and to those with ids in `leaves`;
    with `shallow`, to the modules that it calls itself. Functions that cannot be traced are steps.

    Of optional arguments, which only the `root` may have, those are inputs that `sample` gives another value
    than the default; without a sample, the first, if that is None by default. The others are taken for their
    defaults. Raises Untraceable.
    """
    if isinstance(module, torch.jit.ScriptModule):
        raise Untraceable("is scripted", module)
    if "forward" in vars(module):
        raise Untraceable("its forward was replaced", module)
    if parametrize.is_parametrized(module):
        raise Untraceable("is parametrized", module)
    if type(module).forward is Module.forward:
        raise Untraceable("has no forward", module)
    if _has_own_call(module):
        raise Untraceable("has a __call__ of its own", module)
    defaults = _defaults(module, root, sample)
    functions: list[Place] = []
    reasons: dict[int, Untraceable] = {}
    while True:
        try:
            with _unchanged(module):
                with torch.enable_grad():
                    first = _Tracer(leaves, shallow, functions).run(module, defaults)
                with torch.no_grad():
                    second = _Tracer(leaves, shallow, functions).run(module, defaults)
        except Untraceable as error:
            # What comes after a function has become a step may follow from that alone.
            reason = reasons.setdefault(id(error.module), error)
            known = {(id(scope), name) for scope, name in functions}
            others = [f for f in error.functions if (id(f[0]), f[1]) not in known]
            if not others:
                raise reason from None
            functions.append(others[-1])  # the innermost
            continue
        if str(first) != str(second):
            differing = _differing(module, first, second)
            raise Untraceable("its forward differs from run to run", differing)
        return first


def _functions_between(module: Module, error: Exception) -> list[Place]:
    """The user's functions in which `error` occurred after `module`'s forward began, outermost first: those
    that are called by a name among the globals of that forward.
    """
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    starts = [i for i, frame in enumerate(frames) if frame.f_code is code]
    if not starts:
        return []
    frames = frames[starts[-1] :]
    scope = frames[0].f_globals
    return [
        (scope, name)
        for caller, callee in pairwise(frames)
        if caller.f_globals is scope
        for name in dict.fromkeys(caller.f_code.co_names)
        if _is_found_as(scope.get(name), callee.f_code)
    ]


def _is_found_as(function: Any, code: Any) -> bool:
    """Whether `function` is a user's one that runs `code`, and that its module has: so it can be pickled."""
    if not is_users(function) or function.__code__ is not code:
        return False
    return getattr(sys.modules.get(function.__module__), function.__qualname__, None) is function


@contextmanager
def _as_steps(functions: Iterable[Place]) -> Iterator[None]:
    """Calls of these functions that get a stand-in become steps of its graph."""
    saved = [(scope, name, scope[name]) for scope, name in functions]
    for scope, name, function in saved:
        scope[name] = _as_step(function)
    try:
        yield
    finally:
        for scope, name, function in saved:
            scope[name] = function


def _as_step(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        for value in tree_leaves((args, kwargs)):
            if isinstance(value, fx.Proxy):
                step = value.tracer.create_proxy("call_function", function, args, kwargs)
                step.node.meta["is_wrapped"] = True  # a pickled graph is read by tracing it
                return step
        return function(*args, **kwargs)

    return call


def _differing(module: Module, first: fx.Graph, second: fx.Graph) -> Module:
    """The innermost module whose forward made the first step that is another in each graph."""
    for a, b in zip(first.nodes, second.nodes, strict=False):
        if a.format_node() != b.format_node():
            paths = [path for path, _ in a.meta.get("nn_module_stack", {}).values()]
            inside = [m for m in map(module.get_submodule, paths) if not is_layer(m)]
            return inside[-1] if inside else module
    return module


def _inputs(module: Module, sample: Any) -> set[str]:
    """Names of arguments that a call of `module` gives values other than their defaults; see `trace`."""
    signature = inspect.signature(type(module).forward)
    if sample is not None:
        args, kwargs = arguments_of(sample)
        try:
            given = signature.bind(module, *args, **kwargs).arguments
        except TypeError:  # the call on the sample will say what is wrong with it
            pass
        else:
            parameters = signature.parameters
            return {k for k, value in given.items() if not _equal(value, parameters[k].default)}
    first = list(signature.parameters.values())[1:2]  # behind self
    return {p.name for p in first if p.kind is not p.KEYWORD_ONLY and p.default is None}


def _equal(value: Any, default: Any) -> bool:
    return value is default or (
        type(value) is type(default) and isinstance(value, (int, float)) and value == default
    )


def _defaults(module: Module, root: bool, sample: Any) -> dict[str, Any]:
    """Arguments that are taken for their defaults."""
    defaults: dict[str, Any] = {}
    inputs = _inputs(module, sample) if root else set()
    for p in inspect.signature(type(module).forward).parameters.values():
        if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
            raise Untraceable(f"its forward takes any number of arguments (*{p.name})", module)
        if p.default is not p.empty and p.name not in inputs:
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


def _check_arguments(graph: fx.Graph, module: Module, defaults: dict[str, Any]) -> None:
    """Gives placeholders the names of forward's arguments. Values that forward was not traced for, the graph
    will refuse: None as an input that was given, and others than the defaults that were assumed.
    """
    names = list(inspect.signature(type(module).forward).parameters)[1:]  # behind self
    places = [node for node in graph.nodes if node.op == "placeholder"]
    for node, name in zip(places, names, strict=True):
        node.target = name  # what is taken for its default comes back as name_1
        if not node.args:
            continue
        if name in defaults:
            # The tracer's own checks, which a pickled graph cannot be read with: see torch.fx.wrap.
            for user in list(node.users):
                for last in list(user.users):
                    graph.erase_node(last)
                graph.erase_node(user)
        with graph.inserting_after(places[-1]):
            if name in defaults:
                check = graph.call_function(expect_default, (node, defaults[name], name))
            else:
                check = graph.call_function(expect_given, (node, name))
            check.meta["is_wrapped"] = True  # a pickled graph is read by tracing it


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

    def __init__(
        self, leaves: Set[int] = frozenset(), shallow: bool = False, functions: Iterable[Place] = ()
    ) -> None:
        modules: Any = (math, cnnops.functional)
        functions_of_ours = (norm_add_act, expect_given, expect_default)
        super().__init__(autowrap_modules=modules, autowrap_functions=functions_of_ours)
        self._leaves, self._shallow, self._functions = leaves, shallow, functions
        self._state = _state()
        self._at: list[Module] = []  # outermost first, those that the graph looks into

    def run(self, module: Module, defaults: dict[str, Any]) -> fx.Graph:
        self._at = [module]
        try:
            with _as_steps(self._functions):
                graph = self.trace(module, defaults or None)
            for node in graph.nodes:
                if not isinstance(node.type, type):  # perhaps an annotation that nobody evaluated
                    node.type = None
            _check_arguments(graph, module, defaults)
        except Untraceable as error:
            error.functions = _functions_between(error.module, error)
            raise
        except Exception as error:
            line = (str(error).strip() or type(error).__name__).splitlines()[0]
            why = Untraceable(f"its forward cannot be traced: {line}", self._at[-1])
            why.functions = _functions_between(why.module, error)
            raise why from error
        return graph

    def is_leaf_module(self, m: Module, module_qualified_name: str) -> bool:
        return (
            self._shallow or id(m) in self._leaves or is_layer(m) or is_sealed(m) or bool(altered(m))
        )  # fmt: skip

    def call_module(self, m: Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if self.is_leaf_module(m, ""):
            if _has_own_call(m):
                why = f"it calls a {type(m).__name__}, which has a __call__ of its own"
                raise Untraceable(why, self._at[-1])
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
        if a is self.root:
            raise Untraceable("its forward hands itself to a function", self._at[-1])
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

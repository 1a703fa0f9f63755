"""Batch norm, residual addition and activation as one layer, in models that go on training.

In a Sequential a batch norm becomes a `cnnops.nn.BatchNormAct2d` or its like and the activation behind it an
identity. In a forward of the user's own the steps are found by tracing: its module gets a subclass of its
class, whose forward is the traced one with those steps in one. Either way names, parameters, buffers and the
tree of modules stay what they are.

A forward is rewritten only if it is the same in training and in evaluation, and in every run. What its module
decides by constants (a downsample or none) is decided for good.
"""

from __future__ import annotations

import copyreg
import linecache
import operator
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType
from typing import Any

from torch import fx, nn
from torch.nn import Module

import cnnops.nn
from cnnops.fusion.inference import joined, only_called
from cnnops.fusion.kinds import computing_class, in_place_of, layer_kind
from cnnops.fusion.patterns import (
    NORMS,
    Tail,
    act_class,
    activation_of,
    called,
    handed,
    summand,
    tail,
)
from cnnops.fusion.steps import Absorbed, norm_add_act
from cnnops.fusion.tracing import CONTAINERS, Untraceable, altered, is_layer, is_sealed, trace

TWICE = "is called from more than one place"


class _Fused:
    """A module of the user's with a forward that was written for it."""

    _source: str
    _names: tuple[tuple[str, Any], ...]

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(protocol)
        maker, _, *rest = reduced
        if maker is not copyreg.__newobj__:  # type: ignore[attr-defined]
            return reduced  # a class that knows better
        return _empty, (type(self).__bases__[1], self._source, self._names), *rest


def _empty(kind: type[Any], source: str, names: tuple[tuple[str, Any], ...]) -> Any:
    made: Any = _fused_class(kind, source, names)
    return made.__new__(made)


_CLASSES: dict[tuple[type[Any], str], type[Any]] = {}


def _fused_class(kind: type[Any], source: str, names: tuple[tuple[str, Any], ...]) -> type[Any]:
    """A subclass of `kind` with the forward that `source` defines; `names`: what it refers to."""
    if (kind, source) not in _CLASSES:
        scope = {k: import_module(v[0]) if isinstance(v, tuple) else v for k, v in names}
        name = f"Fused{kind.__name__}"
        file = f"<{name} {len(_CLASSES)}>"
        exec(compile(source, file, "exec"), scope)
        linecache.cache[file] = (len(source), None, source.splitlines(True), file)
        members = {"forward": scope["forward"], "_source": source, "_names": names}
        members |= {"__doc__": kind.__doc__, "__module__": kind.__module__}
        _CLASSES[kind, source] = type(name, (_Fused, kind), members)
    return _CLASSES[kind, source]


class TrainingFuser:
    """One call: `fused` has the names of batch norms -> what was put into them, `left` names -> why not."""

    def __init__(self, model: Module) -> None:
        self.fused: dict[str, str] = {}
        self.left: dict[str, str] = {}
        self._names = {id(m): name for name, m in model.named_modules()}
        self._holders: dict[int, list[tuple[Module, str]]] = {}
        self._graphs: dict[int, fx.Graph] = {}
        self._reached: set[int] = set()
        self._handed: set[int] = set()
        """ids of modules that a function gets, and of those in lists that one gets."""
        called_ids: set[int] = {id(model)}
        owners = [m for m in model.modules() if not is_layer(m) and not is_sealed(m)]
        for m in model.modules():
            for key, child in m.named_children():
                self._holders.setdefault(id(child), []).append((m, key))
        for m in owners:
            self._read(m)
        for m in owners:
            if id(m) in self._graphs:
                for target in _targets(self._graphs[id(m)]):
                    *path, _ = parts = target.split(".")
                    called_ids.add(id(m.get_submodule(target)))
                    inside = (m.get_submodule(".".join(parts[: i + 1])) for i in range(len(path)))
                    self._reached.update(map(id, inside))
                for target in handed(self._graphs[id(m)]):
                    part = operator.attrgetter(target)(m)
                    if isinstance(part, Module):
                        got = list(part.modules()) if isinstance(part, CONTAINERS) else [part]
                        self._handed.update(map(id, got))
        # A Sequential whose parts others call is itself not called.
        for m in owners:
            if id(m) in self._reached and id(m) not in called_ids:
                self._graphs.pop(id(m), None)
        self._calls = Counter(
            id(m.get_submodule(target))
            for m in owners
            if id(m) in self._graphs
            for target in _targets(self._graphs[id(m)])
        )
        for m in owners:
            if id(m) in self._graphs:
                self._fuse(m, self._graphs[id(m)])

    def _read(self, module: Module) -> None:
        """Keeps the graph of `module`'s forward, or why there is none, if it has batch norms to fuse."""
        try:
            graphs = []
            for mode in (False, True):
                with _mode(module, mode):
                    graphs.append(trace(module, set(), shallow=True, root=False))
            if str(graphs[0]) != str(graphs[1]):
                raise Untraceable("its forward differs between training and evaluation", module)
            self._graphs[id(module)] = graphs[0]
        except Untraceable as error:
            own = [child for _, child in _held(module)]
            if type(module).forward is not Module.forward and any(
                layer_kind(c) in NORMS for c in own
            ):
                self.left[self._names[id(module)]] = str(error)

    def _fuse(self, module: Module, graph: fx.Graph) -> None:
        name = self._names[id(module)]
        roots = {target: operator.attrgetter(target)(module) for target in _targets(graph)}
        sequential = type(module).forward is nn.Sequential.forward
        found = []
        for node in graph.nodes:
            layer = called(node, roots)
            if layer is None or _with_activation(layer) is None or not node.users:
                continue
            behind = tail(node, node, roots, through=False)
            if behind.activation == "none":  # a sum alone is no reason for rewriting a forward
                behind = Tail(node, node, refused=behind.refused)
            candidate = bool(behind.steps or behind.refused)
            why = self._refusal(module, sequential, node, layer, graph, candidate)
            if why or (behind.refused and not behind.steps):
                why = why or next(iter(behind.refused.values()))
                if candidate:
                    self.left[joined(name, str(node.target))] = why
            elif behind.steps:
                found.append(behind)
        if not found:
            return
        for behind in found:
            norm = roots[str(behind.head.target)]
            parts = [
                activation_of(n, roots) if n is not behind.sum else "residual" for n in behind.steps
            ]
            self.fused[self._names[id(norm)]] = " + ".join(parts)
            kind = _with_activation(norm)
            assert kind is not None
            norm.__class__ = kind
            norm.activation = behind.activation
            if sequential:
                # One activation may have several places, of which a graph has but the first.
                keys = list(module._modules)
                key = keys[keys.index(str(behind.head.target)) + 1]
                activation: Any = module._modules[key]
                module._modules[key] = Absorbed(activation, norm)
        if not sequential:
            _rewrite(module, graph, found)

    def _refusal(
        self, module: Module, sequential: bool, node: fx.Node, norm: Module, graph: fx.Graph, wanted: bool
    ) -> str:  # fmt: skip
        """Why `norm` has to stay what it is."""
        if not wanted:
            return ""
        if altered(norm):
            return altered(norm)
        if id(norm) in self._handed:
            return "is handed to a function"
        if self._calls[id(norm)] != 1:
            return TWICE
        if id(module) in self._reached:
            return f"a part of {type(module).__name__} is called from outside"
        if len(node.args) != 1 or node.kwargs:
            return "is called with more than an input"
        if any(
            n.op == "get_attr" and str(n.target).startswith(f"{node.target}.") for n in graph.nodes
        ):
            return "its parameters are read by themselves"
        if sequential and not self._called_whole(module):
            return "its Sequential may be used in other ways than as a whole"
        return ""

    def _called_whole(self, module: Module) -> bool:
        """Whether those that hold `module` are known, or can be read, to call it and nothing else."""
        for holder, key in self._holders.get(id(module), []):
            if id(holder) in self._graphs or is_sealed(holder):
                continue
            if isinstance(holder, (nn.ModuleList, nn.ModuleDict)):
                above = [h for h, _ in self._holders.get(id(holder), [])]
                if not above or not all(id(h) in self._graphs for h in above):
                    return False
            elif not only_called(holder, key):
                return False
        return True


def undo(model: Module) -> dict[str, str]:
    """Takes back what `TrainingFuser` did to `model`: names of batch norms -> what is no part of them now."""
    names = {id(m): name for name, m in model.named_modules()}
    undone: dict[str, str] = {}

    def release(norm: Any) -> None:
        if id(norm) in names and hasattr(norm, "activation"):
            undone[names[id(norm)]] = norm.activation
            norm.__class__ = plain_class(type(norm))
            del norm.activation

    for module in list(model.modules()):
        for key, child in list(module._modules.items()):
            if isinstance(child, Absorbed):
                activation, norm = child.was
                activation.training = child.training
                module._modules[key] = activation
                release(norm)
        if isinstance(module, _Fused):
            own: Any = module
            for name in own._fused_norms:
                release(own.get_submodule(name))
            del own._fused_norms
            own.__class__ = type(own).__bases__[1]
    return undone


def _targets(graph: fx.Graph) -> list[str]:
    return [str(n.target) for n in graph.nodes if n.op == "call_module"]


def _held(module: Module) -> Iterator[tuple[str, Module]]:
    """Children of `module`, those in lists among them."""
    for key, child in module.named_children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            yield from _held(child)
        else:
            yield key, child


@contextmanager
def _mode(module: Module, training: bool) -> Iterator[None]:
    """All modules in one mode, and then in their own again; ``train()`` might do more than that."""
    modes = [(m, m.training) for m in module.modules()]
    for m, _ in modes:
        m.training = training
    try:
        yield
    finally:
        for m, mode in modes:
            m.training = mode


def _with_activation(norm: Module) -> type[Module] | None:
    """The class with which `norm` applies an activation, too; None if there is none."""
    kind = act_class(norm)
    return None if kind is None else in_place_of(type(norm), kind)


def plain_class(kind: type[Module]) -> type[Module]:
    """What a batch norm of class `kind` was before it applied an activation."""
    plain = in_place_of(kind, getattr(cnnops.nn, computing_class(kind).__name__.replace("Act", "")))
    assert plain is not None
    return plain


def _rewrite(module: Any, graph: fx.Graph, found: list[Tail]) -> None:
    for behind in found:
        head = behind.head
        if behind.sum is None:
            behind.end.replace_all_uses_with(head)
            steps = behind.steps
        else:
            added = summand(behind.sum, head)  # anew: it may be what an earlier one has become
            assert added is not None
            with graph.inserting_before(behind.sum):
                norm = graph.get_attr(str(head.target))
                arguments = (norm, head.args[0], *added)
                fused = graph.call_function(norm_add_act, arguments)
            behind.end.replace_all_uses_with(fused)
            steps = [head, *behind.steps]
        for node in reversed(steps):
            graph.erase_node(node)
    code = graph.python_code("self")
    names = tuple(
        (k, (v.__name__,) if isinstance(v, ModuleType) else v)
        for k, v in sorted(code.globals.items())
    )
    module._fused_norms = tuple(str(behind.head.target) for behind in found)
    module.__class__ = _fused_class(type(module), code.src, names)

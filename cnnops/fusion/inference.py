"""Rebuilding a model from fused layers: one graph for as much of it as can be traced.

Modules that cannot be traced stay what they are, in a shallow copy, around the parts of them that can.
"""

from __future__ import annotations

import ast
import copy
import inspect
import operator
import textwrap
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx, nn
from torch.nn import Module

from cnnops.fusion import folding
from cnnops.fusion.folding import CONVOLUTIONS
from cnnops.fusion.kinds import layer_kind
from cnnops.fusion.patterns import (
    NORMS,
    Tail,
    act_class,
    activation_in,
    activation_of,
    between,
    called,
    changes,
    handed,
    norm_call,
    skip,
    sole_user,
    summand,
    tail,
)
from cnnops.fusion.steps import Absorbed, norm_add_act
from cnnops.fusion.tracing import (
    CONTAINERS,
    HOOKS,
    Untraceable,
    altered,
    has_hooks,
    is_layer,
    is_sealed,
    trace,
)


def joined(*names: str) -> str:
    return ".".join(name for name in names if name)


@dataclass
class Group:
    """One fused step, to be compared with the steps of the `Region`'s graph that it stands for."""

    name: str
    first: str
    last: str
    x: str
    residual: str
    run: Any
    bias: Tensor | None


@dataclass
class Region:
    """A module that was traced, its graph as it was, and what was fused in it."""

    name: str
    module: Module
    graph: fx.Graph
    groups: list[Group] = field(default_factory=list)
    refused: dict[fx.Node, str] = field(default_factory=dict)
    """Steps that might have become part of another -> why they did not."""
    reached: frozenset[str] = frozenset()
    """Names of all modules and parameters that the graph uses."""
    calls: Counter[int] = field(default_factory=Counter)
    """id of a module -> how often it is called."""
    handed: dict[str, str] = field(default_factory=dict)
    """Names of modules and parameters -> a function that gets them as arguments."""
    hands_fused: bool = False
    """Whether one of these functions gets a fused layer."""


class Fuser:
    """One call of `cnnops.fuse`. `sample`: on which results will be compared, or None. `hands_fused`: whether
    functions that get a layer may then get the fused one.
    """

    def __init__(self, sample: Any, hands_fused: bool) -> None:
        self.fused: dict[str, tuple[str, ...]] = {}
        self.left: dict[str, str] = {}
        self.regions: list[Region] = []
        self._sample, self._hands_fused = sample, hands_fused
        self._checked = sample is not None
        self._done: dict[int, Module] = {}

    def rebuilt(self, module: Module, name: str = "") -> Module:
        """`module` with its parts fused: itself where there is nothing to fuse, else a new one."""
        if id(module) not in self._done:
            self._done[id(module)] = self._rebuilt(module, name)
        return self._done[id(module)]

    def _rebuilt(self, module: Module, name: str) -> Module:
        if is_sealed(module):
            self.left[name] = f"{type(module).__name__}: fuse what it holds before wrapping it"
            return module
        if is_layer(module):
            return module
        leaves: set[int] = set()
        while True:
            try:
                graph = trace(module, leaves, root=not name, sample=self._sample)
                break
            except Untraceable as error:
                if error.module is module or id(error.module) in leaves:
                    if not isinstance(module, CONTAINERS):
                        self.left[name] = str(error)
                    return self._around(module, name)
                leaves.add(id(error.module))
        return self._from_graph(module, name, graph)

    def _around(self, module: Module, name: str) -> Module:
        """`module`, which cannot be traced, as it is, around what can be fused below."""
        if "forward" in vars(module):  # bound to this very object
            return module
        new = folding._like(module, type(module))
        for key, child in module.named_children():
            of = joined(name, key)
            # A block is called; but a Sequential may be indexed and iterated as well.
            whole = not isinstance(child, nn.Sequential) or only_called(module, key)
            new._modules[key] = self._part(child, of, whole)
        same = all(new._modules[k] is child for k, child in module.named_children())
        return module if same else new

    def _part(self, child: Module, name: str, whole: bool) -> Module:
        """`child`, used by code that is not known, rebuilt. `whole`: whether it is only called."""
        if not (whole or self._checked):
            self.left[name] = "may be used in other ways than as a whole; a sample would tell"
            return child
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            return self._around(child, name)
        return self.rebuilt(child, name)

    # ---- one graph ----------------------------------------------------------------------------------------

    def _from_graph(self, module: Module, name: str, graph: fx.Graph) -> Module:
        region = Region(name, module, copy.deepcopy(graph))
        targets = {str(n.target) for n in graph.nodes if n.op in ("call_module", "get_attr")}
        roots: dict[str, Any] = {t: operator.attrgetter(t)(module) for t in targets}
        region.reached = frozenset(targets)
        region.handed = handed(graph)
        for node in graph.nodes:
            is_added_to = node.op == "get_attr" and node.target not in region.handed
            if node.op == "call_module" or is_added_to:
                region.calls[id(roots[str(node.target)])] += 1
        for node in list(graph.nodes):
            kind = layer_kind(called(node, roots)) if node.users else None
            if kind in CONVOLUTIONS or kind is nn.Linear:
                self._fuse_layer(node, graph, roots, region)
            elif kind in NORMS:
                self._fuse_norm(node, graph, roots, region)
        self._explain(graph, roots, region)
        rebuilt = False
        used = [str(n.target) for n in graph.nodes if n.op in ("call_module", "get_attr")]
        for target in dict.fromkeys(used):
            part, of = roots[target], joined(name, target)
            if not isinstance(part, Module) or is_layer(part):
                continue
            if any(_is_inside(t, target) or _is_inside(target, t) for t in region.reached):
                self.left[of] = "is used as a whole and in parts"
                continue
            whole = not isinstance(part, nn.Sequential) or target not in region.handed
            roots[target] = self._part(part, of, whole)
            rebuilt |= roots[target] is not part
        if region.groups:
            self.regions.append(region)
        elif not rebuilt:
            return module
        graph.lint()
        fused = fx.GraphModule(roots, graph, type(module).__name__)
        for part in fused.modules():
            part.training = False
        if has_hooks(module):
            for hooks in HOOKS:
                vars(fused)[hooks] = copy.copy(vars(module)[hooks])
        return fused

    def _shared(self, target: str, region: Region, roots: dict[str, Any]) -> str:
        """Why the module of this name does not belong to a single step."""
        taker = region.handed.get(target)
        if taker is not None and not self._checked:
            return f"is handed to {taker}, which may use it in other ways; a sample would tell"
        if taker is not None and not self._hands_fused:
            return f"is handed to {taker}, which needs it as it is, as far as the sample tells"
        calls = region.calls[id(roots[target])]
        if calls > 1:
            return f"is called {calls} times"
        if any(_is_inside(t, target) for t in region.reached):
            return "its parameters are read by themselves"
        for whole in sorted(t for t in region.reached if _is_inside(target, t)):
            return f"is a part of {whole}, which is called as a whole"
        region.hands_fused |= taker is not None
        return ""

    def _fuse_layer(
        self, head: fx.Node, graph: fx.Graph, roots: dict[str, Any], region: Region
    ) -> None:
        """Puts what follows a convolution or dense layer into it."""
        layer = roots[str(head.target)]
        linear = layer_kind(layer) is nn.Linear
        inputs = [*head.args, *head.kwargs.values()]
        why = self._shared(str(head.target), region, roots) or folding.layer_refusal(layer)
        why = why or ("" if len(inputs) == 1 else "is called with more than an input")
        user, passed, unclear = skip(head, roots, True)
        if why:
            self._note(user, f"{joined(region.name, str(head.target))} {why}", region, roots)
            return
        if user is None:
            for other in head.users:
                self._note(other, unclear, region, roots)
            return
        norm: Any = None
        found = Tail(head, head)
        call = norm_call(user, roots)
        if call is not None:
            norm = roots[call.target]
            value = passed[-1] if passed else head
            refused = self._shared(call.target, region, roots) or folding.refusal(layer, norm)
            refused = refused or ("" if call.x is value else "has no input by position")
            if refused:
                self._note(user, refused, region, roots)
                return
            activation = activation_in(norm)
            if linear and (activation != "none" or call.residual is not None):
                self._note(user, "adds or activates behind a dense layer", region, roots)
                return
            if activation != "none" or call.residual is not None:
                found = Tail(head, user, activation=activation, in_place=call.in_place)
                if call.residual is not None:
                    found.sum, found.residual = user, call.residual
                    if any(changes(n, roots) for n in between(head, user)):
                        why = f"a tensor may change in place between {head.name} and the sum"
                        self._note(user, why, region, roots)
                        return
            elif linear:
                found = Tail(head, user)
            else:
                found = tail(head, user, roots)
            found.steps = [*passed, user, *found.steps]
        elif linear:
            return
        else:
            found = tail(head, head, roots)
        for other, reason in found.refused.items():
            self._note(other, reason, region, roots)
        if not found.steps:
            return
        last, _ = sole_user(found.end)
        if last is not None and type(called(last, roots)) is Absorbed:
            found.steps.append(last)
            found.end = last
        new: Any
        if linear:
            new = folding.linear_with(layer, norm)
        else:
            new = folding.with_epilogue(layer, norm, found.activation, found.in_place)
        new.fused = self._parts(found, region, roots)
        roots[str(head.target)] = new
        arguments = (inputs[0],) if found.residual is None else (inputs[0], found.residual)
        with graph.inserting_before(found.sum if found.sum is not None else head):
            fused = graph.call_module(str(head.target), arguments)
        self._replace(found, fused, graph, region, new)
        self.fused[joined(region.name, str(head.target))] = new.fused

    def _fuse_norm(
        self, head: fx.Node, graph: fx.Graph, roots: dict[str, Any], region: Region
    ) -> None:
        """Puts what follows a batch norm, which stands alone, into it."""
        norm, target = roots[str(head.target)], str(head.target)
        kind = act_class(norm)
        if kind is None or len(head.args) != 1 or head.kwargs:
            return
        why = self._shared(target, region, roots) or altered(norm)
        found = tail(head, head, roots)
        for other, reason in found.refused.items():
            self._note(other, reason, region, roots)
        if why:
            self._note(head, why, region, roots)
        if why or not found.steps:
            return
        new = folding.norm_with(norm, kind, found.activation)
        roots[target] = new
        x = head.args[0]
        if found.sum is None:
            with graph.inserting_before(head):
                fused = graph.call_module(target, (x,))
        else:
            with graph.inserting_before(found.sum):
                layer = graph.get_attr(target)
                arguments = (layer, x, found.residual, found.in_place)
                fused = graph.call_function(norm_add_act, arguments)
        self._replace(found, fused, graph, region, new)
        name = joined(region.name, target)
        self.fused[name] = self._parts(found, region, roots)

    def _parts(self, found: Tail, region: Region, roots: dict[str, Any]) -> tuple[str, ...]:
        """Names of the steps: modules by their names in the model, functions by theirs."""
        parts = []
        for node in found.steps:
            call = norm_call(node, roots)
            if call is not None:
                parts.append(joined(region.name, call.target))
            if node is found.sum:
                parts.append("residual")
            elif node.op == "call_module" and call is None:
                parts.append(joined(region.name, str(node.target)))
            elif call is None:
                parts.append(activation_of(node, roots))
        return tuple(parts)

    def _replace(
        self, found: Tail, fused: fx.Node, graph: fx.Graph, region: Region, new: Any
    ) -> None:
        head = found.head
        x = [*head.args, *head.kwargs.values()][0]
        fused.meta["stands for"] = found.end.name
        residual = "" if found.residual is None else _original(found.residual)
        run = new
        if fused.op == "call_function":
            in_place = found.in_place

            def run(x: Tensor, residual: Any) -> Tensor:
                return norm_add_act(new, x, residual, in_place)

        name = joined(region.name, str(head.target))
        bias = getattr(new, "bias", None)
        region.groups.append(
            Group(name, head.name, found.end.name, _original(x), residual, run, bias)
        )
        found.end.replace_all_uses_with(fused)
        for node in reversed([head, *found.steps]):
            layers = [n for n in node.all_input_nodes if n.op == "get_attr"]
            graph.erase_node(node)
            for layer in layers:
                if not layer.users:
                    graph.erase_node(layer)

    # ---- what is left -------------------------------------------------------------------------------------

    def _note(
        self, node: fx.Node | None, reason: str, region: Region, roots: dict[str, Any]
    ) -> None:
        """Keeps why `node`, if it might have become a part of what it follows, did not."""
        if node is not None and (
            norm_call(node, roots) is not None
            or activation_of(node, roots)
            or any(summand(node, value) is not None for value in node.all_input_nodes)
        ):
            region.refused.setdefault(node, reason)

    def _explain(self, graph: fx.Graph, roots: dict[str, Any], region: Region) -> None:
        for node in graph.nodes:
            module = called(node, roots)
            if activation_of(node, roots) or (
                layer_kind(module) in NORMS
                and joined(region.name, str(node.target)) not in self.fused
            ):
                of = node.all_input_nodes[0] if node.all_input_nodes else node
                before = called(of, roots)
                what = of.name if before is None else type(before).__name__
                self._note(node, f"follows {what}", region, roots)
        # A step that was refused to one may have become a part of another since.
        for node in graph.nodes:
            if node in region.refused:
                self.left[_label(node, region)] = region.refused[node]


def _is_inside(part: str, whole: str) -> bool:
    """Whether the name `part` is that of something in what `whole` names."""
    return part.startswith(f"{whole}.")


def _label(node: fx.Node, region: Region) -> str:
    return joined(region.name, str(node.target) if node.op == "call_module" else node.name)


def _original(node: Any) -> str:
    """The step of the graph before fusing whose result `node` has."""
    return str(node.meta.get("stands for", node.name))


def only_called(module: Module, name: str) -> bool:
    """Whether the source of `module`'s class says that ``self.<name>`` is called and nothing else."""
    seen = False
    for kind in type(module).__mro__:
        if kind.__module__.startswith("torch.nn.") or kind is object:
            break
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(kind)))
        except (OSError, TypeError, SyntaxError):
            return False
        functions = {id(n.func) for n in ast.walk(tree) if isinstance(n, ast.Call)}
        for n in ast.walk(tree):
            if not isinstance(n, ast.Attribute) or not isinstance(n.value, ast.Name):
                continue
            if n.value.id == "self" and n.attr in ("children", "modules", "_modules", "__dict__"):
                return False
            if n.value.id == "self" and n.attr.startswith("named_"):
                return False
            if n.value.id == "self" and n.attr == name and isinstance(n.ctx, ast.Load):
                if id(n) not in functions:
                    return False
                seen = True
    return seen

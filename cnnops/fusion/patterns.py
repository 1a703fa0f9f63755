"""What steps of a graph mean: which activation, which sum, which batch norm, and what may follow what."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn import Module

import cnnops.nn
from cnnops.fusion.kinds import layer_kind
from cnnops.fusion.steps import Absorbed, norm_add_act
from cnnops.fusion.tracing import altered, is_layer, is_users

_ACTIVATION_MODULES: dict[type[Module], str] = {
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.SiLU: "silu",
    nn.GELU: "gelu",
    nn.Hardswish: "hardswish",
    nn.LeakyReLU: "leaky_relu",
    nn.Sigmoid: "sigmoid",
    nn.Tanh: "tanh",
}
_ACTIVATION_FUNCTIONS: dict[Any, str] = {
    F.relu: "relu",
    torch.relu: "relu",
    torch.relu_: "relu",
    F.relu6: "relu6",
    F.silu: "silu",
    F.gelu: "gelu",
    F.hardswish: "hardswish",
    F.leaky_relu: "leaky_relu",
    F.leaky_relu_: "leaky_relu",
    F.sigmoid: "sigmoid",
    torch.sigmoid: "sigmoid",
    torch.sigmoid_: "sigmoid",
    F.tanh: "tanh",
    torch.tanh: "tanh",
    torch.tanh_: "tanh",
}
_ACTIVATION_METHODS = {"relu": "relu", "sigmoid": "sigmoid", "tanh": "tanh"}

NORMS: dict[type[Module], int | None] = {
    **{getattr(of, f"BatchNorm{d}d"): d for of in (nn, cnnops.nn) for d in (1, 2, 3)},
    **{getattr(cnnops.nn, f"BatchNormAct{d}d"): d for d in (1, 2, 3)},
    **{kind: None for kind in (nn.SyncBatchNorm, cnnops.nn.SyncBatchNorm)},
}
"""Batch norms -> their number of spatial axes, None for any."""


def called(node: fx.Node, modules: Mapping[str, Module]) -> Module | None:
    """The module that `node` calls."""
    return modules[str(node.target)] if node.op == "call_module" else None


class NormCall(NamedTuple):
    """A step that is a batch norm, and maybe a sum and an activation. `target`: the norm's name."""

    target: str
    x: Any
    residual: Any = None
    in_place: bool = False


def norm_call(node: fx.Node, modules: Mapping[str, Module]) -> NormCall | None:
    """What batch norm `node` calls, with what; None for any other step."""
    if layer_kind(called(node, modules)) in NORMS:
        x, residual, *_ = [*(node.args or (None,)), *node.kwargs.values(), None]
        return NormCall(str(node.target), x, residual)
    if node.op == "call_function" and node.target is norm_add_act:
        layer, x, residual, in_place = node.args
        assert isinstance(layer, fx.Node)
        if layer_kind(modules[str(layer.target)]) in NORMS:
            return NormCall(str(layer.target), x, residual, bool(in_place))
    return None


def handed(graph: fx.Graph) -> dict[str, str]:
    """Names of modules and tensors that are arguments of a function -> its name."""
    return {
        str(node.target): getattr(user.target, "__name__", user.name)
        for node in graph.nodes
        for user in node.users
        if node.op == "get_attr" and user.target is not norm_add_act
    }


def activation_in(norm: Any) -> str:
    """The activation of a batch norm that has one as a part of it, else "none"."""
    return norm.activation if layer_kind(norm).__name__.startswith("BatchNormAct") else "none"


def activation_of(node: fx.Node, modules: Mapping[str, Module]) -> str:
    """The activation of the epilogues that `node` applies to its first argument; "" for anything else."""
    module = called(node, modules)
    if module is not None:
        name = _ACTIVATION_MODULES.get(layer_kind(module), "")
        options = {
            k: getattr(module, k) for k in ("negative_slope", "approximate") if hasattr(module, k)
        }
        return name if len(node.all_input_nodes) == 1 and _as_ours(name, options) else ""
    if node.op == "call_function":
        name = _ACTIVATION_FUNCTIONS.get(node.target, "")
    elif node.op == "call_method":
        name = _ACTIVATION_METHODS.get(str(node.target).removesuffix("_"), "")
    else:
        return ""
    order = ("negative_slope", "inplace") if name == "leaky_relu" else ("inplace",)
    if not name or not node.args or len(node.args) > 1 + len(order):
        return ""
    options = dict(zip(order, node.args[1:], strict=False)) | dict(node.kwargs)
    return name if _as_ours(name, options) else ""


def _as_ours(name: str, options: Mapping[str, Any]) -> bool:
    """Whether an activation called with these options is the one of this name that epilogues have."""
    expected = {("gelu", "approximate"): "none", ("leaky_relu", "negative_slope"): 0.01}
    return all(
        isinstance(value, bool) if option == "inplace" else expected.get((name, option)) == value
        for option, value in options.items()
    )


def summand(node: fx.Node, value: fx.Node) -> tuple[fx.Node, bool] | None:
    """What `node` adds to `value`, and whether it does so in `value`'s place; None for anything but a sum of
    two steps' results, which leaves the other as it is.
    """
    functions = (operator.add, operator.iadd, torch.add)
    methods = ("add", "add_", "__add__", "__iadd__")
    if not (
        (node.op == "call_function" and node.target in functions)
        or (node.op == "call_method" and node.target in methods)
    ):
        return None
    if len(node.args) != 2 or node.kwargs:
        return None
    first, second = node.args
    in_place = node.target in (operator.iadd, "add_", "__iadd__")
    if first is second or not isinstance(first, fx.Node) or not isinstance(second, fx.Node):
        return None
    if first is value:
        return second, in_place
    return None if in_place else (first, False)


def is_identity(node: fx.Node, modules: Mapping[str, Module]) -> bool:
    """Whether `node` hands on its only argument: an identity, or dropout in evaluation."""
    kinds = (nn.Identity, Absorbed, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
    module = called(node, modules)
    if module is None or len(node.args) != 1:
        return False
    return layer_kind(module) in kinds and not altered(module)


def _module_changes(module: Module) -> bool:
    if altered(module):
        return True
    kind = layer_kind(module)
    if isinstance(module, nn.Sequential) and kind is nn.Sequential:
        return any(_module_changes(child) for child in module)
    known = kind.__module__.startswith(("torch.nn.", "cnnops.nn."))
    return not (known and is_layer(module)) or bool(getattr(module, "inplace", False))


def changes(node: fx.Node, modules: Mapping[str, Module]) -> bool:
    """Whether `node` may write to a tensor that it did not make."""
    module = called(node, modules)
    if module is not None:
        return _module_changes(module)
    if node.op not in ("call_function", "call_method"):
        return False
    if is_users(node.target):
        return True
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "_")
    dunder = name.startswith("__") and name.endswith("__")
    name = name.strip("_") if dunder else name
    return (
        name.endswith("_")
        or name in ("setitem", "delitem", "setattr")
        or (
            name.startswith("i")
            and hasattr(operator, f"__{name}__")
            and hasattr(operator, name[1:])
        )
        or bool(node.kwargs.get("inplace"))
        or "out" in node.kwargs
        or (node.target in _ACTIVATION_FUNCTIONS and any(a is True for a in node.args))
    )


def between(first: fx.Node, last: fx.Node) -> Iterator[fx.Node]:
    """The steps after `first` and before `last`."""
    node = first.next
    while node is not last and node.op != "root":
        yield node
        node = node.next


def sole_user(node: fx.Node) -> tuple[fx.Node | None, str]:
    """The step that alone takes the result of `node`; None, and why, where there is none such."""
    users = list(node.users)
    if len(users) == 1:
        return users[0], ""
    return None, f"the result of {node.name} is used {len(users)} times"


@dataclass
class Tail:
    """What follows a convolution or batch norm: a sum, an activation, both or neither."""

    head: fx.Node
    end: fx.Node
    sum: fx.Node | None = None
    residual: fx.Node | None = None
    in_place: bool = False
    activation: str = "none"
    steps: list[fx.Node] = field(default_factory=list)
    """All that becomes part of the head, in order."""
    refused: dict[fx.Node, str] = field(default_factory=dict)
    """Steps that look like a part of it -> why they are not."""


def skip(
    node: fx.Node, modules: Mapping[str, Module], through: bool
) -> tuple[fx.Node | None, list[fx.Node], str]:
    """The sole user of `node`, the identities before it (if `through`), or why there is none."""
    passed: list[fx.Node] = []
    while True:
        user, why = sole_user(node)
        if user is None or not through or not is_identity(user, modules):
            return user, passed, why
        passed.append(user)
        node = user


def tail(head: fx.Node, end: fx.Node, modules: Mapping[str, Module], through: bool = True) -> Tail:
    """What follows `end`, the last step known to be part of `head`."""
    found = Tail(head, end)
    for wanted in ("sum", "activation"):
        user, passed, why = skip(found.end, modules, through)
        if user is None:
            for other in found.end.users:
                if activation_of(other, modules) or summand(other, found.end) is not None:
                    found.refused[other] = why
            return found
        value = passed[-1] if passed else found.end
        if wanted == "sum":
            addend = summand(user, value)
            if addend is None:
                continue
            own = {head, *found.steps, *passed}
            if any(n not in own and changes(n, modules) for n in between(head, user)):
                found.refused[user] = (
                    f"a tensor may change in place between {head.name} and the sum"
                )
                return found
            found.sum, (found.residual, found.in_place) = user, addend
        else:
            activation = activation_of(user, modules)
            module = called(user, modules)
            if not activation:
                return found
            if module is not None and altered(module):
                found.refused[user] = altered(module)
                return found
            found.activation = activation
        found.steps += [*passed, user]
        found.end = user
    return found


def act_class(norm: Module) -> type[Module] | None:
    """The layer that is `norm`, if that is a batch norm without an activation, and an activation."""
    kind = layer_kind(norm)
    if hasattr(norm, "activation"):  # its own: what it has, or something of the user's
        return None
    if kind in (nn.SyncBatchNorm, cnnops.nn.SyncBatchNorm):
        return cnnops.nn.SyncBatchNormAct
    dims = NORMS.get(kind)
    if dims is None:
        return None
    found: type[Module] = getattr(cnnops.nn, f"BatchNormAct{dims}d")
    return found

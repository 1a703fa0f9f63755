"""Whether a fused model computes what the model did, on a sample.

Every fused step is compared with the steps that it stands for, from the same inputs: so errors of other
layers do not hide its own, and the step that is off has a name. Then the results of both models are compared.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import Module
from torch.utils._pytree import tree_leaves

from cnnops.fusion.inference import Group, Region
from cnnops.fusion.tracing import arguments_of

LIMIT = {torch.float64: 128, torch.float32: 128, torch.float16: 8, torch.bfloat16: 8}
"""Largest error of one step in units of its dtype's epsilon, times the norm of the terms that were added.

Wide types sum in themselves: of up to 2^14 products rounding leaves about the root of their number. Half
types sum in float32; there the few roundings of results, weights and bias are what differs.
"""


def call(model: Module, sample: Any) -> Any:
    """``model(sample)``, with a tuple as its arguments or a dict as its keyword arguments."""
    args, kwargs = arguments_of(sample)
    return model(*args, **kwargs)


def check(model: Module, fused: Module, regions: Sequence[Region], sample: Any) -> None:
    """Raises RuntimeError unless both compute the same of `sample`."""
    inputs: dict[int, tuple[Any, Any]] = {}

    def record(region: Region) -> Any:
        def hook(_: Module, args: Any, kwargs: Any) -> None:
            inputs.setdefault(id(region), (_cloned(args), _cloned(kwargs)))

        return hook

    hooks = [r.module.register_forward_pre_hook(record(r), with_kwargs=True) for r in regions]
    devices = sorted({t.device.index for t in tree_leaves(sample) if _on_gpu(t)})
    try:
        with torch.no_grad(), torch.random.fork_rng(devices):
            expected = call(model, _cloned(sample))
    finally:
        for handle in hooks:
            handle.remove()
    for region in regions:
        if id(region) in inputs:
            args, kwargs = inputs[id(region)]
            places = [n for n in region.graph.nodes if n.op == "placeholder"][len(args) :]
            given = [
                *args,
                *(kwargs[n.target] if n.target in kwargs else n.args[0] for n in places),
            ]
            steps = _Steps(region)
            with torch.no_grad(), torch.random.fork_rng(devices):
                steps.run(*given)
            if steps.wrong is not None:
                raise steps.wrong
        elif region.hands_fused:
            raise RuntimeError(f"{region.name!r}: expected a sample that reaches it")
    with torch.no_grad(), torch.random.fork_rng(devices):
        found = call(fused, _cloned(sample))
    _compare_results(found, expected, sum(len(region.groups) for region in regions))


def _on_gpu(t: Any) -> bool:
    return isinstance(t, Tensor) and t.is_cuda


def _cloned(values: Any) -> Any:
    """Tensors that forward may write to."""
    return torch.utils._pytree.tree_map_only(Tensor, torch.Tensor.clone, values)


class _Steps(fx.Interpreter):
    """Runs a region step by step as it was, and every fused step beside it."""

    def __init__(self, region: Region) -> None:
        super().__init__(region.module, garbage_collect_values=False, graph=region.graph)
        self._first, self._last = defaultdict(list), defaultdict(list)
        for group in region.groups:
            self._first[group.first].append(group)
            self._last[group.last].append(group)
        self._values: dict[str, Any] = {}
        self._found: dict[str, Any] = {}
        self.wrong: RuntimeError | None = None
        """The first disagreement; raised inside, it would come with the interpreter's own remarks."""

    def run_node(self, n: fx.Node) -> Any:
        # Without a residual the fused step runs in the place of the first, with one in that of the sum.
        for group in self._first[n.name]:
            if not group.residual:
                self._found[group.name] = group.run(self._values[group.x])
        value = self._values[n.name] = super().run_node(n)
        for group in self._last[n.name]:
            try:
                _compare(group, self._fused(group), value, self._values.get(group.residual))
            except RuntimeError as error:
                self.wrong = self.wrong or error
        return value

    def _fused(self, group: Group) -> Any:
        if group.residual:
            return group.run(self._values[group.x], self._values[group.residual])
        return self._found.pop(group.name)


def _norm(t: Tensor) -> float:
    return float(t.detach().double().norm())


def _compare(group: Group, found: Any, expected: Any, residual: Any) -> None:
    where = f"fused step {group.name!r}"
    _compare_kinds(found, expected, where)
    # A bias or residual may be larger than the sum that it makes, and rounds it at its own size.
    scale = _norm(expected)
    if group.bias is not None:
        scale += _norm(group.bias) * math.sqrt(expected.numel() / max(group.bias.numel(), 1))
    scale += _norm(residual) if isinstance(residual, Tensor) else 0.0
    _compare_values(found, expected, scale, 1.0, where)


def _compare_results(found: Any, expected: Any, steps: int) -> None:
    """Errors of steps are independent: together they grow as the root of their number."""
    ours, theirs = tree_leaves(found), tree_leaves(expected)
    if len(ours) != len(theirs):
        raise RuntimeError(f"results: expected {len(theirs)} values, got {len(ours)}")
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        if isinstance(b, Tensor):
            where = f"result {i}" if len(theirs) > 1 else "the result"
            _compare_kinds(a, b, where)
            if b.dtype in LIMIT:
                _compare_values(a, b, _norm(b), math.sqrt(max(steps, 1)), where)


def _compare_kinds(found: Any, expected: Any, where: str) -> None:
    for attribute in ("shape", "dtype", "device"):
        a, b = getattr(found, attribute, None), getattr(expected, attribute, None)
        if a != b:
            raise RuntimeError(f"{where}: expected the {attribute} {b}, got {a}")


def _compare_values(
    found: Tensor, expected: Tensor, scale: float, times: float, where: str
) -> None:
    wild = ~expected.isfinite()
    a, b = (t.double() for t in (found, expected))
    if not torch.equal(a[wild].nan_to_num(), b[wild].nan_to_num()):
        raise RuntimeError(f"{where}: expected NaN and infinities in other places")
    error = float((a - b).masked_fill(wild, 0).norm())
    limit = LIMIT[expected.dtype] * torch.finfo(expected.dtype).eps * times
    if not error <= limit * scale:
        raise RuntimeError(
            f"{where}: expected the model's values within {limit:.1e} of their norm, got a difference of "
            f"{error / scale if scale else error:.1e}"
        )

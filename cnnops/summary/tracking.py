"""Which tensors of a forward pass come from its input, and what each of them sees of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from cnnops.summary.field import (
    NORM,
    RULES,
    Call,
    Field,
    Unknown,
    bound,
    is_valuewise,
    joined,
    name_of,
)


class Fields:
    """The fields of all tensors that depend on the input; others, such as parameters, have none."""

    def __init__(self) -> None:
        # Tensors are kept, so that no other gets the same id: on the meta device that costs nothing.
        self._known: dict[int, tuple[Tensor, Field | None]] = {}
        self._written: set[int] = set()

    def __setitem__(self, t: Tensor, field: Field | None) -> None:
        self._known[id(t)] = t, field

    def depends(self, t: Tensor) -> bool:
        """Whether the tensor was computed from the input."""
        return id(t) in self._known or storage_of(t) in self._written

    def __getitem__(self, t: Tensor) -> Field | None:
        """The tensor's field; None where it is not known."""
        return self._known[id(t)][1] if id(t) in self._known else None

    def follow(self, function: Any, args: Sequence[Any], kwargs: Any, out: Any) -> bool:
        """Notes what the results of an operation see; whether it has to do with the input at all."""
        inputs = [t for t in tensors((args, kwargs)) if self.depends(t)]
        if not inputs:
            return False
        name = name_of(function)
        if name.startswith("new_") or name.endswith("_like"):
            return False  # as large as a tensor of the input's making, but no more
        rule = RULES.get(name) or (joined if is_valuewise(function) else None)
        arguments = bound(function, args, kwargs)
        fields = [(t, field) for t in inputs if (field := self[t]) is not None]
        results = tensors(out)
        for number, t in enumerate(results):
            try:
                if rule is None or len(fields) < len(inputs) and name != "copy":
                    raise Unknown
                if t.shape != results[0].shape and name in NORM:
                    raise Unknown  # statistics
                found = rule(Call(name, arguments, fields, t))
            except Unknown:
                found = None
            if number == 0 and function._schema.is_mutable and found != self[t]:
                self._overwritten(t)
            self[t] = found
        return True

    def _overwritten(self, t: Tensor) -> None:
        """Other tensors that share its memory are no longer what they were."""
        storage = storage_of(t)
        self._written.add(storage)
        for other, _ in list(self._known.values()):
            if other is not t and storage_of(other) == storage:
                self[other] = None


def tensors(tree: Any) -> list[Tensor]:
    """All tensors in nested lists, tuples and dicts."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def storage_of(t: Tensor) -> int:
    """What tells whether two tensors share memory, as long as both live."""
    address: int = t.untyped_storage()._cdata
    return address

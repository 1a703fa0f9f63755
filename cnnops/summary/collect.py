"""One step of a model without memory, watched: a row for every call of a layer.

Hooks tell which module is at work, a dispatch mode which operations it asks for. A module whose formula
`cnnops.summary.costs` knows is a layer whatever is inside of it; any other is one if it calls no further
module. One that does gets a row for parameters of its own, which no layer has.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter, is_lazy
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from cnnops.config import engine
from cnnops.ops import DTYPES
from cnnops.shapes import floor_seconds
from cnnops.summary import Row, Summary, costs
from cnnops.summary.costs import Cost
from cnnops.summary.field import name_of, of_input, size_of
from cnnops.summary.gpus import GPUS, Gpu
from cnnops.summary.tracking import Fields, storage_of, tensors
from cnnops.tuned import dtype_name

THE_MODEL = "(model)"


def summary(
    model: Module, input_size: Sequence[int] | None, batch: int, dtype: torch.dtype, gpu: str
) -> Summary:
    """See `cnnops.summary`."""
    if not isinstance(model, Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(map(str, DTYPES))}, got {dtype!r}")
    if gpu not in GPUS:
        raise ValueError(f"gpu: expected one of {', '.join(GPUS)}, got {gpu!r}")
    if not _is_size(batch):
        raise ValueError(f"batch: expected an int of at least 1, got {batch!r}")
    model = getattr(model, "_orig_mod", model)  # what torch.compile wrapped
    size = _default_size(model) if input_size is None else input_size
    if not isinstance(size, (tuple, list)) or not size or not all(map(_is_size, size)):
        raise ValueError(f"input_size: expected positive ints C, *spatial, got {size!r}")
    # In inference mode operations would be seen before they are taken apart.
    with torch.inference_mode(False), torch.no_grad():
        try:
            x = torch.empty((batch, *size), dtype=dtype, device="meta")
        except RuntimeError as error:
            raise ValueError(
                f"input_size: expected a size that tensors can have, got {list(size)}"
            ) from error
        bare = _without_memory(model).to(dtype).eval()
        watch = _Watch(bare, x, GPUS[gpu])
        watch.run()
    return Summary(
        type(model).__name__,
        tuple(x.shape),
        dtype_name(dtype),
        GPUS[gpu],
        tuple(watch.rows),
        sum(p.numel() for p in bare.parameters() if not is_lazy(p)),
        dict(sorted(watch.uncounted.items())),
    )


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _default_size(model: Module) -> tuple[int, ...]:
    """As many channels as the first filters take, and the plane that the model asks for."""
    plane = getattr(model, "input_size", None)
    filters = next((p for p in model.parameters() if not is_lazy(p) and p.dim() > 2), None)
    if not isinstance(plane, (tuple, list)) or filters is None:
        raise ValueError("input_size: expected C, *spatial for a model that does not say its own")
    return filters.shape[1], *plane


# ---- a model without memory -------------------------------------------------------------------------------


class _TensorsWithoutMemory(TorchFunctionMode):
    """Copies of tensors that a model has beside its parameters and buffers are on the meta device, too."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is Tensor.__deepcopy__:
            t, memo = args
            memo[id(t)] = _twin(t)
            return memo[id(t)]
        return function(*args, **(kwargs or {}))


def _twin(t: Tensor) -> Tensor:
    """A tensor like `t` on the meta device."""
    if isinstance(t, (UninitializedParameter, UninitializedBuffer)):
        lazy: Any = type(t)
        unknown: Tensor = lazy(device="meta", dtype=t.data.dtype)
        return unknown
    bare = torch.empty_like(t, device="meta")
    return Parameter(bare, requires_grad=False) if isinstance(t, Parameter) else bare


def _without_memory(model: Module) -> Module:
    """A deep copy of `model` whose tensors are on the meta device: no weight is copied on the way."""
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise TypeError(
                f"model: expected none that is scripted, got {name or 'one'}: ask before scripting it"
            )
    memo: dict[int, Any] = {id(t): _twin(t) for t in chain(model.parameters(), model.buffers())}
    try:
        with _TensorsWithoutMemory():
            return copy.deepcopy(model, memo).to("meta")
    except (TypeError, RuntimeError, NotImplementedError) as error:
        raise TypeError(
            f"model: expected one that copy.deepcopy takes, got {_first_line(error)}"
        ) from error


# ---- watching ---------------------------------------------------------------------------------------------


@dataclass
class _Frame:
    """A call of a module that has not returned yet."""

    name: str
    module: Module
    inputs: tuple[Any, ...]
    inside: bool
    """Within a layer, where modules get no rows of their own."""
    known: bool
    called: bool = False
    """Whether it has called another module."""
    steps: list[tuple[Any, Cost | None]] = field(default_factory=list)
    """The operations that it asked for on what comes from the input, and what each costs."""


class _Watch(TorchDispatchMode):
    """Collects `rows` while the model computes."""

    def __init__(self, model: Module, x: Tensor, gpu: Gpu) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.rows: list[Row] = []
        self.uncounted: Counter[str] = Counter()
        self._model, self._x, self._gpu = model, x, gpu
        self._fields = Fields()
        self._fields[x] = of_input(x)
        self._frames: list[_Frame] = []
        self._calls: Counter[Module] = Counter()
        self._counted: set[int] = set()
        # By storage. The tensors are kept, so that no other storage gets the same address.
        self._stored: dict[int, Tensor] = {storage_of(x): x}

    def run(self) -> None:
        """The step. Raises what the forward raises, in one line that names the layer."""
        for name, module in self._model.named_modules():
            enter = partial(self._enter, name or THE_MODEL)
            module.register_forward_pre_hook(enter, with_kwargs=True)
            module.register_forward_hook(self._leave, with_kwargs=True)
        try:
            with engine(None), self:
                self._model(self._x)
        except Exception as error:
            raise self._explained(error) from error

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        if self._fields.follow(function, args, kwargs or {}, out) and self._frames:
            cost = costs.step(function, args, kwargs or {}, out)
            self._frames[-1].steps.append((function, cost))
        return out

    def _enter(self, name: str, module: Module, args: Any, kwargs: Any) -> None:
        inside = bool(self._frames) and (self._frames[-1].inside or self._frames[-1].known)
        if self._frames:
            self._frames[-1].called = True
        known = costs.kind_of(module) is not None
        inputs = (*args, *kwargs.values())
        self._frames.append(_Frame(name, module, inputs, inside, known))

    def _leave(self, module: Module, args: Any, kwargs: Any, output: Any) -> None:
        while self._frames[-1].module is not module:
            self._frames.pop()  # of a call that failed, which somebody caught
        frame = self._frames[-1]
        if frame.inside:
            self._frames[-2].steps += frame.steps
        elif frame.known:
            # Still within the frame: to read a parametrized weight is to call modules.
            cost = costs.cost(module, frame.inputs, tensors(output)[0])
            self._layer(frame, output, cost.kind, [cost], cost.bytes_moved)
        elif not frame.called:
            self._other_layer(frame, output)
        else:
            self._container(frame, output)
        self._frames.pop()

    def _other_layer(self, frame: _Frame, output: Any) -> None:
        """A layer without a formula is what its operations are, if all of those are known."""
        results = tensors(output)
        found = [cost for _, cost in frame.steps if cost is not None]
        if len(found) < len(frame.steps) or not any(map(self._fields.depends, results)):
            self._row(frame, output, "other")
            return
        kind = max(found, key=_weight).kind if found else "other"
        works = any(not function.is_view for function, _ in frame.steps)
        read = [*tensors(frame.inputs), *frame.module.parameters()]
        moved = sum(t.nbytes for t in (*read, *results)) if works else 0
        self._layer(frame, output, kind, found, moved)

    def _layer(
        self, frame: _Frame, output: Any, kind: str, parts: Sequence[Cost], moved: int
    ) -> None:
        """A row for a layer that does all `parts`."""
        kernel, precision = None, dtype_name(self._x.dtype)
        for part in parts:
            if part.kind == kind:
                kernel, precision = part.kernel(self._x.dtype)
        flops = sum(part.flops for part in parts)
        ceiling = self._gpu.flops_per_s[precision]
        seconds = floor_seconds(flops, moved, ceiling, self._gpu.bytes_per_s)
        operations = sum(part.operations for part in parts)
        self._row(
            frame, output, kind, operations, moved, seconds, kernel if moved else None,
            precision if flops else None,
        )  # fmt: skip

    def _container(self, frame: _Frame, output: Any) -> None:
        for function, cost in frame.steps:
            if cost is None or cost.kind not in ("activation", "other"):
                self.uncounted[name_of(function)] += 1
        if any(id(p) not in self._counted for p in frame.module.parameters(recurse=False)):
            self._row(frame, output, "other", recurse=False)

    def _row(
        self,
        frame: _Frame,
        output: Any,
        kind: str,
        operations: int | None = None,
        bytes_moved: int | None = None,
        seconds: float | None = None,
        kernel: str | None = None,
        precision: str | None = None,
        recurse: bool = True,
    ) -> None:
        self._calls[frame.module] += 1
        results = tensors(output)
        self.rows.append(
            Row(
                frame.name,
                self._calls[frame.module],
                type(frame.module).__name__,
                kind,
                tuple(tuple(t.shape) for t in results),
                self._new_bytes(results),
                self._new_parameters(frame.module, recurse),
                operations,
                self._field(results),
                bytes_moved,
                seconds,
                kernel,
                precision,
            )
        )

    def _new_bytes(self, results: Sequence[Tensor]) -> int:
        """Bytes of those whose memory has not been counted."""
        found = 0
        for t in results:
            if storage_of(t) not in self._stored:
                self._stored[storage_of(t)] = t
                found += t.nbytes
        return found

    def _new_parameters(self, module: Module, recurse: bool) -> int:
        found = 0
        for p in module.parameters(recurse):
            if id(p) not in self._counted:
                found += p.numel()
                self._counted.add(id(p))
        return found

    def _field(self, results: Sequence[Tensor]) -> int | tuple[int, ...] | None:
        """The largest of all tensors; one number where all axes agree."""
        sizes = [size_of(self._fields[t]) for t in results if self._fields.depends(t)]
        known = [size for size in sizes if size is not None]
        if not sizes or len(known) < len(sizes):
            return None
        largest = tuple(map(max, *known)) if len(known) > 1 else known[0]
        return largest[0] if len(set(largest)) == 1 else largest

    def _explained(self, error: Exception) -> Exception:
        """`error` in one line with the layer's name, in the words of `cnnops.shapes` where those say it."""
        frame = self._frames[-1] if self._frames else None
        if frame is None:
            where = f"{THE_MODEL} ({type(self._model).__name__})"
        else:
            where = f"layer {frame.name} ({type(frame.module).__name__})"
            try:
                costs.check(frame.module, frame.inputs)
            except (ValueError, RuntimeError, TypeError) as clearer:
                error = clearer
        kinds = (kind for kind in (ValueError, TypeError) if isinstance(error, kind))
        return next(kinds, RuntimeError)(f"{where}: {_first_line(error)}")


def _weight(cost: Cost) -> tuple[bool, int]:
    """What decides on a layer's kind: whatever is done value by value comes last."""
    return cost.kind not in ("activation", "other"), cost.operations


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__

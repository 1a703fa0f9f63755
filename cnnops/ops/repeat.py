"""Operations of the cpu engine that are called again with tensors of the same sizes, strides and types.

What such an operation does follows from those, from its other arguments, from the settings and from the
number of threads: what it checks, which results it makes, which kernels run and with what. All that differs
from call to call are addresses. So the second such call is watched, and later ones repeat it with their own:
most of a small call's time went into finding out the same again. What comes once is not worth watching.

A call is repeated only where new tensors and launches are all that it was. One in which PyTorch did more, as
a copy in another type, is not; nor one that was given a tensor twice, whose addresses would be one.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode

from cnnops import huge_pages, registry, tuned
from cnnops.config import settings

if TYPE_CHECKING:
    from cnnops.cpu.task import Launch, Run

MOST = 1024
"""So many calls of one operation are kept; then all are forgotten."""

_LEAST_ADDRESS = 2**32
"""No size, stride or count of elements is as large; what is may be an address that nobody said is one."""

_CPU = torch.device("cpu")
_NEW = (torch.ops.aten.new_empty_strided.default, torch.ops.aten.empty_strided.default)

_kept: list[dict[Hashable, Any]] = []


def forget() -> None:
    """Forget all calls, as what they did may not be what they would do now."""
    for calls in _kept:
        calls.clear()


tuned.when_changed(forget)


class _Witness(TorchDispatchMode):
    """Sees what PyTorch does: which tensors it makes, and whether it does anything else."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.made: list[Tensor] = []
        self.others = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **kwargs or {})
        if function in _NEW:
            self.made.append(result)
        else:
            self.others += 1
        return result


class Repeat:
    """A call's results and launches, with other addresses."""

    def __init__(
        self, made: Sequence[Tensor], shared: Sequence[int], inner: Sequence[tuple[int, int]],
        launches: Sequence[Launch], results: Callable[[list[Tensor]], Any],
    ) -> None:  # fmt: skip
        """Addresses are numbered: of the tensors, of those `made`, of memory `shared` of so many bytes, and
        of `inner` places, so many bytes behind another address."""
        from cnnops.cpu.task import Shared

        self._memory = Shared
        self._made = [(t.shape, t.stride(), t.dtype, t.numel() >= huge_pages.LEAST) for t in made]
        self._shared, self._inner = shared, inner
        self._launches, self._results = launches, results

    def __call__(self, tensors: list[Tensor]) -> Any:
        """The results for these tensors."""
        made = []
        for size, strides, dtype, is_large in self._made:
            t = torch.empty_strided(size, strides, dtype=dtype, device=_CPU)
            made.append(huge_pages.use_for(t) if is_large else t)
        addresses = [t.data_ptr() for t in (*tensors, *made)]
        if self._shared:
            shared = [self._memory(size) for size in self._shared]
            addresses += [memory.address for memory in shared]
        for index, offset in self._inner:
            addresses.append(addresses[index] + offset)
        for launch in self._launches:
            launch.run(addresses)
        return self._results(made)


def _found(
    runs: Sequence[Run], tensors: Sequence[Tensor], made: Sequence[Tensor], results: Any
) -> Repeat | None:
    """What does the same as these runs did with these tensors; None where that cannot be told."""
    from cnnops.cpu.task import At, Launch, Shared

    number = {id(t): index for index, t in enumerate((*tensors, *made))}
    storages = {t.untyped_storage().data_ptr() for t in (*tensors, *made)}
    shared: list[int] = []
    uses: list[dict[int, tuple[int, int]]] = []
    for run in runs:
        uses.append({})
        for index, value in enumerate(run.values):
            memory, offset = value if isinstance(value, At) else (value, 0)
            if isinstance(memory, Shared) and id(memory) not in number:
                number[id(memory)] = len(number)
                shared.append(memory.size)
            if id(memory) in number:
                uses[-1][index] = number[id(memory)], offset
            elif isinstance(memory, int) and abs(memory) >= _LEAST_ADDRESS:
                return None
            elif isinstance(memory, Tensor) and memory.untyped_storage().data_ptr() in storages:
                return None  # a view, not a constant
    inner = sorted({use for of_run in uses for use in of_run.values() if use[1]})
    places = {(index, 0): index for index in range(len(number))}
    places |= {use: len(number) + index for index, use in enumerate(inner)}
    launches = [
        Launch(run, {index: places[use] for index, use in of_run.items()}, len(places))
        for run, of_run in zip(runs, uses, strict=True)
    ]
    order = {id(t): index for index, t in enumerate(made)}
    alone = isinstance(results, Tensor)
    if any(id(t) not in order for t in ([results] if alone else results)):
        return None
    if alone:
        form: Callable[[list[Tensor]], Any] = itemgetter(order[id(results)])
    else:
        kind, picks = type(results), [order[id(t)] for t in results]

        def form(made: list[Tensor]) -> Any:
            return kind([made[index] for index in picks])

    return Repeat(made, shared, inner, launches, form)


def _watched(call: Callable[[], Any], tensors: Sequence[Tensor]) -> tuple[Any, Repeat | None]:
    """The call's results, and what repeats it."""
    from cnnops.cpu.task import watched

    witness = _Witness()
    with watched() as runs, witness:
        torch.empty_strided((0,), (1,))
        sees = bool(witness.made)  # nothing within what PyTorch's dispatcher has called
        witness.made, witness.others = [], 0
        results = call()
    plain = sees and not witness.others and len({id(t) for t in tensors}) == len(tensors)
    return results, _found(runs, tensors, witness.made, results) if plain else None


def repeated(body: Callable[..., Any]) -> Callable[[tuple[Any, ...]], Any]:
    """`body`, a function of plain tensors, of what else can be compared, and of "cpu" as the engine: called
    with all of them in a tuple, and repeated where that does the same."""
    calls: dict[Hashable, Any] = {}
    _kept.append(calls)

    def call(arguments: tuple[Any, ...]) -> Any:
        tensors: list[Tensor] = []
        traits = [settings.algorithm, settings.policy, settings.winograd, torch.get_num_threads()]
        for argument in arguments:
            kind = type(argument)
            if kind is Tensor or kind is Parameter:
                if not argument.is_cpu:
                    return body(*arguments)
                tensors.append(argument)
                traits += argument.shape, argument.stride(), argument.dtype
            elif kind is list:
                traits.append(tuple(argument))
            else:
                traits.append(argument)
        key = tuple(traits)
        known = calls.get(key)
        if known and registry.is_unobserved():
            return known(tensors)
        if known is None and registry.is_unobserved():
            if key in calls:
                results, found = _watched(lambda: body(*arguments), tensors)
                calls[key] = found or False
                return results
            if len(calls) >= MOST:
                calls.clear()
            calls[key] = None
        return body(*arguments)

    return call

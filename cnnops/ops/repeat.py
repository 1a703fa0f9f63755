"""Operations of the cpu engine that are called again with tensors of the same sizes, strides and types.

The second of such calls (`alike`) is watched: what comes once is not worth watching. Later ones make such
results, put their tensors' addresses in the places of the former ones, and run the same tasks. A call is
repeated only where new tensors and tasks are all that it was. One in which PyTorch did more, as a copy in
another type, is not; nor one that was given a tensor twice, whose addresses would be one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from operator import itemgetter
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch._C._dynamo import guards
from torch.autograd import Function
from torch.utils._python_dispatch import TorchDispatchMode

from cnnops import memory
from cnnops.ops.alike import Calls, looked_on, told_apart

if TYPE_CHECKING:
    from cnnops.cpu.task import Program, Run

_LEAST_ADDRESS = 2**32
"""No size, stride or count of elements is as large; what is may be an address that nobody said is one."""

_NEW = (torch.ops.aten.new_empty_strided.default, torch.ops.aten.empty_strided.default)

_address = Tensor.data_ptr
_new: Callable[..., Tensor] = getattr(guards, "_empty_strided_cpu")  # noqa: B009 (not among the stubs)


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
    """An operation's results and launches, with other addresses."""

    def __init__(
        self, made: Sequence[Tensor], shared: Sequence[int], program: Program,
        results: Callable[[list[Tensor]], Any],
    ) -> None:  # fmt: skip
        """Addresses are numbered: of the tensors, of those `made`, and of memory `shared` of so many
        bytes."""
        from cnnops.cpu.task import Shared

        self._shared_memory = Shared
        self._made = [(tuple(t.shape), t.stride(), t.dtype) for t in made]
        self._large = [i for i, t in enumerate(made) if t.numel() >= memory.LEAST]
        self._shared, self._run, self._results = shared, program.run, results

    def __call__(self, tensors: Sequence[Tensor]) -> Any:
        """The results for these tensors; None where one of them has no memory."""
        addresses = list(map(_address, tensors))
        if 0 in addresses:
            return None
        # As compiled code makes its tensors: PyTorch's dispatcher takes longer than many a kernel.
        made = [_new(*form) for form in self._made]
        for index in self._large:
            memory.use_huge_pages(made[index])
        addresses += map(_address, made)
        if self._shared:
            shared = [self._shared_memory(size) for size in self._shared]
            addresses += [each.address for each in shared]
        self._run(addresses)
        return self._results(made)


def _found(
    runs: Sequence[Run], tensors: Sequence[Tensor], made: Sequence[Tensor], results: Any
) -> Repeat | None:
    """What does the same as these runs did with these tensors; None where that cannot be told."""
    from cnnops.cpu.task import At, Program, Shared

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
    order = {id(t): index for index, t in enumerate(made)}
    found = [results] if isinstance(results, Tensor) else list(results)
    if any(id(t) not in order for t in found):
        return None
    picks = [order[id(t)] for t in found]
    form: Callable[[list[Tensor]], Any]
    if isinstance(results, Tensor):
        form = itemgetter(*picks)
    elif picks == list(range(len(made))):
        form = type(results)
    else:
        kind = type(results)

        def form(made: list[Tensor]) -> Any:
            return kind([made[index] for index in picks])

    return Repeat(made, shared, Program(runs, uses, len(number)), form)


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


class Repeated:
    """`body`, a function of plain tensors, of what else can be compared, and of the engine."""

    def __init__(self, body: Callable[..., Any]) -> None:
        self._body = body
        self._calls = Calls()

    def again(self, arguments: tuple[Any, ...]) -> Any:
        """The results if this is a repetition, else None."""
        if arguments[-1] != "cpu" or looked_on():
            return None
        key, tensors = told_apart(arguments)
        call = self._calls.find(key, tensors)
        if call is None or not call.found:
            return None
        results = call.found(tensors)
        if results is not None and _listening.heard is not None:
            _listening.heard.repeats.append((call.found, tensors))
        return results

    def __call__(self, arguments: tuple[Any, ...]) -> Any:
        """The results by the long way, for calls that concern nobody but their kernel (`ops.eager`)."""
        if arguments[-1] == "cpu" and not looked_on():
            key, tensors = told_apart(arguments)
            call = self._calls.find(key, tensors)
            if call is None:
                self._calls.add(key, tensors)
            elif call.found is None:
                results, found = _watched(lambda: self._body(*arguments), tensors)
                call.found = found or False
                return results
        return self._body(*arguments)


# ---- listening --------------------------------------------------------------------------------------------


class Use(NamedTuple):
    """An operation's use: recorded by a Function, or by none."""

    function: type[Function] | None
    arguments: tuple[Any, ...]
    results: Any


class Heard:
    """What a function did: the operations that it used, and with which tensors some of them were repeated."""

    def __init__(self) -> None:
        self.uses: list[Use] = []
        self.repeats: list[tuple[Repeat, Sequence[Tensor]]] = []


class _Listening(threading.local):
    """What a function does in this thread; None while nobody listens."""

    heard: Heard | None = None


_listening = _Listening()


def note(function: type[Function] | None, arguments: tuple[Any, ...], results: Any) -> None:
    """Tell whoever listens which operation was used, and by which Function."""
    if _listening.heard is not None:
        _listening.heard.uses.append(Use(function, arguments, results))


def is_listened_to() -> bool:
    """Whether this is within a block of `listening`, in this thread."""
    return _listening.heard is not None


@contextmanager
def listening() -> Iterator[Heard]:
    """Within the block, what is done in this thread is heard."""
    former, _listening.heard = _listening.heard, Heard()
    try:
        yield _listening.heard
    finally:
        _listening.heard = former

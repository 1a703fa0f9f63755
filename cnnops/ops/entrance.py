"""Functions of tensors on a CPU, from their checks to their results, once more.

A function that is called again with all alike (`alike`) checks the same and settles the same. If all that it
does besides is one operation, which is repeated itself (`repeat`), then later calls are that repetition; or,
where a gradient may be asked for, its record by the operation's Function, which keeps for the backward what
it keeps anyway. Which operation, with which of the tensors, is heard when it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, wraps
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import Parameter

from cnnops.ops.alike import Calls, looked_on, told_apart
from cnnops.ops.repeat import Heard, Repeat, is_listened_to, listening

_TRIES = 64
"""So often a function is listened to, by all threads together, before its operation counts as one that is not
repeated."""

_PLAIN = (int, float, str, tuple, list, type(None))

F = TypeVar("F", bound=Callable[..., Any])


class _Short:
    """A function's only operation, with the function's tensors in this order, and its result among those of
    the operation, or all."""

    def __init__(self, repeat: Repeat, order: Sequence[int], result: int | None) -> None:
        self._repeat, self._order, self._result = repeat, order, result

    def __call__(self, tensors: Sequence[Tensor]) -> Any:
        results = self._repeat([tensors[index] for index in self._order])
        return results if self._result is None or results is None else results[self._result]


class _Recorded:
    """As `_Short`, recorded by `function`, which is given tensors (None where there is none) and `others`."""

    def __init__(
        self, repeat: Repeat, order: Sequence[int], result: int | None, function: type[Function],
        given: Sequence[int | None], others: tuple[Any, ...],
    ) -> None:  # fmt: skip
        """`order` is that of what the Function is given, not of the function's tensors."""
        short = _shortened(function)
        self._apply = super(Function, short).apply  # type: ignore[misc]
        self._given, self._result = given, result
        self.repeat, self.order, self.others = repeat, order, others

    def __call__(self, tensors: Sequence[Tensor]) -> Any:
        given = [None if index is None else tensors[index] for index in self._given]
        results = self._apply(*given, self)
        return results if self._result is None else results[self._result]


@lru_cache(None)
def _shortened(function: type[Function]) -> type[Function]:
    """`function` for a `_Recorded` behind its tensors, in place of all other arguments. PyTorch takes more
    gradients than there were arguments where they are None."""

    def forward(ctx: Any, *given: Any) -> Any:
        *tensors, recorded = given
        inputs = (*tensors, *recorded.others)
        output = recorded.repeat([tensors[index] for index in recorded.order])
        if output is None:
            output = function.forward(*inputs)
        function.setup_context(ctx, inputs, output)
        return output

    members = {
        "forward": staticmethod(forward),
        "setup_context": staticmethod(Function.setup_context),  # forward has done it
    }
    return type(function.__name__, (function,), members)


def _short(
    heard: Heard, tensors: Sequence[Tensor], result: Any
) -> _Short | _Recorded | bool | None:
    """What does what a function of these tensors was heard to do; False where that is more than one
    operation, None where the operation was not repeated yet."""
    if len(heard.uses) != 1 or len(heard.repeats) > 1:
        return False
    if not heard.repeats:
        return None
    function, arguments, results = heard.uses[0]
    repeat, used = heard.repeats[0]
    place = {id(t): index for index, t in enumerate(tensors)}
    if any(id(t) not in place for t in used) or len(place) != len(tensors):
        return False
    if result is results:
        pick = None
    elif isinstance(results, (tuple, list)) and result is results[0]:
        pick = 0
    else:
        return False
    if function is None:
        return _Short(repeat, [place[id(t)] for t in used], pick)
    count = next(
        (i for i, a in enumerate(arguments) if a is not None and not isinstance(a, Tensor)),
        len(arguments),
    )
    leading, others = arguments[:count], arguments[count:]
    if any(t is not None and id(t) not in place for t in leading):
        return False
    given = [None if t is None else place[id(t)] for t in leading]
    at = {id(t): index for index, t in enumerate(leading) if t is not None}
    order = [at[id(t)] for t in used]
    return _Recorded(repeat, order, pick, function, given, others)


def entrance(function: F) -> F:
    """A function of tensors, repeated at once where all that it does beyond checks is one operation through
    `ops.call`, whose result, or whose first result, it returns."""
    calls = Calls()

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        # A GPU's tensors lose no time here. While one function is learned, others do not shorten their ways.
        first = args[0] if args else None
        if type(first) is not Tensor or not first.is_cpu or looked_on() or is_listened_to():
            return function(*args, **kwargs)
        arguments = (*args, tuple(kwargs), *kwargs.values()) if kwargs else args
        try:
            key, tensors = told_apart(arguments)
            known = calls.find(key, tensors)
        except TypeError:  # what cannot be compared
            return function(*args, **kwargs)
        if known is not None and known.found is not None:
            result = known.found(tensors) if known.found else None
            return function(*args, **kwargs) if result is None else result
        with listening() as heard:
            result = function(*args, **kwargs)
        if known is None:
            if _may_be_kept(arguments, tensors):
                calls.add(key, tensors)
        else:
            known.tries += 1
            found = _short(heard, tensors, result)
            known.found = False if found is None and known.tries >= _TRIES else found
        return result

    return call  # type: ignore[return-value]


def _may_be_kept(arguments: Sequence[Any], tensors: Sequence[Tensor]) -> bool:
    """Whether all that matters to such a call is among what is compared. Autocast's dtype is not."""
    return (
        bool(tensors)
        and all(t.is_cpu for t in tensors)
        and not torch.is_autocast_enabled("cpu")
        and all(type(a) in (Tensor, Parameter) or isinstance(a, _PLAIN) for a in arguments)
    )

"""Operations between torch and the kernels: argument checks, allocation, autograd, torch.library.

One file a family, top to bottom in call order:

    conv(…)                      checks what torch checks, settles the engine
      autograd.Function          only where a gradient may be asked for; its backward calls its siblings
        torch.ops.cnnops.…       allocates the result; has a fake twin for torch.compile and meta tensors
          registry.choose(…)     the kernel

The Function stands outside of the torch.library op: the other way round costs a call 15 to 20 µs more. The
dispatcher costs 6 µs, too, and in eager mode has nothing to add (`eager`). Below is what families share.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active
from torch._C._functorch import is_functorch_wrapped_tensor, is_legacy_batchedtensor
from torch.autograd import Function, forward_ad
from torch.compiler import is_compiling
from torch.nn import Parameter

from cnnops import memory, registry
from cnnops.ops.alike import looked_on
from cnnops.ops.repeat import Repeated, note
from cnnops.ops.vmap import Rule, one_by_one
from cnnops.shapes import Shape

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
"""Element types that kernels may take; PyTorch's own operations take all others."""

_LIBRARY = torch.library.Library("cnnops", "DEF")

Run = Callable[..., None]
S = TypeVar("S")


def eager(arguments: Sequence[Any]) -> bool:
    """Whether a call concerns nobody but its kernel, so that the dispatcher may be passed by.

    Not so where it is `looked_on`, or a tensor is of a subclass, empty, on the meta device, left over from a
    transform, a view to be negated, or a stack of gradients as
    ``torch.autograd.grad(is_grads_batched=True)`` hands them over.
    """
    if looked_on():
        return False
    try:
        for argument in arguments:
            kind = type(argument)
            if kind is Tensor or kind is Parameter:
                # What stands for others has no memory of its own; to ask what it is takes twice as long.
                if argument.is_neg() or not argument.data_ptr():
                    return False
            elif argument is not None:
                return not isinstance(argument, Tensor)  # tensors come first: that was the last one
    except RuntimeError:
        return False
    return True


def is_stack(t: Tensor) -> bool:
    """Whether `t` is a stack of gradients of ``torch.autograd.grad(is_grads_batched=True)``."""
    return not is_compiling() and is_legacy_batchedtensor(t)


def compute(op: str, engine: str, shape: Shape, dtype: torch.dtype, *arguments: Any) -> None:
    """Run the chosen kernel of `op` on its arguments."""
    registry.choose(op, engine, shape, dtype)(shape, *arguments)


def direct(body: Callable[..., Any]) -> Callable[..., Any]:
    """``body(compute, *arguments)``, the last of which is the engine, as a function of the arguments; what it
    returns is None where the call is not `eager`."""
    repeated = Repeated(partial(body, compute))

    def at_once(*arguments: Any) -> Any:
        results = repeated.again(arguments)
        if results is None and eager(arguments):
            return repeated(arguments)
        return results

    return at_once


def _with_memory(function: Callable[..., Any], *arguments: Any) -> Any:
    """``function(*arguments)``. Raises RuntimeError for a tensor whose storage was given back, as
    ``untyped_storage().resize_(0)`` does: kernels know addresses only. `eager` keeps such tensors away."""
    for argument in arguments:
        if isinstance(argument, Tensor) and argument.numel() and not argument.data_ptr():
            raise RuntimeError(
                f"expected tensors that have memory, got one of size {list(argument.shape)} without any"
            )
    return function(*arguments)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast asks for on `x`'s device, None where it is off."""
    device = "cuda" if x.is_cuda else "cpu" if x.is_cpu else ""
    if device and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return None


def define(schema: str, body: Callable[..., Any], vmap: Rule | None = None) -> Callable[..., Any]:
    """Register a torch.library op; returns what to call, which is `body` itself where the call is `eager`.

    ``body(run, *arguments)`` checks, allocates, calls ``run(op, engine, shape, dtype, *arguments)`` and
    returns the results. It serves twice: `run` computes for the CPU and CUDA keys, and does nothing for fake
    and meta tensors, so that what torch.compile is told cannot differ from what happens. The engine is the
    last argument. `vmap` is the rule
    for ``torch.func.vmap`` of an op that is called without a Function; by default maps are computed in turn.
    """
    name = schema[: schema.index("(")]
    _LIBRARY.define(schema, tags=torch.Tag.pt2_compliant_tag)
    for key in ("CPU", "CUDA"):
        _LIBRARY.impl(name, partial(_with_memory, partial(body, compute)), key)
    torch.library.register_fake(f"cnnops::{name}", partial(body, lambda *_: None), lib=_LIBRARY)
    op: Callable[..., Any] = getattr(torch.ops.cnnops, name).default

    at_once = direct(body)

    def operation(*arguments: Any) -> Any:
        results = at_once(*arguments)
        return op(*arguments) if results is None else results

    torch.library.register_vmap(f"cnnops::{name}", vmap or one_by_one(operation), lib=_LIBRARY)
    return operation


def cached(of: Callable[..., S], traced: bool = False) -> Callable[..., S]:
    """`of` remembered by its arguments; lists among them become tuples. `traced`: Dynamo goes inside."""
    remembered = lru_cache(4096, typed=True)(of)  # True is not 1 here

    def shape(*arguments: Any) -> S:
        if traced and is_compiling():
            return of(*arguments)
        try:
            return remembered(*arguments)
        except TypeError:
            if _hashable(arguments):
                raise
        # Lists, from the dispatcher, or sizes that torch.compile leaves open.
        plain = tuple(tuple(a) if isinstance(a, (list, torch.Size)) else a for a in arguments)
        return remembered(*plain) if _hashable(plain) else of(*plain)

    return shape


def _hashable(arguments: tuple[Any, ...]) -> bool:
    try:
        hash(arguments)
    except TypeError:
        return False
    return True


def is_channels_last(x: Tensor) -> bool:
    """Whether `x` is channels-last to torch's ``suggest_memory_format``."""
    return channels_last_strides(x.shape, x.stride())


@partial(cached, traced=True)
def channels_last_strides(sizes: Sequence[int], strides: Sequence[int]) -> bool:
    """`is_channels_last` of a tensor of these sizes and strides, 4-D or 5-D.

    It is where strides grow from the channel outwards. The one ambiguous case, size 1 in every axis but the
    first, counts as contiguous.
    """
    if len(sizes) not in (4, 5) or strides[1] == 0:
        return False
    least = 0
    for axis in (1, *range(len(sizes) - 1, 1, -1), 0):
        if sizes[axis] == 0 or strides[axis] < least:
            return False
        if axis == 0 and least == strides[1]:
            return False
        least = strides[axis] * sizes[axis] if sizes[axis] > 1 else strides[axis]
    return True


@cached
def new_strides(size: Sequence[int], channels_last: bool) -> tuple[int, ...]:
    """The strides that torch gives a new tensor."""
    form = torch.contiguous_format
    if channels_last and len(size) in (4, 5):
        form = torch.channels_last if len(size) == 4 else torch.channels_last_3d
    return torch.empty(size, device="meta", memory_format=form).stride()


def empty(
    size: Sequence[int], like: Tensor, channels_last: bool = False, dtype: torch.dtype | None = None
) -> Tensor:
    """An uninitialised tensor of `like`'s device, and its dtype unless one is given."""
    return empty_strided(size, new_strides(size, channels_last), like, dtype)


def empty_strided(
    size: Sequence[int], strides: Sequence[int], like: Tensor, dtype: torch.dtype | None = None
) -> Tensor:
    """`empty` with strides of one's own."""
    if dtype is None:
        t = like.new_empty_strided(size, strides)
    else:
        t = like.new_empty_strided(size, strides, dtype=dtype)
    # Fake tensors are of another type; they have no memory, and must not be asked for sizes.
    if type(t) is Tensor and t.numel() >= memory.LEAST and t.is_cpu:
        memory.use_huge_pages(t)
    return t


def call(function: type[Function], op: Callable[..., Any], *arguments: Any) -> Any:
    """``op(*arguments)``, through `function` where a gradient of one of them may be asked for.

    Tensors, and None in their place, come first among the arguments of every op.
    """
    recorded = is_transformed() or may_need_gradient(arguments)
    results = _record(function, arguments) if recorded else op(*arguments)
    if not is_compiling():
        note(function if recorded else None, arguments, results)
    return results


def is_transformed() -> bool:
    """Whether forward mode or a transform of torch.func is at work."""
    return not is_compiling() and (
        forward_ad._current_level >= 0 or _are_functorch_transforms_active()
    )


def may_need_gradient(arguments: Sequence[Any]) -> bool:
    """Whether backward may ask for the gradient of a tensor in front of the other arguments."""
    if torch.is_grad_enabled():
        for argument in arguments:
            if isinstance(argument, Tensor):
                if argument.requires_grad:
                    return True
            elif argument is not None:
                break
    return False


def _record(function: type[Function], arguments: Sequence[Any]) -> Any:
    """``function.apply(*arguments)`` without the part that is for torch.func, where that is not at work."""
    if is_compiling():
        return function.apply(*arguments)
    if forward_ad._current_level >= 0:
        return _forward_mode(function).apply(*arguments)
    if _are_functorch_transforms_active():
        return function.apply(*arguments)
    for argument in arguments:
        if argument is not None:
            if not isinstance(argument, Tensor):
                break
            if is_functorch_wrapped_tensor(argument):
                return function.apply(*arguments)
    return super(Function, function).apply(*arguments)  # type: ignore[misc]


@lru_cache(None)
def _forward_mode(function: type[Function]) -> type[Function]:
    """`function` with its ``tangent(ctx, *tangents)`` as jvp, which Dynamo would not have in a Function.

    ``ctx.saved_tensors`` then are the call's tensors, None in place of other arguments, and its results.
    """
    tangent = getattr(function, "tangent", None)
    if tangent is None:
        return function

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        function.setup_context(ctx, inputs, output)
        outputs = output if isinstance(output, tuple) else (output,)
        ctx.save_for_forward(*(t if isinstance(t, Tensor) else None for t in (*inputs, *outputs)))

    members = {"setup_context": staticmethod(setup_context), "jvp": staticmethod(tangent)}
    return type(function.__name__, (function,), members)


def expect_tensor(name: str, value: object) -> None:
    """Raises TypeError unless `value` is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(value).__name__}")


def expect_bool(name: str, value: object) -> None:
    """Raises TypeError unless `value` is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected a bool, got {value!r}")


def expect_float(name: str, value: object) -> None:
    """Raises TypeError unless `value` is a float or an int."""
    if isinstance(value, bool) or not isinstance(value, (float, int)):
        raise TypeError(f"{name}: expected a float, got {value!r}")


def expect_same(x: Tensor, dtype: torch.dtype, **others: Tensor | None) -> None:
    """Raises RuntimeError unless all `others` have the dtype given and are on `x`'s device."""
    device = x.device
    for name, t in others.items():
        if t is not None and (t.dtype != dtype or t.device != device):
            if t.dtype != dtype:
                raise RuntimeError(
                    f"{name}: expected {dtype} for an input of {x.dtype}, got {t.dtype}"
                )
            raise RuntimeError(
                f"{name}: expected a tensor on {device}, as the input, got {t.device}"
            )


def batched(x: Tensor, dims: int) -> tuple[Tensor, bool]:
    """An `x` of `dims` spatial axes with a batch of one in front where it has none, and whether it was added.

    Raises RuntimeError unless `x` is ``C *spatial`` or ``N C *spatial``.
    """
    if x.dim() == dims + 2:
        return x, False
    if x.dim() == dims + 1:
        return x.unsqueeze(0), True
    raise RuntimeError(
        f"input: expected {dims + 1} (unbatched) or {dims + 2} dimensions, got {x.dim()} ({list(x.shape)})"
    )

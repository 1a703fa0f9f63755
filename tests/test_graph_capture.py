"""Nothing on the way to a kernel waits for the device or looks into a tensor, as a CUDA graph asks for.

Without a GPU this is shown on the way that emulated kernels go, which differs from a GPU's in its last step
alone: a dispatch mode and patched methods refuse whatever would copy values to the host or from it. On a GPU
the operations are captured, replayed on new values, and compared bit by bit.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import CASES, Case, needs_emulator
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import cnnops
import cnnops.functional as C
import cnnops.ops.pool
from cnnops.cuda.launch import trace

CUDA = Path(cnnops.__file__).parent / "cuda"

# ---- without a GPU ---------------------------------------------------------------------------------------


class LooksIntoTensor(AssertionError):
    """On a GPU the host would have waited."""


READS = {
    "_local_scalar_dense", "item", "is_nonzero", "equal", "allclose", "nonzero", "nonzero_numpy", "argwhere",
    "masked_select", "unique_dim", "_unique", "_unique2", "unique_consecutive",
}  # fmt: skip
"""Operations whose result, or its size, is known once the device has computed it."""

METHODS = ("item", "tolist", "numpy", "cpu", "__array__")
"""Of a tensor on a CPU these do not reach a dispatch mode."""


class NoHostReads(TorchDispatchMode):
    """Refuses operations that would synchronise a GPU's tensors with the host, inside of our own ones too."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "cnnops":
            with self:  # straight to the implementation, which this mode shall see
                keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
                return func.redispatch(keys, *args, **kwargs)
        name = func.overloadpacket.__name__
        by_mask = name.startswith("index") and any(
            isinstance(t, Tensor) and t.dtype in (torch.bool, torch.uint8)
            for t in (args[1] if len(args) > 1 and isinstance(args[1], list | tuple) else ())
        )
        moved = name == "_to_copy" and kwargs.get("device") is not None
        if name in READS or by_mask or moved or name in ("lift_fresh", "lift_fresh_copy"):
            raise LooksIntoTensor(f"{func}")
        return func(*args, **kwargs)


@contextmanager
def no_host_reads() -> Iterator[None]:
    def refuse(name: str) -> Callable[..., Any]:
        def method(*_: Any, **__: Any) -> Any:
            raise LooksIntoTensor(f"Tensor.{name}")

        return method

    with pytest.MonkeyPatch.context() as patch, NoHostReads():
        for name in METHODS:
            patch.setattr(Tensor, name, refuse(name))
        yield


PLANTED: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda x: x.sum().item(),
    "a branch": lambda x: 1 if x.sum() > 0 else 0,
    "a mask": lambda x: x[x > 0],
    "a mask that is written": lambda x: x.index_put_((x > 0,), torch.zeros(())),
    "nonzero": lambda x: x.nonzero(),
    "masked_select": lambda x: x.masked_select(x > 0),
    "equal": lambda x: torch.equal(x, x),
    "unique": lambda x: x.unique(),
    "a list": lambda x: x.tolist(),
    "numpy": lambda x: x.numpy(),
    "the host": lambda x: x.cpu(),
    "from the host": lambda x: x + torch.tensor([1.0, 2.0, 3.0]),
}


@pytest.mark.parametrize("read", PLANTED.values(), ids=PLANTED)
def test_what_looks_into_a_tensor_is_found(read: Callable[[Tensor], Any]) -> None:
    with no_host_reads(), pytest.raises(LooksIntoTensor):
        read(torch.ones(3))


@needs_emulator
@pytest.mark.parametrize("case", CASES[::3], ids=lambda case: f"{type(case).__name__}-{case.id}")
def test_no_operation_looks_into_a_tensor(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward; kernels are planned and not run, so that nothing else is in the way."""
    # Indices of unpooling are looked at where they lie in the host's memory, and there alone.
    monkeypatch.setattr(cnnops.ops.pool, "_expect_inside", lambda *_: None)
    tensors = case.tensors(case.dtypes[0])
    leaves = [t.detach().requires_grad_() for t in tensors]
    with cnnops.engine("emulate"), trace(run=False) as launches, no_host_reads():
        y = case.ours(*leaves)
        forward = len(launches)
        torch.autograd.grad(y, leaves, torch.ones_like(y), allow_unused=True)
    if y.numel() and all(leaf.numel() for leaf in leaves):
        assert 0 < forward <= len(launches)


WAITS = {"synchronize", "item", "tolist", "cpu", "numpy", "nonzero"}
"""Methods that wait for a device."""


@pytest.mark.parametrize("name", ["jit", "launch", "kernel", "tensor_map"])
def test_the_last_step_waits_for_nothing(name: str) -> None:
    """What a GPU's launches pass and emulated ones do not: no call in these files is one that waits."""
    tree = ast.parse((CUDA / f"{name}.py").read_text(encoding="utf-8"))
    calls = {
        (node.func.attr, node.lineno)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
    }
    assert calls and not {call for call in calls if call[0] in WAITS}


# ---- on a GPU --------------------------------------------------------------------------------------------


def _norm(function: Callable[..., Tensor], training: bool, **options: Any) -> Callable[..., Tensor]:
    def call(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        mean, var = x.new_zeros(x.shape[1]), x.new_ones(x.shape[1])
        return function(x, mean, var, weight, bias, training=training, **options)

    return call


CAPTURED: dict[str, Callable[..., Tensor]] = {
    "max_pool2d": lambda x, *_: C.max_pool2d(x, 3, 2, 1),
    "avg_pool2d": lambda x, *_: C.avg_pool2d(x, 3, 2, 1),
    "adaptive_avg_pool2d": lambda x, *_: C.adaptive_avg_pool2d(x, 1),
    "batch_norm, training": _norm(C.batch_norm, True),
    "batch_norm, evaluation": _norm(C.batch_norm, False),
    "batch_norm_act, training": _norm(C.batch_norm_act, True, activation="relu"),
    "group_norm": lambda x, weight, bias: C.group_norm(x, 4, weight, bias),
    "layer_norm": lambda x, weight, bias: C.layer_norm(
        x.movedim(1, -1), (x.shape[1],), weight, bias
    ),
}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("function", CAPTURED.values(), ids=CAPTURED)
def test_replayed_on_new_values(
    function: Callable[..., Tensor], layout: torch.memory_format
) -> None:
    """Forward and all gradients of a captured step have the bits of the same step outside of a graph."""

    def values(seed: int) -> list[Tensor]:
        generator = torch.Generator("cuda").manual_seed(seed)
        x = torch.randn(4, 32, 28, 28, device="cuda", generator=generator)
        vectors = (torch.randn(32, device="cuda", generator=generator) for _ in range(2))
        return [x.contiguous(memory_format=layout), *vectors]

    def step(tensors: list[Tensor]) -> list[Tensor]:
        leaves = [t.detach().requires_grad_() for t in tensors]
        y = function(*leaves)
        return [y, *torch.autograd.grad(y, leaves, torch.ones_like(y), allow_unused=True)]

    inputs = values(0)
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):  # compiles and plans what the graph will launch
        for _ in range(2):
            step(inputs)
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(inputs)
    for seed in (1, 2):
        for tensor, new in zip(inputs, values(seed), strict=True):
            tensor.copy_(new)
        graph.replay()
        for ours, plain in zip(captured, step(values(seed)), strict=True):
            assert (ours is None) == (plain is None)
            assert ours is None or torch.equal(ours, plain)

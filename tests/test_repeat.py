"""Calls that are repeated do what they would do anyway, bit by bit; and most are repeated.

The last call of every operation here was repeated from former ones; what it gave is compared with the same
call after all was forgotten, which takes the long way.
"""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import cnnops
import cnnops.functional as F
from cnnops import tuned
from cnnops.cpu import task
from cnnops.ops import alike, entrance, repeat

Operation = tuple[Callable[..., Any], list[tuple[int, ...]]]

PLAIN: dict[str, Operation] = {
    "conv_blocks": (
        lambda x, w, b: F.conv2d(x, w, b, padding=1),
        [(2, 6, 7, 9), (8, 6, 3, 3), (8,)],
    ),
    "conv_stride": (
        lambda x, w, b: F.conv2d(x, w, b, stride=2, padding=1),
        [(2, 16, 8, 8), (32, 16, 3, 3), (32,)],
    ),
    "conv_winograd": (
        lambda x, w: F.conv2d(x, w, padding=1),
        [(1, 64, 28, 28), (64, 64, 3, 3)],
    ),
    "conv_one_tap": (F.conv2d, [(2, 32, 16, 16), (64, 32, 1, 1), (64,)]),
    "conv_depthwise": (
        lambda x, w: F.conv2d(x, w, padding=1, groups=32),
        [(2, 32, 9, 9), (32, 1, 3, 3)],
    ),
    "conv_groups": (
        lambda x, w, b: F.conv2d(x, w, b, padding=1, groups=2),
        [(2, 16, 9, 9), (32, 8, 3, 3), (32,)],
    ),
    "conv_transpose": (
        lambda x, w, b: F.conv_transpose2d(x, w, b, stride=2, padding=1),
        [(2, 16, 5, 5), (16, 8, 4, 4), (8,)],
    ),
    "conv_1d": (lambda x, w: F.conv1d(x, w, dilation=2), [(2, 4, 31), (5, 4, 3)]),
    "conv_act": (
        lambda x, w, b, r: F.conv_act(x, w, b, padding=1, residual=r, activation="relu"),
        [(2, 16, 8, 8), (16, 16, 3, 3), (16,), (2, 16, 8, 8)],
    ),
    "batch_norm": (
        lambda x, w, b: F.batch_norm(x, None, None, w, b, True),
        [(3, 8, 6, 6), (8,), (8,)],
    ),
    "batch_norm_act": (
        lambda x, w, b, r: F.batch_norm_act(
            x, None, None, w, b, True, residual=r, activation="relu"
        ),
        [(3, 8, 6, 6), (8,), (8,), (3, 8, 6, 6)],
    ),
    "max_pool": (lambda x: F.max_pool2d(x, 3, 2, 1), [(2, 4, 11, 11)]),
    "avg_pool": (lambda x: F.avg_pool2d(x, 2), [(2, 4, 10, 10)]),
    "global_pool": (lambda x: F.adaptive_avg_pool2d(x, 1), [(2, 64, 7, 7)]),
}
"""Of float32, where each call and each gradient is repeated."""

OTHERS: dict[str, Operation] = {
    "conv_scale_act": (
        lambda x, w, s, b, r: F.conv_act(
            x, w, b, padding=1, scale=s, residual=r, activation="silu"
        ),
        [(2, 16, 8, 8), (16, 16, 3, 3), (16,), (16,), (2, 16, 8, 8)],
    ),
    "conv_reflect": (
        lambda x, w: cnnops.ops.conv.conv(x, w, padding=1, padding_mode="reflect"),
        [(2, 4, 7, 7), (4, 4, 3, 3)],
    ),
    "conv_gaps": (lambda x, w: F.conv2d(x, w, stride=3), [(2, 16, 8, 8), (16, 16, 2, 2)]),
    "group_norm": (
        lambda x, w, b: F.group_norm(x, 2, w, b),
        [(2, 8, 5, 5), (8,), (8,)],
    ),
    "layer_norm": (lambda x: F.layer_norm(x, (40,)), [(6, 40)]),
    "adaptive_max_pool": (lambda x: F.adaptive_max_pool2d(x, 3), [(2, 4, 11, 11)]),
}
"""Where PyTorch takes part, at least in a gradient."""


def tensors(
    sizes: list[tuple[int, ...]], dtype: torch.dtype, last: bool, seed: int
) -> list[Tensor]:
    """Leaves that require gradients."""
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(size, generator=generator).to(dtype) for size in sizes]
    if last:
        form = torch.channels_last
        made = [t.contiguous(memory_format=form) if t.dim() == 4 else t for t in made]
    return [t.requires_grad_() for t in made]


def results(function: Callable[..., Tensor], given: list[Tensor]) -> list[Tensor]:
    """y, and the gradients of all that was given."""
    y = function(*given)
    generator = torch.Generator().manual_seed(1)
    grad_y = torch.randn(y.shape, generator=generator).to(y.dtype)
    form = torch.channels_last if y.dim() == 4 and y.stride(1) == 1 else torch.contiguous_format
    return [y.detach(), *torch.autograd.grad(y, given, grad_y.contiguous(memory_format=form))]


def known() -> list[Any]:
    """What is known of all calls so far, of functions and of operations: None after one, then what repeats
    it, or False."""
    return [call.found for calls in alike._kept for call in calls]


def same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.stride() == b.stride() and torch.equal(a, b)


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", [*PLAIN, *OTHERS])
def test_the_same_bits(name: str, dtype: torch.dtype, last: bool) -> None:
    function, sizes = (PLAIN | OTHERS)[name]
    for call in range(4):
        results(function, tensors(sizes, dtype, last, call))
    kept = [t.clone() for t in results(function, tensors(sizes, dtype, last, 4))]
    found = known()
    if name in PLAIN and dtype == torch.float32:
        assert any(found) and (last or all(found))  # filters are copied where they lie badly
    alike.forget()
    again = results(function, tensors(sizes, dtype, last, 4))
    assert all(map(same, kept, again))
    other = results(function, tensors(sizes, dtype, last, 5))
    assert not same(kept[0], other[0])


def test_what_is_the_same_once_need_not_be_again() -> None:
    """One tensor in two places, in the calls that could have been watched."""
    x, w, b = torch.randn(2, 8, 5, 5), torch.randn(8), torch.randn(8)
    for _ in range(3):
        F.batch_norm(x, None, None, w, w, True)
    assert not any(known())
    expected = torch.nn.functional.batch_norm(x, None, None, w, b, True)
    for _ in range(3):
        torch.testing.assert_close(F.batch_norm(x, None, None, w, b, True), expected)


def test_running_statistics_move_every_time() -> None:
    ours, theirs = cnnops.nn.BatchNorm2d(4), torch.nn.BatchNorm2d(4)
    for call in range(6):
        x = torch.randn(3, 4, 5, 5) + call
        ours(x), theirs(x)
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)
    torch.testing.assert_close(ours.running_var, theirs.running_var)


def test_a_changing_momentum() -> None:
    """The average of all batches weighs each call by another number."""
    ours = cnnops.nn.BatchNorm2d(4, momentum=None)
    theirs = torch.nn.BatchNorm2d(4, momentum=None)
    for call in range(6):
        x = torch.randn(3, 4, 5, 5) + call
        ours(x), theirs(x)
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)


@pytest.fixture
def convolved() -> Iterator[tuple[Callable[[], Tensor], Tensor]]:
    """A call that is repeated by now, and its result."""
    x, w = torch.randn(1, 64, 28, 28), torch.randn(64, 64, 3, 3)
    for _ in range(4):
        y = F.conv2d(x, w, padding=1)
    assert known() and all(known())
    yield lambda: F.conv2d(x, w, padding=1), y


def test_settings_are_heeded(convolved: tuple[Callable[[], Tensor], Tensor]) -> None:
    call, y = convolved
    with cnnops.winograd(False):
        direct = call()
    assert not torch.equal(direct, y)
    torch.testing.assert_close(direct, y, rtol=1e-3, atol=1e-3)
    with cnnops.engine("aten"):
        assert not torch.equal(call(), y)
    assert torch.equal(call(), y)


def test_explain_sees_calls(convolved: tuple[Callable[[], Tensor], Tensor]) -> None:
    call, _ = convolved
    assert [choice.op for choice in cnnops.explain(call)] == ["conv_fprop"]


def test_new_tables_are_heeded(convolved: tuple[Callable[[], Tensor], Tensor]) -> None:
    tuned.forget()
    assert not known()


def test_threads_are_heeded(convolved: tuple[Callable[[], Tensor], Tensor]) -> None:
    call, y = convolved
    former = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if former > 1 else 2)
        for _ in range(4):
            assert torch.equal(call(), y)
    finally:
        torch.set_num_threads(former)
    assert len(known()) == 4 and all(known())


def test_nothing_runs_where_kernels_are_compiled_only() -> None:
    norm, x = cnnops.nn.BatchNorm2d(4), torch.randn(3, 4, 5, 5) + 1
    for _ in range(4):
        norm(x)
    assert norm.running_mean is not None and all(known())
    before = norm.running_mean.clone()
    with task.compiling_only():
        norm(x)
    assert torch.equal(norm.running_mean, before)
    norm(x)
    assert not torch.equal(norm.running_mean, before)


def test_errors_come_as_ever() -> None:
    x, w = torch.randn(2, 4, 6, 6), torch.randn(4, 4, 3, 3)
    for _ in range(4):
        F.conv2d(x, w)
    with pytest.raises(RuntimeError, match="weight: expected torch.float32"):
        F.conv2d(x, w.double())
    with pytest.raises(RuntimeError, match="weight: expected a tensor on cpu"):
        F.conv2d(x, w.to("meta"))
    y, indices = F.max_pool2d(x, 2, return_indices=True)
    for _ in range(4):
        F.max_unpool2d(y, indices, 2)
    with pytest.raises((IndexError, RuntimeError)):
        F.max_unpool2d(y, indices + 100, 2)


def test_no_tensor_is_kept() -> None:
    held = []
    for _ in range(4):
        x, w = torch.randn(2, 4, 6, 6), torch.randn(4, 4, 3, 3)
        y = F.conv2d(x, w)
        held += [weakref.ref(x), weakref.ref(w), weakref.ref(y)]
    assert all(known())
    del x, w, y
    gc.collect()
    assert not any(reference() for reference in held)


def test_results_are_new_every_time() -> None:
    x = torch.randn(1, 2, 4, 4)
    found = [F.avg_pool2d(x, 2) for _ in range(6)]
    assert len({y.data_ptr() for y in found}) == len(found)


def test_as_many_as_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alike, "MOST", 3)
    for _ in range(3):
        for size in range(4, 12):
            x = torch.randn(1, 2, size, size)
            torch.testing.assert_close(F.avg_pool2d(x, 2), torch.nn.functional.avg_pool2d(x, 2))
            assert len(known()) <= 2 * 3  # of the function, and of its operation


def test_many_threads() -> None:
    """Each watches what it does itself."""
    x, w = torch.randn(2, 4, 6, 6), torch.randn(4, 4, 3, 3)
    expected = torch.nn.functional.conv2d(x, w)
    wrong = []
    barrier = threading.Barrier(8)

    def call(factor: float) -> None:
        barrier.wait()
        for _ in range(200):
            y = F.conv2d(x * factor, w)
            if not torch.allclose(y, expected * factor, rtol=1e-4, atol=1e-4):
                wrong.append(factor)

    threads = [threading.Thread(target=call, args=(float(n + 1),)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and all(known())


def test_two_threads_with_the_same_first_call() -> None:
    """Both have found nothing when they add it: one entry is kept."""
    x = torch.randn(1, 2, 4, 4)
    F.avg_pool2d(x, 2)
    before = len(known())
    for calls in alike._kept:
        for key in list(calls._by_key):
            calls.add(key, [x])
    assert len(known()) == before > 0


def test_not_within_what_somebody_watches() -> None:
    x = torch.randn(1, 2, 4, 4)
    for _ in range(4):
        F.avg_pool2d(x, 2)
    with torch.profiler.profile() as profile:
        F.avg_pool2d(x, 2)
    assert any("cnnops::avg_pool" in event.key for event in profile.key_averages())


def test_memory_that_cannot_be_told_is_not_repeated() -> None:
    """An address that was given as a number, or another's view of memory, may be elsewhere next time."""
    x = torch.randn(4)
    for value in (2**47, x.data, x[1:]):
        run = task.Run(None, 1, 1.0, (value, 1.5), 0)  # type: ignore[arg-type]
        assert repeat._found([run], [x], [], []) is None


# ---- functions: from checks to results --------------------------------------------------------------------


def shortened() -> list[Any]:
    """What repeats functions at once."""
    return [found for found in known() if isinstance(found, (entrance._Short, entrance._Recorded))]


@pytest.mark.parametrize("name", PLAIN)
def test_the_same_bits_unrecorded(name: str) -> None:
    function, sizes = PLAIN[name]
    with torch.no_grad():
        for call in range(5):
            y = function(*tensors(sizes, torch.float32, False, call))
        assert len(shortened()) == 1
        alike.forget()
        assert same(y, function(*tensors(sizes, torch.float32, False, 4)))


def test_whatever_differs_is_another_call() -> None:
    """The same function of the same sizes, in turns."""
    x, w, b = torch.randn(2, 8, 6, 6), torch.randn(8, 8, 3, 3), torch.randn(8)
    last = x.contiguous(memory_format=torch.channels_last)
    calls: dict[str, Callable[[Any], Tensor]] = {
        "positional": lambda f: f.conv2d(x, w, b, 1, 1),
        "by name": lambda f: f.conv2d(x, w, b, padding=1),
        "no bias": lambda f: f.conv2d(x, w, None, 1, 1),
        "pairs": lambda f: f.conv2d(x, w, b, (2, 1), [0, 1]),
        "stride": lambda f: f.conv2d(x, w, b, 2, 1),
        "other names": lambda f: f.conv2d(x, w, b, stride=2),
        "channels-last": lambda f: f.conv2d(last, w, b, 1, 1),
        "parameter": lambda f: f.conv2d(x, torch.nn.Parameter(w), b, 1, 1),
        "a gradient of x": lambda f: f.conv2d(x.clone().requires_grad_(), w, b, 1, 1),
        "in parts": lambda f: f.conv2d(x[:1], w, b, 1, 1),
        "beside": lambda f: f.conv2d(x[:, :, 1:, 1:], w, b, 1, 1),
        "alone": lambda f: f.conv2d(x[0], w, b, 1, 1),
        "double": lambda f: f.conv2d(x.double(), w.double(), b.double(), 1, 1),
    }
    for _ in range(6):
        for name, call in calls.items():
            ours, theirs = call(F), call(torch.nn.functional)
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4, msg=name)
            assert ours.requires_grad == theirs.requires_grad, name
            assert ours.stride() == theirs.stride(), name
    assert len(shortened()) == len(calls) - 1  # an image alone is made a batch by PyTorch


def test_true_is_not_one() -> None:
    x, statistics = torch.randn(3, 4, 5, 5), (torch.zeros(4), torch.ones(4))
    for _ in range(5):
        F.batch_norm(x, *statistics, training=True)
    assert len(shortened()) == 1
    with pytest.raises(TypeError, match="training: expected a bool, got 1"):
        F.batch_norm(x, *statistics, training=1)  # type: ignore[arg-type]


def test_functions_that_call_one_another() -> None:
    """`batch_norm` is `batch_norm_act` without activation: both are repeated, each by its own way."""
    x, statistics = torch.randn(3, 4, 5, 5), (torch.zeros(4), torch.ones(4))
    for _ in range(5):
        y = F.batch_norm(x, *statistics)
        z = F.batch_norm_act(x, *statistics)
    assert len(shortened()) == 2
    assert torch.equal(z, y.relu())


def test_autocast_is_heeded() -> None:
    x, w = torch.randn(2, 8, 6, 6), torch.randn(8, 8, 3, 3)
    half = x.bfloat16(), w.bfloat16()
    for _ in range(6):
        assert F.conv2d(x, w).dtype == torch.float32
        assert F.conv2d(*half).dtype == torch.bfloat16
        with torch.autocast("cpu", torch.bfloat16):
            assert F.conv2d(x, w).dtype == torch.bfloat16
            assert F.conv2d(*half).dtype == torch.bfloat16
        with torch.autocast("cpu", torch.float16):
            assert F.conv2d(*half).dtype == torch.float16


def test_modes_are_heeded() -> None:
    x = torch.randn(2, 8, 6, 6, requires_grad=True)
    for _ in range(6):
        assert F.max_pool2d(x, 2).grad_fn is not None
        with torch.no_grad():
            assert F.max_pool2d(x, 2).grad_fn is None
        with torch.inference_mode():
            assert F.max_pool2d(x, 2).is_inference()
    assert len(shortened()) == 3


def test_transforms_are_heeded() -> None:
    x, w = torch.randn(3, 2, 4, 6, 6), torch.randn(4, 4, 3, 3)
    expected = torch.stack([torch.nn.functional.conv2d(image, w) for image in x])
    tangent = torch.randn(2, 4, 6, 6)
    for _ in range(5):
        F.conv2d(x[0], w)
        mapped = torch.func.vmap(lambda image: F.conv2d(image, w))(x)
        torch.testing.assert_close(mapped, expected, rtol=1e-4, atol=1e-4)
        _, moved = torch.func.jvp(lambda image: F.conv2d(image, w), (x[0],), (tangent,))
        torch.testing.assert_close(moved, F.conv2d(tangent, w), rtol=1e-4, atol=1e-4)
    traced = torch.jit.trace(lambda image: F.conv2d(image, w), (x[0],))
    torch.testing.assert_close(traced(x[1]), expected[1], rtol=1e-4, atol=1e-4)


def test_gradients_of_gradients() -> None:
    """What is recorded by the short way is the same node of the graph."""
    for _ in range(6):
        x = torch.randn(2, 2, 5, 5, dtype=torch.double, requires_grad=True)
        w = torch.randn(2, 2, 3, 3, dtype=torch.double, requires_grad=True)
        y = F.conv2d(x, w, padding=1)
        assert y.grad_fn is not None and y.grad_fn.name() == "_FpropBackward"
        gamma = torch.randn(2, dtype=torch.double, requires_grad=True)
        z = F.batch_norm(y, None, None, gamma, None, True)
        (first,) = torch.autograd.grad((z**3).sum(), x, create_graph=True)
        second = torch.autograd.grad((first**2).sum(), (x, w, gamma))
    assert len(shortened()) >= 2
    alike.forget()
    y = F.conv2d(x, w, padding=1)
    z = F.batch_norm(y, None, None, gamma, None, True)
    (first,) = torch.autograd.grad((z**3).sum(), x, create_graph=True)
    torch.testing.assert_close(second, torch.autograd.grad((first**2).sum(), (x, w, gamma)))


@pytest.mark.parametrize("recorded", [False, True])
def test_memory_that_is_gone(recorded: bool) -> None:
    """A tensor whose storage was given back has its sizes still: it goes the long way, to an error."""
    for _ in range(6):
        x = torch.randn(2, 8, 6, 6)
        F.avg_pool2d(x.requires_grad_(recorded), 2)
    assert shortened()
    x = torch.randn(2, 8, 6, 6).requires_grad_(recorded)
    x.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="expected tensors that have memory, got one of size"):
        F.avg_pool2d(x, 2)


def test_what_does_more_is_not_repeated() -> None:
    """Running statistics of instance norm move behind its operation."""
    ours, theirs = (m.InstanceNorm2d(4, track_running_stats=True) for m in (cnnops.nn, torch.nn))
    for call in range(6):
        x = torch.randn(3, 4, 5, 5) + call
        ours(x), theirs(x)
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)
    torch.testing.assert_close(ours.running_var, theirs.running_var)

"""What must not go wrong, whoever calls and whatever fails: many threads, streams and devices at once; caches
that others may have written, that are read-only, full or damaged; kernels that do not compile; memory that
runs out in the middle of an operation; a CuPy that cannot be imported.

There is no GPU here. A stand-in for CuPy takes down what the launcher asks of it.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import cnnops
from cnnops import cache as cache_module
from cnnops import functional as C
from cnnops import registry
from cnnops.cache import DiskCache
from cnnops.cuda import emulate, jit
from cnnops.cuda.kernel import Launch, launch_of
from cnnops.cuda.target import Target
from cnnops.ops import sync_norm

# ---- a stand-in for CuPy and a machine with two GPUs ------------------------------------------------------


class Machine:
    """Two GPUs, as CuPy and torch show them. A thread's current device and stream are its own."""

    def __init__(self) -> None:
        self.here = threading.local()
        self.loads: Counter[tuple[int, bytes]] = Counter()
        self.limits: dict[tuple[int, str], int] = {}
        self.launches: list[tuple[Any, ...]] = []

    @property
    def device(self) -> int:
        return getattr(self.here, "device", 0)

    @contextmanager
    def on(self, device: int) -> Iterator[None]:
        former, self.here.device = self.device, device
        try:
            yield
        finally:
            self.here.device = former

    def stream(self, device: int) -> int:
        """The address of the thread's stream of the device."""
        return 1000 * (device + 1) + getattr(self.here, "stream", 0)

    def cupy(self) -> dict[str, ModuleType]:
        machine = self

        class Function:
            def __init__(self, module: Module, entry: str) -> None:
                self.module, self.entry, self.ptr = module, entry, id(module)

            def __call__(self, grid: Any, block: Any, args: Any, shared: int, stream: Any) -> None:
                assert self.module.device == machine.device
                limit = machine.limits.get((self.ptr, "shared"), 48 * 1024)
                assert shared <= limit, "CUDA_ERROR_INVALID_VALUE"
                machine.launches.append(
                    (self.module.cubin, machine.device, stream, threading.get_ident(), shared)
                )

        class Module:
            def load(self, cubin: bytes) -> None:
                time.sleep(0.01)  # others get their turn
                self.cubin, self.device = cubin, machine.device
                machine.loads[machine.device, cubin] += 1

            def get_function(self, entry: str) -> Function:
                return Function(self, entry)

        def set_attribute(pointer: int, attribute: str, value: int) -> None:
            time.sleep(0.001)
            machine.limits[pointer, attribute] = value

        cupy, cuda = ModuleType("cupy"), ModuleType("cupy.cuda")
        cupy.cuda = cuda
        cuda.runtime = SimpleNamespace(
            runtimeGetVersion=lambda: 13000, driverGetVersion=lambda: 13000,
            setDevice=lambda index: setattr(machine.here, "device", index),
        )  # fmt: skip
        cuda.driver = SimpleNamespace(
            funcSetAttribute=set_attribute, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES="shared"
        )
        cuda.function = SimpleNamespace(Module=Module)
        cuda.ExternalStream = lambda pointer, index: (pointer, index)
        return {"cupy": cupy, "cupy.cuda": cuda}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machine:
    found = Machine()
    for name, module in found.cupy().items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: found.device)
    monkeypatch.setattr(torch.cuda, "device", found.on)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", found.stream, raising=False)
    monkeypatch.setattr(jit, "of_gpu", lambda index: Target((8, 0), 108))
    monkeypatch.setattr(jit, "nvrtc_version", lambda: (13, 0))
    monkeypatch.setattr(jit, "_require_cuda", lru_cache(None)(jit._require_cuda.__wrapped__))
    for name in ("_module", "_function"):
        again = jit._once(getattr(jit, name).__wrapped__)
        monkeypatch.setattr(jit, name, again)
    monkeypatch.setattr(jit, "_shared_limits", {})
    monkeypatch.setattr(jit, "_cubins", DiskCache("cubin", ".cubin"))
    monkeypatch.setattr(jit, "_caches_ahead", {})
    monkeypatch.setenv("CNNOPS_CACHE_DIR", str(tmp_path / "cache"))
    return found


class Params(ctypes.Structure):
    _fields_ = [("n", ctypes.c_int)]


def plan_of(number: int, shared_bytes: int = 0) -> Launch:
    return launch_of(
        "pool.cu", "avg_pool_fwd", {"NUMBER": number}, Params(number), grid=(1,), block=(32,),
        inputs=("x",), outputs=("y",), shared_bytes=shared_bytes,
    )  # fmt: skip


@pytest.mark.parametrize("disk", ["good", "none"])
def test_eight_threads_two_streams_two_devices(
    disk: str, machine: Machine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Each kernel is compiled once and loaded once a device, each launch goes to its caller's stream."""
    if disk == "none":
        (tmp_path / "cache").touch()
    compiled: Counter[str] = Counter()

    def compile(source: str, constants: Any, arch: str) -> tuple[bytes, str]:
        time.sleep(0.01)
        compiled[str(constants)] += 1
        return str(dict(constants)["NUMBER"]).encode(), ""

    monkeypatch.setattr(jit, "compile_cubin", compile)
    # The same kernel with much and little shared memory: the limit must be there before either runs.
    plans = [plan_of(number, shared) for number in range(3) for shared in (0, 64 << 10, 96 << 10)]
    x, y = torch.zeros(4), torch.zeros(4)
    ready = threading.Barrier(8)

    def call(thread: int) -> list[tuple[bytes, int, Any, int, int]]:
        ready.wait()
        expected = []
        for i in range(60):
            plan, device, stream = plans[(i + thread) % len(plans)], i % 2, i // 2 % 2
            machine.here.stream = stream
            with machine.on((thread + i) % 2):  # whatever device was current before
                jit.execute(plan, (x, y), device)
            cubin = str(dict(plan.kernel.constants)["NUMBER"]).encode()
            at = (1000 * (device + 1) + stream, device)
            expected.append((cubin, device, at, threading.get_ident(), plan.shared_bytes))
        return expected

    with ThreadPoolExecutor(8) as pool, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = [launch for done in pool.map(call, range(8)) for launch in done]
    assert Counter(machine.launches) == Counter(expected)
    assert set(machine.loads.values()) == {1} and len(machine.loads) == 6
    assert len(compiled) == 3 and max(compiled.values()) <= (1 if disk == "good" else 2)


def test_kernel_that_does_not_compile(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The call says so and changes nothing; other kernels run, and this one once it compiles."""

    def refuse(source: str, *_: object) -> tuple[bytes, str]:
        raise jit.CompileError(f"{source}: refused")

    x, y = torch.zeros(4), torch.full((4,), 7.0)
    with monkeypatch.context() as patch:
        patch.setattr(jit, "compile_cubin", refuse)
        for _ in range(2):
            with pytest.raises(jit.CompileError, match="pool.cu: refused"):
                jit.execute(plan_of(1), (x, y), 0)
    assert (y == 7).all() and not machine.launches and not list(tmp_path.glob("cache/cubin/*"))
    monkeypatch.setattr(jit, "compile_cubin", lambda *_: (b"cubin", ""))
    for number in (2, 1):
        jit.execute(plan_of(number), (x, y), 0)
    assert len(machine.launches) == 2


def test_without_nvrtc_what_was_compiled_ahead_runs(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what was not says so, whatever the newest that was made for a driver newer than this one."""
    x, y = torch.zeros(4), torch.zeros(4)
    for version, cubin in (((13, 0), b"ours"), ((14, 0), b"for another driver")):
        monkeypatch.setattr(jit, "nvrtc_version", lambda version=version: version)
        monkeypatch.setattr(jit, "compile_cubin", lambda *_, cubin=cubin: (cubin, ""))
        jit.compile_ahead(plan_of(1).kernel, "80")

    def missing() -> None:
        raise RuntimeError("NVRTC: none")

    monkeypatch.setattr(jit, "nvrtc_version", missing)
    assert jit.unavailable() is None
    jit.execute(plan_of(1), (x, y), 0)
    assert [launch[0] for launch in machine.launches] == [b"ours"]
    said = r"pool.cu \[-DNUMBER=2 .*\] for sm_80: not compiled ahead of time, and NVRTC: none"
    with pytest.raises(RuntimeError, match=said):
        jit.execute(plan_of(2), (x, y), 0)
    shutil.rmtree(os.environ["CNNOPS_CACHE_DIR"])
    assert jit.unavailable() == "NVRTC: none"


def test_one_caller_waits_for_the_other() -> None:
    """And where the first fails, the next one tries again."""
    calls: list[int] = []

    @jit._once
    def slow(number: int) -> object:
        calls.append(number)
        time.sleep(0.01)
        if len(calls) == 1:
            raise ValueError
        return object()

    def ask(_: int) -> object:
        try:
            return slow(5)
        except ValueError:
            return None

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(ask, range(8)))
    assert calls == [5, 5] and found.count(None) == 1 and len(set(found)) == 2


def test_cpu_engine_in_eight_threads() -> None:
    """Forward and backward give every thread the bits that they give one."""

    def step(seed: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(2, 8, 32, 32, generator=generator).requires_grad_()
        gamma = torch.ones(8, requires_grad=True)
        running = torch.zeros(8), torch.ones(8)
        y = C.max_pool2d(C.batch_norm(x, *running, gamma, training=True), 2)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), (x, gamma)), *running]

    expected = [step(seed) for seed in range(8)]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            for found, good in zip(pool.map(step, range(8)), expected, strict=True):
                assert all(torch.equal(a, b) for a, b in zip(found, good, strict=True))


# ---- caches -----------------------------------------------------------------------------------------------

STRANGER = 54321


@pytest.fixture
def cache(tmp_path: Path) -> DiskCache:
    """A cache with the entry "name"."""
    folder = tmp_path / "cache"
    made = DiskCache("things", ".bin", place=lambda: folder)
    made.store("name", b"content")
    return made


def fresh(cache: DiskCache) -> DiskCache:
    return DiskCache("things", ".bin", place=cache._place)


@contextmanager
def one_warning(match: str) -> Iterator[None]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    said = [str(w.message) for w in caught]
    assert len(said) == 1 and match in said[0], said


only_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")


@only_root
@pytest.mark.parametrize("what", ["folder", "file"])
@pytest.mark.parametrize("fault", ["owner", "others", "group"])
def test_what_others_may_have_written_is_not_used(what: str, fault: str, cache: DiskCache) -> None:
    path = cache.folder() if what == "folder" else cache.folder() / "name.bin"
    if fault == "owner":
        os.chown(path, STRANGER, -1)
    else:
        os.chown(path, -1, STRANGER)
        path.chmod(path.stat().st_mode | (0o002 if fault == "others" else 0o020))
    with one_warning(f"{path}: expected to be written by this user or root alone, got owner"):
        assert cache.find("name") is None
        assert cache.find("name") is None
    if what == "folder":  # nothing is put there either
        before = sorted(path.iterdir())
        with one_warning("cannot be kept, later processes compile them again"):
            assert fresh(cache).kept("name", lambda: b"own") == (b"own", False)
        with one_warning("cannot be kept, later processes compile them again"):
            built = fresh(cache).entry(f"by-{fault}", lambda p: p.write_bytes(b"own") and None)
        assert sorted(path.iterdir()) == before and path not in built.parents
    else:  # replaced by one's own
        assert cache.kept("name", lambda: b"own") == (b"own", False)
        assert fresh(cache).kept("name", lambda: b"again") == (b"own", True)


@only_root
def test_root_is_trusted_and_so_is_its_group(
    cache: DiskCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in images: built by root, run as any user, who may be in root's group."""
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    cache.folder().chmod(0o775)
    assert cache.find("name") == b"content"


@only_root
def test_a_cache_of_roots_serves_another_user(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who reads what he is let see, and is told once that he keeps nothing."""
    once = lru_cache(None)(cache_module._folder_of_this_process.__wrapped__)
    monkeypatch.setattr(cache_module, "_folder_of_this_process", once)
    with tempfile.TemporaryDirectory() as root:
        os.chmod(root, 0o755)
        cache = DiskCache("things", ".bin", place=lambda: Path(root))
        cache.store("name", b"content")
        os.seteuid(STRANGER)
        try:
            with one_warning("Permission denied"):
                assert cache.kept("name", lambda: b"own") == (b"content", True)
                assert cache.kept("new", lambda: b"own") == (b"own", False)
                built = cache.entry("built", lambda p: p.write_bytes(b"own") and None)
            assert built.read_bytes().startswith(b"own")
        finally:
            os.seteuid(0)
        assert os.listdir(root) == ["name.bin"]


@pytest.mark.parametrize("damage", [b"", b"short", b"content" + b"\0" * 32])
def test_damaged_entries_are_made_again(damage: bytes, cache: DiskCache) -> None:
    (cache.folder() / "name.bin").write_bytes(damage)
    assert cache.find("name") is None
    assert cache.kept("name", lambda: b"new") == (b"new", False)
    assert fresh(cache).kept("name", lambda: b"newer") == (b"new", True)


def test_full_disk(cache: DiskCache, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was there is used, the rest is made; a file that must be there goes elsewhere."""
    write = Path.write_bytes

    def full(path: Path, content: bytes) -> int:
        if cache.folder() in path.parents:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    assert cache.find("name") == b"content"
    with one_warning("No space left on device"):
        assert cache.kept("new", lambda: b"new") == (b"new", False)
        path = cache.entry("built", lambda p: p.write_bytes(b"built") and None)
    assert path.read_bytes().startswith(b"built") and cache.folder() not in path.parents
    assert [p.name for p in cache.folder().iterdir()] == ["name.bin"]


def test_what_killed_processes_left_goes(cache: DiskCache) -> None:
    """But not what another process may be writing right now."""
    old, new = (cache.folder() / f".building-{name}" for name in ("old", "new"))
    for path in (old, new):
        path.mkdir()
        (path / "entry.bin").touch()
    os.utime(old, (0, 0))
    cache.store("other", b"content")
    assert sorted(p.name for p in cache.folder().iterdir()) == [new.name, "name.bin", "other.bin"]


def test_kept_by_many_threads(cache: DiskCache) -> None:
    def keep(number: int) -> bytes:
        return cache.kept(f"entry{number % 4}", lambda: b"%d" % (number % 4))[0]

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(keep, range(200))) == [b"%d" % (n % 4) for n in range(200)]
    counts = cache.stats()
    assert counts["compiled"] + counts["loaded_from_cache"] == 200 and counts["compiled"] >= 4
    assert len(list(cache.folder().iterdir())) == 5


# ---- memory that runs out --------------------------------------------------------------------------------


class Short(TorchDispatchMode):
    """Memory for so many new tensors; then it is out."""

    def __init__(self, tensors: int) -> None:
        super().__init__()
        self.left = tensors

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returned = func._schema.returns
        if any(r.alias_info is None and "Tensor" in str(r.type) for r in returned):
            self.left -= 1
            if self.left < 0:
                raise torch.OutOfMemoryError("CUDA out of memory")
        return func(*args, **(kwargs or {}))


def _inputs(*sizes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(size).requires_grad_() for size in sizes]


class Case:
    """An operation, the tensors that it has gradients of, and the module or statistics that it moves."""

    def __init__(
        self, call: Callable[..., Tensor], *sizes: tuple[int, ...], layer: nn.Module | None = None
    ) -> None:
        self.call, self.sizes, self.layer = call, sizes, layer

    def state(self) -> list[Tensor]:
        return [] if self.layer is None else [*self.layer.parameters(), *self.layer.buffers()]

    def moves(self) -> list[Tensor]:
        """What a step in training changes. Instance norm counts no batches, in PyTorch neither."""
        counts = not isinstance(self.layer, nn.InstanceNorm2d)
        named = [] if self.layer is None else self.layer.named_buffers()
        return [t for name, t in named if counts or "num_batches" not in name]


def _layer(layer: nn.Module, *sizes: tuple[int, ...]) -> Case:
    return Case(layer, *sizes, layer=layer)


def _fused() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU())
    return cnnops.convert(model, fuse_training=True).model


def _count(values: int) -> Tensor:
    return torch.tensor(float(values), dtype=torch.float64)


def _synchronised() -> Case:
    of = cnnops.nn.InstanceNorm2d(4, affine=True, track_running_stats=True)

    def call(x: Tensor) -> Tensor:
        tensors = (of.running_mean, of.running_var, of.weight, of.bias)
        return sync_norm.sync_batch_norm(x, *tensors, 0.1, 1e-5, None, "relu", None)

    return Case(call, X, layer=of)


X, HALF = (2, 4, 8, 8), (2, 6, 8, 8)
OPERATIONS: dict[str, Callable[[], Case]] = {
    "conv": lambda: Case(lambda x, w, b: C.conv2d(x, w, b, 1, 1), X, (6, 4, 3, 3), (6,)),
    "conv_reflect": lambda: _layer(cnnops.nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), X),
    "conv_transpose": lambda: Case(
        lambda x, w, b: C.conv_transpose2d(x, w, b, 2), X, (4, 6, 3, 3), (6,)
    ),
    "conv_act": lambda: Case(
        lambda x, w, b, r: C.conv_act(x, w, b, padding=1, residual=r, activation="relu"),
        X, (6, 4, 3, 3), (6,), HALF,
    ),
    "max_pool": lambda: Case(lambda x: C.max_pool2d(x, 2), X),
    "avg_pool": lambda: Case(lambda x: C.avg_pool2d(x, 3, 2, 1), X),
    "adaptive": lambda: Case(lambda x: C.adaptive_avg_pool2d(x, 3), X),
    "group_norm": lambda: Case(lambda x, w, b: C.group_norm(x, 2, w, b), X, (4,), (4,)),
    "layer_norm": lambda: Case(lambda x, w, b: C.layer_norm(x, (8,), w, b), X, (8,), (8,)),
    "batch_norm": lambda: _layer(cnnops.nn.BatchNorm2d(4), X),
    "batch_norm_act": lambda: _layer(cnnops.nn.BatchNormAct2d(4, activation="silu"), X, X),
    "cumulative": lambda: _layer(cnnops.nn.BatchNorm2d(4, momentum=None), X),
    "instance_norm": lambda: _layer(
        cnnops.nn.InstanceNorm2d(4, affine=True, track_running_stats=True), X
    ),
    "conv_batch_norm": lambda: _layer(_fused(), X),
    "sync_batch_norm": _synchronised,
}  # fmt: skip


def _ran(plan: Launch, tensors: Any) -> None:
    """In the emulator's place: results and statistics change."""
    for name, tensor in zip(plan.names, tensors, strict=True):
        if tensor is not None and name not in plan.inputs:
            with torch.no_grad():
                tensor.add_(1) if name in plan.updates else tensor.fill_(1)


@pytest.mark.parametrize("engine", ["emulate", "aten"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_out_of_memory_leaves_everything_as_it_was(
    operation: str, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever it happens, in the forward or the backward; and when there is memory again, all goes on."""
    monkeypatch.setattr(emulate, "execute", _ran)
    # A group of this process alone.
    monkeypatch.setattr(
        sync_norm, "_merged", lambda n, mean, var, group: (_count(n), mean.double(), var.double())
    )
    monkeypatch.setattr(sync_norm.dist, "all_reduce", lambda sums, group: None)
    monkeypatch.setattr(
        cnnops.ops, "eager", lambda arguments: True
    )  # `Short` is no reason to go round
    case = OPERATIONS[operation]()
    tensors = _inputs(*case.sizes)
    leaves = [*tensors, *(p for p in case.state() if p.requires_grad)]
    watched = [*tensors, *case.state()]
    saw = {"forward": 0, "backward": 0}
    with cnnops.engine(engine):
        for part in saw:
            for allowed in range(200):
                before = [t.detach().clone() for t in watched]
                try:
                    if part == "forward":
                        with Short(allowed):
                            case.call(*tensors)
                    else:
                        y = case.call(*tensors)
                        before = [t.detach().clone() for t in watched]
                        grad = torch.ones_like(y)
                        with Short(allowed):
                            torch.autograd.grad(y, leaves, grad)
                except torch.OutOfMemoryError:
                    saw[part] += 1
                    same = [torch.equal(a, b) for a, b in zip(watched, before, strict=True)]
                    assert all(same), (part, allowed)
                    assert all(t.grad is None for t in watched)
                    continue
                if part == "forward":  # this time statistics did move
                    for t, former in zip(watched, before, strict=True):
                        assert torch.equal(t, former) != any(t is m for m in case.moves())
                break
            else:
                raise AssertionError("it never ends")
    assert saw["forward"] >= 1 and saw["backward"] >= 1


# ---- a CuPy that does not work ---------------------------------------------------------------------------


@pytest.fixture
def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """A machine with a GPU on which ``import cupy`` runs this code."""

    def put(code: str) -> None:
        (tmp_path / "cupy").mkdir()
        (tmp_path / "cupy" / "__init__.py").write_text(code)

    for name in [name for name in sys.modules if name.partition(".")[0] == "cupy"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(
        registry, "_engine_of_gpus", lru_cache(None)(registry._engine_of_gpus.__wrapped__)
    )
    registry._warn_once.cache_clear()
    return put


@pytest.mark.parametrize(
    "code, said",
    [
        ("raise ImportError('libcublas.so.13: cannot open shared object file')", "ImportError: libcublas"),
        ("raise ValueError('numpy.dtype size changed')", "ValueError: numpy.dtype size changed"),
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("", "AttributeError: module 'cupy' has no attribute 'cuda'"),
    ],
)  # fmt: skip
def test_broken_cupy_is_said_once(code: str, said: str, broken: Callable[[str], None]) -> None:
    """A GPU's tensors go to PyTorch's own operations, a CPU's to the engine `cpu`."""
    broken(code)
    gpu, cpu = torch.device("cuda:0"), torch.device("cpu")
    with cnnops.fallback("error"):
        with pytest.raises(
            registry.UnsupportedError, match="engine 'cuda' does not work here: CuPy"
        ):
            registry.engine_for(gpu)
        assert registry.engine_for(cpu) == "cpu"
    with cnnops.fallback("warn"), one_warning(f"CuPy cannot be imported ({said}"):
        assert [registry.engine_for(device) for device in (gpu, cpu, gpu)] == [
            "aten",
            "cpu",
            "aten",
        ]
        y = C.avg_pool2d(torch.ones(1, 1, 4, 4), 2)
    assert (y == 1).all()
    assert f"({said}" in (jit.unavailable() or "") and "pip install" in (jit.unavailable() or "")
    with cnnops.engine("cuda"):  # by name there is no way round it
        assert registry.engine_for(gpu) == "cuda"

"""``cnnops compile --arch``: that it compiles the kernels a GPU will ask for, and that processes find them.

There is no GPU here: tensors on the CPU stand for one of an architecture, launches are planned for it and do
not run, and what they would load is looked for in the cache.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from igemm import tf32
from torch import Tensor, nn

import cnnops
from cnnops import info, precompile, tuned
from cnnops.__main__ import main
from cnnops.cuda import jit
from cnnops.cuda.kernel import Kernel
from cnnops.cuda.launch import trace
from cnnops.cuda.target import Target, standing_for
from cnnops.epilogue import Epilogue
from cnnops.precompile import kernels_of, problems_of
from cnnops.problems import Like, Network, Problem
from cnnops.shapes import ConvShape, LayerShape, NormShape
from cnnops.tuned import Entry

pytest.importorskip("cuda.bindings.nvrtc", reason="NVRTC is missing: pip install 'cnnops[test]'")


def make() -> nn.Module:
    """A network of somebody's own: strides, groups, a residual, norms of three kinds, both poolings."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(16, 16, 3, padding=1, bias=False)
            self.norm = nn.BatchNorm2d(16)
            self.depthwise = nn.Conv2d(16, 16, 5, padding=2, groups=16)

        def forward(self, x: Tensor) -> Tensor:
            return self.depthwise(torch.relu(self.norm(self.conv(x)) + x))

    return nn.Sequential(
        nn.Conv2d(3, 16, 7, 2, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(3, 2, 1), Block(),
        nn.GroupNorm(4, 16), nn.Conv2d(16, 64, 1), nn.InstanceNorm2d(64), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.LayerNorm(64), nn.Linear(64, 10),
    )  # fmt: skip


def make_volumes() -> nn.Module:
    return nn.Sequential(nn.Conv3d(2, 8, 3), nn.BatchNorm3d(8), nn.ReLU())


SIZE = (3, 32, 32)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache directory."""
    monkeypatch.setenv("CNNOPS_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(jit, "_caches_ahead", {})
    return tmp_path / "cache"


@pytest.fixture
def compiled(cache: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What was asked of NVRTC, which does nothing: sources and architectures."""
    asked: list[tuple[str, str]] = []

    def compile(source: str, constants: object, arch: str) -> tuple[bytes, str]:
        asked.append((source, arch))
        return f"{source} {constants} {arch}".encode(), ""

    monkeypatch.setattr(jit, "compile_cubin", compile)
    return asked


# ---- which kernels ---------------------------------------------------------------------------------------


def launched(
    network: nn.Module, dtype: torch.dtype, autocast: bool, last: bool, train: bool
) -> set[tuple[str, tuple[tuple[str, str | int], ...]]]:
    """Sources and constants of a real training step, and of inference, with real tensors; a batch of 7."""
    form = torch.channels_last if last else torch.contiguous_format
    network = network.to(torch.float32 if autocast else dtype).to(memory_format=form)
    x = torch.randn((7, *SIZE), dtype=next(network.parameters()).dtype)
    x = x.contiguous(memory_format=form)
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    with trace(run=False) as launches, cnnops.engine("emulate"):
        for _ in range(2 if train else 0):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype, enabled=autocast):
                y = network.train()(x)
                loss = nn.functional.cross_entropy(y.float(), torch.zeros(7, dtype=torch.long))
            loss.backward()
            optimizer.step()
        with torch.no_grad(), torch.autocast("cpu", dtype, enabled=autocast):
            network.eval()(x)
    return {(launch.kernel.source, launch.kernel.constants) for launch in launches}


@pytest.fixture(scope="module")
def problems() -> dict[Problem, None]:
    return problems_of(Network("make", make(), SIZE), precompile.DTYPES["cuda"])


@pytest.mark.parametrize("arch", ["80", "90a", "120a"])
def test_every_kernel_of_a_training_step_is_among_them(
    arch: str, problems: dict[Problem, None]
) -> None:
    found = set(kernels_of(problems, (7,), arch))
    forms = {
        "converted": cnnops.convert(make()).model,
        "fused for training": cnnops.convert(make(), fuse_training=True).model,
        "fused for inference": cnnops.fuse(make().eval()).model,
    }
    ways = [(dtype, False) for dtype in precompile.DTYPES["cuda"]]
    ways += [(torch.float16, True), (torch.bfloat16, True)]
    used = set()
    with standing_for(Target.of_arch(arch)):
        for name, form in forms.items():
            train = name != "fused for inference"
            for dtype, autocast in ways:
                for last in (False, True):
                    now = launched(form, dtype, autocast, last, train)
                    if dtype == torch.float32:
                        with tf32():
                            now |= launched(form, dtype, autocast, last, train)
                    assert now <= found, (name, dtype, autocast, last)
                    used |= now
    sources = {source for source, _ in used}
    assert ("conv_igemm_sm90.cu" in sources) == (arch == "90a")
    assert sources >= {
        "conv_direct.cu",
        "conv_igemm.cu",
        "conv_depthwise.cu",
        "pool.cu",
        "batch_norm.cu",
    }
    assert len(used) > len(found) / 2  # and not many that nobody asks for


def test_architectures_differ_in_what_they_launch(problems: dict[Problem, None]) -> None:
    constants = {arch: set(kernels_of(problems, (32,), arch)) for arch in ("80", "86", "90a")}
    clusters = {
        arch: any(dict(c).get("CLUSTER", 1) != 1 for _, c in found)
        for arch, found in constants.items()
    }
    assert clusters == {"80": False, "86": False, "90a": True}
    assert constants["90a"] - constants["80"]


def test_multiprocessors_make_no_difference(
    problems: dict[Problem, None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An H100 PCIe has 114 of them, an H200 132."""
    found = kernels_of(problems, (32,), "90a")
    smaller = classmethod(lambda cls, arch: cls((9, 0), 114))
    monkeypatch.setattr(Target, "of_arch", smaller)
    assert kernels_of(problems, (32,), "90a") == found


def test_what_tables_name_is_compiled_too(tmp_path: Path, problems: dict[Problem, None]) -> None:
    """A table of a GPU that is not here; of other kernels than these it would say nothing."""
    problem = next(p for p in problems if p.op == "batch_norm_train")
    at = problem.at(4)
    tensors = [t for t in at.tensors("meta") if isinstance(t, Tensor) and t.dim() > 1]
    words = [a for a in at.arguments if isinstance(a, str) and a != "none"]
    layout = tuned.layout([t.shape for t in tensors], [t.stride() for t in tensors], words)
    entry = Entry(
        at.op, tuned.problem(at.shape), tuned.dtype_name(at.dtype), layout, "batch_norm", "held/16",
        {"batch_norm:held/16": 1e-6}, "2026-01-01T00:00:00",
    )  # fmt: skip
    path = tuned.save([entry], "cuda", "NVIDIA of another machine", tmp_path / "table.json")
    with tuned.only(path):
        assert tuned.gpus_known() == ["NVIDIA of another machine"]
        more = set(kernels_of([problem], (4,), "90a"))
    fewer = set(kernels_of([problem], (4,), "90a"))
    assert fewer < more and any(
        dict(constants).get("CLUSTER") == 16 for _, constants in more - fewer
    )


def test_problems_at_another_batch() -> None:
    """Tensors as large as the problem's follow it, channels-last or not, and those of an epilogue."""
    shape = ConvShape.of((2, 3, 8, 8), (4, 3, 3, 3), padding=1)
    x = torch.empty(3, 3, 8, 8).contiguous(memory_format=torch.channels_last)[1:]
    y = torch.empty(2, 4, 8, 8, dtype=torch.bfloat16)
    w = torch.empty(4, 3, 3, 3)
    arguments = tuple(map(Like.of, (x, w, None, y, Epilogue(None, y, "relu"))))
    at = Problem("conv_fprop", shape, torch.float32, arguments).at(32)
    assert at.shape == ConvShape.of((32, 3, 8, 8), (4, 3, 3, 3), padding=1)
    at_x, at_w, nothing, at_y, epilogue = at.tensors("meta")
    assert at_x.shape == (32, 3, 8, 8) and at_x.stride() == x.stride() and nothing is None
    assert at_x.storage_offset() == x.storage_offset() == 192
    assert at_y.shape == (32, 4, 8, 8) and at_y.dtype == y.dtype and at_w.shape == w.shape
    assert epilogue.residual.shape == (32, 4, 8, 8) and epilogue.activation == "relu"
    layers = Problem("layer_norm_fwd", LayerShape((2, 7), (5,)), torch.float32, ())
    assert layers.at(1).shape == LayerShape((1, 7), (5,))


def test_networks_of_three_axes() -> None:
    problems = problems_of(Network("volumes", make_volumes(), (2, 6, 6, 6)), (torch.float32,))
    images = {p.arguments[0].stride for p in problems if isinstance(p.shape, NormShape)}
    assert {"conv_fprop", "conv_wgrad", "batch_norm_train", "batch_norm_bwd"} <= {
        p.op for p in problems
    }
    assert {stride[1] for stride in images} == {1, 64}  # both layouts


# ---- that they are found ---------------------------------------------------------------------------------

PROGRAM = """
import sys
sys.modules["cuda.bindings.nvrtc"] = None  # as where it is not installed
import torch, cnnops
from cnnops.cuda import jit
from cnnops.cuda.launch import trace
from cnnops.cuda.target import Target, standing_for
from cnnops.models import LeNet5
network = LeNet5()
with standing_for(Target.of_arch("90a")), cnnops.engine("emulate"), trace(run=False) as launches:
    x = torch.randn(4, 1, 28, 28)
    torch.nn.functional.cross_entropy(network(x), torch.zeros(4, dtype=torch.long)).backward()
    with torch.no_grad():
        cnnops.fuse(network.eval()).model(x)
cubins = {jit.cubin_for(launch.kernel, "90a") for launch in launches}
assert all(cubin.startswith(b"\\x7fELF") for cubin in cubins)
print(len(cubins), *jit.stats().values())
try:
    jit.cubin_for(launches[0].kernel, "80")
except RuntimeError as error:
    print(error)
"""


@pytest.mark.slow
def test_a_process_that_is_pointed_at_it_compiles_nothing(tmp_path: Path) -> None:
    """Real cubins, by the command line; found by a process that has no NVRTC at all. Neither imports what
    lies where it is started."""
    for name in ("cuda", "llvmlite", "numba", "numpy", "platformdirs", "rich", "lenet5"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit(f'{__file__} was imported')")
    environment = {**os.environ, "CNNOPS_CACHE_DIR": str(tmp_path / "cache")}
    environment["PYTHONPATH"] = str(Path(cnnops.__file__).resolve().parents[1])
    command = "-m cnnops compile --model lenet5 --batch 4 --arch 90a --dtype float32"

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-P", *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    said = run(*command.split())
    kept = list(tmp_path.glob("cache/ahead-nvrtc*/*"))
    size = sum(path.stat().st_size - 32 for path in kept) / 1e6
    counted = f"{len(kept)} kernels compiled, 0 found in the cache, {size:.1f} MB, "
    assert said.startswith(counted) and said.endswith(f" s: {tmp_path / 'cache'}\n")
    assert {path.suffix for path in kept} == {".cubin"}
    counts, missing = run("-c", PROGRAM).splitlines()
    used, made, found, seconds, _ = map(float, counts.split())
    assert made == 0 and seconds == 0 and found >= used > 10
    assert re.match(
        r"\w+.cu \[.*\] for sm_80: not compiled ahead of time, and NVRTC: expected", missing
    )


def test_named_by_module_and_kept_privately(
    cache: Path, compiled: list[tuple[str, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    command = "compile test_ahead:make --input 3,32,32 --arch 80 90a --dtype bfloat16 --batch 2"
    assert main(command.split()) == 0
    out, err = capsys.readouterr()
    assert err == "" and out.startswith(f"{len(compiled)} kernels compiled, 0 found in the cache, ")
    (folder,) = cache.iterdir()
    assert folder.name == "ahead-nvrtc{}.{}".format(*jit.nvrtc_version())
    assert {path.stat().st_mode & 0o777 for path in (cache, folder)} == {0o700}
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o644}
    assert len(list(folder.iterdir())) == len(compiled) == len(set(folder.iterdir()))
    assert {arch for _, arch in compiled} == {"80", "90a"}
    assert info.cached_kernels()["ahead"] == (folder, len(compiled))
    again = len(compiled)
    assert main(command.split()) == 0 and len(compiled) == again
    assert capsys.readouterr().out.startswith(
        f"0 kernels compiled, {again} found in the cache, 0.0 MB"
    )


def test_another_nvrtc(
    cache: Path, compiled: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was compiled ahead serves whatever NVRTC a process has; the newest that the driver can load."""
    kernel = Kernel("pool.cu", "avg_pool_fwd", (("WINDOW", 2),))

    def nvrtc(major: int, minor: int) -> None:
        monkeypatch.setattr(jit, "nvrtc_version", lambda: (major, minor))
        monkeypatch.setattr(
            jit, "compile_cubin", lambda *_: (b"made by %d.%d" % (major, minor), "")
        )

    for version in ((12, 9), (13, 0), (12, 10)):
        nvrtc(*version)
        assert jit.compile_ahead(kernel, "80") > 0 and jit.compile_ahead(kernel, "80") == 0
    nvrtc(14, 0)
    assert jit.cubin_for(kernel, "80") == b"made by 13.0"
    assert jit.cubin_for(kernel, "80", newest=12) == b"made by 12.10"
    assert jit.cubin_for(kernel, "80", newest=11) == b"made by 14.0"  # there and then
    assert jit.cubin_for(kernel, "86") == b"made by 14.0"  # of another architecture there is none
    nvrtc(14, 1)
    assert jit.cubin_for(kernel, "86") == b"made by 14.1"  # and a newer compiler is not passed by


def test_damaged_ones_are_compiled_again(cache: Path, compiled: list[tuple[str, str]]) -> None:
    kernel = Kernel("pool.cu", "avg_pool_fwd", (("WINDOW", 2),))
    jit.compile_ahead(kernel, "80")
    (path,) = cache.glob("ahead-*/*")
    path.write_bytes(path.read_bytes()[:-1])
    assert jit.cubin_ahead(kernel, "80") is None
    assert jit.cubin_for(kernel, "80") and len(compiled) == 2
    jit.compile_ahead(kernel, "80")
    assert jit.cubin_ahead(kernel, "80") is not None


# ---- what may go wrong -----------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One kernel for any network."""
    monkeypatch.setattr(precompile, "problems_of", lambda network, dtypes: {})
    monkeypatch.setattr(precompile, "kernels_of", lambda *_: [("pool.cu", (("WINDOW", 2),))])
    yield


@pytest.mark.parametrize(
    "line, said",
    [
        ("lenet5", "expected --cpu, --arch or both, got neither"),
        ("--arch 90", "--arch: expected some of 80 86 .*90a .*, got '90'"),
        ("--arch 75 lenet5", "--arch: expected some of 80 .*, got '75'"),
        ("lenet6 --arch 80", "MODEL: expected package.module:callable or one of lenet5.*, got 'lenet6'"),
        ("--arch 80 --model no_such:thing", "MODEL 'no_such:thing': ModuleNotFoundError: .*"),
        ("test_ahead:make --arch 80", "MODEL 'test_ahead:make': expected --input C,H,W, as the .*"),
        ("test_ahead:make --arch 80 --input 3,x", "--input: expected sizes as in 3,224,224, got '3,x'"),
        ("test_ahead:make --arch 80 --input 9,32,32", "MODEL 'test_ahead:make': RuntimeError: .*"),
        ("lenet5 --arch 80 --dtype half", "--dtype: expected some of float32,float16,bfloat16, got 'half'"),
        ("lenet5 --cpu --batch 0", "--batch: expected positive numbers as in 1,32, got '0'"),
        ("lenet5 --cpu --batch 1,,2", "--batch: expected positive numbers as in 1,32, got '1,,2'"),
    ],
)  # fmt: skip
def test_mistakes_are_said_in_a_line(
    line: str, said: str, cache: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["compile", *line.split()]) == 2
    out, err = capfd.readouterr()
    assert out == "" and re.fullmatch(f"cnnops compile: {said}\n", err), err
    assert not list(cache.glob("*/*"))


def test_a_kernel_that_is_refused(
    cache: Path, quick: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(source: str, *_: object) -> tuple[bytes, str]:
        raise jit.CompileError(f"{source}(7): error")

    monkeypatch.setattr(jit, "compile_cubin", refuse)
    assert main("compile lenet5 --arch 80".split()) == 1
    assert capsys.readouterr() == ("", "cnnops compile: pool.cu(7): error\n")
    assert not list(cache.glob("*/*"))


def test_where_nothing_can_be_kept(
    tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("CNNOPS_CACHE_DIR", str(tmp_path / "file"))
    assert main("compile lenet5 --arch 80".split()) == 1
    out, err = capsys.readouterr()
    assert out == "" and re.fullmatch(r"cnnops compile: \[Errno 17\] File exists: '.*/file'\n", err)


def test_without_nvrtc(
    cache: Path, quick: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import cuda.bindings

    monkeypatch.delattr(cuda.bindings, "nvrtc", raising=False)
    monkeypatch.setitem(sys.modules, "cuda.bindings.nvrtc", None)
    monkeypatch.setattr(jit, "nvrtc_version", jit.nvrtc_version.__wrapped__)
    assert main("compile lenet5 --arch 80".split()) == 1
    assert "cnnops compile: NVRTC: expected the package" in capsys.readouterr().err

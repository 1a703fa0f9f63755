"""`cnnops.tune` and the tables that remember it. Nothing is timed: tests say what each candidate took."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import warnings
from argparse import ArgumentParser
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from cases import ENGINES, TOLERANCE, assert_close, device_of, laid_out, needs_emulator, normal
from networks import UNet
from torch import Tensor

import cnnops
from cnnops import registry, tuned, tuning
from cnnops.cuda import conv_direct, implicit_gemm
from cnnops.cuda.launch import trace
from cnnops.registry import Row
from cnnops.shapes import ConvShape, GroupShape, LayerShape, NormShape, PoolShape, UnpoolShape
from cnnops.tuned import Entry

SHAPE = ConvShape.of((4, 3, 8, 8), (6, 3, 3, 3))
HERE = tuned.device_name("cpu")


def entry(
    seconds: Mapping[str, float],
    shape: tuned.Shape = SHAPE,
    op: str = "conv_fprop",
    layout: str = "3 contiguous",
    date: str = "2026-11-21T10:00:00Z",
) -> Entry:
    winner = tuned.fastest(seconds) or ""
    algorithm, _, variant = winner.partition(":")
    return Entry(
        op, tuned.problem(shape), "float32", layout, algorithm, variant, dict(seconds), date
    )


ATEN_WINS = {"conv": 3e-4, "aten": 1e-4}
CONV_WINS = {"conv": 1e-4, "aten": 3e-4}


def saved(path: Path, *entries: Entry, engine: str = "cpu", **header: str) -> Path:
    """A table at `path`; `header` replaces parts of what is written there."""
    device = tuned.device_name(engine)
    tuned.save(entries, engine, device, path)
    if header:
        path.write_text(json.dumps(json.loads(path.read_text()) | header))
        tuned.forget()
    return path


def chosen(
    shape: ConvShape = SHAPE, engine: str = "cpu", last: bool = False, policy: str = "auto"
) -> str:
    """The algorithm that a forward convolution of this shape would be computed by."""
    form = torch.channels_last if last else torch.contiguous_format
    x, w, y = (
        torch.empty(s, memory_format=form) for s in (shape.x_size, shape.w_size, shape.y_size)
    )
    choice = registry._choose("conv_fprop", engine, "", shape, torch.float32, policy)
    return choice.settled((x, w, None, y)).row.algorithm


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Tables are looked for as they are outside of tests, in a cache directory of the test's own."""
    monkeypatch.setenv("CNNOPS_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(tuned, "_only", None)
    tuned._warn_once.cache_clear()
    tuned.forget()
    yield tmp_path / "cache" / "tuned"
    monkeypatch.undo()
    tuned._warn_once.cache_clear()
    tuned.forget()


def told(monkeypatch: pytest.MonkeyPatch, seconds: Callable[[str], float]) -> list[tuple[str, ...]]:
    """Candidates take what `seconds` says of their names. Returns the list of who was measured."""
    measured: list[tuple[str, ...]] = []

    def measure(calls: Mapping[str, Any], budget: float) -> dict[str, float]:
        measured.append(tuple(calls))
        return {name: seconds(name) for name in calls}

    monkeypatch.setattr(tuning, "measurer", lambda engine, device: measure)
    return measured


def aten_wins(name: str) -> float:
    return 1e-4 if name == "aten" else 2e-4


def python(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# ---- keys ------------------------------------------------------------------------------------------------


def test_problem_is_text_of_every_size() -> None:
    conv = ConvShape.of((2, 4, 9, 7), (8, 2, 3, 5), None, (2, 1), ((1, 1), (0, 2)), 1, 2)
    assert tuned.problem(conv) == (
        "N=2 C=4 K=8 spatial=9x7 kernel=3x5 stride=2x1 padding=1x0:2 groups=2"
    )
    pool = PoolShape.of((2, 4, 9, 7), 2, ceil_mode=True)
    assert tuned.problem(pool) == "N=2 C=4 spatial=9x7 kernel=2x2 stride=2x2 ceil_mode=True"
    assert tuned.problem(NormShape(3, 5, (2, 2))) == "N=3 C=5 spatial=2x2"
    assert tuned.problem(NormShape(3, 5, ())) == "N=3 C=5"
    assert tuned.problem(GroupShape(3, 6, (4,), 2)) == "N=3 C=6 spatial=4 groups=2"
    assert tuned.problem(LayerShape((3, 4), (5, 6))) == "N=12 normalized=5x6"
    assert tuned.problem(UnpoolShape(2, 3, (4, 4), (8, 9))) == "N=2 C=3 spatial=4x4 output=8x9"
    every = [conv, replace(conv, padding=((0, 2), (1, 1))), replace(conv, dilation=(2, 1)), pool]
    every += [replace(pool, ceil_mode=False), replace(pool, count_include_pad=False)]
    assert len({tuned.problem(shape) for shape in every}) == len(every)


@pytest.mark.parametrize(
    "sizes, layouts, expected",
    [
        (((2, 4, 3, 3), (5, 4, 1, 1)), ("contiguous", "contiguous"), "2 contiguous"),
        (((2, 4, 3, 3), (5, 4, 3, 3)), ("channels_last", "channels_last"), "2 channels_last"),
        (((2, 4, 3, 3), (5, 4, 1, 1)), ("channels_last", "contiguous"), "2 channels_last"),
        (((2, 4, 3, 3), (5, 4, 3, 3)), ("channels_last", "contiguous"), "channels_last contiguous"),
        (((2, 4, 3, 3), (2, 1, 3, 3)), ("sliced", "contiguous"), "strided contiguous"),
        (((2, 4, 3, 3),), ("expanded",), "strided"),
        (((2, 4, 3, 3),), ("offset",), "1 contiguous"),
    ],
)
def test_layout(sizes: Any, layouts: Any, expected: str) -> None:
    tensors = [laid_out(s, how, torch.ones) for s, how in zip(sizes, layouts, strict=True)]
    per_channel = torch.ones(4)
    assert tuned.layout_of([*tensors, None, per_channel, 0.1, "none"]) == expected
    assert tuned.layout_of([*tensors, "relu", True]) == f"{expected} relu"


def test_a_later_candidate_must_be_clearly_faster() -> None:
    assert tuned.fastest({"a": 1.0, "b": 0.98}) == "a"
    assert tuned.fastest({"a": 1.0, "b": 0.98, "c": 0.9}) == "c"
    assert tuned.fastest({}) is None


# ---- tables ----------------------------------------------------------------------------------------------


def test_policy(tmp_path: Path) -> None:
    both = saved(tmp_path / "t.json", entry(ATEN_WINS))
    with tuned.only(both):
        assert chosen() == "aten"
        assert chosen(policy="own") == "conv"
    assert chosen() == "conv"
    with cnnops.policy("auto"):
        assert cnnops.config.settings.policy == "auto"
    assert cnnops.config.settings.policy == "own"
    with pytest.raises(ValueError, match="policy: expected one of auto, own, got 'best'"):
        cnnops.policy("best")
    code = "from cnnops.config import settings; print(settings.policy)"
    assert python(code, CNNOPS_POLICY="") == "auto"
    assert python(code, CNNOPS_POLICY="own") == "own"


def test_the_emulator_never_runs_pytorch_by_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    seconds = {"conv_direct": 3e-4, "conv_im2col": 2e-4, "aten": 1e-4}
    with tuned.only(saved(tmp_path / "t.json", entry(seconds), engine="emulate")):
        assert chosen(engine="emulate") == "conv_im2col"
        assert chosen(engine="cuda") == "aten"
        tuned.forget()
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
        assert (
            chosen(engine="cuda") == "conv_im2col"
        )  # it was not with TF32 that PyTorch was measured


def test_algorithm_goes_before_the_table(tmp_path: Path) -> None:
    seconds = {"conv_direct": 1e-4, "conv_im2col": 2e-4}
    table = saved(tmp_path / "t.json", entry(seconds), engine="emulate")
    with tuned.only(table):
        for wish, runs in (("", "conv_direct"), ("conv_im2col", "conv_im2col")):
            choice = registry._choose("conv_fprop", "emulate", wish, SHAPE, torch.float32)
            x, w, y = (torch.empty(s) for s in (SHAPE.x_size, SHAPE.w_size, SHAPE.y_size))
            assert choice.settled((x, w, None, y)).row.algorithm == runs
            assert choice.function is choice.row.function  # nothing to look at in a call


def test_each_layout_has_its_own_choice(tmp_path: Path) -> None:
    table = saved(
        tmp_path / "t.json",
        entry(ATEN_WINS, layout="3 channels_last"),
        entry(CONV_WINS, layout="3 contiguous"),
    )
    with tuned.only(table), cnnops.policy("auto"):
        assert (chosen(last=True), chosen(last=False)) == ("aten", "conv")
        w = torch.randn(SHAPE.w_size)
        x = torch.randn(SHAPE.x_size)
        expected = torch.nn.functional.conv2d(x, w)
        for form, runs in ((torch.channels_last, "aten"), (torch.contiguous_format, "conv")) * 2:
            arguments = [t.contiguous(memory_format=form) for t in (x, w)]
            assert_close(cnnops.functional.conv2d(*arguments), expected, 1e-6, runs)
            (choice,) = cnnops.explain(cnnops.functional.conv2d, *arguments)
            assert choice.row.algorithm == runs
        sliced = laid_out(SHAPE.x_size, "sliced", torch.ones)
        (choice,) = cnnops.explain(cnnops.functional.conv2d, sliced, w)
        assert (choice.row.algorithm, choice.measured) == ("conv", "")


def test_explain_says_what_was_measured(tmp_path: Path) -> None:
    x, w = torch.randn(4, 3, 8, 8), torch.randn(6, 3, 3, 3)
    with tuned.only(saved(tmp_path / "t.json", entry(ATEN_WINS))), cnnops.policy("auto"):
        (choice,) = cnnops.explain(cnnops.functional.conv2d, x, w)
        assert str(choice) == (
            f"conv_fprop: aten (aten)\n  measured on {HERE}, 2026-11-21: aten 0.1 ms, conv 0.3 ms"
        )
        (choice,) = cnnops.explain(cnnops.functional.conv2d, x[:2], w)
        assert str(choice).endswith("aten 0.1 ms, conv 0.3 ms (at N=4)")
    (choice,) = cnnops.explain(cnnops.functional.conv2d, x, w)
    assert str(choice) == "conv_fprop: conv (cpu)"


def test_nearest_batch(tmp_path: Path) -> None:
    table = saved(
        tmp_path / "t.json",
        entry(ATEN_WINS, replace(SHAPE, N=8)),
        entry(CONV_WINS, replace(SHAPE, N=32)),
    )
    with tuned.only(table):
        found = {n: chosen(replace(SHAPE, N=n)) for n in (1, 8, 15, 17, 32, 256)}
        assert found == {1: "aten", 8: "aten", 15: "aten", 17: "conv", 32: "conv", 256: "conv"}
        for n, known in ((1, True), (256, True), (257, False)):
            shape = replace(SHAPE, N=n)
            e = tuned.find("conv_fprop", "cpu", shape, torch.float32, "3 contiguous")
            assert (e is not None) == known
        assert tuned.find("conv_fprop", "cpu", SHAPE, torch.float64, "3 contiguous") is None
        assert tuned.find("conv_dgrad", "cpu", SHAPE, torch.float32, "3 contiguous") is None


def test_a_winner_that_may_not_run_leaves_the_fastest_that_may() -> None:
    e = entry({"conv_direct": 3.0, "conv_direct:64x64x16": 2.0, "conv_im2col": 1.0, "aten": 0.5})
    assert e.best(lambda name: True) == ("aten", "")
    assert e.best(lambda name: name != "aten") == ("conv_im2col", "")
    assert e.best(lambda name: name.startswith("conv_direct")) == ("conv_direct", "64x64x16")
    assert e.best(lambda name: False) is None


def test_flags_of_cudnn_are_part_of_the_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    names = [tuned.aten_candidate("conv_fprop", "cuda", d) for d in (torch.float32, torch.float16)]
    assert names == ["aten:benchmark+tf32", "aten:benchmark"]
    assert tuned.aten_candidate("conv_fprop", "cuda", torch.float32, False) == "aten:tf32"
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    assert tuned.aten_candidate("conv_fprop", "cuda", torch.float16) == "aten"
    assert tuned.aten_candidate("max_pool_fwd", "cuda", torch.float32) == "aten"


# ---- files -----------------------------------------------------------------------------------------------


def test_cache_directory(cache: Path) -> None:
    assert chosen() == "conv"
    path = tuned.save([entry(ATEN_WINS)], "cpu", HERE)
    assert path.parent == cache
    assert chosen() == "aten"  # in force at once
    header = tuned.read(path).header
    assert header["device"] == HERE and header["torch"] == torch.__version__
    assert header["digest"] == tuned.digest("cpu") != tuned.digest("cuda")


def test_a_later_process_uses_what_was_found(cache: Path) -> None:
    tuned.save([entry(ATEN_WINS)], "cpu", HERE)
    code = f"""
import warnings; warnings.simplefilter("error")
import torch, cnnops
torch.set_num_threads({torch.get_num_threads()})
x, w = torch.ones({SHAPE.x_size}), torch.ones({SHAPE.w_size})
print(*cnnops.explain(cnnops.functional.conv2d, x, w))
"""
    said = python(code, CNNOPS_POLICY="auto")
    assert said.startswith("conv_fprop: aten (aten)\n  measured on")


def test_named_files_come_first(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = replace(SHAPE, K=7)
    tuned.save([entry(CONV_WINS), entry(ATEN_WINS, other)], "cpu", HERE)
    a = saved(tmp_path / "a.json", entry(ATEN_WINS))
    b = saved(tmp_path / "b.json", entry(CONV_WINS))
    foreign = saved(tmp_path / "h100.json", entry(CONV_WINS), device="NVIDIA H100")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for files, found in (((), "conv"), ((foreign, a, b), "aten"), ((b, a), "conv")):
            monkeypatch.setenv("CNNOPS_TUNE_FILE", os.pathsep.join(map(str, files)))
            tuned.forget()
            assert chosen() == found
            assert chosen(other) == "aten"  # what they do not know is still looked up in the cache
    monkeypatch.setenv("CNNOPS_TUNE_FILE", str(foreign))
    tuned.forget()
    with pytest.warns(UserWarning, match=re.escape(f"measured on NVIDIA H100, this is {HERE}")):
        assert chosen() == "conv"
    monkeypatch.setenv("CNNOPS_TUNE_FILE", str(tmp_path / "none.json"))
    tuned.forget()
    with pytest.warns(UserWarning, match="none.json.*ignored"):
        assert chosen() == "conv"


def test_other_kernels(cache: Path) -> None:
    tuned.save([entry(ATEN_WINS)], "cpu", HERE)
    (path,) = cache.glob("*.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"digest": "0" * 64}))
    tuned.forget()
    with pytest.warns(UserWarning, match="measured with other kernels: ignored") as seen:
        assert chosen() == "conv"
        tuned.forget()
        assert chosen(replace(SHAPE, N=5)) == "conv"
    assert len(seen) == 1
    tuned.save([entry(CONV_WINS)], "cpu", HERE)  # drops what is of no use any more
    assert len(tuned.read(path).entries) == 1


GOOD = {"op": "conv_fprop", "problem": "N=1 C=1", "dtype": "float32", "layout": "3 contiguous",
        "algorithm": "conv", "variant": "", "seconds": {"conv": 0.1}, "date": "2026-11-21"}  # fmt: skip
HEADER = {"schema": 1, "engine": "cpu", "device": HERE, "digest": "0"}


@pytest.mark.parametrize(
    "content",
    [
        "", "{", "null", "[]", "3", "\x00\xff", '{"model": "resnet50", "layers": [1]}', "[" * 100000,
        json.dumps({**HEADER, "schema": 2, "entries": []}),
        json.dumps(HEADER),
        json.dumps({**HEADER, "device": None, "entries": []}),
        json.dumps({**HEADER, "entries": [{**GOOD, "op": 1}]}),
        json.dumps({**HEADER, "entries": [{**GOOD, "more": 1}]}),
        json.dumps({**HEADER, "entries": [{**GOOD, "problem": "C=1"}]}),
        json.dumps({**HEADER, "entries": [{**GOOD, "seconds": [0.1]}]}),
        json.dumps({**HEADER, "entries": [{**GOOD, "seconds": {"conv": math.nan}}]}),
        json.dumps({**HEADER, "entries": [["op"]]}),
    ],
)  # fmt: skip
def test_damaged_files_are_passed_over_with_one_warning(cache: Path, content: str) -> None:
    tuned.save([entry(ATEN_WINS)], "cpu", HERE)
    path = cache / "0.json"
    path.write_text(content, encoding="latin-1")
    tuned.forget()
    with pytest.warns(UserWarning, match="0.json: no table of tuned kernels .*: ignored") as seen:
        assert chosen() == "aten"
    assert len(seen) == 1
    path.unlink()


def test_good_table_is_good(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    path.write_text(json.dumps({**HEADER, "entries": [GOOD]}))
    assert tuned.read(path).entries == (Entry(**GOOD),)


def test_saving_keeps_the_former_file_until_the_new_one_is_whole(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tuned.save([entry(ATEN_WINS)], "cpu", HERE)
    before = path.read_bytes()

    def replace_fails(*_: Any) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk full"):
        patch.setattr(os, "replace", replace_fails)
        tuned.save([entry(CONV_WINS)], "cpu", HERE)
    assert path.read_bytes() == before
    assert [p.name for p in cache.iterdir() if p.suffix == ".json"] == [path.name]
    tuned.save([entry(CONV_WINS), entry(CONV_WINS, replace(SHAPE, K=9))], "cpu", HERE)
    assert [e.algorithm for e in tuned.read(path).entries] == ["conv", "conv"]  # the newer one


def test_two_processes_save_at_once(cache: Path) -> None:
    code = f"""
import sys
from dataclasses import replace
from cnnops import tuned
from cnnops.shapes import ConvShape
sys.stdin.read(1)
shape = ConvShape.of((1, 3, 8, 8), (6, 3, 3, 3))
for n in range(int(sys.argv[1]), 60, 2):
    problem = tuned.problem(replace(shape, N=n + 1))
    entry = tuned.Entry("conv_fprop", problem, "float32", "3 contiguous", "conv", "", {{}}, "")
    tuned.save([entry], "cpu", {HERE!r})
"""
    writers = [
        subprocess.Popen([sys.executable, "-c", code, str(first)], stdin=subprocess.PIPE)
        for first in range(2)
    ]
    for writer in writers:
        writer.communicate(b"1")
        assert writer.stdin is not None
    assert [writer.wait() for writer in writers] == [0, 0]
    (path,) = cache.glob("*.json")
    assert {tuned._split(e.problem)[0] for e in tuned.read(path).entries} == set(range(1, 61))


def test_merge(tmp_path: Path) -> None:
    other = replace(SHAPE, K=7)
    old, new = "2026-11-20T00:00:00Z", "2026-11-21T00:00:00Z"
    a = saved(tmp_path / "a.json", entry(ATEN_WINS, date=new), entry(ATEN_WINS, other, date=old))
    b = saved(tmp_path / "b.json", entry(CONV_WINS, date=old), entry(CONV_WINS, other, date=new))
    for files in ((a, b), (b, a)):
        into = tmp_path / "into.json"
        tuned.merge(iter(files), into)
        found = {e.problem: e.algorithm for e in tuned.read(into).entries}
        assert found == {tuned.problem(SHAPE): "aten", tuned.problem(other): "conv"}
    c = saved(tmp_path / "c.json", entry(CONV_WINS), device="NVIDIA H100")
    with pytest.raises(ValueError, match="c.json: expected a table of .*, got a table of NVIDIA"):
        tuned.merge([a, c], into)
    with pytest.raises(ValueError, match="expected at least one table, got none"):
        tuned.merge([], into)


# ---- tuning ----------------------------------------------------------------------------------------------


class Net(torch.nn.Module):
    """Every kind of layer, and everything that a forward changes."""

    def __init__(self, layers: ModuleType = cnnops.nn) -> None:
        super().__init__()
        self.conv = layers.Conv2d(3, 6, 3)
        self.again = layers.Conv2d(6, 6, 3, padding=1)
        self.norm = layers.BatchNorm2d(6)
        self.pool = layers.MaxPool2d(2)

    def forward(self, x: Tensor) -> dict[str, Any]:
        x = torch.nn.functional.dropout(self.norm(self.conv(x)), 0.1, self.training)
        x = self.again(self.again(x))
        return {"out": [self.pool(x)], "sum": x.argmax()}


X = (4, 3, 8, 8)


def test_every_kind_of_layer_is_tuned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows, groups, unpooled planes: each problem is found again in the table that it was written to."""
    told(monkeypatch, aten_wins)
    net, x, file = cnnops.convert(UNet(2)).model, torch.randn(2, 3, 8, 8), tmp_path / "t.json"
    with cnnops.policy("auto"):
        found = cnnops.tune(net, x, progress=False, file=file)
        assert not any(r.refused for r in found.results), str(found)
        ops = {r.problem.op for r in found.results}
        assert {"group_norm_fwd", "layer_norm_bwd", "max_unpool_bwd", "conv_dgrad"} <= ops
        with tuned.only(file):
            choices = cnnops.explain(net, x)
    assert choices and all(choice.measured for choice in choices)


def test_tune(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = told(monkeypatch, aten_wins)
    file, x = tmp_path / "t.json", torch.randn(X)
    with cnnops.policy("auto"):
        found = cnnops.tune(Net(), x, progress=False, file=file)
    counts = {(r.problem.op, r.problem.shape.C): r.problem.count for r in found.results}
    assert counts == {
        ("conv_fprop", 3): 1, ("conv_fprop", 6): 2, ("batch_norm_train", 6): 1, ("max_pool_fwd", 6): 1,
        ("max_pool_bwd", 6): 1, ("conv_dgrad", 6): 2, ("conv_wgrad", 6): 2, ("conv_bgrad", 6): 3,
        ("batch_norm_bwd", 6): 1, ("conv_wgrad", 3): 1,
    }  # fmt: skip
    assert all(not r.refused and r.after == "aten" for r in found.results), str(found)
    assert {names[1:] for names in measured} == {("aten",)}
    assert found.path == file and len(tuned.read(file).entries) == 10
    lines = [line.split() for line in str(found).splitlines()]
    assert lines[1][-5:] == ["0.2", "ms", "0.1", "ms", "aten"]
    assert lines[-2] == "all 15 calls 3 ms 1.5 ms".split()
    assert lines[-1][:3] == ["10", "problems", "on"]

    def step() -> None:
        y = Net()(x)["out"][0]
        y.backward(torch.ones_like(y))

    with tuned.only(file):
        for policy, engines in (("auto", {"aten"}), ("own", {"cpu"})):
            with cnnops.policy(policy):
                choices = cnnops.explain(step)
                assert {c.engine for c in choices} == engines
                assert all(c.measured for c in choices)


def test_policy_own_reports_own_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told(monkeypatch, aten_wins)
    found = cnnops.tune(Net(), torch.randn(X), progress=False, file=tmp_path / "t.json")
    assert {r.after for r in found.results} == {"conv", "pool", "norm"}
    assert {e.algorithm for e in tuned.read(tmp_path / "t.json").entries} == {"aten"}


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, training: bool
) -> None:
    told(monkeypatch, aten_wins)
    net = Net().train(training)
    net.pool.train(not training)
    x = torch.randn(X, requires_grad=True)
    net(x)["out"][0].sum().backward()
    state = {name: (t, t.clone()) for name, t in net.state_dict(keep_vars=True).items()}
    grads = [(p, p.grad, p.grad.clone()) for p in (*net.parameters(), x) if p.grad is not None]
    random = torch.get_rng_state()
    cnnops.tune(net, (x,), progress=False, file=tmp_path / "t.json")
    now = net.state_dict(keep_vars=True)
    assert all(now[name] is t and torch.equal(t, value) for name, (t, value) in state.items())
    assert len(grads) == 7
    assert all(p.grad is grad and torch.equal(grad, value) for p, grad, value in grads)
    assert torch.equal(torch.get_rng_state(), random)
    assert [m.training for m in net.modules()] == [training] * 4 + [not training]
    assert torch.is_grad_enabled()


def test_forward_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told(monkeypatch, aten_wins)
    arguments = {"x": torch.randn(X)}
    found = cnnops.tune(Net(), arguments, backward=False, progress=False, file=tmp_path / "t.json")
    ops = [r.problem.op for r in found.results]
    assert ops == ["conv_fprop", "batch_norm_train", "conv_fprop", "max_pool_fwd"]


@pytest.fixture
def broken_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that leaves one element of y unwritten, and one that raises; both are quick."""
    rows = []
    for name in ("hasty", "failing"):
        module: Any = ModuleType(name)
        module.supports = lambda *_: None

        def hasty(shape: ConvShape, x: Tensor, w: Tensor, bias: None, y: Tensor) -> None:
            y.view(-1)[1:] = torch.nn.functional.conv2d(x, w, bias).view(-1)[1:]

        def failing(*_: Any) -> None:
            raise RuntimeError("launch failed\nat length")

        module.conv_fprop = hasty if name == "hasty" else failing
        monkeypatch.setitem(sys.modules, name, module)
        rows.append(Row("conv_fprop", ("cpu",), name))
    monkeypatch.setattr(tuning, "ROWS", (*registry.ROWS, *rows))


@pytest.mark.usefixtures("broken_row")
def test_wrong_results_cannot_win(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = told(monkeypatch, lambda name: 1e-6)
    found = cnnops.tune(
        cnnops.nn.Conv2d(3, 6, 3, bias=False), torch.randn(X), backward=False, progress=False,
        file=tmp_path / "t.json",
    )  # fmt: skip
    assert measured == [("conv", "aten")]
    (result,) = found.results
    assert result.refused == {
        "hasty": "off by nan from float64, expected at most 1e-05", "failing": "launch failed"
    }  # fmt: skip
    assert f"{result.problem}: not failing: launch failed" in str(found)


def test_tune_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TypeError, match="sample: expected at least one tensor, got int"):
        cnnops.tune(Net(), 3)
    for engine in ("emulate", "aten"):
        with (
            cnnops.engine(engine),
            pytest.raises(RuntimeError, match="expected engine cuda or cpu"),
        ):
            cnnops.tune(Net(), torch.randn(X))


TIMED = [e for e in ENGINES if e == "cpu" or getattr(e, "values", None) == ("cuda",)]


@pytest.mark.parametrize("engine", TIMED)
def test_the_real_clock(tmp_path: Path, engine: str) -> None:
    """All candidates compute the same, but for PyTorch's with TF32; what they take is not looked at."""
    device = device_of(engine)
    x = torch.randn(X, device=device)
    found = cnnops.tune(Net().to(device), x, seconds=0.0, progress=False, file=tmp_path / "t.json")
    assert len(found.results) == 10
    for r in found.results:
        assert all("tf32" in name for name in r.refused), r.refused
        assert r.before in r.seconds and min(r.seconds.values()) > 0
    with tuned.only(tmp_path / "t.json"):
        assert all(c.measured for c in cnnops.explain(Net().to(device), x))


def test_in_turn() -> None:
    """A clock that only tests advance: candidate "a" takes 2, 4, 6, …, "b" 3 always, "c" 20."""
    now, counts, order = [0.0], {"a": 0, "b": 0, "c": 0}, []

    def once(call: Callable[[], None]) -> float:
        call()
        name = order[-1]
        counts[name] += 1
        took = {"a": 2.0 * counts[name], "b": 3.0, "c": 20.0}[name]
        now[0] += took
        return took

    calls = {name: (lambda name=name: order.append(name)) for name in counts}
    # The first round warms up. "c" is hopeless after two more.
    times = tuning.in_turn(calls, 0.0, once, lambda: now[0])
    assert times == {"a": 8.0, "b": 3.0, "c": 20.0}
    assert counts == {"a": 6, "b": 6, "c": 3}
    assert order == list("abc" + "abc" + "bca" + "ab" + "ba" + "ab")
    counts.update(dict.fromkeys(counts, 0))
    tuning.in_turn({"b": calls["b"]}, 100.0, once, lambda: now[0])
    assert counts["b"] == 1 + 34


def test_interruption_keeps_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(calls: Mapping[str, Any], budget: float) -> dict[str, float]:
        if "pool" in calls:
            raise KeyboardInterrupt
        return dict.fromkeys(calls, 1.0)

    monkeypatch.setattr(tuning, "measurer", lambda *_: measure)
    with pytest.raises(KeyboardInterrupt):
        cnnops.tune(Net(), torch.randn(X), progress=False, file=tmp_path / "t.json")
    ops = [e.op for e in tuned.read(tmp_path / "t.json").entries]
    assert ops == ["batch_norm_train", "conv_fprop", "conv_fprop"]


# ---- variants of conv_direct -----------------------------------------------------------------------------

VARIED = [
    # x, w, stride, padding, dilation, groups, layout
    ((2, 8, 7, 6), (12, 8, 3, 3), 1, 1, 1, 1, "contiguous"),
    ((2, 8, 7, 6), (12, 8, 3, 3), 2, 1, 1, 1, "channels_last"),
    ((1, 3, 9, 9), (4, 3, 3, 3), 1, 0, 2, 1, "contiguous"),  # few channels: thin by arithmetic
    ((1, 1024, 2, 2), (24, 128, 3, 3), 1, 1, 1, 8, "contiguous"),  # fprop: sums worth splitting
]


def varied(
    row: tuple[Any, ...], op: str, dtype: torch.dtype = torch.float32
) -> tuple[ConvShape, list[Any]]:
    x_size, w_size, *rest, layout = row
    stride, padding, dilation, groups = rest
    shape = ConvShape.of(x_size, w_size, None, stride, padding, dilation, groups)
    sizes = {"x": shape.x_size, "w": shape.w_size, "y": shape.y_size}
    t = {name: laid_out(s, layout, normal(i, dtype)) for i, (name, s) in enumerate(sizes.items())}
    if op == "conv_fprop":
        return shape, [t["x"], t["w"], normal(5, dtype)(shape.w_size[:1]), t["y"]]
    return shape, [t["y"], t["w"], None, t["x"]] if op == "conv_dgrad" else [t["y"], t["x"], t["w"]]


@needs_emulator
@pytest.mark.parametrize("op", ["conv_fprop", "conv_dgrad", "conv_wgrad"])
@pytest.mark.parametrize("row", VARIED, ids=["plain", "channels_last", "thin", "long_sums"])
def test_every_variant_computes_the_same(row: tuple[Any, ...], op: str) -> None:
    from cnnops import aten

    shape, arguments = varied(row, op)
    wide = [None if t is None else t.double() for t in arguments]
    getattr(aten, op)(shape, *wide)
    names = conv_direct.variants(op, shape, *arguments)
    assert 4 <= len(names) <= implicit_gemm.VARIANTS and len(set(names)) == len(names)
    seen = set()
    for name in ("", *names[:: 1 if op == "conv_wgrad" else 3]):  # the other passes differ little
        arguments[-1].fill_(math.nan)
        with conv_direct.forced(name), trace() as launches:
            getattr(conv_direct, op)(shape, *arguments)
        assert_close(arguments[-1], wide[-1], TOLERANCE[torch.float32].gradient, name)
        constants = dict(launches[0].kernel.constants)
        if name:
            tile = "x".join(str(constants[f"BLOCK_{axis}"]) for axis in "MNK")
            assert name == tile + (f"/{launches[0].params.splits.divisor}" * (len(launches) == 2))
        seen.add((launches[0].kernel, launches[0].grid, len(launches)))
    assert len(seen) == 1 + len(names[:: 1 if op == "conv_wgrad" else 3])  # each is another launch


def test_long_sums_have_variants_in_parts() -> None:
    shape, arguments = varied(VARIED[3], "conv_fprop")
    names = conv_direct.variants("conv_fprop", shape, *arguments)
    assert any("/" in name for name in names)
    assert conv_direct.variants("conv_bgrad", shape, arguments[-1], torch.empty(6)) == ()


@pytest.mark.parametrize("splits", [1, 7, 100_000])
@pytest.mark.parametrize("layout", ["contiguous", "sliced"])
def test_no_variant_takes_more_memory_than_allowed(splits: int, layout: str) -> None:
    """Of any number of parts that a table may name, from another batch, only so many are made as fit."""
    for N in (1, 64):
        shape = ConvShape.of((N, 512, 14, 14), (512, 512, 3, 3), None, 1, 1)
        sizes = (shape.x_size, shape.w_size, shape.y_size)
        strides = tuple(laid_out(s, layout, lambda s: torch.empty(s)).stride() for s in sizes)
        for op, output in (("fprop", 2), ("dgrad", 0), ("wgrad", 1)):
            plan = conv_direct._plan(
                op,
                shape,
                torch.float32,
                *strides,
                True,
                True,
                True,
                "none",
                False,
                f"64x64x16/{splits}",
            )
            assert 4 * plan.partial <= implicit_gemm.PARTIAL_BYTES
            parts = plan.first.params.splits.divisor
            assert parts <= splits and plan.partial == (parts > 1) * parts * math.prod(
                sizes[output]
            )
            if layout == "sliced":
                assert parts == 1


def test_unknown_variants_leave_the_choice_to_arithmetic() -> None:
    shape, arguments = varied(VARIED[0], "conv_fprop")
    launches = []
    for name in ("", "1x2x3", "fast", "64x64x16/0", "64x64x16 "):
        with conv_direct.forced(name), trace(run=False) as made:
            conv_direct.conv_fprop(shape, *arguments)
        launches.append(made)
    assert all(made == launches[0] for made in launches)


@needs_emulator
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_tuned_variants_are_launched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    """Search and use, in the emulator: whatever is the last candidate of conv_direct wins."""
    order: dict[str, int] = {}
    told(
        monkeypatch,
        lambda name: 1.0 / order.setdefault(name, len(order) + 2) if ":" in name else 1.0,
    )
    model = torch.nn.Sequential(cnnops.nn.Conv2d(8, 12, 3, padding=1, bias=False))
    form = getattr(torch, f"{layout}_format" if layout == "contiguous" else layout)
    model = model.to(memory_format=form)
    x = torch.randn(2, 8, 7, 6).contiguous(memory_format=form).requires_grad_()
    with cnnops.engine("emulate"):
        found = cnnops.tune(model, x, progress=False, file=tmp_path / "t.json")
        winners = {r.problem.op: r.after.partition(":") for r in found.results}
        assert all(variant for _, _, variant in winners.values()) and len(winners) == 3
        grad = torch.randn(2, 12, 7, 6).contiguous(memory_format=form)
        with tuned.only(tmp_path / "t.json"), trace() as launches:
            choices = cnnops.explain(lambda: model(x).backward(grad))
    assert {c.op: (c.row.algorithm, c.variant) for c in choices} == {
        op: (algorithm, variant) for op, (algorithm, _, variant) in winners.items()
    }
    assert all("measured on emulator" in str(c) for c in choices)
    for launch in launches:
        op = launch.kernel.entry.removesuffix("_direct")
        tile = "x".join(str(dict(launch.kernel.constants)[f"BLOCK_{axis}"]) for axis in "MNK")
        assert tile == winners[op][2].partition("/")[0]


# ---- command line ----------------------------------------------------------------------------------------


def command(*arguments: str) -> int:
    parser = ArgumentParser()
    tuning.add_arguments(parser)
    return tuning.main(parser.parse_args(arguments))


def test_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told(monkeypatch, aten_wins)
    file = tmp_path / "t.json"
    arguments = ("--input", "2,1,28,28", "--no-backward", "--channels-last", "--file", str(file))
    assert command("lenet5", *arguments) == 0
    said = capsys.readouterr()
    assert f"4 problems on {HERE}: kept in {file}" in said.out
    assert {e.op for e in tuned.read(file).entries} == {"conv_fprop", "max_pool_fwd"}
    assert {e.layout for e in tuned.read(file).entries} == {"3 channels_last"}
    (tmp_path / "mine.py").write_text(
        "import cnnops\ndef net():\n    return cnnops.nn.Conv2d(2, 3, 3)\nthree = lambda: 3\n"
    )
    monkeypatch.chdir(tmp_path)
    arguments = ("mine:net", "--input", "1,2,5,5", "--dtype", "float64", "--file", "u.json")
    assert command(*arguments) == 0
    entries = tuned.read(tmp_path / "u.json").entries
    assert {e.op for e in entries} == {"conv_fprop", "conv_wgrad", "conv_bgrad"}
    assert {e.dtype for e in entries} == {"float64"}


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("lenet6",), "MODEL: expected package.module:callable or one of lenet5, .* got 'lenet6'"),
        (("no_such_module:net",), "MODEL 'no_such_module:net': ModuleNotFoundError: No module"),
        (("math:net",), "MODEL 'math:net': AttributeError: module 'math' has no attribute 'net'"),
        (("builtins:dict",), "MODEL 'builtins:dict': expected a torch.nn.Module, got dict"),
        (("torch.nn:Identity",), "--input: expected N,C,H,W for a model that does not say"),
        (("lenet5", "--input", "1,0,x"), "--input: expected positive sizes .*, got '1,0,x'"),
        (("lenet5", "--input", "4,9", "--channels-last"), r"expected an input N,C,H,W, got \[4, 9\]"),
    ],
)  # fmt: skip
def test_bad_commands(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    import re

    assert command(*arguments) == 2
    said = capsys.readouterr()
    assert re.match(f"cnnops tune: .*{message}", said.err) and said.out == ""


def test_default_size_is_the_models() -> None:
    from cnnops.models import MODELS

    assert tuning._size(None, MODELS["lenet5"]()) == (32, 1, 28, 28)


def test_progress_is_shown_and_rich_comes_in_no_earlier() -> None:
    code = "import torch, sys; had = 'rich' in sys.modules; import cnnops; print(had, 'rich' in sys.modules)"
    assert python(code) in ("False False", "True True")


def test_progress_bar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told(monkeypatch, aten_wins)
    cnnops.tune(Net(), torch.randn(X), backward=False, file=tmp_path / "t.json")
    said = capsys.readouterr()
    assert "4/4" in said.err and said.out == ""

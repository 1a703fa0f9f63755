"""What benchmarks promise: checked results, fair turns, and a lab that survives what it measures.

Nothing here is timed. tests/test_suites.py has the tables, tests/test_report.py what is shown.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import cnnops
from bench import cudnn_graph, lab, machine, models, parts, report, rivals, suites, timing
from bench.rivals import Call, Inputs
from bench.suites import Case, Row

CPU = torch.device("cpu")
CONV = Row(Case("t", "conv", "conv2d", (2, 4, 6, 6), (6, 2, 3, 3), True, (("padding", 1), ("groups", 2))),
           "fprop", "float32", "contiguous")  # fmt: skip
BIG = suites.Ceilings(1e10, {"float32": 1e11})


def row_of(
    op: str, direction: str, dtype: str = "float32", layout: str = "contiguous", **options: Any
) -> Row:
    conv = (6, 2, 3, 3) if op.startswith("conv") else None
    return Row(
        Case("t", op, op, (2, 4, 6, 6), conv, options=tuple(options.items())),
        direction,
        dtype,
        layout,
    )


# ---- rivals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    "row",
    [
        row_of("conv2d", "fprop", groups=2), row_of("conv2d", "dgrad", groups=2),
        row_of("conv2d", "wgrad", groups=2), row_of("max_pool2d", "fwd", kernel_size=2),
        row_of("max_pool2d", "bwd", kernel_size=2), row_of("adaptive_avg_pool2d", "bwd", output_size=1),
        row_of("batch_norm", "fwd", training=True), row_of("batch_norm", "bwd"),
        row_of("batch_norm_act", "fwd", training=True, residual=True),
        row_of("batch_norm_act", "bwd", training=True, residual=True),
        row_of("batch_norm_act", "bwd", training=True, residual=True, activation="none"),
        row_of("batch_norm_act", "fwd", activation="silu"), row_of("conv2d", "fprop", "bfloat16", groups=2),
    ],
    ids=lambda row: row.id,
)  # fmt: skip
def test_rivals_agree(row: Row, layout: str) -> None:
    row = Row(row.case, row.direction, row.dtype, layout)
    ready, absent = rivals.calls(row, ("cnnops", "cnnops-auto", "eager"), CPU, sets=2)
    assert absent == {"cnnops-auto": "no table of cnnops.tune speaks of it"}
    assert list(ready) == ["cnnops", "eager"]
    for call in ready.values():
        assert 0 <= call.error <= rivals.TOLERANCE[row.dtype]
        with call.around():
            first, other, again = (call.run(i)[0].clone() for i in (0, 1, 2))
        assert not torch.equal(first, other), "the sets of inputs differ"
        torch.testing.assert_close(first, again)


def test_a_rival_that_may_not_return_is_not_asked() -> None:
    case = Case(
        "t",
        "conv",
        "conv2d",
        (1, 2, 31, 31),
        (2, 1, 31, 31),
        options=(("groups", 2), ("padding", 15)),
    )
    rows = [Row(case, "fprop", dtype, "contiguous") for dtype in ("float16", "bfloat16")]
    absent = [rivals.calls(row, ("cnnops", "eager"), CPU)[1] for row in rows]
    assert list(absent[0]) == ["eager"] and "does not return" in absent[0]["eager"]
    assert not absent[1]


def test_half_types_and_layouts_reach_the_tensors() -> None:
    row = Row(CONV.case, "wgrad", "bfloat16", "channels_last")
    made, same, other = (rivals.inputs(row, CPU, seed) for seed in (1, 1, 2))
    for t in (made.x, made.w, made.grad):
        assert t is not None and t.dtype == torch.bfloat16 and t.std() > 0
        assert t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous()
    assert made.bias is not None and made.grad is not None and made.grad.shape == (2, 6, 6, 6)
    assert torch.equal(made.x, same.x) and not torch.equal(made.x, other.x)


@pytest.mark.parametrize(
    "result, why",
    [
        (lambda y: y * 1.001, r"wrong result: 0\.001 from the reference, at most 5e-05 allowed"),
        (lambda y: y.index_fill(0, torch.tensor(1), float("nan")), "wrong result: inf"),
        (lambda y: torch.empty_like(y), "wrong result"),  # it finds the NaN of the run before
        (
            lambda y: y[0] / 0 if y.missing else y,
            "raised AttributeError: 'Tensor' object has no attribute",
        ),
    ],
    ids=["off", "nan", "unwritten", "raises"],
)
def test_wrong_results_are_never_timed(
    monkeypatch: pytest.MonkeyPatch, result: Callable[[Tensor], Tensor], why: str
) -> None:
    true = cnnops.functional.conv2d
    monkeypatch.setattr(cnnops.functional, "conv2d", lambda *a, **k: result(true(*a, **k)))
    big = Row(
        Case("t", "conv", "conv2d", (4, 64, 64, 64), (64, 64, 3, 3)),
        "fprop",
        "float32",
        "contiguous",
    )
    entry = timing.measure(big, ("cnnops", "eager"), CPU, BIG, 0.0, timed=False)
    assert list(entry["times"]) == ["eager"]
    assert re.match(why, entry["absent"]["cnnops"]), entry["absent"]


@pytest.mark.parametrize(
    "row, limit",
    [
        (row_of("batch_norm_act", "bwd", training=True), rivals.KINK),
        (row_of("batch_norm_act", "bwd", "bfloat16"), rivals.TOLERANCE["bfloat16"]),
        (row_of("batch_norm_act", "fwd", training=True), rivals.TOLERANCE["float32"]),
        (row_of("batch_norm_act", "bwd", activation="silu"), rivals.TOLERANCE["float32"]),
        (row_of("batch_norm_act", "bwd", activation="none"), rivals.TOLERANCE["float32"]),
        (row_of("conv2d", "dgrad", groups=2), rivals.TOLERANCE["float32"]),
    ],
    ids=lambda value: value.id if isinstance(value, Row) else str(value),
)
def test_room_for_values_at_the_kink_of_a_relu(row: Row, limit: float) -> None:
    assert rivals.tolerance(row, tf32=False) == limit


def test_functions_that_do_not_exist_yet_are_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(cnnops.functional, "max_pool2d")
    entry = timing.measure(
        row_of("max_pool2d", "fwd", kernel_size=2), rivals.RIVALS[:3], CPU, BIG, 0.0, timed=False
    )
    assert entry["absent"]["cnnops"] == "cnnops.functional has no max_pool2d"
    assert entry["times"].keys() == {"eager"}


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("direction", ["fprop", "dgrad", "wgrad"])
def test_cudnn_is_asked_for_the_row(
    monkeypatch: pytest.MonkeyPatch, direction: str, layout: str
) -> None:
    """Against a stand-in for NVIDIA's package that computes by torch what it is asked for."""
    stand_in = FakeCudnn()
    monkeypatch.setitem(sys.modules, "cudnn", stand_in)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=7))
    row = Row(CONV.case, direction, "float32", layout)
    sets = [rivals.inputs(row, CPU, seed) for seed in range(2)]
    run = cudnn_graph.convolution(row, sets)
    for i, t in enumerate(sets):
        expected = rivals.reference(row, t, 1e9)
        (result,) = run(i)
        assert (
            rivals.distance([result], expected) < 1e-6 and result.stride() == expected[0].stride()
        )
    assert stand_in.streams == [7, 7]


class FakeCudnn:
    """cudnn.pygraph for one convolution, with the names and keywords of nvidia-cudnn-frontend 1.32."""

    data_type = SimpleNamespace(FLOAT="f", HALF="h", BFLOAT16="b", DOUBLE="d")
    heur_mode = SimpleNamespace(A="A", FALLBACK="fallback")

    def __init__(self) -> None:
        self.streams: list[int] = []

    def create_handle(self) -> str:
        return "handle"

    def set_stream(self, *, handle: str, stream: int) -> None:
        self.streams.append(stream)

    def pygraph(self, **options: Any) -> FakeGraph:
        assert options == dict.fromkeys(
            ("io_data_type", "intermediate_data_type", "compute_data_type"), "f"
        ) | {"handle": "handle"}
        return FakeGraph()


class FakeGraph:
    def tensor(self, *, dim: list[int], stride: list[int], data_type: str) -> FakeTensor:
        return FakeTensor(dim, stride)

    def _conv(self, what: str, a: FakeTensor, b: FakeTensor, options: Any) -> FakeTensor:
        self.what, self.a, self.b, self.options, self.added = what, a, b, options, None
        self.result = FakeTensor([], [])
        return self.result

    def conv_fprop(self, *, image: FakeTensor, weight: FakeTensor, **options: Any) -> FakeTensor:
        return self._conv("fprop", image, weight, options)

    def conv_dgrad(self, *, loss: FakeTensor, filter: FakeTensor, **options: Any) -> FakeTensor:
        return self._conv("dgrad", loss, filter, options)

    def conv_wgrad(self, *, image: FakeTensor, loss: FakeTensor, **options: Any) -> FakeTensor:
        return self._conv("wgrad", image, loss, options)

    def bias(self, *, input: FakeTensor, bias: FakeTensor, compute_data_type: str) -> FakeTensor:
        self.added = bias
        return self.result

    def build(self, heuristics: list[str]) -> None:
        assert heuristics == ["A", "fallback"]

    def get_workspace_size(self) -> int:
        return 0

    def execute(self, pack: dict[FakeTensor, Tensor], workspace: Tensor, handle: str) -> None:
        for declared, tensor in pack.items():
            assert (declared.dim, declared.stride) == (list(tensor.shape), list(tensor.stride()))
        a, b, out = pack[self.a], pack[self.b], pack[self.result]
        pads = self.options["pre_padding"]
        assert pads == self.options["post_padding"]
        rest = (self.options["stride"], pads, self.options["dilation"])
        if self.what == "fprop":
            added = None if self.added is None else pack[self.added].flatten()
            out.copy_(torch.nn.functional.conv2d(a, b, added, *rest, a.shape[1] // b.shape[1]))
        elif self.what == "dgrad":
            groups = out.shape[1] // b.shape[1]
            out.copy_(torch.nn.grad.conv2d_input(out.shape, b, a, *rest, groups))
        else:
            groups = a.shape[1] // out.shape[1]
            out.copy_(torch.nn.grad.conv2d_weight(a, out.shape, b, *rest, groups))


class FakeTensor:
    def __init__(self, dim: list[int], stride: list[int]) -> None:
        self.dim, self.stride = dim, stride

    def set_output(self, value: bool) -> FakeTensor:
        return self

    def set_data_type(self, value: str) -> FakeTensor:
        return self

    def set_dim(self, dim: list[int]) -> FakeTensor:
        self.dim = dim
        return self

    def set_stride(self, stride: list[int]) -> FakeTensor:
        self.stride = stride
        return self


def test_one_thread() -> None:
    former = torch.get_num_threads()
    call = rivals.call(rivals.ONE_THREAD, CONV, [rivals.inputs(CONV, CPU, 0)], tf32=False)
    torch.set_num_threads(2)
    try:
        with call.around():
            assert torch.get_num_threads() == 1 and cnnops.config.settings.policy == "own"
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(former)


def test_settings_are_put_back() -> None:
    before = (
        cnnops.config.settings.policy,
        torch.backends.cudnn.benchmark,
        torch.backends.cudnn.allow_tf32,
    )
    for tf32 in (True, False):
        ready, _ = rivals.calls(CONV, ("cnnops", "eager"), CPU, tf32=tf32)
        for call in ready.values():
            with call.around():
                assert torch.backends.cudnn.allow_tf32 is tf32  # the same leave for all
                call.run(0)
    after = (
        cnnops.config.settings.policy,
        torch.backends.cudnn.benchmark,
        torch.backends.cudnn.allow_tf32,
    )
    assert before == after


# ---- timing -----------------------------------------------------------------------------------------------


def test_summary() -> None:
    found = timing.summary([float(i) for i in range(101)])
    assert found == {"median_s": 50.0, "p10_s": 10.0, "p90_s": 90.0, "samples": 101}


def test_rivals_take_turns() -> None:
    order: list[str] = []
    ready = {name: Call(lambda i, name=name: order.append(name)) for name in "abc"}
    turns = [[name for name, _ in timing._turns(ready, number)] for number in range(3)]
    assert turns == [["a", "b", "c"], ["b", "c", "a"], ["c", "a", "b"]]
    times = timing.take(ready, CPU, 0.0)
    assert times.keys() == set("abc")
    assert all(t["warm"]["samples"] == timing.LEAST for t in times.values())
    calls = [name for name, former in zip(order, [""] + order[:-1], strict=True) if name != former]
    assert len(calls) > 3 * timing.LEAST - 3, "each round visits every rival"


def test_one_thread_is_timed_after_all_others(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[list[str]] = []
    true = timing.take

    def take(ready: dict[str, Call], *rest: Any) -> dict[str, timing.Times]:
        taken.append(list(ready))
        return true(ready, *rest)

    monkeypatch.setattr(timing, "take", take)
    entry = timing.measure(CONV, ("cnnops", rivals.ONE_THREAD, "eager"), CPU, BIG, 0.0)
    assert taken == [["cnnops", "eager"], [rivals.ONE_THREAD]]
    assert entry["times"].keys() == {"cnnops", "eager", rivals.ONE_THREAD}


def test_measured_rows_fit_the_report(tmp_path: Path) -> None:
    entry = timing.measure(CONV, ("cnnops", "eager"), CPU, BIG, 0.0)
    assert entry["bytes"] == CONV.bytes_moved and entry["floor_s"] > 0
    what = machine.describe(CPU, "abc1234")
    content = {
        "schema": 1, "machine": what, "ceilings": {"bytes_per_s": 1e10, "flops_per_s": {"float32": 1e11}},
        "settings": {}, "rows": [entry], "models": [], "tests": [], "golden": {}, "sanitizer": [],
        "failures": [],
    }  # fmt: skip
    path = tmp_path / f"{machine.slug(what)}.json"
    path.write_text(json.dumps(content))
    run = report.load(path)
    assert run.rows[0].id == CONV.id and "abc1234" in report.table(run)
    assert re.search(r" · [\w-]+, (128|256|512)-bit vectors · ", report.table(run))


def test_models_are_compared_before_they_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    for phase, layout in itertools.product(("infer", "train"), ("channels_last", "contiguous")):
        row = models.ModelRow("lenet5", phase, 2, layout=layout)
        entry = models.measure(row, ("cnnops", "eager"), CPU, 0.0, timed=False)
        assert not entry["absent"] and entry["times"].keys() == {"cnnops", "eager"}
        assert entry["layout"] == layout and entry["id"] == f"lenet5/{phase}/float32/2/{layout}"
    true = cnnops.functional.conv2d
    monkeypatch.setattr(cnnops.functional, "conv2d", lambda *a, **k: true(*a, **k) * 1.1)
    entry = models.measure(row, ("cnnops", "eager"), CPU, 0.0, timed=False)
    assert entry["absent"]["cnnops"].startswith("wrong result")


def test_fused_networks() -> None:
    def entry(name: str, phase: str, rivals: tuple[str, ...] = ("cnnops-fused", "eager")) -> Any:
        row = models.ModelRow(name, phase, 4, layout="channels_last")
        return models.measure(
            row, rivals, CPU, 0.0, timed=False, side=64 if "res" in name else None
        )

    for phase in ("infer", "train"):
        found = entry("resnet18", phase)
        assert not found["absent"] and found["times"].keys() == {"cnnops-fused", "eager"}
    assert not entry("lenet5", "infer")["absent"], "convolutions with what follows"
    assert entry("lenet5", "train")["absent"] == {"cnnops-fused": "nothing in it is fused"}
    layer = rivals.calls(CONV, ("cnnops-fused",), CPU)
    assert layer == ({}, {"cnnops-fused": "networks are fused, not layers"})


# ---- the lab ----------------------------------------------------------------------------------------------


@pytest.fixture
def options(tmp_path: Path) -> argparse.Namespace:
    made = lab._options(["--out", str(tmp_path), "--dry-run", "--commit", "abc1234"])
    lab.add(made, "machine", {
        "machine": machine.describe(CPU, "abc1234"),
        "ceilings": {"bytes_per_s": 1e10, "flops_per_s": {"float32": 1e11}},
    })  # fmt: skip
    return made


def test_rows_by_interest() -> None:
    rows = suites.rows()
    order = lab.by_interest(rows)
    assert sorted(row.id for row in order) == sorted(row.id for row in rows)
    first = [row.case.suite for row in order[: len(lab.FIRST)]]
    assert first == list(lab.FIRST), "each network and collection in turn"
    sweeps = [row.case.suite.startswith("sweep") for row in order]
    assert sweeps == sorted(sweeps), "sweeps come last"


def test_rows_on_a_cpu(tmp_path: Path) -> None:
    """The parts of the report come first, whole and in both layouts; threads are asked of large layers."""
    options = lab._options(["--out", str(tmp_path), "--cpu", "--rivals", "cnnops", "eager"])
    assert (options.minutes, options.seconds) == (25, 0.25)
    every = list(lab.layer_rows(options))
    rows = [row for row, _, _ in every]
    assert len({row.id for row in rows}) == len(rows)
    assert {row.id for row in rows} >= {row.id for row in suites.rows()}

    told = [
        row.dtype == "float32"
        and bool(parts.parts_of(row.case.suite, parts.kind_of(row.case.op, row.problem), row.direction))
        for row in rows
    ]  # fmt: skip
    assert told == sorted(told, reverse=True) and any(told), "before sweeps and half types"
    float32 = [row for row in rows if row.dtype == "float32" and row.case.suite in suites.NETWORKS]
    for one, other in zip(float32[::2], float32[1::2], strict=True):
        assert (one.layout, other.layout) == ("contiguous", "channels_last")
        assert (one.case, one.direction) == (other.case, other.direction)
        assert abs(rows.index(one) - rows.index(other)) == 1
    assert {row.case.x[0] for row in float32 if row.case.suite == "resnet50"} == {8}
    whole = {case.name: case.x for case in suites.SUITES["resnet50"]}
    for row in float32:
        if row.case.suite == "resnet50":
            assert row.case.x[1:] == whole[row.case.name][1:], "nothing else shrinks"
        assert row.flops <= 4e9 and row.bytes_moved <= 2e8

    scaling = [row for row in rows if row.case.suite == "scaling"]
    assert len(scaling) == 30 and {row.case for row in scaling} == set(suites.SUITES["scaling"])
    serial = {row.id for row, names, _ in every if rivals.ONE_THREAD in names}
    assert serial == {row.id for row in scaling if row.flops >= 5e7} and len(serial) == 18


def test_networks_on_a_cpu() -> None:
    rows = models.rows(CPU)
    for one, other in zip(rows[::2], rows[1::2], strict=True):
        assert (one.layout, other.layout) == ("contiguous", "channels_last")
        assert one == replace(other, layout="contiguous") and one.dtype == "float32"
    assert {row.model for row in rows[:12]} == {"lenet5", "resnet18", "mobilenetv2"}
    assert {row.phase for row in rows} == {"infer", "train"}


@pytest.mark.parametrize("arguments", [["--cpu"], []], ids=["cpu", "gpu"])
def test_one_thread_is_asked_of_cpus_alone(tmp_path: Path, arguments: list[str]) -> None:
    options = lab._options(["--out", str(tmp_path), "--suites", "scaling", *arguments])
    found = {name for _, names, _ in lab.layer_rows(options) for name in names}
    assert (rivals.ONE_THREAD in found) == bool(arguments)


def script(tmp_path: Path, body: str) -> list[str]:
    path = tmp_path / "step.py"
    path.write_text(textwrap.dedent(body))
    return [sys.executable, str(path), str(tmp_path)]


@pytest.mark.parametrize("end", ["os.kill(os.getpid(), 9)", "os._exit(3)", "time.sleep(600)"])
def test_a_row_that_ends_its_process_costs_only_itself(
    options: argparse.Namespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    """Killed, gone, or hanging: the row is noted, and the step is begun again behind it."""
    name = next(row for row, _, _ in lab.layer_rows(options)).id
    command = script(tmp_path, f"""
        import os, sys, time, pathlib
        out = pathlib.Path(sys.argv[1])
        if (out / "part-layers.jsonl").is_file():
            (out / "went-on").touch()
            sys.exit(0)
        (out / "part-current").write_text({name!r})
        {end}
    """)  # fmt: skip
    monkeypatch.setattr(lab, "_again", lambda *_: command)
    monkeypatch.setattr(lab, "STALL_SECONDS", 1.0)
    trouble = lab._supervise(options, "layers", lab.time.time() + 60)
    assert trouble is not None and name in trouble and (tmp_path / "went-on").is_file()
    (noted,) = lab.found(options, "layers")
    assert noted["id"] == name and noted["absent"]["cnnops"].startswith("raised layers")


def test_a_step_that_fails_without_a_row_is_told(
    options: argparse.Namespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lab, "_again", lambda *_: script(tmp_path, "raise SystemExit(5)"))
    assert lab._supervise(options, "tests", lab.time.time() + 60) == "tests: ended with exit code 5"


def test_the_lab_takes_up_where_it_was(
    options: argparse.Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def two(_: argparse.Namespace) -> Iterator[tuple[Row, tuple[str, ...], str | None]]:
        yield CONV, ("cnnops", "eager"), None
        yield row_of("max_pool2d", "fwd", kernel_size=2), ("cnnops", "eager"), None

    monkeypatch.setattr(lab, "layer_rows", two)
    lab.add(options, "layers", {**lab._no_result(CONV, "x"), "mark": "the first run's"})
    with lab.part(options, "layers").open("a") as file:
        file.write('{"id": "cut off by a cra')
    lab.step_layers(options)
    rows = lab.found(options, "layers")
    assert rows[0]["mark"] == "the first run's" and len(rows) == 2
    assert rows[1]["op"] == "max_pool2d" and rows[1]["times"].keys() == {"cnnops", "eager"}


def test_the_result_file_tells_what_failed(options: argparse.Namespace) -> None:
    bad = lab._no_result(CONV, "wrong result: 0.5 from the reference, at most 5e-05 allowed")
    missing = lab._no_result(
        row_of("max_pool2d", "fwd", kernel_size=2), "cnnops.functional has no max_pool2d"
    )
    for value in (bad, missing):
        lab.add(options, "layers", value)
    lab.add(options, "tests", {
        "file": "tests/test_a.py", "passed": 3, "failed": 1, "skipped": 0, "exit": 1, "seconds": 1.0,
        "tail": "",
    })  # fmt: skip
    run = report.load(lab.assemble(options, ["golden: ended with exit code 1"]))
    assert run.problems == [
        "golden: ended with exit code 1",
        f"{CONV.id}: cnnops: wrong result: 0.5 from the reference, at most 5e-05 allowed",
        "tests/test_a.py: 1 failed, 3 passed",
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="tells what is missing where there is no GPU")
def test_without_a_gpu_the_lab_says_so(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert lab.main(["--out", str(tmp_path / "x")]) == 2
    assert "expected an NVIDIA GPU" in capsys.readouterr().err and not (tmp_path / "x").exists()


def test_result_files_have_a_line_for_every_row() -> None:
    content = {
        "schema": 1,
        "machine": {"a": [1 / 3]},
        "rows": [{"t": 2 / 3}, {"t": 1e-9 / 7}],
        "tests": [],
    }
    text = lab.text_of(content)
    assert len(text.splitlines()) == 9
    assert json.loads(text) == {
        "schema": 1, "machine": {"a": [0.33333]}, "rows": [{"t": 0.66667}, {"t": 1.4286e-10}], "tests": [],
    }  # fmt: skip


def test_inputs_change_together() -> None:
    t = Inputs(torch.ones(1), w=torch.ones(2), norm=(torch.ones(3),))
    doubled = t.each(lambda v: v * 2)
    assert doubled.w is not None and doubled.x.item() == 2 and doubled.w.sum() == 4
    assert doubled.norm[0].sum() == 6 and doubled.bias is None and t.x.item() == 1

"""bench/predict.py: the model's arithmetic, the tables of bench/notes.md, and that these are not stale."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import needs_emulator

from bench import predict, suites, traffic
from bench.predict import Gpu, Line, Prediction
from bench.traffic import Counted, Form, Side

FP32 = Form("contiguous", torch.float32)
# Easy rates: a byte of memory takes 1 s, and so do 2 of L2, 4 of L1, 8 wavefronts and 16 multiply-adds; a
# launch takes 100 s.
GPU = Gpu(launch=100, memory=1, l2=2, l1=4, wavefronts=8, ffma=16, l2_bytes=50)


def read(tensor: int, memory: float, l2: float = 0) -> Side:
    return Side(tensor, False, l2, memory, memory)


def written(tensor: int, memory: float, l2: float = 0) -> Side:
    return Side(tensor, True, l2, memory, memory)


def launch(*sides: Side, l1: float = 0, wavefronts: float = 0, multiplies: float = 0) -> Counted:
    return Counted("kernel", l1, wavefronts, sides, multiplies)


def test_a_launch_takes_what_its_slowest_memory_takes() -> None:
    def found(**more: float) -> Prediction:
        l2 = more.pop("l2", 0.0)
        return predict.predict([launch(read(0, 60, l2), written(1, 60), **more)], GPU)

    assert found() == Prediction(220, 220, "memory")
    assert found(l2=400) == Prediction(300, 300, "L2")
    assert found(l1=1200) == Prediction(400, 400, "L1")
    assert found(wavefronts=4000) == Prediction(600, 600, "shared")
    assert found(multiplies=9600) == Prediction(700, 700, "FFMA")
    assert found(l2=240, l1=480, wavefronts=960) == Prediction(220, 220, "memory")


def test_launches_follow_each_other() -> None:
    one, other = launch(read(0, 10)), launch(read(1, 20), l1=800)
    assert predict.predict([one, other], GPU) == Prediction(410, 410, "launch")


def test_what_the_next_launch_finds_in_l2() -> None:
    """Tensor 0 is read, then read again and 1 written: 0 is found whole where both fit into 50 bytes."""

    def second(size: float) -> Prediction:
        return predict.predict(
            [launch(read(0, size)), launch(read(0, size), written(1, size))], GPU
        )

    assert second(25) == Prediction(200 + 25 + 25, 200 + 25 + 25, "launch")
    # 50 of 100 bytes are found: half of the tensor; or nothing.
    assert second(50) == Prediction(200 + 50 + 75, 200 + 50 + 100, "launch")
    # What was written is found as well, but writing it again goes to memory.
    launches = [launch(written(0, 20)), launch(read(0, 20)), launch(written(0, 20))]
    assert predict.predict(launches, GPU).most == 300 + 20 + 0 + 20
    # A third tensor in between takes its room.
    apart = [launch(read(0, 20)), launch(read(1, 40)), launch(read(0, 20))]
    assert predict.predict(apart, GPU).most == 300 + 20 + 40 + 20


@pytest.mark.parametrize(
    ("least", "most", "limit", "text"),
    [(48e-6, 48e-6, "memory", "48"), (4.26e-6, 4.26e-6, "launch", "4.3"),
     (26e-6, 35e-6, "memory", "26 to 35"), (2.63e-3, 2.63e-3, "L2", "2630 L2")],
)  # fmt: skip
def test_cells(least: float, most: float, limit: str, text: str) -> None:
    assert predict.cell(Prediction(least, most, limit)) == text


def test_every_row_has_its_line() -> None:
    """Each row of the suites that is counted stands in one line of a table; none stands twice."""
    listed = [id for line in predict.lines() for ids in line.rows.values() for id in ids]
    rows = [row.id for row in suites.rows() if traffic.has_problem(row.case)]
    assert {row.case.kind for row in suites.rows() if row.id in listed} >= {"pool", "norm", "conv"}
    assert sorted(listed) == sorted(rows)
    names = [line.problem.id for line in predict.lines()]
    assert len(set(names)) == len(names)
    text = predict.NOTES.read_text(encoding="utf-8")
    for line in predict.lines():
        for direction in line.directions:
            assert text.count(f"| {line.problem.id} | {line.problem.text} | {direction} |") == 1


def test_tables_are_renewed_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Text and explanations stay, lines of other problems too, and what no line is about goes."""
    here, other = (
        Line(traffic.problem_named(name), {("bwd", FP32): ids})
        for name, ids in (("resnet50/maxpool", ("a", "b")), ("vgg16/pool1", ()))
    )
    monkeypatch.setattr(predict, "lines", lambda: [other, here])
    for name in ("product_table", "wgmma_table"):
        monkeypatch.setattr(predict, name, lambda measured: "products\n")
    before = "Written by hand.\n\n<!-- predicted: pool.cu -->\n"
    products = "".join(
        f"<!-- predicted: conv_igemm{of}.cu -->\nproducts\n<!-- end -->\n" for of in ("", "_sm90")
    )
    after = f"<!-- end -->\n\nSo is this.\n{products}"
    head = "| row | problem |  | floor fp32 | NCHW | measured | explanation |\n"
    rule = "| --- | --- | --- | --: | --: | --: | --- |\n"
    kept = f"| vgg16/pool1 | {other.problem.text} | bwd | 1 | 2 | – | why |\n"
    old = f"| resnet50/maxpool | {here.problem.text} | bwd | 3 | 4 | – | a \\| b |\n"
    gone = "| resnet50/gone | x | fwd | 3 | 4 | – | lost |\n"
    found = {"resnet50/maxpool": {("bwd", FP32): (45e-6, Prediction(48e-6, 50e-6, "L2"))}}
    text = before + head + rule + gone + old + kept + after
    new = predict.renewed(text, found, {"b": 49e-6})
    row = old.replace("| 3 | 4 | – |", "| 45 | 48 to 50 L2 | 49 |")
    assert new == before + head + rule + kept + row + after
    assert predict.renewed(new, found, {"b": 49e-6}) == new
    with pytest.raises(ValueError, match="expected one <!-- predicted: pool.cu --> .*, got 0"):
        predict.renewed("no table", found, {})


def test_measured_times_are_those_of_the_newest_gpu(tmp_path: Path) -> None:
    row: dict[str, Any] = {
        "id": "s/c/fwd/float32/contiguous", "suite": "s", "case": "c", "op": "max_pool2d", "direction": "fwd",
        "dtype": "float32", "layout": "contiguous", "problem": "x 1", "flops": 1, "bytes": 1,
    }  # fmt: skip
    machine = {"torch": "2.13.0", "cnnops": "0.1.0", "commit": "abc", "device": "d"}
    for date, kind, seconds in (
        ("2026-01-01", "gpu", 3e-6), ("2026-01-02", "gpu", 2e-6), ("2026-01-03", "cpu", 1e-6)
    ):  # fmt: skip
        time = {"median_s": seconds, "p10_s": seconds, "p90_s": seconds, "samples": 1}
        raw = {
            "schema": 1,
            "machine": {**machine, "date": date, "kind": kind},
            "ceilings": {},
            "rows": [{**row, "times": {"cnnops": {"cold": time}, "eager": {"cold": time}}}],
        }
        (tmp_path / f"{date}.json").write_text(json.dumps(raw))
    assert predict.measured_times(tmp_path) == {row["id"]: 2e-6}
    assert predict.measured_times(tmp_path / "none") == {}


def test_depthwise_convolutions_multiply() -> None:
    """31x31 taps bind, in their floor, too; 3x3 do not, and what is counted scales to the whole problem."""
    large = traffic.problem_named("reports/depthwise_31x31_square")
    step = large.steps(large.full, traffic.Make(FP32, "meta"))["fprop"]
    assert step.multiplies == 64 * 1000 * 32 * 32 * 31 * 31
    assert step.multiplies / Gpu().ffma > 10 * step.least / Gpu().memory
    small = traffic.problem_named("mobilenetv2/stage2.0.depthwise")
    x, w, y = 32 * 96 * 112 * 112, 96 * 9, 32 * 96 * 56 * 56
    for step in small.steps(small.full, traffic.Make(FP32, "meta")).values():
        assert step.least == 4 * (x + w + y) and step.multiplies == 9 * y


def test_a_transposed_depthwise_convolution_is_its_twins_dgrad() -> None:
    problem = traffic.problem_named("reports/transposed_depthwise_1d")
    steps = problem.steps(problem.full, traffic.Make(FP32, "meta"))
    entries = {op: traffic.variants(step)[0][0] for op, step in steps.items()}
    assert entries == {
        "fprop": "conv_dgrad_depthwise", "dgrad": "conv_fprop_depthwise", "wgrad": "conv_wgrad_depthwise"
    }  # fmt: skip
    assert [t.shape[1:] for t in steps["fprop"].writes] == [(512, 96)]


@needs_emulator
def test_some_predictions_are_not_stale(capsys: pytest.CaptureFixture[str]) -> None:
    """Of each kernel a problem or two; all of them: python bench/predict.py --check."""
    some = [
        "fold/",
        "unpool/64@28",
        "layer_norm/",
        "group_norm/256",
        "resnet50/maxpool",
        "sweep_norm/eval",
        "mobilenetv2/stage6.1.depthwise",
    ]
    stale = predict.main(["--check", "--jobs", "1", "--only", *some])
    assert not stale, capsys.readouterr().out


def test_check_tells_which_lines_are_stale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = next(line for line in predict.lines() if line.problem.id == "fold/64@56")
    known = {key: (1e-6, Prediction(77e-6, 77e-6, "memory")) for key in line.rows}
    monkeypatch.setattr(predict, "_predicted", lambda chosen, jobs: {"fold/64@56": known})
    notes = tmp_path / "notes.md"
    notes.write_text(predict.NOTES.read_text(encoding="utf-8"), encoding="utf-8")
    options = ["--only", "fold", "--notes", str(notes), "--results", str(tmp_path)]
    assert predict.main([*options, "--check"]) == 1
    out = capsys.readouterr().out
    assert "tables are stale" in out and "+ | fold/64@56" in out and "| 77 |" in out
    assert predict.main(options) == 0 and "| 77 |" in notes.read_text(encoding="utf-8")
    assert predict.main([*options, "--check"]) == 0


def test_a_word_that_no_row_has(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        predict.main(["--only", "nothing of this name"])
    assert stop.value.code == 2
    assert "--only: expected part of a row's name, got" in capsys.readouterr().err

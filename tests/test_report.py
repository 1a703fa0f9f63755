"""What bench/report.py makes of result files: exact numbers, honest gaps, plots, a page, a comparison.

The functions lie in runs.py, plots.py, figure.py, page.py and compare.py beside it.
"""

from __future__ import annotations

import json
import math
import re
import struct
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from bench import compare, figure, page, parts, plots, report, runs

ROOT = Path(__file__).resolve().parents[1]
GPU = {
    "device": "NVIDIA H100 80GB HBM3", "kind": "gpu", "driver": "580.65.06", "cuda": "13.0",
    "torch": "2.11.0+cu130", "cudnn": 91002, "cupy": "14.2.0", "python": "3.12.3", "cnnops": "0.1.0",
    "commit": "abc1234", "dirty": False, "date": "2026-11-21T10:00:00Z", "threads": 16,
}  # fmt: skip
CPU = GPU | {
    "device": "AMD EPYC (2 threads)", "kind": "cpu", "driver": None, "cuda": None, "cudnn": None,
    "cupy": None, "torch": "2.13.0+cpu", "date": "2026-11-22T10:00:00Z", "dirty": True,
}  # fmt: skip
STAMP = (
    "NVIDIA H100 80GB HBM3 · driver 580.65.06 · CUDA 13.0 · torch 2.11.0 · cuDNN 9.10.2 · "
    "cnnops 0.1.0 at abc1234 · 2026-11-21"
)
US = 1e-6


def timing(median: float, spread: float = 0.01) -> dict[str, float]:
    low, high = median * (1 - spread), median * (1 + spread)
    return {"median_s": median, "p10_s": low, "p90_s": high, "samples": 40}


def row(
    case: str, direction: str = "fprop", suite: str = "resnet50", *, floor: float = 50 * US,
    absent: dict[str, str] | None = None, variant: str = "cold", **medians: float,
) -> dict[str, Any]:  # fmt: skip
    """One row of a result file; `medians` in seconds by rival (with _ for -)."""
    times = {rival.replace("_", "-"): {variant: timing(m)} for rival, m in medians.items()}
    return {
        "id": f"{suite}/{case}/{direction}/float32/contiguous", "suite": suite, "case": case,
        "op": "conv2d", "direction": direction, "dtype": "float32", "layout": "contiguous",
        "problem": "x 2x8x16x16 w 8x8x3x3 padding=1", "count": 1, "source": "", "flops": 600_000,
        "bytes": 35_000, "floor_s": floor, "times": times, "errors": {"cnnops": 2e-7},
        "absent": absent or {},
    }  # fmt: skip


def write(
    path: Path, rows: list[dict[str, Any]], machine: dict[str, Any] = GPU, **more: Any
) -> Path:
    ceilings = {"bytes_per_s": 3e12, "flops_per_s": {"float32": 5e13, "float16": 7e14}}
    whole = {
        "schema": 1, "machine": machine, "ceilings": ceilings, "settings": {"allow_tf32": False},
        "rows": rows, "models": [], "tests": [], "failures": [], **more,
    }  # fmt: skip
    path.write_text(json.dumps(whole))
    return path


def model(name: str, batch: int, **medians: float) -> dict[str, Any]:
    return {
        "id": f"{name}/train/float32/{batch}", "model": name, "phase": "train", "batch": batch,
        "dtype": "float32", "times": {r: {"cold": timing(m)} for r, m in medians.items()}, "absent": {},
        "errors": {"cnnops": 7e-6},
    }  # fmt: skip


ROWS = [
    row("conv1", cnnops=100 * US, eager=200 * US, compile=400 * US),
    row("conv2", cnnops=100 * US, eager=50 * US, absent={"compile": "out of time"}),
    row("conv3", eager=70 * US, absent={"cnnops": "wrong result: 0.3 from the reference"}),
    row("conv1", "dgrad", cnnops=200 * US, eager=800 * US, compile=100 * US),
]
SWEEP = [
    row(f"dense_C{C}", d, "sweep_channels", cnnops=C * US, eager=2 * C * US)
    | {"problem": f"x 2x{C}x16x16 w {C}x{C}x3x3 padding=1"}
    for C in (16, 3, 64)
    for d in ("fprop", "wgrad")
]


@pytest.fixture
def run(tmp_path: Path) -> runs.Run:
    return runs.load(write(tmp_path / "run.json", ROWS))


# ---- numbers ---------------------------------------------------------------------------------------------


def test_ratios_and_floor(run: runs.Run) -> None:
    conv1, conv2, conv3, dgrad = run.rows
    assert conv1.ratio("eager") == pytest.approx(2) and conv1.ratio("compile") == pytest.approx(4)
    assert (conv1.best_rival, conv2.best_rival, dgrad.best_rival) == ("eager", "eager", "compile")
    assert dgrad.speed_up == pytest.approx(0.5)
    assert conv1.percent_of_floor() == pytest.approx(50)
    assert conv1.percent_of_floor("eager") == pytest.approx(25)
    assert conv2.ratio("compile") is conv3.speed_up is conv3.percent_of_floor() is None
    assert conv3.best_rival == "eager", "a rival may have a time where cnnops has none"


def test_means_count_only_rows_that_both_have(run: runs.Run) -> None:
    (group,) = runs.groups(run.rows, "suite")
    assert group.against("eager") == runs.Mean(pytest.approx((2 * 0.5 * 4) ** (1 / 3)), 3)
    assert group.against("compile") == runs.Mean(pytest.approx((4 * 0.5) ** (1 / 2)), 2)
    assert group.against_best() == runs.Mean(pytest.approx((2 * 0.5 * 0.5) ** (1 / 3)), 3)
    assert group.against("eager-benchmark") is None
    assert group.timed == 3
    assert group.percent_of_floor == pytest.approx(50)  # of 50, 50 and 25
    keys = [group.key for group in runs.groups(run.rows, "op", "direction")]
    assert keys == [("conv2d", "fprop"), ("conv2d", "dgrad")]
    assert [r.name for r in runs.worst(run.rows, 2)] == ["conv2 fprop", "conv1 dgrad"]


def test_a_variant_is_held_against_itself(tmp_path: Path) -> None:
    """Cold is the main one; a rival with a warm time alone has none to compare."""
    both = row("both", cnnops=4 * US, eager=8 * US)
    both["times"]["cnnops"]["warm"] = timing(1 * US)
    both["times"]["compile"] = {"warm": timing(2 * US), "graph": timing(1 * US)}
    warm = row("warm", variant="warm", cnnops=4 * US, eager=2 * US)
    run = runs.load(write(tmp_path / "run.json", [both, warm]))
    assert [r.variant for r in run.rows] == ["cold", "warm"]
    assert run.rows[0].seconds("cnnops") == 4 * US and run.rows[0].ratio("compile") is None
    assert run.rows[1].speed_up == pytest.approx(0.5)


def test_cnnops_is_no_rival_of_its_own(tmp_path: Path) -> None:
    auto = row("auto", cnnops=4 * US, cnnops_auto=1 * US, eager=2 * US)
    run = runs.load(write(tmp_path / "run.json", [auto]))
    assert (run.rows[0].best_rival, run.rivals) == ("eager", ("eager",))
    assert run.ours == ("cnnops", "cnnops-auto")
    assert run.rows[0].ratio("eager", "cnnops-auto") == pytest.approx(2)


@pytest.mark.parametrize(
    "seconds, text",
    [
        (1.4e-4, "140 µs"), (9.996e-4, "1.00 ms"), (2.346e-3, "2.35 ms"), (12.34, "12.3 s"),
        (5e-8, "0.0500 µs"), (99.96e-6, "100 µs"), (None, "–"),
    ],
)  # fmt: skip
def test_durations(seconds: float | None, text: str) -> None:
    assert runs.duration(seconds) == text


# ---- files -----------------------------------------------------------------------------------------------


def test_runs_are_sorted_by_date(tmp_path: Path) -> None:
    write(tmp_path / "a.json", ROWS, GPU | {"date": "2026-12-01T00:00:00Z"})
    write(tmp_path / "b.json", ROWS)
    write(tmp_path / "c.json", ROWS, CPU)
    found = runs.runs(tmp_path)
    assert [run.path.name for run in found] == ["b.json", "c.json", "a.json"]
    assert runs.latest("gpu", tmp_path) == found[2] and runs.latest("cpu", tmp_path) == found[1]
    assert runs.newest_of_each_device(found) == [found[2], found[1]]
    assert runs.latest("gpu", tmp_path / "nowhere") is None


def dry(path: Path, machine: dict[str, Any] = GPU) -> Path:
    """What a dry run leaves: one sample of every time, newer here than all others."""
    rows = [row("dry", variant="warm", cnnops=9 * US, eager=3 * US)]
    for times in rows[0]["times"].values():
        times["warm"] |= {"p10_s": times["warm"]["median_s"], "p90_s": times["warm"]["median_s"]}
        times["warm"]["samples"] = 1
    date = {"date": "2027-01-01T00:00:00Z"}
    return write(path, rows, machine | date, settings={"allow_tf32": False, "dry_run": True})


def test_a_dry_run_is_never_the_newest(tmp_path: Path) -> None:
    write(tmp_path / "gpu.json", ROWS)
    dry(tmp_path / "dry.json")
    dry(tmp_path / "dry_cpu.json", CPU)
    found = runs.runs(tmp_path)
    assert [run.dry for run in found] == [False, True, True]
    assert runs.latest("gpu", tmp_path) == found[0] and runs.latest("cpu", tmp_path) is None
    assert runs.newest_of_each_device(found) == [found[0]]
    assert report.readme(PAGE, found) == report.readme(PAGE, found[:1])
    assert report.readme(PAGE, found[1:]) == report.readme(PAGE, [])


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda raw: raw | {"schema": 2}, "expected schema 1, got 2"),
        (lambda raw: [], "expected schema 1, got None"),
        (lambda raw: {k: v for k, v in raw.items() if k != "rows"}, "expected the key 'rows'"),
        (lambda raw: raw | {"rows": [{"id": "x"}]}, "expected the key 'direction'"),
        (lambda raw: raw | {"machine": GPU | {"kind": "tpu"}}, "expected kind gpu or cpu, got 'tpu'"),
        (lambda raw: raw | {"rows": [row("zero", cnnops=0.0)]}, "expected times 0 < p10_s"),
        (lambda raw: raw | {"rows": [row("nan", cnnops=math.nan)]}, "expected times 0 < p10_s"),
    ],
)  # fmt: skip
def test_what_is_no_result_file(tmp_path: Path, damage: Any, message: str) -> None:
    path = write(tmp_path / "run.json", ROWS)
    path.write_text(json.dumps(damage(json.loads(path.read_text()))))
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        runs.load(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected a result file, got No such file"):
        runs.load(tmp_path / "none.json")
    (tmp_path / "half.json").write_text('{"schema": 1, ')
    with pytest.raises(ValueError, match="expected JSON, got"):
        runs.load(tmp_path / "half.json")


def test_problems(tmp_path: Path) -> None:
    tests = [{"file": "tests/test_conv.py", "passed": 9, "failed": 1}, {"file": "x", "failed": 0}]
    more = {
        "tests": tests, "failures": ["the driver fell over"], "golden": {"recorded": 2, "differ": ["w"]},
        "sanitizer": [{"kernel": "pool", "tool": "racecheck", "ok": False}],
    }  # fmt: skip
    assert runs.load(write(tmp_path / "run.json", ROWS, **more)).problems == [
        "the driver fell over",
        "resnet50/conv3/fprop/float32/contiguous: cnnops: wrong result: 0.3 from the reference",
        "tests/test_conv.py: 1 failed, 9 passed",
        "golden: w differs",
        "racecheck: pool",
    ]


# ---- text ------------------------------------------------------------------------------------------------


def test_stamp(run: runs.Run, tmp_path: Path) -> None:
    assert runs.stamp(run) == STAMP
    cpu = runs.load(write(tmp_path / "cpu.json", ROWS, CPU))
    assert runs.stamp(cpu) == (
        "AMD EPYC (2 threads) · torch 2.13.0 · cnnops 0.1.0 at abc1234 with uncommitted changes · 2026-11-22"
    )
    old = runs.load(write(tmp_path / "old.json", ROWS, GPU | {"cudnn": 8902}))
    assert "cuDNN 8.9.2" in runs.stamp(old)


def test_table(run: runs.Run) -> None:
    lines = report.table(run).splitlines()
    assert lines[0] == STAMP
    assert lines[2:5] == [
        "| suite | type | layout | rows | vs eager | vs compile | vs best | % of floor | worst row |",
        "| --- | --- | --- | --: | --: | --: | --: | --: | --- |",
        "| resnet50 | float32 | contiguous | 3 of 4 | 1.59 (3) | 1.41 (2) | 0.79 (3) | 50 % | "
        "conv2 fprop: 0.50 vs eager |",
    ]
    assert lines[-1] == "Medians, the L2 cache flushed before every sample; TF32 off."


def test_table_names_what_was_not_measured(tmp_path: Path) -> None:
    rows = [row("a|b", cnnops=1 * US, eager=2 * US, absent={"compile": "out of time"})]
    text = report.table(runs.load(write(tmp_path / "run.json", rows)))
    assert "Not measured yet: compile (out of time)." in text and "vs compile" not in text
    assert r"| a\|b fprop: 2.00 vs eager |" in text


PAGE = f"# cnnops\n\n{report.BEGIN}\nsomething old\n{report.END}\n\n## Licence\n"


def test_speed_page(run: runs.Run, tmp_path: Path) -> None:
    text = report.speed(PAGE, [run])
    assert text.startswith(f"# cnnops\n\n{report.BEGIN}\n{STAMP}\n\n| suite | type |")
    assert text.endswith(f"\n{report.END}\n\n## Licence\n") and "something old" not in text
    assert report.speed(text, [run]) == text
    assert "not measured on a GPU yet" not in text

    cpu = runs.load(write(tmp_path / "cpu.json", ROWS, CPU))
    alone, both = report.speed(PAGE, [cpu]), report.speed(PAGE, [run, cpu])
    assert "not measured on a GPU yet" in alone and "AMD EPYC" in alone
    assert "not measured on a GPU yet" not in both and both.index("H100") < both.index("EPYC")
    assert report.speed(PAGE, []) == PAGE.replace(
        "something old", "Speed: not measured on a GPU yet."
    )


def test_readme(run: runs.Run, tmp_path: Path) -> None:
    """The newest of a kind: the suites of a GPU's run, the parts of a CPU's without its layouts."""
    text = report.readme(PAGE, [run])
    assert text.startswith(f"# cnnops\n\n{report.BEGIN}\n{STAMP}\n\n| suite | rows |")
    assert report.readme(text, [run]) == text and text.count("\n| --- |") == 1
    cpu = runs.load(write(tmp_path / "cpu.json", ROWS, CPU))
    alone = report.readme(PAGE, [cpu])
    assert "Speed: not measured on a GPU yet." in alone
    assert "| part | problems | speed-up | worst |" in alone and "channels_last" not in alone
    assert report.readme(PAGE, []) == report.speed(PAGE, [])
    newer = runs.load(write(tmp_path / "newer.json", ROWS, CPU | {"device": "Another CPU"}))
    assert report.readme(PAGE, [cpu, run]).count("\n| --- |") == 2
    both = report.readme(PAGE, [cpu, newer])
    assert both.count("\n| --- |") == 1 and "\nMeasured too: AMD EPYC" in both
    assert both.index("Another CPU") < both.index("Measured too"), "the newer one has the table"


def test_figure_says_what_it_shows(run: runs.Run, tmp_path: Path) -> None:
    cpu = runs.load(write(tmp_path / "cpu.json", ROWS, CPU))
    assert figure.lines(run) == {"resnet50": [2.0, 0.5, 0.5]}
    (part,) = [found for name, found in figure.lines(cpu).items() if "fprop" in name]
    assert part == [2.0, 0.5]
    path = tmp_path / "speed.svg"
    assert not figure.is_fresh(path, [run]) and figure.is_fresh(path, [])
    pytest.importorskip("matplotlib")
    path.write_text(figure.svg([run, cpu]), encoding="utf-8")
    assert figure.is_fresh(path, [run, cpu]) and not figure.is_fresh(path, [cpu])
    assert figure.svg([run, cpu]) == path.read_text(encoding="utf-8"), "the same every time"


@pytest.mark.parametrize(
    "text", ["no markers", report.BEGIN, report.END + report.BEGIN, 2 * (report.BEGIN + report.END)]
)
def test_readme_without_one_pair_of_markers(text: str) -> None:
    with pytest.raises(ValueError, match=r"expected one <!-- bench:begin --> and one"):
        report.readme(text, [])


def test_the_documents_are_fresh() -> None:
    assert report.main(["--check"]) == 0, "python bench/report.py --readme renews them"


def test_console(run: runs.Run, capsys: pytest.CaptureFixture[str]) -> None:
    report.console(run)
    text = capsys.readouterr().out
    failure = text.index("cnnops: wrong result: 0.3 from the reference")
    assert text.index(STAMP) < text.index("1 failed") < failure < text.index("furthest behind")
    behind = [line.split()[0] for line in text.splitlines() if line.startswith((" resnet50/",))]
    directions = re.findall(r"resnet50/conv\d (fprop|dgrad)", text)
    assert behind == ["resnet50/conv2", "resnet50/conv1", "resnet50/conv1"]
    assert directions == ["fprop", "dgrad", "fprop"], "the slowest comes first"
    assert re.search(r"conv2d +fprop +float32 +2 of 3 +1\.00 \(2\)", text)


def test_console_without_times(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [row("conv1", absent={"cnnops": "no kernel [3d]", "eager": "out of time"})]
    report.console(runs.load(write(tmp_path / "run.json", rows)))
    text = capsys.readouterr().out
    assert "no row has times of both" in text and "Not measured yet: eager (out of time)." in text


def test_console_leaves_out_what_cannot_be_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    no3d, no1d = ({"cnnops": f"cnnops.functional has no conv{n}d"} for n in (3, 1))
    rows = [
        *(row(f"a{i}", suite="volumes", eager=2 * US, absent=no3d) for i in range(12)),
        row("b", suite="signals", eager=2 * US, absent=no1d),
        row("c", suite="signals", absent={"cnnops": "raised RuntimeError: no"}),
        row("d", suite="images", eager=2 * US, cnnops=1 * US),
        row("e", suite="images", absent=no1d),
    ]
    report.console(runs.load(write(tmp_path / "run.json", rows, models=[model("net", 2)])))
    text = capsys.readouterr().out
    (line,) = [line for line in text.splitlines() if "not timed" in line]
    assert line == (
        "14 rows are not timed: cnnops.functional has no conv3d (12), cnnops.functional has no conv1d (2)"
    )
    assert "1 failed" in text and "signals/c/fprop/float32/contiguous: cnnops: raised" in text
    assert re.search(r"images +float32 +contiguous +1 of 2 +2\.00 \(1\)", text)
    tables = text[text.index("geometric means") :]
    assert "volumes" not in tables and "signals" not in tables and "net" not in tables


def test_console_cuts_long_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [row("conv", suite=f"suite{i}", cnnops=1 * US, eager=2 * US) for i in range(43)]
    report.console(runs.load(write(tmp_path / "run.json", rows)))
    means = capsys.readouterr().out.partition("geometric means")[2]
    assert re.findall(r"^ (suite\d+) ", means, re.M) == [f"suite{i}" for i in range(40)]
    assert means.count("… and 3 more") == means.count("… and ") == 1


# ---- parts of networks, on a CPU --------------------------------------------------------------------------


def both(
    case: str,
    direction: str = "fprop",
    suite: str = "resnet50",
    **medians: tuple[float | None, ...],
) -> list[dict[str, Any]]:
    """A problem in float32, with what each rival takes contiguous and channels-last, in µs."""
    rows = []
    for place, layout in enumerate(parts.LAYOUTS):
        times = {r: t[place] * US for r, t in medians.items() if t[place] is not None}
        rows.append(row(case, direction, suite, variant="warm", **times))
        rows[-1] |= {"layout": layout, "id": rows[-1]["id"].replace("contiguous", layout)}
    return rows


PARTS_ROWS = [
    *both("conv1", cnnops=(10, 20), eager=(20, 8)),  # 8 / 10
    *both("conv2", cnnops=(20, 10), eager=(30, 50)),  # 30 / 10
    *both("conv3", cnnops=(None, 10), eager=(90, None)),  # 90 / 10, and nothing in one layout
    *both("conv4", cnnops=(None, None), eager=(90, 90)),
    *both("conv1", "wgrad", "vgg16", cnnops=(10, 10), eager=(20, 30)),
    *both("conv1", "wgrad", "alexnet", cnnops=(10, 10), eager=(15, 15)),
    *(r | {"dtype": "bfloat16"} for r in both("half", cnnops=(1, 1), eager=(9, 9))),
    *both("conv", suite="efficientnet_b0", cnnops=(1, 1), eager=(9, 9)),
]


def test_a_problem_is_told_in_the_faster_layout_of_each(tmp_path: Path) -> None:
    run = runs.load(write(tmp_path / "run.json", PARTS_ROWS, CPU))
    mean = (0.8 * 3 * 9) ** (1 / 3)
    assert parts.by_part(run) == [
        ["part", "problems", "speed-up", "contiguous", "channels_last", "worst"],
        ["ResNet-50: convolutions, fprop", "4", f"{mean:.2f} (3)", f"{(2 * 1.5) ** 0.5:.2f} (2)",
         f"{(0.4 * 5) ** 0.5:.2f} (2)", "conv1 fprop: 0.80"],
        ["VGG-16, AlexNet: convolutions", "2", f"{3 ** 0.5:.2f} (2)", f"{3 ** 0.5:.2f} (2)",
         f"{(3 * 1.5) ** 0.5:.2f} (2)", "alexnet/conv1 wgrad: 1.50"],
    ]  # fmt: skip


def test_networks_are_told_in_the_faster_layout_of_each(tmp_path: Path) -> None:
    step = model("resnet18", 8, cnnops=4e-3, eager=6e-3) | {"layout": "contiguous"}
    last = model("resnet18", 8, cnnops=5e-3, eager=3e-3) | {"layout": "channels_last", "id": "last"}
    others = [
        model("lenet5", 64, cnnops=2e-3, eager=3e-3),  # of a file that names no layout
        model("vgg16", 2, cnnops=1e-3, eager=9e-3),
        model("mobilenetv2", 2, cnnops=1e-3, eager=9e-3) | {"phase": "infer"},
    ]
    run = runs.load(write(tmp_path / "run.json", [], CPU, models=[step, last, *others]))
    _, line = parts.by_part(run)
    mean = f"{(0.75 * 1.5) ** 0.5:.2f} (2)"
    assert line == [
        "LeNet-5, ResNet-18, MobileNetV2: training step", "2", mean, "1.50 (2)", "0.60 (1)",
        "resnet18 train, batch 8: 0.75",
    ]  # fmt: skip


def test_fused_networks_are_told_apart(tmp_path: Path) -> None:
    step = model("resnet18", 8, cnnops=4e-3, eager=6e-3)
    step["times"] |= model("resnet18", 8, **{"cnnops-fused": 2e-3})["times"]
    nothing = model("mobilenetv2", 8, cnnops=4e-3, eager=8e-3)
    nothing["absent"] = {"cnnops-fused": "raised"}
    run = runs.load(write(tmp_path / "run.json", [], CPU, models=[step, nothing]))
    found = {line[0]: line[1:3] for line in parts.by_part(run)[1:]}
    assert found == {
        "LeNet-5, ResNet-18, MobileNetV2: training step": ["2", f"{3**0.5:.2f} (2)"],
        "ResNet-18, MobileNetV2: training step, norms fused": ["2", "3.00 (1)"],
    }
    assert run.ours == ("cnnops", "cnnops-fused") and run.rivals == ("eager",)


@pytest.mark.parametrize(
    "op, problem, kind",
    [
        ("conv2d", "x 8x32x112x112 w 32x1x3x3 padding=1 groups=32", "depthwise"),
        (
            "conv2d",
            "x 8x32x112x112 w 64x1x3x3 padding=1 groups=32",
            "depthwise",
        ),  # two filters a channel
        ("conv2d", "x 8x32x112x112 w 32x2x3x3 padding=1 groups=16", "convolution"),
        ("conv2d", "x 64x1x28x28 w 20x1x5x5 bias padding=2", "convolution"),
        ("adaptive_avg_pool2d", "x 8x2048x7x7 output_size=1", "pooling"),
        ("batch_norm_act", "x 8x64x56x56 training residual", "norm"),
        ("batch_norm", "x 8x64x56x56 training", "batch_norm"),
        ("group_norm", "x 8x64x56x56 num_groups=32", "group_norm"),
        ("layer_norm", "x 8x3136x96 normalized_shape=96", "group_norm"),
    ],
)
def test_kinds(op: str, problem: str, kind: str) -> None:
    assert parts.kind_of(op, problem) == kind


def test_small_and_large_convolutions(tmp_path: Path) -> None:
    one = {"cnnops-1-thread": (15, 15)}
    rows = [
        *(r | {"flops": 2_000_000} for r in both("2_MFLOP", suite="scaling", cnnops=(20, 10), eager=(5, 8))),
        *(r | {"flops": 1_000_000}
          for r in both("1_MFLOP", suite="scaling", cnnops=(20, 10), eager=(40, 50), **one)),
        *(r | {"flops": 1_000_000}
          for r in both("1_MFLOP", "wgrad", "scaling", cnnops=(None, None), eager=(40, 50))),
    ]  # fmt: skip
    run = runs.load(write(tmp_path / "run.json", rows, CPU | {"threads": 2}))
    assert parts.by_size(run) == [
        ["3x3 convolution", "1 MFLOP", "2 MFLOP"],
        ["fprop: cnnops, GFLOP/s", "100", "200"],
        ["fprop: torch, GFLOP/s", "25", "400"],
        ["fprop: cnnops, 2 threads over one", "1.50", "–"],
        ["wgrad: torch, GFLOP/s", "25", "–"],
    ]
    assert run.rivals == ("eager",) and run.ours == ("cnnops",)
    assert run.rows[2].best_rival == "eager", "cnnops on one thread is no rival"
    assert "cnnops-1-thread" not in report.table(run)


def test_parts_are_shown_of_cpus(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    rows = [*PARTS_ROWS, *both("1_MFLOP", suite="scaling", cnnops=(20, 10), eager=(40, 50))]
    machine = CPU | {"cpu": "znver4, 512-bit vectors"}
    cpu = runs.load(write(tmp_path / "cpu.json", rows, machine))
    gpu = runs.load(write(tmp_path / "gpu.json", rows, GPU))
    assert parts.by_part(gpu) == parts.by_size(gpu) == []
    lines = report.table(cpu).splitlines()
    assert lines[0].startswith("AMD EPYC (2 threads) · znver4, 512-bit vectors · torch")
    assert lines[2:5] == [
        "| part | problems | speed-up | contiguous | channels_last | worst |",
        "| --- | --: | --: | --: | --: | --- |",
        "| ResNet-50: convolutions, fprop | 4 | 2.78 (3) | 1.73 (2) | 1.41 (2) | conv1 fprop: 0.80 |",
    ]
    report.console(cpu)
    shown = re.sub(" +", " ", capsys.readouterr().out)
    for text in (re.sub("<[^>]*>", " ", page.page([cpu], tmp_path)), shown, report.table(cpu)):
        assert "in its faster layout" in text and "ResNet-50: convolutions, fprop" in text
        assert "fprop: torch, GFLOP/s" in text
    report.console(gpu)
    for text in (page.page([gpu], tmp_path), capsys.readouterr().out, report.table(gpu)):
        assert "in its faster layout" not in text and "GFLOP/s" not in text


# ---- plots and page --------------------------------------------------------------------------------------


def picture_size(data: bytes) -> tuple[int, int]:
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    return struct.unpack(">II", data[16:24])


@pytest.mark.parametrize("machine", [GPU, CPU], ids=["gpu", "cpu"])
def test_plots(tmp_path: Path, machine: dict[str, Any]) -> None:
    pytest.importorskip("matplotlib")
    variant = "cold" if machine is GPU else "warm"
    rows = [
        *ROWS,
        *SWEEP,
        row("a/b", "fwd", "pool", variant=variant, cnnops=1 * US, eager=3 * US),
        row("lone", "bwd", "sweep_pool", variant=variant, cnnops=1 * US, eager=3 * US),
        row("never", "fwd", "none", absent={"cnnops": "no kernel"}),
    ]
    models = [model("lenet5", 64, cnnops=2e-3, eager=1e-3)]
    run = runs.load(write(tmp_path / "run.json", rows, machine, models=models))
    drawn = plots.plots(run)
    assert list(drawn) == [
        "roofline", "speedup-models-float32-contiguous", "speedup-resnet50-float32-contiguous",
        "sweep_channels-float32-contiguous", "speedup-pool-float32-contiguous",
        "speedup-sweep_pool-float32-contiguous",
    ]  # fmt: skip
    for data in drawn.values():
        width, height = picture_size(data)
        assert width >= 500 and height >= 200 and len(data) > 8000


def words(figure: Any) -> str:
    from matplotlib.text import Text

    return "\n".join(text.get_text() for text in figure.findobj(Text))


def test_every_plot_names_device_and_commit(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    run = runs.load(write(tmp_path / "run.json", ROWS + SWEEP))
    figures = dict(plots.figures(run))
    assert len(figures) == 3
    for drawn in figures.values():
        assert STAMP in words(drawn)
    bars = figures["speedup-resnet50-float32-contiguous"]
    assert {"eager", "compile"} <= set(words(bars).splitlines()), "the rivals are named"
    fprop = bars.axes[0]
    assert [label.get_text() for label in fprop.get_yticklabels()] == ["conv2", "conv1"]
    assert [bar.get_width() for bar in fprop.patches] == pytest.approx([-0.5, 1.0])


def test_curves(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    run = runs.load(write(tmp_path / "run.json", SWEEP))
    figure = dict(plots.figures(run))["sweep_channels-float32-contiguous"]
    fprop, wgrad = figure.axes
    assert (fprop.get_xlabel(), fprop.get_title()) == ("C = K", "dense conv2d fprop")
    assert (fprop.get_xscale(), fprop.get_yscale()) == ("log", "log")
    curves = {tuple(line.get_ydata()) for line in fprop.get_lines()}
    assert [list(line.get_xdata()) for line in fprop.get_lines()] == 3 * [[3, 16, 64]]
    expected = {(3, 16, 64), (6, 32, 128), (50, 50, 50)}
    assert {tuple(round(y, 6) for y in curve) for curve in curves} == expected  # in µs


@pytest.mark.parametrize(
    "problems, label, values",
    [
        (["x 2x8x4x4 w 8x8x3x3", "x 2x16x4x4 w 16x16x3x3"], "C = K", [8, 16]),
        (["x 2x8x4x4 w 8x1x3x3 groups=8", "x 2x9x4x4 w 9x1x3x3 groups=9"], "C = K = groups", [8, 9]),
        (["x 1x8x4x4 w 8x8x3x3", "x 2x8x4x4 w 8x8x3x3"], "N", [1, 2]),
        (["x 1x8x4x4x4", "x 1x8x6x6x6"], "D = H = W", [4, 6]),
        (["x 1x8x9 w 8x8x3 padding=1", "x 1x8x9 w 8x8x5 padding=2"], "S", [3, 5]),
        (["x 1x8x9x9 w 8x8x3x3 padding=1x1 dilation=1x1", "x 1x8x9x9 w 8x8x3x3 padding=2x2 dilation=2x2"],
         "dilation = padding", [1, 2]),
        (["x 1x8x9x9", "x 1x8x9x9"], "least traffic, bytes", [35_000, 35_000]),
    ],
)  # fmt: skip
def test_what_a_sweep_varies(
    tmp_path: Path, problems: list[str], label: str, values: list[int]
) -> None:
    rows = [row(f"case{i}") | {"problem": problem} for i, problem in enumerate(problems)]
    run = runs.load(write(tmp_path / "run.json", rows))
    assert plots.varying(run.rows) == (label, values)


class Balanced(HTMLParser):
    """Checks that elements are closed in order, and counts them."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.seen.append(tag)
        if tag not in ("meta", "img", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_page(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    evil = "<script>alert(1)</script>"
    rows = [
        row(evil, cnnops=1 * US, eager=2 * US, absent={"compile": f"out of {evil} & time"}),
        *ROWS,
    ]
    machine = GPU | {"clocks": {"sm_mhz": [1410, 1980]}}
    more: dict[str, Any] = {
        "failures": [evil],
        "models": [model("<b>", 1, cnnops=1e-3, eager=2e-3)],
    }
    run = runs.load(write(tmp_path / "run.json", rows, machine, **more))
    text = page.page([run], tmp_path)
    assert evil not in text and "<b>" not in text
    assert '<td class="">&lt;script&gt;alert(1)&lt;/script&gt;</td>' in text
    assert f"{runs.NEVER}: out of &lt;script&gt;alert(1)&lt;/script&gt; &amp; time" in text
    assert ">7.0e-06</td>" in text and ">2.0e-07</td>" in text  # errors of the model and of a row
    assert STAMP in text and "wrong result: 0.3 from the reference" in text
    assert "<h2>CPU</h2><p>not measured yet" in text
    assert not re.search(r"(?:src|href)=\"(?!data:)", text), "the page needs no other file"
    parser = Balanced()
    parser.feed(text)
    assert parser.open == [] and parser.seen.count("script") == 1
    assert parser.seen.count("img") == 3  # roofline, models, resnet50


def test_page_without_results(tmp_path: Path) -> None:
    text = page.page([], tmp_path / "nothing")
    assert (
        "<h2>NVIDIA GPU</h2><p>not measured yet" in text and "<h2>CPU</h2><p>not measured" in text
    )
    assert str(tmp_path / "nothing") in text


def test_page_ignores_dry_runs(tmp_path: Path) -> None:
    whole = page.page([runs.load(dry(tmp_path / "dry.json"))], tmp_path)
    assert whole == page.page([], tmp_path)


def test_page_gives_no_spread_of_one_sample(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    single = row("single", cnnops=1 * US)
    single["times"]["cnnops"]["cold"]["samples"] = 1
    rows = [single, row("many", cnnops=3 * US)]
    text = page.page([runs.load(write(tmp_path / "run.json", rows))], tmp_path)
    assert 'title="cold: 1.00 µs, 1 sample">' in text
    assert 'title="cold: 3.00 µs, 10 to 90 % of 40 samples: 2.97 µs to 3.03 µs">' in text


# ---- comparison ------------------------------------------------------------------------------------------


def changed(tmp_path: Path, name: str, machine: dict[str, Any] = GPU, **factors: float) -> Path:
    """ROWS without the third, times of cnnops multiplied by a factor for each case."""
    rows = json.loads(json.dumps([ROWS[0], ROWS[1], ROWS[3]]))
    for raw in rows:
        factor = factors.get(raw["case"] + raw["direction"], 1.0)
        raw["times"]["cnnops"]["cold"] = timing(raw["times"]["cnnops"]["cold"]["median_s"] * factor)
    return write(tmp_path / name, rows, machine)


def test_compare_finds_what_is_beyond_noise(tmp_path: Path) -> None:
    a = changed(tmp_path, "a.json")
    b = changed(tmp_path, "b.json", conv1fprop=1.10, conv2fprop=1.025, conv1dgrad=0.5)
    changes = compare.compare(runs.load(a), runs.load(b))
    slower = [c for c in changes if c.regression]
    assert [(c.id, c.rival, c.variant) for c in slower] == [(ROWS[0]["id"], "cnnops", "cold")]
    assert slower[0].ratio == pytest.approx(1.1)
    assert [c.id for c in changes if c.improvement] == [ROWS[3]["id"]]
    assert changes[0] == slower[0] and len(changes) == 8, "all times of both, the slowest first"


def test_wide_intervals_are_noise() -> None:
    before, after = runs.Timing(100, 80, 115, 9), runs.Timing(120, 110, 140, 9)
    assert not compare.Change("x", "cnnops", "cold", before, after).beyond_noise
    apart = runs.Timing(120, 116, 140, 9)
    assert compare.Change("x", "cnnops", "cold", before, apart).regression
    assert compare.Change("x", "cnnops", "cold", apart, before).improvement


def test_one_sample_shows_no_change() -> None:
    once, twice = runs.Timing(100, 100, 100, 1), runs.Timing(200, 200, 200, 2)
    assert not compare.Change("x", "cnnops", "warm", once, twice).beyond_noise
    assert not compare.Change("x", "cnnops", "warm", twice, once).beyond_noise
    before = runs.Timing(100, 100, 100, 2)
    assert compare.Change("x", "cnnops", "warm", before, twice).regression


def test_compare_wants_one_device(tmp_path: Path) -> None:
    a = runs.load(changed(tmp_path, "a.json"))
    b = runs.load(changed(tmp_path, "b.json", CPU))
    with pytest.raises(ValueError, match="expected two runs on one device, got NVIDIA"):
        compare.compare(a, b)
    assert len(compare.compare(a, b, force=True)) == 8


def test_rows_of_other_sizes_are_not_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Under the same name a CPU may once be given two images, and once eight."""
    a = changed(tmp_path, "a.json", CPU)
    raw = json.loads(a.read_text())
    raw["rows"][0]["problem"] = "x 8x8x16x16 w 8x8x3x3 padding=1"
    raw["rows"][0]["times"]["cnnops"]["cold"] = timing(400 * US)
    b = tmp_path / "b.json"
    b.write_text(json.dumps(raw))
    assert report.main(["--compare", str(a), str(b)]) == 0
    text = capsys.readouterr().out
    assert f"of other sizes in the two runs (1)\n  {ROWS[0]['id']}\n" in text
    assert "0 slower, 0 faster, 2 within noise" in text


def test_networks_of_older_files_are_compared(tmp_path: Path) -> None:
    """Files without layouts are of networks that ran channels-last in half types alone."""
    old = model("lenet5", 64, cnnops=2e-3), model("vgg16", 2, cnnops=2e-3) | {"dtype": "bfloat16"}
    new = [old[0] | {"layout": "contiguous"}, old[1] | {"layout": "channels_last"}]
    for entry in new:
        entry["id"] += f"/{entry['layout']}"
    a, b = (
        runs.load(write(tmp_path / f"{name}.json", [], models=list(models)))
        for name, models in (("a", old), ("b", new))
    )
    assert a.models == b.models and len(compare.compare(a, b)) == 2


def test_only_in_one(run: runs.Run, tmp_path: Path) -> None:
    other = runs.load(changed(tmp_path, "other.json"))
    assert compare.only_in(run, other) == [f"{ROWS[2]['id']}: eager, cold"]
    assert compare.only_in(other, run) == []


# ---- command line ----------------------------------------------------------------------------------------


def test_compare_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, same = changed(tmp_path, "a.json"), changed(tmp_path, "same.json", conv2fprop=1.02)
    slow, fast = (changed(tmp_path, f"{f}.json", conv1fprop=f) for f in (1.5, 0.5))
    assert report.main(["--compare", str(a), str(same)]) == 0
    assert report.main(["--compare", str(a), str(fast)]) == 0
    capsys.readouterr()
    assert report.main(["--compare", str(a), str(slow)]) == 1
    text = capsys.readouterr().out
    assert "slower (1)" in text and "1 slower, 0 faster, 2 within noise" in text
    assert STAMP in text and re.search(r"cnnops +cold +100 µs +150 µs +1\.50", text)


def test_a_slower_rival_is_no_regression(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a = write(tmp_path / "a.json", [row("conv1", cnnops=1 * US, eager=2 * US)])
    b = write(tmp_path / "b.json", [row("conv1", cnnops=1 * US, eager=4 * US)])
    assert report.main(["--compare", str(a), str(b)]) == 0
    assert "changed without our doing" in capsys.readouterr().out


def test_readme_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    root, results = tmp_path / "checkout", tmp_path / "results"
    documents = root / report.README, root / report.SPEED
    (root / "docs").mkdir(parents=True)
    results.mkdir()
    for document in documents:
        document.write_text(PAGE)
    write(results / "run.json", ROWS)
    common = ["--results", str(results)]
    assert report.main([*common, "--check", str(root)]) == 1
    assert "stale" in capsys.readouterr().out
    assert all(document.read_text() == PAGE for document in documents)
    assert report.main([*common, "--readme", str(root)]) == 0
    assert all(STAMP in document.read_text() for document in documents)
    assert report.main([*common, "--check", str(root)]) == 0
    (root / report.FIGURE).unlink()
    assert report.main([*common, "--check", str(root)]) == 1
    assert report.main([*common, "--readme", str(root)]) == 0
    write(results / "newer.json", ROWS[:2], GPU | {"date": "2027-01-01T00:00:00Z"})
    assert report.main([*common, "--check", str(root)]) == 1


def test_html_and_png_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    write(tmp_path / "run.json", ROWS)
    html, pictures = tmp_path / "page.html", tmp_path / "plots/new"
    arguments = ["--results", str(tmp_path), "--report", str(html), "--png", str(pictures)]
    assert report.main(arguments) == 0
    assert STAMP in html.read_text(encoding="utf-8")
    assert sorted(path.name for path in pictures.iterdir()) == [
        "run-roofline.png",
        "run-speedup-resnet50-float32-contiguous.png",
    ]


@pytest.mark.parametrize("exists", [True, False])
def test_no_results(tmp_path: Path, exists: bool, capsys: pytest.CaptureFixture[str]) -> None:
    folder, html = tmp_path / "results", tmp_path / "page.html"
    if exists:
        folder.mkdir()
    assert report.main(["--results", str(folder), "--report", str(html)]) == 0
    assert f"no results in {folder}: not measured yet" in capsys.readouterr().out
    assert "not measured yet" in html.read_text(encoding="utf-8")


def test_dry_runs_are_no_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dry(tmp_path / "dry.json")
    assert report.main(["--results", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"only dry runs in {tmp_path}: not measured yet\n"
    write(tmp_path / "run.json", ROWS)
    assert report.main(["--results", str(tmp_path)]) == 0
    assert STAMP in capsys.readouterr().out, "the newest that is no dry run"


def test_console_of_a_dry_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """bench/lab.py prints one at its end."""
    report.console(runs.load(dry(tmp_path / "dry.json")))
    assert re.search(r"resnet50/dry fprop +float32 .* 9\.00 µs +3\.00 µs", capsys.readouterr().out)


def test_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = write(tmp_path / "good.json", ROWS), tmp_path / "bad.json"
    other = write(tmp_path / "other.json", ROWS, CPU)
    (tmp_path / "README.md").write_text("no markers")
    for arguments in (
        ["--compare", str(good), str(tmp_path / "none.json")],
        ["--compare", str(good), str(other)],
        ["--results", str(tmp_path), "--readme", str(tmp_path)],
        ["--results", str(tmp_path), "--report", str(tmp_path / "no/such/folder.html")],
        ["--nonsense"],
    ):
        with pytest.raises(SystemExit) as caught:
            report.main(arguments)
        assert caught.value.code == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
    bad.write_text('{"schema": 7}')
    with pytest.raises(SystemExit) as caught:
        report.main(["--results", str(tmp_path)])
    assert caught.value.code == 2 and "expected schema 1, got 7" in capsys.readouterr().err


def test_runs_from_anywhere_without_torch(tmp_path: Path) -> None:
    """As a script, from another folder, on a machine where neither torch nor matplotlib is installed."""
    write(tmp_path / "run.json", ROWS)
    program = (
        "import runpy, sys\n"
        "sys.modules.update(torch=None, matplotlib=None, numpy=None)\n"
        f"sys.argv = ['report.py', '--results', {str(tmp_path)!r}]\n"
        f"runpy.run_path({str(ROOT / 'bench/report.py')!r}, run_name='__main__')\n"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "") and STAMP in done.stdout
    assert "\x1b" not in done.stdout, "a pipe is no terminal"

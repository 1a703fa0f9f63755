"""Golden vectors: every wrapper of `kernels/ptx*.cuh` has micro-kernels, and the emulator computes what is
expected of them and what a GPU has been recorded to compute.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from golden import record, vectors
from golden.item import Bits, BitsOrNaN, Item, Ulps, Within
from golden.items import ITEMS

from cnnops.cuda import emulate, golden, jit

RECORDED = sorted(path.stem for path in vectors.FOLDER.glob("*.npz"))
ARCHITECTURES = ("80", "90a")

NOTHING = pytest.param(
    "", marks=pytest.mark.skip("no vectors of a GPU: python -m tests.golden record")
)

needs_emulator = pytest.mark.skipif(
    emulate.available() is not None, reason=f"kernels cannot be emulated: {emulate.available()}"
)


# ---- the items -------------------------------------------------------------------------------------------


def test_every_wrapper_has_an_item() -> None:
    tested = {wrapper for item in ITEMS.values() for wrapper in item.wrappers}
    wrappers = golden.wrappers()
    assert {"to_float", "ldmatrix_trans", "mma_m8n8k4_f64", "load_once"} <= set(wrappers)
    assert tested == set(wrappers)


def test_every_vector_has_an_item() -> None:
    assert set(RECORDED) <= set(ITEMS)
    assert sum(path.stat().st_size for path in vectors.FOLDER.glob("*.npz")) < 2 << 20


@needs_emulator
@pytest.mark.parametrize("name", ITEMS)
def test_emulator_computes_what_is_expected(name: str) -> None:
    item = ITEMS[name]
    inputs = item.make_inputs()
    with emulate.schedule("all"):
        outputs = item.run(inputs, "cpu")
    comparison = item.compare(inputs, outputs, item.expected(inputs))
    assert comparison.total and not comparison.wrong, str(comparison)


@needs_emulator
@pytest.mark.parametrize("name", RECORDED or [NOTHING])
def test_emulator_computes_what_the_gpu_did(name: str) -> None:
    item, recording = ITEMS[name], vectors.load(vectors.FOLDER / f"{name}.npz")
    outputs = item.run(recording.inputs, "cpu")
    comparison = item.compare(recording.inputs, outputs, recording.outputs)
    assert not comparison.wrong, f"{recording.machine['gpu']}: {comparison}"


@pytest.mark.parametrize("name", ITEMS)
def test_compiles_for_its_architectures(name: str) -> None:
    pytest.importorskip(
        "cuda.bindings.nvrtc", reason="NVRTC is missing: pip install 'cnnops[test]'"
    )
    item = ITEMS[name]
    inputs = item.make_inputs()
    kernel = item.plan(inputs, item.expected(inputs)).kernel
    targets = [arch for arch in ARCHITECTURES if record.has(item, arch)]
    assert targets
    for arch in targets:
        _, log = jit.compile_cubin(kernel.source, kernel.constants, arch)
        entries = {entry.entry: entry for entry in jit.resources(log)}
        assert entries[kernel.entry].stack_bytes == 0, log


# ---- the comparison can fail -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ITEMS)
def test_a_wrong_element_is_noticed(name: str) -> None:
    """One element of each output, moved farther than its rule allows."""
    item = ITEMS[name]
    inputs = item.make_inputs()
    want = item.expected(inputs)
    assert item.compare(inputs, want, want).wrong == 0
    for output, tensor in want.items():
        got = {**want, output: tensor.clone()}
        flat = got[output].view(-1)
        place = int(tensor.reshape(-1).double().nan_to_num(0, 0, 0).abs().argmax())
        flat[place] = (
            flat[place] * (1 + 2.0**-7) + 1 if flat.is_floating_point() else flat[place] ^ 1
        )
        assert item.compare(inputs, got, want).wrong == 1, output


def test_rules() -> None:
    one, scale = torch.tensor([1.0, math.nan, 0.0, math.inf]), torch.tensor(2.0)
    other = torch.tensor([1.0 + 2**-23, math.nan, -0.0, -math.inf])
    assert Bits("").distance(one, other, scale).tolist() == [1, 0, 1, 1]
    negative_nan = torch.tensor([-1]).to(torch.int32).view(torch.float32)
    assert Bits("").distance(negative_nan, one[1:2], scale).item() == 1
    assert BitsOrNaN("").distance(negative_nan, one[1:2], scale).item() == 0
    assert BitsOrNaN("").distance(one, other, scale).tolist() == [1, 0, 1, 1]
    apart = Ulps("", 3).distance(one, other, scale)
    assert apart[:3].tolist() == [1, 0, 0] and apart[3] > 2**31
    assert Ulps("").distance(torch.tensor([-1e-45]), torch.tensor([1e-45]), scale).item() == 2
    assert (
        Ulps("").distance(torch.tensor([math.nan]), torch.tensor([1.0]), scale).item() == math.inf
    )
    within = Within("", 0.1).distance(one, torch.tensor([1.5, 1.0, 0.0, math.nan]), scale)
    assert within.tolist() == [0.25, math.inf, 0, math.inf]


# ---- recording -------------------------------------------------------------------------------------------

MACHINE = {
    "gpu": "NVIDIA Imaginary",
    "driver": "1.2",
    "date": "2026-01-01",
    "commit": "abc",
    "arch": "80",
}


def test_a_vector_comes_back_as_it_was(tmp_path: Path) -> None:
    outputs = {
        "a": torch.randn(3, 5).bfloat16(),
        "b": torch.tensor([math.nan, -0.0], dtype=torch.float64),
        "c": torch.arange(4, dtype=torch.int16),
    }
    vectors.save(
        tmp_path / "x.npz", vectors.Recording({"x": torch.ones(2).half()}, outputs, MACHINE)
    )
    back = vectors.load(tmp_path / "x.npz")
    assert back.machine == MACHINE and back.inputs["x"].dtype == torch.float16
    for name, tensor in outputs.items():
        assert back.outputs[name].dtype == tensor.dtype and back.outputs[name].shape == tensor.shape
        assert not Bits("").distance(back.outputs[name], tensor, torch.ones(())).any()


@needs_emulator
def test_recording_an_item(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the emulator in the GPU's place."""
    item = ITEMS["mma_m16n8k16_f16_random"]
    result = record.record_item(item, tmp_path, MACHINE, "cpu")
    assert result["expected"]["wrong"] == result["emulator"]["wrong"] == 0
    assert 0 < result["expected"]["largest"] <= item.rule.limit
    recording = vectors.load(tmp_path / f"{item.name}.npz")
    expected = item.expected(recording.inputs)
    assert not item.compare(recording.inputs, recording.outputs, expected).wrong

    def run(self: Item, inputs: dict[str, torch.Tensor], device: str) -> dict[str, torch.Tensor]:
        return {name: 2 * tensor + 1 for name, tensor in self.expected(inputs).items()}

    monkeypatch.setattr(Item, "run", run)
    wrong = record.record_item(item, tmp_path, MACHINE, "cpu")["expected"]
    assert wrong["wrong"] == wrong["total"] == 1024
    assert wrong["text"].startswith("1024 of 1024 differ in d, largest distance")


WORKER = """
import json, os, sys, time
for name in sys.argv[3:]:
    print("a library says hello")
    print(json.dumps({"begins": name}), flush=True)
    if name.startswith("dies"): os._exit(9)
    if name.startswith("hangs"): time.sleep(60)
    print(json.dumps({"item": name, "failed": "bad"} if name == "fails" else {"item": name}), flush=True)
    if name.startswith("poisons"): sys.exit(1)
"""


def test_one_failing_item_stops_none_of_the_rest(tmp_path: Path) -> None:
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    names = ["one", "dies", "two", "fails", "hangs", "poisons", "three", "dies_last"]
    told: list[str] = []
    results = record.run_all(
        names,
        tmp_path,
        lambda r: told.append(r["item"]),
        (sys.executable, str(script)),
        seconds=2.0,
    )
    assert [result["item"] for result in results] == told == names
    failed = {result["item"]: result["failed"] for result in results if "failed" in result}
    assert set(failed) == {"dies", "fails", "hangs", "dies_last"}
    assert failed["dies"].startswith("the process ended with 9")
    assert failed["hangs"] == "did not end in 2 s"


def test_items_run_where_their_instructions_are() -> None:
    item = ITEMS["ldmatrix_x1"]
    store = ITEMS["stmatrix_x1"]
    assert [record.has(item, arch) for arch in ("75", "80", "89", "90a", "100a")] == [False] + [
        True
    ] * 4
    assert [record.has(store, arch) for arch in ("80", "89", "90a", "100a")] == [
        False,
        False,
        True,
        True,
    ]


# ---- the summary -----------------------------------------------------------------------------------------


@pytest.fixture
def summary(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "golden.json"
    items = {
        "load": ("ldmatrix",),
        "load4": ("ldmatrix",),
        "narrow": ("float_to_half",),
        "move": ("load_once",),
    }
    results = [
        {"item": "load", "machine": MACHINE, "expected": {"wrong": 0}, "emulator": {"wrong": 0}},
        {"item": "load4", "machine": MACHINE, "expected": {"wrong": 0}},
        {"item": "narrow", "machine": MACHINE, "expected": {"wrong": 0}, "emulator": {"wrong": 3}},
    ]
    path.write_text(golden.summary_of(results, items, None))
    yield path


def test_status_of_wrappers(summary: Path) -> None:
    status = golden.status(summary)
    assert list(status) == golden.wrappers()
    assert status["ldmatrix"] == "agrees with NVIDIA Imaginary (driver 1.2)"
    assert status["float_to_half"] == "differs from NVIDIA Imaginary (driver 1.2): narrow"
    assert status["load_once"] == status["stmatrix"] == "not yet compared with hardware"


def test_a_later_recording_replaces_what_it_covers(summary: Path) -> None:
    items = {"load": ("ldmatrix",), "load4": ("ldmatrix",), "move": ("load_once",)}
    later = [
        {"item": "load4", "failed": "CUDA error"},
        {"item": "move", "machine": {**MACHINE, "gpu": "Other"}, "expected": {"wrong": 0}},
    ]
    summary.write_text(golden.summary_of(later, items, summary))
    status = golden.status(summary)
    assert status["ldmatrix"] == "failed on GPU (driver unknown): load4"
    assert status["load_once"] == "agrees with Other (driver 1.2)"
    assert set(json.loads(summary.read_text())["items"]) == set(items), (
        "items that are gone are forgotten"
    )


def test_without_a_recording_nothing_is_claimed(tmp_path: Path) -> None:
    assert set(golden.status(tmp_path / "absent.json").values()) == {golden.NOT_YET}


def test_the_committed_summary_is_that_of_the_vectors() -> None:
    items = (
        json.loads(golden.GOLDEN_FILE.read_text())["items"] if golden.GOLDEN_FILE.is_file() else {}
    )
    recorded = {name for name, item in items.items() if item["state"] in ("agrees", "differs")}
    assert recorded == set(RECORDED)

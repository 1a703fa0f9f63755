"""`cnnops demo`: what it promises on good input, one clear line on bad input, good manners always."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import needs_emulator
from torch import nn

import cnnops
from cnnops import demo, info
from cnnops.demo import figure
from cnnops.models import MODELS
from cnnops.training.record import Record

pytest.importorskip("sklearn", reason="scikit-learn is missing: pip install 'cnnops[demo]'")
pytest.importorskip("matplotlib", reason="matplotlib is missing: pip install 'cnnops[demo]'")
Console = pytest.importorskip("rich.console").Console


def cnnops_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cnnops", *arguments],
        capture_output=True,
        text=True,
        timeout=600,
    )


# ---- the whole story -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("model, enough", [("lenet5", 98), ("lenet5-original", 97)])
def test_from_start_to_end(model: str, enough: float, tmp_path: Path) -> None:
    """It learns, agrees with PyTorch, draws, and writes what a pipe can take."""
    out = tmp_path / "picture [1].png"
    done = cnnops_command("demo", "--engine", "cpu", "--model", model, "--out", str(out))
    assert (done.returncode, done.stderr) == (0, "")
    assert float(re.search(r"^test accuracy +([\d.]+) %", done.stdout, re.MULTILINE)[1]) >= enough
    assert done.stdout.count("\nepoch") == 12
    assert "the same weights in torch.nn's layers agree: largest difference" in done.stdout
    if info.unavailable("cuda") and info.unavailable("emulate"):
        assert "CUDA kernels    not run: " in done.stdout
    else:
        assert re.search(r"16 test digits (on the GPU|under the emulator) agree", done.stdout)
    assert f"saved {out}:" in done.stdout, "a path is not wrapped, nor are its brackets markup"
    assert re.search(r"^kernels compiled in this run: \d+", done.stdout, re.MULTILINE)
    assert "\x1b" not in done.stdout and "\r" not in done.stdout, "a pipe is no terminal"
    assert out.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_disagreement_is_said_and_fails() -> None:
    reference = torch.linspace(-9, 9, 160).view(16, 10)
    for scale, verdict in ((1e-6, True), (1e-3, False)):
        console = Console(file=io.StringIO(), width=200)
        logits = reference + scale * reference.norm() / 160**0.5
        assert demo._compare(console, "label", "what", logits, reference) is verdict
        assert ("DISAGREE" in console.file.getvalue()) is not verdict
    assert not demo._compare(console, "label", "what", reference * torch.nan, reference)


@needs_emulator
def test_kernels_are_compared_with_all_bits() -> None:
    """Also where torch would let convolutions use TF32, as on a GPU: that is further off than allowed."""
    torch.manual_seed(0)
    model, images = MODELS["lenet5"](), torch.randn(2, 1, 28, 28)
    stock = MODELS["lenet5"](layers=nn)
    stock.load_state_dict(model.state_dict())
    reference = demo.logits_of(stock, images)
    backends = torch.backends.cudnn.conv, torch.backends.mkldnn.conv
    former = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "tf32"
        with cnnops.engine("emulate"):
            rough = demo.logits_of(model, images)
        assert (rough - reference).norm() > demo.TOLERANCE * reference.norm()
        assert demo._check_kernels(Console(file=io.StringIO()), model, images, reference)
        assert [backend.fp32_precision for backend in backends] == ["tf32", "tf32"]
    finally:
        for backend, precision in zip(backends, former, strict=True):
            backend.fp32_precision = precision


# ---- bad input: one line, exit code 2, nothing done ------------------------------------------------------

BAD = {
    "no command": ([], "cnnops: expected a command"),
    "unknown command": (["dmeo"], "cnnops: argument command: invalid choice: 'dmeo'"),
    "unknown option": (["demo", "--epoch5"], "cnnops: unrecognized arguments: --epoch5"),
    "engine": (["demo", "--engine", "gpu"], "--engine: expected one of cuda, cpu, aten, got 'gpu'"),
    "model": (
        ["demo", "--model", "lenet"],
        "--model: expected one of lenet5, lenet5-original, got",
    ),
    "no epochs": (["demo", "--epochs", "0"], "--epochs: expected at least 1, got 0"),
    "epochs no number": (
        ["demo", "--epochs", "two"],
        "argument --epochs: invalid int value: 'two'",
    ),
    "seed": (["demo", "--seed", "-1"], "--seed: expected 0 to 2**63 - 1, got -1"),
    "out is a folder": (
        ["demo", "--out", "."],
        "--out: expected a file in a folder that exists, got .",
    ),
    "out nowhere": (
        ["demo", "--out", "no/where.png"],
        "--out: expected a file in a folder that exists",
    ),
    "data nowhere": (
        ["demo", "--data", "nowhere"],
        "data: expected a folder with MNIST's files, got",
    ),
    "data empty": (
        ["demo", "--data", "."],
        "data: expected train-images-idx3-ubyte or train-images-",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from cnnops.__main__ import main

    arguments, message = BAD[case]
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CNNOPS_ENGINE", raising=False)
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    printed = capsys.readouterr()
    assert stopped.value.code == 2 and printed.out == ""
    assert message in printed.err and printed.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def prepared(engine: str | None) -> demo.Plan:
    return demo.prepare(engine, "lenet5", 1, None, 0, Path("cnnops_demo.png"))


def test_engine_is_chosen_by_what_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CNNOPS_ENGINE", raising=False)
    monkeypatch.setattr(info, "gpu", lambda: "a GPU")
    monkeypatch.setattr(info, "unavailable", lambda engine: None)
    assert prepared(None).recipe.engine == "cuda"
    assert prepared("aten").recipe.engine == "aten"
    monkeypatch.setattr(info, "unavailable", lambda engine: "CuPy is missing: pip install it")
    plan = prepared(None)
    assert (plan.recipe.engine, plan.note) == (
        "cpu",
        "the GPU is left out: CuPy is missing: pip install it",
    )
    with pytest.raises(ValueError, match="engine 'cuda': CuPy is missing"):
        prepared("cuda")
    monkeypatch.setattr(info, "gpu", lambda: "")
    assert (prepared(None).recipe.engine, prepared(None).note) == ("cpu", "")
    monkeypatch.setenv("CNNOPS_ENGINE", "aten")
    assert prepared(None).recipe.engine == "aten" and prepared("cpu").recipe.engine == "cpu"
    monkeypatch.setenv("CNNOPS_ENGINE", "emulate")
    with pytest.raises(ValueError, match="expected one of cuda, cpu, aten, got 'emulate'"):
        prepared(None)


def test_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    find = demo.importlib.util.find_spec
    for missing in ("sklearn", "matplotlib"):
        monkeypatch.setattr(
            demo.importlib.util,
            "find_spec",
            lambda name, missing=missing: None if name == missing else find(name),
        )
        with pytest.raises(ValueError, match=rf"needs {missing}: pip install 'cnnops\[demo\]'"):
            prepared("cpu")


# ---- good manners ----------------------------------------------------------------------------------------


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
def test_control_c_ends_cleanly(tmp_path: Path) -> None:
    out = tmp_path / "demo.png"
    arguments = ["demo", "--engine", "aten", "--model", "lenet5-original", "--epochs", "1000"]
    child = subprocess.Popen(
        [sys.executable, "-u", "-m", "cnnops", *arguments, "--out", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell that runs the tests in the background lets them, and so the child, ignore the signal.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    for line in child.stdout:
        if line.startswith("epoch"):
            child.send_signal(signal.SIGINT)
            break
    _, errors = child.communicate(timeout=120)
    assert (child.returncode, errors) == (130, "interrupted\n")
    assert list(tmp_path.iterdir()) == []


# ---- the picture -----------------------------------------------------------------------------------------


def draw(path: Path) -> None:
    record = Record([1.0, 0.5, 0.2, 0.1], [0.1] * 4, [2, 4], [0.5, 0.8], [1.0, 1.0], [64, 64])
    truth = torch.arange(10).repeat(2)
    figure.save(path, "title", record, torch.randn(6, 1, 5, 5), truth.roll(1), truth)


def test_picture_is_one_png(tmp_path: Path) -> None:
    draw(tmp_path / "any.name")
    from matplotlib.image import imread

    assert imread(io.BytesIO((tmp_path / "any.name").read_bytes()), format="png").std() > 0.05
    assert [p.name for p in tmp_path.iterdir()] == ["any.name"]


def test_interrupted_drawing_leaves_the_former_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.figure import Figure

    def interrupted(self: Figure, file: io.BufferedWriter, **_: object) -> None:
        file.write(b"half a picture")
        raise KeyboardInterrupt

    path = tmp_path / "demo.png"
    path.write_bytes(b"former")
    monkeypatch.setattr(Figure, "savefig", interrupted)
    with pytest.raises(KeyboardInterrupt):
        draw(path)
    assert path.read_bytes() == b"former" and [p.name for p in tmp_path.iterdir()] == ["demo.png"]

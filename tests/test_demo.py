"""`cnnops demo`: what it promises on good input, one clear line on bad input, good manners always."""

from __future__ import annotations

import gzip
import io
import os
import re
import signal
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import needs_emulator
from torch import nn

import cnnops
from cnnops import data, demo, info
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


# ---- data ------------------------------------------------------------------------------------------------


def test_scikit_digits_are_split_once_and_for_all() -> None:
    digits = data.scikit_digits()
    assert digits.train_images.shape == (1438, 1, 28, 28) and len(digits.train_labels) == 1438
    assert digits.test_images.shape == (359, 1, 28, 28) and len(digits.test_labels) == 359
    assert digits.train_images.dtype == torch.float32 and digits.train_labels.dtype == torch.int64
    assert digits.train_images.min() == 0 and digits.train_images.max() == 1
    assert torch.bincount(digits.test_labels, minlength=10).tolist() == [
        35, 37, 35, 37, 36, 36, 36, 36, 35, 36
    ]  # fmt: skip

    from sklearn.datasets import load_digits

    raw = load_digits()
    first = np.argsort(raw.target, kind="stable")[4::5].min()
    # Bilinear from 8 to 28: the places that lie between four pixels' centres mix just those.
    pixels = torch.from_numpy(raw.images[first] / 16).float()
    at = [(i + 0.5) * 8 / 28 - 0.5 for i in (6, 13)]
    (top, left), (b, r) = map(int, at), (at[0] % 1, at[1] % 1)
    four = pixels[top : top + 2, left : left + 2]
    mixed = torch.tensor([1 - b, b]) @ four @ torch.tensor([1 - r, r])
    torch.testing.assert_close(digits.test_images[0, 0, 6, 13], mixed)


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


@pytest.fixture
def mnist_files() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        f"{part}-{kind}": rng.integers(0, high, (n, *size), dtype=np.uint8)
        for part, n in (("train", 40), ("t10k", 8))
        for kind, high, size in (
            ("images-idx3-ubyte", 256, (28, 28)),
            ("labels-idx1-ubyte", 10, ()),
        )
    }


@pytest.mark.parametrize("place", ["", "raw", "MNIST/raw"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dotted", [False, True])
def test_mnist_is_read(
    tmp_path: Path, mnist_files: dict[str, np.ndarray], place: str, packed: bool, dotted: bool
) -> None:
    (tmp_path / place).mkdir(parents=True, exist_ok=True)
    for name, array in mnist_files.items():
        name = name.replace("-idx", ".idx") if dotted else name
        content = gzip.compress(idx(array)) if packed else idx(array)
        (tmp_path / place / (name + ".gz" * packed)).write_bytes(content)
    digits = data.mnist(tmp_path)
    images, labels = mnist_files["train-images-idx3-ubyte"], mnist_files["train-labels-idx1-ubyte"]
    assert torch.equal(digits.train_images[:, 0], torch.from_numpy(images) / 255)
    assert torch.equal(digits.train_labels, torch.from_numpy(labels).long())
    assert digits.test_images.shape == (8, 1, 28, 28) and len(digits.test_labels) == 8


DAMAGE = {
    "magic": (
        "train-images-idx3-ubyte",
        lambda b: b"\0\0\x0d" + b[3:],
        "idx file of bytes with rank 3",
    ),
    "empty": ("train-images-idx3-ubyte", lambda b: b"", "idx file of bytes with rank 3, got  at"),
    "cut": (
        "t10k-images-idx3-ubyte",
        lambda b: b[:-1],
        "expected 6272 bytes for (8, 28, 28), got 6271",
    ),
    "longer": ("t10k-labels-idx1-ubyte", lambda b: b + b"\0", "expected 8 bytes for (8,), got 9"),
    "side": (
        "train-images-idx3-ubyte",
        lambda b: idx(np.zeros((40, 27, 28), np.uint8)),
        "train images: expected 28x28, got 27x28",
    ),
    "fewer labels": (
        "train-labels-idx1-ubyte",
        lambda b: idx(np.zeros(39, np.uint8)),
        "got 40 images and 39 labels",
    ),
    "label": ("t10k-labels-idx1-ubyte", lambda b: b[:-1] + b"\x0a", "expected 0 to 9, got 10"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_mnist_is_refused(
    tmp_path: Path, mnist_files: dict[str, np.ndarray], case: str
) -> None:
    for name, array in mnist_files.items():
        (tmp_path / name).write_bytes(idx(array))
    name, damage, message = DAMAGE[case]
    (tmp_path / name).write_bytes(damage((tmp_path / name).read_bytes()))
    with pytest.raises(data.DataError, match=re.escape(message)):
        data.mnist(tmp_path)


@pytest.mark.parametrize(
    "content",
    [b"not gzip", gzip.compress(idx(np.zeros(40, np.uint8)))[:-9]],
    ids=["not_gzip", "cut_short"],
)
def test_damaged_gzip_is_refused(
    tmp_path: Path, mnist_files: dict[str, np.ndarray], content: bytes
) -> None:
    for name, array in mnist_files.items():
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(idx(array)))
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(content)
    with pytest.raises(data.DataError, match=r"train-labels.*expected a readable file, got"):
        data.mnist(tmp_path)

"""`cnnops train` and `cnnops eval`: from start to end, a clear line on bad input, every option's effect."""

from __future__ import annotations

import csv
import io
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import small_networks
import torch
from small_networks import tiny, write_digits
from torch import nn

import cnnops
from cnnops.__main__ import main
from cnnops.data.digits import idx_files
from cnnops.training import checkpoint, network, plan
from cnnops.training.loop import Diverged, Training
from cnnops.training.plan import Recipe

pytest.importorskip("sklearn", reason="scikit-learn is missing: pip install 'cnnops[demo]'")
pytest.importorskip("matplotlib", reason="matplotlib is missing: pip install 'cnnops[demo]'")
Console = pytest.importorskip("rich.console").Console

HERE = Path(__file__).parent
RECIPE = Recipe("small_networks:tiny", batch=16, epochs=2, engine="aten", channels=1, size=(28, 28))


def cnnops_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cnnops", *arguments],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=HERE,
        env={**os.environ, "CNNOPS_POLICY": "own"},
    )


@pytest.fixture(scope="module")
def noise(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 50 images to learn from, and 5 to test on."""
    return write_digits(tmp_path_factory.mktemp("data") / "noise", 50)


@pytest.fixture(scope="module")
def kept(noise: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run."""
    out = tmp_path_factory.mktemp("runs") / "kept"
    assert main(arguments(noise, out)) == 0
    return out


def arguments(noise: Path, out: Path, *more: str) -> list[str]:
    given = [
        "--data",
        str(noise),
        "--engine",
        "aten",
        "--epochs",
        "2",
        "--batch",
        "16",
        "--threads",
        "1",
    ]
    return ["train", "small_networks:tiny", *given, "--out", str(out), *more]  # fmt: skip


def quiet() -> Any:
    return Console(file=io.StringIO(), width=120)


def trained(noise: Path, console: Any = None, **changes: Any) -> Training:
    training = Training(replace(RECIPE, **changes), idx_files(noise))
    training.run(console or quiet())
    return training


# ---- the whole story -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_from_start_to_end(tmp_path: Path) -> None:
    """LeNet-5 learns the digits; what was kept says so again; a pipe gets no bar and no colours."""
    out = tmp_path / "run [1]"
    done = cnnops_command("train", "lenet5", "--epochs", "4", "--engine", "cpu", "--out", str(out))
    assert (done.returncode, done.stderr) == (0, "")
    assert "1438 to learn from, 359 to test on, 10 classes; engine cpu, seed 0\n" in done.stdout
    assert done.stdout.count("\nepoch") == 4 and "images/s" in done.stdout
    assert "\x1b" not in done.stdout and "\r" not in done.stdout
    accuracy = re.search(r"^test accuracy +([\d.]+) % .*$", done.stdout, re.MULTILINE)
    assert float(accuracy[1]) > 95
    assert {p.name for p in out.iterdir()} - {"tensorboard"} == {
        "checkpoint.pt", "checkpoint-previous.pt", "curves.csv", "curves.png", "steps.csv"
    }  # fmt: skip
    with open(out / "curves.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4 and float(rows[-1]["test_accuracy"]) > 0.95
    assert float(rows[-1]["loss"]) < float(rows[0]["loss"]) / 4

    done = cnnops_command("eval", str(out))
    assert (done.returncode, done.stderr) == (0, "")
    assert accuracy[0].partition(" after")[0] in done.stdout


# ---- bad input: one line, exit code 2, nothing done ------------------------------------------------------

BAD = {
    "no model": (["train"], "cnnops train: the following arguments are required: MODEL"),
    "model": (["train", "lenet"], "MODEL: expected package.module:callable or one of lenet5, "),
    "no module": (["train", "nowhere:net"], "MODEL 'nowhere:net': ModuleNotFoundError"),
    "no epochs": (["train", "lenet5", "--epochs", "0"], "--epochs: expected at least 1, got 0"),
    "rate": (["train", "lenet5", "--rate", "nan"], "--rate: expected at least 0, got nan"),
    "dropout": (["train", "lenet5", "--dropout", "1"], "--dropout: expected 0 to 0.9999, got 1.0"),
    "optimizer": (
        ["train", "lenet5", "--optimizer", "lion"],
        "--optimizer: expected one of sgd, adam, adamw, got 'lion'",
    ),
    "schedule": (["train", "lenet5", "--schedule", "up"], "--schedule: expected one of constant, "),
    "amp": (["train", "lenet5", "--amp", "fp8"], "--amp: expected one of bfloat16, float16, got"),
    "engine": (["train", "lenet5", "--engine", "gpu"], "--engine: expected one of cuda, cpu, aten"),
    "fused": (
        ["train", "lenet5", "--engine", "aten", "--fuse-training"],
        "--fuse-training: expected engine cuda or cpu, got aten",
    ),
    "warmup": (
        ["train", "lenet5", "--epochs", "3", "--warmup", "3"],
        "--warmup: expected 0 or more epochs, less than all 3, got 3",
    ),
    "augment": (["train", "lenet5", "--augment", "turn=2"], "--augment: expected shift=PIXELS, "),
    "size": (["train", "lenet5", "--size", "28"], "--size: expected H,W as in 32,32, got '28'"),
    "too small": (
        ["train", "lenet5", "--size", "8,8"],
        "MODEL 'lenet5': expected one for images of 1 x 8",
    ),
    "workers": (["train", "lenet5", "--workers", "-1"], "--workers: expected at least 0, got -1"),
    "data": (["train", "lenet5", "--data", "nowhere"], "--data: expected a folder with MNIST's"),
    "classes": (
        ["train", "small_networks:fixed"],
        "MODEL 'small_networks:fixed': expected logits of shape [1, 10], one a class of the data, "
        "got [1, 5]",
    ),
    "unwritable": (
        ["train", "lenet5", "--out", "/dev/null/run"],
        "--out: expected a folder that can be written, got /dev/null/run",
    ),
    "no checkpoint": (["eval", "."], "CHECKPOINT: expected a checkpoint, got ."),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given, message = BAD[case]
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CNNOPS_ENGINE", raising=False)
    check_refused(given, message, capsys)
    assert list(tmp_path.iterdir()) == []


def check_refused(given: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    try:
        code = main(given)
    except SystemExit as stopped:
        code = stopped.code
    printed = capsys.readouterr()
    assert code == 2 and printed.out == "", printed
    assert message in printed.err and printed.err.count("\n") == 1


def test_checkpoints_that_are_none(
    kept: Path, noise: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A flipped bit anywhere, a cut, another file, a pickle that would run something."""
    whole = (kept / checkpoint.NEWEST).read_bytes()
    damaged = {at: bytearray(whole) for at in (0, len(whole) // 2, len(whole) - 1)}
    for at, content in damaged.items():
        content[at] ^= 1
    for content in (*damaged.values(), whole[:-100], b"", b"not a checkpoint"):
        (tmp_path / checkpoint.NEWEST).write_bytes(content)
        for given in (["eval", str(tmp_path)], arguments(noise, tmp_path, "--resume")):
            check_refused(given, "expected a whole checkpoint of `cnnops train`, got", capsys)
    (tmp_path / checkpoint.PREVIOUS).write_bytes(whole)
    check_refused(
        arguments(noise, tmp_path, "--resume"),
        "remove it to go on from checkpoint-previous.pt",
        capsys,
    )

    class Runs:
        def __reduce__(self) -> Any:
            return (os.mkdir, (str(tmp_path / "ran"),))

    import hashlib

    for value in (Runs(), {"format": "another"}, [1]):
        buffer = io.BytesIO()
        torch.save(value, buffer)
        content = buffer.getvalue()
        (tmp_path / checkpoint.NEWEST).write_bytes(content + hashlib.sha256(content).digest())
        check_refused(["eval", str(tmp_path)], "expected a", capsys)
    assert not (tmp_path / "ran").exists()
    assert torch.load(kept / checkpoint.NEWEST, weights_only=True)["step"] == 6


def test_only_what_the_user_names_is_imported(
    kept: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check_refused(["eval", str(kept)], "to import that, say --model small_networks:tiny", capsys)
    check_refused(["eval", str(kept), "--model", "lenet5"], "--model: expected small_", capsys)
    assert main(["eval", str(kept), "--model", "small_networks:tiny"]) == 0
    assert re.search(r"test accuracy   [\d.]+ % \(\d of 5\)\n", capsys.readouterr().out)


def test_a_run_goes_on_as_it_began(
    kept: Path, noise: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check_refused(arguments(noise, kept), "--out: expected a folder without a checkpoint", capsys)
    for more, message in (
        (("--batch", "8"), "--batch: expected 16, with which this run began, got 8"),
        (("--rate", "0.1"), "--rate: expected 0.002, with which this run began, got 0.1"),
        (("--amp", "bfloat16"), "--amp: expected its default, with which this run began"),
        (("--channels-last",), "--channels-last: expected False, with which this run began"),
    ):
        check_refused(arguments(noise, kept, "--resume", *more), message, capsys)
    other = write_digits(tmp_path / "other", 60)
    check_refused(
        ["train", "small_networks:tiny", "--data", str(other), "--out", str(kept), "--resume"],
        "--data: expected ",
        capsys,
    )
    assert main(["train", "small_networks:tiny", "--out", str(kept), "--resume"]) == 0
    assert "going on from step 6 (" in capsys.readouterr().out


def test_images_of_other_classes_and_none(
    kept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder of images is learned from; a model of digits is not tested on it; a torn one is named."""
    image = pytest.importorskip("PIL.Image")
    for part, images in (("train", 8), ("val", 2)):
        for kind, colour in (("cat", (200, 90, 20)), ("dog", (10, 60, 220))):
            folder = tmp_path / "pets" / part / kind
            folder.mkdir(parents=True)
            for number in range(images):
                image.new("RGB", (40, 40), colour).save(folder / f"{number}.png")
    pets = ["--data", str(tmp_path / "pets")]
    check_refused(
        ["eval", str(kept), "--model", "small_networks:tiny", *pets],
        "--data: expected the classes of the training, 10 (0, 1, 2, …), got 2 (cat, dog)",
        capsys,
    )
    out = tmp_path / "run"
    more = [
        "--engine",
        "aten",
        "--epochs",
        "1",
        "--batch",
        "4",
        "--size",
        "28,28",
        "--workers",
        "1",
    ]
    assert main(["train", "small_networks:tiny", *pets, *more, "--out", str(out)]) == 0
    assert main(["eval", str(out), "--model", "small_networks:tiny"]) == 0
    capsys.readouterr()
    (tmp_path / "pets/val/dog/1.png").write_bytes(b"torn")
    assert main(["eval", str(out), "--model", "small_networks:tiny", "--workers", "1"]) == 2
    errors = capsys.readouterr().err
    assert "dog/1.png" in errors and errors.count("\n") == 1


def test_other_images_under_the_same_name(kept: Path, noise: Path) -> None:
    state = checkpoint.load(kept / checkpoint.NEWEST)
    training = Training(RECIPE, idx_files(noise))
    with pytest.raises(ValueError, match="expected 65 images of 10 classes, as when the run began"):
        training.go_on_from({**state, "images": [60, 5]})
    with pytest.raises(ValueError, match="expected weights that fit the model"):
        training.go_on_from({**state, "model": {}})


def test_what_cannot_be_written_any_more_is_said(
    noise: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As when the disk is full: the checkpoint before is whole."""
    real, calls = os.fsync, []

    def full(handle: int) -> None:
        calls.append(handle)
        if len(calls) > 2:  # the file and the folder of the first checkpoint
            raise OSError(28, "No space left on device")
        real(handle)

    monkeypatch.setattr(os, "fsync", full)
    assert main(arguments(noise, tmp_path)) == 2
    errors = capsys.readouterr().err
    assert "No space left on device" in errors and "what was kept before is whole" in errors
    assert errors.count("\n") == 1
    assert checkpoint.load(tmp_path / checkpoint.NEWEST)["step"] == 3
    assert {p.name for p in tmp_path.iterdir()} <= {"checkpoint.pt", "curves.csv", "tensorboard"}


@pytest.mark.skipif(os.name != "posix", reason="sends signals")
@pytest.mark.parametrize(
    "number, word", [(signal.SIGTERM, "terminated"), (signal.SIGINT, "interrupted")]
)
def test_signals_keep_the_step(
    number: signal.Signals, word: str, noise: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def interrupting(classes: int = 10, channels: int = 1) -> nn.Module:
        calls: list[nn.Module] = []

        def send(model: nn.Module, _: Any) -> None:
            if model.training:
                calls.append(model)
            if len(calls) == 2:
                os.kill(os.getpid(), number)

        model = tiny(classes, channels)
        model.register_forward_pre_hook(send)
        return model

    former = signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr(small_networks, "tiny", interrupting)
        assert main(arguments(noise, tmp_path)) == 128 + number
    assert signal.getsignal(number) is former
    message = f"cnnops train: {word} after step 2 of 6: --resume goes on from there\n"
    assert capsys.readouterr().err == message
    assert checkpoint.load(tmp_path / checkpoint.NEWEST)["step"] == 2
    assert main(arguments(noise, tmp_path, "--resume")) == 0
    assert "going on from step 2 (" in capsys.readouterr().out


# ---- the loop --------------------------------------------------------------------------------------------


def weights(training: Training) -> list[torch.Tensor]:
    return [t.clone() for t in training.model.state_dict().values()]


def test_training_is_decided_by_the_seed(noise: Path) -> None:
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    one, two, other = (weights(trained(noise, seed=seed)) for seed in (5, 5, 6))
    assert all(map(torch.equal, one, two))
    assert not any(torch.equal(a, b) for a, b in zip(one, other, strict=True) if a.dim())
    assert torch.equal(torch.get_rng_state(), state), "the caller's random numbers are left alone"
    assert torch.get_num_threads() == threads


OPTIONS: dict[str, dict[str, Any]] = {
    "sgd": {"optimizer": "sgd", "schedule": "step", "weight_decay": 0.01},
    "adamw": {"optimizer": "adamw", "schedule": "cosine", "warmup": 0.7, "weight_decay": 0.01},
    "constant": {"schedule": "constant", "warmup": 1.0, "label_smoothing": 0.1},
    "half": {"amp": "float16", "dropout": 0.5, "augment": "shift=1,crop=2,flip,noise=0.1"},
    "brain": {"amp": "bfloat16", "channels_last": True, "augment": "none"},
    "fused": {"engine": "cpu", "fuse_training": True},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_goes_on_bit_by_bit_from_any_step(name: str, noise: Path) -> None:
    """In the midst of an epoch, at its end, and before the first step; with every option."""
    recipe, images = replace(RECIPE, **OPTIONS[name]), idx_files(noise)
    states: list[dict[str, Any]] = []

    def keep(training: Training) -> None:
        buffer = io.BytesIO()
        torch.save(training.state(), buffer)
        states.append(torch.load(io.BytesIO(buffer.getvalue()), weights_only=True))

    whole = Training(recipe, images)
    keep(whole)
    whole.run(quiet(), 1, keep)
    assert [state["step"] for state in states] == list(range(7))
    for state in (states[0], states[2], states[3]):
        again = Training(Recipe.of(state["recipe"]), images)
        again.go_on_from(state)
        again.run(quiet())
        assert all(map(torch.equal, weights(again), weights(whole)))
        assert again.record.losses == whole.record.losses
        assert again.record.rates == whole.record.rates
        assert again.record.accuracies == whole.record.accuracies


def test_rates(noise: Path) -> None:
    """Of six steps: which is the largest, and where they end."""
    wanted = {
        ("constant", None): [1, 1, 1, 1, 1, 1],
        ("constant", 1.0): [1 / 4, 2 / 4, 3 / 4, 1, 1, 1],
        ("step", None): [1, 1, 1, 0.1, 0.01, 0.01],
        ("cosine", None): [1, 0.9330, 0.75, 0.5, 0.25, 0.0670],
    }
    for (schedule, warmup), factors in wanted.items():
        rates = trained(noise, rate=0.01, schedule=schedule, warmup=warmup).record.rates
        assert [rate / 0.01 for rate in rates] == pytest.approx(factors, abs=1e-4)
    rates = trained(noise, rate=0.01).record.rates
    assert max(rates) <= 0.01 and rates[0] == pytest.approx(0.0004) and rates[-1] < 1e-6


def test_a_loss_that_is_no_number_ends_the_run(
    noise: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(Diverged, match=r"step \d: the loss is nan: a lower --rate"):
        trained(noise, optimizer="sgd", rate=1e30, schedule="constant")
    more = ("--optimizer", "sgd", "--rate", "1e30", "--schedule", "constant")
    assert main(arguments(noise, tmp_path, *more)) == 1
    assert "a lower --rate" in capsys.readouterr().err
    assert checkpoint.find(tmp_path) is None, "nothing that is no number was kept"


def test_a_terminal_gets_a_bar_and_a_pipe_does_not(noise: Path) -> None:
    for terminal in (True, False):
        console = Console(file=io.StringIO(), force_terminal=terminal, width=100)
        trained(noise, console)
        printed = console.file.getvalue()
        assert ("━" in printed) is terminal and printed.count("epoch") == 2


def test_workers_change_nothing(noise: Path) -> None:
    images = idx_files(noise)
    runs = [Training(RECIPE, images, workers=workers) for workers in (0, 1)]
    for training in runs:
        training.run(quiet())
    assert runs[0].record.losses == runs[1].record.losses
    assert runs[0].score == runs[1].score


# ---- the network -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, channels, size",
    [
        ("lenet5", 1, (28, 28)),
        ("lenet5-original", 1, (32, 32)),
        ("resnet18", 3, (28, 28)),
        ("alexnet", 3, (64, 64)),
        ("small_networks:tiny", 1, (28, 28)),
    ],
)
def test_images_suit_the_network(name: str, channels: int, size: tuple[int, int]) -> None:
    found = network.fitted(Recipe(name), small=True)
    assert (found.channels, found.size) == (channels, size)


def test_published_sizes_are_for_photographs() -> None:
    assert network.fitted(Recipe("resnet18"), small=False).size == (224, 224)
    assert network.fitted(Recipe("small_networks:tiny"), small=False).size == (28, 28)


def test_layers_are_the_engines() -> None:
    kinds = {}
    for engine in ("cpu", "aten"):
        for name in ("lenet5", "small_networks:tiny"):
            model = network.build(replace(RECIPE, model=name, engine=engine), 10)
            kinds[engine, name] = {
                type(m) for m in model.modules() if isinstance(m, nn.Conv2d | nn.MaxPool2d)
            }
    for name in ("lenet5", "small_networks:tiny"):
        assert kinds["cpu", name] == {cnnops.nn.Conv2d, cnnops.nn.MaxPool2d}
        assert kinds["aten", name] == {nn.Conv2d, nn.MaxPool2d}


def test_factories_in_torchvisions_manner(monkeypatch: pytest.MonkeyPatch) -> None:
    def manner(*, weights: Any = None, **more: Any) -> nn.Module:
        return tiny(more["num_classes"])

    monkeypatch.setattr(small_networks, "manner", manner, raising=False)
    model = network.build(replace(RECIPE, model="small_networks:manner"), 7)
    assert model[-1].out_features == 7


def test_dropout_takes_the_place_of_the_models() -> None:
    model = network.build(replace(RECIPE, dropout=0.7), 10)
    assert [m.p for m in model.modules() if isinstance(m, nn.Dropout)] == [0.7]
    plain = network.build(replace(RECIPE, model="lenet5"), 10)
    model = network.build(replace(RECIPE, model="lenet5", dropout=0.7), 10)
    assert model.state_dict().keys() == plain.state_dict().keys()
    x = torch.rand(2, 1, 28, 28)
    assert torch.equal(model.eval()(x), plain.eval()(x))
    assert not torch.equal(model.train()(x), model(x))


# ---- options ---------------------------------------------------------------------------------------------


def test_defaults_suit_the_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CNNOPS_ENGINE", raising=False)
    digits = plan.complete({"model": "lenet5"})
    assert (digits.epochs, digits.batch, digits.rate) == (12, 32, 2e-3)
    large = plan.complete({"model": "lenet5", "data": "/mnist", "optimizer": "sgd", "batch": 8})
    assert (large.epochs, large.batch, large.rate) == (3, 8, 0.05)
    assert Recipe.of(large.state()) == large
    with pytest.raises(ValueError, match="recipe: expected amp, "):
        Recipe.of({"model": "lenet5"})

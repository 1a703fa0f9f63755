"""Networks learn with these kernels what they learn with PyTorch: along one curve, from the same seed."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
import torch

from cnnops.data.digits import scikit
from cnnops.training.batches import OrderedBatches
from cnnops.training.loop import Training
from cnnops.training.plan import Recipe

pytest.importorskip("sklearn", reason="scikit-learn is missing: pip install 'cnnops[demo]'")
Console = pytest.importorskip("rich.console").Console

ENGINES = ["cpu"]
if torch.cuda.is_available():
    ENGINES.append(pytest.param("cuda", marks=pytest.mark.gpu))
EPOCHS = 4
RECIPES = {
    "lenet5": Recipe("lenet5", optimizer="sgd", rate=0.05),
    "vgg": Recipe("small_networks:vgg", optimizer="adam", rate=2e-3, weight_decay=1e-4),
    "resnet": Recipe("small_networks:resnet", optimizer="sgd", rate=0.05, label_smoothing=0.1),
}


def trained(recipe: Recipe, engine: str) -> Training:
    recipe = replace(
        recipe, epochs=EPOCHS, batch=64, engine=engine, channels=1, size=(28, 28), threads=1
    )
    training = Training(recipe, scikit())
    training.run(Console(file=io.StringIO()))
    return training


def hits(training: Training) -> int:
    """Of all 1,797 digits: one of the 359 for testing alone would be 0.3 %."""
    total = 0
    with training._settings():
        for split in (training.data.train, training.data.test):
            for logits, labels in training.answers(OrderedBatches(split, 256)):
                total += int((logits.argmax(1) == labels).sum())
    return total


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", RECIPES)
def test_as_with_pytorch(name: str, engine: str) -> None:
    """Rounding differs, and training amplifies that: curves part slowly, and meet again at the end."""
    ours, theirs = (trained(RECIPES[name], e) for e in (engine, "aten"))
    curve, expected = (torch.tensor(t.record.losses, dtype=torch.float64) for t in (ours, theirs))
    assert len(curve) == EPOCHS * 22 and expected[-22:].mean() < expected[0] / 2
    assert ((curve - expected).abs() / expected)[:15].max() < 1e-3
    means, wanted = (torch.tensor(t.record.epoch_losses()) for t in (ours, theirs))
    torch.testing.assert_close(means, wanted, rtol=0.05, atol=0.02)
    assert abs(hits(ours) - hits(theirs)) <= 0.005 * 1797
    assert hits(ours) >= 0.93 * 1797

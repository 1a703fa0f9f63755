"""The networks: sizes and parameter counts of the lectures, and the same numbers as in stock layers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import cnnops
from cnnops.models import MODELS

# (name of the layer, size of its output without the batch, parameters: weights and biases)
TABLES = {
    "lenet5": (
        ("conv1", (20, 28, 28), 20 * (5 * 5 + 1)),
        ("pool1", (20, 14, 14), 0),
        ("conv2", (50, 14, 14), 50 * (20 * 5 * 5 + 1)),
        ("pool2", (50, 7, 7), 0),
        ("fc1", (500,), 500 * (2450 + 1)),
        ("fc2", (10,), 10 * (500 + 1)),
    ),
    "lenet5-original": (
        ("conv1", (6, 28, 28), 6 * (5 * 5 + 1)),
        ("pool1", (6, 14, 14), 0),
        ("conv2", (16, 10, 10), 16 * (6 * 5 * 5 + 1)),
        ("pool2", (16, 5, 5), 0),
        ("conv3", (120, 1, 1), 120 * (16 * 5 * 5 + 1)),
        ("fc1", (84,), 84 * (120 + 1)),
        ("fc2", (10,), 10 * (84 + 1)),
    ),
}
TOTALS = {"lenet5": 1_256_080, "lenet5-original": 61_706}


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def images(name: str, n: int = 3, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 1, *MODELS[name].input_size, dtype=dtype, generator=generator)


def test_every_model_has_a_table() -> None:
    assert TABLES.keys() == TOTALS.keys() == MODELS.keys()


@pytest.mark.parametrize("name", MODELS)
def test_layers_are_the_lectures(name: str) -> None:
    model = MODELS[name](layers=nn)
    seen = {}
    for child_name, child in model.named_children():
        child.register_forward_hook(
            lambda module, inputs, output, key=child_name: seen.update(
                {key: tuple(output.shape[1:])}
            )
        )
    assert model(images(name)).shape == (3, 10)
    table = [(key, size, parameters(model.get_submodule(key))) for key, size in seen.items()]
    assert table == list(TABLES[name])
    assert parameters(model) == TOTALS[name]


@pytest.mark.parametrize("name", MODELS)
def test_layers_come_from_the_module_asked_for(name: str) -> None:
    def kinds(model: nn.Module) -> set[str]:
        spatial = [m for key, m in model.named_children() if not key.startswith("fc")]
        return {type(m).__module__.partition(".")[0] for m in spatial}

    assert kinds(MODELS[name]()) == {"cnnops"}
    assert kinds(MODELS[name](layers=nn)) == {"torch"}


@pytest.mark.parametrize("name", MODELS)
def test_stock_and_own_layers_agree(name: str) -> None:
    """One state_dict, float64: logits and the gradient of every parameter and of the input."""
    own, stock = MODELS[name]().double(), MODELS[name](layers=nn).double()
    assert stock.load_state_dict(own.state_dict()) == nn.modules.module._IncompatibleKeys([], [])
    labels = torch.tensor([3, 1, 4])
    results = []
    for model in (own, stock):
        x = images(name, dtype=torch.float64).requires_grad_()
        with cnnops.engine("cpu"), cnnops.fallback("error"):
            logits = model(x)
            nn.functional.cross_entropy(logits, labels).backward()
        results.append([logits.detach(), x.grad, *(p.grad for p in model.parameters())])
    for ours, theirs in zip(*results, strict=True):
        assert torch.linalg.vector_norm(ours - theirs) <= 1e-12 * torch.linalg.vector_norm(theirs)


@pytest.mark.parametrize("name", MODELS)
def test_classes_and_channels(name: str) -> None:
    model = MODELS[name](classes=7, channels=3, layers=nn)
    assert model(torch.zeros(2, 3, *model.input_size)).shape == (2, 7)


@pytest.mark.parametrize("name", MODELS)
def test_other_image_sizes_are_refused(name: str) -> None:
    height, width = MODELS[name].input_size
    with pytest.raises(RuntimeError):
        MODELS[name](layers=nn)(torch.zeros(2, 1, height + 8, width))

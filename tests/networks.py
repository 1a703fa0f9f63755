"""A network of all kinds of layers, and what one step of training makes of a model."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class UNet(nn.Module):
    """An encoder and decoder with skips: convolution both ways, pooling and unpooling, four norms."""

    def __init__(self, dims: int, channels: int = 4) -> None:
        super().__init__()
        conv, up = getattr(nn, f"Conv{dims}d"), getattr(nn, f"ConvTranspose{dims}d")
        self.first = nn.Sequential(
            conv(3, channels, 3, padding=1, padding_mode="reflect"),
            getattr(nn, f"BatchNorm{dims}d")(channels),
            nn.ReLU(inplace=True),
        )
        self.down = getattr(nn, f"MaxPool{dims}d")(2, return_indices=True)
        self.deep = nn.Sequential(
            conv(channels, 2 * channels, 3, padding="same", groups=2),
            nn.GroupNorm(2, 2 * channels),
            nn.SiLU(),
            conv(2 * channels, channels, 1, bias=False),
            getattr(nn, f"InstanceNorm{dims}d")(channels, affine=True, track_running_stats=True),
        )
        self.unpool = getattr(nn, f"MaxUnpool{dims}d")(2)
        self.up = up(channels, channels, 2, stride=2)
        self.last = conv(3 * channels, 2, 1)
        self.head = nn.Sequential(
            getattr(nn, f"AdaptiveAvgPool{dims}d")(2), nn.Flatten(), nn.LayerNorm(2**dims * 2)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        small, indices = self.down(x)
        small = self.deep(small)
        joined = torch.cat([x, self.unpool(small, indices, x.shape), self.up(small)], 1)
        y: Tensor = self.head(self.last(joined))
        return y


def step(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """What one step of training gives: the output, all gradients, and buffers afterwards."""
    x = x.clone().requires_grad_()
    y = model(x)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    (y * weights).sum().backward()
    assert x.grad is not None
    found = {"output": y.detach(), "gradient of the input": x.grad}
    found |= {f"gradient of {n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
    return found | {n: b.clone() for n, b in model.named_buffers()}


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor], limit: float) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name].stride() == value.stride() or name.startswith("gradient")
        # Gradients that are zero but for rounding have no scale of their own.
        reference = value if float(value.double().norm()) > 1e-9 else torch.zeros_like(value)
        error = float((ours[name].double() - reference.double()).norm())
        assert error <= limit * max(float(reference.double().norm()), 1.0), (name, error)

"""What several networks share: initialisation, convolution with batch norm, and stochastic depth."""

from __future__ import annotations

from types import ModuleType

from torch import Tensor, nn


def he_normal(network: nn.Module) -> None:
    """Every convolution's weights from a normal distribution of variance ``2 / (K·R·S)``, biases 0.

    Keeps the size of gradients through layers followed by ReLU (He et al., 2015, arXiv:1502.01852).
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def small_normal(network: nn.Module, std: float = 0.01) -> None:
    """Every dense layer's weights from a normal distribution of deviation `std`, biases 0."""
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=std)
            nn.init.zeros_(module.bias)


def conv_norm(
    layers: ModuleType,
    C: int,
    K: int,
    kernel: int = 1,
    stride: int = 1,
    groups: int = 1,
    activation: type[nn.Module] | None = None,
) -> nn.Sequential:
    """A convolution without bias, which batch norm would undo, batch norm, and `activation` if there is one.

    ``N C H W -> N K ceil(H / stride) ceil(W / stride)`` for odd kernels.
    """
    conv = layers.Conv2d(C, K, kernel, stride, kernel // 2, groups=groups, bias=False)
    last = () if activation is None else (activation(),)
    return nn.Sequential(conv, layers.BatchNorm2d(K), *last)


class StochasticDepth(nn.Module):
    """In training drops whole images from a residual branch ``N C H W`` (Huang et al., 2016,
    arXiv:1603.09382).

    Each image's branch is 0 with probability `p`, else scaled by ``1 / (1 - p)``: the expected sum stays. In
    evaluation nothing happens.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, branch: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return branch
        kept = branch.new_empty(branch.shape[0], 1, 1, 1).bernoulli_(1 - self.p)
        return branch * kept.div_(1 - self.p)

    def extra_repr(self) -> str:
        return f"p={self.p:.3g}"

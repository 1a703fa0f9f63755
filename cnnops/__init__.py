"""cnnops: hand-written CUDA kernels for convolutional networks, as drop-in operations for PyTorch.

    import cnnops
    y = cnnops.functional.conv2d(x, w, padding=1)       # torch.nn.functional's names and arguments
    layer = cnnops.nn.Conv2d(3, 64, 3)                  # torch.nn's layers

    cnnops.convert(model)                               # every layer of torch.nn in a model, in place

    with cnnops.engine("emulate"): ...                  # who computes: cuda, emulate, cpu, aten
    print(*cnnops.explain(layer, x), sep="\\n")          # which kernels ran, and why not the others
    cnnops.tune(layer, x)                               # measures the candidates once, and remembers

Importing compiles nothing and loads no engine: the first call does.
"""

from cnnops import functional, nn, tuned
from cnnops.config import engine, fallback, policy
from cnnops.conversion import Conversion, convert, revert
from cnnops.registry import UnsupportedError, algorithm, explain
from cnnops.tuning import tune

__version__ = "0.1.0"

__all__ = [
    "Conversion",
    "UnsupportedError",
    "__version__",
    "algorithm",
    "convert",
    "engine",
    "explain",
    "fallback",
    "functional",
    "nn",
    "policy",
    "revert",
    "tune",
    "tuned",
]

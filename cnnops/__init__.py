"""cnnops: hand-written CUDA kernels for convolutional networks, as drop-in operations for PyTorch.

    import cnnops
    y = cnnops.functional.conv2d(x, w, padding=1)       # torch.nn.functional's names and arguments
    layer = cnnops.nn.Conv2d(3, 64, 3)                  # torch.nn's layers

    cnnops.convert(model)                               # every layer of torch.nn in a model, in place

    with cnnops.engine("emulate"): ...                  # who computes: cuda, emulate, cpu, aten
    print(*cnnops.explain(layer, x), sep="\\n")          # which kernels ran, and why not the others
    print(cnnops.summary(model, (3, 224, 224)))         # sizes, operations, least times, layer by layer
    cnnops.tune(layer, x)                               # measures the candidates once, and remembers

Importing compiles nothing and loads no engine: the first call does.
"""

from cnnops import functional, nn, tuned
from cnnops.config import engine, fallback, policy, winograd
from cnnops.conversion import Conversion, convert, revert
from cnnops.fusion import Fusion, fuse
from cnnops.memory import keep_memory
from cnnops.patching import patched
from cnnops.registry import UnsupportedError, algorithm, explain
from cnnops.summary import summary
from cnnops.tuning import tune

__version__ = "0.1.0"

__all__ = [
    "Conversion",
    "Fusion",
    "UnsupportedError",
    "__version__",
    "algorithm",
    "convert",
    "engine",
    "explain",
    "fallback",
    "functional",
    "fuse",
    "keep_memory",
    "nn",
    "patched",
    "policy",
    "revert",
    "summary",
    "tune",
    "tuned",
    "winograd",
]

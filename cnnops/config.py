"""Settings of the package. They are process-wide, like torch's own switches; each is a setter and a context.

    cnnops.engine("aten")                 # from here on
    with cnnops.engine("emulate"): ...    # for this block

The engine that an operation was recorded with is the one that its backward runs in, wherever and in whichever
thread ``backward()`` is called. All other settings are looked up anew by the backward.
"""

from __future__ import annotations

import os
from types import TracebackType
from typing import Any

import torch

ENGINES = ("cuda", "emulate", "cpu", "aten")
FALLBACKS = ("warn", "error", "silent")
POLICIES = ("auto", "own")


class _Settings:
    """The values in force. `engine` "" picks by device: cuda for CUDA tensors, cpu for CPU tensors."""

    all: tuple[str | bool, ...] = ()
    """All of them, to be compared at once."""

    def __init__(self) -> None:
        self.engine = _checked_engine(os.environ.get("CNNOPS_ENGINE") or None)
        self.fallback = "warn"
        self.algorithm = ""
        self.policy = _checked_policy(os.environ.get("CNNOPS_POLICY") or "auto")
        self.winograd = _checked_switch(os.environ.get("CNNOPS_WINOGRAD") or "1")

    def __setattr__(self, name: str, value: Any) -> None:
        values = vars(self) | {name: value}
        values.pop("all", None)
        super().__setattr__(name, value)
        super().__setattr__("all", tuple(values.values()))


class Setting:
    """Sets one value at once; as a context manager it puts the former value back at the end."""

    def __init__(self, name: str, value: str | bool) -> None:
        self._name, self._former = name, getattr(settings, name)
        setattr(settings, name, value)

    def __enter__(self) -> None:
        return None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        setattr(settings, self._name, self._former)


def _checked_engine(name: str | None) -> str:
    if name is not None and name not in ENGINES:
        raise ValueError(f"engine: expected one of {', '.join(ENGINES)} or None, got {name!r}")
    return name or ""


def engine(name: str | None) -> Setting:
    """Choose who computes: "cuda", "emulate" (the CUDA kernels on the CPU, checked), "cpu" (numba), "aten"
    (PyTorch itself), or None for the tensors' own device. ``CNNOPS_ENGINE`` sets the start value.

    Raises ValueError for any other name.
    """
    return Setting("engine", _checked_engine(name))


def fallback(mode: str) -> Setting:
    """What happens to a problem that no kernel takes: PyTorch's op with one warning a reason ("warn"),
    without a word ("silent"), or `UnsupportedError` ("error"). Raises ValueError for any other mode.
    """
    if mode not in FALLBACKS:
        raise ValueError(f"fallback: expected one of {', '.join(FALLBACKS)}, got {mode!r}")
    return Setting("fallback", mode)


def _checked_policy(name: str) -> str:
    if name not in POLICIES:
        raise ValueError(f"policy: expected one of {', '.join(POLICIES)}, got {name!r}")
    return name


def policy(name: str) -> Setting:
    """What becomes of the findings of `cnnops.tune`: "auto" runs whatever was measured to be the fastest on
    this device, PyTorch's own op included; "own" the fastest of this package's kernels. Where nothing has
    been measured, both run this package's kernels. ``CNNOPS_POLICY`` sets the start value.

    Raises ValueError for any other name.
    """
    return Setting("policy", _checked_policy(name))


def _checked_switch(value: str) -> bool:
    if value not in ("0", "1"):
        raise ValueError(f"CNNOPS_WINOGRAD: expected 0 or 1, got {value!r}")
    return value == "1"


def winograd(allowed: bool) -> Setting:
    """Whether the cpu engine may compute convolutions of 3 by 3 and 5 by 5 taps by Winograd's algorithm
    (Lavin and Gray, arXiv:1509.09308), which it does where that is faster: forward and both gradients, two to
    three times as fast from 64 channels on, if dilated 1.3 to 2.5 times; 3 by 3 taps with a stride of 2 in
    0.8 of the time. On from the start unless ``CNNOPS_WINOGRAD=0`` is set.

    Without a stride results are further from the exact ones than a direct convolution's: in float32 by 7e-7
    of the norm instead of 3e-7, weight gradients by up to 1e-6, and no single output by more than some 5e-6
    of their standard deviation. A NaN or an infinity may reach neighbours, within 4 by 4 outputs, each as far
    from the next as the dilation is, or among the taps of a filter's channel, that a direct convolution would
    keep clear of it.
    """
    return Setting("winograd", bool(allowed))


_CONVOLUTIONS_OF = {"cuda": ("cuda", "conv"), "emulate": ("mkldnn", "conv")}


def tf32(engine: str, dtype: torch.dtype) -> bool:
    """Whether torch lets convolutions multiply float32 as TF32, on tensors of the engine's device.

    What counts is ``torch.backends.cudnn.conv.fp32_precision`` (which ``torch.backends.cudnn.allow_tf32``
    sets, too) for "cuda", and for "emulate", whose tensors are a CPU's,
    ``torch.backends.mkldnn.conv.fp32_precision``. Other engines compute in float32.
    """
    if dtype is not torch.float32 or engine not in _CONVOLUTIONS_OF:
        return False
    # What the two properties read, in a tenth of their time: this is asked at every call.
    precision: str = torch._C._get_fp32_precision_getter(*_CONVOLUTIONS_OF[engine])
    return precision == "tf32"


settings = _Settings()

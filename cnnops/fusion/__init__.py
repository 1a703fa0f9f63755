"""Fused layers in place of sequences of layers: `fuse` for inference; for training see
`cnnops.fusion.training`, which `cnnops.convert` calls.
"""

from __future__ import annotations

import copy as copies
from dataclasses import dataclass, field
from typing import Any

from torch.nn import Module

from cnnops.fusion.checking import check
from cnnops.fusion.inference import Fuser
from cnnops.fusion.tracing import is_wrapper


@dataclass(frozen=True)
class Fusion:
    """What `fuse` did. Printing it shows the fused model as a tree, and behind it what was left.

    `fused`: the name of a layer in `model` -> what was put into it, in order: names of modules in the model
    that was given, "residual", names of activations that were functions. `left`: the name of a module or, of
    a function, of its step in the graph -> why it was not put into another.
    """

    model: Module
    fused: dict[str, tuple[str, ...]] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines, shown = [], set()
        for name, module in self.model.named_modules():
            depth = name.count(".") + 1 if name else 0
            kind = type(module).__name__
            short = f"{name.rpartition('.')[2]}: " if name else ""
            lines.append(f"{'  ' * depth}{short}{kind}{self._fate(name)}")
            shown.add(name)
        lines += [f"{name}  left: {why}" for name, why in self.left.items() if name not in shown]
        return "\n".join([*lines, f"{len(self.fused)} fused, {len(self.left)} left"])

    def _fate(self, name: str) -> str:
        if name in self.fused:
            return f"  + {' + '.join(self.fused[name])}"
        return f"  left: {self.left[name]}" if name in self.left else ""


def fuse(model: Module, sample: Any = None, copy: bool = False) -> Fusion:
    """A model for inference that computes what `model` does in evaluation, in fewer passes over memory:

    - batch norm is folded into the convolution, transposed convolution or dense layer before it,
    - residual additions and activations are done by convolution as it writes, or by a batch norm that could
      not be folded.

    `model` is not changed. The result, ``.model`` of what is returned, is a ``torch.fx.GraphModule`` with the
    same arguments and results; fused layers, such as `cnnops.nn.ConvAct2d`, have the names of their
    convolutions. What could not be traced stays as it is around the parts of it that could. Folded weights
    are new tensors; all others are shared with `model` or, with `copy`, are copies. Gradients flow, but there
    is no way back to training: forward is what it was in evaluation, with the values that the model's
    attributes had. Other layers than the fused ones are not exchanged: that is `cnnops.convert`.

    Optional arguments to which `sample` gives another value than the default are inputs of the result, too;
    so is, without a sample, the model's first argument if it is None by default. All others are taken for
    their defaults. The result has them all, by the same names, and raises AssertionError for another value
    than the default that was taken, and for None in place of an input.

    Nothing is fused that was not found to be equal: see the reasons in ``.left``. With a `sample` (the
    model's argument, a tuple of them, or a dict of keyword arguments) both models are run and compared, every
    fused step by itself and the results; RuntimeError says where they disagree beyond rounding. A layer that
    forward hands to a function, which could not be traced, is fused only with a `sample`, if that agrees.

    Raises RuntimeError for a model in training mode, TypeError unless `model` is a Module and not wrapped by
    torch.compile or data parallelism. While it works, no module may run in another thread.
    """
    if not isinstance(model, Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if is_wrapper(model):
        inner = "_orig_mod" if hasattr(model, "_orig_mod") else "module"
        raise TypeError(
            f"model: expected one that nothing is wrapped around, got {type(model).__name__}: "
            f"fuse model.{inner} and wrap the result"
        )
    for name, module in model.named_modules():
        if module.training:
            at = f"layer {name} ({type(module).__name__})" if name else type(module).__name__
            raise RuntimeError(f"expected model.eval(), got training mode in {at}")
    source = copies.deepcopy(model) if copy else model
    fuser = Fuser(sample, hands_fused=True)
    done = Fusion(fuser.rebuilt(source), fuser.fused, fuser.left)
    if sample is None:
        return done
    try:
        check(source, done.model, fuser.regions, sample)
    except Exception:
        if not any(region.hands_fused for region in fuser.regions):
            raise
        # A function may have seen the difference.
        fuser = Fuser(sample, hands_fused=False)
        done = Fusion(fuser.rebuilt(source), fuser.fused, fuser.left)
        check(source, done.model, fuser.regions, sample)
    return done


__all__ = ["Fusion", "fuse"]

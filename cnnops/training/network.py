"""The network of a recipe: found by its name, fitted to images and classes, in the layers of the engine."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import cnnops
from cnnops.models import named
from cnnops.training.plan import Recipe

SMALL = ((28, 28), (32, 32), (64, 64))
"""Sizes to show digits at: the first one that the network takes."""

CLASSES = ("classes", "num_classes")
CHANNELS = ("channels", "in_channels", "in_chans")
"""What factories call the number of classes, and that of an image's channels."""


def fitted(recipe: Recipe, small: bool) -> Recipe:
    """The recipe with channels and size of images that suit its model; what it has already is kept.

    Channels are what the model has unless told otherwise. `small` images, digits, are shown at the least of
    a few sizes that will do, others at the size that the model was published with, or else the largest.
    Raises ValueError where there is no such model, or it takes no such images.
    """
    if recipe.channels and recipe.size:
        return recipe  # `build` will see
    with named.at_home(), cnnops.engine("aten"), torch.random.fork_rng(devices=[]):
        factory = named.find(recipe.model)
        wanted = _arguments(factory, channels=recipe.channels)
        probe = named.make(recipe.model, factory, **wanted)
        published = getattr(probe, "input_size", (224, 224))
        # A network that says no size may still take only small ones.
        sizes = [*SMALL, published] if small else [published, *reversed(SMALL)]
        sizes = [recipe.size] if recipe.size else sizes
        channels = recipe.channels or _channels(probe)
        reasons = []
        for H, W in sizes:
            reason = _refusal(probe, (channels, H, W))
            if not reason:
                return replace(recipe, channels=channels, size=(H, W))
            reasons.append(f"of {channels} x {H} x {W}, got {reason}")
        raise ValueError(f"MODEL {recipe.model!r}: expected one for images {reasons[0]}")


def _channels(model: nn.Module) -> int:
    first = first_filters(model)
    conv = next((m for m in model.modules() if getattr(m, "weight", None) is first), None)
    return 3 if first is None else first.shape[1] * int(getattr(conv, "groups", 1))


def first_filters(model: nn.Module) -> Tensor | None:
    """The weight ``K x C x R x S`` of the first convolution, if there is one."""
    return next((p for p in model.parameters() if p.dim() == 4), None)


def _refusal(model: nn.Module, size: Sequence[int]) -> str:
    """Why the model takes no image of that size, or ""."""
    try:
        _logits(model, size)
    except Exception as error:  # the user's own code runs here
        return named.said(error)
    return ""


def _logits(model: nn.Module, size: Sequence[int]) -> Any:
    """What the model says to one black image, in evaluation."""
    training = model.training
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with torch.no_grad():
        try:
            return model.eval()(torch.zeros(1, *size, device=device))
        finally:
            model.train(training)


def _arguments(
    factory: Any, classes: int | None = None, channels: int | None = None
) -> dict[str, int]:
    """Those of the arguments that are no None and that the factory knows, by its own names."""
    try:
        parameters = inspect.signature(factory).parameters
    except (TypeError, ValueError):
        return {}
    # ``**arguments`` is where networks of torchvision's manner take num_classes.
    anything = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    found = {}
    for value, names, last in ((classes, CLASSES, CLASSES[-1]), (channels, CHANNELS, None)):
        name = next((name for name in names if name in parameters), last if anything else None)
        if value is not None and name is not None:
            found[name] = value
    return found


def build(recipe: Recipe, classes: int) -> nn.Module:
    """The network for so many classes on the CPU, its weights decided by the recipe's seed alone.

    Its layers are `cnnops.nn`'s, for the engine aten ``torch.nn``'s. `recipe` has channels and size, as
    `fitted` gives them. Raises ValueError where the network cannot be built, or does not tell so many
    classes apart.
    """
    assert recipe.channels is not None and recipe.size is not None
    with named.at_home(), torch.random.fork_rng(devices=[]), cnnops.engine("aten"):
        torch.default_generator.manual_seed(recipe.seed)
        factory = named.find(recipe.model)
        arguments = _arguments(factory, classes, recipe.channels)
        model = named.make(recipe.model, factory, **arguments)
        size = (recipe.channels, *recipe.size)
        try:
            logits = _logits(model, size)
        except Exception as error:
            raise ValueError(f"MODEL {recipe.model!r}: {named.said(error)}") from error
    if not isinstance(logits, Tensor) or logits.shape != (1, classes):
        found = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(
            f"MODEL {recipe.model!r}: expected logits of shape {[1, classes]}, one a class of the data, "
            f"got {found}"
        )
    if recipe.dropout is not None:
        _set_dropout(recipe, model)
    if recipe.engine == "aten":
        return cnnops.revert(model).model
    return cnnops.convert(model, fuse_training=recipe.fuse_training).model


def _set_dropout(recipe: Recipe, model: nn.Module) -> None:
    """The recipe's dropout in every layer of it, or else before the last dense layer."""
    assert recipe.dropout is not None
    p = recipe.dropout
    layers = [m for m in model.modules() if isinstance(m, nn.modules.dropout._DropoutNd)]
    for layer in layers:
        layer.p = p
    if layers:
        return
    dense = [m for m in model.modules() if isinstance(m, nn.Linear)]
    if not dense:
        raise ValueError(f"--dropout: expected a model with a dense layer, got {recipe.model!r}")

    def drop(layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (F.dropout(inputs[0], p, layer.training), *inputs[1:])

    # A hook, not a layer: the names in the state_dict stay those of the model.
    dense[-1].register_forward_pre_hook(drop)

"""Networks by the names that command lines give them: a built-in one's, or ``package.module:callable``.

Only what the user named is imported. Whatever goes wrong in the user's own code becomes a ValueError of one
line, fit for his eyes.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

from torch import nn

from cnnops.models import MODELS


@contextmanager
def at_home() -> Iterator[None]:
    """Where code of the user's runs: modules beside it are found, and what it prints goes to stderr."""
    sys.path.insert(0, "")
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        sys.path.remove("")


def find(name: str) -> Any:
    """What makes the network of that name, or a network that is there already.

    Raises ValueError where the name leads to nothing that can be called.
    """
    if name in MODELS:
        return MODELS[name]
    module, colon, attribute = name.partition(":")
    if not (module and colon and attribute):
        raise ValueError(
            f"MODEL: expected package.module:callable or one of {', '.join(MODELS)}, got {name!r}"
        )
    try:
        found = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # the user's own code runs here
        raise ValueError(f"MODEL {name!r}: {said(error)}") from error
    if not callable(found):
        raise ValueError(f"MODEL {name!r}: expected a callable, got {type(found).__name__}")
    return found


def make(name: str, factory: Any, **arguments: Any) -> nn.Module:
    """What `factory`, found under `name`, makes of `arguments`; a network is returned as it is.

    Raises ValueError where that fails, or is no network.
    """
    if isinstance(factory, nn.Module):
        return factory
    try:
        model = factory(**arguments)
    except Exception as error:  # the user's own code runs here
        raise ValueError(f"MODEL {name!r}: {said(error)}") from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"MODEL {name!r}: expected a torch.nn.Module, got {type(model).__name__}")
    return model


def said(error: Exception) -> str:
    """An error's type and the first line of its message."""
    line = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {line}" if line else type(error).__name__

"""A summary's plot: where memory, parameters and operations sit, layer by layer."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING

from cnnops.summary import Summary
from cnnops.summary.costs import KINDS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg", ".pdf")
PANELS = (
    ("memory_bytes", 1024, "memory of the output, KB"),
    ("parameters", 1e3, "parameters, thousands"),
    ("operations", 1e6, "operations, millions"),
)
# Okabe and Ito's colours, which colour-blind readers can tell apart.
COLOURS = dict(
    zip(KINDS, ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#999999"), strict=True)
)


def check(path: Path) -> None:
    """Raises ValueError unless a plot can be written to `path`."""
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"plot: expected a name that ends in {', '.join(SUFFIXES)}, got {path}")
    if path.is_dir() or not path.parent.is_dir():
        raise ValueError(f"plot: expected a file in a folder that exists, got {path}")
    if not os.access(path.parent, os.W_OK) or (path.exists() and not os.access(path, os.W_OK)):
        raise ValueError(f"plot: expected a place that can be written, got {path}")
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("plot: expected matplotlib: pip install 'cnnops[demo]'")


def save(found: Summary, path: Path) -> None:
    """See `Summary.plot`. What is drawn takes the former file's place only when it is whole."""
    check(path)
    drawing = draw(found)
    partial = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        with open(partial, "xb") as file:
            drawing.savefig(file, format=path.suffix[1:].lower(), dpi=120)
        os.replace(partial, path)
    except OSError as error:
        raise ValueError(f"plot: expected a place that can be written, got {error}") from error
    finally:
        partial.unlink(missing_ok=True)


def draw(found: Summary) -> Figure:
    """Three panels with a bar a row, the first layer on top; rows without anything to show are left out."""
    from matplotlib.figure import Figure  # not pyplot: no display, no state shared with the caller
    from matplotlib.patches import Patch

    shown = [r for r in found.rows if any(getattr(r, column) for column, _, _ in PANELS)]
    drawing = Figure(figsize=(12, min(1.5 + 0.19 * len(shown), 200)), layout="constrained")
    places = range(len(shown))
    colours = [COLOURS[row.kind] for row in shown]
    panels = drawing.subplots(1, len(PANELS), sharey=True)
    for axes, (column, unit, label) in zip(panels, PANELS, strict=True):
        axes.barh(places, [(getattr(r, column) or 0) / unit for r in shown], color=colours)
        axes.set_xlabel(label)
        axes.locator_params(axis="x", nbins=5)
        axes.grid(axis="x", linewidth=0.4)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    # Names are shown as they are: a $ begins no formula.
    names = [row.name if row.call == 1 else f"{row.name} ({row.call})" for row in shown]
    panels[0].set_yticks(places, names, fontsize=7, parse_math=False)
    panels[0].set_ylim(len(shown) - 0.4, -0.6)
    panels[0].set_ylabel("layer, in the order of calls")
    kinds = [kind for kind in KINDS if any(row.kind == kind for row in shown)]
    if kinds:
        patches = [Patch(color=COLOURS[kind], label=kind) for kind in kinds]
        drawing.legend(handles=patches, loc="outside upper center", ncols=len(kinds), frameon=False)
    return drawing

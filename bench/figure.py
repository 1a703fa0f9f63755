"""The figure of README and docs/speed.md: how many times as fast as torch, part by part, problem by problem.

matplotlib's SVGs differ from version to version, but its description has what this one shows: which tells
whether it is fresh.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Sequence
from html import unescape
from pathlib import Path

from bench.parts import ratios_by_part
from bench.runs import Run, geomean, groups, stamp

TITLE = "torch's time / cnnops' time: each problem, and geometric means"

Lines = dict[str, list[float]]
"""A line of the figure -> the speed-ups of its problems."""


def lines(run: Run) -> Lines:
    """By part of a CPU's run, by suite of a GPU's: torch's best time over that of cnnops."""
    found = ratios_by_part(run) or {
        group.key[0]: [row.speed_up for row in group.rows] for group in groups(run.rows, "suite")
    }
    compared = {name: [r for r in ratios if r is not None] for name, ratios in found.items()}
    return {name: [round(r, 3) for r in ratios] for name, ratios in compared.items() if ratios}


def content(shown: Sequence[Run]) -> str:
    """What the figure of these runs shows, as text."""
    return json.dumps([{"run": stamp(run), "lines": lines(run)} for run in shown if lines(run)])


def is_fresh(path: Path, shown: Sequence[Run]) -> bool:
    """Whether the figure in `path` shows these runs."""
    if not path.exists():
        return content(shown) == "[]"
    found = re.search(
        r"<dc:description>(.*?)</dc:description>", path.read_text(encoding="utf-8"), re.DOTALL
    )
    return found is not None and unescape(found[1]) == content(shown)


def svg(shown: Sequence[Run]) -> str:
    """A panel a run, a dot a problem, a bar the geometric mean."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    panels = [(run, found) for run in shown if (found := lines(run))]
    most = [len(found) for _, found in panels]
    drawing = Figure(
        figsize=(8.2, sum(1.3 + 0.27 * n for n in most)), layout=ConstrainedLayoutEngine()
    )
    drawing.patch.set_facecolor("#fbfbf8")  # light, whatever the page is
    drawing.subplots(len(panels), 1, squeeze=False, height_ratios=most)
    for axes, (run, found) in zip(drawing.axes, panels, strict=True):
        axes.set_facecolor("none")
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.grid(True, axis="x", linewidth=0.5, color="#dddddd")
        axes.set_axisbelow(True)
        for place, ratios in enumerate(found.values()):
            mean = geomean(ratios)
            assert mean is not None
            colour = "#0072B2" if mean.value >= 1 else "#D55E00"
            axes.barh(place, mean.value - 1, left=1, height=0.62, color=colour, alpha=0.45)
            axes.plot(ratios, [place] * len(ratios), "o", color=colour, ms=2.6, alpha=0.6, mew=0)
            axes.annotate(
                f"{mean.value:.2f}", (1, place), (4, 0), xycoords=("axes fraction", "data"),
                textcoords="offset points", va="center", fontsize=9, fontweight="bold", color=colour,
            )  # fmt: skip
        axes.axvline(1, color="black", linewidth=1)
        axes.set_yticks(range(len(found)), list(found), fontsize=9)
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(len(found) - 0.4, -0.6)
        where = stamp(run).replace(" · torch", "\ntorch", 1)
        axes.set_title(f"{TITLE}\n{where}", fontsize=9, loc="left")
    file = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "cnnops", "svg.fonttype": "path"}):
        about = {"Date": None, "Title": "cnnops beside torch", "Description": content(shown)}
        drawing.savefig(file, format="svg", metadata=about)
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines()) + "\n"

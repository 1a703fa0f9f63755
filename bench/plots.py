"""Plots of a run: the roofline, speed-ups as bars, and how time grows with the size that a sweep varies."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from bench.runs import (
    CNNOPS,
    DIRECTIONS,
    FUSED,
    Group,
    MeasuredRow,
    Run,
    conditions,
    groups,
    stamp,
    worst,
)

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SWEEP = "sweep_"
"""Suites whose names begin so vary one size in each series of cases, and are drawn as curves."""

# The palette of Okabe and Ito, which the colour-blind can tell apart; markers say the same once more.
_BLUE, _SKY, _GREEN, _ORANGE, _RED, _PINK = (
    "#0072B2", "#56B4E9", "#009E73", "#E69F00", "#D55E00", "#CC79A7"
)  # fmt: skip
_STYLES = {
    CNNOPS: (_BLUE, "o"),
    "cnnops-auto": (_SKY, "P"),
    FUSED: ("#F0E442", "*"),
    "eager": (_ORANGE, "s"),
    "eager-benchmark": (_RED, "^"),
    "compile": (_GREEN, "D"),
    "compile-max-autotune": (_PINK, "v"),
}


def _style(rival: str) -> tuple[str, str]:
    return _STYLES.get(rival, ("#555555", "X"))


def _canvas(run: Run, rows: int, columns: int, width: float, height: float) -> Figure:
    from matplotlib.figure import Figure  # not pyplot: no display, no state shared with the caller
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(h_pad=0.08, w_pad=0.08)
    drawing = Figure(figsize=(width, height), layout=layout)
    drawing.supxlabel(
        f"{stamp(run)}\n{conditions(run)}", fontsize=8, color="#555555", x=0.01, ha="left"
    )
    drawing.subplots(rows, columns, squeeze=False)
    for axes in drawing.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_axisbelow(True)
        axes.grid(True, linewidth=0.5, color="#dddddd")
    return drawing


def _title(drawing: Figure, title: str, marks: Mapping[str, Artist]) -> None:
    """The title, and beneath it what the marks mean; a legend, so that matplotlib keeps room for both."""
    drawing.legend(
        list(marks.values()),
        list(marks),
        title=title,
        loc="outside upper left",
        alignment="left",
        frameon=False,
        ncols=max(1, int(drawing.get_figwidth() / 1.7)),
        fontsize=9,
        title_fontproperties={"size": 13, "weight": "bold"},
    )


def _plain(value: float, _position: object = None) -> str:
    return f"{value:g}"


def roofline(run: Run) -> Figure | None:
    """Every row as FLOP/s over FLOP a byte, beneath what the device can do; one panel a dtype."""
    timed = [row for row in run.rows if row.flops and row.bytes and row.times]
    panels = groups(timed, "dtype")
    if not panels:
        return None
    drawing = _canvas(run, 1, len(panels), 1.5 + 5.2 * len(panels), 6)
    left = min(row.intensity for row in timed) / 2
    right = max(row.intensity for row in timed) * 2
    for axes, panel in zip(drawing.axes, panels, strict=True):
        _draw_roofs(axes, run, panel.key[0], left, right)
        rivals = [(row.intensity, rate) for row in panel.rows if (rate := row.rate(row.best_rival))]
        ours = [(row.intensity, rate) for row in panel.rows if (rate := row.rate(CNNOPS))]
        for row in panel.rows:  # a thread from one to the other
            one, other = row.rate(CNNOPS), row.rate(row.best_rival)
            if one and other:
                axes.plot((row.intensity,) * 2, (one, other), color="#bbbbbb", lw=0.6, zorder=1)
        marks: dict[str, Artist] = {}
        for label, points, marker, fill, edge in (
            ("best rival", rivals, "^", "none", _RED),
            (CNNOPS, ours, "o", _BLUE, "white"),
        ):
            xs, ys = [x for x, _ in points], [y for _, y in points]
            (marks[label],) = axes.plot(xs, ys, marker, mfc=fill, mec=edge, mew=0.8, ms=5)
        axes.set(xlabel="arithmetic intensity, FLOP/byte", xlim=(left, right))
        axes.set_title(
            f"{panel.key[0]}: {len(ours)} rows of cnnops, {len(rivals)} of rivals", fontsize=10
        )
    drawing.axes[0].set_ylabel("arithmetic done, FLOP/s")
    _title(drawing, "Roofline", marks)
    return drawing


def _draw_roofs(axes: Axes, run: Run, dtype: str, left: float, right: float) -> None:
    axes.set(xscale="log", yscale="log")
    bandwidth, peaks = run.ceilings.get("bytes_per_s"), run.ceilings.get("flops_per_s", {})
    names = [dtype] + ["tf32"] * bool(dtype == "float32" and run.settings.get("allow_tf32"))
    tops = [(name, peaks[name]) for name in names if peaks.get(name)]
    if not bandwidth or not tops:
        return
    highest = max(peak for _, peak in tops)
    for name, peak in tops:
        ridge = peak / bandwidth
        axes.plot((min(ridge, right), right), (peak, peak), color="black", linewidth=1.2)
        axes.annotate(
            f"{_si(peak)}FLOP/s {name}", (right, peak), (-3, 4), textcoords="offset points",
            ha="right", va="bottom", fontsize=8,
        )  # fmt: skip
    end = min(highest / bandwidth, right)
    axes.plot((left, end), (left * bandwidth, end * bandwidth), color="black", linewidth=1.2)
    middle = math.sqrt(left * end)
    axes.annotate(
        f"{_si(bandwidth)}B/s", (middle, middle * bandwidth), (-6, 3), textcoords="offset points",
        ha="right", va="bottom", fontsize=8,
    )  # fmt: skip


def _si(value: float) -> str:
    """3.0e12 → "3.0 T": a number and the prefix of its unit."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= factor:
            return f"{value / factor:.3g} {prefix}"
    return f"{value:.3g} "


def bars(run: Run, title: str, panels: Sequence[Group[Any]]) -> Figure | None:
    """Speed-up over the best rival, every row a bar, the slowest on top; the colour names the rival."""
    from matplotlib.patches import Patch

    panels = [Group(panel.key, tuple(worst(panel.rows, len(panel.rows)))) for panel in panels]
    panels = [panel for panel in panels if panel.rows]
    if not panels:
        return None
    most = max(len(panel.rows) for panel in panels)
    drawing = _canvas(run, 1, len(panels), 1.6 + 4.2 * len(panels), 2.3 + 0.21 * most)
    every = [row.speed_up or 1 for panel in panels for row in panel.rows]
    left, right = min(0.5, min(every) / 1.6), max(2.0, max(every) * 1.6)
    for axes, panel in zip(drawing.axes, panels, strict=True):
        ratios = [row.speed_up or 1 for row in panel.rows]
        places = range(len(ratios))
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(_plain)
        colours = [_style(row.best_rival or "")[0] for row in panel.rows]
        widths = [ratio - 1 for ratio in ratios]
        axes.barh(places, widths, left=1, height=0.72, color=colours)
        for place, ratio in zip(places, ratios, strict=True):
            axes.annotate(
                f"{ratio:.2f}", (ratio, place), (3 if ratio >= 1 else -3, 0),
                textcoords="offset points", ha="left" if ratio >= 1 else "right", va="center",
                fontsize=7,
            )  # fmt: skip
        axes.axvline(1, color="black", linewidth=1)
        # The same height a bar in every panel, so that a panel with few rows is no wall of colour.
        axes.set(ylim=(most - 0.4, -0.6), xlim=(left, right), title=panel.key[0])
        alike = len({row.name.removeprefix(row.label) for row in panel.rows}) == 1
        names = [row.label if alike else row.name for row in panel.rows]
        axes.set_yticks(places, names, fontsize=8)
        axes.set_xlabel("time of the rival / time of cnnops")
        axes.grid(False, axis="y")
    named = {row.best_rival for panel in panels for row in panel.rows}
    shown = [rival for rival in run.rivals if rival in named]
    _title(drawing, title, {rival: Patch(color=_style(rival)[0]) for rival in shown})
    return drawing


def sizes(problem: str) -> dict[str, int]:
    """The numbers in a problem's text by their letters: "x 2x3x8x8 w 4x3x1x1 stride=2" → N=2, C=3, H=8, ….

    Of an option with one value an axis, the first stands for all.
    """
    found: dict[str, int] = {}
    for tensor, first, spatial in (("x", ("N", "C"), "DHW"), ("w", ("K", "C/g"), "TRS")):
        if text := re.search(rf"\b{tensor} (\d+(?:x\d+)+)", problem):
            values = [int(value) for value in text[1].split("x")]
            letters = (*first, *spatial[max(0, 3 - len(values) + 2) :])
            found.update(zip(letters, values, strict=False))
    options = {n: int(v) for n, v in re.findall(r"\b([a-z_]+)=[(\[]*(\d+)", problem)}
    padding = options.pop("padding", None)  # often follows another size, so it is named last
    return found | options | ({} if padding is None else {"padding": padding})


def varying(rows: Sequence[MeasuredRow]) -> tuple[str, list[int]]:
    """What a sweep varies, and its value in every row: a size, else the traffic."""
    problems = [sizes(row.problem) for row in rows]
    columns = {
        name: [problem[name] for problem in problems]
        for name in problems[0]
        if all(name in problem for problem in problems)
    }
    for values in columns.values():
        if len(set(values)) == len(rows):
            alike = [name for name, others in columns.items() if others == values]
            return " = ".join(n for n in alike if n != "C/g" or "C" not in alike), values
    return "least traffic, bytes", [row.bytes for row in rows]


def growth(run: Run, title: str, panels: Sequence[Group[MeasuredRow]]) -> Figure:
    """How time grows with the size that a sweep varies: a panel a series, a line a rival, and the floor."""
    columns = len({panel.key[-1] for panel in panels})
    lines = math.ceil(len(panels) / columns)
    drawing = _canvas(run, lines, columns, 1.2 + 4.4 * columns, 1.5 + 3.6 * lines)
    for axes in drawing.axes[len(panels) :]:
        axes.remove()
    rows = [row for panel in panels for row in panel.rows]
    times = [s for row in rows for rival in row.times if (s := row.seconds(rival))]
    scale, unit = (1e3, "ms") if max(times, default=0) >= 1e-3 else (1e6, "µs")
    labels: dict[str, Artist] = {}
    for axes, panel in zip(drawing.axes, panels, strict=False):
        members, (op, series, direction) = panel.rows, panel.key
        label, values = varying(members)
        order = sorted(range(len(members)), key=values.__getitem__)
        for rival in (*reversed(run.rivals), *reversed(run.ours)):  # cnnops lies on top
            points = [(values[i], t) for i in order if (t := members[i].timing(rival))]
            if not points:
                continue
            colour, marker = _style(rival)
            xs = [x for x, _ in points]
            medians = [scale * t.median_s for _, t in points]
            low, high = ([scale * getattr(t, p) for _, t in points] for p in ("p10_s", "p90_s"))
            axes.fill_between(xs, low, high, color=colour, alpha=0.15, linewidth=0)
            (line,) = axes.plot(
                xs, medians, color=colour, marker=marker, markersize=4.5, linewidth=1.5
            )
            labels[rival] = line
        floor = [(values[i], scale * f) for i in order if (f := members[i].floor_s)]
        if floor:
            (line,) = axes.plot(*zip(*floor, strict=True), color="black", ls="--", linewidth=1)
            labels["floor"] = line
        axes.set(xscale="log", yscale="log", xlabel=label, ylabel=f"time, {unit}")
        _mark(axes, sorted(set(values)))
        kind = re.sub(r"_?[A-Za-z]*$", "", series)  # without the letter of the size
        axes.set_title(f"{kind} {op} {direction}".strip(), fontsize=10)
    shown = [name for name in (*run.ours, *run.rivals, "floor") if name in labels]
    _title(drawing, title, {name: labels[name] for name in shown})
    return drawing


def _mark(axes: Axes, values: Sequence[int]) -> None:
    """Ticks at the sizes themselves, as many as fit: sweeps seldom go by powers of ten."""
    from matplotlib.ticker import LogLocator, NullFormatter, NullLocator

    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(_plain)
    axes.yaxis.set_minor_formatter(NullFormatter())

    step = math.ceil(len(values) / 8)
    marked = [value for index, value in enumerate(values) if index % step == 0]
    labels = [_si(value).replace(" ", "") if value >= 1e6 else str(value) for value in marked]
    axes.set_xticks(marked, labels)
    axes.xaxis.set_minor_locator(NullLocator())


def figures(run: Run) -> Iterator[tuple[str, Figure]]:
    """All plots of `run` with their names: the roofline, speed-ups by suite, curves of the sweeps."""
    drawn: list[tuple[str, Figure | None]] = [("roofline", roofline(run))]
    what = "cnnops against the best rival"
    for models in groups(run.models, "dtype", "layout"):
        dtype, layout = models.key
        figure = bars(run, f"networks, {dtype}, {layout}: {what}", groups(models.rows, "phase"))
        drawn.append((f"speedup-models-{dtype}-{layout}", figure))
    for group in groups(run.rows, "suite", "dtype", "layout"):
        name, title, rest = "-".join(group.key), ", ".join(group.key), list(group.rows)
        if group.key[0].startswith(SWEEP):
            series = groups((row for row in rest if row.times), "op", "series", "direction")
            curves = [panel for panel in series if len(panel.rows) >= 3]
            if curves:
                drawn.append((name, growth(run, f"{title}: time over size", curves)))
            rest = [row for row in rest if not any(row in panel.rows for panel in curves)]
        drawn.append((f"speedup-{name}", bars(run, f"{title}: {what}", _by_direction(rest))))
    return ((re.sub(r"[^\w.-]+", "_", name), figure) for name, figure in drawn if figure)


def _by_direction(rows: Sequence[MeasuredRow]) -> list[Group[MeasuredRow]]:
    """A panel a direction; the few poolings among many convolutions share one for fwd and bwd."""
    panels = sorted(groups(rows, "direction"), key=lambda panel: DIRECTIONS.index(panel.key[0]))
    convolutions = [panel for panel in panels if panel.key[0] not in ("fwd", "bwd")]
    others = tuple(row for row in rows if row.direction in ("fwd", "bwd"))
    if len(others) > max((len(panel.rows) for panel in convolutions), default=0):
        return panels
    return [*convolutions, Group(("fwd and bwd",), others)]


def plots(run: Run) -> dict[str, bytes]:
    """`figures` as PNG files, by name."""
    return {name: _png(figure) for name, figure in figures(run)}


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return file.getvalue()

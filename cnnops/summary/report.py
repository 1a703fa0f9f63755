"""A summary as a table for people, as CSV and JSON with all digits, and as one HTML page."""

from __future__ import annotations

import csv
import html
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from typing import Any

from cnnops.summary import Row, Summary
from cnnops.summary.costs import KINDS

COLUMNS = tuple(field.name for field in fields(Row))
"""Of CSV, and keys of JSON's layers."""
TOTALS = ("memory_bytes", "parameters", "operations", "bytes_moved", "floor_seconds")
SHARED = {
    "memory_bytes": "memory",
    "parameters": "parameters",
    "operations": "operations",
    "floor_seconds": "least time",
}
HEADS = (
    "layer", "type", "output", "memory KB", "params k", "operations M", "field", "moved KB",
    "least µs", "kernel",
)  # fmt: skip
WORDS = 3
"""Columns of words, to the left; in between are numbers, and the last column are words again."""


# ---- for people -------------------------------------------------------------------------------------------


def short(value: float | None) -> str:
    """Whole numbers, below 1 one digit that counts; "-" for None."""
    if value is None:
        return "-"
    if value == 0 or value >= 0.95:
        return f"{value:,.0f}"
    return f"{value:.1g}" if value >= 0.0005 else "<0.001"


def _size(size: Sequence[int]) -> str:
    return "x".join(map(str, size)) or "scalar"


def _micros(seconds: float | None) -> str:
    """Microseconds, three digits."""
    if seconds is None:
        return "-"
    value = seconds * 1e6
    return f"{value:,.0f}" if value >= 100 or value == 0 else f"{float(f'{value:.3g}'):g}"


def _cells(row: Row) -> tuple[str, ...]:
    """As `HEADS` has them."""
    view = row.receptive_field
    sees = "-" if view is None else str(view) if isinstance(view, int) else _size(view)
    kernel = row.kernel or "-"
    return (
        row.name if row.call == 1 else f"{row.name} (call {row.call})",
        row.type,
        " + ".join(map(_size, row.output)) or "-",
        short(row.memory_bytes / 1024),
        short(row.parameters / 1e3),
        short(_over(row.operations, 1e6)),
        sees,
        short(_over(row.bytes_moved, 1024)),
        _micros(row.floor_seconds),
        f"{kernel} (tf32)" if row.precision == "tf32" else kernel,
    )


def _over(value: int | None, unit: float) -> float | None:
    return None if value is None else value / unit


def _total_cells(found: Summary) -> tuple[str, ...]:
    memory, parameters, operations, moved = (found.total(column) for column in TOTALS[:4])
    return (
        "total", "", "", short(memory / 1024), short(parameters / 1e3), short(operations / 1e6), "",
        short(moved / 1024), _micros(found.total("floor_seconds")), "",
    )  # fmt: skip


def _share_rows(found: Summary) -> list[tuple[str, ...]]:
    """Kind by kind, the percentages of `SHARED`."""
    kinds = [kind for kind in KINDS if any(row.kind == kind for row in found.rows)]
    return [
        (kind, *(f"{100 * found.share(column, kind):.1f} %" for column in SHARED)) for kind in kinds
    ]


def title(found: Summary) -> str:
    """What was summarised."""
    return f"{found.model} on {_size(found.input)}, {found.dtype}"


def notes(found: Summary) -> list[str]:
    """Totals in full, what they leave out, and what the least times follow from."""
    used = {row.precision for row in found.rows if row.precision}
    lines = [
        f"{found.parameters:,} parameters, {found.total('operations'):,} operations (multiply-adds; in "
        "pooling places of windows, in norms and activations values)"
    ]
    missing = sum(row.operations is None for row in found.rows)
    if missing:
        lines.append(f"operations of {missing} rows are not known and not in the total")
    if found.uncounted:
        calls = ", ".join(f"{name} {times}x" for name, times in found.uncounted.items())
        lines.append(f"functions called outside of layers are in no total: {calls}")
    elsewhere = found.parameters - found.total("parameters")
    if elsewhere:
        lines.append(f"{elsewhere:,} parameters are in modules that were not called")
    lines.append(f"least time on {found.gpu.sentence(sorted(used) or [found.dtype])}")
    return lines


def table(found: Summary) -> str:
    """The tables as text, as wide as they need to be."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    layers = Table(box=box.SIMPLE, show_footer=True, pad_edge=False)
    for number, (head, foot) in enumerate(zip(HEADS, _total_cells(found), strict=True)):
        number_column = WORDS <= number < len(HEADS) - 1
        layers.add_column(
            head, Text(foot), justify="right" if number_column else "left", no_wrap=True
        )
    for row in found.rows:
        layers.add_row(*map(Text, _cells(row)))
    shares = Table(box=box.SIMPLE, pad_edge=False)
    shares.add_column("share of", no_wrap=True)
    for name in SHARED.values():
        shares.add_column(name, justify="right", no_wrap=True)
    for cells in _share_rows(found):
        shares.add_row(*map(Text, cells))
    out = io.StringIO()
    console = Console(file=out, width=10_000, color_system=None)
    for part in (Text(title(found)), layers, shares, *map(Text, notes(found))):
        console.print(part)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


# ---- for programs -----------------------------------------------------------------------------------------


def csv_text(found: Summary) -> str:
    """See `Summary.csv`. Sizes are written 1x64x56x56, several joined by " + "."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in found.rows:
        writer.writerow(_csv_cell(getattr(row, name)) for name in COLUMNS)
    return out.getvalue()


def _csv_cell(value: Any) -> Any:
    if not isinstance(value, tuple):
        return value
    several = all(isinstance(size, tuple) for size in value)
    return " + ".join(map(_size, value)) if several else _size(value)


def document(found: Summary) -> dict[str, Any]:
    """What JSON holds:

    ============  =========================================================================================
    model         name of its class
    input, dtype  size with the batch; dtype of parameters and input
    gpu           name, bytes_per_s, flops_per_s by precision, source
    layers        a list of `Row`, key by key; sizes are lists, and unknown values null
    totals        memory_bytes, operations, bytes_moved, floor_seconds: sums over layers; parameters: of the
                  whole model; rows_without_operations; parameters_without_row: of modules not called
    shares        kind -> memory_bytes, parameters, operations, floor_seconds -> 0 to 1
    uncounted     functions called outside of layers -> how often
    ============  =========================================================================================
    """
    kinds = [kind for kind in KINDS if any(row.kind == kind for row in found.rows)]
    totals = {column: found.total(column) for column in TOTALS}
    return {
        "model": found.model,
        "input": found.input,
        "dtype": found.dtype,
        "gpu": asdict(found.gpu),
        "layers": [asdict(row) for row in found.rows],
        "totals": {
            **totals,
            "parameters": found.parameters,
            "parameters_without_row": found.parameters - totals["parameters"],
            "rows_without_operations": sum(row.operations is None for row in found.rows),
        },
        "shares": {kind: {c: found.share(c, kind) for c in SHARED} for kind in kinds},
        "uncounted": dict(found.uncounted),
    }


def json_text(found: Summary) -> str:
    """See `Summary.json`."""
    return json.dumps(document(found), indent=1) + "\n"


# ---- as a page --------------------------------------------------------------------------------------------

_CSS = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #fff; --line: #d4d9df; --bar: #cfe3f3; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e2e6ea; --paper: #14171a; --line: #363c42; --bar: #21425c; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
       margin: 2rem auto; padding: 0 1.5rem; max-width: 80rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; margin: 1rem 0; }
th, td { text-align: left; padding: 2px 10px 2px 4px; border-bottom: 1px solid var(--line);
         white-space: nowrap; }
th { position: sticky; top: 0; background: var(--paper); }
.number { text-align: right; }
td.number { background: linear-gradient(to left, var(--bar) var(--share, 0%), transparent 0); }
tfoot td { font-weight: bold; }
"""


def _html_table(
    heads: Sequence[str],
    body: Sequence[Sequence[str]],
    numbers: range,
    foot: Sequence[str] = (),
    share: Callable[[int, int], float] = lambda line, column: 0.0,
) -> str:
    """`numbers` are the columns to the right; `share` of a line's column fills so much of its cell."""

    def cell(tag: str, text: str, column: int, part: float = 0.0) -> str:
        kind = ' class="number"' if column in numbers else ""
        style = f' style="--share:{100 * part:.1f}%"' if part else ""
        return f"<{tag}{kind}{style}>{html.escape(text)}</{tag}>"

    head = "".join(cell("th", text, i) for i, text in enumerate(heads))
    lines = [
        "".join(cell("td", text, i, share(line, i)) for i, text in enumerate(cells))
        for line, cells in enumerate(body)
    ]
    last = "".join(cell("td", text, i) for i, text in enumerate(foot))
    rows = "\n".join(f"<tr>{line}</tr>" for line in lines)
    return (
        f'<div class="wide"><table><thead><tr>{head}</tr></thead>\n<tbody>{rows}</tbody>\n'
        f"<tfoot><tr>{last}</tr></tfoot></table></div>"
    )


def html_text(found: Summary) -> str:
    """See `Summary.html`. A number's cell is filled by its share of the total."""
    barred = dict(zip((3, 4, 5, 7, 8), TOTALS, strict=True))

    def share(line: int, column: int) -> float:
        if column not in barred:
            return 0.0
        whole = found.total(barred[column])
        return float(getattr(found.rows[line], barred[column]) or 0) / (whole or 1)

    layers = _html_table(
        HEADS, [_cells(row) for row in found.rows], range(WORDS, len(HEADS) - 1),
        _total_cells(found), share,
    )  # fmt: skip
    shares = _html_table(("share of", *SHARED.values()), _share_rows(found), range(1, 5))
    name = html.escape(title(found))
    lines = "".join(f"<li>{html.escape(line)}</li>" for line in notes(found))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{name}</title><style>{_CSS}</style></head>\n"
        f"<body><h1>{name}</h1>\n{layers}\n{shares}\n<ul>{lines}</ul></body></html>\n"
    )

"""What is shown of benchmark results: tables of documents, a summary, plots, an HTML page, two runs compared.

    python bench/report.py                     # the newest run in short: failures, worst rows, means
    python bench/report.py --report            # everything, in one file
    python bench/report.py --png plots/        # the plots alone
    python bench/report.py --readme            # write README's table and figure and docs/speed.md;
                                               # --check: exit 1 where they are stale
    python bench/report.py --compare A B       # two result files; exit 1 where cnnops became slower

Reads what `lab.py` left in bench/results/, and needs neither torch nor a GPU. A speed-up is another's time
over that of cnnops: above 1, cnnops is faster. Dry runs are left out, unless --compare names them.
"""

from __future__ import annotations

import argparse
import functools
import re
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # a script's own folder stands there otherwise

from bench.compare import print_comparison  # noqa: E402
from bench.figure import is_fresh, svg  # noqa: E402
from bench.page import page  # noqa: E402
from bench.parts import CAPTION, LAYOUTS, by_part, by_size  # noqa: E402
from bench.plots import plots  # noqa: E402
from bench.runs import (  # noqa: E402
    CNNOPS,
    LEGEND,
    NEVER,
    RESULTS,
    Run,
    conditions,
    duration,
    failed,
    groups,
    load,
    newest_of_each_device,
    not_measured,
    not_timed,
    print_table,
    runs,
    stamp,
    summary,
    terminal,
    worst,
)

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["console", "duration", "failed", "load", "main", "readme", "speed", "table"]

PAGE = "cnnops_bench.html"
README, SPEED, FIGURE = Path("README.md"), Path("docs/speed.md"), Path("docs/speed.svg")
"""Documents of a checkout that show results."""
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
MOST_LINES = 40
"""A table in the console is cut after so many."""


# ---- markdown --------------------------------------------------------------------------------------------


def table(run: Run) -> str:
    """`run` in a few lines of GitHub's markdown, with its device, versions and commit above."""
    parts = [stamp(run)]
    if cells := by_part(run):
        parts += [_lines(cells, (cells[0][0], "worst")), f"{CAPTION.capitalize()}."]
    if cells := by_size(run):
        parts.append(_lines(cells, cells[0][:1]))
    for rows, fields in (
        (run.rows, ("suite", "dtype", "layout")),
        (run.models, ("phase", "dtype", "layout")),
    ):
        if rows:
            cells = summary(rows, fields, run.rivals)
            parts.append(_lines(cells, (*cells[0][: len(fields)], "worst row")))
    if not run.measured:
        parts.append("This run measured no rows.")
    parts.append(f"{conditions(run)}. {_markdown(not_measured(run))}".strip())
    return "\n\n".join(parts) + "\n"


def _lines(cells: Sequence[Sequence[str]], words: Sequence[str]) -> str:
    """The first row of `cells` is the head, of which `words` stand over no numbers."""
    rule = ["---" if name in words else "--:" for name in cells[0]]
    head, *body = ([_markdown(cell) for cell in line] for line in cells)
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, rule, *body))


def _markdown(cell: str) -> str:
    return re.sub(r"([\\`*|<>])", r"\\\1", cell)


def short(run: Run) -> str:
    """`run` in one table, the parts of a CPU's, the suites of a GPU's; the layouts stand in `table`."""
    cells = by_part(run)
    kept = [n for n, name in enumerate(cells[0]) if name not in LAYOUTS] if cells else []
    cells = [[line[n] for n in kept] for line in cells] or summary(run.rows, ("suite",), run.rivals)
    return f"{stamp(run)}\n\n{_lines(cells, (cells[0][0], 'worst', 'worst row'))}\n"


def readme(text: str, found: Sequence[Run]) -> str:
    """README's `text` with what is between its markers made new: in short, the newest of `found` on a GPU
    and on a CPU, and the names of the other devices, so that it stays as long as it is.

    Raises ValueError where `text` has not one pair of markers.
    """
    shown = newest_of_each_device(found)
    newest = {run.machine["kind"]: run for run in shown}.values()
    others = [str(run.machine["device"]) for run in shown if run not in newest]
    named = [f"Measured too: {', '.join(map(_markdown, others))}.\n"] if others else []
    return _between(text, shown, [*map(short, newest), *named])


def speed(text: str, found: Sequence[Run]) -> str:
    """The same for docs/speed.md: all tables."""
    shown = newest_of_each_device(found)
    tables = [table(run) for run in shown]
    return _between(text, shown, [*tables, f"{LEGEND}\n"] if tables else [])


def _between(text: str, shown: Sequence[Run], parts: Sequence[str]) -> str:
    """`text` with the parts between its markers, and in front of them what was not measured."""
    if not (text.count(BEGIN) == text.count(END) == 1 and text.index(BEGIN) < text.index(END)):
        raise ValueError(
            f"expected one {BEGIN} and one {END} behind it, "
            f"got {text.count(BEGIN)} and {text.count(END)}"
        )
    none = all(run.machine["kind"] != "gpu" for run in shown)
    said = ["Speed: not measured on a GPU yet.\n"] if none else []
    before, after = text.partition(BEGIN)[0], text.partition(END)[2]
    return f"{before}{BEGIN}\n" + "\n".join([*said, *parts]) + f"{END}{after}"


def _documents(root: Path, found: Sequence[Run], write: bool) -> bool:
    """Renew the documents of a checkout, or only compare them; whether any is stale now."""
    shown, stale = newest_of_each_device(found), []
    for place, renew in ((README, readme), (SPEED, speed)):
        text = (root / place).read_text(encoding="utf-8")
        if (renewed := renew(text, found)) != text:
            stale.append(place)
            if write:
                (root / place).write_text(renewed, encoding="utf-8")
    if not is_fresh(root / FIGURE, shown):
        stale.append(FIGURE)
        if write:
            (root / FIGURE).write_text(svg(shown), encoding="utf-8")
    for place in stale:
        said = "" if write else ": stale; python bench/report.py --readme renews it"
        print(f"{'saved ' * write}{root / place}{said}")
    return bool(stale) and not write


# ---- console ---------------------------------------------------------------------------------------------


def console(run: Run, out: Console | None = None) -> None:
    """Print `run` in short: what failed, where cnnops is slowest against the best rival, geometric means.

    The means leave out groups of rows where nothing can be compared, and stop after `MOST_LINES`.
    """
    out = out or terminal()
    out.print(stamp(run), style="bold")
    problems = run.problems
    out.print(
        f"{len(problems)} failed" if problems else "no failures",
        style="bold red" if problems else "green",
    )
    for line in problems:
        out.print(f"  {line}", style="red")
    for absent in filter(None, (not_timed(run), not_measured(run))):
        out.print(absent)
    out.print()
    for title, cells in (
        (f"speed-up: {CAPTION}", by_part(run)),
        ("small and large convolutions", by_size(run)),
    ):
        if cells:
            print_table(out, title, cells)
    behind = [["row", "type", "layout", "cnnops", "best rival", "speed-up", "% of floor", "rival"]]
    for row in worst(run.rows):
        percent = row.percent_of_floor()
        behind.append(
            [
                f"{row.suite}/{row.name}",
                row.dtype,
                row.layout,
                duration(row.seconds(CNNOPS)),
                duration(row.seconds(row.best_rival)),
                f"{row.speed_up:.2f}",
                "–" if percent is None else f"{percent:.0f} %",
                row.best_rival or "–",
            ]
        )
    if len(behind) > 1:
        print_table(out, "where cnnops is furthest behind the best rival", behind)
    else:
        out.print("no row has times of both cnnops and a rival\n")
    for rows, fields in (
        (run.rows, ("suite", "dtype", "layout")),
        (run.rows, ("op", "direction", "dtype")),
        (run.models, ("model", "phase", "dtype", "layout")),
    ):
        parts = groups(rows, *fields)
        compared = [row for part in parts if part.against_best() for row in part.rows]
        if compared:
            title = "speed-up: geometric means (rows)"
            print_table(out, title, summary(compared, fields, run.rivals), MOST_LINES)


# ---- command line ----------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line and exits with code 2."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message}", file=sys.stderr)
        raise SystemExit(2)


def _parser() -> _Parser:
    parser = _Parser("bench/report.py", description="Show benchmark results.")
    option = functools.partial(parser.add_argument, type=Path)
    option("--results", metavar="DIR", default=RESULTS, help="where results lie (bench/results)")
    option("--report", dest="html", metavar="FILE", nargs="?", const=PAGE,
           help=f"write everything as one page ({PAGE})")  # fmt: skip
    option("--png", metavar="DIR", help="write the plots of each device's newest run")
    option("--readme", metavar="DIR", nargs="?", const=ROOT,
           help="renew the tables and the figure of README.md and docs/speed.md in a checkout")  # fmt: skip
    option("--check", metavar="DIR", nargs="?", const=ROOT, help="exit 1 where these are stale")
    option("--compare", metavar=("A", "B"), nargs=2, help="two result files: exit 1 if B is slower")
    parser.add_argument(
        "--force", action="store_true", help="compare different devices all the same"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; its exit code: 0, 1 for a regression or a stale document, 2 for bad input."""
    parser = _parser()
    options = parser.parse_args(argv)
    try:
        return _run(options)
    except (ValueError, OSError) as error:
        parser.error(str(error))


def _run(options: argparse.Namespace) -> int:
    if options.compare:
        a, b = (load(path) for path in options.compare)
        return 1 if print_comparison(a, b, options.force) else 0
    if options.html and not options.html.parent.is_dir():
        raise ValueError(f"--report: expected a file in a folder that exists, got {options.html}")
    every = runs(options.results)
    found = [run for run in every if not run.dry]
    draws = options.html or options.png or options.readme
    if found and draws and find_spec("matplotlib") is None:
        raise ValueError("plots need matplotlib: pip install 'cnnops[bench]'")
    if not found:
        print(f"{'only dry runs' if every else 'no results'} in {options.results}: {NEVER}")
    if options.html:
        options.html.write_text(page(found, options.results), encoding="utf-8")
        print(f"saved {options.html}")
    if options.png:
        options.png.mkdir(parents=True, exist_ok=True)
        for run in newest_of_each_device(found):
            for name, picture in plots(run).items():
                path = options.png / f"{run.path.stem}-{name}.png"
                path.write_bytes(picture)
                print(f"saved {path}")
    if options.readme:
        _documents(options.readme, found, write=True)
    stale = bool(options.check) and _documents(options.check, found, write=False)
    if found and not (options.html or options.png or options.readme or options.check):
        console(found[-1])
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())

"""Result files of `lab.py` as Python values, the numbers made of them, and how they are put into words.

A speed-up is another's time over that of cnnops: above 1, cnnops is faster. Times are medians of a row's main
variant: "cold" (on a GPU: the L2 cache flushed before every sample) where it was measured, else "warm".
"""

from __future__ import annotations

import json
import math
import re
import statistics
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

if TYPE_CHECKING:
    from rich.console import Console

RESULTS = Path(__file__).resolve().parent / "results"

SCHEMA = 1
CNNOPS = "cnnops"
POLICIES = (CNNOPS, "cnnops-auto")
ONE_THREAD = "cnnops-1-thread"
FUSED = "cnnops-fused"
OURS = (*POLICIES, ONE_THREAD, FUSED)
RIVALS = ("eager", "eager-benchmark", "compile", "compile-max-autotune")
DIRECTIONS = ("fprop", "dgrad", "wgrad", "fwd", "bwd")
NEVER = "not measured yet"


# ---- result files ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Timing:
    """One rival's samples of one row in one variant, in seconds: median, 10th and 90th percentile."""

    median_s: float
    p10_s: float
    p90_s: float
    samples: int

    def __post_init__(self) -> None:
        if not 0 < self.p10_s <= self.median_s <= self.p90_s < math.inf:
            raise ValueError(
                "expected times 0 < p10_s <= median_s <= p90_s, "
                f"got {self.p10_s}, {self.median_s}, {self.p90_s}"
            )


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What was measured of one row or model: `times` by rival and variant, `absent` the reasons for gaps.

    `errors` are relative, against the reference, in the norm of all elements.
    """

    id: str
    suite: str
    dtype: str
    times: Mapping[str, Mapping[str, Timing]]
    absent: Mapping[str, str]
    errors: Mapping[str, float] = field(default_factory=dict)
    floor_s: float | None = None

    @property
    def label(self) -> str:
        """What it is called among others of its direction or phase."""
        raise AssertionError("rows and models have labels")

    @property
    def name(self) -> str:
        """What it is called in its suite."""
        raise AssertionError("rows and models have names")

    @property
    def variant(self) -> str:
        """The main variant. It is the row's, not a rival's: no cold time is ever held against a warm one."""
        return "cold" if any("cold" in variants for variants in self.times.values()) else "warm"

    def timing(self, rival: str | None) -> Timing | None:
        return self.times.get(rival or "", {}).get(self.variant)

    def seconds(self, rival: str | None) -> float | None:
        """The median of the main variant."""
        timing = self.timing(rival)
        return timing.median_s if timing else None

    def ratio(self, rival: str | None, ours: str = CNNOPS) -> float | None:
        """Speed-up of `ours` over `rival`; None where either has no time."""
        theirs, mine = self.seconds(rival), self.seconds(ours)
        return theirs / mine if theirs and mine else None

    @property
    def best_rival(self) -> str | None:
        """The fastest of all that are not cnnops."""
        timed = [r for r in self.times if r not in OURS and self.seconds(r) is not None]
        return min(timed, key=lambda rival: self.seconds(rival) or math.inf, default=None)

    @property
    def speed_up(self) -> float | None:
        """Over the best rival."""
        return self.ratio(self.best_rival)

    def percent_of_floor(self, rival: str = CNNOPS) -> float | None:
        """The roofline's least time as a percentage of the time taken; caches may beat 100 on warm data."""
        taken = self.seconds(rival)
        return 100 * self.floor_s / taken if self.floor_s and taken else None


@dataclass(frozen=True, kw_only=True)
class MeasuredRow(Measured):
    """One operation with its sizes, in one direction, dtype and layout. `bytes` is the least traffic."""

    case: str
    op: str
    direction: str
    layout: str
    problem: str
    count: int
    source: str
    flops: int
    bytes: int

    @property
    def label(self) -> str:
        return self.case

    @property
    def name(self) -> str:
        return f"{self.case} {self.direction}"

    @property
    def series(self) -> str:
        """What the cases of one sweep have in common: "dense_C8", "dense_C16", … are the series "dense_C"."""
        return re.sub(r"\d+$", "", self.case)

    @property
    def intensity(self) -> float:
        """FLOP a byte: where the row stands beneath the roofline."""
        return self.flops / self.bytes

    def rate(self, rival: str | None) -> float | None:
        """FLOP/s."""
        taken = self.seconds(rival)
        return self.flops / taken if taken else None


@dataclass(frozen=True, kw_only=True)
class MeasuredModel(Measured):
    """One network: a training step or an inference of one batch."""

    model: str
    phase: str
    batch: int
    layout: str

    @property
    def label(self) -> str:
        return f"{self.model}, batch {self.batch}"

    @property
    def name(self) -> str:
        return f"{self.model} {self.phase}, batch {self.batch}"


@dataclass(frozen=True)
class Run:
    """One result file."""

    path: Path
    machine: Mapping[str, Any]
    ceilings: Mapping[str, Any]
    settings: Mapping[str, Any]
    rows: tuple[MeasuredRow, ...]
    models: tuple[MeasuredModel, ...] = ()
    tests: tuple[Mapping[str, Any], ...] = ()
    failures: tuple[str, ...] = ()
    golden: Mapping[str, Any] = field(default_factory=dict)
    sanitizer: tuple[Mapping[str, Any], ...] = ()

    @property
    def dry(self) -> bool:
        """A walk through the steps on tiny problems. Its times are of single calls, and stand for nothing."""
        return bool(self.settings.get("dry_run"))

    @property
    def measured(self) -> tuple[Measured, ...]:
        return (*self.rows, *self.models)

    @property
    def rivals(self) -> tuple[str, ...]:
        """All that cnnops was to be held against, whether it has times or only reasons why not."""
        named = {r for m in self.measured for r in (*m.times, *m.absent)}.difference(OURS)
        return (*(r for r in RIVALS if r in named), *sorted(named.difference(RIVALS)))

    @property
    def ours(self) -> tuple[str, ...]:
        """Those forms of cnnops that have times."""
        return tuple(
            ours for ours in (*POLICIES, FUSED) if any(ours in m.times for m in self.measured)
        )

    @property
    def problems(self) -> list[str]:
        """All that went wrong, one line each: what the run noted, wrong results, tests, races."""
        lines = [
            f"{m.id}: {rival}: {reason}"
            for m in self.measured
            for rival, reason in m.absent.items()
            if failed(reason)
        ]
        lines += [
            f"{test.get('file')}: {test['failed']} failed, {test.get('passed', 0)} passed"
            for test in self.tests
            if test.get("failed")
        ]
        lines += [f"golden: {name} differs" for name in self.golden.get("differ", ())]
        lines += [
            f"{check.get('tool')}: {check.get('kernel')}"
            for check in self.sanitizer
            if not check.get("ok")
        ]
        return [*self.failures, *(line for line in lines if line not in self.failures)]


def failed(reason: str) -> bool:
    """Whether a reason for a missing time is a failure, rather than that nobody tried."""
    return reason.startswith(("wrong", "raised"))


def load(path: Path | str) -> Run:
    """Read one result file. Raises ValueError, in one line, for what is none."""
    path = Path(path)
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: expected a result file, got {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON, got {error}") from None
    found = raw.get("schema") if isinstance(raw, dict) else None
    if found != SCHEMA:
        raise ValueError(f"{path}: expected schema {SCHEMA}, got {found!r}")
    try:
        run = Run(
            path=path,
            machine=raw["machine"],
            ceilings=raw["ceilings"],
            settings=raw.get("settings", {}),
            rows=tuple(_row(row) for row in raw["rows"]),
            models=tuple(_model(model) for model in raw.get("models", ())),
            tests=tuple(raw.get("tests", ())),
            failures=tuple(raw.get("failures", ())),
            golden=raw.get("golden") or {},
            sanitizer=tuple(raw.get("sanitizer", ())),
        )
        if run.machine["kind"] not in ("gpu", "cpu"):
            raise ValueError(f"expected kind gpu or cpu, got {run.machine['kind']!r}")
        stamp(run)  # a run whose numbers could not be shown with their origin is none
    except KeyError as error:
        raise ValueError(f"{path}: expected the key {error}, got none") from None
    except (TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None
    return run


def _common(raw: Mapping[str, Any]) -> dict[str, Any]:
    times = {
        rival: {
            variant: Timing(t["median_s"], t["p10_s"], t["p90_s"], t["samples"])
            for variant, t in variants.items()
        }
        for rival, variants in raw["times"].items()
    }
    return {
        "id": raw["id"],
        "dtype": raw["dtype"],
        "times": times,
        "absent": dict(raw.get("absent") or {}),
        "errors": dict(raw.get("errors") or {}),
    }


def _row(raw: Mapping[str, Any]) -> MeasuredRow:
    if raw["direction"] not in DIRECTIONS:
        raise ValueError(f"expected a direction of {', '.join(DIRECTIONS)}, got {raw['direction']}")
    same = ("suite", "case", "op", "direction", "layout", "problem", "flops", "bytes")
    return MeasuredRow(
        **_common(raw),
        **{name: raw[name] for name in same},
        floor_s=raw.get("floor_s"),
        count=raw.get("count", 1),
        source=raw.get("source", ""),
    )


def _model(raw: Mapping[str, Any]) -> MeasuredModel:
    same = {name: raw[name] for name in ("model", "phase", "batch")}
    if "layout" not in raw:  # files of times when half types were channels-last and float32 was not
        layout = "contiguous" if raw["dtype"] == "float32" else "channels_last"
        raw = {**raw, "layout": layout, "id": f"{raw['id']}/{layout}"}
    return MeasuredModel(**_common(raw), suite="models", layout=raw["layout"], **same)


def runs(folder: Path | str = RESULTS) -> list[Run]:
    """All runs in `folder`, newest last; none where it does not exist. Raises ValueError as `load`."""
    found = [load(path) for path in Path(folder).glob("*.json")]
    return sorted(found, key=lambda run: (run.machine["date"], run.path.name))


def latest(kind: str, folder: Path | str = RESULTS) -> Run | None:
    """The newest run of a `kind` of device, "gpu" or "cpu", that was no dry one."""
    found = (run for run in reversed(runs(folder)) if run.machine["kind"] == kind and not run.dry)
    return next(found, None)


def newest_of_each_device(found: Iterable[Run]) -> list[Run]:
    """Of `found`, newest last, the last of every device that was no dry one; GPUs first."""
    last = {run.machine["device"]: run for run in found if not run.dry}
    return sorted(last.values(), key=lambda run: (run.machine["kind"] != "gpu", str(run.path)))


# ---- numbers ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mean:
    """A mean, and the number of rows that it was taken over."""

    value: float
    count: int

    def __str__(self) -> str:
        return f"{self.value:.2f} ({self.count})"


def geomean(ratios: Iterable[float | None]) -> Mean | None:
    """The geometric mean of those ratios that exist; None where none does."""
    logs = [math.log(ratio) for ratio in ratios if ratio is not None]
    return Mean(math.exp(statistics.fmean(logs)), len(logs)) if logs else None


M = TypeVar("M", bound=Measured)


@dataclass(frozen=True)
class Group(Generic[M]):
    """Rows that have `key` in common."""

    key: tuple[str, ...]
    rows: tuple[M, ...]

    def against(self, rival: str, ours: str = CNNOPS) -> Mean | None:
        return geomean(row.ratio(rival, ours) for row in self.rows)

    def against_best(self, ours: str = CNNOPS) -> Mean | None:
        """Each row against its own best rival: what somebody who tries everything would lose or gain."""
        return geomean(row.ratio(row.best_rival, ours) for row in self.rows)

    @property
    def percent_of_floor(self) -> float | None:
        percents = [p for row in self.rows if (p := row.percent_of_floor()) is not None]
        return statistics.median(percents) if percents else None

    @property
    def timed(self) -> int:
        return sum(row.seconds(CNNOPS) is not None for row in self.rows)


def groups(rows: Iterable[M], *fields: str) -> list[Group[M]]:
    """`rows` by the values of their `fields`, in the order in which these first occur."""
    found: dict[tuple[str, ...], list[M]] = {}
    for row in rows:
        found.setdefault(tuple(str(getattr(row, name)) for name in fields), []).append(row)
    return [Group(key, tuple(members)) for key, members in found.items()]


def worst(rows: Iterable[M], count: int = 10) -> list[M]:
    """The rows where cnnops is furthest behind its best rival, or least ahead."""
    compared = [row for row in rows if row.speed_up is not None]
    return sorted(compared, key=lambda row: row.speed_up or 0)[:count]


# ---- text ------------------------------------------------------------------------------------------------


def stamp(run: Run) -> str:
    """Device, versions, commit and date: stands beside every number."""
    m = run.machine
    changed = " with uncommitted changes" if m.get("dirty") else ""
    parts = [
        m["device"],
        m.get("cpu"),
        m.get("driver") and f"driver {m['driver']}",
        m.get("cuda") and f"CUDA {m['cuda']}",
        f"torch {m['torch'].partition('+')[0]}",
        m.get("cudnn") and f"cuDNN {_cudnn(m['cudnn'])}",
        f"cnnops {m['cnnops']} at {m['commit']}{changed}",
        m["date"][:10],
    ]
    return " · ".join(part for part in parts if part)


def _cudnn(version: int) -> str:
    """91002 → 9.10.2; up to cuDNN 8 the major version counted thousands."""
    major, rest = divmod(version, 10_000 if version >= 90_000 else 1000)
    return f"{major}.{rest // 100}.{rest % 100}"


def conditions(run: Run) -> str:
    """How the times were taken, for a reader of the table."""
    cold = any(row.variant == "cold" for row in run.measured)
    text = "Medians, the L2 cache flushed before every sample" if cold else "Medians, on warm data"
    if run.machine["kind"] == "cpu":
        text += "; layers scaled down to what a CPU does in milliseconds"
    if run.machine["kind"] == "gpu" and "allow_tf32" in run.settings:
        text += f"; TF32 {'on' if run.settings['allow_tf32'] else 'off'}"
    return text


def duration(seconds: float | None) -> str:
    """Three digits and a unit: 140 µs."""
    if seconds is None:
        return "–"
    factor, unit = next(
        (pair for pair in ((1, "s"), (1e3, "ms")) if seconds * pair[0] >= 0.9995), (1e6, "µs")
    )
    value = seconds * factor
    return f"{value:.{max(0, 2 - math.floor(math.log10(value * 1.0005)))}f} {unit}"


HEADS = {"dtype": "type", "phase": "networks"}


def summary(
    rows: Iterable[Measured], fields: Sequence[str], rivals: Sequence[str]
) -> list[list[str]]:
    """Speed-ups by the values of `fields`, as cells; the first row is the head.

    Every mean comes with the number of its rows. Columns without any number are left out.
    """
    names = [HEADS.get(name, name) for name in fields]
    cells = [[*names, "rows", *(f"vs {r}" for r in rivals), "vs best", "% of floor", "worst row"]]
    for group in groups(rows, *fields):
        last, percent, total = worst(group.rows, 1), group.percent_of_floor, len(group.rows)
        cells.append(
            [
                *group.key,
                str(total) if group.timed == total else f"{group.timed} of {total}",
                *(str(group.against(rival) or "–") for rival in rivals),
                str(group.against_best() or "–"),
                "–" if percent is None else f"{percent:.0f} %",
                f"{last[0].name}: {last[0].speed_up:.2f} vs {last[0].best_rival}" if last else "–",
            ]
        )
    return filled(cells)


def filled(cells: Sequence[Sequence[str]]) -> list[list[str]]:
    """`cells`, the first row of which is the head, without columns that say nothing."""
    columns = [column for column in zip(*cells, strict=True) if set(column[1:]) != {"–"}]
    return [list(line) for line in zip(*columns, strict=True)]


def not_measured(run: Run) -> str:
    """Which rivals have no time in the whole run, and the reason that most rows give; "" where all have."""
    lines = []
    for rival in run.rivals:
        if not any(rival in m.times for m in run.measured):
            reasons = [m.absent[rival] for m in run.measured if rival in m.absent]
            lines.append(f"{rival} ({statistics.mode(reasons)})")
    return f"{NEVER.capitalize()}: {', '.join(lines)}." if lines else ""


def not_timed(run: Run) -> str:
    """How many rows cnnops has no time for, and the reasons, the commonest first; "" where it has all.

    Rows that failed are not counted: they are among `Run.problems`.
    """
    missing = (m.absent.get(CNNOPS) for m in run.measured if m.seconds(CNNOPS) is None)
    reasons = Counter(reason for reason in missing if reason and not failed(reason))
    if not reasons:
        return ""
    total = "1 row is" if reasons.total() == 1 else f"{reasons.total()} rows are"
    listed = ", ".join(f"{reason} ({count})" for reason, count in reasons.most_common())
    return f"{total} not timed: {listed}"


LEGEND = """\
Numbers are another's time over that of cnnops, so above 1 cnnops is faster: geometric means, with the number
of rows behind each in brackets. "Best" is the fastest of the others, row by row; "% of floor" is the least
time that the device's bandwidth and arithmetic allow over the time taken, the median of the rows."""


# ---- terminal ------------------------------------------------------------------------------------------


def terminal() -> Console:
    """Standard output."""
    from rich.console import Console

    # Names as they are: no markup, no colours of rich's own choosing. A pipe has no width to fit into.
    width = None if sys.stdout.isatty() else 400
    return Console(width=width, markup=False, highlight=False, emoji=False)


def print_table(
    out: Console, title: str, cells: Sequence[Sequence[str]], most: int | None = None
) -> None:
    """The first row of `cells` is the head; `most`: how many of the others are shown, None for all."""
    from rich import box
    from rich.table import Table

    drawn = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for name, *column in zip(*cells, strict=True):
        numbers = all(cell[0] in "–0123456789" for cell in column)
        drawn.add_column(name, justify="right" if numbers else "left", overflow="fold")
    shown = cells[1:] if most is None else cells[1 : most + 1]
    for row in shown:
        drawn.add_row(*row)
    out.print(drawn)
    if left := len(cells) - 1 - len(shown):
        out.print(f"… and {left} more\n")

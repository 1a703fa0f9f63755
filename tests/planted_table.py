"""The table of planted bugs in kernels/emulator/README.md: ``python -m tests.planted_table`` rewrites it.

Each kernel in tests/emulated that can do one thing wrong is run with its bug, and the table says what the
emulator then said. The tests know these kernels, and a pattern of each report: `test_emulator.PLANTED`,
`test_emulator_async.REPORTS` and `test_emulator_cluster.REPORTS`. What test_planted_table.py compares is that
every bug has its row and that the row fits the pattern, so that a line that has moved makes nothing stale.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from cnnops.cuda import emulate
from cnnops.cuda.kernel import kernels_dir

README = kernels_dir() / "emulator" / "README.md"
COMMAND = "python -m tests.planted_table"
BEGIN = f"<!-- written by {COMMAND} -->"
END = "<!-- end -->"


class Bug(NamedTuple):
    file: str
    entry: str
    pattern: str


def bugs() -> Iterator[Bug]:
    """All planted bugs, by file, in the order of the tests' tables."""
    import test_emulator
    import test_emulator_async
    import test_emulator_cluster

    rows = [Bug(bug.file, entry, bug.report) for entry, bug in test_emulator.PLANTED.items()]
    for file, reports in {**test_emulator_async.REPORTS, **test_emulator_cluster.REPORTS}.items():
        rows += [Bug(file, entry, pattern) for entry, pattern in reports.items()]
    files = list(dict.fromkeys(row.file for row in rows))
    yield from sorted(rows, key=lambda row: files.index(row.file))


def report(bug: Bug) -> str:
    """What the emulator says of the bug, without whose fault it is and where."""
    import test_emulator
    import test_emulator_async
    import test_emulator_cluster

    planted = test_emulator_async.planted
    if bug.entry in test_emulator.PLANTED:
        planted = test_emulator.planted
    elif bug.file in test_emulator_cluster.REPORTS:
        planted = test_emulator_cluster.planted
    plan, tensors = planted(bug.entry, bug=1)
    try:
        with emulate.schedule("all"), emulate.time_limit(0.05):
            emulate.execute(plan, tensors)
    except emulate.KernelError as error:
        told = str(error).removeprefix(f"{plan.kernel}: ")
        told = re.sub(r" \[block \(.*\) of .*\]$", "", told)  # who it was
        return re.sub(r"^[\w.]+:\d+: ", "", told).replace("\n", " ")
    raise AssertionError(f"{bug.entry}: expected a report, got none")


def rows_of_readme() -> dict[str, str]:
    """The reports in the table, by entry."""
    text = README.read_text()
    assert BEGIN in text and END in text, f"{README} has no table: {COMMAND}"
    table = text.partition(BEGIN)[2].partition(END)[0]
    found = re.findall(r"^\| `(\w+)` \| (.*) \|$", table, re.MULTILINE)
    return {entry: told.replace("\\|", "|") for entry, told in found}


def rewrite() -> None:
    lines, file = [BEGIN], ""
    for bug in bugs():
        if bug.file != file:
            file = bug.file
            lines += [
                "",
                f"| in `tests/emulated/{file}.cu` | the emulator's report |",
                "| --- | --- |",
            ]
        told = report(bug)
        assert re.search(bug.pattern, told), f"{bug.entry}: expected {bug.pattern}, got {told}"
        lines.append(f"| `{bug.entry}` | {told.replace('|', chr(92) + '|')} |")
    before, _, rest = README.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    README.write_text(before + "\n".join([*lines, "", END]) + after)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    rewrite()

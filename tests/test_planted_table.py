"""The table of planted bugs in kernels/emulator/README.md is the tests' own."""

from __future__ import annotations

import re

import planted_table
import pytest

from cnnops.cuda import emulate

if emulate.available() is not None:
    pytest.skip(f"kernels cannot be emulated: {emulate.available()}", allow_module_level=True)


def test_every_planted_bug_has_its_row_in_the_readme() -> None:
    rows, bugs = planted_table.rows_of_readme(), list(planted_table.bugs())
    wrong = [f"no bug of the tests: {entry}" for entry in set(rows) - {bug.entry for bug in bugs}]
    for bug in bugs:
        if not re.search(bug.pattern, rows.get(bug.entry, "")):
            wrong.append(
                f"{bug.entry}: expected {bug.pattern}, got {rows.get(bug.entry, 'no row')}"
            )
    assert not wrong, "\n".join([*wrong, f"run: {planted_table.COMMAND}"])


def test_the_reports_are_those_of_now() -> None:
    """For one bug of each file; the tests of the emulator run them all."""
    rows = planted_table.rows_of_readme()
    first = {bug.file: bug for bug in reversed(list(planted_table.bugs()))}
    for bug in first.values():
        assert re.sub(r"\d+", "n", planted_table.report(bug)) == re.sub(
            r"\d+", "n", rows[bug.entry]
        )

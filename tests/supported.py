"""The table of docs/supported.md: ``python -m tests.supported`` rewrites it.

Nothing of it is typed by hand. Every row of `cases` is computed once, forward and backward, while the
functions of `cnnops.functional` and the operations that they choose are watched: so the table tells for each
function how many rows hold it to PyTorch, in which types and layouts, and from the registry what computes it
in each engine.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))

from cases import ALL, CASES, Case, run

import cnnops
import cnnops.functional as C
from cnnops import registry, tuned

PAGE = Path(__file__).parent.parent / "docs/supported.md"
COMMAND = "python -m tests.supported"
BEGIN = f"<!-- written by {COMMAND} -->"
END = "<!-- end -->"


@dataclass
class Support:
    """What the rows of one family of functions show: conv1d, conv2d and conv3d are one."""

    functions: set[str] = field(default_factory=set)
    rows: int = 0
    dtypes: set[torch.dtype] = field(default_factory=set)
    layouts: set[str] = field(default_factory=set)
    ops: set[str] = field(default_factory=set)

    def modules(self, engine: str) -> list[str]:
        """The modules that an engine has for its operations, in the order of the registry."""
        rows = [row for row in registry.ROWS if engine in row.engines and row.op in self.ops]
        return list(dict.fromkeys(row.module for row in rows))


@contextmanager
def watched() -> Iterator[list[str]]:
    """Within the block the names of functions of `cnnops.functional` that are called join the list."""
    called: list[str] = []
    true = {name: getattr(C, name) for name in C.__all__}

    def watching(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            called.append(name)
            return function(*args, **kwargs)

        return call

    try:
        for name, function in true.items():
            setattr(C, name, watching(name, function))
        yield called
    finally:
        for name, function in true.items():
            setattr(C, name, function)


def family(function: str) -> str:
    """The name that conv1d and conv2d share, and batch_norm and batch_norm_act."""
    return re.sub(r"([123]d|_act)$", "", function)


def supported() -> dict[str, Support]:
    """Families in the order of `cnnops.functional.__all__`, with what the rows show of them."""
    found = {family(name): Support() for name in C.__all__}
    for case in CASES:
        with watched() as called:
            choices = cnnops.explain(lambda case=case: run(case.ours, case.tensors(torch.float32)))
        name = called[0] if called else _functional_name(case)
        entry = found[family(name)]
        entry.functions.add(name)
        entry.rows += 1
        entry.dtypes |= set(case.dtypes)
        entry.layouts.add(case.layout)
        entry.ops |= {choice.op for choice in choices}
    return found


def _functional_name(case: Case) -> str:
    """The function of a row that goes beyond torch's arguments and so calls `cnnops.ops`."""
    return f"conv{len(case.x) - 2}d"


def table() -> list[str]:
    lines = [
        "| functions | rows | types | layouts | on a GPU | on a CPU |",
        "| --- | --: | --- | --: | --- | --- |",
    ]
    for kind, entry in supported().items():
        functions = " ".join(f"`{name}`" for name in C.__all__ if family(name) == kind)
        types = "all four" if entry.dtypes == set(ALL) else _types(entry.dtypes)
        gpu, cpu = (
            ", ".join(f"`{name.rpartition('.')[2]}`" for name in entry.modules(engine))
            for engine in ("cuda", "cpu")
        )
        lines.append(
            f"| {functions} | {entry.rows} | {types} | {len(entry.layouts)} | {gpu} | {cpu} |"
        )
    return lines


def _types(dtypes: set[torch.dtype]) -> str:
    return ", ".join(sorted(str(d).removeprefix("torch.") for d in dtypes))


def table_of_page() -> list[str]:
    text = PAGE.read_text()
    assert BEGIN in text and END in text, f"{PAGE.name} has no table: {COMMAND}"
    return text.partition(BEGIN)[2].partition(END)[0].strip().splitlines()


def rewrite() -> None:
    before, _, rest = PAGE.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    PAGE.write_text(before + "\n".join([BEGIN, "", *table(), "", END]) + after)


if __name__ == "__main__":
    with tuned.only(), cnnops.policy("own"), cnnops.fallback("error"):
        rewrite()

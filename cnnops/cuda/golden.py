"""Which wrappers of `kernels/ptx*.cuh` have been compared with a GPU, and what came of it.

The emulator stands in for instructions that only a GPU has. Whether its bodies are right is decided by
golden vectors: `python -m tests.golden record` runs a micro-kernel for each wrapper on a GPU and writes what
it found to `kernels/golden.json`, which travels with the kernels. This module reads that file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cnnops.cuda.kernel import kernels_dir

GOLDEN_FILE = kernels_dir() / "golden.json"
NOT_YET = "not yet compared with hardware"

# `DEVICE float to_float(half_t v) {`, also behind `template <…>`; constants and methods are no wrappers.
_WRAPPER = re.compile(
    r"^(?:template\s*<[^;{]*?>\s*)?DEVICE\s+(?!constexpr)[\w:<>*&\s]*?(\w+)\(", re.MULTILINE
)


def wrappers() -> list[str]:
    """The names of all functions in `kernels/ptx*.cuh`, file by file in their order."""
    files = sorted(kernels_dir().glob("ptx*.cuh"))
    names = [name for file in files for name in _WRAPPER.findall(file.read_text())]
    return list(dict.fromkeys(name for name in names if not name.startswith("emulator_")))


def _items(path: Path) -> dict[str, dict[str, Any]]:
    return dict(json.loads(path.read_text())["items"]) if path.is_file() else {}


def status(path: Path | None = None) -> dict[str, str]:
    """For every wrapper what is known of it: not yet compared, agrees with a GPU, differs or failed there.

    A wrapper agrees when all of the items that need it have been recorded and none differs. `path` names
    another summary than `kernels/golden.json`.
    """
    items = _items(path or GOLDEN_FILE)
    found = {}
    for wrapper in wrappers():
        mine = {name: item for name, item in items.items() if wrapper in item["wrappers"]}
        recorded = [item for item in mine.values() if item["state"] != "missing"]
        differ = [name for name, item in mine.items() if item["state"] == "differs"]
        failed = [name for name, item in mine.items() if item["state"] == "failed"]
        if differ:
            text = f"differs from {_where(mine[differ[0]])}: {', '.join(differ)}"
        elif failed:
            text = f"failed on {_where(mine[failed[0]])}: {', '.join(failed)}"
        elif recorded and len(recorded) == len(mine):
            text = f"agrees with {', '.join(sorted({_where(item) for item in recorded}))}"
        else:
            text = NOT_YET
        found[wrapper] = text
    return found


def _where(item: Mapping[str, Any]) -> str:
    return f"{item['gpu']} (driver {item['driver']})"


def summary_of(
    results: Sequence[Mapping[str, Any]], wrappers: Mapping[str, Sequence[str]], former: Path | None
) -> str:
    """The text of `golden.json`: what `former` says, overwritten by the results of a recording.

    `results` are those of `tests.golden.record.run_all`; `wrappers` names for every item what it pins down.
    """
    items = _items(former) if former else {}
    for name, functions in wrappers.items():
        items.setdefault(name, {"state": "missing"})
        items[name]["wrappers"] = list(functions)
    for result in results:
        item = items[result["item"]]
        if "failed" in result:
            item |= {
                "state": "failed",
                "why": result["failed"],
                "gpu": "GPU",
                "driver": "unknown",
            }
        else:
            wrong = max(
                result.get(against, {}).get("wrong", 0) for against in ("expected", "emulator")
            )
            item |= {"state": "differs" if wrong else "agrees", "wrong": wrong}
        item |= {
            key: result["machine"][key]
            for key in ("gpu", "driver", "date", "commit")
            if "machine" in result
        }
    known = {name: items[name] for name in wrappers}
    return json.dumps({"schema": 1, "items": known}, indent=1) + "\n"

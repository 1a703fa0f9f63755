"""The command line of the golden vectors; see the package."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from cnnops.cuda import jit
from cnnops.cuda.golden import GOLDEN_FILE, NOT_YET, status, summary_of

from . import record
from .items import ITEMS
from .vectors import FOLDER, load


def _list() -> int:
    for name, item in ITEMS.items():
        path = FOLDER / f"{name}.npz"
        where = load(path).machine if path.is_file() else None
        text = f"{where['gpu']}, {where['date']}" if where else "not recorded"
        print(f"{name:<34}sm_{item.arch:<5}{text}")
    print("\nwrapper" + " " * 27 + "compared with hardware")
    for wrapper, text in status().items():
        print(f"{wrapper:<34}{text}")
    return 0


def _words(result: record.Result, compared: str) -> str:
    return str(result.get(compared, {}).get("text", "not compared"))


def _record(out: Path | None, names: list[str]) -> int:
    reason = jit.unavailable()
    if reason is not None:
        print(f"recording needs a GPU: {reason}", file=sys.stderr)
        return 2
    start, where = time.perf_counter(), record.machine()
    folder = out / "vectors" if out else FOLDER
    chosen = names or list(ITEMS)
    runnable = [name for name in chosen if record.has(ITEMS[name], where["arch"])]
    print(
        f"{where['gpu']}, driver {where['driver']}, NVRTC {where['nvrtc']}: {len(runnable)} items",
        flush=True,
    )

    def tell(result: record.Result) -> None:
        text = result.get("failed") or _words(result, "expected")
        print(f"  {result['item']:<34}{text}", flush=True)

    results = record.run_all(runnable, folder, tell)
    # ---- the table ----
    failed = [r for r in results if "failed" in r]
    differ = [
        (r["item"], compared, r[compared]["text"])
        for r in results
        for compared in ("expected", "emulator")
        if r.get(compared, {}).get("wrong")
    ]
    print(f"\n{'item':<34}{'hardware against':<18}difference")
    for name, compared, text in differ:
        print(f"{name:<34}{compared:<18}{text}")
    for result in failed:
        print(f"{result['item']:<34}{'-':<18}failed: {result['failed']}")
    for name in chosen:
        if name not in runnable:
            print(
                f"{name:<34}{'-':<18}not run: needs sm_{ITEMS[name].arch}, this is sm_{where['arch']}"
            )
    agree = len(results) - len(failed) - len({name for name, *_ in differ})
    print(
        f"{agree} of {len(results)} items agree, {len(failed)} failed, "
        f"{time.perf_counter() - start:.0f} s; vectors in {folder}"
    )
    # ---- the summary ----
    wrappers = {name: ITEMS[name].wrappers for name in ITEMS}
    target = out / GOLDEN_FILE.name if out else GOLDEN_FILE
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(summary_of(results, wrappers, target if target.is_file() else None))
    for wrapper, text in status(target).items():
        if text != NOT_YET:
            print(f"  {wrapper:<34}{text}")
    return 1 if failed or differ else 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.golden", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="the items, and whether each has been recorded")
    recorder = commands.add_parser(
        "record", help="run the items on this machine's GPU and keep what came out"
    )
    recorder.add_argument(
        "--out", type=Path, help="write there instead of tests/golden and kernels"
    )
    worker = commands.add_parser("work", help="for `record` alone")
    worker.add_argument("--out", type=Path, required=True)
    for command in (recorder, worker):
        command.add_argument("items", nargs="*", metavar="ITEM", help="all, unless named")
    options = parser.parse_args()
    if options.command == "list":
        return _list()
    unknown = [name for name in options.items if name not in ITEMS]
    if unknown:
        parser.error(f"expected items of `python -m tests.golden list`, got {', '.join(unknown)}")
    if options.command == "work":
        return record.work(options.items, options.out)
    return _record(options.out, options.items)


if __name__ == "__main__":
    sys.exit(main())

"""What `cnnops.tune` has measured: tables of problems and the kernels that were fastest at them.

A table belongs to one device model and one state of the kernels, whose digest it carries. Three places are
looked at when the first problem of an engine comes up, and never before:

    CNNOPS_TUNE_FILE            one file, or several joined by ``os.pathsep``
    <cache directory>/tuned/    what `cnnops.tune` wrote on this machine
    cnnops/tables/              what the package ships

The first table that knows a problem wins.

A problem is one entry's if operation, sizes, dtype and layouts are the same. If only the batch differs, the
entry of the nearest batch (by ratio, at most `NEAR`) stands in. A file that is damaged, or was measured on
another device or with other kernels, is passed over with one warning.

Looked up are decisions that are then kept: a row by `registry.choose`, a tile by a launcher's plan. Both keep
them by `cached`, which forgets when the tables change. A call that was seen before looks nothing up.
"""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor

from cnnops import system
from cnnops.shapes import LayerShape, Shape

Header = dict[str, Any]
Axes = Sequence[int]
P = ParamSpec("P")
R = TypeVar("R", covariant=True)

SCHEMA = 1
NEAR = 8
"""Batches of up to this many times, or this part of, a measured one share its entry."""
CLEARLY = 0.97
"""A candidate takes the place of one before it if it needs at most this part of its time."""


# ---- keys ------------------------------------------------------------------------------------------------


_USUAL = {"stride": 1, "padding": 0, "dilation": 1}


def problem(shape: Shape) -> str:
    """The sizes as text, batch first, without what is as usual: "N=32 C=64 K=64 spatial=56x56 kernel=3x3"."""
    parts = [f"N={shape.N}"]
    usual = 0 if isinstance(shape, LayerShape) else len(shape.spatial)
    for field in fields(shape):
        value = getattr(shape, field.name)
        text = _text(value)
        of_batch = field.name in (
            "N",
            "outer",
        )  # a layer's rows are its batch, however they are counted
        if (
            not of_batch
            and value != field.default
            and text != _text((_USUAL.get(field.name),) * usual)
        ):
            parts.append(f"{field.name}={text}")
    return " ".join(parts)


def _text(value: Any) -> str:
    """A size as 3 or 3x3, padding as 1x1 or, where the two sides of an axis differ, 0:1x1."""
    if not isinstance(value, tuple):
        return str(value)
    pairs = [v if isinstance(v, tuple) else (v,) for v in value]
    return "x".join(":".join(map(str, v if len(set(v)) > 1 else v[:1])) for v in pairs)


def layout(sizes: Sequence[Axes], strides: Sequence[Axes], words: Iterable[str] = ()) -> str:
    """How a call's tensors lie, and what else tells two calls of one problem apart (an activation).

    Sizes and strides are those of the tensors that have more than one axis, in the order of the arguments:
    "3 channels_last", or one by one where they differ, "channels_last contiguous channels_last". A tensor
    that is both (one channel, or one place) counts as what the others are.
    """
    kinds = [_kind(*pair) for pair in zip(sizes, strides, strict=True)]
    for kind in ("contiguous", "channels_last"):
        if all(k in (kind, "both") for k in kinds):
            kinds = [f"{len(kinds)} {kind}"]
            break
    else:
        kinds = ["contiguous" if k == "both" else k for k in kinds]
    return " ".join([*kinds, *words])


def _kind(size: Axes, strides: Axes) -> str:
    axes = range(len(size))
    contiguous = _dense(size, strides, axes)
    channels_last = len(size) > 2 and _dense(size, strides, [0, *axes[2:], 1])
    if contiguous:
        return "both" if channels_last else "contiguous"
    return "channels_last" if channels_last else "strided"


def _dense(size: Axes, strides: Axes, order: Sequence[int]) -> bool:
    """Whether the elements lie side by side with the axes in this order, slowest first."""
    step = 1
    for axis in reversed(order):
        if size[axis] != 1:
            if strides[axis] != step:
                return False
            step *= size[axis]
    return True


def layout_of(arguments: Sequence[Any]) -> str:
    """`layout` of the arguments that a kernel's function gets."""
    tensors = [a for a in arguments if isinstance(a, Tensor) and a.dim() > 1]
    words = [a for a in arguments if isinstance(a, str) and a != "none"]
    return layout([t.shape for t in tensors], [t.stride() for t in tensors], words)


def candidate(algorithm: str, variant: str = "") -> str:
    """The name of one way to compute a problem: "conv_im2col", "conv_direct:128x64x8"."""
    return f"{algorithm}:{variant}" if variant else algorithm


def aten_candidate(op: str, engine: str, dtype: torch.dtype, search: bool | None = None) -> str:
    """The name of PyTorch's own op under the flags in force, which decide what cuDNN does and how fast.

    `search` stands in for ``torch.backends.cudnn.benchmark`` where given.
    """
    if engine != "cuda" or op not in ("conv_fprop", "conv_dgrad", "conv_wgrad"):
        return "aten"
    cudnn = torch.backends.cudnn
    flags = ["benchmark"] if (cudnn.benchmark if search is None else search) else []
    if dtype == torch.float32 and cudnn.allow_tf32:
        flags.append("tf32")
    return candidate("aten", "+".join(flags))


# ---- tables ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """One measured problem: the winner, and the median seconds of every candidate, in order of preference."""

    op: str
    problem: str
    dtype: str
    layout: str
    algorithm: str
    variant: str
    seconds: Mapping[str, float]
    date: str

    @property
    def key(self) -> tuple[str, str, str, str]:
        return self.op, self.problem, self.dtype, self.layout

    def best(self, allowed: Callable[[str], bool]) -> tuple[str, str] | None:
        """Algorithm and variant of the winner, or, if that is not allowed, of the fastest that is."""
        name: str | None = candidate(self.algorithm, self.variant)
        if not allowed(name or ""):
            name = fastest({n: s for n, s in self.seconds.items() if allowed(n)})
        if name is None:
            return None
        algorithm, _, variant = name.partition(":")
        return algorithm, variant

    def by_algorithm(self) -> str:
        """The best time of every algorithm: "conv_im2col 0.12 ms, conv_direct 0.31 ms"."""
        best: dict[str, float] = {}
        for name, seconds in sorted(self.seconds.items(), key=lambda item: item[1]):
            best.setdefault(name.partition(":")[0], seconds)
        return ", ".join(f"{name} {milliseconds(s)}" for name, s in best.items())


def milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms"


def fastest(seconds: Mapping[str, float]) -> str | None:
    """The candidate to take: a later one only where it is clearly faster, or noise would decide."""
    best: str | None = None
    for name, time in seconds.items():
        if best is None or time < CLEARLY * seconds[best]:
            best = name
    return best


@dataclass(frozen=True)
class Table:
    """A file's content: where it was measured (engine, device, digest, versions), and its entries."""

    header: Header
    entries: tuple[Entry, ...]


_TEXTS = ("op", "problem", "dtype", "layout", "algorithm", "variant", "date")


def read(path: Path) -> Table:
    """The table in `path`. Raises OSError, or ValueError if the file is no table."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or content.get("schema") != SCHEMA:
            raise ValueError(f"expected a table of schema {SCHEMA}")
        header = {name: value for name, value in content.items() if name != "entries"}
        if not all(isinstance(header[name], str) for name in ("engine", "device", "digest")):
            raise ValueError("expected texts for engine, device and digest")
        return Table(header, tuple(_entry(row) for row in content["entries"]))
    except (AttributeError, KeyError, TypeError, RecursionError, ValueError) as error:
        raise ValueError(f"{path}: no table of tuned kernels ({error})") from error


def _entry(row: Any) -> Entry:
    entry = Entry(**row)
    if not all(isinstance(getattr(entry, name), str) for name in _TEXTS):
        raise ValueError(f"expected texts for {', '.join(_TEXTS)}")
    if not re.match(r"N=\d+ ", entry.problem):
        raise ValueError(f"expected a problem that begins with its batch, got {entry.problem!r}")
    for name, seconds in entry.seconds.items():
        if type(seconds) not in (int, float) or not 0 <= seconds < math.inf:
            raise ValueError(f"expected the seconds of {name}, got {seconds!r}")
    return entry


def _write(path: Path, table: Table) -> None:
    """Replace `path` in one step: nobody ever reads half of a file."""
    rows = [asdict(entry) for entry in sorted(table.entries, key=lambda e: e.key)]
    lines = ",\n  ".join(json.dumps(row) for row in rows)
    header = json.dumps(table.header, indent=1).removesuffix("\n}")
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with open(handle, "w", encoding="utf-8") as file:
            file.write(f'{header},\n "entries": [\n  {lines}\n ]\n}}\n')
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def _joined(tables: Sequence[Table]) -> Table:
    """Of each problem the newest entry; of two from the same second, that of the later table."""
    found: dict[tuple[str, str, str, str], Entry] = {}
    for table in tables:
        for entry in table.entries:
            known = found.get(entry.key)
            if known is None or entry.date >= known.date:
                found[entry.key] = entry
    return Table(tables[-1].header, tuple(found.values()))


def _belongs(header: Header) -> tuple[str, str, str]:
    return header["engine"], header["device"], header["digest"]


def _whose(header: Header) -> str:
    return f"a table of {header['device']} and kernels {header['digest'][:8]}"


def merge(files: Iterable[str | os.PathLike[str]], into: str | os.PathLike[str]) -> None:
    """Write the entries of all `files` to `into`, for each problem the newest. `into` may be one of them, and
    is replaced.

    Raises ValueError for a file that is no table, or if they were measured on different devices or with
    different kernels; OSError for one that cannot be read or written.
    """
    tables = {file: read(Path(file)) for file in files}
    if not tables:
        raise ValueError("files: expected at least one table, got none")
    first = next(iter(tables.values()))
    for file, table in tables.items():
        if _belongs(table.header) != _belongs(first.header):
            raise ValueError(f"{file}: expected {_whose(first.header)}, got {_whose(table.header)}")
    _write(Path(into), _joined(list(tables.values())))


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One writer at a time. A file system without locks leaves it at that the last one wins."""
    import fcntl

    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            pass
        yield


def save(entries: Sequence[Entry], engine: str, device: str, path: Path | None = None) -> Path:
    """Add the entries to the table of a device, or to that in `path`; from then on they are in force.

    Any number of processes may do so at once. Entries for other kernels or devices that `path` holds are
    dropped. Returns where the table is. Raises OSError where it cannot be written.
    """
    header: Header = {
        "schema": SCHEMA,
        "engine": _FAMILY[engine],
        "device": device,
        "digest": digest(engine),
    }
    header |= _versions(engine)
    new = Table(header, tuple(entries))
    path = path or _folder() / f"{_slug(device)}-{header['digest'][:8]}.json"
    with _locked(path.with_name(f".{path.name}.lock")):
        tables = [new]
        try:
            former = read(path)
            if _belongs(former.header) == _belongs(header):
                tables.insert(0, former)
        except (OSError, ValueError):
            pass  # not there, or of no use
        _write(path, _joined(tables))
    forget()
    return path


# ---- whose table -----------------------------------------------------------------------------------------

_FAMILY = {"cuda": "cuda", "emulate": "cuda", "cpu": "cpu"}
"""The emulator runs what the GPU here would run, so they share a table."""


def device_name(engine: str, index: int = 0) -> str:
    """The device model that an engine's tables are for; a CPU with the number of threads that share a task.

    Processes with GPUs of different models use the table of the first, whose name this is, for all.
    """
    if _FAMILY[engine] == "cpu":
        return f"{system.cpu_model()}, {torch.get_num_threads()} threads"
    if _assumed is not None:
        return _assumed
    return torch.cuda.get_device_name(index) if torch.cuda.is_available() else "emulator"


@contextmanager
def assuming(gpu: str) -> Iterator[None]:
    """Within the block, tables are looked up as on a GPU of this name."""
    global _assumed
    former, _assumed = _assumed, gpu
    forget()
    try:
        yield
    finally:
        _assumed = former
        forget()


def gpus_known() -> list[str]:
    """The GPUs that there are tables of, for the kernels as they are."""
    found: set[str] = set()
    for path in chain.from_iterable(paths for _, paths in _places()):
        with suppress(OSError, ValueError):
            header = read(path).header
            if (header["engine"], header["digest"]) == ("cuda", digest("cuda")):
                found.add(header["device"])
    return sorted(found)


def _slug(device: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


@lru_cache(None)
def digest(engine: str) -> str:
    """SHA-256 of an engine's kernels and of what launches them: measurements of others say nothing."""
    from cnnops.cache import digest_of
    from cnnops.cuda.kernel import kernels_dir

    package = Path(__file__).parent
    if _FAMILY[engine] == "cpu":
        return digest_of(files=sorted((package / "cpu").glob("*.py")))
    kernels = sorted(kernels_dir().glob("*.cu*"))
    launchers = [package / "cuda" / f"{kernel.stem}.py" for kernel in kernels]
    return digest_of(files=[*kernels, *(path for path in launchers if path.is_file())])


def _versions(engine: str) -> Header:
    cuda = _FAMILY[engine] == "cuda" and torch.cuda.is_available()
    return {
        "driver": _driver() if cuda else None,
        "cuda": torch.version.cuda,
        "torch": str(torch.__version__),
        "cudnn": torch.backends.cudnn.version() if cuda else None,
    }


def _driver() -> str | None:
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return None
    found = re.search(r"\b\d+\.\d+(?:\.\d+)?\b", text)
    return found[0] if found else None


# ---- looking up ------------------------------------------------------------------------------------------

_Batches = dict[int, Entry]
_Known = dict[tuple[str, str, str], dict[str, _Batches]]
"""By operation, sizes without the batch, and dtype; then by layout; then by batch."""

_lock = threading.RLock()
_tables: dict[str, _Known] = {}
_only: tuple[Path, ...] | None = None
_assumed: str | None = None
_forgetters: list[Callable[[], None]] = []


class Cached(Protocol[P, R]):
    """A function that remembers its results."""

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R: ...

    def cache_clear(self) -> None: ...


def cached(function: Callable[P, R]) -> Cached[P, R]:
    """`function` remembered by its arguments until the tables change."""
    remembered: Any = lru_cache(4096)(function)
    _forgetters.append(remembered.cache_clear)
    return remembered  # type: ignore[no-any-return]


def when_changed(function: Callable[[], None]) -> None:
    """Have `function` called whenever the tables change."""
    _forgetters.append(function)


def forget() -> None:
    """Read the tables anew when the next problem comes up."""
    with _lock:
        _tables.clear()
    for clear in _forgetters:
        clear()


@contextmanager
def only(*files: str | os.PathLike[str]) -> Iterator[None]:
    """Within the block, these files are all the tables there are; without an argument there are none."""
    global _only
    former, _only = _only, tuple(Path(file) for file in files)
    forget()
    try:
        yield
    finally:
        _only = former
        forget()


def _folder() -> Path:
    from cnnops.cache import cache_dir

    return cache_dir() / "tuned"


def _places() -> Iterator[tuple[bool, Sequence[Path]]]:
    """Where to look, first things first; True beside files that somebody named."""
    if _only is not None:
        yield True, _only
        return
    named = os.environ.get("CNNOPS_TUNE_FILE", "")
    yield True, [Path(name) for name in named.split(os.pathsep) if name]
    try:
        yield False, sorted(_folder().glob("*.json"))
    except OSError:  # nowhere to keep anything, so nothing was kept
        pass
    yield False, sorted((Path(__file__).parent / "tables").glob("*.json"))


@lru_cache(None)
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=2)


def _usable(engine: str) -> Iterator[Table]:
    """The tables for this device and the kernels as they are; a word about files that are not what they
    should be. Other devices' tables may lie beside: in a folder, or in a list that holds one for this device.
    """
    device = device_name(engine)
    for named, paths in _places():
        found, misfit = False, ""
        for path in paths:
            try:
                table = read(path)
            except (OSError, ValueError) as error:
                _warn_once(f"{error}: ignored")
                continue
            theirs = table.header
            if theirs["engine"] != _FAMILY[engine]:
                continue
            if theirs["device"] != device:
                if named:
                    misfit = f"{path}: measured on {theirs['device']}, this is {device}: ignored"
            elif theirs["digest"] != digest(engine):
                misfit = f"{path}: measured with other kernels: ignored (cnnops tune measures anew)"
            else:
                found = True
                yield table
        if misfit and not found:
            _warn_once(misfit)


def _known(engine: str) -> _Known:
    """The entries in force for an engine, read when they are first asked for."""
    family = _FAMILY[engine]
    with _lock:
        if family not in _tables:
            known: _Known = {}
            for table in _usable(engine):
                for entry in table.entries:
                    batch, sizes = _split(entry.problem)
                    layouts = known.setdefault((entry.op, sizes, entry.dtype), {})
                    layouts.setdefault(entry.layout, {}).setdefault(batch, entry)
            _tables[family] = known
        return _tables[family]


def _split(problem: str) -> tuple[int, str]:
    """The batch, and the other sizes."""
    batch, _, sizes = problem.partition(" ")
    return int(batch.removeprefix("N=")), sizes


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def layouts(op: str, engine: str, shape: Shape, dtype: torch.dtype) -> tuple[str, ...]:
    """The layouts that a problem was measured in, at this batch or another; () is the usual answer."""
    known = _known(engine) if engine in _FAMILY else {}
    if not known:
        return ()
    return tuple(known.get((op, _split(problem(shape))[1], dtype_name(dtype)), ()))


def find(op: str, engine: str, shape: Shape, dtype: torch.dtype, layout: str) -> Entry | None:
    """The entry for a problem, or for the same one with the nearest batch within `NEAR`; None if unknown."""
    known = _known(engine)
    if not known:
        return None
    batch, sizes = _split(problem(shape))
    batches = known.get((op, sizes, dtype_name(dtype)), {}).get(layout, {})
    nearest = min(batches, key=lambda n: (_ratio(n, batch), n), default=0)
    return batches[nearest] if batches and _ratio(nearest, batch) <= NEAR else None


def _ratio(a: int, b: int) -> float:
    return max(a, b) / max(1, min(a, b))


def variant(op: str, algorithm: str, shape: Shape, dtype: torch.dtype, layout: str) -> str:
    """The variant of a CUDA launcher's that was the fastest at a problem; "" leaves the choice to it."""
    entry = find(op, "cuda", shape, dtype, layout)
    best = entry and entry.best(lambda name: name.partition(":")[0] == algorithm)
    return best[1] if best else ""

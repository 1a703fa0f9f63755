"""Compile a kernel file into a library of the CPU's, for the emulator: g++, a disk cache, and what it wrote.

A `.cu` file is preprocessed with `kernels/emulator/cuda_on_cpu.h` in front, trampolines are added for its
entries, and the assembly gets room between shared variables; what results is a shared library that calls the
emulator's runtime library at every load, store, barrier and shuffle. Nothing but g++ and binutils is needed;
clang, named by the environment's CXX, serves too (tests/test_emulator_clang.py tells what it misses).
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import struct
import subprocess
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from cnnops.cache import DiskCache, digest_of
from cnnops.cuda.cache import CompileError, sources
from cnnops.cuda.kernel import Kernel, kernels_dir

OLDEST = {"GCC": 11, "clang": 14}
MAX_SHARED = 227 << 10
# Room behind each shared variable in which no other one lies, so that running over its end is seen.
SHARED_GAP = 1024
ANCHOR = "emulator_anchor"  # the shared variable whose address tells those of the others
TRAMPOLINES = "trampolines"  # the file that generated lines claim to be from

_libraries = DiskCache("emulator", ".so")


def stats() -> dict[str, float]:
    """Libraries compiled, libraries found on disk, seconds spent compiling, since this process started."""
    return _libraries.stats()


# ---- the compiler ----------------------------------------------------------------------------------------


@lru_cache(None)
def compiler() -> tuple[str, str]:
    """Path and version of g++, or of what CXX names: "12.2.0", "clang 14.0.6".

    Raises RuntimeError with what to do when there is none that serves.
    """
    if platform.system() != "Linux" or platform.machine() not in ("x86_64", "aarch64"):
        raise RuntimeError(
            f"expected Linux on x86_64 or aarch64, got {platform.system()} on {platform.machine()}"
        )
    named = os.environ.get("CXX", "g++")
    path = shutil.which(named)
    if path is None:
        raise RuntimeError(f"{named} not found: apt install g++")
    probe = subprocess.run(
        [path, "-E", "-P", "-x", "c++", "-"],
        input="__GNUC__ __GNUC_MINOR__ __GNUC_PATCHLEVEL__\n"
        "__clang__ __clang_major__ __clang_minor__ __clang_patchlevel__",
        capture_output=True,
        text=True,
    )
    gcc, _, clang = probe.stdout.strip().partition("\n")
    is_clang = not clang.startswith("__clang__")
    words = clang.split()[1:] if is_clang else gcc.split()
    oldest = OLDEST["clang" if is_clang else "GCC"]
    if probe.returncode or len(words) != 3 or not words[0].isdigit() or int(words[0]) < oldest:
        raise RuntimeError(
            f"{named}: expected GCC {OLDEST['GCC']} or newer, or clang {OLDEST['clang']} or newer "
            "(apt install g++, or set CXX)"
        )
    return path, ("clang " if is_clang else "") + ".".join(words)


def _is_clang() -> bool:
    return compiler()[1].startswith("clang")


def available() -> str | None:
    """None where kernels can be emulated, else the reason why not."""
    try:
        compiler()
    except RuntimeError as error:
        return str(error)
    return None


@lru_cache(None)
def machine_flags() -> tuple[str, ...]:
    """Code for one of two machine levels, not for this very CPU, so that machines agree in their results."""
    if platform.machine() != "x86_64":
        return ()
    needed = {"avx2", "bmi1", "bmi2", "f16c", "fma", "movbe", "abm"}
    try:
        listed = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        listed = None
    flags = set(listed[1].split()) if listed else set()
    return ("-march=x86-64-v3",) if needed <= flags else ()


RUNTIME_FLAGS = (
    "-std=c++17", "-O2", "-g1", "-fPIC", "-shared", "-fvisibility=hidden", "-fno-strict-aliasing",
)  # fmt: skip

KERNEL_FLAGS = (
    "-std=c++17", "-O1", "-fPIC", "-fno-plt",
    "-fno-strict-aliasing",  # kernels move 16 bytes of anything through reinterpret_cast
    "-ffp-contract=fast",  # as NVRTC's -fmad=true
    "-fno-exceptions", "-fno-rtti", "-fsigned-char",
    # Every load and store and every undefined operation calls the runtime; no libtsan or libubsan is linked.
    "-fsanitize=thread",
    "-fsanitize=alignment,shift,signed-integer-overflow,integer-divide-by-zero,return,unreachable",
    "-fstack-clash-protection",  # no frame can step over a stack's guard zone
    # Lines for reports; version 4 because addr2line misreads version 5 as GCC 11 and 12 write it.
    "-g1", "-gdwarf-4",
    # Shared variables are thread_local: plain storage in this library alone, found by symbol.
    "-fvisibility=hidden",
    "-w",  # nobody would read the warnings of a compilation at run time
)  # fmt: skip

# By compiler: no calls at the begin and end of functions; indices checked against an array's type; loops that
# stay loops, since memcpy and memset call nothing; and thread_local variables that are no more than storage.
GCC_FLAGS = (
    "--param=tsan-instrument-func-entry-exit=0", "-fsanitize=bounds-strict",
    "-fno-tree-loop-distribute-patterns", "-fno-gnu-unique", "-fno-extern-tls-init", "-fno-section-anchors",
    "-fno-tree-sra",  # an access of several elements at once stays one
    "-fno-sanitize-recover=all",  # whoever reports does not return: less code around each check
    # Nobody asks where variables are, nor for columns, nor where a statement begins that is no instruction.
    "-fno-var-tracking", "-gno-statement-frontiers", "-gno-column-info",
    # Passes that take longer than the code that they make runs faster.
    "-fno-tree-pta", "-fno-thread-jumps", "-fno-guess-branch-probability", "-fira-region=one",
    "-fno-forward-propagate", "-fno-dse", "-fno-dce", "-fno-if-conversion", "-fno-if-conversion2",
    "-fno-compare-elim", "-fno-cprop-registers", "-fno-split-wide-types", "-fno-shrink-wrap",
    "-fno-combine-stack-adjustments", "-fno-reorder-blocks", "-fno-move-loop-invariants",
)  # fmt: skip
CLANG_FLAGS = (
    "-mllvm", "-tsan-instrument-func-entry-exit=0", "-mllvm", "-tsan-instrument-read-before-write=1",
    "-fsanitize=array-bounds", "-fno-builtin", "-fno-finite-loops",
)  # fmt: skip


def kernel_flags() -> list[str]:
    # A variable without a value is 0xFE bytes (GCC: -1.7e38 as a float) or 0xAA and 0xFF (clang: a NaN), not
    # what a register happened to hold.
    pattern = _is_clang() or int(compiler()[1].split(".")[0]) >= 12
    filled = ("-ftrivial-auto-var-init=pattern",) if pattern else ()
    return [*KERNEL_FLAGS, *(CLANG_FLAGS if _is_clang() else GCC_FLAGS), *machine_flags(), *filled]


def _run(arguments: list[str], what: str, text: str | None = None) -> str:
    done = subprocess.run(arguments, input=text, capture_output=True, text=True, errors="replace")
    if done.returncode:
        raise CompileError(f"{what}: {Path(arguments[0]).name} failed:\n{done.stderr.strip()}")
    return done.stdout


def _emulator_dir() -> Path:
    return kernels_dir() / "emulator"


# ---- the runtime library ---------------------------------------------------------------------------------


def runtime_library() -> Path:
    """The compiled runtime, `kernels/emulator/runtime.cpp`. Its SONAME is its name in the cache."""
    path, version = compiler()
    files = sorted(p for p in _emulator_dir().iterdir() if p.suffix in (".cpp", ".h"))
    flags = [*RUNTIME_FLAGS, *machine_flags()]
    name = f"runtime-{digest_of(flags, version, files=files)}"

    def build(target: Path) -> None:
        source = str(_emulator_dir() / "runtime.cpp")
        arguments = [path, *flags, f"-Wl,-soname,{name}.so", source, "-o", str(target)]
        _run(arguments, "the emulator's runtime library")

    return _libraries.entry(name, build)


# ---- compiling a kernel file -----------------------------------------------------------------------------

# Read in the preprocessed text, where macros and #if are gone and __launch_bounds__ and __cluster_dims__ have
# become attributes.
_NESTED = r"(?:[^()]|\((?:[^()]|\([^()]*\))*\))*"
_ENTRY = re.compile(
    r'extern\s+"C"\s+(?:void\s+'
    rf"|__attribute__\s*\(\(emulator_launch_bounds\s*\((?P<bounds>{_NESTED})\)\s*\)\)\s*"
    rf"|__attribute__\s*\(\(emulator_cluster_dims\s*\((?P<cluster>{_NESTED})\)\s*\)\)\s*"
    r")+(?P<name>\w+)\s*\("
)
_LINE_MARKER = re.compile(r"^#.*$", re.MULTILINE)
_DYNAMIC = re.compile(r"extern\s+thread_local\b[^;{}]*?(\w+)\s*\[\s*\]\s*;")
_SHARED_STORAGE = re.compile(r"^(?P<label>[\w.$]+:\n\s*\.zero\s+)(?P<bytes>\d+)$", re.MULTILINE)


def _trampolines(text: str) -> str:
    """C++ that makes each entry of the preprocessed `text` callable with an array of arguments."""
    export = '__attribute__((visibility("default"), no_sanitize("thread", "undefined")))'
    lines = [
        "",
        f'# 1 "{TRAMPOLINES}"',
        f"static thread_local char {ANCHOR};",
        'extern "C" {',
        f"{export} void* emulator_module_anchor() {{ return &{ANCHOR}; }}",
    ]
    for match in _ENTRY.finditer(_LINE_MARKER.sub("", text)):
        name, bounds, cluster = match["name"], match["bounds"] or "", match["cluster"] or ""
        lines += [
            f"{export} void emulator_call_{name}(void** a) {{ emulator_call(&{name}, a); }}",
            f'__attribute__((visibility("default"))) EmulatorSignature emulator_signature_{name}'
            f" = emulator_signature(&{name}, EmulatorBounds{{{bounds}}}, EmulatorClusterDims{{{cluster}}});",
        ]
    lines += ["}"]
    return "\n".join(lines) + "\n"


def _with_gap(storage: re.Match[str]) -> str:
    return f"{storage['label']}{int(storage['bytes']) + SHARED_GAP}"


def _with_shared_storage(assembly: str, dynamic: Sequence[str]) -> str:
    """Put a gap behind each shared variable, define the dynamic shared array under all its names, and let the
    runtime answer where they are: each block of a cluster has its own."""
    assembly = assembly.replace("__tls_get_addr", "emulator_shared_variable")
    parts = re.split(r"(?m)^(?=\s*\.(?:section|text|data|bss)\b)", assembly)
    for i, part in enumerate(parts):
        if re.match(r"\s*\.section\s+\.tbss", part):
            parts[i] = _SHARED_STORAGE.sub(_with_gap, part)
    if dynamic:
        parts.append('\n\t.section .tbss,"awT",@nobits\n\t.p2align 10\n')
        for name in dynamic:
            parts.append(f"\t.globl {name}\n\t.hidden {name}\n\t.type {name}, @object\n")
            parts.append(f"\t.size {name}, {MAX_SHARED}\n{name}:\n")
        parts.append(f"\t.zero {MAX_SHARED + SHARED_GAP}\n")
    return "".join(parts)


def _compile(kernel: Kernel, path: Path, runtime: Path) -> None:
    """Compile the file and constants of `kernel` to a shared library at `path`."""
    gxx, flags = compiler()[0], kernel_flags()
    what = f"{kernel.source} [{' '.join(d[2:] for d in kernel.defines)}]"
    header, source = _emulator_dir() / "cuda_on_cpu.h", kernels_dir() / kernel.source
    include = ["-include", str(header), f"-I{kernels_dir()}", "-x", "c++", str(source)]
    text = _run([gxx, "-E", *flags, *kernel.defines, *include], what)
    dynamic = sorted(set(_DYNAMIC.findall(text)))
    text += _trampolines(text)
    assembly = _run([gxx, "-S", *flags, "-x", "c++-cpp-output", "-", "-o", "-"], what, text)
    assembly = _with_shared_storage(assembly, dynamic)
    # A linker would spend most of its time on libstdc++ and libc. No kernel calls the first; of the other the
    # runtime brings what they call. libm is named for the versions of its symbols.
    link = ["-shared", "-nostdlib", "-x", "assembler", "-", "-x", "none"]
    link += [str(runtime), "-lm", "-lgcc", "-o", str(path)]
    if _is_clang():
        link += ["-Wl,--wrap=memcpy,--wrap=memset"]  # see memory.cpp
    _run([gxx, *link], what, assembly)


def _source_name(symbol: str) -> str:
    """`tile` from `_ZZ11conv_directE4tile`: the variable that a local static's mangled name ends in."""
    for match in re.finditer(r"(\d+)(?=[A-Za-z_])", symbol):
        name = symbol[match.end() : match.end() + int(match[0])]
        rest = symbol[match.end() + int(match[0]) :]
        if len(name) == int(match[0]) and re.fullmatch(r"(_\d+|__\d+_)?(\.\d+)?", rest):
            return name
    return symbol


def shared_variables(path: Path) -> list[tuple[str, int, int]]:
    """Name, offset and size of every shared variable, read from the library's ELF symbol table."""
    content = path.read_bytes()
    (sections,) = struct.unpack_from("<Q", content, 0x28)
    entry_bytes, count = struct.unpack_from("<HH", content, 0x3A)
    headers = [
        struct.unpack_from("<IIQQQQIIQQ", content, sections + i * entry_bytes) for i in range(count)
    ]
    found = []
    for _, kind, _, _, offset, size, link, _, _, _ in headers:
        if kind != 2:  # SHT_SYMTAB
            continue
        names = headers[link][4]
        for at in range(offset, offset + size, 24):
            name, info, _, section, value, length = struct.unpack_from("<IBBHQQ", content, at)
            if info & 15 == 6 and section:  # STT_TLS, defined
                symbol = content[names + name : content.index(b"\0", names + name)].decode()
                found.append((_source_name(symbol), value, length))
    return found


def kernel_library(
    source: str, constants: tuple[tuple[str, str | int], ...], runtime: Path
) -> Path:
    """The compiled ``kernels/<source>`` under `constants`, linked to the library `runtime`.

    Raises CompileError with file, constants and the compiler's output when g++ refuses the file.
    """
    path = kernels_dir() / source
    if not path.is_file():
        raise CompileError(f"{source}: expected a file in {kernels_dir()}, got none")
    files = sources(path, kernels_dir())
    digest = digest_of(constants, kernel_flags(), SHARED_GAP, runtime.name, files=files)
    kernel = Kernel(source, "", constants)
    return _libraries.entry(f"{path.stem}-{digest}", lambda built: _compile(kernel, built, runtime))


def places_of_each(path: Path, offsets: Sequence[int]) -> list[list[tuple[str, int]]]:
    """For each offset the (file, line) of the instruction and of the functions it was inlined into, innermost
    first. Empty lists where nothing is known of them."""
    tool = shutil.which("addr2line")
    if tool is None or not offsets:
        return [[] for _ in offsets]
    command = [tool, "-a", "-i", "-e", str(path), *map(hex, offsets)]
    text = subprocess.run(command, capture_output=True, text=True, errors="replace").stdout
    hidden = {TRAMPOLINES, *(file.name for file in _emulator_dir().iterdir())}
    found: list[list[tuple[str, int]]] = []
    for row in text.splitlines():
        file, _, line = row.split(" (")[0].rpartition(":")
        if row.startswith("0x") and not file:  # the address, ahead of its lines
            found.append([])
        elif found and line.isdigit() and Path(file).name not in hidden:
            found[-1].append((Path(file).name, int(line)))
    return found if len(found) == len(offsets) else [[] for _ in offsets]


def places(path: Path, offsets: Sequence[int]) -> list[tuple[str, int]]:
    """All of `places_of_each`, each place once."""
    return list(dict.fromkeys(place for each in places_of_each(path, offsets) for place in each))

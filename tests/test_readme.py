"""What the documents say is so: their Python runs, and what they name, quote, draw and count is there."""

from __future__ import annotations

import ast
import importlib.util
import json
import pkgutil
import re
import shlex
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import cnnops
from bench import report
from cnnops.__main__ import _parser

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [
    *(
        ROOT / name
        for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "kernels/README.md")
    ),
    *sorted((ROOT / "docs").rglob("*.md")),
]
README = (ROOT / "README.md").read_text()


def name_of(document: Path) -> str:
    return str(document.relative_to(ROOT))


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


PYTHON = [
    pytest.param(code, id=f"{name_of(document)}-{number}")
    for document in DOCUMENTS
    for number, code in enumerate(blocks(document.read_text(), "python"), 1)
    if not code.startswith("# cnnops/")  # a quotation; see test_quotations
]


@pytest.mark.parametrize("code", PYTHON)
def test_python_runs(code: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exec(compile(code, "document", "exec"), {"__name__": "document"})


def test_readme_is_short_and_has_an_example() -> None:
    assert len(README.splitlines()) <= 90
    assert min(len(code.splitlines()) for code in blocks(README, "python")) >= 5


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_quotations(document: Path) -> None:
    """A block that opens with a file's path quotes that file line by line; `…` marks what is left out."""
    for code in blocks(document.read_text(), r"\w+"):
        opening = re.match(r"(?://|#) ((?:kernels|cnnops|tests)/\S+)$", code.splitlines()[0])
        if opening is None:
            continue
        rest = (ROOT / opening[1]).read_text()
        for line in code.splitlines()[1:]:
            if line.strip() and "…" not in line:
                found = re.search(rf"^{re.escape(line)}$", rest, re.MULTILINE)
                assert found, (
                    f"{document.name} quotes {opening[1]}, which has no such line here: {line}"
                )
                rest = rest[found.end() :]


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_named_files_exist(document: Path) -> None:
    text = document.read_text()
    prose = re.sub(r"^```.*?^```|`[^`\n]*`", "", text, flags=re.MULTILINE | re.DOTALL)
    linked = re.findall(r"\]\(([^)#]+)[^)]*\)", prose)
    for target in linked:
        assert (document.parent / target).exists(), f"{document.name} links to {target}"
    quoted = re.findall(r"`((?:kernels|cnnops|tests|bench|docs)/[\w./]*)`", text)
    for target in quoted:
        assert (ROOT / target).exists(), f"{document.name} names {target}"


def test_named_objects_exist() -> None:
    """`cnnops.a.b` in backticks is a module of the package, or something in one."""
    text = "".join(document.read_text() for document in DOCUMENTS)
    for name in set(re.findall(r"`(cnnops(?:\.\w+)+)[`(]", text)):
        pkgutil.resolve_name(name)


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for document in DOCUMENTS:
        for target in re.findall(r"\bmake ([a-z]+)\b", document.read_text()):
            if (
                f"`make {target}" in document.read_text()
                or f"\nmake {target}" in document.read_text()
            ):
                assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_commands_parse() -> None:
    """Every `cnnops …` in a shell block or in backticks is one that the command line takes."""
    for document in DOCUMENTS:
        text = document.read_text()
        lines = re.findall(r"`cnnops( [a-z]+(?: [^`]+)?)`", text)
        for block in blocks(text, "sh"):
            lines += re.findall(r"(?:^|/|-m )cnnops( [a-z-][^#\n]*)", block, re.MULTILINE)
        for line in lines:
            words = [word for word in shlex.split(line) if word != "--help"]
            if len(words) == 1:  # the command's name alone, as prose has it
                with pytest.raises(SystemExit, match="^0$"):
                    parser = report._parser() if words[0] == "bench" else _parser(words[0])
                    parser.parse_args(["--help"] if words[0] == "bench" else [*words, "--help"])
            elif words[0] == "bench":
                report._parser().parse_args(words[1:])
            else:
                _parser(words[0]).parse_args(words)


def test_every_dependency_has_a_reason() -> None:
    program = (
        "import setuptools, json\n"
        "setuptools.setup = lambda **k: print(json.dumps([k['install_requires'], k['extras_require']]))\n"
        "exec(compile(open('setup.py').read(), 'setup.py', 'exec'), {'__file__': 'setup.py'})\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    base, extras = json.loads(done.stdout)
    needed = [*base, *(line for lines in extras.values() for line in lines)]
    reasons = (ROOT / "docs/guide/install.md").read_text().partition("## Dependencies")[2]
    for line in needed:
        name = re.match(r"[\w-]+", line)[0]
        assert f"`{name}`" in reasons, f"docs/guide/install.md gives no reason for {name}"
    for extra in extras:
        assert f"`{extra}`" in reasons


def test_every_kernel_file_has_a_line() -> None:
    lines = (ROOT / "kernels/README.md").read_text()
    for path in (ROOT / "kernels").iterdir():
        if path.name != "README.md":
            name = path.name + "/" * path.is_dir()
            assert re.search(rf"^\| `{re.escape(name)}` \|", lines, re.MULTILINE), name


def test_changelog_begins_with_this_version() -> None:
    versions = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert versions[0] == cnnops.__version__


def test_every_served_name_is_in_the_migration_table() -> None:
    quoted = set(re.findall(r"`(\w+)`", (ROOT / "docs/guide/migration.md").read_text()))
    for module in (cnnops.nn, cnnops.functional):
        assert not set(module.__all__) - quoted, f"{module.__name__}: not in the table"


def templates(source: str) -> str:
    """The strings of a Python file in their order, with nothing where values are filled in."""
    texts = []
    inner = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.JoinedStr):
            parts = [part for part in node.values if isinstance(part, ast.Constant)]
            inner |= set(map(id, parts))
            texts.append(
                (node.lineno, node.col_offset, "\0".join(str(part.value) for part in parts))
            )
        elif (
            isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inner
        ):
            texts.append((node.lineno, node.col_offset, node.value))
    return "\0".join(text for _, _, text in sorted(texts))


def test_quoted_messages_are_in_the_source() -> None:
    """Every message of docs/guide/troubleshooting.md: what `…` parts stands in one file, in order."""
    text = (ROOT / "docs/guide/troubleshooting.md").read_text()
    cells = [
        line.split(" | ")[0] for line in re.findall(r"^\| (`.+|none.+) \|$", text, re.MULTILINE)
    ]
    messages = [message for cell in cells for message in re.findall(r"`([^`]+)`", cell)]
    assert len(messages) > 50
    files = [templates(path.read_text()) for path in (ROOT / "cnnops").rglob("*.py")]
    named = "".join(
        path.read_text()
        for folder, pattern in (("cnnops", "*.py"), ("kernels/emulator", "*.cpp"))
        for path in (ROOT / folder).rglob(pattern)
    )
    missing = []
    for message in messages:
        pieces = [piece.strip() for piece in re.split("…|; ", message) if piece.strip(" :;,()")]
        pattern = re.compile(".*?".join(map(re.escape, pieces)), re.DOTALL)
        if message not in named and not any(pattern.search(file) for file in files):
            missing.append(message)
    assert not missing, "\n".join(missing)


def test_drawings_are_what_their_code_draws() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "docs/drawings"), "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_drawing_is_shown() -> None:
    text = "".join(document.read_text() for document in DOCUMENTS)
    for path in (ROOT / "docs/drawings").glob("*.svg"):
        assert f"/{path.name})" in text, f"{path.name} stands on no page"


def test_byte_budgets_are_those_of_the_shapes() -> None:
    found = importlib.util.spec_from_file_location("budgets", ROOT / "docs/budgets.py")
    assert found is not None and found.loader is not None
    sys.modules["budgets"] = budgets = importlib.util.module_from_spec(found)
    found.loader.exec_module(budgets)
    pages = [path.read_text() for path in (ROOT / "docs/kernels").glob("*.md")]
    assert [budgets.rewritten(page) for page in pages] == pages, (
        "python docs/budgets.py renews them"
    )
    kernels = {path.name for path in (ROOT / "kernels").glob("*.cu")}
    assert kernels == set(budgets.budgets()), "a kernel file has no budget"
    for name in kernels:
        assert any(f"## {name}" in page for page in pages), f"{name} has no section in the guide"

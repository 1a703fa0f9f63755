"""What the documents say is so: their Python runs, and the files, targets and packages they name exist."""

from __future__ import annotations

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
    ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "kernels/README.md")
]
README = (ROOT / "README.md").read_text()


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


PYTHON = [
    pytest.param(code, id=f"{document.name}-{number}")
    for document in DOCUMENTS
    for number, code in enumerate(blocks(document.read_text(), "python"), 1)
    if not code.startswith("# cnnops/")  # a quotation; see test_quotations
]


@pytest.mark.parametrize("code", PYTHON)
def test_python_runs(code: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exec(compile(code, "document", "exec"), {"__name__": "document"})


def test_readme_has_examples() -> None:
    assert len(blocks(README, "python")) >= 2
    assert min(len(code.splitlines()) for code in blocks(README, "python")) >= 5


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: p.name)
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


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: p.name)
def test_named_files_exist(document: Path) -> None:
    text = document.read_text()
    linked = re.findall(r"\]\(([^)#]+)\)", text)
    for target in linked:
        assert (document.parent / target).exists(), f"{document.name} links to {target}"
    quoted = re.findall(r"`((?:kernels|cnnops|tests|bench)/[\w./]*)`", text)
    for target in quoted:
        assert (ROOT / target).exists(), f"{document.name} names {target}"


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
        lines = re.findall(r"`cnnops( [^`]+)`", text)
        for block in blocks(text, "sh"):
            lines += re.findall(r"(?:^|/|-m )cnnops( [a-z-][^#\n]*)", block, re.MULTILINE)
        for line in lines:
            words = [word for word in shlex.split(line) if word != "--help"]
            if words[0] == "bench":
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
    import json

    base, extras = json.loads(done.stdout)
    needed = [*base, *(line for lines in extras.values() for line in lines)]
    reasons = README.partition("## Dependencies")[2]
    for line in needed:
        name = re.match(r"[\w-]+", line)[0]
        assert f"`{name}`" in reasons, f"README gives no reason for {name}"
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

"""The distribution: what the wheel and the sdist hold, and that the wheel works away from the checkout."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import cnnops
from cnnops import info

pytest.importorskip("setuptools", reason="setuptools is missing: pip install 'cnnops[test]'")
yaml = pytest.importorskip("yaml", reason="pyyaml is missing: pip install 'cnnops[test]'")

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = (
    ".ci",
    ".github",
    ".pre-commit-config.yaml",
    "bench",
    "cnnops",
    "docs",
    "kernels",
    "tests",
    "setup.py",
    "pyproject.toml",
    "MANIFEST.in",
    "Makefile",
)
DOCUMENTS = ("README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "CITATION.cff")
EXTRAS = {"cuda12", "cuda13", "demo", "bench", "docs", "test", "dev"}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist and the wheel, built from a copy of the checkout."""
    folder = tmp_path_factory.mktemp("built")
    tree = folder / "tree"
    tree.mkdir()
    for name in (*SHIPPED, *DOCUMENTS):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, tree / name)
    program = "from setuptools import build_meta as b; b.build_sdist('..'); b.build_wheel('..')"
    subprocess.run([sys.executable, "-c", program], cwd=tree, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def wheel(built: Path) -> zipfile.ZipFile:
    (path,) = built.glob("*.whl")
    return zipfile.ZipFile(path)


def files_below(folder: str) -> set[str]:
    return {
        str(path.relative_to(ROOT))
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_wheel_holds_the_package_and_the_kernels(wheel: zipfile.ZipFile) -> None:
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    kernels = {f"cnnops/{name}" for name in files_below("kernels")}
    assert names == files_below("cnnops") | kernels
    assert {"cnnops/py.typed", "cnnops/kernels/common.cuh", "cnnops/kernels/README.md"} <= names


def test_sdist_can_make_the_wheel_again(
    built: Path, wheel: zipfile.ZipFile, tmp_path: Path
) -> None:
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        archive.extractall(tmp_path, filter="data")
    (tree,) = tmp_path.iterdir()
    for name in files_below("tests") | files_below("docs") | set(DOCUMENTS):
        assert (tree / name).is_file(), name
    program = "from setuptools import build_meta as b; b.build_wheel('..')"
    subprocess.run([sys.executable, "-c", program], cwd=tree, check=True, capture_output=True)
    (again,) = tmp_path.glob("*.whl")
    assert set(zipfile.ZipFile(again).namelist()) == set(wheel.namelist())


def test_wheel_is_for_every_machine(built: Path) -> None:
    """Kernels are compiled where they run: the wheel has none of anybody's machine code."""
    (path,) = built.glob("*.whl")
    assert path.name == f"cnnops-{cnnops.__version__}-py3-none-any.whl"


def test_metadata(wheel: zipfile.ZipFile) -> None:
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = wheel.read(name).decode()
    assert f"\nVersion: {cnnops.__version__}\n" in metadata
    assert "\nRequires-Python: >=3.11\n" in metadata
    assert "\nRequires-Dist: torch<2.14,>=2.11\n" in metadata
    assert set(re.findall(r"^Provides-Extra: (.+)$", metadata, re.MULTILINE)) == EXTRAS
    for major in ("12", "13"):
        assert f"cupy-cuda{major}x[ctk]" in metadata and f"cuda-core[cu{major}]" in metadata
    entry_points = wheel.read(name.replace("METADATA", "entry_points.txt")).decode()
    assert "cnnops = cnnops.__main__:main" in entry_points


PROGRAM = """
import pathlib, sys, torch, cnnops
from cnnops.cuda.kernel import kernels_dir
here = pathlib.Path(sys.argv[1])
assert here in pathlib.Path(cnnops.__file__).parents, cnnops.__file__
assert kernels_dir() == here / "cnnops" / "kernels", kernels_dir()
x = torch.arange(16.0).view(1, 1, 4, 4)
for engine in sys.argv[2:]:
    with cnnops.engine(engine), cnnops.fallback("error"):
        assert cnnops.functional.max_pool2d(x, 2).flatten().tolist() == [5, 7, 13, 15]
"""


def test_wheel_works_away_from_the_checkout(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    wheel.extractall(tmp_path / "site")
    engines = [e for e in ("cpu", "emulate", "aten") if info.unavailable(e) is None]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "site"), *engines],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_the_version_stands_in_one_place() -> None:
    """`cnnops.__version__`; CITATION.cff repeats it, and a heading of CHANGELOG.md (see test_readme.py)."""
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == cnnops.__version__
    written = f'"{cnnops.__version__}"'
    for name in ("setup.py", "pyproject.toml", "docs/conf.py"):
        assert written not in (ROOT / name).read_text(), f"{name} states the version, too"


def test_citation() -> None:
    """What the Citation File Format 1.2.0 asks for."""
    found = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert found["cff-version"] == "1.2.0" and found["type"] == "software"
    assert all(
        isinstance(found[key], str) and found[key] for key in ("message", "title", "version")
    )
    assert all(author.get("name") or author.get("family-names") for author in found["authors"])
    assert found["license"] == "BSD-3-Clause" and (ROOT / "LICENSE").is_file()


def test_workflow_runs_what_the_checkout_has() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    cpu, gpu = workflow["jobs"]["cpu"], workflow["jobs"]["gpu"]
    assert cpu["strategy"]["matrix"]["python"] == ["3.11", "3.12"]
    assert "self-hosted" in gpu["runs-on"] and "label" in gpu["if"]
    makefile = (ROOT / "Makefile").read_text()
    commands = [step["run"] for job in (cpu, gpu) for step in job["steps"] if "run" in step]
    assert ".ci/run" in commands and "make test" in commands
    for command in commands:
        words = command.split()
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", makefile, re.MULTILINE), command
        for path in (word for word in words if word.startswith((".ci/", "bench/"))):
            assert (ROOT / path).is_file(), command


def test_issue_forms_ask_for_what_is_needed() -> None:
    forms = {
        path.stem: yaml.safe_load(path.read_text())
        for path in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml")
    }
    for name in ("bug", "performance"):
        form = forms[name]
        assert form["name"] and form["description"]
        fields = {field["id"]: field for field in form["body"] if field["type"] != "markdown"}
        assert "cnnops info" in fields["info"]["attributes"]["label"]
        assert all(field["validations"]["required"] for field in fields.values())
    assert {"code", "expected", "got"} <= {field.get("id") for field in forms["bug"]["body"]}
    assert "lab.py" in str(forms["performance"]) and "cnnops tune" in str(forms["performance"])


def test_pre_commit_runs_the_tools_of_the_extra() -> None:
    found = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    hooks = [hook for repo in found["repos"] for hook in repo["hooks"]]
    assert {hook["entry"].split()[0] for hook in hooks} == {"ruff", "mypy"}
    assert all(repo["repo"] == "local" for repo in found["repos"])


# Top-level modules by the distribution that brings them, where the names differ.
DISTRIBUTIONS = {
    "PIL": "pillow",
    "cuda": "cuda-core",
    "cupy": "cupy-cuda13x",
    "llvmlite": "numba",
    "sklearn": "scikit-learn",
}


def test_every_import_is_declared() -> None:
    declared = set(re.findall(r'"([a-z][\w-]*)', (ROOT / "setup.py").read_text()))
    for path in (ROOT / "cnnops").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            else:
                continue
            for name in (name.partition(".")[0] for name in names):
                if name != "cnnops" and name not in sys.stdlib_module_names:
                    assert DISTRIBUTIONS.get(name, name) in declared, f"{path.name} imports {name}"

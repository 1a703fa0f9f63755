"""`cnnops check`: the example of its documentation, what it finds in a wrong kernel, and its exit codes."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from textwrap import dedent

import pytest

from cnnops import check
from cnnops.cuda import emulate, emulator_build, jit
from cnnops.cuda.kernel import kernels_dir

if emulate.available() is not None:
    pytest.skip(f"kernels cannot be emulated: {emulate.available()}", allow_module_level=True)

SCHEDULES = ("forward", "reverse", "random")


def has_nvrtc() -> bool:
    try:
        jit.nvrtc_version()
    except RuntimeError:
        return False
    return True


@pytest.fixture
def example(tmp_path: Path) -> Path:
    """scale.cu and scale_cases.py of the module's docstring, in a folder of their own."""
    blocks = re.findall(r"::\n\n((?: {4}.*\n|\n)+)", check.__doc__ or "")
    assert len(blocks) == 2
    for name, text in zip(("scale.cu", "scale_cases.py"), blocks, strict=True):
        (tmp_path / name).write_text(dedent(text))
    return tmp_path / "scale.cu"


def change(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def command(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    check.add_arguments(parser)
    return check.main(parser.parse_args([str(a) for a in arguments]))


# ---- a file from elsewhere -------------------------------------------------------------------------------


def test_the_documented_example_passes(example: Path) -> None:
    report = check.run(example)
    assert report.passed and report.checks == 2 and report.schedules == SCHEDULES
    types = {dict(k.constants)["ELEMENT"]: row for k, row in report.rows.items()}
    for element, size in (("float", 4), ("double", 8)):
        row = types[element]
        assert row.launches == 1
        assert (row.bytes_read, row.bytes_written) == (2 * 350 * size, 350 * size)
        if has_nvrtc():
            assert set(row.resources) == {"80", "90a"}
            for resources in row.resources.values():
                assert 0 < resources.registers < 64 and resources.spill_store_bytes == 0
    assert bool(report.nvrtc_missing) != has_nvrtc()


def test_the_command_prints_a_table(example: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(example, "--arch", "80", "--schedule", "reverse") == 0
    printed = capsys.readouterr().out
    assert re.search(r"^all with .*THREADS=128", printed, re.MULTILINE)
    assert re.search(r"^ *1 ELEMENT=float", printed, re.MULTILINE)
    assert re.search(r"^ *1 +scale .* 2800 +1400 *$", printed, re.MULTILINE)
    assert "scale.cu: 2 launches under reverse; 2 results compared; 0 errors" in printed
    assert all(len(line) <= 100 for line in printed.splitlines())


def test_a_wrong_index_is_told_with_its_line(
    example: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change(example, "i < p.n", "i <= p.n")
    assert command(example) == 1
    printed = capsys.readouterr().out
    assert re.search(
        r"error: scale\.cu:10: out of bounds: read of 4 bytes at byte 1400 of 'x'", printed
    )
    assert "2 errors" in printed


def test_a_wrong_result_is_told(example: Path) -> None:
    change(example, "w[p.row.div(i)]", "w[p.row.div(i)] + (i == 71)")
    report = check.run(example, architectures=("80",))
    assert len(report.errors) == 2 and report.checks == 2
    assert re.search(r"scale\.cu:scale \[.*\]: y: expected at most 0e\+00 from", report.errors[0])
    assert "first at [1, 1]" in report.errors[0]


def test_an_order_dependent_result_is_told(example: Path) -> None:
    change(example, "y[i] = x[i]", "if (i > 0) y[i] = y[i - 1] + x[i]")
    (first, _) = check.run(example, architectures=("80",)).errors
    assert "scale.cu:10: " in first and "before anything has written it" in first


def test_a_kernel_that_does_not_compile_is_told(example: Path) -> None:
    change(example, "p.n)", "p.m)")
    (first, _) = check.run(example).errors
    assert re.search(
        r"(?s)scale\.cu.*scale\.cu:10:.*(no member named|has no member named) .m.", first
    )


@pytest.mark.skipif(not has_nvrtc(), reason="NVRTC is missing: pip install 'cnnops[test]'")
def test_what_only_nvrtc_refuses_is_told(example: Path) -> None:
    change(example, "w[p.row.div(i)]", "w[p.row.div(i)] * EMULATOR")
    report = check.run(example, architectures=("80",))
    assert len(report.errors) == 2 and "EMULATOR" in report.errors[0]
    assert report.checks == 2, "the emulator's results are right"


def test_without_nvrtc_the_rest_is_checked(
    example: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing() -> None:
        raise RuntimeError("NVRTC: expected the package cuda-core, got none")

    monkeypatch.setattr(jit, "nvrtc_version", missing)
    assert command(example) == 0
    printed = capsys.readouterr().out
    assert "registers are unknown: NVRTC: expected the package cuda-core, got none" in printed
    assert "2 results compared; 0 errors" in printed


# ---- files of the package --------------------------------------------------------------------------------


def test_a_file_of_kernels_brings_its_own_cases() -> None:
    report = check.run(kernels_dir() / "conv_im2col.cu", architectures=("80",))
    assert report.passed, report.errors
    assert {kernel.entry for kernel in report.rows} == {"conv_im2col", "conv_col2im"}
    elements = {dict(kernel.constants)["ELEMENT"] for kernel in report.rows}
    assert elements == {"float", "double", "half_t", "bfloat_t"}
    assert report.checks > 20
    assert {kernel.source for kernel in report.rows} == {"conv_im2col.cu"}


@pytest.mark.parametrize("form, architectures", [("sm90", ["90a"]), ("planes", ["80", "90a"])])
def test_a_form_is_checked_by_its_familys_cases(form: str, architectures: list[str]) -> None:
    """Of an algorithm that has several files, each is checked by itself, and for what its launcher claims."""
    file = kernels_dir() / f"conv_igemm_{form}.cu"
    report = check.run(file, architectures=("80", "90a"), schedules="random")
    assert report.passed, report.errors
    assert {kernel.source for kernel in report.rows} == {file.name}
    entries = {kernel.entry for kernel in report.rows}
    assert entries >= {f"conv_{of}_{form}" for of in ("fprop", "dgrad")}
    assert all(list(row.resources) == architectures for row in report.rows.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["conv_direct", "pool", "batch_norm", "group_norm"])
def test_every_entry_of_the_package_has_a_case(name: str) -> None:
    file = kernels_dir() / f"{name}.cu"
    report = check.run(file, architectures=(), schedules="random")
    assert report.passed, report.errors
    launched = {kernel.entry for kernel in report.rows}
    text = file.read_text()
    entries = set(re.findall(r"^(\w+)\(const ", text, re.MULTILINE))
    whole = re.findall(r"^WHOLE\((\w+)\)", text, re.MULTILINE)  # by one block, or by a cluster
    entries |= {f"{name}{of}" for name in whole for of in ("", "_cluster")}
    assert launched <= entries
    # What is for sums too long, or channels too large, to be emulated here.
    large = {"conv_reduce_direct"} | {
        e for e in entries if re.search("_(stats|sums|merge|apply)$", e)
    }
    assert entries - launched <= large


# ---- bad input -------------------------------------------------------------------------------------------


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line on stderr."""
    assert command(*arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    return err


def test_bad_input_is_one_line(example: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = example.parent
    assert "none.cu: expected a file, got none" in refused(capsys, folder / "none.cu")
    assert "expected a .cu file, got .py" in refused(capsys, folder / "scale_cases.py")
    assert "expected a .cu file, got a name without suffix" in refused(capsys, folder)
    assert "expected a number such as 80 or 90a, got 'sm_80'" in refused(
        capsys, example, "--arch", "sm_80"
    )
    cases = folder / "other.py"
    wanted = "other.py: expected a Python file with launches() (see cnnops.check), got none"
    assert wanted in refused(capsys, example, "--cases", cases)
    cases.write_text("def launches():\n    yield 1 / 0\n")
    told = refused(capsys, example, "--cases", cases)
    assert "expected a function launches() that runs, got ZeroDivisionError: division" in told
    cases.write_text("def launches():\n    return []\n")
    assert "launches(): expected a launch of" in refused(capsys, example, "--cases", cases)
    cases.write_text("def launches():\n    yield 1, 2\n")
    assert "expected (launch, inputs, outputs, updates, expected, tolerance)" in refused(
        capsys, example, "--cases", cases
    )
    cases.write_text((folder / "scale_cases.py").read_text().replace("(x * w[:, None],)", "()"))
    assert "expected 1 tensors to compare outputs and updates with, got 0" in refused(
        capsys, example, "--cases", cases
    )


def test_no_compiler_is_one_line(
    example: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    try:
        monkeypatch.setenv("CXX", "no-such-compiler")
        emulator_build.compiler.cache_clear()
        told = refused(capsys, example)
    finally:
        monkeypatch.undo()
        emulator_build.compiler.cache_clear()
    assert "expected a C++ compiler, got none that serves (no-such-compiler not found" in told

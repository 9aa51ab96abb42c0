"""What the build promises: a stable ABI, complete registrations, a layout in which an operator is found by its name."""

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import msacore
from msacore import _C
from msacore.__main__ import operators
from tests import cases
from tests.cuda_on_host.build import files_of

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.skipif(shutil.which("nm") is None, reason="binutils' nm is not installed")
def test_the_libraries_use_no_unstable_torch_symbol_and_the_operators_no_python() -> None:
    module = Path(_C.__file__)
    library = module.with_name("libmsacore.so")
    for path in (module, library):
        symbols = subprocess.run(
            ["nm", "-D", "--undefined-only", path], capture_output=True, text=True, check=True
        ).stdout
        assert "aoti_torch" in symbols or path == module, "the symbol table was not read"
        assert not re.findall(r"_ZNK?(?:2at|3c10|5torch)\w+", symbols)
        assert bool(re.findall(r" _?Py[A-Z_]\w+", symbols)) == (path == module)


def test_every_operator_has_its_kernels_and_its_case() -> None:
    table = operators()
    assert table
    tested = {case.name for case in cases.ALL}
    for name, devices in table.items():
        short = name.removeprefix("msacore::")
        assert {"cpu", "meta"} <= set(devices), f"{name} lacks a CPU or a fake kernel: {devices}"
        if f"{name}_backward" in table or short.endswith("_backward"):
            assert "autograd" in devices, f"{name} has no autograd formula"
            if "_partial" in short:  # no public function: tests/test_info_nce_partial.py
                continue
            assert short.removesuffix("_backward") in tested, f"{name} has no OpCase"


def test_every_public_operator_has_a_docstring_with_an_example() -> None:
    for case in cases.ALL:
        doc = case.op.__doc__ or ""
        for section in ("Args:", "Returns:", "Raises:", "Note:", "Example:", ">>>"):
            assert section in doc, f"{case.name}: no {section!r} in its docstring"


def test_an_operator_is_found_by_its_name_in_every_layer() -> None:
    for source in (ROOT / "csrc").glob("*/*.cpp"):
        folder = source.parent.name
        # An operator's parts, which several processes merge, are next to it and have no public function.
        assert source.stem in (folder, f"{folder}_partial")
        for twin in ("msacore/ops", "msacore/reference", "tests/cases", "bench"):
            assert (ROOT / twin / f"{folder}.py").exists(), f"{source.name} has no {twin}/{folder}.py"


ENGINES = {"contrastive": ("info_nce", "hierarchical_contrastive")}


def test_includes_run_from_operators_to_engines_to_devices_to_core() -> None:
    for source in (ROOT / "csrc").glob("*/**/*"):
        if not source.is_file():
            continue
        folder = source.relative_to(ROOT / "csrc").parts[0]
        allowed = {folder, "core"}
        if folder not in ("core", "cpu", "cuda"):
            allowed |= {"cpu", "cuda"} | {engine for engine, users in ENGINES.items() if folder in users}
        for included in re.findall(r'#include "([^"]+)"', source.read_text()):
            if included == "cuda_on_host.h":  # the tests' shim, in place of the CUDA runtime
                continue
            assert included.split("/")[0] in allowed, f"{source.relative_to(ROOT)} includes {included}"
            device_code = source.suffix in (".cu", ".cuh")
            other = "/cpu/" if device_code else "/cuda/"
            assert other not in f"/{included}", f"{source.relative_to(ROOT)} includes {included}"


def test_comments_name_files_that_exist() -> None:
    known = {path.name for folder in ("csrc", "tests") for path in (ROOT / folder).rglob("*")}
    named = 0
    for source in (path for path in (ROOT / "csrc").rglob("*") if path.is_file()):
        for comment in re.findall(r"//(.*)", source.read_text()):
            for name in re.findall(r"\b(?:\w+/)*([a-z]\w{2,}\.(?:cuh|cu|cpp|h))\b", comment):
                named += 1
                assert name in known, f"{source.relative_to(ROOT)} names {name}, which does not exist"
    assert named


def test_no_source_file_is_too_long_to_read() -> None:
    kinds = {".py", ".cpp", ".h", ".cu", ".cuh"}
    folders = ("csrc", "msacore", "tests", "bench", "examples")
    for source in (path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in kinds):
        lines = len(source.read_text().splitlines())
        assert lines <= 400, f"{source.relative_to(ROOT)} has {lines} lines"


def test_kernels_are_launched_in_one_place() -> None:
    for source in (ROOT / "csrc").rglob("*.cu*"):
        text = source.read_text()
        if source.name != "launch.cuh":
            assert "<<<" not in text, f"{source} launches a kernel; use launch() of cuda/launch.cuh"
        if source.name.endswith("_kernels.cuh"):
            headers = re.findall(r'#include [<"](torch/[^">]+)', text)
            assert all(h.startswith("torch/headeronly/") for h in headers), f"{source} includes {headers}"


def test_kernels_are_the_same_with_the_sizes_of_tests() -> None:
    """The same PTX serves both builds: only launch code asks for the sizes."""
    asks = {file for file in (ROOT / "csrc").rglob("*.cu*") if re.search(r"#if.*MSACORE_SMALL_SIZES", file.read_text())}
    assert asks
    for source in (ROOT / "csrc").rglob("*.cu*"):
        if re.search(r"__(global|device)__", source.read_text()):
            assert not asks & set(files_of(source)), f"{source.relative_to(ROOT)} sees sizes of tests"


def test_importing_msacore_imports_no_optional_package() -> None:
    code = (
        "import sys, msacore; print([m for m in ('faiss', 'sklearn', 'matplotlib', 'tqdm.auto') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_public_names_exist() -> None:
    for name in msacore.__all__:
        assert hasattr(msacore, name)


def test_the_report_for_bug_reports_names_what_matters() -> None:
    done = subprocess.run([sys.executable, "-m", "msacore"], capture_output=True, text=True, check=True, cwd=ROOT)
    for word in ("torch", "faiss", "compiler", "instruction sets", "CUDA", "msacore::graph_propagate"):
        assert word in done.stdout
    assert torch.__version__ in done.stdout


def test_the_report_may_be_read_to_its_first_line_alone() -> None:
    command = f"{shlex.quote(sys.executable)} -u -m msacore | head -n 1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.startswith("msacore") and done.stderr == ""


@pytest.mark.parametrize("old", ["7.5", "7.0+PTX", "Turing", "Volta"])
def test_an_architecture_without_the_instructions_stops_the_build(old: str) -> None:
    tree = ast.parse((ROOT / "setup.py").read_text())
    (check,) = [node for node in tree.body if getattr(node, "name", "") == "check_architectures"]
    names: dict[str, Any] = {"re": re, "sys": sys, "torch": torch}
    exec(compile(ast.Module([check], []), "setup.py", "exec"), names)
    names["check_architectures"]("8.0;8.6;8.9;9.0;10.0;12.0+PTX")
    with pytest.raises(SystemExit, match=rf"8\.0 \(Ampere\) or newer, got {old[:3]}.*; set TORCH_CUDA_ARCH_LIST"):
        names["check_architectures"](f"9.0;{old}")


def test_without_torch_the_build_stops_with_the_command_to_run() -> None:
    """As under pip's build isolation, or with even less: no installed package at all."""
    done = subprocess.run([sys.executable, "-I", "-S", "setup.py"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "finds no torch" in done.stderr, done.stderr
    assert "pip install --no-build-isolation '.[faiss]'" in done.stderr


_SOURCES_OF_A_CUDA_BUILD = """
import sys
import setuptools, torch, torch.utils.cpp_extension
torch.version.cuda, torch.utils.cpp_extension.CUDA_HOME = "13.0", sys.argv[2]
setuptools.setup = lambda ext_modules, **others: print(*ext_modules[0].sources, sep="\\n")
exec(compile(open(sys.argv[1]).read(), sys.argv[1], "exec"))
"""


def _sources_of_a_cuda_build(folder: Path) -> subprocess.CompletedProcess[str]:
    """Run setup.py in ``folder`` as if torch were a CUDA build, up to the list of sources."""
    command = [sys.executable, "-c", _SOURCES_OF_A_CUDA_BUILD, str(ROOT / "setup.py"), str(folder)]
    environment = {**os.environ, "MSACORE_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "8.0;9.0+PTX"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_a_cuda_build_compiles_every_source_and_stops_where_one_is_missing(tmp_path: Path) -> None:
    sources = [path.relative_to(ROOT) for end in ("cpp", "cu") for path in (ROOT / "csrc").glob(f"*/*.{end}")]
    assert {path.parent.name for path in sources if path.suffix == ".cu"} == {path.parent.name for path in sources}
    for path in sources:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    done = _sources_of_a_cuda_build(tmp_path)
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.splitlines()[1:]) == {str(path) for path in sources}
    (tmp_path / "csrc/kcenter/kcenter_cuda.cu").unlink()
    done = _sources_of_a_cuda_build(tmp_path)
    assert done.returncode == 1 and "csrc/kcenter holds no `_cuda.cu` file" in done.stderr, done.stderr

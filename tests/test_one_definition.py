"""The CPU and the CUDA side of every operator in one binary: no type has two definitions, and both sides run."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests import cases, test_info_nce_partial
from tests.cases import kcenter
from tests.cuda_on_host.build import HERE, ROOT, SMALL_SIZES, compiler, content_hash
from tests.cuda_on_host.dispatch import operators_with_cuda_code
from tests.opcase import map_tensors, run

pytestmark = pytest.mark.slow  # every source is compiled twice, which takes minutes

CPU = torch.device("cpu")
SOURCES = [*sorted((ROOT / "csrc").glob("*/*.cpp")), *sorted((ROOT / "csrc").glob("*/*_cuda.cu"))]
CACHE = ROOT / "build" / "one_definition"
TORCH = Path(torch.__file__).parent

# Machine code without optimisation, so that no inlining hides which definition the linker took, and in addition what
# the linker needs to compare types.
_COMPILE = ["-x", "c++", "-std=c++20", "-O0", "-g0", "-fPIC", "-flto", "-ffat-lto-objects", "-pthread", "-w"]
_COMPARE = ["-r", "-flinker-output=rel", "-flto", "-O0", "-Wodr", "-Werror=odr"]  # merged, without machine code

# Runs recorded calls on both sides; the library's CUDA code registers itself under the name `msacore_host`. A result
# that is an argument of a later call is passed as the same side computed it, because what a device keeps for its
# backward pass is its own.
_RUN_BOTH = """
import sys, torch
from torch.utils import _pytree
torch.ops.load_library(sys.argv[1])
library = torch.library.Library("msacore_host", "FRAGMENT")
for schema in torch._C._jit_get_all_schemas():
    if schema.name.startswith("msacore::"):
        library.define(str(schema).removeprefix("msacore::"))
sides = [(torch.ops.msacore, []), (torch.ops.msacore_host, [])]
first = lambda result: result if isinstance(result, torch.Tensor) else first(result[0])
for name, args, kwargs, recorded in torch.load(sys.argv[2], weights_only=False):
    results = []
    for side, earlier in sides:
        def own(t):
            same = [found for was, found in earlier if was.dtype == t.dtype and torch.equal(was, t)]
            return (same[-1] if same else t).clone()
        own_args, own_kwargs = _pytree.tree_map_only(torch.Tensor, own, (args, kwargs))
        result = getattr(side, name).default(*own_args, **own_kwargs)
        earlier += zip(*(_pytree.tree_leaves(r) for r in (recorded, result)), strict=True)
        results.append(first(result))
    if name == "info_nce_partial":  # relative to a base that each device chooses
        results = [r.isfinite() for r in results]
    torch.testing.assert_close(*results, equal_nan=True, rtol=1e-4, atol=1e-5, msg=lambda text: f"{name}: {text}")
    print(name)
"""


def _compile(source: Path) -> Path:
    command = [compiler(), *_COMPILE, "-fopenmp-simd", SMALL_SIZES, "-DTORCH_TARGET_VERSION=0x020b000000000000"]
    command += [f"-I{HERE}", f"-I{ROOT / 'csrc'}", "-isystem", str(TORCH / "include"), "-c", str(source)]
    compiled = CACHE / f"{source.stem}.{content_hash(source, command)}.o"
    if not compiled.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        for stale in CACHE.glob(f"{source.stem}.????????????????.o"):
            stale.unlink()
        unfinished = compiled.with_suffix(f".{os.getpid()}")
        done = subprocess.run([*command, "-o", str(unfinished)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
        unfinished.rename(compiled)
    return compiled


def _link(objects: list[Path], to: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([compiler(), "-o", str(to), *map(str, objects), *options], capture_output=True, text=True)


@pytest.fixture(scope="module")
def objects() -> list[Path]:
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(_compile, SOURCES))


@pytest.fixture(scope="module")
def _linker_compares(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Skips where a planted second definition goes unnoticed."""
    folder = tmp_path_factory.mktemp("planted")
    planted = []
    for name, member in (("one", "int"), ("two", "double")):
        source = folder / f"{name}.cpp"
        source.write_text(
            f"namespace planted {{ struct Twice {{ {member} value; Twice(); }}; }}\nplanted::Twice {name};\n"
        )
        compiled = source.with_suffix(".o")
        done = subprocess.run(
            [compiler(), *_COMPILE, "-c", str(source), "-o", str(compiled)], capture_output=True, text=True
        )
        if done.returncode != 0:
            pytest.skip(f"{compiler()} does not compile for link-time comparison: {done.stderr[:200]}")
        planted.append(compiled)
    linked = _link(planted, folder / "planted.o", *_COMPARE)
    if "planted" not in linked.stderr or linked.returncode == 0:
        pytest.skip(f"{compiler()} does not compare types when it links")


@pytest.mark.usefixtures("_linker_compares")
def test_no_type_has_two_definitions(objects: list[Path], tmp_path: Path) -> None:
    linked = _link(objects, tmp_path / "compared.o", *_COMPARE)
    assert linked.returncode == 0, linked.stderr[-6000:]


class _Recorder(TorchDispatchMode):
    """Records the calls of msacore's operators."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func.namespace != "msacore":
            return func(*args, **(kwargs or {}))
        plain = map_tensors([args, kwargs or {}], lambda t: t.detach().clone())
        result = func(*args, **(kwargs or {}))
        recorded = map_tensors([result], lambda t: t.detach().clone())
        self.calls.append((func._schema.name.removeprefix("msacore::"), *plain, recorded))
        return result


def test_both_sides_run_in_one_binary_without_optimisation(objects: list[Path], tmp_path: Path) -> None:
    recorder = _Recorder()
    with recorder:
        for case in cases.ALL:
            run(case, case.op, case.samples(CPU, torch.float32)[0].arguments)
        test_info_nce_partial.test_merged_parts_are_the_whole("labels", [4, 5])
        for kernel in kcenter.CASES:
            kernel.run(kernel.arguments(CPU, torch.float32))
    names = [name for name, *_ in recorder.calls]
    assert set(names) == operators_with_cuda_code()
    torch.save(recorder.calls, tmp_path / "calls.pt")
    libraries = [f"-L{TORCH / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    linked = _link(objects, tmp_path / "both.so", "-shared", "-fno-lto", *libraries)
    assert linked.returncode == 0, linked.stderr[-4000:]
    program = [sys.executable, "-c", _RUN_BOTH, str(tmp_path / "both.so"), str(tmp_path / "calls.pt")]
    done = subprocess.run(program, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert done.stdout.split() == names

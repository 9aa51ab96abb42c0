"""The CPU library under AddressSanitizer, UndefinedBehaviorSanitizer and the assertions of the C++ library.

The process of the tests cannot load it; another process does, in place of the installed library.
"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from tests import cases
from tests.cuda_on_host.build import ROOT, SANITIZERS, compiler, content_hash, sanitizer_environment

pytestmark = pytest.mark.slow  # the library is compiled once more, which takes minutes

SOURCES = sorted((ROOT / "csrc").glob("*/*.cpp"))
CACHE = ROOT / "build" / "cpu_sanitized"
TORCH = Path(torch.__file__).parent

_COMPILE = [
    *("-std=c++20", "-g1", "-fPIC", "-fvisibility=hidden", "-fopenmp-simd", "-fno-math-errno", "-w"),
    # One instruction set: three clones of every leaf would take three times as long to compile, from the same source.
    *("-D_GLIBCXX_ASSERTIONS", "-Dtarget_clones(...)=", *SANITIZERS),
    *("-DTORCH_TARGET_VERSION=0x020b000000000000", f"-I{ROOT / 'csrc'}", "-isystem", f"{TORCH / 'include'}"),
]


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]


def _object(source: Path) -> Path:
    command = [compiler(), *_COMPILE, "-c", str(source)]
    made = CACHE / f"{source.stem}.{content_hash(source, command)}.o"
    if not made.exists():
        for stale in CACHE.glob(f"{source.stem}.????????????????.o"):
            stale.unlink()
        unfinished = made.with_suffix(f".{os.getpid()}")
        _run([*command, "-o", str(unfinished)])
        unfinished.rename(made)
    return made


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    """Environment of a process whose `msacore` loads the sanitized library: LD_LIBRARY_PATH precedes its RUNPATH."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or 2)) as pool:
        objects = [str(made) for made in pool.map(_object, SOURCES)]
    link = [compiler(), "-shared", *SANITIZERS, *objects, f"-L{TORCH / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    _run([*link, "-o", str(CACHE / "libmsacore.so")])
    return sanitizer_environment() | {"LD_LIBRARY_PATH": str(CACHE), "OMP_NUM_THREADS": "2"}


def _python(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1200
    )


def test_the_sanitized_library_is_the_one_that_runs(environment: dict[str, str]) -> None:
    code = "import msacore; print(open('/proc/self/maps').read())"
    maps = _python(environment, "-c", code)
    assert maps.returncode == 0, maps.stderr[-4000:]
    assert str(CACHE / "libmsacore.so") in maps.stdout
    assert str(ROOT / "msacore" / "libmsacore.so") not in maps.stdout


def test_small_samples_of_every_operator_and_wrong_values_find_nothing(environment: dict[str, str]) -> None:
    """Sizes of 0 are among the samples. Wrong values inside tensors must be found before they are used."""
    nodes, empty = [], 0
    for case in cases.ALL:
        for sample in case.samples(torch.device("cpu"), torch.float32):
            if not sample.small:
                continue
            empty += any(t.numel() == 0 for t in sample.arguments.values() if isinstance(t, torch.Tensor))
            nodes += [
                f"tests/test_ops.py::test_values_and_gradients_are_as_accurate_as_torch[cpu-{case.name}-{sample.id}-{d}]"
                for d in (torch.float32, torch.float64, torch.bfloat16)
            ]
        nodes += [
            f"tests/test_ops.py::test_bad_input_raises_alike_on_every_device[cpu-{case.name}-{label}]"
            for label, bad in case.bad_inputs.items()
            if bad.values
        ]
    assert empty >= 5
    nodes += [
        "tests/test_contrast_limits.py::test_empty_sides_give_finite_losses_and_zero_gradients",
        "tests/test_message_limits.py::test_means_of_the_largest_number_are_no_larger",
    ]
    pytest_alone = ("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", "not cuda")
    done = _python(environment, *pytest_alone, *nodes)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    print(done.stdout.splitlines()[-1])

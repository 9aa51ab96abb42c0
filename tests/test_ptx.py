"""The operators on the PTX that nvcc makes of their kernels, executed by the interpreter in tests/ptx.

It runs in a process of its own, because it has to be loaded before libc to see what torch allocates.
"""

import json
import re
import shutil
import subprocess
import sys

import pytest

from tests.cuda_on_host.build import ROOT
from tests.nvcc import SOURCES
from tests.ptx.build import preloaded
from tests.ptx.run import families

pytestmark = [
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed"),
    pytest.mark.skipif(shutil.which("nm") is None, reason="binutils' nm is not installed"),
    pytest.mark.slow,  # nvcc takes minutes, and the interpreter some 50 million instructions a second
]

# Families with products on tensor cores, whose way of adding matters in float32.
PRODUCTS = ("hierarchical_contrastive", "info_nce", "low_rank_fusion", "matrix_fusion", "rank_n_contrast")


def passes(*arguments: str, **environment: str) -> str:
    """Run `python -m tests.ptx`; every case has to pass. Returns what it prints."""
    command = [sys.executable, "-m", "tests.ptx", *arguments]
    done = subprocess.run(command, cwd=ROOT, env={**preloaded(), **environment}, capture_output=True, text=True)
    failed = "\n".join(line for line in done.stdout.splitlines() if not line.startswith("ok"))
    assert done.returncode == 0, failed[-6000:] + done.stderr[-3000:]
    return done.stdout


# Only what two cores run in a few minutes; the command can run everything.
@pytest.mark.parametrize("family", families())
def test_every_sample_in_one_dtype_and_every_dtype(family: str) -> None:
    printed = passes(family, *([] if family == "kcenter" else ["--in-turn"]))  # selection has one sample per operator
    assert int(re.search(r"(\d+) passed, 0 failed", printed)[1]) >= 10  # type: ignore[index]


@pytest.mark.parametrize("mma", ["h100", "a100"])
@pytest.mark.parametrize("family", PRODUCTS)
def test_products_are_accurate_as_chips_add(family: str, mma: str) -> None:
    """Tensor cores cut off low bits of their sums; the accuracy rule holds even so. All samples in float32."""
    passes(family, "--dtypes", "float32", "--mma", mma)


def passes_instead(folder: str, *arguments: str, **environment: str) -> str:
    """Run tests that are written for the shim, on PTX; returns what they print."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "tests.ptx.plugin"]
    done = subprocess.run(
        [*command, *arguments],
        cwd=ROOT,
        env={**preloaded(), "MSACORE_PTX_SOURCES": folder, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    assert int(re.search(r"(\d+) launches of PTX", done.stdout)[1]) > 0  # type: ignore[index]
    return done.stdout


# What a family runs with the sizes of a CUDA build: parts of its samples' names, all by default. The samples are small
# for these sizes, so the second runs also move the limits beyond which other kernels are used.
SAMPLES = {
    "hierarchical_contrastive": ("two tiles",),
    "info_nce": ("labels",),
    "matrix_fusion": ("complete", "several tiles, pooled"),
    "propagation": ("odd",),
    "rank_n_contrast": ("labels",),
}
LARGE = {"MSACORE_CUDA_FEW_SAMPLES": "0", "MSACORE_CUDA_PAIRWISE_ROWS": "8"}
LARGE_SAMPLES = {
    "hierarchical_contrastive": ("two tiles", "learned temperatures", "large: classes of several pieces"),
    "info_nce": ("labels",),
}
# Tests that reach kernels that no sample reaches.
BESIDE = {
    "info_nce": ("tests/test_info_nce_partial_cuda.py", "-k", "labels and 4"),
    "kcenter": ("tests/test_kcenter_cuda.py", "-k", "cosine and whole"),
}


@pytest.mark.parametrize("family", families())
def test_every_kernel_runs_with_the_sizes_of_a_cuda_build(family: str) -> None:
    """Threads also run in another order."""
    options = [family, "--in-turn", "--production-sizes", "--schedule", "reverse"]

    def chosen(parts: tuple[str, ...]) -> list[str]:
        return [word for part in parts for word in ("--samples", part)]

    printed = [passes(*options, *chosen(SAMPLES.get(family, ())))]
    if family in LARGE_SAMPLES:
        printed.append(passes(*options, *chosen(LARGE_SAMPLES[family]), **LARGE))
    if family in BESIDE:
        printed.append(passes_instead(family, *BESIDE[family], MSACORE_PTX_SIZES="production"))
    idle = [set(re.search(r"in no dtype: (.*)", text)[1].split()) for text in printed]  # type: ignore[index]
    assert set.intersection(*idle) - {"none"} == set()


@pytest.mark.parametrize(
    ("folder", "arguments"),
    [
        ("kcenter", ["tests/test_kcenter_cuda.py", "-k", "lacks or tree or any_double or labelled or probcover"]),
        ("info_nce", ["tests/test_info_nce_partial_cuda.py"]),
    ],
    ids=["selections", "parts of info_nce"],
)
def test_what_has_no_case_of_its_own(folder: str, arguments: list[str]) -> None:
    passes_instead(folder, *arguments)


def test_every_source_has_a_test() -> None:
    assert {source.parent.name for source in SOURCES} == set(families())


RIGHT = ("transpose 64 1", "mma_half 80 1", "neighbour 1", "block_reduction 1001")
WRONG = {
    "transpose 64 0": ("race: read after write", "st.shared", "shim_kernels.cpp"),
    "mma_half 80 0": ("race: read while a cp.async is in flight", "ldmatrix", "mma.cuh"),
    "neighbour 0": ("race: read after write", "race: write after read"),
    "unwritten": ("uninitialised", "4 bytes", "ld.volatile.shared"),
    "shared_overrun": ("[out of bounds] shared access at 128 of 128 bytes", "thread 31"),
    "dynamic_overrun": ("[out of bounds] shared access at 128 of 128 bytes", "thread 31"),
    "global_overrun 32": ("[out of bounds] global access of 4 bytes at byte 128 of an array of 128", "thread 32"),
    "misaligned": ("[misaligned] global access of 16 bytes, 4 beyond a multiple",),
    "early_return": ("[barrier] waits for a thread that has returned", "bar.sync"),
    "wrong_mask": ("[warp] the mask names a lane that has returned", "shfl.sync.bfly"),
    "stray_lane": ("[warp] a shuffle reads a lane outside its mask",),
}


def test_planted_faults_are_found_and_right_kernels_pass() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.ptx.planted"], cwd=ROOT, env=preloaded(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout)
    assert set(said) == {*RIGHT, *WRONG}
    for name in RIGHT:
        assert said[name] == [], name
    for name, words in WRONG.items():
        for word in words:
            assert any(word in line for line in said[name]), f"{name}: no {word!r} in {said[name]}"

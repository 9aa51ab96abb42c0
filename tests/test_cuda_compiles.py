"""The CUDA sources under nvcc, where it is installed: they compile for the promised chips, and no kernel spills."""

import shutil
from pathlib import Path

import pytest

from tests.nvcc import ARCHITECTURES, SOURCES, kernels_of

pytestmark = [
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed"),
    pytest.mark.slow,  # nvcc takes minutes
]


# Bytes stored and loaded, at most. In float64, which serves checks rather than training, the gradients of a tile take
# some registers more than there are.
SPILLED = {"contrastive::cuda::gradient_kernel<double,": 128}


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.name)
def test_no_kernel_spills_registers(source: Path) -> None:
    kernels = kernels_of(source)
    assert {k.architecture for k in kernels} == {int(a) for a in ARCHITECTURES}
    for kernel in kernels:
        allowed = next((most for name, most in SPILLED.items() if kernel.name.startswith(name)), 0)
        assert kernel.spilled <= allowed, f"{kernel.name} on sm_{kernel.architecture} spills {kernel.spilled} bytes"

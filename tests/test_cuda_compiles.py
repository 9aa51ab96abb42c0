"""The CUDA sources under nvcc, where it is installed: they compile for the promised chips, and kernels do not spill."""

import shutil
from pathlib import Path

import pytest

from tests.nvcc import ARCHITECTURES, SOURCES, kernels_of

pytestmark = [
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed"),
    pytest.mark.slow,  # nvcc takes minutes
]


# The most bytes that may be spilled (stored and loaded), by architecture: on sm_120 the kernels of selection, which are
# limited to 128 registers, need a few more.
SPILLED = {
    "kcenter::cuda::count_kernel<": {120: 96},
    "kcenter::cuda::fold_kernel<": {120: 160},
}


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.name)
def test_no_kernel_spills_registers(source: Path) -> None:
    kernels = kernels_of(source)
    assert {k.architecture for k in kernels} == {int(a) for a in ARCHITECTURES}
    for kernel in kernels:
        most = next((most for name, most in SPILLED.items() if kernel.name.startswith(name)), {})
        allowed = most.get(kernel.architecture, 0)
        assert kernel.spilled <= allowed, f"{kernel.name} on sm_{kernel.architecture} spills {kernel.spilled} bytes"

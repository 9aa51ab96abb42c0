"""Seeds, devices and hypothesis profiles of all tests."""

import os

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("default", max_examples=50, deadline=None, derandomize=True)
hypothesis.settings.register_profile("thorough", max_examples=2000, deadline=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

_CUDA_IS_REQUIRED = os.environ.get("MSACORE_REQUIRE_CUDA") == "1"
_CUDA = pytest.param(
    "cuda",
    marks=pytest.mark.skipif(
        not torch.cuda.is_available() and not _CUDA_IS_REQUIRED,
        reason="no CUDA device (MSACORE_REQUIRE_CUDA=1 makes this a failure)",
    ),
)


# CUDA code on the host is slow: every run takes the small float32 samples, `make test-thorough` takes all of them.
_QUICK_ON_HOST = ("test_values_and_gradients_are_as_accurate_as_torch", "test_bad_input", "test_wrong_values")
_SLOW_FILES = ("test_cuda_on_host.py", "test_cuda_compiles.py")


@pytest.fixture(params=["cpu", _CUDA])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The host runs of CUDA code are for the operators that have some."""
    for item in items:
        quick = item.name.startswith(_QUICK_ON_HOST) and "large" not in item.name
        other_dtype = any(dtype in item.name for dtype in ("float64", "float16", "bfloat16"))
        if item.path.name in _SLOW_FILES and (not quick or other_dtype):
            item.add_marker(pytest.mark.thorough)
    from tests.cuda_on_host.dispatch import operators_with_cuda_code

    def runs(item: pytest.Item) -> bool:
        case = getattr(item, "callspec", None) and item.callspec.params.get("case")
        here = item.path.name == "test_cuda_on_host.py"
        return not (here and case) or case.name in operators_with_cuda_code()

    items[:] = [item for item in items if runs(item)]

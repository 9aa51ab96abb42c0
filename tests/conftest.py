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


@pytest.fixture(params=["cpu", _CUDA])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The host runs of CUDA code leave out the samples that are too much for them; sanitizers run first."""
    from tests import cases

    cpu, dtype = torch.device("cpu"), torch.float32
    too_much = {(case.name, s.id) for case in cases.ALL for s in case.samples(cpu, dtype) if not s.on_host}

    def runs(item: pytest.Item) -> bool:
        if item.path.name != "test_cuda_on_host.py" or not hasattr(item, "callspec"):
            return True
        params = item.callspec.params
        return "sample" not in params or (params["case"].name, params["sample"]) not in too_much

    items[:] = [item for item in items if runs(item)]
    items.sort(key=lambda item: not item.name.startswith("test_sanitizers"))  # long ones first: no worker ends alone

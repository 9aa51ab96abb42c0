"""Seeds, devices and hypothesis profiles of all tests."""

import os
import signal

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("default", max_examples=50, deadline=None, derandomize=True)
hypothesis.settings.register_profile("thorough", max_examples=2000, deadline=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

# A process that a shell starts in the background ignores Ctrl-C, and so would every process that a test interrupts.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

_HAS_CUDA = torch.cuda.is_available()
_CUDA_IS_REQUIRED = os.environ.get("MSACORE_REQUIRE_CUDA") == "1"
_CUDA = pytest.param(
    "cuda",
    marks=pytest.mark.skipif(
        not _HAS_CUDA and not _CUDA_IS_REQUIRED,
        reason="no CUDA device (MSACORE_REQUIRE_CUDA=1 makes this a failure)",
    ),
)


@pytest.fixture(params=["cpu", _CUDA])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    if _HAS_CUDA:
        torch.manual_seed(0)
    else:  # torch.manual_seed would also queue a call for a later GPU, with its stack trace, which takes 3 ms
        torch.default_generator.manual_seed(0)


def _is_long(item: pytest.Item) -> bool:
    """Whether a test compiles or runs for minutes."""
    long = ("test_sanitizers", "test_killed_runs_end")
    return item.name.startswith(long) or item.path.stem in ("test_cpu_sanitizers", "test_one_definition")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave out what is too large for CUDA code on the host, mark the second tier, and put long tests first."""
    from tests import cases, tiers

    samples = {case.name: case.samples(torch.device("cpu"), torch.float32) for case in cases.ALL}
    numbers = {(name, s.id): (i, s.on_host) for name, those in samples.items() for i, s in enumerate(those)}
    kept = []
    for item in items:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        if "case" in params and "sample" in params:
            number, on_host = numbers[params["case"].name, params["sample"]]
            runs_cuda_code = item.path.name == "test_cuda_on_host.py"
            if runs_cuda_code and not on_host:
                continue
            if tiers.waits(runs_cuda_code, item.originalname, number, params):
                item.add_marker(pytest.mark.slow)
        if item.path.name == "test_kcenter_cuda.py" and tiers.is_large_selection(item.originalname, params):
            item.add_marker(pytest.mark.slow)
        kept.append(item)
    kept.sort(key=lambda item: not _is_long(item))  # so that no worker is left alone with one
    items[:] = kept

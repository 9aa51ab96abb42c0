"""The CUDA code of the parts of info_nce, executed on the CPU: the tests of the parts again."""

from collections.abc import Iterator

import pytest

from tests.cuda_on_host.dispatch import CudaOnHost

# With the fixture below, these tests run the CUDA code.
from tests.test_info_nce_partial import (  # noqa: F401
    test_candidates_without_a_local_positive_still_have_their_sums,
    test_merged_parts_are_the_whole,
)


@pytest.fixture(autouse=True)
def on_host() -> Iterator[CudaOnHost]:
    with CudaOnHost() as mode:
        yield mode
    assert mode.calls, "no CUDA code was run"

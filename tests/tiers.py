"""Which tests `make test` runs, and which wait for `make test-all`.

A test marked `slow` says why at the marker. The generic tests multiply cases by samples, dtypes and layouts; here the
first tier keeps a part of every product, chosen by the sample's number, so that every operator, dtype and device path
is in it, which tests/test_tiers.py checks.
"""

from typing import Any

FLOATS = ("torch.float32", "torch.float64", "torch.float16", "torch.bfloat16")
# The first tier takes every n-th sample of a case for these tests.
EVERY_NTH = {
    "test_threads_share_the_work": 4,
    "test_opcheck": 3,
    "test_every_output_is_written": 2,
    "test_two_runs_give_equal_bits": 2,
    "test_gradcheck": 2,
    "test_non_contiguous_inputs_give_the_same_bits": 2,
}
ON_HOST = {
    "test_every_order_of_threads_and_blocks_gives_equal_bits": 8,
    "test_every_output_is_written": 4,
    "test_hidden_inputs_are_never_read": 3,
    "test_non_contiguous_inputs_give_the_same_bits": 4,
}
# Each of these samples takes as long as all others of its operator together.
LONG = {
    "test_threads_share_the_work": ("statistics, whole window",),
    "test_every_output_is_written": ("large, labels", "rows too wide to keep"),
    "test_hidden_inputs_are_never_read": ("large", "large, labels"),
}


def waits(on_host: bool, test: str, number: int, params: dict[str, Any]) -> bool:
    """Whether a generic test waits for the second tier.

    Args:
        on_host: The test runs CUDA code on the host.
        test: Name of its function.
        number: Which sample of its case it takes.
        params: Its parameters.
    """
    dtype = str(params["dtype"]) if "dtype" in params else None
    if number % (ON_HOST if on_host else EVERY_NTH).get(test, 1) or params.get("sample") in LONG.get(test, ()):
        return True
    if test == "test_gradcheck" and on_host:
        return True  # the first tier compares these gradients with the reference's
    if test == "test_values_and_gradients_are_as_accurate_as_torch":
        # CUDA code on the host: one dtype for each sample; the CPU operators: float32 and one other.
        return dtype != FLOATS[number % 4] if on_host else dtype not in (FLOATS[0], FLOATS[1 + number % 3])
    if dtype is not None:
        return dtype != (FLOATS[0], FLOATS[3])[number % 2]
    return "layout" in params and params["layout"] != ("contiguous", "transposed")[number // 2 % 2]


def is_large_selection(test: str, params: dict[str, Any]) -> bool:
    """Whether a test of selection uses too many centres or rows for CUDA code on the host."""
    return params.get("count") == 300 or (test.startswith("test_distances_closer") and params["metric"] == "cosine")

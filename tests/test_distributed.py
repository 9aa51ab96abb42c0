"""Losses over several processes: the loss and the gradient of one process, whatever the split."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import msacore
from bench.distributed import MODES as MODES_OF_BENCH
from bench.distributed import received
from tests import distributed_bad_arguments as bad
from tests import distributed_group_jobs as groups
from tests import distributed_jobs as jobs
from tests.distributed_cases import BY_NAME
from tests.workers import Workers

SPLITS = ((6, 6, 6, 6), (7, 0, 12, 1), (0, 0, 0, 5), (0, 0, 0, 0))
MODES = ("replicated", "replicated, capacity", "sharded", "sharded, capacity", "ring", "ring, capacity")
each_case = pytest.mark.parametrize("name", list(BY_NAME))


@pytest.fixture(scope="session")
def workers() -> Iterator[Workers]:
    together = Workers(4)
    yield together
    together.close()


def _close(ours: torch.Tensor | None, wanted: torch.Tensor | None, what: str, bits: bool) -> None:
    if ours is None or wanted is None:
        assert (ours is None or not ours.any()) and (wanted is None or not wanted.any()), what
    elif bits:
        assert torch.equal(ours, wanted), f"{what}: {(ours - wanted).abs().max()} apart"
    else:
        scale = max(float(wanted.abs().max()) if wanted.numel() else 0.0, 1e-3)
        assert not wanted.numel() or float((ours - wanted).abs().max()) <= 1e-12 * scale, what


def _check_split(workers: Workers, name: str, mode: str, sizes: Sequence[int]) -> None:
    what, bits = f"{name}, {mode}, {sizes}", mode == "replicated"
    results = workers.run(jobs.compare, len(sizes), name, sizes, mode, torch.float64)
    for result in results:
        _close(result["loss"], result["expected"], f"loss of {what}", bits)
        for key, wanted in result["wanted"].items():
            for ours, ref in zip(result["grads"][key], wanted, strict=True):
                _close(ours, ref, f"gradient of {key} of {what}", bits)
        _close(result["temperature"], result["wanted temperature"], f"temperature of {what}", False)
    if results[0]["loss"].dim() == 0:
        assert len({float(r["loss"]) for r in results}) == 1, "ranks differ"


# Each case takes a second, so the first tier has every other one.
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if k % 2 else ()) for k, name in enumerate(BY_NAME)]
)
def test_loss_and_gradients_are_those_of_one_process(workers: Workers, name: str) -> None:
    for mode in MODES:
        if mode.startswith("ring") and BY_NAME[name].loss == "rank_n_contrast":
            continue  # it has no ring mode
        for sizes in SPLITS:
            _check_split(workers, name, mode, sizes)


@pytest.mark.parametrize("wrapper", ["ddp", pytest.param("fsdp2", marks=pytest.mark.slow)])  # half a minute
def test_a_shared_encoder_gets_the_gradient_of_one_process(workers: Workers, wrapper: str) -> None:
    for mode in ("replicated", "sharded", "ring"):
        for name in BY_NAME:
            if mode == "ring" and BY_NAME[name].loss == "rank_n_contrast":
                continue
            for ours, wanted in workers.run(jobs.through, 4, name, (7, 0, 12, 1), mode, wrapper):
                _close(ours, wanted, f"{name}, {mode}, under {wrapper}", False)


@pytest.mark.parametrize("name", ["masks", "nine terms", "ranks"])
def test_what_is_hidden_on_another_rank_is_never_read(workers: Workers, name: str) -> None:
    for mode in ("replicated", "sharded") if name == "ranks" else ("replicated", "sharded", "ring"):
        for results in workers.run(jobs.poisoned, 4, name, (6, 6, 6, 6), mode):
            half = len(results) // 2
            for clean, dirty in zip(results[:half], results[half:], strict=True):
                assert torch.equal(clean, dirty)


@pytest.mark.parametrize("mode", ["auto", "sharded", "with capacity"])
def test_one_bad_argument_raises_the_same_error_on_all_ranks(workers: Workers, mode: str) -> None:
    for loss, changes in bad.CHANGES.items():
        for what, (_, words) in changes.items():
            messages = workers.run(bad.raises, 3, loss, what, mode)
            assert len({m.split(": ", 1)[1] for m in messages}) == 1, (loss, what, messages)
            assert messages[0].startswith("msacore::"), (loss, what, messages[0])
            assert all(word in messages[0] for word in words), (loss, what, messages[0])


def test_a_queue_may_be_uneven_with_capacity_where_headers_are_checked(workers: Workers) -> None:
    for ours, wanted in workers.run(bad.uneven_queue, 3):
        assert ours == wanted


def test_large_batches_are_sharded_and_those_beyond_memory_pass_round(workers: Workers) -> None:
    for found in workers.run(jobs.chosen_modes, 2):
        assert found == ["replicated", "sharded", "ring"]


def test_different_upstream_gradients_are_found(workers: Workers) -> None:
    for message in workers.run(jobs.different_gradients, 3):
        assert "equal on all ranks" in message


SLOW = pytest.mark.slow  # tracing takes tens of seconds
COMPILED = [
    pytest.param("replicated", "masks"),
    *(pytest.param(*chosen, marks=SLOW) for chosen in (("replicated", "nine terms"), ("replicated", "ranks"))),
    *(
        pytest.param("sharded", name, marks=SLOW)
        for name in ("masks", "self, one mask", "none", "intra-modal", "ranks")
    ),
    *(pytest.param("ring", name, marks=SLOW) for name in ("masks", "labels, negatives alone", "nine terms")),
]


@pytest.mark.parametrize(("mode", "name"), COMPILED)
def test_a_compiled_loss_needs_no_header(
    workers: Workers, mode: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.workers.SECONDS", 120.0)  # ranks take different times to trace
    for differences in workers.run(jobs.compiled, 2, mode, name):
        assert max(differences) < 1e-6


def test_a_compiled_loss_cannot_check_headers(workers: Workers) -> None:
    for message in workers.run(jobs.compiled_check, 2):
        assert "expected `check` of Sharding to be False under torch.compile" in message


def test_a_gather_may_begin_early(workers: Workers) -> None:
    for mode, most in (("replicated", 0.0), ("sharded", 0.0), ("ring", 1e-6)):  # gathered rows are not passed round
        assert max(workers.run(jobs.started, 3, (5, 0, 3), mode)) <= most, mode


@pytest.mark.parametrize("itself", [False, True])
def test_ranks_may_make_different_numbers_of_steps(workers: Workers, itself: bool) -> None:
    found = workers.run(jobs.uneven_steps, 4, itself)
    assert [len(f) for f in found] == [1, 3, 2, 4]
    for step in range(4):
        running = [r for r, steps in enumerate((1, 3, 2, 4)) if step < steps]
        draw = [torch.randn(3, 6, generator=torch.Generator().manual_seed(10 * step + rank)) for rank in running]
        x = torch.cat(draw)
        expected = msacore.info_nce(x, x if itself else x.roll(1, 1)).item()
        assert all(found[rank][step] == pytest.approx(expected, abs=1e-6) for rank in running)


def test_training_with_different_numbers_of_steps_is_that_of_one_process(workers: Workers) -> None:
    steps = (1, 3, 2, 4)
    whole = [
        torch.cat([groups.batch_of(step, rank) for rank in range(4) if step < steps[rank]])
        for step in range(max(steps))
    ]
    loss = msacore.nn.InfoNCE(learn_temperature=True).double()
    expected, weights = groups.train(groups.encoder_of_all(), loss, whole, lambda step: nullcontext())
    for mode in ("replicated", "sharded", "ring"):
        for rank, (found, theirs) in enumerate(workers.run(groups.trains_unevenly, 4, mode, steps)):
            assert found == pytest.approx(expected[: steps[rank]], rel=1e-12), mode
            for ours, ref in zip(theirs, weights, strict=True):
                torch.testing.assert_close(ours, ref, rtol=1e-12, atol=1e-14)


def test_sharded_parameters_cannot_be_joined(workers: Workers) -> None:
    for message in workers.run(groups.joins_shares, 2):
        assert message.startswith("msacore::join: expected parameters of `loss` that every rank holds in full")


def test_meshes_are_groups(workers: Workers) -> None:
    for found in workers.run(groups.meshes, 4):
        for ours, wanted in found:
            assert ours == wanted


@pytest.mark.parametrize("name", ["learned temperature", "self, negatives alone", "nine terms"])
def test_a_step_has_the_same_bits_twice(workers: Workers, name: str) -> None:
    for mode in ("sharded", "ring"):
        assert all(workers.run(groups.bits, 4, name, mode, jobs.compare))


@given(
    name=st.sampled_from(list(BY_NAME)),
    mode=st.sampled_from(MODES),
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=4),
)
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_split_gives_the_loss_of_one_process(workers: Workers, name: str, mode: str, sizes: list[int]) -> None:
    if mode.startswith("ring") and BY_NAME[name].loss == "rank_n_contrast":
        mode = "sharded"
    _check_split(workers, name, mode, sizes)


@each_case
def test_float32_is_as_near_as_one_process(workers: Workers, name: str) -> None:
    for mode in ("sharded", "ring"):
        if mode == "ring" and BY_NAME[name].loss == "rank_n_contrast":
            continue
        for result in workers.run(jobs.compare, 4, name, (7, 0, 12, 1), mode, torch.float32):
            pairs = [(result["loss"], result["expected"])]
            for key, wanted in result["wanted"].items():
                pairs += zip(result["grads"][key], wanted, strict=True)
            for ours, ref in pairs:
                scale = max(float(ref.abs().max()) if ref.numel() else 0.0, 1e-2)
                assert not ref.numel() or float((ours - ref).abs().max()) <= 1e-5 * scale, f"{name}, {mode}"


@given(
    name=st.sampled_from(["labels, self excluded", "labels", "nine terms", "intra-modal", "ranks"]),
    mode=st.sampled_from(MODES),
    order=st.permutations(range(4)),
)
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_ranks_may_change_places(workers: Workers, name: str, mode: str, order: list[int]) -> None:
    if mode.startswith("ring") and BY_NAME[name].loss == "rank_n_contrast":
        mode = "sharded"
    first = workers.run(groups.at_place, 4, name, mode, (0, 1, 2, 3))
    found = workers.run(groups.at_place, 4, name, mode, order)
    for rank, place in enumerate(order):
        for ours, ref in zip(found[rank], first[place], strict=True):
            torch.testing.assert_close(ours, ref, rtol=1e-12, atol=1e-13, msg=f"{name}, {mode}, {order}")


def test_memory_of_the_ring_is_that_of_a_ranks_own_rows(workers: Workers) -> None:
    def most(world: int, mode: str, rows: int) -> int:
        return max(workers.run(groups.most_bytes, world, mode, rows))

    # With three or more ranks, one block arrives while another is read and a third is sent.
    own = most(3, "ring", 256)
    assert most(4, "ring", 256) <= 1.01 * own, "a larger batch, the same number of rows on a rank"
    assert most(3, "ring", 512) <= 2.01 * own
    assert most(4, "sharded", 256) >= 1.2 * most(3, "sharded", 256), "what the ring avoids"


@pytest.mark.slow  # 4.3 billion pairs
@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="reads the memory of a process from Linux's /proc"
)
def test_a_large_batch_in_the_ring_takes_some_copies_of_a_ranks_rows(workers: Workers) -> None:
    rows, width = 65_536 // 4, 16
    copies, tiles = 96 * rows * width * 4, 16 << 20
    assert copies + tiles < 65_536 * rows * 4 / 20, "far less than a rank's strip of similarities"
    taken = workers.run(groups.most_resident, 4, rows, width)
    assert rows * width * 4 < max(taken) <= copies + tiles, f"{taken} bytes"


@pytest.mark.parametrize("world", [2, 3, 4])
def test_a_modality_against_itself_takes_half_the_work(workers: Workers, world: int) -> None:
    rows, modalities = 6, 3
    # One of any two ranks visits the pairs between them for both; a rank's own pairs and other terms are visited once.
    other_terms, own = 2 * modalities * (world * rows) ** 2, modalities * world * rows**2
    between = modalities * world * (world - 1) * rows**2 // 2
    found = sum(workers.run(groups.visited_pairs, world, "intra_modal", rows))
    assert found == other_terms + own + between
    assert sum(workers.run(groups.visited_pairs, world, "cross_modal", rows)) == other_terms + own + 2 * between


def test_ranks_have_no_ring(workers: Workers) -> None:
    for message in workers.run(groups.no_ring, 2):
        assert message.startswith("msacore::rank_n_contrast: expected `mode` to be")


def test_selection_of_processes_has_the_picks_of_one_and_its_state_moves(workers: Workers) -> None:
    n = 90
    generator = torch.Generator().manual_seed(4)
    arguments = {
        "embeddings": torch.randint(0, 4, (n, 3), generator=generator).float(),
        "uncertainty": torch.rand(n, generator=generator),
    }
    for strategy in ("uncertainty_kcenter", "lcmd"):
        whole = msacore.select(**arguments, strategy=strategy, budget=30)
        state = None
        for world, sizes, budget in ((3, (50, 0, 40), 8), (1, (n,), 15), (2, (1, 89), 22), (4, (20, 30, 20, 20), 30)):
            options = {**arguments, "strategy": strategy, "budget": budget}
            found = workers.run(groups.selects, world, options, sizes, state)
            for one in found:
                assert one.indices.tolist() == whole.indices[:budget].tolist()
                assert torch.equal(one.scores, whole.scores[:budget])
            state = found[-1].state
        assert found[0].radius == whole.radius


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_a_step_sends_the_bytes_that_the_formula_says(workers: Workers, world: int) -> None:
    for counted in workers.run(jobs.counted_bytes, world, 5, 6):
        for mode in MODES_OF_BENCH:
            expected = received(5, 6, world, mode) if world > 1 else (0, 0)
            for name, count in zip(("forward", "backward"), expected, strict=True):
                assert counted[mode][name] == (count, count), f"{name} of {mode}"


@pytest.mark.slow  # a process is killed: new ones are started
@pytest.mark.parametrize(
    ("job", "words"),
    [
        (jobs.dies, "the process group is unusable"),
        (groups.dies_in_backward, "the process group is unusable"),
        (groups.dies_selecting, "the group cannot be used any more"),
    ],
)
def test_when_a_rank_dies_the_others_raise(workers: Workers, job: Callable[..., Any], words: str) -> None:
    with pytest.raises(AssertionError) as raised:
        workers.run(job, 3, 1)
    for rank in (0, 2):
        assert f"rank {rank}: " in str(raised.value)
    assert words in str(raised.value)
    assert workers.run(jobs.started, 3, (2, 2, 2), "sharded") == [0.0] * 3, "new processes serve the next function"

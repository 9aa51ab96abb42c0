"""Properties of propagation over conversations, its edge lists and its modules."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import msacore
from msacore.graph import from_edge_index, modality_edges, window_edges
from msacore.nn import AlternatingPropagation
from msacore.reference import propagation as reference
from tests.cases.propagation import conversations

F64 = torch.float64
lengths = st.lists(st.integers(0, 9), min_size=1, max_size=5)
windows = st.tuples(st.integers(-1, 11), st.integers(-1, 11))
modality_counts = st.integers(1, 5)
sends = st.sampled_from(["after_fill", "never"])
seeds = st.integers(0, 2**31 - 1)


def draw_positions(sizes: list[int], seed: int, gaps: bool) -> Tensor | None:
    """Positions with gaps; some differences exceed the range of int64."""
    if not gaps:
        return None
    generator = torch.Generator().manual_seed(seed)
    step = torch.randint(1, 4, (sum(sizes),), generator=generator)
    parts = [part.cumsum(0) - 4 for part in step.split(sizes)]
    if len(parts[-1]) > 2:
        parts[-1][0], parts[-1][-1] = torch.iinfo(torch.int64).min, torch.iinfo(torch.int64).max
    return torch.cat(parts)


def draw(sizes: list[int], modalities: int, seed: int, width: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """States, offsets and availability."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(sum(sizes), modalities, width, generator=generator, dtype=F64)
    return x, conversations(*sizes), torch.rand(sum(sizes), modalities, generator=generator) < 0.6


@given(lengths, modality_counts, windows, st.booleans(), st.booleans(), seeds)
def test_half_steps_equal_their_edge_lists(
    sizes: list[int], modalities: int, window: tuple[int, int], gaps: bool, include_self: bool, seed: int
) -> None:
    x, offsets, senders = draw(sizes, modalities, seed)
    options = dict(window=window, positions=draw_positions(sizes, seed, gaps), include_self=include_self)
    nodes = x.flatten(0, 1)
    for gate in (None, senders):
        intra = window_edges(offsets, modalities, senders=gate, dtype=F64, **options)
        inter = modality_edges(len(x), modalities, gate, F64)
        for edges, ours in (
            (intra, msacore.window_mean(x, offsets, senders=gate, **options)),
            (inter, msacore.modality_mean(x, senders=gate)),
        ):
            torch.testing.assert_close(
                ours.flatten(0, 1), msacore.graph_propagate(nodes, *edges), rtol=1e-12, atol=1e-12
            )


@given(lengths, modality_counts, windows, sends, st.integers(0, 3), st.booleans(), st.booleans(), seeds)
def test_the_window_form_equals_the_graph_form(
    sizes: list[int],
    modalities: int,
    window: tuple[int, int],
    send: str,
    steps: int,
    gaps: bool,
    include_self: bool,
    seed: int,
) -> None:
    x, offsets, available = draw(sizes, modalities, seed)
    options = dict(window=window, positions=draw_positions(sizes, seed, gaps), include_self=include_self)
    later = available if send == "never" else None
    y = torch.randn_like(x)
    ours = msacore.propagate(x.requires_grad_(), offsets, available=available, steps=steps, send=send, **options)
    by_graph = msacore.alternating_graph_propagate(
        x.flatten(0, 1),
        window_edges(offsets, modalities, senders=later, dtype=F64, **options),
        modality_edges(len(x), modalities, later, F64),
        first_intra=window_edges(offsets, modalities, senders=available, dtype=F64, **options),
        steps=steps,
    ).view_as(x)
    torch.testing.assert_close(ours, by_graph, rtol=1e-12, atol=1e-12)
    grads = [torch.autograd.grad(out, x, y)[0] for out in (ours, by_graph)]
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-12)


@given(lengths, modality_counts, windows, seeds)
def test_rows_of_the_means_sum_to_one_or_zero(
    sizes: list[int], modalities: int, window: tuple[int, int], seed: int
) -> None:
    x, offsets, senders = draw(sizes, modalities, seed)
    for ours in (
        msacore.window_mean(torch.ones_like(x), offsets, senders=senders, window=window),
        msacore.modality_mean(torch.ones_like(x), senders=senders),
    ):
        torch.testing.assert_close(ours, ours.round(), rtol=0, atol=1e-12)
        assert ((ours.round() == 0) | (ours.round() == 1)).all()


@given(lengths, modality_counts, windows, sends, st.integers(0, 4), seeds)
def test_the_gradient_is_the_adjoint(
    sizes: list[int], modalities: int, window: tuple[int, int], send: str, steps: int, seed: int
) -> None:
    x, offsets, available = draw(sizes, modalities, seed)
    y = torch.randn_like(x)
    options = dict(available=available, window=window, steps=steps, alpha=0.2, send=send)
    x.requires_grad_()
    out = msacore.propagate(x, offsets, **options)
    (grad,) = torch.autograd.grad(out, x, y)
    torch.testing.assert_close((out * y).sum(), (x * grad).sum(), rtol=1e-10, atol=1e-10)


@given(lengths, modality_counts, windows, sends, seeds)
def test_conversations_do_not_touch_each_other(
    sizes: list[int], modalities: int, window: tuple[int, int], send: str, seed: int
) -> None:
    x, offsets, available = draw(sizes, modalities, seed)
    together = msacore.propagate(x, offsets, available=available, window=window, send=send)
    for begin, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        alone = msacore.propagate(
            x[begin:end], torch.tensor([0, end - begin]), available=available[begin:end], window=window, send=send
        )
        assert torch.equal(together[begin:end], alone)


@given(lengths, modality_counts, windows, sends, seeds)
def test_relabelling_modalities_and_conversations_relabels_the_result(
    sizes: list[int], modalities: int, window: tuple[int, int], send: str, seed: int
) -> None:
    x, offsets, available = draw(sizes, modalities, seed)
    generator = torch.Generator().manual_seed(seed)
    order, columns = torch.randperm(len(sizes), generator=generator), torch.randperm(modalities, generator=generator)
    rows = torch.cat([torch.arange(offsets[v], offsets[v + 1]) for v in order.tolist()])
    options = dict(window=window, send=send)
    ours = msacore.propagate(
        x[rows][:, columns],
        conversations(*[sizes[v] for v in order.tolist()]),
        available=available[rows][:, columns],
        **options,
    )
    expected = msacore.propagate(x, offsets, available=available, **options)
    torch.testing.assert_close(ours, expected[rows][:, columns], rtol=1e-12, atol=1e-12)


@given(lengths, modality_counts, windows, seeds)
def test_reversing_time_swaps_past_and_future(
    sizes: list[int], modalities: int, window: tuple[int, int], seed: int
) -> None:
    x, offsets, senders = draw(sizes, modalities, seed)
    mirrored = msacore.window_mean(
        x.flip(0), conversations(*reversed(sizes)), senders=senders.flip(0), window=(window[1], window[0])
    ).flip(0)
    expected = msacore.window_mean(x, offsets, senders=senders, window=window)
    torch.testing.assert_close(mirrored, expected, rtol=1e-12, atol=1e-12)


@given(st.integers(1, 40), windows, st.sampled_from([float("nan"), float("inf")]), st.booleans(), seeds)
def test_a_non_finite_state_reaches_only_the_windows_that_hold_it(
    length: int, window: tuple[int, int], value: float, include_self: bool, seed: int
) -> None:
    x, offsets, _ = draw([length, 4], 3, seed)
    at = seed % length
    x[at, 1] = value
    past, future = (side if side >= 0 else length for side in window)
    i = torch.arange(length + 4)
    reached = (i < length) & (at - i <= future) & (i - at <= past) & ((i != at) | include_self)
    expected = torch.zeros(length + 4, 3, dtype=torch.bool)
    expected[reached, 1] = True
    ours = msacore.window_mean(x, offsets, window=window, include_self=include_self)
    assert torch.equal(~ours.isfinite().all(-1), expected)
    step = msacore.propagate(x, offsets, window=window, include_self=include_self, steps=1, alpha=0.0)
    assert torch.equal(~step.isfinite().all(-1), expected[:, [1, 0, 1]])


def test_powers_of_the_step_converge_to_the_fixed_point() -> None:
    x, offsets, _ = draw([6, 4], 3, seed=3, width=4)
    alpha, nodes = 0.2, 30
    eye = torch.eye(nodes, dtype=F64).view(10, 3, nodes)
    intra = msacore.window_mean(eye, offsets).view(nodes, nodes)
    inter = msacore.modality_mean(eye).view(nodes, nodes)
    start = x.flatten(0, 1)
    kept = alpha * start + alpha * (1 - alpha) * inter @ start
    fixed = torch.linalg.solve(torch.eye(nodes, dtype=F64) - (1 - alpha) ** 2 * inter @ intra, kept)
    ours = msacore.propagate(x, offsets, steps=120, alpha=alpha).flatten(0, 1)
    torch.testing.assert_close(ours, fixed, rtol=1e-12, atol=1e-12)
    error = [(msacore.propagate(x, offsets, steps=k, alpha=alpha).flatten(0, 1) - fixed).abs().max() for k in (5, 10)]
    assert (error[1] / error[0]) ** 0.2 <= (1 - alpha) ** 2 + 1e-9


def test_one_step_by_hand() -> None:
    x = torch.tensor([[[1.0], [10.0]], [[3.0], [20.0]]], dtype=F64)
    available = torch.tensor([[True, True], [True, False]])
    offsets = torch.tensor([0, 2])
    # intra: text (1 + 3)/2 = 2 for both; audio 10 for both, since only the first sends. u = 0.5 mean + 0.5 x
    # = [[1.5, 10], [2.5, 15]]; inter swaps: h = 0.5 other + 0.5 x.
    filled = msacore.propagate(x, offsets, available=available, steps=1, alpha=0.5)
    assert filled.flatten().tolist() == [5.5, 5.75, 9.0, 11.25]
    never = msacore.propagate(x, offsets, available=available, steps=1, alpha=0.5, send="never")
    assert never.flatten().tolist() == [5.5, 5.75, 1.5, 11.25]


def test_no_steps_copy() -> None:
    x, offsets, available = draw([3], 3, seed=0)
    out = msacore.propagate(x, offsets, available=available, steps=0)
    assert torch.equal(out, x)
    assert out.data_ptr() != x.data_ptr()


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: window_edges(torch.tensor([0, 2]), 3, window=(-2, 1)), "window_edges: expected `window`"),
        (lambda: window_edges(torch.tensor([0, 2]), 3, window=1.5), "window_edges: expected `window`"),
        (lambda: window_edges(torch.tensor([0, 3, 2]), 3), "window_edges: expected `offsets`"),
        (lambda: window_edges(torch.tensor([0.0, 3.0]), 3), "window_edges: expected `offsets`.*float32"),
        (lambda: window_edges([0, 3], 3), "window_edges: expected `offsets`.*list"),
        (lambda: window_edges(torch.tensor([0, 3]), -1), "window_edges: expected `M`.*-1"),
        (lambda: window_edges(torch.tensor([0, 3]), 2, include_self=1), "window_edges: expected `include_self`"),
        (lambda: window_edges(torch.tensor([0, 3]), 2, dtype=torch.int64), "window_edges: expected `dtype`"),
        (lambda: window_edges(torch.tensor([0, 3]), 2, positions=torch.arange(2)), r"`positions`.*\[3\], got \[2\]"),
        (lambda: window_edges(torch.tensor([0, 3]), 2, positions=torch.tensor([0, 2, 2])), "`positions` to increase"),
        (
            lambda: modality_edges(4, 3, senders=torch.ones(4, 2, dtype=torch.bool)),
            "modality_edges: expected `senders`",
        ),
        (lambda: modality_edges(4.0, 3), "modality_edges: expected `N`.*4.0"),
        (lambda: from_edge_index(torch.zeros(3, 2, dtype=torch.int64), 2), r"`edge_index` to have shape \[2, E\]"),
        (lambda: from_edge_index(torch.zeros(2, 2), 2), "`edge_index` to have dtype int64"),
        (lambda: from_edge_index(torch.tensor([[0, 3], [1, 1]]), 3), r"`edge_index` in \[0, num_nodes = 3\), got 3"),
        (lambda: from_edge_index(torch.tensor([[0, 1], [-1, 1]]), 3), "`edge_index`.*got -1"),
        (lambda: from_edge_index(torch.tensor([[0], [1]]), 2, torch.ones(2)), r"`weight`.*E = 1, got \[2\]"),
    ],
)
def test_a_graph_needs_sound_arguments(build: Callable[[], object], words: str) -> None:
    with pytest.raises((RuntimeError, ValueError), match=words):
        build()


@given(st.integers(1, 9), st.integers(0, 40), st.booleans(), seeds)
def test_edges_of_a_graph_library_become_rows(nodes: int, count: int, heads: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    edges = torch.randint(0, nodes, (2, count), generator=generator)
    weight = torch.randn(count, *([2] if heads else []), generator=generator, dtype=F64, requires_grad=True)
    x = torch.randn(nodes, *([2] if heads else []), 3, generator=generator, dtype=F64)
    rowptr, col, ordered, order = from_edge_index(edges.int(), nodes, weight)
    target = torch.arange(nodes).repeat_interleave(rowptr.diff())
    assert torch.equal(torch.stack([col, target]), edges[:, order])
    same = target[1:] == target[:-1]
    assert (order[1:][same] > order[:-1][same]).all(), "edges of a target changed their order"
    expected = torch.zeros_like(x).index_add(0, edges[1], x[edges[0]] * weight[..., None])
    ours = msacore.graph_propagate(x, rowptr, col, ordered)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    y = torch.randn(x.shape, generator=generator, dtype=F64)
    torch.testing.assert_close(*(torch.autograd.grad(out, weight, y)[0] for out in (ours, expected)))
    assert from_edge_index(edges, nodes)[2] is None


def test_indices_of_a_graph_may_be_narrow() -> None:
    wide, narrow = (window_edges(torch.tensor([0, 4], dtype=dtype), 2) for dtype in (torch.int64, torch.uint8))
    assert all(torch.equal(a, b) for a, b in zip(wide, narrow, strict=True))
    positions = torch.tensor([-128, -1, 0, 127])
    ours = [window_edges(torch.tensor([0, 4]), 1, 127, positions=p) for p in (positions, positions.to(torch.int8))]
    assert all(torch.equal(a, b) for a, b in zip(*ours, strict=True))
    assert ours[0][0].tolist() == [0, 2, 5, 8, 10]


@pytest.mark.parametrize("send", ["after_fill", "never"])
def test_the_linear_module_is_the_operator(send: str) -> None:
    x, offsets, available = draw([5, 2], 3, seed=1)
    module = AlternatingPropagation(3, 4, alpha=0.3, window=(1, -1), send=send)
    assert not list(module.parameters())
    expected = reference.propagate(x, offsets, available=available, window=(1, -1), steps=4, alpha=0.3, send=send)
    torch.testing.assert_close(module(x, offsets, available), expected)


@pytest.mark.parametrize("send", ["after_fill", "never"])
def test_gcnii_with_identity_matrices_is_the_linear_form_of_non_negative_states(send: str) -> None:
    x, offsets, available = draw([5, 2], 3, seed=2)
    module = AlternatingPropagation(3, 2, "gcnii", send=send, dtype=F64)
    for update in module.updates:
        torch.nn.init.eye_(update.weight)
    linear = msacore.propagate(x.abs(), offsets, available=available, steps=2, send=send)
    torch.testing.assert_close(module(x.abs(), offsets, available), linear)


@pytest.mark.parametrize("variant", ["gcnii", "gated"])
def test_learned_variants_train_and_never_let_missing_nodes_send(variant: str) -> None:
    x, offsets, available = draw([5, 2], 3, seed=4)
    module = AlternatingPropagation(3, 2, variant, send="never", dtype=F64)
    x.requires_grad_()
    out = module(x, offsets, available)
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())
    assert f"variant='{variant}'" in repr(module)
    changed = torch.where(available[..., None], x.detach(), x.detach() + 1)
    assert torch.equal(module(changed, offsets, available)[available], out[available])
    filled = AlternatingPropagation(3, 2, variant, send="after_fill", dtype=F64)
    assert not torch.equal(filled(changed, offsets, available)[available], filled(x, offsets, available)[available])


def test_modules_refuse_unknown_settings() -> None:
    with pytest.raises(ValueError, match="`variant`"):
        AlternatingPropagation(3, 2, "sum")
    with pytest.raises(ValueError, match="`send`"):
        AlternatingPropagation(3, 2, send="always")
    with pytest.raises(ValueError, match="`alpha`"):
        AlternatingPropagation(3, 2, alpha=2.0)


@pytest.mark.parametrize("variant", ["linear", "gcnii", "gated"])
def test_modules_run_under_autocast_and_keep_their_inputs_dtype(variant: str) -> None:
    x, offsets, available = draw([5, 2], 3, seed=5, width=8)
    x = x.float().requires_grad_()
    module = AlternatingPropagation(8, 2, variant)
    expected = module(x, offsets, available)
    with torch.autocast("cpu", torch.bfloat16):
        out = module(x, offsets, available)
    out.square().sum().backward()
    assert out.dtype == torch.float32
    assert x.grad is not None and all(p.grad is not None for p in module.parameters())
    torch.testing.assert_close(out, expected, rtol=0.05, atol=0.05)


def test_a_linear_layers_output_meets_float32_weights_under_autocast() -> None:
    x, offsets, _ = draw([5, 2], 3, seed=6, width=8)
    layer, edges = torch.nn.Linear(8, 4), window_edges(offsets, 3)
    nodes = x.float().flatten(0, 1)
    intra, inter = edges, modality_edges(7, 3)
    with torch.autocast("cpu", torch.bfloat16):
        features = layer(nodes)
        out = msacore.graph_propagate(features, *edges)
        alternated = msacore.alternating_graph_propagate(features, intra, inter)
    assert out.dtype == alternated.dtype == torch.bfloat16
    torch.testing.assert_close(out, msacore.graph_propagate(features, edges[0], edges[1], edges[2].bfloat16()))
    (out.float().sum() + alternated.float().sum()).backward()
    assert layer.weight.grad is not None
    with pytest.raises(RuntimeError, match=r"`weight` to have dtype bfloat16, got float32"):
        msacore.graph_propagate(features.detach(), *edges)


def test_the_module_hands_its_options_on() -> None:
    x, offsets, available = draw([5, 2], 3, seed=7)
    positions = torch.tensor([0, 1, 4, 5, 9, -3, 2])
    module = AlternatingPropagation(3, 2, window=2, include_self=False)
    expected = reference.propagate(
        x, offsets, available=available, positions=positions, window=2, include_self=False, steps=2
    )
    torch.testing.assert_close(module(x, offsets, available, positions), expected)
    assert "include_self=False" in repr(module)
    learned = AlternatingPropagation(3, 2, "gated", window=2, include_self=False, dtype=F64)
    assert not torch.equal(learned(x, offsets, available, positions), learned(x, offsets, available))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16], ids=str)
def test_indices_may_be_of_any_integer_dtype(dtype: torch.dtype) -> None:
    x, offsets, _ = draw([5, 2], 3, seed=8)
    positions = torch.tensor([0, 1, 4, 5, 9, 1, 2])
    ours = msacore.propagate(x, offsets.to(dtype), positions=positions.to(dtype), window=2)
    assert torch.equal(ours, msacore.propagate(x, offsets, positions=positions, window=2))
    rowptr, col, weight = window_edges(offsets, 3, dtype=F64)
    ours = msacore.graph_propagate(x.flatten(0, 1), rowptr.to(dtype), col.to(dtype), weight)
    assert torch.equal(ours, msacore.graph_propagate(x.flatten(0, 1), rowptr, col, weight))


def test_numbers_may_be_tensors_without_gradient() -> None:
    x, offsets, _ = draw([5, 2], 3, seed=9)
    ours = msacore.propagate(x, offsets, alpha=torch.tensor(0.25), steps=torch.tensor([2]), window=torch.tensor(1))
    assert torch.equal(ours, msacore.propagate(x, offsets, alpha=0.25, steps=2, window=1))
    for call in (
        lambda alpha: msacore.propagate(x, offsets, alpha=alpha),
        lambda alpha: msacore.graph_propagate(x.flatten(0, 1), *window_edges(offsets, 3, dtype=F64), alpha=alpha),
    ):
        with pytest.raises(RuntimeError, match="`alpha` is not differentiable"):
            call(torch.nn.Parameter(torch.tensor(0.25)))


def test_positions_are_compared_without_overflow() -> None:
    limits = torch.iinfo(torch.int64)
    h = torch.tensor([1.0, 2.0, 4.0, 8.0], dtype=F64).view(4, 1, 1)
    positions = torch.tensor([limits.min, -1, 0, limits.max])
    offsets = torch.tensor([0, 4])
    ours = [
        msacore.window_mean(h, offsets, positions=positions, window=window).flatten().tolist()
        for window in (1, (limits.max, 0), (0, limits.max), -1)
    ]
    assert ours[0] == [1, 3, 3, 8]
    assert ours[1] == [1, 1.5, 3, 6]  # the smallest int64 is 2^63 before 0
    assert ours[2] == [1.5, 3, 6, 8]
    assert ours[3] == [3.75] * 4

"""The steps of greedy centre selection. No gradient: a selection is not differentiable."""

import torch
from torch import Tensor

from msacore.ops._check import check_device, check_dtype, check_floating, check_shape, fail

METRICS = {"euclidean": 0, "cosine": 1}

scan = torch.ops.msacore.kcenter_scan.default
rank = torch.ops.msacore.kcenter_rank.default
greedy = torch.ops.msacore.kcenter_greedy.default
fold = torch.ops.msacore.kcenter_fold.default
count = torch.ops.msacore.kcenter_count.default
products = torch.ops.msacore.kcenter_products.default

SCAN_BLOCK = 4096  # `scan` returns one set of column sums per block of this many rows


def _check_metric(op: str, metric: int) -> None:
    if metric not in METRICS.values():
        fail(op, f"expected `metric` to be 0 (euclidean) or 1 (cosine), got {metric}")


def _check_argument(
    op: str, name: str, value: Tensor, shape: tuple[int, ...], meaning: str, dtype: torch.dtype, like: Tensor
) -> None:
    check_shape(op, name, value, shape, meaning)
    check_dtype(op, name, value, dtype)
    check_device(op, name, value, like)


def _check_pool(op: str, pool: Tensor, rows: Tensor, centers: Tensor, shift: Tensor) -> None:
    check_floating(op, "pool", pool)
    check_shape(op, "pool", pool, (-1, -1), "[N, d]")
    _check_argument(op, "rows", rows, (-1,), "[A]", torch.int64, pool)
    _check_argument(op, "centers", centers, (-1, pool.shape[1]), "[n, d]", torch.float64, pool)
    _check_argument(op, "shift", shift, (pool.shape[1],), "[d]", torch.float64, pool)


@torch.library.register_fake("msacore::kcenter_scan")
def _(pool: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_floating("kcenter_scan", "pool", pool)
    check_shape("kcenter_scan", "pool", pool, (-1, -1), "[N, d]")
    wide, whole = torch.float64, torch.int64
    return (
        pool.new_empty(-(-pool.shape[0] // SCAN_BLOCK), pool.shape[1], dtype=wide),
        pool.new_empty(pool.shape[0], dtype=whole),
        pool.new_empty(1, dtype=wide),
        pool.new_empty(1, dtype=whole),
    )


@torch.library.register_fake("msacore::kcenter_rank")
def _(score: Tensor, *, count: int) -> Tensor:
    check_shape("kcenter_rank", "score", score, (-1,), "[N]")
    check_dtype("kcenter_rank", "score", score, torch.float64)
    if count < 0:
        fail("kcenter_rank", f"expected `count` to be at least 0, got {count}")
    return score.new_empty(min(count, score.shape[0]), dtype=torch.int64)


@torch.library.register_fake("msacore::kcenter_greedy")
def _(
    candidates: Tensor,
    weight: Tensor,
    delta: Tensor,
    index: Tensor,
    group: Tensor,
    room: Tensor,
    bound: Tensor,
    bound_index: Tensor,
    *,
    limit: int,
    metric: int,
) -> tuple[Tensor, Tensor]:
    op = "kcenter_greedy"
    check_floating(op, "candidates", candidates)
    check_shape(op, "candidates", candidates, (-1, -1), "[m, d]")
    m = candidates.shape[0]
    _check_argument(op, "weight", weight, (m,), "[m]", torch.float64, candidates)
    _check_argument(op, "delta", delta, (m,), "[m]", torch.float64, candidates)
    _check_argument(op, "index", index, (m,), "[m]", torch.int64, candidates)
    _check_argument(
        op, "group", group, (m,) if tuple(group.shape) != (0,) else (0,), "[m] or [0]", torch.int64, candidates
    )
    _check_argument(op, "room", room, (-1,), "[G]", torch.int64, candidates)
    _check_argument(op, "bound", bound, (1,), "[1]", torch.float64, candidates)
    _check_argument(op, "bound_index", bound_index, (1,), "[1]", torch.int64, candidates)
    if group.shape[0] and not room.shape[0]:
        fail(op, "expected `room` to have an entry per group, got none")
    if limit < 0:
        fail(op, f"expected `limit` to be at least 0, got {limit}")
    _check_metric(op, metric)
    return index.new_empty(limit), delta.new_empty(limit)


@torch.library.register_fake("msacore::kcenter_fold")
def _(
    pool: Tensor,
    rows: Tensor,
    start: Tensor,
    centers: Tensor,
    shift: Tensor,
    delta: Tensor,
    owner: Tensor,
    *,
    scale: float,
    metric: int,
) -> tuple[Tensor, Tensor]:
    op, selected = "kcenter_fold", rows.shape[:1]
    _check_pool(op, pool, rows, centers, shift)
    _check_metric(op, metric)
    _check_argument(op, "start", start, tuple(selected), "[A]", torch.int64, pool)
    _check_argument(op, "delta", delta, tuple(selected), "[A]", torch.float64, pool)
    _check_argument(op, "owner", owner, tuple(selected), "[A]", torch.int64, pool)
    return delta.new_empty(selected), owner.new_empty(selected)


@torch.library.register_fake("msacore::kcenter_count")
def _(
    pool: Tensor, rows: Tensor, centers: Tensor, shift: Tensor, *, radius: float, scale: float, metric: int
) -> Tensor:
    _check_pool("kcenter_count", pool, rows, centers, shift)
    _check_metric("kcenter_count", metric)
    return rows.new_empty(rows.shape[0])


@torch.library.register_fake("msacore::kcenter_products")
def _(pool: Tensor, rows: Tensor, centers: Tensor, shift: Tensor) -> Tensor:
    _check_pool("kcenter_products", pool, rows, centers, shift)
    return centers.new_empty(rows.shape[0], centers.shape[0])

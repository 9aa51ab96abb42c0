"""Which way a loss with ``group=`` goes: one process, every rank on everything, or every rank on its share."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from msacore.distributed import replicated, sharded
from msacore.distributed.overlap import Started
from msacore.distributed.sharding import Sharding, as_sharding

# Up to so many multiplications of a sweep, the whole batch on every rank costs less than a second round of messages.
MOST_REPLICATED = 1 << 32


def run(op: str, local: Callable[..., Any], group: Any, *rows: Any, **options: Any) -> Any:
    """Call the loss ``op`` over the ranks of ``group``; ``local`` is the operator of one process."""
    sharding = as_sharding(op, group)
    if sharding.world == 1 and sharding.capacity is None:
        first, *others = rows
        others = [x.candidates if isinstance(x, Started) else x for x in others]
        return local(first, *others, **options)
    return _LOSSES[op](local, sharding, *rows, **options)


def _way(sharding: Sharding, products: int) -> Any:
    """A rule on the sizes of the whole batch, which all ranks know alike."""
    if sharding.mode == "auto":
        return replicated if products <= MOST_REPLICATED else sharded
    return {"replicated": replicated, "sharded": sharded}[sharding.mode]


def _info_nce(local: Any, sharding: Sharding, anchors: Any, candidates: Any, **options: Any) -> Tensor:
    c = replicated.contrast(local, sharding, anchors, candidates, **options)
    products = c.of_anchors.total * c.of_candidates.total * c.anchors.shape[1]
    return _way(sharding, products).info_nce(local, sharding, c, **options)


def _hierarchical(
    local: Any,
    sharding: Sharding,
    unimodal: Any,
    fused: Any,
    high_level: Any,
    *,
    available: Any,
    labels: Any,
    **options: Any,
) -> Any:
    embeddings = unimodal, fused, high_level
    layout, available = replicated.hierarchy_layout(local, sharding, *embeddings, available, labels, options)
    pairs = len(high_level)
    terms = pairs + len(unimodal) + pairs * (pairs - 1) // 2
    way = _way(sharding, terms * layout.total**2 * fused.shape[1])
    rows = dict(available=available, labels=labels)
    return way.hierarchical_contrastive_loss(local, sharding, layout, *embeddings, **rows, **options)


def _rank_n_contrast(
    local: Any, sharding: Sharding, embeddings: Any, targets: Any, *, temperature: Any, mask: Any
) -> Tensor:
    layout, mask = replicated.rank_layout(local, sharding, embeddings, targets, temperature, mask)
    way = _way(sharding, layout.total**2 * embeddings.shape[1])
    options = dict(temperature=temperature, mask=mask)
    return way.rank_n_contrast(local, sharding, layout, embeddings, targets, **options)


_LOSSES: dict[str, Callable[..., Any]] = {
    "info_nce": _info_nce,
    "hierarchical_contrastive_loss": _hierarchical,
    "rank_n_contrast": _rank_n_contrast,
}

"""How a loss with ``group=`` is computed: in one process, in full on every rank, or in one share per rank."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from msacore.distributed import replicated, ring, sharded, sweep
from msacore.distributed.overlap import Started
from msacore.distributed.sharding import Sharding, as_sharding

# With at most this many multiplications in a sweep, the whole batch on every rank costs less than a second round of
# messages.
MOST_REPLICATED = 1 << 32


def run(op: str, local: Callable[..., Any], group: Any, *rows: Any, **options: Any) -> Any:
    """Call the loss ``op`` over the ranks of ``group``; ``local`` is the operator of one process."""
    sharding = as_sharding(op, group)
    if sharding.world == 1 and sharding.capacity is None:
        first, *others = rows
        others = [x.candidates if isinstance(x, Started) else x for x in others]
        return local(first, *others, **options)
    return _LOSSES[op](local, sharding, *rows, **options)


def _mode(sharding: Sharding, products: int, held: int) -> str:
    """Choose the mode by the sizes of the whole batch, which are the same on all ranks.

    Args:
        sharding: The ranks.
        products: Multiplications of a sweep over all pairs.
        held: Bytes of the candidates of all ranks.
    """
    if sharding.mode != "auto":
        return sharding.mode
    if products <= MOST_REPLICATED:
        return "replicated"
    return "sharded" if 8 * held <= sharding.memory else "ring"


def _check_gradients(op: str, collective: bool, needed: Sequence[bool]) -> None:
    """A backward pass in which ranks wait for one another must run on all of them or on none."""
    if collective and len(set(needed)) > 1:
        rank, other = needed.index(True), needed.index(False)
        raise RuntimeError(
            f"msacore::{op}: expected arguments that require grad on every rank or on none, as backward is collective; "
            f"rank {rank} has some, rank {other} has none (an empty batch must come from the model too)"
        )


def _shared_by(mode: str) -> Any:
    return {"sharded": sweep, "ring": ring}[mode]


def _info_nce(local: Any, sharding: Sharding, anchors: Any, candidates: Any, **options: Any) -> Tensor:
    c = replicated.contrast(local, sharding, anchors, candidates, **options)
    candidates, width = c.of_candidates.total, c.anchors.shape[1]
    mode = _mode(sharding, c.of_anchors.total * candidates * width, candidates * width * c.anchors.element_size())
    if mode == "ring" and c.started is not None:
        mode = "sharded"  # the rows of all ranks are here, or on their way
    collective = mode != "replicated" or options["reduction"] == "none" or sharding.check
    _check_gradients("info_nce", collective, c.gradients)
    if mode == "replicated":
        return replicated.info_nce(local, sharding, c, **options)
    names = ("temperature", "reduction", "denominator", "normalize", "symmetric", "exclude_self")
    options = {name: options[name] for name in names}
    return sharded.info_nce(local, sharding, c, way=_shared_by(mode), **options)


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
    layout, available, gradients = replicated.hierarchy_layout(local, sharding, *embeddings, available, labels, options)
    pairs = len(high_level)
    terms = pairs + len(unimodal) + pairs * (pairs - 1) // 2
    widths = sum(x.shape[1] for x in (*unimodal, fused, *high_level))
    held = layout.total * widths * fused.element_size()
    mode = _mode(sharding, terms * layout.total**2 * fused.shape[1], held)
    _check_gradients("hierarchical_contrastive_loss", mode != "replicated" or sharding.check, gradients)
    options.update(available=available, labels=labels)
    if mode == "replicated":
        return replicated.hierarchical_contrastive_loss(local, sharding, layout, *embeddings, **options)
    return sharded.hierarchical_contrastive_loss(local, sharding, layout, *embeddings, way=_shared_by(mode), **options)


def _rank_n_contrast(
    local: Any, sharding: Sharding, embeddings: Any, targets: Any, *, temperature: Any, mask: Any
) -> Tensor:
    layout, mask, gradients = replicated.rank_layout(local, sharding, embeddings, targets, temperature, mask)
    # An anchor's terms need all rows in the order of targets, so there is no ring.
    if sharding.mode == "ring":
        raise ValueError(
            'msacore::rank_n_contrast: expected `mode` to be "auto", "replicated" or "sharded", got "ring": the loss '
            "of an anchor needs the rows of all ranks at once"
        )
    mode = _mode(sharding, layout.total**2 * embeddings.shape[1], 0)
    _check_gradients("rank_n_contrast", mode != "replicated" or sharding.check, gradients)
    way: Any = replicated if mode == "replicated" else sharded
    options = dict(temperature=temperature, mask=mask)
    return way.rank_n_contrast(local, sharding, layout, embeddings, targets, **options)


_LOSSES: dict[str, Callable[..., Any]] = {
    "info_nce": _info_nce,
    "hierarchical_contrastive_loss": _hierarchical,
    "rank_n_contrast": _rank_n_contrast,
}

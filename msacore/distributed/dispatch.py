"""Which way a loss with ``group=`` goes: one process, every rank on everything, or every rank on its share."""

from collections.abc import Callable
from typing import Any

from msacore.distributed import replicated, sharded
from msacore.distributed.sharding import Sharding, as_sharding


def run(op: str, local: Callable[..., Any], group: Any, *rows: Any, **options: Any) -> Any:
    """Call the loss ``op`` over the ranks of ``group``; ``local`` is the operator of one process."""
    sharding = as_sharding(op, group)
    if sharding.world == 1 and sharding.capacity is None:
        return local(*rows, **options)
    return _MODES[_mode(op, sharding)][op](local, sharding, *rows, **options)


def _mode(op: str, sharding: Sharding) -> str:
    return "replicated" if sharding.mode == "auto" else sharding.mode


_MODES: dict[str, dict[str, Callable[..., Any]]] = {
    "replicated": {
        "info_nce": replicated.info_nce,
        "hierarchical_contrastive_loss": replicated.hierarchical_contrastive_loss,
        "rank_n_contrast": replicated.rank_n_contrast,
    },
    "sharded": {
        "info_nce": sharded.info_nce,
        "hierarchical_contrastive_loss": sharded.hierarchical_contrastive_loss,
        "rank_n_contrast": sharded.rank_n_contrast,
    },
}

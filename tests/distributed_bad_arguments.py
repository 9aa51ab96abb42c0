"""Arguments that are wrong on one rank, or differ from those of the other ranks; for tests/test_distributed.py."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

import msacore
from msacore.distributed import Sharding

Arguments = dict[str, Any]
Change = tuple[Callable[[Arguments], Any], tuple[str, ...]]  # what one rank passes; words of the message


def _draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), requires_grad=True)


def _replace(*words: str, **arguments: Any) -> Change:
    return (lambda given: given.update(arguments)), words


def _contrast() -> Arguments:
    return {"anchors": _draw(4, 6), "candidates": _draw(4, 6)}


def _hierarchy() -> Arguments:
    wide, narrow = [_draw(4, 6) for _ in range(4)], [_draw(4, 5) for _ in range(3)]
    return {"unimodal": wide[:3], "fused": wide[3], "high_level": narrow}


def _ranked() -> Arguments:
    return {"embeddings": _draw(4, 6), "targets": torch.arange(4.0)}


def _on_meta(name: str) -> Callable[[Arguments], None]:
    return lambda given: given.update({name: given[name].to("meta")})


def _without_gradient(given: Arguments) -> None:
    given.update(tree_map(torch.Tensor.detach, given))


WRONG, UNLIKE = "on rank 1: expected", "to be alike on all ranks, got"
LABELS = torch.zeros(4, dtype=torch.int64)
BASES = {"info_nce": _contrast, "hierarchical_contrastive_loss": _hierarchy, "rank_n_contrast": _ranked}
CHANGES: dict[str, dict[str, Change]] = {
    "info_nce": {
        "dimensions": _replace(WRONG, "`anchors`", anchors=_draw(4)),
        "width": _replace(UNLIKE, "`anchors`", anchors=_draw(4, 7), candidates=_draw(4, 7)),
        "width of an empty batch": _replace(UNLIKE, "`anchors`", anchors=_draw(0, 7), candidates=_draw(0, 7)),
        "rows": _replace(WRONG, "`candidates`", candidates=_draw(5, 6)),
        "dtype of one": _replace(WRONG, "`candidates`", anchors=_draw(4, 6).double()),
        "dtype": _replace(UNLIKE, "float64", anchors=_draw(4, 6).double(), candidates=_draw(4, 6).double()),
        "integers": _replace(WRONG, "int64", anchors=torch.ones(4, 6, dtype=torch.int64)),
        "device of one": (_on_meta("candidates"), (WRONG, "`candidates` on cpu")),
        "array": _replace(WRONG, "NumPy array", anchors=np.zeros((4, 6))),
        "sparse": _replace(WRONG, "sparse_coo", anchors=_draw(4, 6).detach().to_sparse()),
        "nothing": _replace(WRONG, "None", anchors=None),
        "no candidates": _replace(UNLIKE, "`candidates`", candidates=None),
        "another temperature": _replace(UNLIKE, "`temperature`", temperature=0.2),
        "temperature": _replace(WRONG, "`temperature`", temperature=-1.0),
        "learned temperature": _replace(WRONG, "`temperature`", "-0.1", temperature=torch.tensor(-0.1)),
        "labels of one rank": _replace(UNLIKE, "`labels`", labels=(LABELS, LABELS)),
        "rows of labels": _replace(WRONG, "`labels[0]`", labels=(LABELS[:3], LABELS)),
        "weights": _replace(WRONG, "`weights`", weights=-_draw(4, 12).detach().abs()),
        "rows of weights": _replace(WRONG, "`weights`", weights=_draw(3, 12).detach().abs()),
        "queue": _replace(UNLIKE, "`negatives`", negatives=_draw(3, 6)),
        "width of the queue": _replace(WRONG, "`negatives`", negatives=_draw(3, 5)),
        "mask": _replace(WRONG, "`anchor_mask`", anchor_mask=torch.ones(4)),
        "an option": _replace(UNLIKE, "`symmetric`", symmetric=True),
        "a choice": _replace(WRONG, "`reduction`", reduction="all"),
        "ways": _replace(UNLIKE, "`mode`", mode="ring"),
        "memory": _replace(UNLIKE, "`memory`", memory=1 << 20),
        "operator": _replace("different operators", loss="rank_n_contrast"),
    },
    "hierarchical_contrastive_loss": {
        "modalities": _replace(UNLIKE, "`high_level`", unimodal=[_draw(4, 6)] * 2, high_level=[_draw(4, 5)]),
        "pairs": _replace(WRONG, "`high_level`", high_level=[_draw(4, 5)]),
        "mapping": _replace(WRONG, "`unimodal`", unimodal={"text": _draw(4, 6)}),
        "rows": _replace(WRONG, "`fused`", fused=_draw(3, 6)),
        "device": (_on_meta("fused"), (WRONG, "`fused` on cpu")),
        "available": _replace(WRONG, "`available`", available=torch.ones(4, 2, dtype=torch.bool)),
        "available of one rank": _replace(UNLIKE, "`available`", available=torch.ones(4, 3, dtype=torch.bool)),
        "no labels": _replace(WRONG, "`labels`", tier1="intra_modal"),
        "tier weights": _replace(UNLIKE, "`tier_weights`", tier_weights=torch.tensor([0.2, 0.3, 0.6])),
        "temperatures": _replace(UNLIKE, "`temperatures`", temperatures=(0.1, 0.1, 0.4)),
        "learned temperature": _replace(WRONG, "`temperatures[1]`", temperatures=(0.1, torch.tensor(-1.0), 0.1)),
        "results": _replace(UNLIKE, "`return_tiers`", return_tiers=True),
    },
    "rank_n_contrast": {
        "rows": _replace(WRONG, "`targets`", targets=torch.arange(3.0)),
        "kinds of targets": _replace(UNLIKE, "`targets`", targets=torch.arange(4)),
        "widths of targets": _replace(UNLIKE, "`targets`", targets=torch.ones(4, 2)),
        "gradient of targets": _replace("on rank 1", "`targets`", targets=torch.ones(4, requires_grad=True)),
        "mask": _replace(WRONG, "`mask`", mask=torch.ones(3, dtype=torch.bool)),
        "temperature": _replace(WRONG, "`temperature`", temperature=torch.tensor(float("nan"))),
    },
}
# Cases in which ranks wait for one another in the backward pass.
COLLECTIVE: dict[str, Change] = {"no gradient": (_without_gradient, ("rank 1 has none",))}
for _changes in CHANGES.values():
    _changes.update(COLLECTIVE)


def raises(group: Any, rank: int, loss: str, what: str, mode: str) -> str:
    """The message that every rank gets when only rank 1 passes something else."""
    options: dict[str, Any] = {"mode": mode}
    if mode == "with capacity":
        options = {"mode": "replicated", "capacity": 6, "check": True}
    elif what in COLLECTIVE:
        options = {"mode": "sharded"}
    given = BASES[loss]()
    if rank == 1:
        CHANGES[loss][what][0](given)
    options.update({name: given.pop(name) for name in ("mode", "memory") if name in given})
    if "loss" in given:
        loss = given["loss"]
        given = BASES[loss]()
    try:
        getattr(msacore, loss)(**given, group=Sharding(group, **options))
    except (RuntimeError, ValueError) as error:
        return str(error)
    return ""


def uneven_queue(group: Any, rank: int) -> tuple[float, float]:
    """A loss whose queue is split unevenly over the ranks, and the same loss in one process."""
    x, queue = _draw(12, 6), _draw(7, 6)
    shares = queue.split([4, 0, 3])
    own = x[4 * rank : 4 * rank + 4]
    sharding = Sharding(group, capacity=5, mode="replicated", check=True)
    ours = msacore.info_nce(own, own.roll(1, 1), negatives=shares[rank], group=sharding)
    return ours.item(), msacore.info_nce(x, x.roll(1, 1), negatives=queue).item()

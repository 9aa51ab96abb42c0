"""What :func:`msacore.select` accepts: values are checked one by one, then against those of the other ranks."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from msacore.selection import clusters, tree
from msacore.selection.gradients import FactoredPool, GradientEmbeddings
from msacore.selection.job import DEFAULTS, Groups
from msacore.selection.pool import Pool, check_magnitude
from msacore.selection.ranks import Alone, on_device
from msacore.selection.source import as_array

NEED_UNCERTAINTY = ("topk", "uncertainty_kcenter", "mmr", "prefilter")
_FACTORED = ("kmeans++", "lcmd", "random", "topk")
_WITHOUT_FIRST = ("random", "topk")
_ONE_PROCESS = ("typiclust", "probcover")


@dataclass
class Given:
    """The arguments of one call, of one rank."""

    embeddings: Any
    budget: Any
    strategy: str
    uncertainty: Any
    labeled: Any
    candidates: Any
    groups: Any
    max_per_group: Any
    radius: Any
    first: Any
    gamma: Any
    seed: Any
    distance: str
    backend: str
    options: Mapping[str, Any] | None
    state: Any


def _integer(name: str, value: Any, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < low:
        raise ValueError(f"select: expected `{name}` to be an integer of at least {low}, got {value!r}")


def _number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= float(value) < float("inf"):
        raise ValueError(f"select: expected `{name}` to be a number of at least 0, got {value!r}")


def _choice(name: str, value: Any, known: Any) -> None:
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"select: expected `{name}` to be one of {', '.join(known)}, got {value!r}")


def check_values(given: Given, known: Any) -> dict[str, Any]:
    """Check what does not depend on the pool; returns all options, given or default."""
    _choice("strategy", given.strategy, known)
    _choice("distance", given.distance, ("euclidean", "cosine"))
    _choice("backend", given.backend, ("auto", "native", "faiss"))
    if given.radius is not None:
        _number("radius", given.radius)
        if given.strategy != "kcenter":
            raise ValueError(f"select: `radius` is for the strategy kcenter, got {given.strategy!r}")
    if given.budget is None and given.radius is None:
        raise ValueError("select: expected `budget`, or for kcenter a `radius`; got neither")
    if given.budget is not None:
        _integer("budget", given.budget, 0)
    _number("gamma", given.gamma)
    seed = given.seed
    if isinstance(seed, bool) or not isinstance(seed, Integral) or not -(2**63) <= int(seed) < 2**63:
        raise ValueError(f"select: expected `seed` to be a 64-bit integer, got {seed!r}")
    if (given.groups is None) != (given.max_per_group is None):
        raise ValueError("select: expected `groups` and `max_per_group` together, got one without the other")
    if given.max_per_group is not None:
        _integer("max_per_group", given.max_per_group, 1)
    if given.first is not None:
        _integer("first", given.first, 0)
        if given.strategy in _WITHOUT_FIRST:
            raise ValueError(f"select: `first` is for strategies that measure distances, got {given.strategy!r}")
    if isinstance(given.embeddings, GradientEmbeddings) and (
        given.strategy not in _FACTORED or given.distance != "euclidean" or given.backend == "faiss"
    ):
        raise ValueError(
            f"select: gradient embeddings are for {', '.join(_FACTORED)}, euclidean, native; "
            f"got {given.strategy!r}, {given.distance!r}, {given.backend!r}"
        )
    return _checked_options(given.strategy, given.options)


def _checked_options(strategy: str, given: Mapping[str, Any] | None) -> dict[str, Any]:
    options = dict(DEFAULTS)
    if given is not None and not isinstance(given, Mapping):
        raise ValueError(f"select: expected `options` to be a dict, got {type(given).__name__}")
    for key, value in (given or {}).items():
        if key not in DEFAULTS:
            raise ValueError(f"select: unknown option `{key}`; there are {', '.join(DEFAULTS)}")
        options[key] = value
    rules: dict[str, tuple[Callable[[Any], bool], str]] = {
        "mmr_weight": (lambda v: 0 <= v <= 1, "in [0, 1]"),
        "noise": (lambda v: 0 < v < float("inf"), "above 0"),
        "neighbours": (lambda v: v >= 1 and v == int(v), "an integer of at least 1"),
        "factor": (lambda v: 1 <= v < float("inf"), "at least 1"),
        "delta": (lambda v: 0 <= v < float("inf"), "at least 0"),
    }
    for key, (holds, words) in rules.items():
        value = options[key]
        if value is None and key == "delta":
            continue
        if isinstance(value, bool) or not isinstance(value, Real) or not holds(value):
            raise ValueError(f"select: expected option `{key}` to be {words}, got {value!r}")
        number = float(value)
        options[key] = int(number) if isinstance(DEFAULTS[key], int) and number.is_integer() else number
    clusters.check_options(strategy, options)
    return options


def _flat(name: str, value: Any) -> Tensor:
    """An argument as a tensor; text, dicts and ragged lists are refused by name."""
    given = as_array(name, value) if not isinstance(value, Tensor) else value.detach()
    if isinstance(given, Tensor):
        return given
    # torch has no foreign byte orders, and hardly any arithmetic on unsigned integers.
    dtype = np.dtype(np.int64) if given.dtype.kind == "u" else given.dtype.newbyteorder("=")
    return torch.from_numpy(np.array(given, dtype=dtype))


def _indices(name: str, rows: Tensor, total: int) -> Tensor:
    if rows.dtype.is_floating_point or rows.dtype.is_complex or rows.dtype == torch.bool:
        raise ValueError(f"select: expected `{name}` to be int indices [n], got {rows.dtype} {list(rows.shape)}")
    outside = (rows < 0) | (rows >= total)
    if bool(outside.any()):
        wrong = int(rows[int(outside.int().argmax())])
        raise ValueError(f"select: expected `{name}` indices in [0, N = {total}), got {wrong}")
    return rows.long()


class Local:
    """The arguments of one rank, as far as they can be checked without the others."""

    def __init__(self, given: Given, ranks: Alone, known: Any, note: Callable[[str], Any]) -> None:
        self.given = given
        self.options = check_values(given, known)
        if ranks.size > 1 and given.strategy in _ONE_PROCESS:
            raise ValueError(
                f"select: the strategy `{given.strategy}` needs the whole pool in one process, without `group`"
            )
        self.pool: Pool
        if isinstance(given.embeddings, GradientEmbeddings):
            self.pool = FactoredPool(given.embeddings.scale, given.embeddings.features, note)
        else:
            self.pool = Pool(given.embeddings, given.distance, note)
        # A pass over a pool in memory is quick, and errors in the pool are then reported first.
        self.scanned = self.pool.scan(0, self.pool.n) if ranks.size == 1 and self.pool.in_memory else None
        self.uncertainty = self._uncertainty()
        self.labeled = self._labeled()
        self.candidates = self._candidates()
        self.groups = self._groups()

    def message(self) -> dict[str, Any]:
        """What the other ranks need to know."""
        given = self.given
        kinds: dict[str, Any] = {}
        for name, value in (("uncertainty", self.uncertainty), ("groups", self.groups)):
            kinds[f"{name} given"] = value is not None
        for name in ("strategy", "distance", "backend", "budget", "radius", "max_per_group", "gamma", "seed"):
            value = getattr(given, name)
            integer = isinstance(value, Integral)
            kinds[name] = value if value is None or isinstance(value, str) else int(value) if integer else float(value)
        state = given.state.get("checksum") if isinstance(given.state, dict) else None
        agreed = kinds | {
            "width of embeddings": self.pool.width,
            "dtype of embeddings": str(self.pool.dtype),
            "options": sorted(self.options.items(), key=str),
            "state": str(state),
        }
        mask = self.candidates is not None and self.candidates.dtype == torch.bool
        outside = self.labeled is not None and self.labeled.dim() == 2
        return {
            "agreed": agreed,
            "n": self.pool.n,
            "labeled": None if outside else self.labeled,
            "centers": self.labeled if outside else None,
            "candidates": None if mask else self.candidates,
            "mask": mask,
            "groups": None if self.groups is None else self.groups.unique(),
            "first": None if given.first is None else int(given.first),
        }

    def _uncertainty(self) -> Tensor | None:
        if self.given.uncertainty is None:
            if self.given.strategy in NEED_UNCERTAINTY:
                raise ValueError(f"select: the strategy `{self.given.strategy}` needs `uncertainty` [N], got None")
            return None
        u = _flat("uncertainty", self.given.uncertainty).to(self.pool.device, torch.float64)
        if u.shape != (self.pool.n,):
            raise ValueError(f"select: expected `uncertainty` to have shape [N] = [{self.pool.n}], got {list(u.shape)}")
        for bad, what in ((~u.isfinite(), "a NaN or infinite"), (u < 0, "a negative")):
            if bool(bad.any()):
                raise ValueError(f"select: `uncertainty` holds {what} value, first in row {int(bad.int().argmax())}")
        return u

    def _labeled(self) -> Tensor | None:
        if self.given.labeled is None:
            return None
        given = _flat("labeled", self.given.labeled)
        if given.numel() == 0 and given.dim() <= 2:
            return None
        if given.dim() == 1:
            if given.is_floating_point() or given.dtype == torch.bool or given.is_complex():
                raise ValueError(
                    f"select: expected `labeled` to be int indices [n] or centres [n, d], got {given.dtype} [n]"
                )
            return given.to(self.pool.device, torch.int64)
        if given.dim() != 2 or given.shape[1] != self.pool.width:
            raise ValueError(
                "select: expected `labeled` to be indices [n] or centres [n, d] of the pool's width "
                f"{self.pool.width}, got shape {list(given.shape)}"
            )
        centers = given.to(self.pool.device).double()
        bad = ~centers.isfinite().all(1)
        if bool(bad.any()):
            raise ValueError(f"select: `labeled` holds a NaN or infinite value, first in row {int(bad.int().argmax())}")
        check_magnitude("labeled", float(centers.abs().max()) if centers.numel() else 0.0)
        return centers

    def _candidates(self) -> Tensor | None:
        if self.given.candidates is None:
            return None
        given = _flat("candidates", self.given.candidates).to(self.pool.device)
        if given.dim() != 1:
            raise ValueError(f"select: expected `candidates` to be [N] bool or indices [n], got {list(given.shape)}")
        if given.dtype == torch.bool and given.shape != (self.pool.n,):
            raise ValueError(
                f"select: expected a bool `candidates` to have shape [N] = [{self.pool.n}], got {list(given.shape)}"
            )
        if given.dtype == torch.bool:
            return given
        if given.numel() == 0:
            return given.long()
        if given.is_floating_point():
            raise ValueError(f"select: expected `candidates` to be [N] bool or int indices [n], got {given.dtype} [n]")
        return given.long()

    def _groups(self) -> Tensor | None:
        if self.given.groups is None:
            return None
        given = _flat("groups", self.given.groups)
        if given.numel() and (given.is_floating_point() or given.is_complex() or given.dtype == torch.bool):
            raise ValueError(f"select: expected `groups` to hold integers, got {given.dtype}")
        if given.shape != (self.pool.n,):
            raise ValueError(f"select: expected `groups` to have shape [N] = [{self.pool.n}], got {list(given.shape)}")
        return given.to(self.pool.device, torch.int64)


@dataclass
class Joined:
    """The arguments of all ranks together, the same on all of them except for what belongs to a rank's own rows."""

    offset: int
    total: int
    centers: Tensor | None  # from outside the pool
    labeled: Tensor | None  # rows of the pool, ascending
    open_rows: Tensor
    rest: Tensor
    candidates: Tensor | None
    groups: Groups | None
    first: int | None


def join(local: Local, messages: list[dict[str, Any]], ranks: Alone) -> Joined:
    """Check the arguments of all ranks against each other.

    Raises:
        ValueError: Something that must be equal differs between ranks, or is out of range; the same on all ranks.
    """
    _check_agreement(messages)
    device = local.pool.device
    messages = [on_device(message, device) for message in messages]
    counts = [message["n"] for message in messages]
    offset, total = sum(counts[: ranks.rank]), sum(counts)
    own = slice(offset, offset + local.pool.n)
    everyone = torch.ones(local.pool.n, dtype=torch.bool, device=device)
    open_rows, rest = everyone, everyone.clone()

    def mark(rows: Tensor) -> Tensor:
        mask = torch.zeros_like(everyone)
        mask[rows[(rows >= own.start) & (rows < own.stop)] - offset] = True
        return mask

    def gathered(key: str) -> Tensor | None:
        there = [message[key] for message in messages if message[key] is not None]
        return torch.cat(there) if there else None

    labeled, centers = gathered("labeled"), gathered("centers")
    if labeled is not None and centers is not None:
        raise ValueError("select: expected `labeled` to be indices or centres on all ranks, got both")
    if labeled is not None:
        labeled = _indices("labeled", labeled, total).unique()
        rest = ~mark(labeled)
        open_rows = rest.clone()
    chosen, candidates = gathered("candidates"), None
    if chosen is not None:
        candidates = mark(_indices("candidates", chosen, total))
    elif any(message["mask"] for message in messages):
        candidates = everyone if local.candidates is None else local.candidates
    if candidates is not None:
        open_rows = open_rows & candidates
    firsts = {message["first"] for message in messages} - {None}
    if len(firsts) > 1:
        raise ValueError(f"select: expected one `first`, got {sorted(firsts)}")
    first = next(iter(firsts), None)
    if first is not None:
        if first >= total:
            raise ValueError(f"select: expected `first` in [0, N = {total}), got {first}")
        if labeled is not None or centers is not None:
            raise ValueError("select: `first` is the first pick where there is no centre, but `labeled` gives centres")
    groups = None
    names = gathered("groups")
    if names is not None and local.groups is not None:
        names = names.unique()
        number = torch.searchsorted(names, local.groups)
        room = torch.full_like(names, int(local.given.max_per_group))
        groups = Groups(number, room)
    return Joined(offset, total, centers, labeled, open_rows.clone(), rest, candidates, groups, first)


def _check_agreement(messages: list[dict[str, Any]]) -> None:
    for key, value in messages[0]["agreed"].items():
        for rank, message in enumerate(messages):
            other = message["agreed"][key]
            if other != value:
                raise ValueError(
                    f"select: expected `{key}` to be equal on all ranks, got {value!r} on rank 0 and {other!r} on rank "
                    f"{rank}"
                )
    masks = [message["mask"] for message in messages if message["n"] or message["mask"]]
    if any(masks) and not all(masks):
        raise ValueError("select: expected a bool `candidates` on all ranks or on none")


def limits(joined: Joined, ranks: Alone) -> int:
    """Subtract the labelled rows from their groups' room; returns how many rows may be picked in all."""
    groups = joined.groups
    if groups is None:
        return sum(ranks.share(lambda: int(joined.open_rows.sum())))

    def counts() -> Tensor:
        size = len(groups.room)
        taken = torch.bincount(groups.number[~joined.rest], minlength=size)
        return torch.stack([taken, torch.bincount(groups.number[joined.open_rows], minlength=size)])

    taken, there = sum(on_device(one, groups.room.device) for one in ranks.share(counts))
    groups.room = (groups.room - taken).clamp_min(0)
    return int(torch.minimum(there, groups.room).sum())


def row_digest(values: Tensor | None, joined: Joined, ranks: Alone) -> str:
    """Digest of one number per row of the whole pool; empty for None."""
    if values is None:
        return ""
    wide = values if values.dtype == torch.float64 else values.long()
    head = f"{joined.total} {wide.dtype}"
    return tree.joined_digest(head, ranks.share(lambda: tree.digests(wide, joined.offset)))

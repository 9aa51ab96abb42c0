"""One selection: its arguments, what it has picked so far, and the steps in which the ranks agree."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from msacore.ops import kcenter
from msacore.selection import state, tree
from msacore.selection.engine import Native
from msacore.selection.pool import Pool
from msacore.selection.ranks import Alone, on_device

DEFAULTS: dict[str, Any] = {"mmr_weight": 0.5, "noise": 1e-6, "neighbours": 20, "factor": 5, "delta": None}


@dataclass
class Groups:
    """Groups of samples, each with a limit on its picks.

    Attributes:
        number: Group of each row held here, ``[n]`` int64 in ``[0, G)``.
        room: How many more picks each group may get, ``[G]`` int64; the same on all ranks.
    """

    number: Tensor
    room: Tensor

    def full(self) -> Tensor:
        return (self.room <= 0)[self.number]


@dataclass
class Job:
    """What a strategy works on. Rows held here are numbered from 0; picks are numbered in the whole pool.

    Attributes:
        pool: The rows held here.
        ranks: The ranks that take part.
        budget: Total number of picks at most.
        identity: Everything the picks depend on; a state of another identity is refused.
        uncertainty: ``[n]`` float64, or None.
        centers: Labelled centres, ``[c, d]`` float64, the same on all ranks.
        open_rows: Rows that may be picked, ``[n]`` bool.
        rest: Rows that are neither labelled nor picked, ``[n]`` bool.
        options: Every option, given or default.
        seed: Seed of the random strategies.
        engine: The engine for nearest-neighbour queries.
        groups: Limits on the picks of each group, or None.
        radius: Where "kcenter" may stop, or None.
        first: The first pick where there is no centre, or None.
        report: Called with the number of new picks and a function that returns the state at that moment.
        rounds: Picks so far and their scores, in parts.
        made: Number of picks so far.
    """

    pool: Pool
    ranks: Alone
    budget: int
    identity: dict[str, Any]
    uncertainty: Tensor | None
    centers: Tensor
    open_rows: Tensor
    rest: Tensor
    options: dict[str, Any]
    seed: int
    engine: Native
    groups: Groups | None = None
    radius: float | None = None
    first: int | None = None
    report: Callable[[int, Callable[[], dict[str, Any]]], Any] = lambda made, state: None
    rounds: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    made: int = 0

    def __post_init__(self) -> None:
        if self.groups is not None:
            self.open_rows &= ~self.groups.full()
        self.open_before = self.open_rows.clone()
        self.room_before = None if self.groups is None else self.groups.room.clone()

    def needed_uncertainty(self) -> Tensor:
        if self.uncertainty is None:
            raise ValueError(f"select: the strategy `{self.identity['strategy']}` needs `uncertainty` [N], got None")
        return self.uncertainty

    @property
    def left(self) -> int:
        return self.budget - self.made

    def share(self, message: Callable[[], Any]) -> list[Any]:
        """The messages of all ranks, on this pool's device."""
        return [on_device(one, self.pool.device) for one in self.ranks.share(message)]

    def from_first(self, message: Callable[[], Any]) -> Any:
        return on_device(self.ranks.from_first(message), self.pool.device)

    def held(self, rows: Tensor) -> Tensor:
        """Which of ``rows`` of the whole pool are held here, ``[k]`` bool."""
        return (rows >= self.pool.offset) & (rows < self.pool.offset + self.pool.n)

    def fetch(self, rows: Tensor) -> Tensor:
        """Rows of the whole pool as centres, ``[k, d]`` float64."""
        if self.ranks.size == 1:
            return self.pool.centers(rows)
        out = torch.empty(len(rows), self.pool.width, dtype=torch.float64, device=self.pool.device)

        def mine() -> dict[str, Tensor]:
            at = self.held(rows).nonzero()[:, 0]
            return {"at": at, "rows": self.pool.gather(rows[at] - self.pool.offset)}

        for message in self.share(mine):
            out[message["at"]] = message["rows"].double()
        return out

    def add(self, indices: Tensor, scores: Tensor, groups: Tensor | None = None) -> None:
        """Record picks, and close the groups that are full. ``groups`` ``[k]`` is needed where there are any."""
        own = indices[self.held(indices)] - self.pool.offset
        self.open_rows[own] = False
        self.rest[own] = False
        if self.groups is not None and groups is not None:
            self.groups.room -= torch.bincount(groups, minlength=len(self.groups.room))
            self.open_rows &= ~self.groups.full()
        self.rounds.append((indices, scores.to(torch.float64)))  # one step: an interrupt may come between two steps
        self.made += len(indices)
        self.report(len(indices), self.state)

    def groups_of(self, rows: Tensor) -> Tensor:
        """Group of rows held here, numbered from 0, or nothing where there are no groups."""
        return rows[:0] if self.groups is None else self.groups.number[rows]

    def picked(self) -> Tensor:
        """Picks so far, in order."""
        none = torch.empty(0, dtype=torch.int64, device=self.pool.device)
        return torch.cat([none, *(indices for indices, _ in self.rounds)])

    def picked_scores(self) -> Tensor:
        none = torch.empty(0, dtype=torch.float64, device=self.pool.device)
        return torch.cat([none, *(scores for _, scores in self.rounds)])

    def all_centers(self) -> Tensor:
        """Labelled centres and picks."""
        picked = self.picked()
        return torch.cat([self.centers, self.fetch(picked)]) if len(picked) else self.centers

    def best(self, score: Callable[[], Tensor]) -> dict[str, Tensor]:
        """The open row of highest score ``[n]``, smallest index among equals.

        Returned as "index" and "score" ``[1]``, its centre "rows" ``[1, d]`` and its "group". A row of score -inf is
        not taken; there must be another one.
        """

        def offer() -> dict[str, Any] | None:
            value = score().where(self.open_rows, -torch.inf)
            row = kcenter.rank(value, count=1)
            if not len(row) or not bool(value[row] > -torch.inf):
                return None
            return {
                "index": row + self.pool.offset,
                "score": value[row],
                "rows": self.pool.centers(row),
                "group": self.groups_of(row),
            }

        offers = [one for one in self.share(offer) if one is not None]
        return max(offers, key=lambda one: (float(one["score"]), -int(one["index"])))

    def take(self, best: dict[str, Tensor], score: Tensor | None = None) -> None:
        """Record the row that :meth:`best` found, with its score or another."""
        self.add(best["index"], best["score"] if score is None else score, best["group"])

    def add_first(self, score: Callable[[], Tensor]) -> dict[str, Tensor]:
        """Pick the row of highest score where there is no centre yet to measure from."""
        best = self.best(score)
        self.take(best, torch.tensor([torch.inf], device=self.pool.device))
        return best

    def add_in_order(self, order: Callable[[], Tensor], named: float | None = None) -> None:
        """Make the remaining picks by descending score ``[n]``, smallest index among equals, as far as groups allow.

        The picks have these scores, or all of them the score ``named``.
        """

        def offer() -> dict[str, Tensor]:
            score = order()
            rows = self.open_rows.nonzero()[:, 0]
            # A row beyond its group's room has enough rows of the group before it here, and so among all ranks too.
            count = len(rows) if self.groups is not None else min(self.left, len(rows))
            rows = rows[kcenter.rank(score[rows], count=count)]
            rows = rows[self._admitted(self.groups_of(rows), len(rows))][: self.left]
            return {"index": rows + self.pool.offset, "score": score[rows], "group": self.groups_of(rows)}

        offers = self.share(offer)
        index, score, group = (tree.concatenated(offers, key) for key in ("index", "score", "group"))
        by_index = index.argsort()
        ranked = by_index[kcenter.rank(score[by_index], count=len(index))]
        group = group[ranked] if len(group) else group
        chosen = self._admitted(group, len(ranked)).nonzero()[: self.left, 0]
        score = score[ranked[chosen]] if named is None else torch.full((len(chosen),), named, device=self.pool.device)
        self.add(index[ranked[chosen]], score, group[chosen] if len(group) else None)

    def _admitted(self, groups: Tensor, count: int) -> Tensor:
        """Whether each pick, in this order, still has room in its group, ``[count]`` bool."""
        if self.groups is None:
            return torch.ones(count, dtype=torch.bool, device=self.pool.device)
        return tree.occurrence(groups) < self.groups.room[groups]

    def state(self) -> dict[str, Any]:
        """Plain tensors, numbers and text: survives ``torch.save`` and ``torch.load(weights_only=True)``."""
        return state.pack(self.identity, self.budget, self.picked().cpu(), self.picked_scores().cpu())

    def resume(self, given: Any) -> None:
        """Continue from a state.

        Raises:
            ValueError: The state is not one, is damaged, is of another selection, or holds rows that may not be picked.
        """
        picked, scores = state.unpack(given, self.identity, self.budget, self.pool.total)
        if not len(picked):
            return
        picked = picked.to(self.pool.device)

        def mine() -> dict[str, Any]:
            own = picked[self.held(picked)] - self.pool.offset
            at = self.held(picked).nonzero()[:, 0]
            return {"closed": int((~self.open_rows[own]).sum()), "at": at, "group": self.groups_of(own)}

        messages = self.share(mine)
        if any(message["closed"] for message in messages):
            raise ValueError("select: `state` holds picks that are labelled, not candidates, or of a full group")
        groups = None
        if self.groups is not None:
            groups = torch.empty_like(picked)
            for message in messages:
                groups[message["at"]] = message["group"]
            if bool((torch.bincount(groups, minlength=len(self.groups.room)) > self.groups.room).any()):
                raise ValueError("select: `state` holds more picks of a group than `max_per_group` allows")
        self.add(picked, scores.to(self.pool.device), groups)

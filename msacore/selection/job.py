"""One selection: its arguments, what it has picked so far, and the state from which it can go on."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from msacore.ops import kcenter
from msacore.selection.engine import Native
from msacore.selection.pool import Pool

FORMAT = 1
DEFAULTS: dict[str, Any] = {"mmr_weight": 0.5, "noise": 1e-6, "neighbours": 20, "factor": 5, "delta": None}


def digest(value: Tensor | None) -> str:
    """Checksum of a small tensor; empty for None."""
    if value is None:
        return ""
    raw = value.detach().cpu().contiguous()
    return hashlib.sha256(f"{list(raw.shape)}".encode() + raw.numpy().tobytes()).hexdigest()


@dataclass
class Job:
    """What a strategy works on.

    Attributes:
        pool: The samples.
        budget: Total number of picks.
        identity: Everything the picks depend on; a state of another identity is refused.
        uncertainty: ``[N]`` float64, or None.
        centers: Labelled centres, ``[n, d]`` float64.
        open_rows: Samples that may be picked, ``[N]`` bool.
        options: Every option, given or default.
        seed: Seed of the random strategies.
        engine: Which engine answers nearest-neighbour questions.
        report: Called with the number of new picks.
        memory: What the strategy must keep between calls.
        rounds: Picks so far and their scores, in parts.
        made: Number of picks so far.
    """

    pool: Pool
    budget: int
    identity: dict[str, Any]
    uncertainty: Tensor | None
    centers: Tensor
    open_rows: Tensor
    options: dict[str, Any]
    seed: int
    engine: Native
    report: Callable[[int], Any] = lambda made: None
    memory: dict[str, Any] = field(default_factory=dict)
    rounds: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    made: int = 0

    def needed_uncertainty(self) -> Tensor:
        if self.uncertainty is None:
            raise ValueError(f"select: the strategy `{self.identity['strategy']}` needs `uncertainty` [N], got None")
        return self.uncertainty

    @property
    def left(self) -> int:
        return self.budget - self.made

    def add(self, indices: Tensor, scores: Tensor) -> None:
        """Record picks."""
        self.open_rows[indices] = False
        self.rounds.append((indices, scores.to(torch.float64)))  # in one step, for an interrupt may come between two
        self.made += len(indices)
        self.report(len(indices))

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
        return torch.cat([self.centers, self.pool.centers(picked)]) if len(picked) else self.centers

    def best(self, score: Tensor) -> Tensor:
        """The open sample of highest score, smallest index among equals, as ``[1]``."""
        return kcenter.rank(score.where(self.open_rows, -torch.inf), count=1)

    def add_first(self, score: Tensor) -> None:
        """Pick the sample of highest score where there is no centre yet to measure from."""
        self.add(self.best(score), torch.tensor([torch.inf], device=self.pool.device))

    def state(self) -> dict[str, Any]:
        """Plain tensors, numbers and text: survives ``torch.save`` and ``torch.load(weights_only=True)``."""
        return {
            "format": FORMAT,
            "identity": dict(self.identity),
            "budget": self.budget,
            "indices": self.picked().cpu(),
            "scores": self.picked_scores().cpu(),
            "memory": {k: v.detach().cpu().clone() if isinstance(v, Tensor) else v for k, v in self.memory.items()},
        }

    def resume(self, state: Any) -> None:
        """Go on where ``state`` ends.

        Raises:
            ValueError: The state is none, is of another selection, or holds more picks than the budget.
        """
        keys = {"format", "identity", "budget", "indices", "scores", "memory"}
        if not isinstance(state, dict) or set(state) != keys or state["format"] != FORMAT:
            raise ValueError("select: expected `state` to be the `.state` of an earlier Selection")
        for key, mine in self.identity.items():
            theirs = state["identity"].get(key)
            if theirs != mine:
                shown = (
                    f": {theirs!r} there, {mine!r} here" if key not in ("embeddings", "labeled", "uncertainty") else ""
                )
                raise ValueError(f"select: `state` belongs to a selection with another `{key}`{shown}")
        if self.identity["strategy"] in ("prefilter", "typiclust") and state["budget"] != self.budget:
            raise ValueError(
                f"select: `{self.identity['strategy']}` depends on the budget and resumes only to its original one, "
                f"{state['budget']}, got {self.budget}"
            )
        picked = state["indices"].to(self.pool.device)
        if len(picked) > self.budget:
            raise ValueError(f"select: `state` already holds {len(picked)} picks, more than the budget {self.budget}")
        device = self.pool.device
        self.memory = {k: v.to(device).clone() if isinstance(v, Tensor) else v for k, v in state["memory"].items()}
        if len(picked):
            self.add(picked, state["scores"].to(device))

"""The labels bought before there is a model: some rows are drawn at random, others tell most about all the rest."""

from __future__ import annotations

import torch
from torch import Tensor

from examples.msa.checkpoint import derive
from examples.msa.closed_form import NEARBY

from .acquire import SelectionConfig
from .data import Data
from .path import LENGTHS, LearnedScale, bumps, coordinates

# The covariance matrix covers at most this many rows: 128 MB.
LIMIT = 4000


def first_count(data: Data, config: SelectionConfig) -> int:
    """Number of labels bought before the first training: a share of the train rows that have a label, at least one.

    Raises:
        ValueError: The share is outside (0, 1].
    """
    if not 0.0 < config.initial <= 1.0:
        raise ValueError(f"the initial share of labels must lie in (0, 1], got {config.initial}: no labelled sample")
    return max(1, round(config.initial * len(data.buyable)))


def first_labels(data: Data, config: SelectionConfig, seed: int, learned: Tensor | None = None) -> list[int]:
    """The rows whose labels are bought before the first training, in the order they are bought.

    Args:
        data: The corpus; no label of it is read.
        config: Protocol.
        seed: Seed of the draw.
        learned: Embedding learned before labels ``[N, k]``; not needed where all rows are drawn at random.
    """
    count = first_count(data, config)
    return choose_first(data, data.buyable, count, data.given, config, derive(seed, "first labels"), learned)[0]


def choose_first(
    data: Data,
    candidates: Tensor,
    count: int,
    known: Tensor,
    config: SelectionConfig,
    seed: int,
    learned: Tensor | None = None,
) -> tuple[list[int], list[float]]:
    """Choose among the candidates without a model: first at random, then a share ``config.informative`` by what the
    rows tell about the rest.

    Returns:
        The rows in pick order, and for each the variance that :func:`informative_rows` says it removes, 0 for rows
        drawn at random.
    """
    order = torch.randperm(len(candidates), generator=torch.Generator().manual_seed(seed))
    asked = round(config.informative * count) if count < len(order) else 0
    drawn = candidates[order[: count - asked].to(candidates.device)]
    if not asked:
        return drawn.tolist(), [0.0] * count
    assert learned is not None
    rows, lowered = informative_rows(data, candidates, asked, torch.cat([known, drawn]), learned, seed)
    return drawn.tolist() + rows.tolist(), [0.0] * len(drawn) + lowered.tolist()


def informative_rows(
    data: Data, candidates: Tensor, count: int, known: Tensor, learned: Tensor, seed: int
) -> tuple[Tensor, Tensor]:
    """Rows that tell most about the train part under the mean of two kernels: one on the first modality with its
    neighbours, one on the embedding learned before labels.

    Args:
        data: The corpus; no label of it is read.
        candidates: Rows that may be picked.
        count: Number of rows to pick, at most the number of candidates that are not known.
        known: Rows whose labels are known already.
        learned: The embedding learned before labels ``[N, k]``.
        seed: Seed of the sample of rows that is used where there are more than ``LIMIT``.

    Returns:
        The rows in pick order ``[count]``, and by how much each lowers the sum of variances, float64.
    """
    open_rows = candidates[~torch.isin(candidates, known)]
    rest = data.train[~torch.isin(data.train, torch.cat([known, open_rows]))]
    generator = torch.Generator().manual_seed(seed)
    groups = [known]
    for group, least in ((open_rows, count), (rest, 0)):
        size = max(least, min(len(group), (LIMIT - len(known)) * len(group) // max(1, len(open_rows) + len(rest))))
        drawn = torch.randperm(len(group), generator=generator)[:size]
        groups.append(group[drawn.to(group.device)].sort().values)
    rows, places = torch.cat(groups), torch.arange(sum(map(len, groups)), device=known.device)
    own = data.design.modalities[0]
    blocks = [(c.start, c.stop) for c in (data.design.columns[own], data.design.columns[own + NEARBY])]
    z = LearnedScale.of(learned, data.train)(learned[rows])
    covariance = torch.zeros(len(rows), len(rows), dtype=torch.float64, device=rows.device)
    for points in (coordinates(blocks, data.inputs.design[rows], None), coordinates((), data.inputs.design, z)):
        covariance += bumps(points, points, LENGTHS[0]) / 2
    free = (places >= len(known)) & (places < len(known) + len(groups[1]))
    positions, lowered = experimental_design(covariance, count, free, len(known))
    return rows[positions.to(rows.device)].cpu(), lowered


def experimental_design(
    covariance: Tensor, count: int, candidates: Tensor, known: int, noise: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Greedy transductive experimental design (Yu, Bi and Tresp, 2006; a single pick: Cohn, 1996).

    Each pick is the row that most lowers the sum of the variances of all rows, under a Gaussian process that is
    observed with noise. Ties go to the first row.

    Args:
        covariance: float64 ``[n, n]``.
        count: Number of picks.
        candidates: bool ``[n]``: rows that may be picked.
        known: Number of rows at the start that are observed already.
        noise: Variance of the noise.

    Returns:
        Positions in pick order, int64 ``[count]``, and by how much each lowered the sum.
    """
    # The covariance given what is observed is the first one less ``taken.T @ taken``.
    taken = covariance.new_zeros(known + count, len(covariance))
    variance, power = covariance.diagonal().clone(), torch.linalg.vecdot(covariance, covariance)
    free = candidates.clone()

    def observe(t: int, i: int) -> None:
        before = taken[:t]
        with_all = covariance[i] - before[:, i] @ before
        share = with_all / (with_all[i] + noise)
        along = covariance @ with_all - (before @ with_all) @ before
        power.add_(share.square() * (with_all @ with_all) - 2 * share * along)
        variance.sub_(share * with_all)
        taken[t] = share * (with_all[i] + noise).sqrt()
        free[i] = False

    for i in range(known):
        observe(i, i)
    picks, lowered = [], []
    for t in range(count):
        gain = torch.where(free, power / (variance + noise), -torch.inf)
        best = int(gain.argmax())
        picks.append(best)
        lowered.append(float(gain[best]))
        observe(known + t, best)
    return torch.tensor(picks, dtype=torch.int64), torch.tensor(lowered, dtype=torch.float64)

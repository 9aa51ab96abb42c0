"""Figures of the reports: curves with bands, heat maps, bars with intervals, maps of embeddings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .metrics import mean_interval

# Okabe and Ito: distinguishable with colour-blind vision as well.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555", "#B8A800")
SIZE = (6.4, 3.8)


def curves(
    x: Sequence[float],
    runs: Mapping[str, np.ndarray],
    xlabel: str,
    ylabel: str,
    log_x: bool = False,
    within: tuple[float, float] = (-np.inf, np.inf),
) -> Figure:
    """Mean over runs with its 95 % t-interval as a band; fewer than three runs get no band, as it would say nothing.

    Args:
        x: Label counts or missing rates, ``[P]``.
        runs: One array ``[runs, P]`` per line.
        xlabel: Axis text.
        ylabel: Axis text.
        log_x: Logarithmic x axis, as for label counts.
        within: Least and greatest possible value; bands end there.
    """
    figure, axes = _figure()
    for i, (name, values) in enumerate(runs.items()):
        points = [mean_interval(column) for column in np.asarray(values, dtype=float).T]
        colour = COLOURS[i % len(COLOURS)]
        axes.plot(x, [p["mean"] for p in points], color=colour, marker="o", markersize=3, linewidth=1.6, label=name)
        if len(values) > 2:
            low, high = (np.clip([p[k] for p in points], *within) for k in ("low", "high"))
            axes.fill_between(x, low, high, color=colour, alpha=0.15, lw=0)
    if log_x:
        axes.set_xscale("log")
        axes.set_xticks(list(x), [f"{v:g}" for v in x])
        axes.minorticks_off()
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.legend(frameon=False, fontsize=8)
    return figure


def heat_map(values: np.ndarray, rows: Sequence[str], columns: Sequence[str], xlabel: str, ylabel: str) -> Figure:
    """A matrix with its numbers written into the cells; nan cells stay empty."""
    figure, axes = _figure()
    values = np.asarray(values, dtype=float)
    image = axes.imshow(values, cmap="viridis", aspect="auto")
    axes.grid(False)
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    for (i, j), value in np.ndenumerate(values):
        if np.isfinite(value):
            light = image.norm(value) < 0.6
            axes.text(j, i, f"{value:.3f}", ha="center", va="center", fontsize=8, color="white" if light else "black")
    axes.set(xlabel=xlabel, ylabel=ylabel)
    figure.colorbar(image, ax=axes)
    return figure


def bars(groups: Mapping[str, Sequence[float]], xlabel: str, reference: float | None = None) -> Figure:
    """Mean and 95 % t-interval of each group of runs, with the runs as dots.

    Args:
        groups: Values of the runs, by name.
        xlabel: Axis text.
        reference: A level to mark with a dashed line (0 for paired differences).
    """
    figure, axes = _figure((SIZE[0], 1.2 + 0.42 * len(groups)))
    for i, values in enumerate(groups.values()):
        stats = mean_interval(values)
        half = stats["high"] - stats["mean"]
        axes.errorbar(stats["mean"], i, xerr=half if np.isfinite(half) else None, fmt="o", capsize=3, color=COLOURS[0])
        axes.plot(values, np.full(len(values), i), ".", color=COLOURS[0], alpha=0.45, markersize=6)
    axes.set_yticks(range(len(groups)), list(groups))
    if reference is not None:
        axes.axvline(reference, color="#555555", linestyle="--", linewidth=1)
    axes.set_ylim(len(groups) - 0.5, -0.5)
    axes.set(xlabel=xlabel)
    return figure


def embedding_map(embedding: np.ndarray, colour: np.ndarray, what: str, categories: Sequence[str] = ()) -> Figure:
    """First two principal components of an embedding, coloured by a value or by categories.

    Args:
        embedding: ``[N, d]``, ``d >= 2``.
        colour: Value of each row, ``[N]``; with ``categories``, the number of its category.
        what: What the colour shows.
        categories: Names of the categories; a colour bar is drawn without them.
    """
    centred = np.asarray(embedding, dtype=float) - np.mean(embedding, axis=0)
    _, spread, axes_of = np.linalg.svd(centred, full_matrices=False)
    plane = centred @ axes_of[:2].T
    share = spread[:2] ** 2 / max(float((spread**2).sum()), 1e-30)
    figure, axes = _figure()
    if categories:
        for i, name in enumerate(categories):
            rows = np.asarray(colour) == i
            axes.scatter(*plane[rows].T, s=9, alpha=0.7, color=COLOURS[i % len(COLOURS)], label=name, rasterized=True)
        axes.legend(frameon=False, fontsize=8, title=what)
    else:
        points = axes.scatter(*plane.T, s=9, alpha=0.7, c=colour, cmap="coolwarm", rasterized=True)
        figure.colorbar(points, ax=axes, label=what)
    axes.set(xlabel=f"first component ({share[0]:.0%} of variance)", ylabel=f"second ({share[1]:.0%})")
    return figure


def _figure(size: tuple[float, float] = SIZE) -> tuple[Figure, Axes]:
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    return figure, axes

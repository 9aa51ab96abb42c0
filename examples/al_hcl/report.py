"""The page of an AL-HCL experiment: what was gained over random selection, by which part, with which labels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from examples.msa import plots
from examples.msa.baselines import fit_boosting
from examples.msa.headline import against_best, headline
from examples.msa.metrics import HIGHER_IS_BETTER, NAMES, evaluate, limits, mean_interval
from examples.msa.protocols import add_checkpoints, add_patterns
from examples.msa.report import Report, Section

from .arms import ALL_LABELS, MARGIN, RANDOM, REFERENCE
from .experiment import Experiment

LEAD = (
    "Active learning with hierarchical contrastive learning and fusion guidance, re-implemented from the abstract and "
    "the published code, whose slips are corrected; contrast before the first label and a closed-form path are our own "
    "additions. Curves give test scores. Every label used for training, selection or stopping is counted: "
    "models and hyper-parameters are chosen on the labels bought so far, by leaving out whole videos. Runs with equal "
    "seeds start from equal labels, so differences are paired; all seeds share one test part, so their spread says "
    "nothing about other test parts."
)


def build_report(experiment: Experiment, run: dict[str, Any]) -> Report:
    """Sections, figures and the JSON numbers of a finished experiment."""
    summary, main = experiment.summary(), experiment.metrics[0]
    baselines = experiment.baselines()
    boosting = gradient_boosting(experiment)
    ahead = [against_best(m, experiment.areas(m)[REFERENCE], _every_baseline(experiment, m)) for m in (main, "mae")]
    data = {
        "summary": summary,
        "baselines": baselines,
        "gradient_boosting": boosting,
        "labels_given": len(experiment.data.given),
        "against_best": ahead,
        "runs": experiment.runs(),
    }
    report = Report(f"AL-HCL on {experiment.corpus.name}", LEAD, data, run)
    counts = summary[REFERENCE]["labels"]
    report.headline = headline(
        "AL-HCL", f"area under the curve on the test part from {counts[0]} to {counts[-1]} labels", ahead
    )
    _result(report.section("Result"), experiment, summary, boosting)
    _baselines(report.section("Against baselines with the same labels"), experiment, baselines)
    _curves(report.section("Learning curves"), experiment)
    names = [a.name for a in experiment.arms if a.selection.rounds and a.name not in (REFERENCE, RANDOM, MARGIN)]
    if names:
        _ablation(report.section("Ablations"), experiment, summary, names)
    last = {name: [state.records[-1] for state in states] for name, states in experiment.states.items()}
    add_checkpoints(report, experiment.metrics, last, "labelled videos left out")
    add_patterns(report, experiment.metrics, last)
    _selected(report.section("Selected samples"), experiment)
    _parts(report.section("What the predictions are made of"), experiment)
    _maps(report.section("Embeddings"), experiment)
    _times(report.section("Time per stage"), summary)
    return report


def gradient_boosting(experiment: Experiment) -> dict[str, float | bool | int]:
    """Test scores of gradient boosting on all modalities and neighbours, with every label of the train part."""
    data, corpus = experiment.data, experiment.corpus
    rows = torch.cat([data.buyable, data.given]).cpu().numpy()
    test = data.test.cpu().numpy()
    prediction = fit_boosting(data.design.values, corpus.labels, rows)
    return evaluate(prediction[test], corpus.labels[test], corpus.family)


def _short(scores: dict[str, Any], metrics: Sequence[str]) -> list[str]:
    """``mean ± deviation`` cells: intervals of differences are shown where they matter."""
    cells = []
    for m in metrics:
        text = f"{scores[m]['mean']:.3f}"
        cells.append(text if math.isnan(scores[m]["sd"]) else f"{text} ± {scores[m]['sd']:.3f}")
    return cells


def _result(section: Section, experiment: Experiment, summary: dict, boosting: dict) -> None:
    metrics = experiment.metrics
    main, seeds = metrics[0], len(experiment.seeds)
    budget = summary[REFERENCE]["labels"]
    gain = experiment.difference(main, REFERENCE, RANDOM)
    text = (
        f"{seeds} seeds, {budget[0]} to {budget[-1]} labels. Area under the {NAMES[main]} curve minus that of random "
        f"selection: {gain['mean']:+.4f}"
    )
    if seeds > 1:
        verdict = "excludes" if gain["excludes_zero"] else "does not exclude"
        text += f", 95 % interval [{gain['low']:+.4f}, {gain['high']:+.4f}], which {verdict} zero"
    section.note(text + ".")
    given = len(experiment.data.given)
    source = (
        f"{given} of the validation part and the rest bought" if given else "all bought, none of the validation part"
    )
    bought = (
        "also those of other parts, without labels" if experiment.data.transductive else "only those of the same part"
    )
    section.note(f"Labels: {source}. Neighbours: {bought}; missing clips leave gaps.")
    section.table(
        ["area under the curve", *(NAMES[m] for m in metrics)],
        [[name, *_short(summary[name]["area"], metrics)] for name in (REFERENCE, RANDOM)],
        "Mean over the label counts; mean ± deviation over seeds.",
        strong=[0],
    )
    gains = [experiment.difference(m, REFERENCE, RANDOM) for m in metrics]
    section.table(
        ["gain over random", "area difference [95 % interval]", "excludes zero"],
        [[NAMES[m], gain, gain["excludes_zero"]] for m, gain in zip(metrics, gains, strict=True)],
        f"Paired by seed; positive is better, also for MAE. {len(metrics)} comparisons: by chance alone one in twenty "
        "intervals excludes zero.",
    )
    full = [[f"AL-HCL, {ALL_LABELS}", *_short(summary[ALL_LABELS]["last"], metrics)]]
    complete = experiment.states[ALL_LABELS][0].records[-1]["baselines"]
    last = f"AL-HCL, {budget[-1]} labels"
    section.table(
        ["test scores", *(NAMES[m] for m in metrics)],
        [[last, *_short(summary[REFERENCE]["last"], metrics)], *full]
        + [[f"{name}, all labels", *(scores[m] for m in metrics)] for name, scores in complete.items()]
        + [["gradient boosting, all labels", *(boosting[m] for m in metrics)]],
        "At the last round, with every label of the train part, and baselines on the same features and labels.",
    )


def _baselines(section: Section, experiment: Experiment, baselines: dict[str, Any]) -> None:
    metrics = [m for m in dict.fromkeys((experiment.metrics[0], "acc2_non0", "mae", "corr")) if m in experiment.metrics]
    count = sum(len(found) for found in baselines.values()) * len(metrics)
    section.note(
        "Ridge regressions read the features that AL-HCL reads, mean-filled where missing, with indicators; their "
        "strength is chosen by leaving out videos, on the same labels. Differences are areas under the curve, AL-HCL's "
        f"minus theirs, paired by seed, positive where AL-HCL is better. {count} comparisons: by chance alone one in "
        "twenty intervals excludes zero."
    )
    for buyer, found in baselines.items():
        section.table(
            ["ridge regression", *(f"{NAMES[m]}, AL-HCL ahead by" for m in metrics)],
            [
                [name.removeprefix("ridge, "), *(scores[m]["reference_minus"] for m in metrics)]
                for name, scores in found.items()
            ],
            f"On the labels bought by: {buyer}.",
        )


def _parts(section: Section, experiment: Experiment) -> None:
    """Weights of the stack's parts and of the network, first member, mean over seeds."""
    names: dict[str, list[list[float]]] = {}
    states = experiment.states[REFERENCE]
    for state in states:
        for i, record in enumerate(state.records):
            facts = record["members"][0]
            weights = {**facts["path_weights"], "network (share of its correction)": facts["network_weight"]}
            for name, weight in weights.items():
                names.setdefault(name, [[] for _ in state.records])[i].append(weight)
    counts = states[0].counts
    section.table(
        ["part", *(f"{n} labels" for n in counts)],
        [[name, *(float(np.mean(w)) for w in rounds)] for name, rounds in names.items()],
        "Weights chosen out of fold, mean over seeds. A part that adds nothing to the others gets weight 0.",
    )
    history = states[0].records[-1]["members"][0]["history"]
    steps = [h["step"] for h in history]
    if len(steps) > 1:
        error = {"out of fold": np.sqrt([[h["left_out_mse"] for h in history]])}
        section.figure(
            plots.curves(steps, error, "optimiser steps", "root mean squared error"),
            f"Out-of-fold error while the networks train, seed {experiment.seeds[0]}, last round.",
        )
        loss = {"training loss": np.array([[h["loss"] for h in history[1:]]])}
        section.figure(
            plots.curves(steps[1:], loss, "optimiser steps", "loss"), "Mean training loss since the evaluation before."
        )


def _curves(section: Section, experiment: Experiment) -> None:
    counts = experiment.states[REFERENCE][0].counts
    for metric in experiment.metrics:
        curves = experiment.curves(metric)
        chosen = {name: curves[name] for name in (REFERENCE, RANDOM)}
        for buyer in (REFERENCE, RANDOM, MARGIN):
            name = best_baseline(experiment, metric, buyer)
            records = [state.records for state in experiment.states[buyer]]
            values = [[r["baselines"][name][metric] for r in found] for found in records]
            chosen[f"{name}; labels: {buyer}"] = np.array(values)
        figure = plots.curves(counts, chosen, "labels", NAMES[metric], within=limits(metric))
        section.figure(
            figure,
            f"{NAMES[metric]} on the test part over the number of labels, and of the best ridge regression on each "
            "buyer's labels; bands: 95 % intervals, from three seeds on.",
        )


def _every_baseline(experiment: Experiment, metric: str) -> dict[str, list[float]]:
    """Areas of every ridge regression on every buyer's labels, per seed; every buyer has as many labels as AL-HCL."""
    return {
        f"{name}, on the labels of {buyer}": areas
        for buyer in (REFERENCE, RANDOM, MARGIN)
        for name, areas in experiment.baseline_areas(metric, buyer).items()
    }


def best_baseline(experiment: Experiment, metric: str, buyer: str) -> str:
    """The ridge regression with the best mean area on the labels that an arm bought."""
    sign = 1 if HIGHER_IS_BETTER.get(metric, True) else -1
    areas = experiment.baseline_areas(metric, buyer)
    return max(areas, key=lambda name: sign * float(np.mean(areas[name])))


def _ablation(section: Section, experiment: Experiment, summary: dict, names: list[str]) -> None:
    metrics = [experiment.metrics[0], "mae", "corr"]
    section.note(
        "Model arms train on exactly the labels that the reference bought with the same seed; selection arms buy their "
        "own. Differences are areas minus the reference's, paired by seed, positive where the arm is better than the "
        "reference (a part that helps shows a negative difference when left out)."
    )
    rows = [[name, *_short(summary[name]["area"], metrics)] for name in [REFERENCE, RANDOM, *names]]
    section.table(["area", *(NAMES[m] for m in metrics)], rows, "Area under the curve.", strong=[0])
    rows = [[name, *(summary[name]["area_minus_reference"][m] for m in metrics)] for name in [RANDOM, *names]]
    section.table(
        ["difference", *(NAMES[m] for m in metrics)],
        rows,
        f"Paired differences to AL-HCL; {len(rows) * len(metrics)} comparisons.",
    )
    main = experiment.metrics[0]
    groups = {
        name: (np.array(experiment.areas(main)[name]) - np.array(experiment.areas(main)[REFERENCE])).tolist()
        for name in [RANDOM, *names]
    }
    figure = plots.bars(groups, f"area under {NAMES[main]}, minus {REFERENCE}", reference=0.0)
    section.figure(figure, "Paired differences of the area, with 95 % intervals and the seeds as dots.")


def _selected(section: Section, experiment: Experiment) -> None:
    state = experiment.states[REFERENCE][0]
    strategy = experiment.arms[0].selection
    section.note(
        f"Seed {experiment.seeds[0]}, strategy {strategy.strategy}, uncertainty {strategy.uncertainty}, "
        f"a share of {strategy.explore:g} drawn at random: the first "
        "picks of each round, and what the whole round bought."
    )
    rows = []
    for record in state.records:
        picks = record["picks"]
        if picks:
            labels = [p["label"] for p in picks]
            error = mean_interval([abs(p["label"] - p["prediction"]) for p in picks])["mean"]
            shown = ", ".join(f"{p['id']} ({p['label']:+.1f}, predicted {p['prediction']:+.1f})" for p in picks[:3])
            rows.append([record["round"] + 1, len(picks), float(np.mean(labels)), float(np.std(labels)), error, shown])
    columns = ["round", "bought", "mean label", "label sd", "mean error before", "first picks"]
    section.table(
        columns, rows, "Mean error before: distance between the label and the prediction made before the purchase."
    )


def _maps(section: Section, experiment: Experiment) -> None:
    state, data = experiment.states[REFERENCE][0], experiment.data
    assert state.embedding is not None
    train = data.train.cpu().numpy()
    labels = experiment.corpus.labels[train]
    figure = plots.embedding_map(state.embedding.numpy(), labels, "label")
    section.figure(figure, "Fused embeddings of the train part after the last round, coloured by label.")
    rounds = len(state.records)
    bought = {pick["row"]: r["round"] + 1 for r in state.records for pick in r["picks"]}
    known = set(state.labelled)
    # Up to eight colours: unlabelled, first labels, and the rounds in six groups.
    width = max(1, -(-(rounds - 1) // 6))
    group = [1 + -(-bought.get(r, 0) // width) if r in known else 0 for r in train.tolist()]
    spans = [(1 + i * width, min((i + 1) * width, rounds - 1)) for i in range(-(-(rounds - 1) // width))]
    names = ["not labelled", "first labels"] + [f"round {a}" if a == b else f"rounds {a}-{b}" for a, b in spans]
    figure = plots.embedding_map(state.embedding.numpy(), np.array(group), "labelled in", names)
    section.figure(figure, "The same map, coloured by the round in which each utterance was labelled.")


def _times(section: Section, summary: dict) -> None:
    stages = list(summary[REFERENCE]["seconds"])
    rows = [[name, *(entry["seconds"].get(s) for s in stages)] for name, entry in summary.items()]
    section.table(["arm", *stages], rows, "Wall seconds per run (all rounds), mean over seeds.")

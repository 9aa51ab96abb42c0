"""The page of an AL-HCL experiment: what was gained over random selection, by which part, with which labels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from examples.msa import plots
from examples.msa.baselines import fill, fit_ridge
from examples.msa.metrics import evaluate, mean_interval
from examples.msa.protocols import add_checkpoints, add_patterns
from examples.msa.report import Report, Section

from .arms import ALL_LABELS, RANDOM, REFERENCE
from .experiment import Experiment

LABELS = {
    "acc2_has0": "Acc-2 has0",
    "acc2_non0": "Acc-2 non0",
    "acc2": "Acc-2",
    "f1_has0": "F1 has0",
    "f1_non0": "F1 non0",
    "f1": "F1",
    "acc7": "Acc-7",
    "acc5": "Acc-5",
    "acc3": "Acc-3",
    "mae": "MAE",
    "corr": "Corr",
}
LEAD = (
    "Active learning with hierarchical contrastive learning and fusion guidance, re-implemented from the abstract and "
    "the published code, whose slips are corrected; contrast before the first label and a closed-form path are our own "
    "additions. Curves give test scores; the validation part, always labelled, chooses hyper-parameters and stops "
    "training. Runs with equal seeds start from equal labels, so differences are paired."
)


def build_report(experiment: Experiment, run: dict[str, Any]) -> Report:
    """Sections, figures and the JSON numbers of a finished experiment."""
    summary = experiment.summary()
    baseline = ridge_baseline(experiment)
    data = {"summary": summary, "baseline": baseline, "runs": experiment.runs()}
    report = Report(f"AL-HCL on {experiment.corpus.name}", LEAD, data, run)
    _result(report.section("Result"), experiment, summary, baseline)
    _curves(report.section("Learning curves"), experiment)
    names = [a.name for a in experiment.arms if a.selection.rounds and a.name not in (REFERENCE, RANDOM)]
    if names:
        _ablation(report.section("Ablations"), experiment, summary, names)
    last = {name: [state.records[-1] for state in states] for name, states in experiment.states.items()}
    add_checkpoints(report, experiment.metrics, last)
    add_patterns(report, experiment.metrics, last)
    _selected(report.section("Selected samples"), experiment)
    _maps(report.section("Embeddings"), experiment)
    _times(report.section("Time per stage"), summary)
    return report


def ridge_baseline(experiment: Experiment) -> dict[str, dict[str, float]]:
    """Ridge regression on all train labels: the first modality alone, and all side by side."""
    corpus, result = experiment.corpus, {}
    test = corpus.rows("test", labelled=True)
    for name, names in ((corpus.modalities[0], corpus.modalities[:1]), ("all modalities", corpus.modalities)):
        part = corpus.keep_modalities(names)
        if not part.available.any(1).all():
            continue
        fitted = fit_ridge(fill(part, part.available, "mean"), corpus)
        result[f"ridge, {name}"] = evaluate(fitted.prediction[test], corpus.labels[test], corpus.family)
    return result


def _short(scores: dict[str, Any], metrics: Sequence[str]) -> list[str]:
    """``mean ± deviation`` cells: intervals of differences are shown where they matter."""
    cells = []
    for m in metrics:
        text = f"{scores[m]['mean']:.3f}"
        cells.append(text if math.isnan(scores[m]["sd"]) else f"{text} ± {scores[m]['sd']:.3f}")
    return cells


def _result(section: Section, experiment: Experiment, summary: dict, baseline: dict) -> None:
    metrics = experiment.metrics
    main, seeds = metrics[0], len(experiment.seeds)
    budget = summary[REFERENCE]["labels"]
    gain = experiment.difference(main, REFERENCE, RANDOM)
    text = (
        f"{seeds} seeds, {budget[0]} to {budget[-1]} labels. Area under the {LABELS[main]} curve minus that of random "
        f"selection: {gain['mean']:+.4f}"
    )
    if seeds > 1:
        verdict = "excludes" if gain["excludes_zero"] else "does not exclude"
        text += f", 95 % interval [{gain['low']:+.4f}, {gain['high']:+.4f}], which {verdict} zero"
    section.note(text + ".")
    section.table(
        ["area under the curve", *(LABELS[m] for m in metrics)],
        [[name, *_short(summary[name]["area"], metrics)] for name in (REFERENCE, RANDOM)],
        "Mean over the label counts; mean ± deviation over seeds.",
        strong=[0],
    )
    gains = [experiment.difference(m, REFERENCE, RANDOM) for m in metrics]
    section.table(
        ["gain over random", "area difference [95 % interval]", "excludes zero"],
        [[LABELS[m], gain, gain["excludes_zero"]] for m, gain in zip(metrics, gains, strict=True)],
        "Paired by seed; positive is better, also for MAE.",
    )
    full = [[f"AL-HCL, {ALL_LABELS}", *_short(summary[ALL_LABELS]["last"], metrics)]]
    last = f"AL-HCL, {budget[-1]} labels"
    section.table(
        ["test scores", *(LABELS[m] for m in metrics)],
        [[last, *_short(summary[REFERENCE]["last"], metrics)], *full]
        + [[f"{name}, all labels", *(scores[m] for m in metrics)] for name, scores in baseline.items()],
        "At the last round, with every label of the train part, and ridge regression on the same features.",
    )


def _curves(section: Section, experiment: Experiment) -> None:
    counts = experiment.states[REFERENCE][0].counts
    for metric in experiment.metrics:
        curves = experiment.curves(metric)
        chosen = {name: curves[name] for name in (REFERENCE, RANDOM)}
        figure = plots.curves(counts, chosen, "labels", LABELS[metric])
        section.figure(figure, f"{LABELS[metric]} on the test part over the number of labels; bands: 95 % intervals.")


def _ablation(section: Section, experiment: Experiment, summary: dict, names: list[str]) -> None:
    metrics = [experiment.metrics[0], "mae", "corr"]
    section.note(
        "Model arms train on exactly the labels that the reference bought with the same seed; selection arms buy their "
        "own. Differences are areas minus the reference's, paired by seed, positive where the arm is better than the "
        "reference (a part that helps shows a negative difference when left out)."
    )
    rows = [[name, *_short(summary[name]["area"], metrics)] for name in [REFERENCE, RANDOM, *names]]
    section.table(["area", *(LABELS[m] for m in metrics)], rows, "Area under the curve.", strong=[0])
    rows = [[name, *(summary[name]["area_minus_reference"][m] for m in metrics)] for name in [RANDOM, *names]]
    section.table(["difference", *(LABELS[m] for m in metrics)], rows, "Paired differences to AL-HCL.")
    main = experiment.metrics[0]
    groups = {
        name: (np.array(experiment.areas(main)[name]) - np.array(experiment.areas(main)[REFERENCE])).tolist()
        for name in [RANDOM, *names]
    }
    figure = plots.bars(groups, f"area under {LABELS[main]}, minus {REFERENCE}", reference=0.0)
    section.figure(figure, "Paired differences of the area, with 95 % intervals and the seeds as dots.")


def _selected(section: Section, experiment: Experiment) -> None:
    state = experiment.states[REFERENCE][0]
    strategy = experiment.arms[0].selection
    section.note(
        f"Seed {experiment.seeds[0]}, strategy {strategy.strategy}, uncertainty {strategy.uncertainty}: the first "
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
        columns, rows, "Mean error before: distance of the prediction, made before the purchase, to the label."
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

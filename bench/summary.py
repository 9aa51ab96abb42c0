"""`python -m bench.summary RUN.json …`: the README's table, from files that `python -m bench --json` wrote.

With `--times` a longer table, run by run: our times, shares of the limit, memory, and the ratio of every peer.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HEADLINES = (
    ("info_nce", "supervised N=4096 d=128", ("torch, class sums", "pytorch-metric-learning SupConLoss")),
    ("info_nce_symmetric", "two-sided N=4096 d=128", ("torch, two cross entropies",)),
    ("hierarchical_contrastive_loss", "N=64 d=128", ("torch, nine terms",)),
    ("hierarchical_contrastive_loss", "N=128 d=128", ("torch, nine terms",)),
    ("hierarchical_contrastive_loss", "N=2048 d=128", ("torch, nine terms",)),
    ("rank_n_contrast", "N=512 d=128", ("torch: sort, logcumsumexp", "cubic form")),
    ("rank_n_contrast", "N=4096 d=128", ("torch: sort, logcumsumexp",)),
    ("matrix_fusion", "B=64 L=50 k=512 q=64", ("torch, factored", "reference (stores k × k)")),
    ("low_rank_fusion", "B=32 d=128 h=128 r=4", ("torch, batched products", "torch, as model collections")),
    ("low_rank_fusion", "B=1024 d=128 h=128 r=16", ("torch, batched products", "torch, as model collections")),
    (
        "propagate",
        "MOSI: 93×24×3 d=256 K=10",
        ("torch.sparse addmm, transposes ready", 'torch.sparse.mm(…, "sum")'),
    ),
    (
        "propagate",
        "MOSEI: 3300×7×3 d=128 K=10",
        ("torch.sparse addmm, transposes ready", 'torch.sparse.mm(…, "sum")'),
    ),
    ("window_mean", "MOSI: 93×24×3 d=256", ("torch, avg_pool1d",)),
    ("modality_mean", "MOSI: 93×24×3 d=256", ("torch, sum less own", "torch.compile of it")),
    (
        "graph_propagate",
        "n=20k E=400k d=128 K=1",
        ("torch.sparse addmm, transposes ready", "gather, index_add"),
    ),
    *(
        (
            "kcenter",
            shape,
            (
                "torch, matrix–vector per pick",
                "torch, pairwise_distance per pick (anomalib)",
                "torch, cdist per pick (DISTIL)",
            ),
        )
        for shape in (
            "N=1284 d=128 budget=20",
            "N=16326 d=256 budget=200",
            "N=100000 d=256 budget=200 Gaussian",
            "N=100000 d=256 budget=200 clustered",
        )
    ),
)

Figures = dict[str, Any]


def _find(run: Figures, operator: str, shape: str, provider: str) -> Figures | None:
    for row in run["rows"]:
        if row["operator"] == operator and row["shape"].startswith(shape):
            return next((m for m in row["measurements"] if m["provider"] == provider), None)
    return None


def _short(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _ratio(found: Figures | None) -> str:
    if found is None:
        return "–"
    ratio = found["ratio"]
    return "withheld" if ratio is None else f"{ratio:.0f}×" if ratio >= 20 else f"{ratio:.1f}×"


def ratios(runs: Sequence[Figures]) -> str:
    """A line per headline, a number per peer: its smallest ratio among the runs in which it was not withheld."""
    lines = ["| operator | shape | time of the peer over ours |", "|---|---|---|"]
    for operator, shape, peers in HEADLINES:
        parts = []
        for peer in peers:
            found = [f for run in runs if (f := _find(run, operator, shape, peer)) and f["ratio"] is not None]
            if found:
                parts.append(f"{peer} **{_ratio(min(found, key=lambda f: f['ratio']))}**")
        lines.append(f"| `{operator}` | {shape} | {', '.join(parts) or 'withheld'} |")
    return "\n".join(lines)


def summary(runs: Sequence[Figures]) -> str:
    """A line per headline: our time, share of the limit, memory and every peer's time over ours, run by run."""
    names = "one run" if len(runs) == 1 else f"{len(runs)} runs"
    lines = [
        f"| operator | shape | ours, ms | of the limit | extra MB | against, time over ours in {names} |",
        "|---|---|--:|--:|--:|---|",
    ]
    for operator, shape, peers in HEADLINES:
        ours = [_find(run, operator, shape, "msacore") or {} for run in runs]
        times = " / ".join(_short(o.get("total_ms") or o.get("forward_ms")) for o in ours)
        shares = " / ".join("–" if o.get("share") is None else f"{o['share']:.0%}" for o in ours)
        memory = " / ".join(_short(o.get("extra_mb")) for o in ours)
        against = "; ".join(
            f"{peer}: " + " / ".join(_ratio(_find(run, operator, shape, peer)) for run in runs) for peer in peers
        )
        lines.append(f"| {operator} | {shape} | {times} | {shares} | {memory} | {against} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.summary", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN.json")
    parser.add_argument("--times", action="store_true", help="run by run: times, shares of the limit, memory, ratios")
    chosen = parser.parse_args()
    print((summary if chosen.times else ratios)([json.loads(path.read_text()) for path in chosen.runs]))


if __name__ == "__main__":
    main()

"""Whether an installed msacore works: every public operator, a selection, a module. `python tests/smoke.py`."""

import sys
from pathlib import Path

import torch

# The installed package is to be tested, wherever this file is.
sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != Path(__file__).resolve().parent.parent]
import msacore  # noqa: E402


def main() -> None:
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    text, audio, vision = (torch.randn(12, 8, device=device, requires_grad=True) for _ in range(3))
    features, offsets = [text, audio, vision], torch.tensor([0, 7, 12], device=device)
    fused, pairs = msacore.nn.MatrixFusion(8, 5, device=device)(features)
    joined = msacore.nn.LowRankFusion((8, 8, 8), 8, device=device)(features)
    states = torch.stack(features, 1)
    rowptr, col, weight = msacore.graph.modality_edges(4, 3)
    losses = [
        fused.sum() + joined.sum(),
        msacore.info_nce(text, audio, symmetric=True),
        msacore.hierarchical_contrastive_loss(features, joined, list(pairs.unbind(1))),
        msacore.rank_n_contrast(text, torch.randn(12, device=device)),
        msacore.propagate(states, offsets).square().sum(),
        msacore.graph_propagate(text, rowptr.to(device), col.to(device), weight.to(device), steps=2, alpha=0.1).sum(),
    ]
    sum(losses).backward()  # type: ignore[union-attr]
    assert all(bool(x.grad is not None and x.grad.isfinite().all()) for x in features)
    assert len(msacore.select(text.detach(), 3, strategy="kcenter").indices) == 3
    print(f"msacore {msacore.__version__} from {Path(msacore.__file__).parent} works with torch {torch.__version__}")


if __name__ == "__main__":
    main()

"""Contrastive training of two projections under DistributedDataParallel, with and without `group=`.

    torchrun --nproc-per-node 2 examples/distributed_contrast.py

Every rank holds its share of each batch. The first column is one process on the whole batch. With `group=` the loss and
the gradient are the same; without it, every rank contrasts its local batch only, and loss and gradient differ. Runs on
the CPU with gloo, on GPUs with NCCL.
"""

import argparse
import copy
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import msacore
from examples.msa.synthetic import synthetic


class TwoTowers(nn.Module):
    """Text and audio projected into one space."""

    def __init__(self, text: int, audio: int, width: int = 32) -> None:
        super().__init__()
        self.text, self.audio = nn.Linear(text, width), nn.Linear(audio, width)

    def forward(self, text: Tensor, audio: Tensor) -> tuple[Tensor, Tensor]:
        return self.text(text), self.audio(audio)


def gradient(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--batch", type=int, default=250, help="rows of the whole batch; the ranks need not divide it")
    options = parser.parse_args()

    cuda = torch.cuda.is_available()
    dist.init_process_group("nccl" if cuda else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", rank))) if cuda else torch.device("cpu")

    corpus = synthetic(seed=0)
    text, audio = (torch.from_numpy(corpus.features[name]).float().to(device) for name in ("text", "audio"))
    torch.manual_seed(0)
    alone = TwoTowers(text.shape[1], audio.shape[1]).to(device)
    together = DistributedDataParallel(copy.deepcopy(alone))
    apart = DistributedDataParallel(copy.deepcopy(alone))
    optimisers = [torch.optim.Adam(model.parameters(), lr=1e-3) for model in (alone, together, apart)]

    if rank == 0:
        print(f"{world} ranks, batches of {options.batch}; angle: to the gradient of one process, in degrees")
        print(f"{'step':>4}  {'one process':>11}  {'with group=':>11} {'angle':>6}  {'without':>11} {'angle':>6}")
    order = torch.randperm(len(text), generator=torch.Generator().manual_seed(1))
    for step in range(options.steps):
        batch = order[(torch.arange(options.batch) + step * options.batch) % len(order)]
        mine = batch.tensor_split(world)[rank]
        losses = [
            msacore.info_nce(*alone(text[batch], audio[batch]), symmetric=True),
            msacore.info_nce(*together(text[mine], audio[mine]), symmetric=True, group=dist.group.WORLD),
            msacore.info_nce(*apart(text[mine], audio[mine]), symmetric=True),
        ]
        for loss, optimiser in zip(losses, optimisers, strict=True):
            optimiser.zero_grad()
            loss.backward()
        true = gradient(alone)
        angles = [
            torch.rad2deg(torch.acos(torch.cosine_similarity(true.double(), gradient(m).double(), dim=0).clamp(-1, 1)))
            for m in (together, apart)
        ]
        local = losses[2].detach().clone()
        dist.all_reduce(local)
        if rank == 0:
            print(
                f"{step:>4}  {losses[0].item():>11.6f}  {losses[1].item():>11.6f} {angles[0].item():>6.2f}"
                f"  {local.item() / world:>11.6f} {angles[1].item():>6.2f}"
            )
        for optimiser in optimisers:
            optimiser.step()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

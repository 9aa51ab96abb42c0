"""What the ranks of tests/test_distributed.py run: a loss over their rows, and in one process on the whole batch."""

import os
import signal
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import msacore
from bench.distributed import MODES, step
from msacore.distributed import Sharding, dispatch
from tests.distributed_cases import BY_NAME, LossCase
from tests.workers import split


def _leaves(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_leaves(item) for item in value]
    return value.detach().clone().requires_grad_()


def _flat(value: Any) -> list[Tensor]:
    return [t for item in value for t in _flat(item)] if isinstance(value, (list, tuple)) else [value]


def shares_of(case: LossCase, whole: dict[str, Any], sizes: Sequence[int], rank: int) -> dict[str, Any]:
    """A rank's part of every argument."""
    entries = len(_flat(whole["negatives"])[0]) if "negatives" in whole else 0
    queue = [len(range(r, entries, len(sizes))) for r in range(len(sizes))]
    mine = {k: split(v, queue if k in case.shares else sizes, rank) for k, v in whole.items()}
    if whole.get("candidate_mask") is whole.get("anchor_mask") is not None:  # one tensor for both stays one
        mine["candidate_mask"] = mine["anchor_mask"]
    return mine


def compare(group: Any, rank: int, name: str, sizes: Sequence[int], mode: str, dtype: torch.dtype) -> dict[str, Any]:
    """Loss and gradients of the rows themselves, over the ranks and in one process."""
    case = BY_NAME[name]
    whole = case.make(sum(sizes), torch.Generator().manual_seed(sum(sizes)), dtype)
    function = getattr(msacore, case.loss)
    differentiable = (*case.towers, "weights", "negatives")
    mode, _, padded = mode.partition(", ")
    capacity = max(*sizes, 1) if padded else None  # one rank is full
    sharding = Sharding(group, capacity=capacity, mode=mode)
    if capacity is not None and "negatives" in whole:  # then every rank needs equally many queue entries
        drawn = whole["negatives"]
        whole["negatives"] = torch.cat([drawn, drawn + 1, drawn[:2] + 2])  # 12 split evenly over up to four ranks
        whole["negative_mask"] = torch.arange(12) != 2

    def run(arguments: dict[str, Any], factor: float, **options: Any) -> tuple[Tensor, dict[str, Any]]:
        arguments = {k: _leaves(v) if k in differentiable else v for k, v in arguments.items()}
        temperature = torch.tensor(0.5, dtype=dtype, requires_grad=True) if case.learn_temperature else None
        given = {} if temperature is None else {"temperature": temperature}
        loss = function(**arguments, **case.options, **given, **options)
        (
            (loss * torch.linspace(1, 2, loss.numel(), dtype=loss.dtype)).sum() * factor if loss.dim() else loss
        ).backward()
        grads = {k: [t.grad for t in _flat(v)] for k, v in arguments.items() if k in differentiable}
        if temperature is not None:
            grads["temperature"] = [temperature.grad]
        return loss.detach(), grads

    mine = shares_of(case, whole, sizes, rank)
    if capacity is not None and "weights" in mine:
        padded = [
            torch.nn.functional.pad(block, (0, capacity - block.shape[1]))
            for block in mine["weights"].split(list(sizes), 1)
        ]
        mine["weights"] = torch.cat(padded, 1)
    per_row = case.options.get("reduction") == "none"
    if per_row:
        return _compare_rows(case, function, whole, mine, sizes, rank, sharding, differentiable, dtype)
    loss, grads = run(mine, 1.0, group=sharding)
    expected, wanted = run(whole, 1.0)
    parts = shares_of(case, {k: v for k, v in wanted.items() if k != "temperature"}, sizes, rank)
    if "temperature" in grads:  # a shared parameter: DistributedDataParallel averages its gradient
        dist.all_reduce(grads["temperature"][0], group=group)
        grads["temperature"][0] /= len(sizes)
    if capacity is not None and "weights" in grads:
        blocks = grads["weights"][0].split(capacity, 1)
        grads["weights"] = [torch.cat([b[:, :s] for b, s in zip(blocks, sizes, strict=True)], 1)]
    return {
        "loss": loss,
        "expected": expected,
        "grads": {k: v for k, v in grads.items() if k != "temperature"},
        "wanted": {k: [g * len(sizes) for g in v] for k, v in parts.items()},
        "temperature": grads.get("temperature", [None])[0],
        "wanted temperature": wanted.get("temperature", [None])[0],
    }


def _compare_rows(
    case: LossCase,
    function: Callable[..., Tensor],
    whole: dict[str, Any],
    mine: dict[str, Any],
    sizes: Sequence[int],
    rank: int,
    sharding: Sharding,
    differentiable: Sequence[str],
    dtype: torch.dtype,
) -> dict[str, Any]:
    """`reduction="none"`: every rank weights its own rows, and the gradient is that of the sum over ranks."""
    total = sum(sizes)
    cotangent = torch.linspace(-1, 2, max(total, 1), dtype=dtype)[:total]

    def run(arguments: dict[str, Any], weights: Tensor, **options: Any) -> tuple[Tensor, dict[str, Any]]:
        arguments = {k: _leaves(v) if k in differentiable else v for k, v in arguments.items()}
        temperature = torch.tensor(0.5, dtype=dtype, requires_grad=True)
        given = {"temperature": temperature} if case.learn_temperature else {}
        loss = function(**arguments, **case.options, **given, **options)
        (loss * weights).sum().backward()
        grads = {k: [t.grad for t in _flat(v)] for k, v in arguments.items() if k in differentiable}
        return loss.detach(), {**grads, "temperature": [temperature.grad]}

    loss, grads = run(mine, split(cotangent, sizes, rank), group=sharding)
    expected, wanted = run(whole, cotangent)
    given, by_process = grads.pop("temperature")[0], wanted.pop("temperature")[0]
    if given is not None:
        given = given.clone()
        dist.all_reduce(given, group=sharding.group)  # the ranks' shares add up to the whole
        given, by_process = given, by_process
    return {
        "loss": loss,
        "expected": split(expected, sizes, rank),
        "grads": grads,
        "wanted": shares_of(case, wanted, sizes, rank),
        "temperature": given,
        "wanted temperature": by_process,
    }


class Encoder(nn.Module):
    """Two shared projections, one for each width of embeddings."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Linear(6, 6, dtype=dtype), nn.Linear(4, 4, dtype=dtype)
        self.exponent = nn.Parameter(torch.tensor([-0.7], dtype=dtype))

    def forward(self, rows: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        # Every parameter takes part in every step, as DistributedDataParallel expects.
        unused = 0 * (self.wide.weight.sum() + self.narrow.weight.sum() + self.narrow.bias.sum())
        return [(self.wide if x.shape[1] == 6 else self.narrow)(x) for x in rows], self.exponent.exp() + unused


def through(group: Any, rank: int, name: str, sizes: Sequence[int], mode: str, wrapper: str) -> tuple[Tensor, Tensor]:
    """Gradients of a shared encoder (including its temperature): under DDP or FSDP2, and in one process."""
    case, dtype = BY_NAME[name], torch.float64
    whole = case.make(sum(sizes), torch.Generator().manual_seed(3), dtype)
    function = getattr(msacore, case.loss)
    torch.manual_seed(1)
    encoder = Encoder(dtype)
    alone = Encoder(dtype)
    alone.load_state_dict(encoder.state_dict())

    def loss_of(model: nn.Module, arguments: dict[str, Any], **options: Any) -> Tensor:
        rows = [t for k in case.towers for t in _flat(arguments[k])]
        encoded, temperature = model(rows)
        found = iter(encoded)
        embedded = {
            k: [next(found) for _ in arguments[k]] if isinstance(arguments[k], (list, tuple)) else next(found)
            for k in case.towers
        }
        given = {"temperature": temperature} if case.learn_temperature else {}
        loss = function(**{**arguments, **embedded}, **case.options, **given, **options)
        return loss if case.learn_temperature else loss + 0 * temperature.sum()

    if wrapper == "ddp":
        model: nn.Module = DistributedDataParallel(encoder, process_group=group)
    else:
        from torch.distributed.device_mesh import DeviceMesh
        from torch.distributed.fsdp import fully_shard

        model = fully_shard(encoder, mesh=DeviceMesh.from_group(group, "cpu"))
    sharding = Sharding(group, mode=mode)
    loss = loss_of(model, shares_of(case, whole, sizes, rank), group=sharding)
    expected = loss_of(alone, whole)
    if loss.dim():  # the mean over the whole batch, by hand
        kept = max(int((expected != 0).sum()), 1)
        loss, expected = loss.sum() * len(sizes) / kept, expected.sum() / kept
    loss.backward()
    expected.backward()
    grads = [p.grad for p in model.parameters()]
    grads = [g.full_tensor() if hasattr(g, "full_tensor") else g for g in grads]
    return (
        torch.cat([torch.zeros(1) if g is None else g.flatten() for g in grads]),
        torch.cat([torch.zeros(1) if p.grad is None else p.grad.flatten() for p in alone.parameters()]),
    )


def poisoned(group: Any, rank: int, name: str, sizes: Sequence[int], mode: str) -> list[Tensor]:
    """Loss and gradients twice: what is never read is 0, then NaN, on every rank but the first."""
    case = BY_NAME[name]
    results: list[Tensor] = []
    for value in (0.0, float("nan")):
        whole = case.make(sum(sizes), torch.Generator().manual_seed(5), torch.float64)
        if "available" in whole:
            gone = ~whole["available"]
            for m, x in enumerate(whole["unimodal"]):
                x[gone[:, m] & (torch.arange(len(x)) >= sizes[0])] = value
        for x, mask in (("anchors", "anchor_mask"), ("candidates", "candidate_mask"), ("embeddings", "mask")):
            if mask in whole:
                whole[x][~whole[mask] & (torch.arange(len(whole[x])) >= sizes[0])] = value
        mine = shares_of(case, whole, sizes, rank)
        mine = {k: _leaves(v) if k in case.towers else v for k, v in mine.items()}
        loss = getattr(msacore, case.loss)(**mine, **case.options, group=Sharding(group, mode=mode))
        loss.backward()
        results += [loss.detach(), *(t.grad for k in case.towers for t in _flat(mine[k]))]
    return results


def chosen_modes(group: Any, rank: int) -> list[str]:
    """The modes that "auto" chooses for a batch below its limit, for one above it, and for one too large for memory."""
    found: list[str] = []
    mode_of = dispatch._mode
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "_mode", lambda *a: (found.append(mode_of(*a)), found[-1])[1])
        for limit, memory in ((1 << 32, 1 << 32), (1, 1 << 32), (1, 1151)):
            patch.setattr(dispatch, "MOST_REPLICATED", limit)
            # The candidates of both ranks take 144 bytes; the memory must be at least eight times that.
            msacore.info_nce(torch.randn(3, 6), torch.randn(3, 6), group=Sharding(group, memory=memory))
    return found


def different_gradients(group: Any, rank: int) -> str:
    x, y = torch.randn(4, 6, requires_grad=True), torch.randn(4, 6)
    loss = msacore.info_nce(x, y, group=Sharding(group, check=True))
    try:
        (loss * (rank + 1)).backward()
    except RuntimeError as error:
        return str(error)
    return ""


def compiled(group: Any, rank: int, mode: str, name: str) -> list[float]:
    """Largest differences between compiled and eager losses and gradients, for two batch sizes."""
    torch.compiler.reset()  # specialisations of earlier cases count as recompilations
    case, sharding = BY_NAME[name], Sharding(group, capacity=9, mode=mode)
    given = {"temperature": torch.tensor(0.5)} if case.learn_temperature else {}

    def loss(arguments: dict[str, Any]) -> Tensor:
        return getattr(msacore, case.loss)(**arguments, **case.options, **given, group=sharding).sum()

    function = torch.compile(loss, fullgraph=True, backend="aot_eager")
    differences = []
    for n in (5, 8):
        whole = case.make(n, torch.Generator().manual_seed(n + rank), torch.float32)
        results = []
        for call in (function, loss):
            arguments = {k: _leaves(v) if k in case.towers else v for k, v in whole.items()}
            value = call(arguments)
            value.backward()
            results.append([value.detach(), *(t.grad for k in case.towers for t in _flat(arguments[k]))])
        differences += [float((p - q).abs().max()) for p, q in zip(*results, strict=True)]
    return differences


def compiled_check(group: Any, rank: int) -> str:
    sharding = Sharding(group, capacity=9, mode="replicated", check=True)
    function = torch.compile(lambda x: msacore.info_nce(x, group=sharding), fullgraph=True, backend="aot_eager")
    try:
        function(torch.randn(4, 6))
    except Exception as error:  # torch wraps what was raised inside
        return str(error)
    return ""


def started(group: Any, rank: int, sizes: Sequence[int], mode: str) -> float:
    """Largest difference that an early start of the gather makes."""
    sharding = Sharding(group, mode=mode)
    whole = BY_NAME["masks"].make(sum(sizes), torch.Generator().manual_seed(2), torch.float32)
    mine = split(list(whole.values()), sizes, rank)
    results = []
    for early in (False, True):
        a, c = (t.clone().requires_grad_() for t in mine[:2])
        handle = msacore.distributed.start(c, sharding) if early else c
        masks = dict(anchor_mask=mine[2], candidate_mask=mine[3])
        loss = msacore.info_nce(a, handle, symmetric=True, group=sharding, **masks)
        loss.backward()
        results.append((loss.detach(), a.grad, c.grad))
    return max(float((p - q).abs().max()) for p, q in zip(*results, strict=True) if p.numel())


def uneven_steps(group: Any, rank: int, itself: bool) -> list[float]:
    """Losses of ranks that make different numbers of steps; a rank that has finished counts as empty."""
    steps = (1, 3, 2, 4)[rank]
    loss = msacore.nn.InfoNCE(group=group)
    found = []
    with msacore.distributed.join(loss, group):
        for step in range(steps):
            x = torch.randn(3, 6, generator=torch.Generator().manual_seed(10 * step + rank), requires_grad=True)
            value = loss(x, x if itself else x.detach().roll(1, 1))
            value.backward()
            found.append(value.item())
    return found


def counted_bytes(group: Any, rank: int, rows: int, width: int) -> dict[str, dict[str, tuple[int, int]]]:
    """Bytes sent and received in a step, by mode and pass."""
    return {mode: step(group, rank, rows, width, mode) for mode in MODES}


def dies(group: Any, rank: int, victim: int) -> None:
    if rank == victim:
        os.kill(os.getpid(), signal.SIGKILL)
    msacore.info_nce(torch.randn(3, 6), torch.randn(3, 6), group=group)

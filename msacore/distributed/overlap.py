"""Collectives that begin early, and ranks that run out of steps."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.join import Join, Joinable, JoinHook

from msacore.distributed.arguments import describe, rows_of, sizes
from msacore.distributed.collectives import begin_gather, join_blocks, wait
from msacore.distributed.rows import Layout, pad_rows, scale_gradient
from msacore.distributed.sharding import Sharding, as_sharding
from msacore.ops._check import as_tensor, check_floating, check_shape


class Started:
    """Candidates whose gather has begun: what `start` returns and ``info_nce(candidates=…)`` takes."""

    def __init__(self, candidates: Tensor, sharding: Sharding, layout: Layout, gathered: Tensor) -> None:
        self.candidates, self.sharding, self.layout = candidates, sharding, layout
        self._gathered = gathered

    @property
    def shape(self) -> torch.Size:
        return self.candidates.shape

    def whole(self, factor: float) -> Tensor:
        """The candidates of all ranks; the gradient of this rank's candidates is multiplied by ``factor``."""
        rows = join_blocks(wait("info_nce", self._gathered, self.sharding.group), self.layout.counts)
        begin, end = self.layout.begin, self.layout.begin + self.layout.counts[self.layout.rank]
        own = pad_rows(self.candidates, self.layout.padding)
        return torch.cat([rows[:begin], scale_gradient(own, factor), rows[end:]])


def start(candidates: Tensor, group: Any) -> Started:
    """Start gathering ``candidates`` of all ranks, so that they are sent while the anchors are computed.

    Args:
        candidates: This rank's candidates, ``[n, d]``. They are sent as they are, so rows that a mask hides later
            should not hold values that must stay on this rank.
        group: What ``group=`` takes.

    Returns:
        A handle for ``msacore.info_nce(anchors, candidates=handle, …, group=group)``, to be used once, with the same
        group. Every rank must call ``start`` and then the loss.

    Raises:
        RuntimeError: ``candidates`` is not a floating tensor ``[n, d]``, or ranks disagree about it.
    """
    op = "start"
    sharding = as_sharding(op, group)
    n = rows_of(candidates)

    def check() -> None:
        given = as_tensor(op, "candidates", candidates)
        check_floating(op, "candidates", given)
        check_shape(op, "candidates", given, (-1, -1), "[n, d]")
        if sharding.capacity is not None and n > sharding.capacity:
            raise RuntimeError(f"msacore::{op}: expected at most `capacity` = {sharding.capacity} rows, got {n}")

    counts = [s[0] for s in sizes(op, sharding, [n], lambda: {"candidates": describe(candidates)}, check)]
    if sharding.capacity is not None:
        counts = [sharding.capacity] * sharding.world
    layout = Layout(tuple(counts), sharding.rank, n)
    sent = pad_rows(candidates.detach(), max(counts, default=0) - n)
    return Started(candidates, sharding, layout, begin_gather(op, sent, sharding.group))


def _without_rows(value: Any, made: dict[int, Tensor] | None = None) -> Any:
    """The same arguments with tensors of no rows; a tensor in two places stays one tensor, which the losses notice."""
    made = {} if made is None else made
    if isinstance(value, Tensor):
        if id(value) not in made:
            empty = value.detach()[:0].clone() if value.dim() else value.detach()
            made[id(value)] = empty.requires_grad_(value.requires_grad)
        return made[id(value)]
    if isinstance(value, (list, tuple)):
        return type(value)(_without_rows(item, made) for item in value)
    return {k: _without_rows(v, made) for k, v in value.items()} if isinstance(value, dict) else value


class _Shadow(JoinHook):
    def __init__(self, joined: "join") -> None:
        self._joined = joined

    def main_hook(self) -> None:
        self._joined.shadow()

    def post_hook(self, is_last_joiner: bool) -> None:
        self._joined.adopt(is_last_joiner)


class join(Joinable):
    """A context in which ranks may make different numbers of steps.

    A rank that has left its loop keeps taking part with empty batches until all ranks have left theirs:

        with msacore.distributed.join(loss):
            for batch in loader:
                loss(*encode(batch)).backward()

    Args:
        loss: A module of `msacore.nn`, or one that calls a loss with ``group=``; it is called once per step. Encoders
            under DistributedDataParallel must be part of it, so that their collectives are shadowed as well.
        group: The process group of the loss.
        device: Device on which the running ranks are counted.

    Raises:
        ValueError: Parameters of ``loss`` are sharded (FSDP): a rank without steps would not update its share. Call
            the model and the loss with ``[0, d]`` there, and step the optimizer.

    Note:
        A rank that leaves without having made any step cannot know the widths of a batch and raises. Empty batches
        leave its gradients unchanged. At the end, all ranks take the parameters and buffers of ``loss`` from a rank
        that ran to the end; optimizer states stay as they are, as under torch's ``Join``.
    """

    def __init__(self, loss: nn.Module, group: Any = None, device: torch.device | str = "cpu") -> None:
        super().__init__()
        if any(hasattr(p, "device_mesh") for p in loss.parameters()):
            raise ValueError(
                "msacore::join: expected parameters of `loss` that every rank holds in full, got sharded ones: a rank "
                "without steps would not update its share; call the model and the loss with tensors [0, d]"
            )
        self.loss = loss
        self._group: Any = dist.group.WORLD if group is None else as_sharding("join", group).group
        self._device = torch.device(device)
        self._example: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self._with_gradients = True
        self._shadowing = False
        self._join: Join | None = None

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._shadowing:
            return
        self._example, self._with_gradients = _without_rows((args, kwargs)), torch.is_grad_enabled()
        Join.notify_join_context(self)
        self._share_temperatures(runs=True)

    def shadow(self) -> None:
        """A step with an empty batch."""
        if self._example is None:
            raise RuntimeError(
                "msacore::join: expected every rank to make at least one step; this rank has made none and does not "
                "know the widths of a batch. Give it one, or call the loss with tensors [0, d]"
            )
        self._share_temperatures(runs=False)
        before = [(p, p.grad) for p in self.loss.parameters()]
        self._shadowing = True
        try:
            for parameter, _ in before:  # DistributedDataParallel averages what has accumulated
                parameter.grad = None
            with torch.set_grad_enabled(self._with_gradients):
                args, kwargs = _without_rows(self._example)
                result = self.loss(*args, **kwargs)
                results = result if isinstance(result, tuple) else (result,)
                torch.autograd.backward([r.sum() for r in results if r.requires_grad])
        finally:
            self._shadowing = False
            for parameter, grad in before:
                parameter.grad = grad

    def _share_temperatures(self, runs: bool) -> None:
        """Copy temperatures to ranks without steps: their optimizers stand still, but an empty batch reads them."""
        single = [p for p in self.loss.parameters() if p.numel() == 1]
        if not single:
            return
        values = torch.stack([p.detach().double().reshape(()) for p in single]).to(self._device)
        if not runs:
            values.fill_(float("-inf"))
        dist.all_reduce(values, dist.ReduceOp.MAX, group=self._group)
        if not runs:
            with torch.no_grad():
                for parameter, value in zip(single, values, strict=True):
                    parameter.fill_(value)

    def adopt(self, went_on: bool) -> None:
        """Copy the parameters and buffers of a rank that ``went_on`` to the end to all ranks."""
        last = torch.tensor(dist.get_rank(self._group) if went_on else -1, device=self._device)
        dist.all_reduce(last, dist.ReduceOp.MAX, group=self._group)
        source = dist.get_global_rank(self._group, int(last))
        for tensor in (*self.loss.parameters(), *self.loss.buffers()):
            dist.broadcast(tensor.detach(), source, group=self._group)

    def join_hook(self, **kwargs: Any) -> JoinHook:
        return _Shadow(self)

    @property
    def join_device(self) -> torch.device:
        return self._device

    @property
    def join_process_group(self) -> Any:
        return self._group

    def __enter__(self) -> "join":
        self._hook = self.loss.register_forward_pre_hook(self._before, with_kwargs=True)
        self._join = Join([self])
        self._join.__enter__()
        return self

    def __exit__(self, kind: Any, value: Any, trace: Any) -> None:
        try:
            if self._join is not None:
                self._join.__exit__(kind, value, trace)
        finally:
            self._hook.remove()

"""How a batch is distributed over the ranks of a process group."""

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch.distributed as dist

Mode = Literal["auto", "replicated", "sharded", "ring"]
MODES: tuple[Mode, ...] = get_args(Mode)


@dataclass(frozen=True)
class Sharding:
    """A process group with options for the losses. Functions with ``group=`` take one; `select` uses only the group.

    Args:
        group: A ``ProcessGroup``, a 1-D ``DeviceMesh`` or ``(mesh, dimension)``.
        capacity: Maximum number of rows of a rank. All ranks pad to it, so that shapes are static: no exchange of
            sizes, no host synchronisation, and ``torch.compile(fullgraph=True)`` works. A queue ``negatives`` must
            then have the same number of entries on every rank. Without a capacity, a small header is exchanged first.
        mode: "replicated" (every rank evaluates the whole batch), "sharded" (a rank evaluates its rows against all),
            "ring" (the same, but the rows of other ranks pass by in blocks, so that memory is linear in a rank's own
            rows; not for `rank_n_contrast`) or "auto", a rule on sizes that is the same on every rank.
        memory: Bytes of memory that "auto" assumes for a rank: it chooses the ring where the rows of all ranks, which
            a rank would otherwise hold, take more than an eighth of this memory.
        check: In backward, check that the upstream gradients of all ranks are equal (those of "none" belong to rows
            and are not compared); with ``capacity``, compare the headers too. Each check costs a small collective.

    Raises:
        ValueError: An argument has the wrong kind or range.
    """

    group: Any
    capacity: int | None = None
    mode: Mode = "auto"
    memory: int = 4 << 30
    check: bool = False

    def __init__(
        self,
        group: Any,
        *,
        capacity: int | None = None,
        mode: Mode = "auto",
        memory: int = 4 << 30,
        check: bool = False,
    ) -> None:
        if capacity is not None and (isinstance(capacity, bool) or not isinstance(capacity, int) or capacity < 0):
            raise ValueError(f"Sharding: expected `capacity` to be an integer of at least 0, got {capacity!r}")
        if mode not in MODES:
            raise ValueError(f"Sharding: expected `mode` to be one of {', '.join(MODES)}, got {mode!r}")
        if isinstance(memory, bool) or not isinstance(memory, int) or memory < 0:
            raise ValueError(f"Sharding: expected `memory` to be an integer of at least 0, in bytes, got {memory!r}")
        object.__setattr__(self, "group", _process_group(group))
        object.__setattr__(self, "capacity", capacity)
        object.__setattr__(self, "mode", mode)
        object.__setattr__(self, "memory", memory)
        object.__setattr__(self, "check", check)

    @property
    def world(self) -> int:
        """Number of ranks W."""
        return dist.get_world_size(self.group)

    @property
    def rank(self) -> int:
        """This rank, in the group."""
        return dist.get_rank(self.group)


def _process_group(group: Any) -> Any:
    if not dist.is_available():
        raise ValueError("`group`: this build of torch has no torch.distributed")
    if isinstance(group, dist.ProcessGroup):
        return group
    if hasattr(group, "get_group") and hasattr(group, "mesh"):
        if group.ndim != 1:
            raise ValueError(f"`group`: expected a 1-D DeviceMesh, or (mesh, dimension), got {group.ndim} dimensions")
        return group.get_group()
    if isinstance(group, tuple) and len(group) == 2 and hasattr(group[0], "get_group"):
        return group[0].get_group(group[1])
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("`group`: this process is not a member of the process group")
    raise ValueError(
        "`group`: expected a ProcessGroup (such as torch.distributed.group.WORLD), a 1-D DeviceMesh, "
        f"(mesh, dimension) or msacore.distributed.Sharding, got {type(group).__name__}"
    )


def as_sharding(op: str, group: Any) -> Sharding:
    """The argument ``group=`` of a public function, as a Sharding."""
    if isinstance(group, Sharding):
        return group
    try:
        return Sharding(group)
    except ValueError as error:
        raise ValueError(f"msacore::{op}: {error}") from error

"""The only place that initialises process groups and answers rank and world size.

One process is world size 1: every function here then returns its input, so the mathematics has no branches.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

Group = dist.ProcessGroup


def _group(group: Group | None) -> Group | None:
    """The given group, else the default one if it is initialised, else None (one process)."""
    if group is not None:
        return group
    return dist.group.WORLD if dist.is_available() and dist.is_initialized() else None


def world_size(group: Group | None = None) -> int:
    """Processes of the group (default group if None); 1 where none is initialised."""
    found = _group(group)
    return 1 if found is None else dist.get_world_size(found)


def rank(group: Group | None = None) -> int:
    """This process's place in the group; 0 where none is initialised."""
    found = _group(group)
    return 0 if found is None else dist.get_rank(found)


def sum_over_ranks(values: Tensor, group: Group | None = None) -> Tensor:
    """The sum over ranks, in place (one all-reduce; none in one process)."""
    found = _group(group)
    if found is not None and dist.get_world_size(found) > 1:
        dist.all_reduce(values, op=dist.ReduceOp.SUM, group=found)
    return values


def max_over_ranks(values: Tensor, group: Group | None = None) -> Tensor:
    """The maximum over ranks, in place (one all-reduce; none in one process)."""
    found = _group(group)
    if found is not None and dist.get_world_size(found) > 1:
        dist.all_reduce(values, op=dist.ReduceOp.MAX, group=found)
    return values


def all_finite(flags: Tensor, group: Group | None = None) -> Tensor:
    """Whether every flag of every rank is true: a boolean scalar on the flags' device, without host synchronisation.

    Args:
        flags: (...) boolean.
    """
    bad = (~flags).any().to(torch.float32)
    return sum_over_ranks(bad, group) == 0

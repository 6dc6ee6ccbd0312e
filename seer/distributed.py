"""The only place that initialises process groups, answers rank and world size, and knows torch's versions apart.

One process is world size 1: every function here then returns its input, so the mathematics has no branches.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import signal
import socket
import sys
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor

from seer.errors import ToldElsewhere, UserError
from seer.rank_environment import rank_environment

Group = dist.ProcessGroup


@contextlib.contextmanager
def processes(device: torch.device, *, timeout_seconds: int) -> Iterator[None]:
    """The default group of the processes that the launcher started, while the block runs; nothing in one process.

    Tensors on the CPU and objects travel by gloo, those on a GPU by NCCL. A rank dies with the process that started it,
    so that nobody trains on unseen when a launcher is killed.
    """
    environment = rank_environment()
    if environment is None:
        yield
        return
    if elastic := "TORCHELASTIC_RUN_ID" in os.environ:
        _die_with_parent()
    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            # torchrun keeps a store of its own, which the environment tells.
            init_method=None if elastic else f"tcp://{environment.master_addr}:{environment.master_port}",
            rank=environment.rank,
            world_size=environment.world_size,
            timeout=timedelta(seconds=timeout_seconds),
            device_id=device if device.type == "cuda" else None,
        )
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        raise UserError(
            f"process {environment.rank} of {environment.world_size} on {socket.gethostname()} does not meet the "
            f"others at {environment.master_addr}:{environment.master_port} ({str(error).splitlines()[0]})",
            "process 0 listens there, and all others reach it and come within parallel.timeout_seconds",
            "start all of them together; check MASTER_ADDR, MASTER_PORT and launch.network_interface",
        ) from None
    try:
        yield
        dist.barrier()  # else the first to leave may close connections that another still reads from
    finally:
        dist.destroy_process_group()


def _die_with_parent() -> None:
    if sys.platform == "linux":
        parent = os.getppid()
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent or parent == 1:
            os._exit(1)  # it died in between


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


def gather_rows(values: Tensor, group: Group | None = None) -> Tensor:
    """(ranks, *shape): the tensor of every rank, in the order of ranks (one all-gather; none in one process)."""
    found = _group(group)
    if found is None or dist.get_world_size(found) == 1:
        return values.unsqueeze(0)
    # Flat: gloo refuses a stack of tensors.
    gathered = values.new_empty(dist.get_world_size(found) * values.numel())
    # Renamed in 2.13, which warns of the old name.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(gathered, values.reshape(-1).contiguous(), group=found)
    return gathered.view(-1, *values.shape)


def gather_objects(value: Any, group: Group | None = None) -> list[Any]:
    """What each rank gives, on all ranks, in the order of ranks; anything that pickles. Waits for all of them."""
    found = _group(group)
    if found is None or dist.get_world_size(found) == 1:
        return [value]
    gathered: list[Any] = [None] * dist.get_world_size(found)
    dist.all_gather_object(gathered, value, group=found)
    return gathered


def of_first_rank(value: Any, group: Group | None = None) -> Any:
    """Rank 0's value on all ranks; what the others give is not looked at."""
    found = _group(group)
    if found is None or dist.get_world_size(found) == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=dist.get_global_rank(found, 0), group=found)
    return box[0]


@contextlib.contextmanager
def together(group: Group | None = None) -> Iterator[None]:
    """A block that fails on all ranks if a user's error is raised on any: nobody is left waiting for the one that left.

    Raises:
        UserError: on rank 0, what the lowest rank met that failed.
        ToldElsewhere: on the others.
    """
    own: UserError | None = None
    try:
        yield
    except UserError as error:
        own = error
    met = gather_objects(None if own is None else (own.what, own.rule, own.remedy, socket.gethostname()), group)
    failed = next((words for words in met if words is not None), None)
    if failed is None:
        return
    if rank(group):
        raise ToldElsewhere(*failed[:3])
    if own is not None:
        raise own
    what, rule, remedy, host = failed
    raise UserError(f"{what} (on {host})", rule, remedy)


def from_host(values: Sequence[float], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Numbers of this process as a tensor (n,) on the device, without waiting for it."""
    tensor = torch.tensor(values, dtype=dtype)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor that is sharded over ranks, in the same memory; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def fill(tensor: Tensor, values: Tensor) -> Tensor:
    """Writes whole values into a tensor, of one that is sharded over ranks this rank's part; without communication."""
    with torch.no_grad():
        if not isinstance(tensor, DTensor):
            return tensor.copy_(values)
        own = distribute_tensor(values, tensor.device_mesh, tensor.placements, src_data_rank=None)
        tensor.to_local().copy_(local(own))
    return tensor


def mesh(device: torch.device, shard_ranks: int | None = None) -> DeviceMesh:
    """All ranks in one dimension or, with `shard_ranks`, in two: copies of the weights, and ranks that share a copy."""
    return _mesh(device.type, world_size(), shard_ranks)


@functools.cache
def _mesh(device_type: str, ranks: int, shard_ranks: int | None) -> DeviceMesh:
    if shard_ranks is None or shard_ranks == ranks:
        return init_device_mesh(device_type, (ranks,))
    return init_device_mesh(device_type, (ranks // shard_ranks, shard_ranks), mesh_dim_names=("replicate", "shard"))


def lost_rank(error: BaseException) -> bool:
    """Whether an error says that another rank of the run is gone or did not answer in time."""
    if not isinstance(error, RuntimeError) or world_size() == 1:
        return False
    said = str(error)
    return isinstance(error, dist.DistBackendError) or any(
        words in said
        for words in (
            "Connection closed by peer",
            "Connection reset by peer",
            "Broken pipe",
            "Timed out",
            "timed out",
            "Connection refused",
            "Application timeout caused pair closure",
        )
    )


def ddp_without_buffers(module: torch.nn.Module, **options: Any) -> torch.nn.Module:
    """torch's DistributedDataParallel that leaves buffers alone, at the start and in each forward."""
    wrapper = torch.nn.parallel.DistributedDataParallel
    if "forward_sync_buffers" in wrapper.__init__.__code__.co_varnames:  # 2.13 renamed the option and warns of the old
        options["forward_sync_buffers"] = False
    else:
        options["broadcast_buffers"] = False
    return cast(torch.nn.Module, wrapper(module, init_sync=False, **options))

"""How the learner is spread over processes: a function a strategy.

Each takes the learner on the meta device or with its memory, as it says, and leaves its modules and their names as they
are: checkpoints, exports and evaluation see plain names under every strategy.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _BatchNorm

from seer import distributed


def ddp(learner: nn.Module, device: torch.device) -> nn.Module:
    """Every rank holds everything; gradients are averaged while the backward goes on. After initialisation.

    Nothing is broadcast: initial values are the same by their names, running statistics are settled by the step.

    Returns:
        What the step calls in place of the learner.
    """
    # Of a 1x1 kernel that is channels-last the strides are ambiguous, and torch complains that it has to copy them.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    return distributed.ddp_without_buffers(
        learner, device_ids=[device.index] if device.type == "cuda" else None, gradient_as_bucket_view=True
    )


def fsdp(
    learner: nn.Module,
    units: Sequence[nn.Module],
    *,
    mesh: DeviceMesh,
    low_precision: torch.dtype | None,
    full_precision_units: Iterable[nn.Module] = (),
    evaluation_method: str,
) -> None:
    """Weights, gradients and optimizer state are cut into parts, one a rank (FSDP2). On the meta device, in place.

    A unit is gathered before its forward and again before its backward. BatchNorm's parameters stay whole on every rank
    and in their own precision: they are tiny, a low-precision copy of them loses what they learn, and a BatchNorm that
    were a unit would be gathered for itself. Nobody reduces their gradients but ``average_replicated_gradients``.

    Args:
        learner: whose `forward` and `evaluation_method` are the only entrances from now on.
        units: modules that are gathered as one; together they hold all other parameters.
        mesh: one dimension, or two: copies, and the ranks that share a copy.
        low_precision: dtype of the gathered weights (gradients are reduced in float32); None keeps their own.
        full_precision_units: units that keep their own dtype.
        evaluation_method: name of a method of the learner that calls units too.
    """
    ignored = {
        parameter
        for module in learner.modules()
        if isinstance(module, _BatchNorm)
        for parameter in module.parameters(recurse=False)
    }
    whole = MixedPrecisionPolicy()
    low = MixedPrecisionPolicy(param_dtype=low_precision, reduce_dtype=torch.float32) if low_precision else whole
    kept = set(full_precision_units)
    for unit in units:
        fully_shard(unit, mesh=mesh, mp_policy=whole if unit in kept else low, ignored_params=ignored)
    # The root owns no parameter, but begins and ends the pass; a BatchNorm that it held would else be sharded.
    fully_shard(learner, mesh=mesh, mp_policy=whole, ignored_params=ignored)
    register_fsdp_forward_method(learner, evaluation_method)


def replicated_parameters(learner: nn.Module) -> list[nn.Parameter]:
    """Under fsdp: what every rank holds whole, in an order that is the same on all. After memory was given."""
    return [parameter for parameter in learner.parameters() if not isinstance(parameter, DTensor)]


@torch.no_grad()
def average_replicated_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """The mean over ranks of the gradients of replicated parameters, in one all-reduce; a missing one is zero."""
    ranks = distributed.world_size()
    if ranks == 1 or not parameters:
        return
    gradients: list[Tensor] = []
    for parameter in parameters:
        if parameter.grad is None:  # on this rank perhaps only: the others would wait
            parameter.grad = torch.zeros_like(parameter)
        gradients.append(parameter.grad)
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    distributed.sum_over_ranks(flat).div_(ranks)
    parts = torch.split(flat, [gradient.numel() for gradient in gradients])
    torch._foreach_copy_(gradients, [part.view_as(whole) for part, whole in zip(parts, gradients, strict=True)])

"""What a run carries from step to step, and its form in a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from seer import build, distributed
from seer.build import Learner, Optimizer
from seer.checkpoint.store import Checkpoint
from seer.config import TrainConfig
from seer.parallel.running_statistics import RunningStatistics


@dataclass
class TrainState:
    """All that moves in a run and is saved, and how it is called.

    Attributes:
        learner: under its plain names.
        forward: what a step calls: the learner, or the strategy's wrapper of it.
        replicated: parameters whose gradients the step itself averages over ranks.
        skipped_steps: int64 scalar on the device; steps that were not finite.
        bad_samples: int64 scalar on the device; images of all steps and ranks so far that were replaced.
        step: steps taken, those that changed nothing included; it keys the learning rate.
        batch_index: global batches consumed; it keys the data.
    """

    learner: Learner
    optimizer: Optimizer
    statistics: RunningStatistics
    skipped_steps: Tensor
    bad_samples: Tensor
    forward: nn.Module
    replicated: list[nn.Parameter] = field(default_factory=list)
    step: int = 0
    batch_index: int = 0


def fresh_state(config: TrainConfig, *, device: torch.device, strategy: str, learning_rate: float) -> TrainState:
    """The state before the first step: the same on every rank, whatever the strategy.

    Args:
        config: composed and validated.
        device: of this rank.
        strategy: single, ddp or fsdp.
        learning_rate: of the optimizer until the first step sets its own.
    """
    learner = build.learner(config, device=device, strategy=strategy)
    count = torch.zeros((), dtype=torch.int64, device=device)
    return TrainState(
        learner=learner,
        optimizer=build.optimizer(config, learner, learning_rate),
        statistics=RunningStatistics(learner),
        skipped_steps=count,
        bad_samples=count.clone(),
        forward=build.forward_of(learner, strategy=strategy, device=device),
        replicated=build.replicated_parameters(learner, strategy=strategy),
    )


def state_tensors(state: TrainState) -> dict[str, Tensor]:
    """Every tensor of the state under its plain name: ``model/NAME``, ``optim/NAME/KEY``, and the counts.

    What is sharded over ranks is a DTensor: parameters and their moments under fsdp, and always the buffers that hold a
    rank's part of global batches. So a checkpoint of one number of ranks fits any other, and one strategy any other.
    """
    tensors = {f"model/{name}": tensor for name, tensor in state.learner.state_dict().items()}
    for name, parameter in state.learner.named_parameters():
        for key, value in state.optimizer.state[parameter].items():
            tensors[f"optim/{name}/{key}"] = value
    if distributed.world_size() > 1:
        mesh = distributed.mesh(state.skipped_steps.device)
        for name, dimension in state.learner.objective.BATCH_DIMENSIONS.items():
            if (key := f"model/objective.{name}") in tensors:
                tensors[key] = DTensor.from_local(tensors[key], mesh, [Shard(dimension)], run_check=False)
    return tensors | {"skipped_steps": state.skipped_steps, "bad_samples": state.bad_samples}


@torch.no_grad()
def load_state(state: TrainState, checkpoint: Checkpoint) -> None:
    """Copy a checkpoint into the state, in place; names, shapes and dtypes must be the same.

    Raises:
        UserError: the checkpoint is of another network, objective or optimizer.
    """
    checkpoint.load_into(state_tensors(state))
    state.learner.objective.restored()
    state.step = checkpoint.state["step"]
    state.batch_index = checkpoint.state["batch_index"]

"""What a run carries from step to step, and its form in a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from seer.build import Learner, Optimizer
from seer.checkpoint.store import Checkpoint
from seer.errors import UserError
from seer.parallel.running_statistics import RunningStatistics


@dataclass
class TrainState:
    """All that moves in a run and is saved.

    Attributes:
        step: steps taken, those that changed nothing included; it keys the learning rate.
        batch_index: global batches consumed; it keys the data.
        skipped_steps: int64 scalar on the device; steps that were not finite.
        bad_samples: images of all steps so far that were replaced.
    """

    learner: Learner
    optimizer: Optimizer
    statistics: RunningStatistics
    skipped_steps: Tensor
    step: int = 0
    batch_index: int = 0
    bad_samples: int = 0


def state_tensors(state: TrainState) -> dict[str, Tensor]:
    """Every tensor of the state under its plain name: ``model/NAME``, ``optim/NAME/KEY``, ``skipped_steps``."""
    tensors = {f"model/{name}": tensor for name, tensor in state.learner.state_dict().items()}
    for name, parameter in state.learner.named_parameters():
        for key, value in state.optimizer.state[parameter].items():
            tensors[f"optim/{name}/{key}"] = value
    return tensors | {"skipped_steps": state.skipped_steps}


@torch.no_grad()
def load_state(state: TrainState, checkpoint: Checkpoint) -> None:
    """Copy a checkpoint into the state, in place; names, shapes and dtypes must be the same.

    Raises:
        UserError: the checkpoint is of another network, objective or optimizer.
    """
    own, saved = state_tensors(state), checkpoint.tensors()
    unlike = sorted(own.keys() ^ saved.keys()) or sorted(
        name for name in own if own[name].shape != saved[name].shape or own[name].dtype != saved[name].dtype
    )
    if unlike:
        raise UserError(
            f"checkpoint {checkpoint.folder} does not fit: {unlike[0]}",
            "a run goes on with the network, objective and optimizer it began with",
            "give the run's own settings, or another run_dir",
        )
    # Through load_state_dict, so that modules hear of it; it copies in place, and statistics stay views of one buffer.
    state.learner.load_state_dict(
        {name.removeprefix("model/"): tensor for name, tensor in saved.items() if name.startswith("model/")}
    )
    for name, tensor in own.items():
        if not name.startswith("model/"):
            tensor.copy_(saved[name])
    state.step = checkpoint.state["step"]
    state.batch_index = checkpoint.state["batch_index"]
    state.bad_samples = checkpoint.state["bad_samples"]

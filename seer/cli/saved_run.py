"""What evaluation and export read from a run on disk, living or ended."""

from __future__ import annotations

from typing import NamedTuple

import torch

from seer import build
from seer.backbones.initial_values import initialise
from seer.backbones.regnet import RegNetY
from seer.checkpoint.store import CheckpointStore
from seer.compose import thaw
from seer.config import TrainConfig
from seer.data.decode import ImageLimits
from seer.errors import UserError
from seer.run_directory import checkpoints_of, read_run


class SavedRun(NamedTuple):
    """A run's configuration, and its backbone on the CPU as the newest checkpoint has it, in evaluation mode."""

    config: TrainConfig
    backbone: RegNetY
    step: int

    @property
    def device(self) -> torch.device:
        """Where to compute: this machine's GPU if it has one, wherever the run was trained."""
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @property
    def limits(self) -> ImageLimits:
        """Which images the run refused."""
        return build.image_limits(self.config.data)

    @property
    def backbone_dtype(self) -> torch.dtype:
        """float32, or float64 for a run of that precision."""
        return build.precision_of(self.config)[0]


def load_run(run_dir: str) -> SavedRun:
    """Reads a run without taking its lock.

    Raises:
        UserError: the folder is no run, or the run was not saved yet.
    """
    config = thaw(read_run(run_dir))
    checkpoint = CheckpointStore(checkpoints_of(run_dir)).newest()
    if checkpoint is None:
        raise UserError(
            f"{run_dir} holds no checkpoint yet",
            f"a run is saved every {config.checkpoint.every_steps} steps and at its end",
            "wait for the first one",
        )
    return SavedRun(config, build.saved_backbone(config, checkpoint.tensors("model/backbone.")), checkpoint.step)


def untrained_backbone(config: TrainConfig) -> RegNetY:
    """The run's backbone as initial values leave it, on the CPU, in evaluation mode."""
    backbone = build.backbone(config, device=torch.device("cpu"), dtype=build.precision_of(config)[0])
    initialise(backbone, seed=config.seed)
    return backbone.eval()

"""A few steps under a strategy on the ranks of a pool, for the tests that compare strategies."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tiny_run import tiny_config
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from seer import build, distributed
from seer.training.state import TrainState, fresh_state, state_tensors
from seer.training.step import StepSettings, float_crops, set_learning_rate, step_settings, train_step
from seer.validation import validate

CPU = torch.device("cpu")
# Everything at once: two resolutions, BatchNorm in the head, a queue that fills and is used, frozen prototypes.
EVERYTHING = (
    "optimizer=larc",
    "objective.head_batchnorm=true",
    "objective.queue_images=16",
    "objective.queue_start_steps=1",
    "objective.freeze_prototypes_steps=2",
)


class Collectives(TorchDispatchMode):
    """Counts collectives by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            self.counts[func._schema.name.partition("::")[2]] += 1
        return func(*args, **(kwargs or {}))


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach().clone()


def started(folder: str, shards: str, strategy: str, *overrides: str) -> tuple[TrainState, StepSettings, Any]:
    """State, settings and batches of this rank."""
    config = tiny_config(Path(folder), shards, f"parallel.strategy={strategy}", *overrides)
    ranks = distributed.world_size()
    validate(config, world_size=ranks)
    chosen = "single" if ranks == 1 else strategy
    state = fresh_state(config, device=CPU, strategy=chosen, learning_rate=0.1)
    return state, step_settings(config, CPU), build.stream(config, workers=0, decoder="pillow").batches(0)


def losses_and_weights(
    folder: str, shards: str, strategy: str, overrides: tuple[str, ...], steps: int, infinite: tuple[int, int] | None
) -> dict[str, Any]:
    """Takes steps; `infinite` is (step, rank) of a batch with one infinite pixel.

    Returns:
        losses, whole tensors of the end under their checkpoint's names, whether replicas are equal on all ranks, and
        the collectives of the last step.
    """
    state, settings, batches = started(folder, shards, strategy, *overrides)
    first = {name: whole(tensor) for name, tensor in state_tensors(state).items()}
    losses: list[float] = []
    collectives: Counter[str] = Counter()
    for step in range(steps):
        set_learning_rate(state.optimizer, 0.3)
        crops = float_crops(next(batches), settings)
        if infinite == (step, distributed.rank()):
            crops[1][0, 1, 3, 3] = float("inf")
        with Collectives() as counter:
            outcome = train_step(state, crops, settings, bad_samples=distributed.rank())
        collectives = counter.counts
        losses.append(float(outcome.figures["loss"]))
    tensors = state_tensors(state)
    replicas = [tensor for tensor in tensors.values() if not isinstance(tensor, DTensor)]
    flat = torch.cat([tensor.detach().reshape(-1).double() for tensor in replicas])
    equal = True
    if dist.is_initialized():
        equal = all(torch.equal(flat, other) for other in distributed.gather_rows(flat))
    return {
        "losses": losses,
        "first": first,
        "last": {name: whole(tensor) for name, tensor in tensors.items()},
        "replicas_equal": equal,
        "collectives": dict(collectives),
        "units": len(state.learner.units()),
        "norms": sum(isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for m in state.learner.modules()),
        "sharded": sum(isinstance(tensor, DTensor) for tensor in tensors.values()),
    }

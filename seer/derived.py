"""What a run derives from its configuration, each value with the reason why it is what it is."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

from seer.config import TrainConfig


class Resolved(NamedTuple):
    """A value that was derived, and why it is what it is."""

    value: Any
    reason: str


def resolve(
    config: TrainConfig, *, processes: int = 1, cores: int | None = None, device: str = "cpu"
) -> dict[str, Resolved]:
    """What the run derives from the configuration, by dotted key; the configuration itself is not changed.

    Args:
        config: a configuration that `validate` accepted.
        processes: of the run on this machine.
        cores: of this process alone; default: its share of those that the processes of this machine may use.
        device: where the network runs, `cpu` or `cuda`.

    Returns:
        optimizer.learning_rate (float), optimizer.warmup_steps, data.workers, train.threads (int), and
        objective.queue_images (int) where it is rounded.
    """
    batch, optimizer, queue = config.train.global_batch_size, config.optimizer, config.objective.queue_images
    # A container or a scheduler may grant fewer cores than the machine has; macOS cannot say.
    granted = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cores = cores or max(1, (granted or 1) // processes)
    if device == "cpu":
        # torch's threads wait for each other at every operation: one that shares its core with a worker slows all of
        # them down (seen: 12 times, with 2 threads and 1 worker on 2 cores). So workers and threads share cores out.
        workers = Resolved(cores // 4, f"a quarter of {cores} cores; the network's threads take the others")
    else:
        workers = Resolved(max(1, cores - 1), f"{cores} cores, one left for the training process")
    threads = max(1, cores - (workers.value if config.data.workers is None else config.data.workers))
    derived = {
        "optimizer.learning_rate": Resolved(
            optimizer.base_learning_rate * batch / 256,
            f"optimizer.base_learning_rate {optimizer.base_learning_rate:g} x {batch} images / 256",
        ),
        "optimizer.warmup_steps": Resolved(config.train.steps // 20, f"5 % of {config.train.steps} steps"),
        "data.workers": workers,
        "train.threads": Resolved(threads, f"{cores} cores a process, less those of the workers"),
    }
    if queue % batch:
        derived["objective.queue_images"] = Resolved(queue // batch * batch, f"{queue} rounded down to whole batches")
    given = {
        "optimizer.learning_rate": optimizer.learning_rate,
        "optimizer.warmup_steps": optimizer.warmup_steps,
        "data.workers": config.data.workers,
        "train.threads": config.train.threads,
    }
    return derived | {key: Resolved(value, "given") for key, value in given.items() if value is not None}

"""What a run derives from its configuration, each value with the reason why it is what it is."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

from seer.config import DataConfig, TrainConfig
from seer.decoders import missing_speed, require_decoder
from seer.remote import Reading
from seer.source_list import quotas, read_sources

# Up to so many images are mixed as a whole; of more, about so many at a time: 64 lanes of 40,000.
MIXED_IMAGES = 2_560_000
_MOST_LANES = 64
# A lane's window covers at least so many shards, and a lane has several windows.
_SHARDS_A_WINDOW, _SHARDS_A_LANE = 4, 8


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


def reading(data: DataConfig) -> Reading:
    """How the shards of a configuration are read if they are remote."""
    return Reading(data.cache_dir, round(data.cache_gb * 1e9), data.io_timeout_seconds)


def resolve_decoder(config: TrainConfig, *, recorded: str | None, installed: Sequence[str]) -> Resolved:
    """Which of `seer.decoders.DECODERS` makes the crops of a run, on all its processes.

    Args:
        config: a configuration that `validate` accepted.
        recorded: what the run began with, None for one that begins.
        installed: `seer.decoders.installed_decoders()`.

    Raises:
        UserError: it is not installed.
    """
    if config.data.decoder != "auto":
        decoder = Resolved(config.data.decoder, "given")
    elif recorded is not None:
        decoder = Resolved(recorded, "the run began with it")
    else:
        faster = missing_speed(installed)
        decoder = Resolved(installed[0], "the fastest that is installed" + (f"; {': '.join(faster)}" if faster else ""))
    require_decoder(decoder.value, installed)
    return decoder


def resolve_order(config: TrainConfig, *, samples: int, shards: int) -> dict[str, Resolved]:
    """How images are mixed, by dotted key: it needs the data, so it is derived once the shards are open.

    It depends on neither processes nor machines: a batch is the same on any of them.

    Args:
        config: a configuration that `validate` accepted.
        samples: images in all shards.
        shards: shards that hold images.

    Returns:
        data.lanes and data.window_images (0: the whole epoch), both int; and data.mixture (the images of each source in
        a batch, by name) where sources are mixed.
    """
    given_lanes, given_window = config.data.lanes, config.data.window_images
    small = samples <= MIXED_IMAGES
    if given_lanes is not None:
        lanes = Resolved(given_lanes, "given")
    elif small:
        lanes = Resolved(1, f"{samples:,} images are mixed as a whole")
    else:
        batch, most = config.train.global_batch_size, max(1, min(_MOST_LANES, shards // _SHARDS_A_LANE))
        found = max(lane for lane in range(1, min(most, batch) + 1) if batch % lane == 0)
        words = f"up to {_MOST_LANES} parts of a batch that read {_SHARDS_A_LANE} or more of {shards:,} shards each"
        lanes = Resolved(found, f"{words}; a divisor of {batch}")
    if given_window is not None:
        window = Resolved(given_window, "given")
    elif small:
        window = Resolved(0, f"{samples:,} images are mixed as a whole")
    else:
        images = max(MIXED_IMAGES // lanes.value, _SHARDS_A_WINDOW * samples // shards)
        words = f"{lanes.value * images:,} of {samples:,} images are mixed at a time"
        window = Resolved(images, f"{words}, {_SHARDS_A_WINDOW} shards a lane or more")
    derived = {"data.lanes": lanes, "data.window_images": window}
    if sources := read_sources(config.data.mixture):
        batch = config.train.global_batch_size
        shares = quotas([source.weight for source in sources], batch // lanes.value)
        images = {source.name: share * lanes.value for source, share in zip(sources, shares, strict=True)}
        derived["data.mixture"] = Resolved(
            images, f"images of each source in a batch of {batch}, the same in every lane"
        )
    return derived

"""What the types of a configuration allow and the program cannot do: every check, within a field and across fields."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from seer.config import (
    BACKBONES,
    SMALLEST_EPSILON,
    BackboneConfig,
    DataConfig,
    EvaluationConfig,
    LaunchConfig,
    ObjectiveConfig,
    OptimizerConfig,
    ParallelConfig,
    TrainConfig,
    TrainSection,
)
from seer.decoders import DECODERS
from seer.errors import UserError, closest
from seer.source_list import read_sources

_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
# Options of sbatch that `launch.extra_sbatch` may not give: what to do instead.
SBATCH_OF_LAUNCH = {
    "nodes": "use launch.nodes",
    "ntasks": "use launch.nodes and launch.gpus_per_node",
    "ntasks-per-node": "use launch.gpus_per_node",
    "gpus-per-node": "use launch.gpus_per_node",
    "cpus-per-task": "use launch.cpus_per_gpu",
    "mem": "use launch.memory_per_node_gb",
    "time": "use launch.time_limit_minutes",
    "signal": "use launch.stop_before_end_seconds",
    "partition": "use launch.partition",
    "job-name": "use launch.job_name",
    "output": "the logs lie in RUN/launch",
    "error": "the logs lie in RUN/launch",
    "array": "give seer launch once for each run",
    "wrap": "leave it out",
    "export": "leave it out",
}


def validate(config: TrainConfig, *, world_size: int = 1) -> None:
    """Refuses what the types allow and the program cannot do; looks at nothing but the values (no file, no GPU).

    Raises:
        UserError: the first key that is wrong, with the rule and what to write instead.
    """
    if not config.run_dir:
        raise UserError("run_dir is empty", "a run needs a folder of its own", "write run_dir=runs/first")
    _no_address("run_dir", config.run_dir)
    _at_least("seed", config.seed, 0)
    _validate_train(config.train, world_size)
    _validate_data(config.data, config.train)
    _validate_backbone(config.backbone)
    _validate_objective(config.objective, config.train)
    _validate_optimizer(config.optimizer, config.train)
    _at_least("checkpoint.every_steps", config.checkpoint.every_steps, 1)
    _at_least("checkpoint.keep", config.checkpoint.keep, 2)
    _at_least("checkpoint.keep_every_steps", config.checkpoint.keep_every_steps, 1)
    _validate_evaluation(config.evaluation)
    _validate_parallel(config.parallel, world_size)
    validate_launch(config.launch)


def _validate_train(train: TrainSection, world_size: int) -> None:
    _at_least("train.steps", train.steps, 1)
    _at_least("train.global_batch_size", train.global_batch_size, 1)
    batch = train.global_batch_size
    if batch % world_size:
        whole = batch // world_size * world_size
        raise UserError(
            f"train.global_batch_size={batch} does not divide by {world_size} processes",
            "a global batch is cut into equal parts, one a process",
            f"use {whole} or {whole + world_size}" if whole else f"use {world_size}",
        )
    _one_of("train.device", train.device, ("auto", "cpu", "cuda"))
    _one_of("train.precision", train.precision, ("bf16", "fp32", "fp64"))
    _at_least("train.threads", train.threads, 1)
    _at_least("train.log_every_steps", train.log_every_steps, 1)
    if train.init_from == "":
        raise UserError("train.init_from is empty", "it names an exported .safetensors file", "give one, or write null")
    _no_address("train.init_from", train.init_from)


def _validate_data(data: DataConfig, train: TrainSection) -> None:
    sources = read_sources(data.mixture)
    if sources and data.shards:
        raise UserError(
            "data.mixture is given beside data.shards",
            "images come from one or the other",
            "write the shards as a source of the mixture, or leave one of them out",
        )
    if not data.shards and not sources:
        raise UserError(
            "data.shards is empty",
            "a run reads tar shards",
            "write data.shards='SHARDS_DIR/*.tar' (`seer shards pack PHOTOS_DIR --out SHARDS_DIR` makes them)",
        )
    _no_empty_pattern("data.shards", data.shards)
    if data.index_dir == "":
        raise UserError("data.index_dir is empty", "it names a folder", "give one, or write null")
    if data.cache_dir == "":
        raise UserError("data.cache_dir is empty", "it names a folder", "give one, or write null")
    _no_address("data.index_dir", data.index_dir)
    _no_address("data.cache_dir", data.cache_dir)
    _inside("data.cache_gb", data.cache_gb, 0, 1e9)
    # A data worker that reads for longer is taken for one that hangs.
    _inside("data.io_timeout_seconds", data.io_timeout_seconds, 1, 500)
    _at_least("data.workers", data.workers, 0)
    _one_of("data.decoder", data.decoder, ("auto", *DECODERS))
    _at_least("data.lanes", data.lanes, 1)
    _at_least("data.window_images", data.window_images, 0)
    batch = train.global_batch_size
    if data.lanes is not None and batch % data.lanes:
        raise UserError(
            f"data.lanes={data.lanes} with train.global_batch_size={batch}",
            "each lane fills equally many places of a batch",
            f"use a divisor of {batch}, such as {math.gcd(data.lanes, batch)}",
        )
    if data.large.count < 2:
        raise UserError(
            f"data.large.count={data.large.count}",
            "each large crop's assignment is predicted from another crop, so at least 2",
            "use data.large.count=2",
        )
    _at_least("data.small.count", data.small.count, 0)
    for name, crops in (("large", data.large), ("small", data.small)):
        key = f"data.{name}"
        _inside(f"{key}.size", crops.size, 8, 4096)
        _inside(f"{key}.min_area", crops.min_area, 0, 1, open_below=True)
        _inside(f"{key}.max_area", crops.max_area, 0, 1, open_below=True)
        _ordered(f"{key}.min_area", crops.min_area, f"{key}.max_area", crops.max_area)
    limits = data.limits
    if limits.max_pixels > 178_956_970:
        raise UserError(
            f"data.limits.max_pixels={limits.max_pixels}",
            "Pillow decodes no more than 178,956,970, which are several GB in a data worker",
            "use at most that",
        )
    for name in ("max_pixels", "max_side", "min_side", "max_bytes"):
        _at_least(f"data.limits.{name}", getattr(limits, name), 1)
    _ordered("data.limits.min_side", limits.min_side, "data.limits.max_side", limits.max_side)
    _inside("data.limits.max_aspect_ratio", limits.max_aspect_ratio, 1, math.inf)
    _inside("data.max_bad_share", data.max_bad_share, 0, 1)
    _inside("data.flip_probability", data.flip_probability, 0, 1)
    colour = data.photometric
    for name in ("jitter_probability", "brightness", "contrast", "saturation"):
        _inside(f"data.photometric.{name}", getattr(colour, name), 0, 1)
    _inside("data.photometric.hue", colour.hue, 0, 0.5)
    _inside("data.photometric.grayscale_probability", colour.grayscale_probability, 0, 1)
    _inside("data.photometric.blur_probability", colour.blur_probability, 0, 1)
    low, high = "data.photometric.blur_min_sigma", "data.photometric.blur_max_sigma"
    _inside(low, colour.blur_min_sigma, 0, math.inf, open_below=True)
    _inside(high, colour.blur_max_sigma, 0, math.inf, open_below=True)
    _ordered(low, colour.blur_min_sigma, high, colour.blur_max_sigma)
    if colour.blur_max_sigma > 2:
        raise UserError(
            f"{high}={colour.blur_max_sigma:g}",
            "at most 2: the blur has 13 taps, which hold 3 standard deviations of that",
            f"use {high}=2",
        )


def _validate_backbone(backbone: BackboneConfig) -> None:
    _one_of("backbone.name", backbone.name, (*BACKBONES, "custom"))
    shape = ("depth", "w0", "wa", "wm", "group_width")
    given = [name for name in shape if getattr(backbone, name) is not None]
    if backbone.name == "custom":
        missing = [f"backbone.{name}" for name in shape if name not in given]
        if missing:
            raise UserError(
                f"backbone.name=custom without {', '.join(missing)}",
                "a custom RegNetY is generated from five parameters",
                "give them, or take a member of the family: backbone.name=400mf",
            )
        _at_least("backbone.depth", backbone.depth, 4)
        _at_least("backbone.group_width", backbone.group_width, 1)
        _inside("backbone.wa", backbone.wa or 0.0, 0, math.inf)
        _inside("backbone.wm", backbone.wm or 0.0, 1, math.inf, open_below=True)
        width = backbone.w0 or 0
        if width < 8 or width % 8:
            raise UserError(
                f"backbone.w0={width}", "the initial width is a multiple of 8", f"use {max(8, -(-width // 8) * 8)}"
            )
    elif given:
        raise UserError(
            f"backbone.{given[0]} is given beside backbone.name={backbone.name}",
            "a member of the family has its own generating parameters",
            "leave it out, or write backbone.name=custom and give all five",
        )
    if len(backbone.stage_strides) != 4:
        raise UserError(
            f"backbone.stage_strides={backbone.stage_strides}",
            "there are four stages",
            "write one stride for each: [1,2,2,2]",
        )
    for stride in (backbone.stem_stride, *backbone.stage_strides):
        if stride not in (1, 2):
            raise UserError(
                f"a stride of {stride} in backbone.stem_stride or backbone.stage_strides",
                "a stage keeps the resolution or halves it",
                "use 1 or 2",
            )


def _validate_objective(objective: ObjectiveConfig, train: TrainSection) -> None:
    _one_of("objective.name", objective.name, ("swav",))
    _at_least("objective.prototypes", objective.prototypes, 2)
    _at_least("objective.embedding_size", objective.embedding_size, 1)
    for width in objective.head_hidden_sizes:
        _at_least("objective.head_hidden_sizes", width, 1)
    _inside("objective.temperature", objective.temperature, 0, math.inf, open_below=True)
    if not SMALLEST_EPSILON <= objective.epsilon < math.inf:
        raise UserError(
            f"objective.epsilon={objective.epsilon:g}",
            f"Sinkhorn's float64 holds from {SMALLEST_EPSILON} upwards",
            "use 0.02 for a small run, 0.03 to 0.05 for a large one",
        )
    _at_least("objective.iterations", objective.iterations, 0)
    _at_least("objective.freeze_prototypes_steps", objective.freeze_prototypes_steps, 0)
    _at_least("objective.queue_images", objective.queue_images, 0)
    _at_least("objective.queue_start_steps", objective.queue_start_steps, 0)
    if 0 < objective.queue_images < train.global_batch_size:
        raise UserError(
            f"objective.queue_images={objective.queue_images} with train.global_batch_size={train.global_batch_size}",
            "a queue shorter than a batch holds no whole batch",
            f"use 0 (no queue) or at least {train.global_batch_size}",
        )


def _validate_optimizer(optimizer: OptimizerConfig, train: TrainSection) -> None:
    _one_of("optimizer.name", optimizer.name, ("larc", "adamw"))
    _one_of("optimizer.schedule", optimizer.schedule, ("rebased", "swav", "vissl"))
    if optimizer.learning_rate is not None:
        _inside("optimizer.learning_rate", optimizer.learning_rate, 0, math.inf, open_below=True)
    _inside("optimizer.base_learning_rate", optimizer.base_learning_rate, 0, math.inf, open_below=True)
    _inside("optimizer.warmup_start_learning_rate", optimizer.warmup_start_learning_rate, 0, math.inf)
    _inside("optimizer.end_learning_rate_share", optimizer.end_learning_rate_share, 0, 1)
    _inside("optimizer.weight_decay", optimizer.weight_decay, 0, math.inf)
    _inside("optimizer.trust_coefficient", optimizer.trust_coefficient, 0, math.inf, open_below=True)
    for name in ("momentum", "beta1", "beta2"):
        _inside(f"optimizer.{name}", getattr(optimizer, name), 0, 1, open_above=True)
    _at_least("optimizer.warmup_steps", optimizer.warmup_steps, 0)
    if optimizer.warmup_steps is not None and optimizer.warmup_steps >= train.steps:
        raise UserError(
            f"optimizer.warmup_steps={optimizer.warmup_steps} with train.steps={train.steps}",
            "the warm-up ends before the run does",
            f"use optimizer.warmup_steps={train.steps // 20} (5 % of the run), or leave it out",
        )


def _validate_evaluation(evaluation: EvaluationConfig) -> None:
    _at_least("evaluation.every_steps", evaluation.every_steps, 0)
    _no_empty_pattern("evaluation.train", evaluation.train)
    _no_empty_pattern("evaluation.val", evaluation.val)
    if bool(evaluation.train) != bool(evaluation.val):
        given, missing = ("train", "val") if evaluation.train else ("val", "train")
        raise UserError(
            f"evaluation.{given} is given without evaluation.{missing}",
            "kNN compares the images of val with those of train",
            f"give evaluation.{missing} too, or neither",
        )
    if evaluation.every_steps and not evaluation.train:
        raise UserError(
            f"evaluation.every_steps={evaluation.every_steps} without shards",
            "kNN needs labelled shards",
            "give evaluation.train and evaluation.val, or write evaluation.every_steps=0",
        )
    _at_least("evaluation.k", evaluation.k, 1)
    _inside("evaluation.temperature", evaluation.temperature, 0, math.inf, open_below=True)
    _at_least("evaluation.max_train_images", evaluation.max_train_images, 1)
    _at_least("evaluation.max_val_images", evaluation.max_val_images, 1)


def _validate_parallel(parallel: ParallelConfig, world_size: int) -> None:
    _one_of("parallel.strategy", parallel.strategy, ("auto", "single", "ddp", "fsdp"))
    if parallel.strategy == "single" and world_size > 1:
        raise UserError(
            f"parallel.strategy=single under {world_size} processes",
            "each of them would train a network of its own",
            "use parallel.strategy=auto, or start one process",
        )
    _at_least("parallel.shard_ranks", parallel.shard_ranks, 1)
    if parallel.shard_ranks is not None and parallel.strategy in ("single", "ddp"):
        raise UserError(
            f"parallel.shard_ranks={parallel.shard_ranks} with parallel.strategy={parallel.strategy}",
            "only fsdp cuts the weights into parts",
            "use parallel.strategy=fsdp, or leave it out",
        )
    if parallel.shard_ranks is not None and world_size % parallel.shard_ranks:
        raise UserError(
            f"parallel.shard_ranks={parallel.shard_ranks} under {world_size} process{'es' if world_size > 1 else ''}",
            "every copy of the weights is shared by equally many processes",
            f"use a divisor of {world_size}" if world_size > 1 else "leave it out, or start several processes",
        )
    _at_least("parallel.timeout_seconds", parallel.timeout_seconds, 1)


def validate_launch(launch: LaunchConfig) -> None:
    """The part of `validate` that has to hold before anybody can say how many processes there will be.

    Raises:
        UserError: the first key that is wrong.
    """
    _one_of("launch.name", launch.name, ("local", "slurm"))
    for name in ("nodes", "gpus_per_node", "cpus_per_gpu", "memory_per_node_gb", "time_limit_minutes"):
        _at_least(f"launch.{name}", getattr(launch, name), 1)
    _at_least("launch.stop_before_end_seconds", launch.stop_before_end_seconds, 0)
    if launch.stop_before_end_seconds >= 60 * launch.time_limit_minutes:
        raise UserError(
            f"launch.stop_before_end_seconds={launch.stop_before_end_seconds} with "
            f"launch.time_limit_minutes={launch.time_limit_minutes}",
            "a job trains before it saves",
            f"use less than {60 * launch.time_limit_minutes} seconds, or a longer job",
        )
    for name in ("partition", "account", "qos", "constraint", "exclude", "job_name", "network_interface"):
        if getattr(launch, name) == "":
            raise UserError(f"launch.{name} is empty", "it is a name", "give one, or leave the key out")
    for option in launch.extra_sbatch:
        key = option.partition("=")[0]
        if not key or key.startswith("-") or " " in key or "\n" in option:
            raise UserError(
                f"launch.extra_sbatch holds {option!r}",
                "an option of sbatch stands there as OPTION=VALUE or OPTION, without dashes in front",
                "write for example launch.extra_sbatch='[reservation=maintenance,exclusive]'",
            )
        remedy = SBATCH_OF_LAUNCH.get(key.replace("_", "-"))
        if remedy is not None:
            raise UserError(f"launch.extra_sbatch holds {key}", "seer launch sets this option", remedy)


def _no_address(key: str, path: str | None) -> None:
    """As a path an address would quietly be a folder called `s3:`."""
    if path is not None and _ADDRESS.match(path):
        raise UserError(
            f"{key}={path} is an address", "only shards are read from one", "name a place in the file system"
        )


def _one_of(key: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise UserError(f"{key}={value}", "there is no such choice", closest(value, known))


def _at_least(key: str, value: int | None, least: int) -> None:
    """For a count; None is a default that is derived later."""
    if value is not None and value < least:
        raise UserError(f"{key}={value}", f"at least {least}", f"use {least} or more")


def _inside(
    key: str, value: float, low: float, high: float, *, open_below: bool = False, open_above: bool = False
) -> None:
    """For a number; NaN is inside of nothing, and infinity never is."""
    above = value > low if open_below else value >= low
    below = value < high if open_above or high == math.inf else value <= high
    if not (above and below):
        words = f"{'greater than' if open_below else 'at least'} {low:g}"
        if high < math.inf:
            words += f" and {'less than' if open_above else 'at most'} {high:g}"
        raise UserError(f"{key}={value:g}", words, "change the number")


def _ordered(low_key: str, low: float, high_key: str, high: float) -> None:
    if low > high:
        raise UserError(
            f"{low_key}={low:g} with {high_key}={high:g}", "the first is at most the second", "change one of them"
        )


def _no_empty_pattern(key: str, patterns: Sequence[str]) -> None:
    if "" in patterns:
        raise UserError(f"{key} holds an empty pattern", "a pattern names tar shards", f"write {key}='DIR/*.tar'")

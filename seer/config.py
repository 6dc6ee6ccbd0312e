"""The whole configuration in one file: a dataclass a group, a docstring a field, the checks across fields.

Hydra composes the YAML under ``conf/`` against these classes: an unknown key or a wrong type is refused, so no field is
typed ``Any``. The values here are the defaults; ``conf/`` only names what differs. Parts never see these objects:
``build.py`` unpacks them.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from seer.errors import UserError, closest

MISSING = "???"  # OmegaConf's mark for a value that must be given

# The rows of seer.backbones.regnet.FAMILY, repeated because that file imports torch; a test keeps them equal.
BACKBONES = (
    *("tiny", "200mf", "400mf", "600mf", "800mf", "1.6gf", "3.2gf", "4gf", "6.4gf"),
    *("8gf", "12gf", "16gf", "32gf", "64gf", "128gf", "256gf", "256gf_cv", "10b"),
)
SMALLEST_EPSILON = 0.003  # exp(-2 / epsilon) has to stay a normal float64


@dataclass
class CropConfig:
    """Crops of one resolution."""

    count: int = 2
    """Crops an image. 0 leaves this resolution out."""
    size: int = 224
    """Side of the square crop, pixels."""
    min_area: float = 0.14
    """Smallest share of the image's area that a crop covers, in (0, 1]."""
    max_area: float = 1.0
    """Largest share of the image's area that a crop covers, in (0, 1]."""


@dataclass
class PhotometricConfig:
    """Colour and blur of each crop; the defaults are SwAV's."""

    jitter_probability: float = 0.8
    """Share of crops whose brightness, contrast, saturation and hue are changed, in random order."""
    brightness: float = 0.8
    """Brightness factor in [1 - x, 1 + x]."""
    contrast: float = 0.8
    """Contrast factor in [1 - x, 1 + x]."""
    saturation: float = 0.8
    """Saturation factor in [1 - x, 1 + x]."""
    hue: float = 0.2
    """Hue turned by [-x, x], in turns of the colour circle (0.5 is the full circle)."""
    grayscale_probability: float = 0.2
    """Share of crops that lose their colour."""
    blur_probability: float = 0.5
    """Share of crops that are blurred."""
    blur_min_sigma: float = 0.1
    """Smallest standard deviation of the Gaussian blur, pixels."""
    blur_max_sigma: float = 2.0
    """Largest standard deviation of the Gaussian blur, pixels."""


@dataclass
class DataConfig:
    """Where images come from and how they are cut."""

    shards: list[str] = field(default_factory=list)
    """Tar shards: patterns with *, ?, [0-9], {000..127}. `seer shards pack` makes them and their indexes."""
    index_dir: str | None = None
    """Folder that holds the indexes of shards whose own folder cannot be written; default: beside the tar."""
    workers: int | None = None
    """Processes that decode and crop; 0 does it in the main process. Default: from the number of cores."""
    large: CropConfig = field(default_factory=CropConfig)
    """The crops that get assignments, at least two."""
    small: CropConfig = field(default_factory=lambda: CropConfig(count=4, size=96, min_area=0.05, max_area=0.14))
    """The crops that are only predicted."""
    flip_probability: float = 0.5
    """Share of crops that are mirrored left to right."""
    photometric: PhotometricConfig = field(default_factory=PhotometricConfig)
    """Colour and blur."""


@dataclass
class BackboneConfig:
    """Which RegNetY."""

    name: str = "400mf"
    """A row of the family (tiny, 200mf ... 256gf, 10b), or `custom` with the five generating parameters below."""
    depth: int | None = None
    """custom: number of blocks."""
    w0: int | None = None
    """custom: initial width, a multiple of 8."""
    wa: float | None = None
    """custom: slope of the widths."""
    wm: float | None = None
    """custom: ratio between the widths of neighbouring stages."""
    group_width: int | None = None
    """custom: channels a group of the 3x3 convolution."""
    stem_stride: int = 2
    """Stride of the stem; 1 for very small images."""
    stage_strides: list[int] = field(default_factory=lambda: [2, 2, 2, 2])
    """Stride of each of the four stages."""


@dataclass
class ObjectiveConfig:
    """SwAV: swapped prediction of prototype assignments."""

    name: str = "swav"
    """The objective."""
    prototypes: int = 3000
    """Number of prototypes, K."""
    embedding_size: int = 128
    """Size of the normalised embedding, D."""
    head_hidden_sizes: list[int] = field(default_factory=lambda: [2048])
    """Widths of the projection head's hidden layers."""
    head_batchnorm: bool = True
    """BatchNorm on the head's hidden layers (SEER has none)."""
    temperature: float = 0.1
    """Temperature of the predicted distribution."""
    epsilon: float = 0.05
    """Entropy regularisation of Sinkhorn, at least 0.003; smaller is sharper and resists collapse."""
    iterations: int = 3
    """Sinkhorn iterations."""
    freeze_prototypes_steps: int = 0
    """Steps at the start during which prototypes do not learn."""
    queue_images: int = 0
    """Images whose embeddings are kept to make small batches larger for Sinkhorn; 0 is no queue; whole batches only."""
    queue_start_steps: int = 0
    """Step at which the queue starts to fill."""


@dataclass
class OptimizerConfig:
    """How weights move."""

    name: str = "larc"
    """`larc` (SEER's: SGD with layer-wise adaptive rates) or `adamw` (simple, for small runs)."""
    learning_rate: float | None = None
    """Peak learning rate. Default: base_learning_rate x global batch / 256."""
    base_learning_rate: float = 0.3
    """Peak learning rate for 256 images a batch; used when learning_rate is not given."""
    warmup_start_learning_rate: float = 0.0
    """Learning rate of step 0."""
    warmup_steps: int | None = None
    """Steps from there to the peak. Default: 5 % of train.steps."""
    end_learning_rate_share: float = 0.001
    """Learning rate at the end as a share of the peak."""
    schedule: str = "rebased"
    """Style of the cosine: `rebased`, `swav`, `vissl`."""
    weight_decay: float = 1e-6
    """Weight decay."""
    decay_norms_and_biases: bool = True
    """Whether BatchNorm parameters and biases are decayed and scaled like all others (SEER's recipe does)."""
    momentum: float = 0.9
    """larc: momentum."""
    trust_coefficient: float = 0.001
    """larc: trust coefficient."""
    beta1: float = 0.9
    """adamw: decay of the first moment."""
    beta2: float = 0.999
    """adamw: decay of the second moment."""


@dataclass
class TrainSection:
    """Length, batch, device and precision of a run."""

    steps: int = 100_000
    """Steps of the run; the learning-rate schedule ends there."""
    global_batch_size: int = 256
    """Images a step, over all processes."""
    device: str = "auto"
    """`auto` (a GPU if there is one), `cpu` or `cuda`."""
    precision: str = "bf16"
    """Of the backbone: `bf16` (autocast), `fp32`, `fp64`. Scores, assignments and loss use at least float32."""
    threads: int | None = None
    """Threads of torch on a CPU. Default: the cores that data.workers leave."""
    log_every_steps: int = 10
    """Steps between two lines of metrics.jsonl."""
    init_from: str | None = None
    """Exported weights (.safetensors) to start the backbone from."""


@dataclass
class CheckpointConfig:
    """When the run is saved."""

    every_steps: int = 1000
    """Steps between two checkpoints; the end of the run is always saved."""
    keep: int = 2
    """How many of the newest checkpoints stay, at least 2."""
    keep_every_steps: int | None = None
    """Checkpoints of steps divisible by this stay for good."""


@dataclass
class EvaluationConfig:
    """kNN on labelled shards while the run goes on; labels never reach training."""

    every_steps: int = 0
    """Steps between two evaluations; 0 is none."""
    train: list[str] = field(default_factory=list)
    """Labelled shards of the bank (patterns)."""
    val: list[str] = field(default_factory=list)
    """Labelled shards of the queries (patterns)."""
    max_train_images: int | None = 5000
    """At most so many images of the bank, spread evenly over the shards; null takes all."""
    max_val_images: int | None = 1000
    """At most so many queries; null takes all."""
    k: int = 20
    """Neighbours that vote."""
    temperature: float = 0.07
    """Temperature of the votes."""


@dataclass
class ParallelConfig:
    """How the model is spread over processes."""

    strategy: str = "auto"
    """`auto` or `single`: one process."""
    sync_batchnorm: bool = False
    """BatchNorm over the images of all processes; with one process there is nothing to synchronise."""


@dataclass
class TrainConfig:
    """Everything `seer train` needs."""

    run_dir: str = MISSING
    """Folder of the run; the same command goes on with what is there."""
    experiment: str | None = None
    """Name of the experiment that was composed (`experiment=NAME`); for the record."""
    seed: int = 0
    """Seed of initial weights, order, crops and colours."""
    data: DataConfig = field(default_factory=DataConfig)
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainSection = field(default_factory=TrainSection)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)


def validate(config: TrainConfig, *, world_size: int = 1) -> None:
    """Refuses what the types allow and the program cannot do; looks at nothing but the values (no file, no GPU).

    Raises:
        UserError: the first key that is wrong, with the rule and what to write instead.
    """
    if not config.run_dir:
        raise UserError("run_dir is empty", "a run needs a folder of its own", "write run_dir=runs/first")
    _at_least("seed", config.seed, 0)
    _validate_train(config.train, world_size)
    _validate_data(config.data)
    _validate_backbone(config.backbone)
    _validate_objective(config.objective, config.train)
    _validate_optimizer(config.optimizer, config.train)
    _at_least("checkpoint.every_steps", config.checkpoint.every_steps, 1)
    _at_least("checkpoint.keep", config.checkpoint.keep, 2)
    _at_least("checkpoint.keep_every_steps", config.checkpoint.keep_every_steps, 1)
    _validate_evaluation(config.evaluation)
    if config.parallel.strategy in ("ddp", "fsdp"):
        raise UserError(
            f"parallel.strategy={config.parallel.strategy}",
            "this strategy comes with several processes, which this version does not start",
            "use parallel.strategy=single",
        )
    _one_of("parallel.strategy", config.parallel.strategy, ("auto", "single"))


class Resolved(NamedTuple):
    """A value that was derived, and why it is what it is."""

    value: Any
    reason: str


def resolve(
    config: TrainConfig, *, world_size: int = 1, cpu_count: int | None = None, device: str = "cpu"
) -> dict[str, Resolved]:
    """What the run derives from the configuration, by dotted key; the configuration itself is not changed.

    Args:
        config: a configuration that `validate` accepted.
        world_size: processes of the run; they share this machine's cores.
        cpu_count: cores; default: those that this process may use.
        device: where the network runs, `cpu` or `cuda`.

    Returns:
        optimizer.learning_rate (float), optimizer.warmup_steps, data.workers, train.threads (int), and
        objective.queue_images (int) where it is rounded.
    """
    batch, optimizer, queue = config.train.global_batch_size, config.optimizer, config.objective.queue_images
    # A container or a scheduler may grant fewer cores than the machine has; macOS cannot say.
    granted = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    all_cores = cpu_count or granted or 1
    cores = max(1, all_cores // world_size)
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


def freeze(config: TrainConfig) -> dict[str, Any]:
    """The configuration as plain containers, for config.yaml; `compose.thaw` is the way back."""
    return asdict(config)


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


def _validate_data(data: DataConfig) -> None:
    if not data.shards:
        raise UserError(
            "data.shards is empty",
            "a run reads tar shards",
            "write data.shards='SHARDS_DIR/*.tar' (`seer shards pack PHOTOS_DIR --out SHARDS_DIR` makes them)",
        )
    _no_empty_pattern("data.shards", data.shards)
    if data.index_dir == "":
        raise UserError("data.index_dir is empty", "it names a folder", "give one, or write null")
    _at_least("data.workers", data.workers, 0)
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

"""The whole configuration in one file: a dataclass a group, a docstring a field.

Hydra composes the YAML under ``conf/`` against these classes: an unknown key or a wrong type is refused, so no field is
typed ``Any``. The values here are the defaults; ``conf/`` only names what differs. Parts never see these objects:
``build.py`` unpacks them.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

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
class LimitsConfig:
    """Which images are refused before they are decoded; they are replaced and counted like damaged ones."""

    max_pixels: int = 64_000_000
    """Most pixels, width times height."""
    max_side: int = 30_000
    """Longest side, pixels."""
    min_side: int = 1
    """Shortest side, pixels."""
    max_aspect_ratio: float = 20.0
    """Largest ratio of the longer to the shorter side."""
    max_bytes: int = 64_000_000
    """Largest file, bytes."""


@dataclass
class DataConfig:
    """Where images come from and how they are cut."""

    shards: list[str] = field(default_factory=list)
    """Tar shards: patterns with *, ?, [0-9], {000..127}. `seer shards pack` makes them and their indexes."""
    mixture: list[str] = field(default_factory=list)
    """Instead of shards, several sources in fixed shares of every batch: NAME WEIGHT PATTERN each."""
    allow_growth: bool = False
    """Whether a run may go on with more shards than before: the new ones join at the next epoch."""
    index_dir: str | None = None
    """Folder that holds the indexes of shards whose own folder cannot be written; default: beside the tar."""
    cache_dir: str | None = None
    """Folder on a local disk for whole shards of s3://, gs:// and http(s)://, which the processes of a machine share.
    Default: seer/shards under $XDG_CACHE_HOME or ~/.cache."""
    cache_gb: float = 50.0
    """Most that this folder holds, GB (10^9 bytes); what has no room is read image by image. 0 keeps nothing."""
    io_timeout_seconds: int = 300
    """How long a remote shard that cannot be read is tried again before the run stops."""
    workers: int | None = None
    """Processes that decode and crop; 0 does it in the main process. Default: from the number of cores."""
    decoder: str = "auto"
    """Which libraries make the crops: pillow, pillow-simd, simplejpeg, simplejpeg+pillow-simd; `auto`: the fastest that
    is installed. It shows in the pixels, so a run keeps the one it began with."""
    lanes: int | None = None
    """Parts of a batch that read shards of their own, a divisor of the global batch. Default: 1, or up to 64 where the
    images are so many that they are mixed in windows."""
    window_images: int | None = None
    """Images of a lane that are mixed at a time, at most: it bounds the shards that are in use. 0: the whole epoch.
    Default: 0, or about 2.56 million over all lanes where there are more."""
    large: CropConfig = field(default_factory=CropConfig)
    """The crops that get assignments, at least two."""
    small: CropConfig = field(default_factory=lambda: CropConfig(count=4, size=96, min_area=0.05, max_area=0.14))
    """The crops that are only predicted."""
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    """Which images are refused."""
    max_bad_share: float = 0.05
    """Most images that may be bad, as a share of the last 10,000 or so (at least 1,000); beyond it the run stops."""
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
    """`single` (one process), `ddp` (each process holds everything), `fsdp` (weights, gradients and momentum are cut
    into parts, one a process), or `auto`: single, or ddp under several processes, or fsdp where ddp does not fit."""
    sync_batchnorm: bool = True
    """BatchNorm over the images of all processes; with one process there is nothing to synchronise."""
    shard_ranks: int | None = None
    """fsdp: how many neighbouring processes share one copy of the weights; null: all. Fewer make several copies (HSDP),
    such as one a node."""
    timeout_seconds: int = 300
    """How long a process waits for another before it gives up."""


@dataclass
class LaunchConfig:
    """How `seer launch` puts a run on processes; `seer train` takes no notice of it."""

    name: str = "local"
    """`local` (processes on this machine) or `slurm`."""
    nodes: int = 1
    """Machines that the run is spread over; more than 1 needs slurm."""
    gpus_per_node: int | None = None
    """Processes a machine, one a GPU; null: the GPUs that are there, or 2 on a machine without."""
    cpus_per_gpu: int | None = None
    """slurm: cores of each process; null: the cluster's default, often one. Here processes share all cores."""
    memory_per_node_gb: int | None = None
    """slurm: memory of each node, gigabytes; null: the cluster's default."""
    partition: str | None = None
    """slurm: the partition; null: the cluster's default."""
    account: str | None = None
    """slurm: who pays."""
    qos: str | None = None
    """slurm: quality of service."""
    constraint: str | None = None
    """slurm: features that the nodes must have."""
    exclude: str | None = None
    """slurm: nodes not to use."""
    time_limit_minutes: int = 1440
    """slurm: length of a job. A run that needs longer saves before the end and queues itself again."""
    stop_before_end_seconds: int = 120
    """slurm: how long before the end of the job the run begins to save."""
    job_name: str = "seer"
    """slurm: the job's name."""
    network_interface: str | None = None
    """Interface of the network between nodes (sets GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME); null: theirs to find."""
    setup: list[str] = field(default_factory=list)
    """slurm: shell lines before the run, such as 'module load cuda'."""
    extra_sbatch: list[str] = field(default_factory=list)
    """slurm: further options of sbatch as OPTION=VALUE or OPTION, without dashes."""


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
    launch: LaunchConfig = field(default_factory=LaunchConfig)


def freeze(config: TrainConfig) -> dict[str, Any]:
    """The configuration as plain containers, for config.yaml; `compose.thaw` is the way back."""
    return asdict(config)

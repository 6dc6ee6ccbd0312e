"""The only file that turns configuration into parts."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from seer import distributed
from seer.backbones.initial_values import initialise
from seer.backbones.regnet import FAMILY, RegNetShape, RegNetY, regnet_shape
from seer.config import CropConfig, DataConfig, TrainConfig
from seer.data.crops import CropSpec
from seer.data.decode import ImageLimits
from seer.data.history import History
from seer.data.mixture import SourceShare, open_shards
from seer.data.photometric import photometric
from seer.data.photometric_masked import compiled_photometric
from seer.data.photometric_parameters import PhotometricSpec
from seer.data.stream import DataStream
from seer.derived import Resolved, reading, resolve_order
from seer.errors import UserError
from seer.objectives.outcome import Outcome
from seer.objectives.swav import SwAV
from seer.optim.adamw import MaskedAdamW
from seer.optim.groups import parameter_groups
from seer.optim.larc import LARC
from seer.optim.schedules import WarmupCosine
from seer.parallel import strategies
from seer.parallel.sync_batchnorm import synchronise_batchnorms
from seer.rank_environment import first_of_machine, rank_environment
from seer.shard_list import ShardList

Optimizer = LARC | MaskedAdamW

_DDP_SHARE = 0.5  # of a rank's memory: activations and the data need the rest


class Unit(NamedTuple):
    """A part of the learner that is sharded, checkpointed and compiled as one."""

    name: str
    module: nn.Module


class Learner(nn.Module):
    """Backbone and objective as one module: strategies wrap it, checkpoints name its parts."""

    def __init__(self, backbone: RegNetY, objective: SwAV) -> None:
        super().__init__()
        self.backbone = backbone
        self.objective = objective

    def forward(self, crops: list[Tensor], assignments: Tensor | None = None) -> Outcome:
        """Loss and figures of a batch: crops are a list of (crops x N, 3, H, W), one a resolution, large ones first."""
        return self.objective(self.backbone, crops, assignments)  # type: ignore[no-any-return]

    def features(self, images_NCHW: Tensor) -> Tensor:
        """Pooled features (N, F) of normalised images (N, 3, H, W), for evaluation."""
        return self.backbone(images_NCHW)  # type: ignore[no-any-return]

    def units(self) -> list[Unit]:
        """Stem, each block, head and prototypes, under their plain names."""
        return [Unit(f"backbone.{name}", module) for name, module in self.backbone.units()] + [
            Unit(f"objective.{name}", module) for name, module in self.objective.units()
        ]


def device_of(config: TrainConfig) -> torch.device:
    """The training device; `auto` takes a GPU if there is one."""
    name = config.train.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "train.device=cuda", "torch finds no CUDA device here", "use train.device=cpu or a machine with a GPU"
        )
    environment = rank_environment()
    if name == "cpu" or environment is None:
        return torch.device(name)
    there = torch.cuda.device_count()
    if environment.local_world_size > there:
        raise UserError(
            f"{environment.local_world_size} processes on a machine with {there} GPUs",
            "each process takes a GPU of its own",
            f"start {there} processes on each machine, or use train.device=cpu",
        )
    return torch.device("cuda", environment.local_rank)


def precision_of(config: TrainConfig) -> tuple[torch.dtype, torch.dtype | None]:
    """The dtype of weights and crops, and the backbone's dtype under autocast (None without autocast)."""
    if config.train.precision == "fp64":
        return torch.float64, None
    return torch.float32, torch.bfloat16 if config.train.precision == "bf16" else None


def shape(config: TrainConfig) -> RegNetShape:
    """The backbone's shape: a row of the family, or what the generating parameters give."""
    backbone = config.backbone
    if backbone.name != "custom":
        return regnet_shape(*FAMILY[backbone.name])
    parameters = (backbone.depth, backbone.w0, backbone.wa, backbone.wm, backbone.group_width)
    return regnet_shape(*parameters)  # type: ignore[arg-type]  # validate refuses a missing one


def backbone(config: TrainConfig, *, device: torch.device, dtype: torch.dtype = torch.float32) -> RegNetY:
    """The backbone without initial values (anything may stand in its memory)."""
    return RegNetY(
        shape(config),
        stem_stride=config.backbone.stem_stride,
        stage_strides=tuple(config.backbone.stage_strides),
        device=device,
        dtype=dtype,
    )


def strategy(config: TrainConfig, *, device: torch.device) -> Resolved:
    """`single`, `ddp` or `fsdp`: what `parallel.strategy` means for these processes."""
    ranks, given = distributed.world_size(), config.parallel.strategy
    if ranks == 1:
        return Resolved("single", "one process")
    if given != "auto":
        return Resolved(given, "given")
    need, there = _ddp_bytes(config), _memory_bytes(device)
    words = f"{ranks} processes; weights, gradients and momentum take {need / 2**30:.2g} of {there / 2**30:.0f} GiB"
    return Resolved("ddp" if need <= _DDP_SHARE * there else "fsdp", words)


def _ddp_bytes(config: TrainConfig) -> int:
    """What a rank holds under ddp, activations apart, in the moment of the update."""
    # Weights, gradients and moments; under its mask LARC computes new weights and momentum beside the old ones.
    copies = 4 if config.optimizer.name == "adamw" else 5
    network = learner(config, device=torch.device("meta"))
    return copies * sum(parameter.numel() * parameter.element_size() for parameter in network.parameters())


def _memory_bytes(device: torch.device) -> int:
    """Memory for one rank: the GPU's, or its part of the machine's."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    environment = rank_environment()
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return pages // (environment.local_world_size if environment else 1)


def saved_backbone(config: TrainConfig, tensors: Mapping[str, Tensor]) -> RegNetY:
    """A run's backbone on the CPU, in evaluation mode, of a checkpoint's tensors `model/backbone.NAME`."""
    network = backbone(config, device=torch.device("cpu"), dtype=precision_of(config)[0])
    network.load_state_dict({name.removeprefix("model/backbone."): tensor for name, tensor in tensors.items()})
    return network.eval()


def learner(config: TrainConfig, *, device: torch.device, strategy: str = "single") -> Learner:
    """The learner with its initial values, which depend on the seed and the names of the parameters alone.

    Built on the meta device, cut into parts under fsdp, given memory, filled with NaN, then initialised by name: a
    value that nobody sets cannot hide, and every strategy on any number of ranks starts from the same weights.
    """
    dtype, _ = precision_of(config)
    meta = torch.device("meta")
    network = backbone(config, device=meta, dtype=dtype)
    settings = config.objective
    objective = SwAV(
        network.feature_dim,
        prototypes=settings.prototypes,
        embedding_size=settings.embedding_size,
        head_hidden_sizes=settings.head_hidden_sizes,
        head_batchnorm=settings.head_batchnorm,
        temperature=settings.temperature,
        epsilon=settings.epsilon,
        iterations=settings.iterations,
        assigned_crops=config.data.large.count,
        freeze_prototypes_steps=settings.freeze_prototypes_steps,
        queue_images=settings.queue_images,
        queue_start_steps=settings.queue_start_steps,
        global_batch_size=config.train.global_batch_size,
        device=meta,
        dtype=dtype,
    )
    built = Learner(network, objective)
    if device.type == "meta":
        return built
    if config.parallel.sync_batchnorm and distributed.world_size() > 1:
        synchronise_batchnorms(built)
    if strategy == "fsdp":
        strategies.fsdp(
            built,
            [unit.module for unit in built.units()],
            mesh=distributed.mesh(device, config.parallel.shard_ranks),
            low_precision=precision_of(config)[1],
            full_precision_units=[objective.prototypes],
            evaluation_method="features",
        )
    built.to_empty(device=device)
    with torch.no_grad():
        for tensor in [*built.parameters(), *built.buffers()]:
            if tensor.is_floating_point():
                distributed.local(tensor).fill_(math.nan)
    initialise(built.backbone, seed=config.seed)
    built.objective.initialise(config.seed)
    if channels_last(device) and strategy != "fsdp":  # parts of weights have no memory format
        built.backbone.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return built


def forward_of(network: Learner, *, strategy: str, device: torch.device) -> nn.Module:
    """What a step calls: the learner, wrapped under ddp."""
    return strategies.ddp(network, device) if strategy == "ddp" else network


def replicated_parameters(network: Learner, *, strategy: str) -> list[nn.Parameter]:
    """Parameters whose gradients the step itself has to average."""
    return strategies.replicated_parameters(network) if strategy == "fsdp" else []


def channels_last(device: torch.device) -> bool:
    """Convolutions run channels-last on a CPU: 1.2 to 1.6 times as fast (docs/benchmarks).

    Not on a GPU: grouped convolutions train up to three times slower that way with some versions of cuDNN.
    """
    return device.type == "cpu"


def optimizer(config: TrainConfig, network: Learner, learning_rate: float) -> Optimizer:
    """The optimizer over all parameters of the learner."""
    settings = config.optimizer
    groups = parameter_groups(network.named_parameters(), exclude_norms_and_biases=not settings.decay_norms_and_biases)
    if settings.name == "adamw":
        return MaskedAdamW(
            groups,
            lr=learning_rate,
            betas=(settings.beta1, settings.beta2),
            weight_decay=settings.weight_decay,
        )
    return LARC(
        groups,
        lr=learning_rate,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        trust_coefficient=settings.trust_coefficient,
    )


def schedule(config: TrainConfig, *, peak: float, warmup_steps: int) -> WarmupCosine:
    """The learning rate of each step."""
    settings = config.optimizer
    return WarmupCosine(
        start=settings.warmup_start_learning_rate,
        peak=peak,
        end=peak * settings.end_learning_rate_share,
        warmup_steps=warmup_steps,
        total_steps=config.train.steps,
        style=settings.schedule,
    )


def photometric_spec(data: DataConfig) -> PhotometricSpec:
    """Colour and blur as plain numbers."""
    p = data.photometric
    return PhotometricSpec(
        jitter_probability=p.jitter_probability,
        brightness=p.brightness,
        contrast=p.contrast,
        saturation=p.saturation,
        hue=p.hue,
        grayscale_probability=p.grayscale_probability,
        blur_probability=p.blur_probability,
        blur_min_sigma=p.blur_min_sigma,
        blur_max_sigma=p.blur_max_sigma,
    )


def photometric_of(config: TrainConfig, device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    """Colour and blur of one resolution: (uint8 crops on the device, parameters on the host) -> float crops.

    On a GPU it is compiled, here and now, for the sizes of this run. Where that cannot be done, the operations run one
    by one, and one process of the machine says so.
    """
    spec, dtype = photometric_spec(config.data), precision_of(config)[0]
    one_by_one = partial(photometric, spec=spec, dtype=dtype)
    if device.type == "cpu":
        return one_by_one
    images = config.train.global_batch_size // distributed.world_size()
    shapes = [(crop.count * images, crop.size, crop.size, 3) for crop in crop_specs(config.data)]
    try:
        return compiled_photometric(shapes, spec, dtype, device)
    except Exception as error:  # no Triton, no compiler, no headers, an old GPU: each has another type
        if first_of_machine():
            reason = next((line for line in str(error).splitlines() if line.strip()), "")
            print(
                f"seer: colour and blur are not compiled on this GPU ({type(error).__name__}: {reason}); they run one "
                "operation at a time. To compile them: a C compiler, Python's headers, and torch with its Triton",
                file=sys.stderr,
                flush=True,
            )
        return one_by_one


def crop_specs(data: DataConfig) -> list[CropSpec]:
    """One entry a resolution, the large one first."""

    def spec(crop: CropConfig) -> CropSpec:
        return CropSpec(count=crop.count, size=crop.size, min_area=crop.min_area, max_area=crop.max_area)

    return [spec(data.large)] + ([spec(data.small)] if data.small.count else [])


def image_limits(data: DataConfig) -> ImageLimits:
    """Which images are refused before they are decoded."""
    limits = data.limits
    return ImageLimits(
        max_pixels=limits.max_pixels,
        max_side=limits.max_side,
        min_side=limits.min_side,
        max_aspect_ratio=limits.max_aspect_ratio,
        max_bytes=limits.max_bytes,
    )


def shards(config: TrainConfig) -> tuple[ShardList, list[SourceShare]]:
    """The configured shards as they are now, and the sources that are mixed (none where they are not)."""
    data = config.data
    index_dir = Path(data.index_dir) if data.index_dir else None
    return open_shards(data.shards, data.mixture, index_dir, reading(data), growing=data.allow_growth)


def order(config: TrainConfig, history: History) -> dict[str, Resolved]:
    """How images are mixed (`resolve_order`): that follows from the shards that the run began with."""
    counts = [shard.samples for of_source in history.began_with().values() for shard in of_source]
    return resolve_order(config, samples=sum(counts), shards=sum(count > 0 for count in counts))


def stream(
    config: TrainConfig,
    *,
    workers: int,
    decoder: str,
    opened: tuple[ShardList, list[SourceShare]] | None = None,
    history: History | None = None,
) -> DataStream:
    """The stream of batches over the configured shards.

    Args:
        config: composed and validated.
        workers: processes that decode and crop.
        decoder: one of `seer.decoders.DECODERS`.
        opened: what `shards` gave; None: they are opened here.
        history: since when each shard is among them; None: always.
    """
    listed, sources = opened or shards(config)
    history = history or History.beginning(listed, sources)
    mixing = order(config, history)
    return DataStream(
        listed,
        seed=config.seed,
        global_batch_size=config.train.global_batch_size,
        crops=crop_specs(config.data),
        flip_probability=config.data.flip_probability,
        photometric=photometric_spec(config.data),
        limits=image_limits(config.data),
        decoder=decoder,
        workers=workers,
        lanes=mixing["data.lanes"].value,
        window=mixing["data.window_images"].value or None,
        sources=sources,
        history=history,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
    )

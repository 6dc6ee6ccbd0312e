"""A run small enough for tests: generated images, packed by the product, and a configuration of seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from seer.compose import compose
from seer.config import TrainConfig
from seer.shards.pack import pack

# Overrides that make the network so narrow that, of four ranks, some hold no row of some tensors under fsdp.
NARROW = tuple(f"backbone.{key}" for key in ("name=custom", "depth=5", "w0=8", "wa=11.25", "wm=2", "group_width=8"))


def make_images(folder: Path, *, classes: int = 3, each: int = 16, size: int = 40, seed: int = 0) -> Path:
    """Class folders of PNG images: noise of a colour that belongs to the class."""
    rng = np.random.default_rng(seed)
    colours = rng.integers(40, 215, size=(classes, 3))
    for label in range(classes):
        (folder / f"class{label}").mkdir(parents=True)
        for number in range(each):
            pixels = np.clip(colours[label] + rng.normal(0, 30, size=(size, size, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"class{label}" / f"{number:03d}.png")
    return folder


def make_shards(folder: Path, **images: Any) -> str:
    """Packs generated images with labels; gives the pattern of the shards."""
    pack(make_images(folder / "images", **images), folder / "shards", labels="folders", samples_per_shard=20, workers=1)
    return str(folder / "shards" / "*.tar")


def tiny_config(run_dir: Path, shards: str, *overrides: str) -> TrainConfig:
    """Six steps of the smallest network on 8 images each; later overrides win."""
    return compose(tiny_words(run_dir, shards, *overrides))


def tiny_words(run_dir: Path, shards: str, *overrides: str) -> list[str]:
    """The same as the words of a command line."""
    given = dict(
        override.split("=", 1)
        for override in [
            "experiment=demo",
            f"run_dir={run_dir}",
            f"data.shards={shards}",
            "data.workers=0",
            "data.large.size=32",
            "data.small.size=24",
            "data.small.count=2",
            "objective.prototypes=8",
            "objective.freeze_prototypes_steps=1",
            "train.steps=6",
            "train.global_batch_size=8",
            "train.threads=1",
            "train.log_every_steps=1",
            "train.precision=fp32",
            "checkpoint.every_steps=2",
            "evaluation.every_steps=0",
            "evaluation.train=[]",
            "evaluation.val=[]",
            *overrides,
        ]
    )
    return [f"{key}={value}" for key, value in given.items()]

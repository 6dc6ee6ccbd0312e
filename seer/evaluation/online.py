"""kNN while a run goes on: labels are looked at here and never reach training."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator

import torch

from seer import distributed
from seer.data.decode import DEFAULT_LIMITS, ImageLimits
from seer.errors import UserError
from seer.evaluation.features import (
    Forward,
    LabelledCrops,
    LabelledFeatures,
    described,
    features_of,
    labelled_crops,
    require_images,
    require_labels,
)
from seer.evaluation.knn import knn_top1
from seer.shard_list import ShardList

_KEEP_BYTES = 512 * 2**20


class OnlineEvaluation:
    """Scores a network every so many steps on the same labelled images.

    The crops are kept in memory after the first time if those of a process take less than 512 MiB, so that later
    evaluations cost the forward passes alone. Ranks share the images out; rank 0 votes.

    Args:
        bank: labelled shards in which neighbours are looked for.
        queries: labelled shards whose classes are predicted.
        every_steps: steps between two evaluations; 0 is none.
        image_size: side of the evaluation crops, pixels.
        limits: which images are refused.
        k, temperature: of the vote, as in ``evaluation.knn``.
        max_bank_images, max_query_images: at most so many images, spread evenly; None takes all.
        batch_size: images a forward pass, on each rank.
        dtype: of the network's computation, as in ``features_of``.
        threads: that decode; default: the cores of this process, at most 8.

    Raises:
        UserError: a negative `every_steps`, or images without labels among those that are taken.
    """

    def __init__(
        self,
        bank: ShardList,
        queries: ShardList,
        *,
        every_steps: int,
        image_size: int,
        limits: ImageLimits = DEFAULT_LIMITS,
        k: int = 20,
        temperature: float = 0.07,
        max_bank_images: int | None = None,
        max_query_images: int | None = None,
        batch_size: int = 256,
        dtype: torch.dtype = torch.float32,
        threads: int | None = None,
    ) -> None:
        if every_steps < 0:
            raise UserError(f"evaluation.every_steps={every_steps}", "it counts steps", "use 0 for none, or more")
        self._every_steps = every_steps
        self._image_size = image_size
        self._limits = limits
        self._k = k
        self._temperature = temperature
        self._batch_size = batch_size
        self._dtype = dtype
        self._threads = threads
        self._sets = {"bank": (bank, max_bank_images), "queries": (queries, max_query_images)}
        for shards, max_images in self._sets.values():
            require_labels(shards, max_images)  # a run must not find out at its first evaluation
        self._kept: dict[str, list[LabelledCrops]] = {}
        self._told: set[str] = set()

    def due(self, step: int, total_steps: int | None = None) -> bool:
        """Whether this step is evaluated: every so many steps, and the last one (where `total_steps` is given)."""
        return bool(self._every_steps) and step > 0 and (step % self._every_steps == 0 or step == total_steps)

    def score(self, forward: Forward, device: torch.device | str = "cpu") -> dict[str, float] | None:
        """kNN of the features that `forward` makes of normalised images (n, 3, size, size), in evaluation mode.

        All ranks call it together and call `forward` equally often; order of images and votes are those of one process.

        Returns:
            ``knn_top1``, the share of queries whose class is predicted, in [0, 1]; ``evaluation_seconds``. On rank 0;
            None on the others.

        Raises:
            UserError: no image that can be decoded, or a shard that was changed; on all ranks.
        """
        began = time.perf_counter()
        bank, queries = (self._features(name, forward, device) for name in self._sets)
        with distributed.together():
            if distributed.rank():
                top1 = None
            else:
                top1 = knn_top1(
                    bank.features.to(device),
                    bank.labels.to(device),
                    queries.features.to(device),
                    queries.labels.to(device),
                    k=self._k,
                    temperature=self._temperature,
                )
        if top1 is None:
            return None
        return {"knn_top1": top1, "evaluation_seconds": round(time.perf_counter() - began, 3)}

    def _features(self, name: str, forward: Forward, device: torch.device | str) -> LabelledFeatures:
        shards, max_images = self._sets[name]
        batches: Iterable[LabelledCrops] | None = self._kept.get(name)
        if batches is None:
            batches = _on_all_ranks(
                labelled_crops(
                    shards,
                    image_size=self._image_size,
                    limits=self._limits,
                    batch_size=self._batch_size,
                    max_images=max_images,
                    threads=self._threads,
                    rank=distributed.rank(),
                    ranks=distributed.world_size(),
                )
            )
            if self._bytes() <= _KEEP_BYTES:
                batches = self._kept[name] = list(batches)
        features = _gathered(features_of(forward, batches, device=device, dtype=self._dtype))
        with distributed.together():
            require_images(shards, len(features.labels), features.bad)
        if features.bad and name not in self._told and distributed.rank() == 0:
            print(f"seer: evaluation, {name}: left out {described(features.bad)}", file=sys.stderr)
            self._told.add(name)
        return features

    def _bytes(self) -> int:
        images = sum(min(shards.samples, limit or shards.samples) for shards, limit in self._sets.values())
        return images * self._image_size**2 * 3 // distributed.world_size()


def _on_all_ranks(batches: Iterator[LabelledCrops]) -> Iterator[LabelledCrops]:
    """The batches, of which all ranks have equally many; a shard that one of them cannot read stops all."""
    while True:
        with distributed.together():
            batch = next(batches, None)
        if batch is None:
            return
        yield batch


def _gathered(own: LabelledFeatures) -> LabelledFeatures:
    """Those of all ranks, on each of them, in the order of ranks."""
    if distributed.world_size() == 1:
        return own
    parts: list[LabelledFeatures] = distributed.gather_objects(own)
    return LabelledFeatures(
        torch.cat([part.features for part in parts]),
        torch.cat([part.labels for part in parts]),
        sum((part.bad for part in parts), Counter[str]()),
    )

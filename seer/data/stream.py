"""The endless stream of batches of this rank: what `seer.data.pool` makes, as tensors.

Every batch is a pure function of its number: nothing is saved and nothing depends on the workers, who share the work.
"""

from __future__ import annotations

import atexit
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import astuple, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from seer.data.assembly import BadSample, BatchAssembler, Origin
from seer.data.crops import CropSpec
from seer.data.decode import DEFAULT_LIMITS, ImageLimits
from seer.data.fetching import Fetcher, briefing_of
from seer.data.history import History
from seer.data.mixture import SourceShare, order_of
from seer.data.photometric_parameters import PhotometricSpec
from seer.data.pool import DEADLINE_SECONDS, BatchPool
from seer.errors import UserError
from seer.remote import is_remote
from seer.shard_list import ShardList, list_digest

__all__ = ["BadSample", "Batch", "DataStream", "QuarantinedSample"]


@dataclass(frozen=True)
class Batch:
    """A rank's part of a global batch. Its tensors hold until the batch after the next one is asked for.

    Attributes:
        crops: one uint8 tensor a resolution, (crops x N, S, S, 3); rows [v*N, (v+1)*N) belong to crop v.
        photometric: one float32 tensor a resolution, (crops x N, P), for `seer.data.photometric`.
        bad: samples that could not be used, stand-ins that were tried in their places among them.
        batch_index: number of the global batch.
    """

    crops: list[Tensor]
    photometric: list[Tensor]
    bad: list[BadSample]
    batch_index: int

    @property
    def replaced(self) -> int:
        """Images of this part of the batch in whose places others stand."""
        return sum(not sample.stand_in for sample in self.bad)


class QuarantinedSample(NamedTuple):
    """A sample that killed its worker, as it is known to every rank and to later lives of a run.

    Attributes:
        shard: file name of the tar.
        digest: of the tar (`seer.shard_list.ListedShard`): tars in different folders may share a name.
        sample: its place in the tar.
    """

    shard: str
    digest: str
    sample: int


class DataStream:
    """Batches of multi-crop images out of indexed tar shards.

    Args:
        shards: the shards.
        seed: keys order, crops and colours.
        global_batch_size: images a batch over all ranks; a multiple of world_size.
        crops: the resolutions, the large one first.
        flip_probability: share of mirrored crops.
        photometric: distribution of colour and blur.
        limits: which images are refused.
        decoder: what makes the crops, one of `seer.decoders.DECODERS` that is installed.
        workers: processes that decode and crop; 0 does it in the calling process. They die with the thread that started
            them, so call `batches` in the main thread.
        deadline_seconds: a worker that decodes one image for so long, or reads one for five times as long, is replaced.
        lanes, window: how samples are mixed (`seer.data.order.ShardOrder`); by default an epoch as a whole.
        sources: whose shards these are, where every batch has fixed shares of several sources.
        history: since which batch each shard is among them; by default since the first.
        rank, world_size: this process's part: slots [rank*N, (rank+1)*N) of each batch.

    Raises:
        UserError: a batch that cannot be cut into equal parts, or fewer samples than a batch.
    """

    def __init__(
        self,
        shards: ShardList,
        *,
        seed: int,
        global_batch_size: int,
        crops: list[CropSpec],
        flip_probability: float,
        photometric: PhotometricSpec,
        limits: ImageLimits = DEFAULT_LIMITS,
        decoder: str = "pillow",
        workers: int,
        deadline_seconds: float = DEADLINE_SECONDS,
        lanes: int = 1,
        window: int | None = None,
        sources: Sequence[SourceShare] = (),
        history: History | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if global_batch_size % world_size:
            raise UserError(
                f"train.global_batch_size={global_batch_size}",
                f"{world_size} processes take equal parts of a batch",
                f"use a multiple of {world_size}",
            )
        images = global_batch_size // world_size
        history = history or History.beginning(shards, sources)
        order = order_of(
            shards.counts,
            sources,
            history.growths(shards, sources),
            seed=seed,
            global_batch_size=global_batch_size,
            lanes=lanes,
            window=window,
        )
        slots = np.arange(rank * images, (rank + 1) * images, dtype=np.int64)
        assembler = BatchAssembler(
            shards,
            order,
            seed=seed,
            slots=slots,
            specs=crops,
            flip_probability=flip_probability,
            photometric=photometric,
            limits=limits,
            decoder=decoder,
        )
        self.samples, self._order = order.samples, order
        self._shards, self._assembler = shards, assembler
        self._workers, self._deadline_seconds = workers, deadline_seconds
        self._briefing = briefing_of(shards.listed, order, slots, shards.reading, tells=rank == 0)
        self._pool: BatchPool | None = None
        self._fetcher: Fetcher | None = None
        self._running: Generator[Batch, None, None] | None = None
        began_with = history.began_with()
        self._identity: dict[str, int | str | float | list[object]] = {
            "seed": seed,
            "index_digest": list_digest(shard for of_source in began_with.values() for shard in of_source),
            "global_batch_size": global_batch_size,
            "lanes": lanes,
            "window": "epoch" if window is None else window,
            "crops": [list(astuple(spec)) for spec in crops],
            "flip_probability": flip_probability,
            "photometric": list(astuple(photometric)),
            "limits": list(astuple(limits)),
            "decoder": decoder,
        }
        if sources:
            self._identity["mixture"] = [[*source[:2], len(began_with[source.name])] for source in sources]
        if joined := history.identity():
            self._identity["joined"] = joined

    def identity(self) -> dict[str, int | str | float | list[object]]:
        """What the batches are a function of, as JSON: two streams of equal identity are equal.

        `quarantine` is what is known when this is asked: nothing before a run, whose checkpoints name what was found.
        """
        return {**self._identity, "quarantine": [list(sample) for sample in sorted(self.quarantine)]}

    def epochs(self, batch_index: int) -> float:
        """Passes over the data before a batch; what joined later counts from then on."""
        return self._order.epochs(batch_index)

    @property
    def quarantine(self) -> set[QuarantinedSample]:
        """Samples that killed their worker, found by this stream or added to it. They are replaced.

        One that kills always is replaced by the same neighbour from its first occurrence on, whoever finds it: this set
        grows while batches are made and they stay a pure function of the identity and of which samples kill. One that
        kills only at times is used until it is found. Ranks do not tell each other by themselves
        (`add_to_quarantine`).
        """
        listed = self._shards.listed
        return {
            QuarantinedSample(listed[shard].name, listed[shard].digest, sample)
            for shard, sample in self._assembler.quarantine
        }

    def add_to_quarantine(self, samples: Iterable[QuarantinedSample]) -> None:
        """Replaces samples that killed a worker elsewhere: on another rank, or before the run was resumed.

        They are replaced by what takes their place where a worker dies of them, so batches change only where a sample
        is no longer deadly. Tars that are not among the shards are passed over.
        """
        places: dict[tuple[str, str], set[int]] = {}
        for name, digest, sample in samples:
            places.setdefault((name, digest), set()).add(sample)
        found = {
            (number, sample)
            for number, shard in enumerate(self._shards.listed if places else ())
            for sample in places.get((shard.name, shard.digest), ())
        }
        if self._pool is not None:
            self._pool.quarantine(found)
        else:
            self._assembler.quarantine |= found

    @property
    def remote_shards(self) -> tuple[int, int]:
        """How many shards lie behind addresses, and their bytes."""
        sizes = [shard.tar_size for shard in self._shards.listed if is_remote(shard.location)]
        return len(sizes), sum(sizes)

    @property
    def memory(self) -> NDArray[np.uint8]:
        """In which the batches of the running iterator lie, all of them in turn."""
        return np.empty(0, np.uint8) if self._pool is None else self._pool.memory

    @property
    def worker_pids(self) -> list[int]:
        """Process ids of the workers; a replaced one has another."""
        return [] if self._pool is None else self._pool.pids

    @property
    def worker_deaths(self) -> int:
        """Workers of the running iterator that died or hung and were replaced."""
        return 0 if self._pool is None else self._pool.deaths

    def batches(self, batch_index: int) -> Iterator[Batch]:
        """Endless batches from a number on, in order; a later call ends the earlier iterator.

        The tensors of a batch are views of memory that is used again: they hold until the batch after the next one is
        asked for. Who needs them longer copies them.

        Raises (from next):
            UserError: a shard is gone, truncated or changed, its images cannot be decoded, or workers keep dying.
        """
        self.close()
        if self._briefing is not None:
            self._fetcher = Fetcher(self._briefing, batch_index)
        atexit.register(self.close)
        self._pool = BatchPool(
            self._assembler,
            workers=self._workers,
            first=batch_index,
            may_fork=not torch.cuda.is_initialized(),  # type: ignore[no-untyped-call]
            deadline_seconds=self._deadline_seconds,
        )
        self._running = _batches(self._pool, self._fetcher)
        return self._running

    def look(self, batch_index: int, images: int) -> tuple[Batch, list[Origin]]:
        """The first images of this rank's part of any batch, at most so many, and what each was cut from.

        The same crops and parameters as in that batch, in tensors of their own; made by the calling process, beside
        whatever `batches` does. Of remote shards only those that hold these images are fetched.

        Raises:
            UserError: as `batches`.
        """
        assembler = self._assembler.first(images)
        arrays: list[Any] = [np.empty(shape, dtype) for shape, dtype in assembler.layout]
        crops, photometric = arrays[: assembler.resolutions], arrays[assembler.resolutions :]
        cuts = assembler.cut(batch_index, range(assembler.images), crops, photometric)
        batch = Batch(
            [torch.from_numpy(pixels) for pixels in crops],
            [torch.from_numpy(rows) for rows in photometric],
            [sample for cut in cuts for sample in cut.bad],
            batch_index,
        )
        return batch, assembler.origins(cuts)

    def close(self) -> None:
        """Ends the workers."""
        atexit.unregister(self.close)
        if self._running is not None:
            self._running.close()
        if self._pool is not None:
            self._pool.close()
        if self._fetcher is not None:
            self._fetcher.close()
        self._running = self._pool = self._fetcher = None


def _batches(pool: BatchPool, fetcher: Fetcher | None) -> Generator[Batch, None, None]:
    with closing(pool):
        while True:
            made = pool.next()
            if fetcher is not None:
                fetcher.at(made.batch_index + 1)
            yield Batch(
                [torch.from_numpy(pixels) for pixels in made.crops],
                [torch.from_numpy(rows) for rows in made.photometric],
                made.bad,
                made.batch_index,
            )

"""The endless stream of batches: worker processes that make whole batches of this rank, handed out in order.

Every batch is a pure function of its number: nothing is saved and nothing depends on the workers, who only take turns.
"""

from __future__ import annotations

import atexit
import ctypes
import itertools
import multiprocessing
import os
import signal
import sys
import warnings
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import astuple, dataclass

import numpy as np
import PIL
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from seer.data.assembly import BadSample, BatchAssembler
from seer.data.crops import CropSpec
from seer.data.order import ShardOrder
from seer.data.photometric_parameters import PhotometricSpec
from seer.errors import UserError
from seer.shard_index import ShardList

__all__ = ["BadSample", "Batch", "DataStream"]

_PREFETCHED = 2  # batches each worker holds ready
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Batch:
    """A rank's part of a global batch.

    Attributes:
        crops: one uint8 tensor a resolution, (crops x N, S, S, 3); rows [v*N, (v+1)*N) belong to crop v.
        photometric: one float32 tensor a resolution, (crops x N, P), for `seer.data.photometric`.
        bad: samples that were replaced.
        batch_index: number of the global batch.
    """

    crops: list[Tensor]
    photometric: list[Tensor]
    bad: list[BadSample]
    batch_index: int


class DataStream:
    """Batches of multi-crop images out of indexed tar shards.

    Args:
        shards: the shards.
        seed: keys order, crops and colours.
        global_batch_size: images a batch over all ranks; a multiple of world_size.
        crops: the resolutions, the large one first.
        flip_probability: share of mirrored crops.
        photometric: distribution of colour and blur.
        workers: processes that decode and crop; 0 does it in the calling process. They die with the thread that started
            them, so call `batches` in the main thread.
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
        workers: int,
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
        order = ShardOrder(shards.counts, seed=seed, global_batch_size=global_batch_size)
        assembler = BatchAssembler(
            shards.shards,
            order,
            seed=seed,
            slots=np.arange(rank * images, (rank + 1) * images, dtype=np.int64),
            specs=crops,
            flip_probability=flip_probability,
            photometric=photometric,
        )
        self.batches_per_epoch, self.samples = order.batches_per_epoch, order.samples
        self._tasks, self._workers = _Tasks(assembler), workers
        self._running: list[Generator[Batch, None, None]] = []
        self._identity: dict[str, int | str | float | list[object]] = {
            "seed": seed,
            "index_digest": shards.digest,
            "global_batch_size": global_batch_size,
            "lanes": 1,
            "window": "epoch",
            "crops": [list(astuple(spec)) for spec in crops],
            "flip_probability": flip_probability,
            "photometric": list(astuple(photometric)),
            # pillow-simd's versions end in .postN; its crops differ from Pillow's by up to one level.
            "decoder": "pillow-simd" if ".post" in PIL.__version__ else "pillow",
            "quarantine": [],
        }

    def identity(self) -> dict[str, int | str | float | list[object]]:
        """What the batches are a function of, as JSON: two streams of equal identity are equal."""
        return dict(self._identity)

    def batches(self, batch_index: int) -> Iterator[Batch]:
        """Endless batches from a number on, in order; a later call ends the earlier iterator.

        Raises (from next):
            UserError: a shard is gone, truncated or changed, or its images cannot be decoded.
        """
        self.close()
        running = self._batches(batch_index)
        self._running.append(running)
        # Workers ignore the signal by which multiprocessing ends its children at exit: they are told before it waits.
        atexit.register(self.close)
        return running

    def close(self) -> None:
        """Ends the workers."""
        atexit.unregister(self.close)
        while self._running:
            self._running.pop().close()

    def _batches(self, batch_index: int) -> Generator[Batch, None, None]:
        with closing(self._made(batch_index)) as batches:
            for made in batches:
                if isinstance(made, UserError):
                    raise made
                yield made

    def _made(self, batch_index: int) -> Generator[Batch | UserError, None, None]:
        numbers = itertools.count(batch_index)
        if self._workers == 0:
            yield from map(self._tasks.__getitem__, numbers)
            return
        loader = DataLoader(
            self._tasks,
            batch_size=None,
            sampler=numbers,
            num_workers=self._workers,
            collate_fn=_as_it_is,  # type: ignore[arg-type]
            worker_init_fn=_start_worker,
            multiprocessing_context=multiprocessing.get_context(_start_method()),
            prefetch_factor=_PREFETCHED,
            generator=torch.Generator(),  # else it draws the workers' seed, which nobody uses, from the global stream
        )
        with warnings.catch_warnings():
            # From Python 3.12 a fork under live threads is warned of; the workers start no thread pool of torch.
            warnings.filterwarnings("ignore", message=".*fork.*", category=DeprecationWarning)
            iterator = iter(loader)
        yield from iterator


def lost_worker(error: RuntimeError) -> UserError | None:
    """What to say when torch tells, in whatever line of the main process is running, that a data worker was killed."""
    if "DataLoader worker" not in str(error):
        return None
    return UserError(
        str(error).splitlines()[0],
        "a data worker that is killed takes its batch with it; mostly memory ran out",
        "run the same command again, with fewer data.workers",
    )


class _Tasks(Dataset[Batch | UserError]):
    """Number of a batch -> batch. A user's error travels as a value: torch would wrap it in a worker's traceback."""

    def __init__(self, assembler: BatchAssembler) -> None:
        self._assembler = assembler

    def __getitem__(self, batch_index: int) -> Batch | UserError:
        crops = [torch.empty(shape, dtype=torch.uint8) for shape in self._assembler.shapes]
        if torch.utils.data.get_worker_info() is not None:
            try:
                for tensor in crops:
                    tensor.share_memory_()  # type: ignore[no-untyped-call]  # written where the main process will read it
            except RuntimeError as error:
                return UserError(
                    f"/dev/shm has no room for another batch ({error})".splitlines()[0],
                    "workers hand batches over in shared memory",
                    "start the container with --shm-size=8g, or use data.workers=0",
                )
        try:
            bad = self._assembler.fill(batch_index, [tensor.numpy() for tensor in crops])
        except UserError as error:
            return error
        parameters = [torch.from_numpy(found) for found in self._assembler.parameters(batch_index)]
        return Batch(crops, parameters, bad, batch_index)


def _as_it_is(made: Batch | UserError) -> Batch | UserError:
    return made


def _start_method() -> str:
    """Fork is quick and shares the indexes; a process that holds a GPU must not fork, and only Linux forks safely."""
    cuda_in_use = bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]
    return "fork" if sys.platform == "linux" and not cuda_in_use else "forkserver"


def _start_worker(_: int) -> None:
    # The run's own handlers and the terminal's Ctrl-C are for the main process, which ends the workers when it is done.
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(name, signal.SIG_IGN)
    torch.set_num_threads(1)
    if sys.platform == "linux":
        parent = os.getppid()
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died in between
            os._exit(1)

"""Batches on a GPU: copied out of pinned memory on a stream of their own, while the step before still runs."""

from __future__ import annotations

import contextlib
import sys
from collections import deque
from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, cuda

from seer.data.stream import Batch
from seer.rank_environment import first_of_machine

# A batch of `DataStream.batches` holds until the batch after the next one is asked for; so do those that are made here.
_HELD = 2


def on_device(
    batches: Iterator[Batch], memory: NDArray[np.uint8], device: torch.device
) -> Generator[Batch, None, None]:
    """Batches with their crops on the device; everything else stays on the host.

    On a GPU the memory is pinned once, and a copy waits for nothing but the step before the last one. The host waits
    for a copy only where its memory is about to be written again, two batches later.

    Args:
        batches: of `DataStream.batches`.
        memory: in which they lie (`DataStream.memory`).

    Yields:
        Batches whose tensors hold until the batch after the next one is asked for.
    """
    yield from batches if device.type == "cpu" else from_pinned(batches, memory, device)


def from_pinned(
    batches: Iterator[Batch], memory: NDArray[np.uint8], device: torch.device
) -> Generator[Batch, None, None]:
    """What `on_device` does on a GPU."""
    with pinned(memory, device), contextlib.closing(_copied(batches, device)) as copied:
        yield from copied


@contextlib.contextmanager
def pinned(memory: NDArray[np.uint8], device: torch.device) -> Iterator[None]:
    """Locks memory, so that copies out of it need no help of the host. Where that is refused they work, but wait."""
    runtime = cuda.cudart()  # type: ignore[no-untyped-call]
    refusal = int(runtime.cudaHostRegister(memory.ctypes.data, memory.nbytes, 0))
    if refusal:
        with contextlib.suppress(RuntimeError):
            torch.zeros(1, device=device)  # CUDA tells a refusal again to whoever calls next
        if first_of_machine():
            print(
                f"seer: CUDA does not pin the memory of the batches ({memory.nbytes / 2**20:.0f} MiB, cudaError "
                f"{refusal}), so steps wait for their copies; give the job more memory, or use fewer data.workers",
                file=sys.stderr,
                flush=True,
            )
    try:
        yield
    finally:
        if not refusal:
            runtime.cudaHostUnregister(memory.ctypes.data)


@dataclass
class _Place:
    """Where every other batch lies on the device.

    Attributes:
        copied: the host's memory has been read.
        used: what reads the crops on the device has run.
    """

    crops: list[Tensor]
    copied: cuda.Event
    used: cuda.Event


def _copied(batches: Iterator[Batch], device: torch.device) -> Generator[Batch, None, None]:
    side = cuda.Stream(device)  # type: ignore[no-untyped-call]
    places: deque[_Place] = deque()
    try:
        while True:
            compute = cuda.current_stream(device)
            if places:
                places[-1].used.record(compute)  # by now everything that reads the last batch is queued
            if len(places) == _HELD:
                places[0].copied.synchronize()  # asking for a batch overwrites this one's memory
            batch = next(batches, None)
            if batch is None:
                return
            if len(places) == _HELD:
                place = places.popleft()
            else:
                crops = [torch.empty_like(crops, device=device) for crops in batch.crops]
                copied, used = cuda.Event(), cuda.Event()  # type: ignore[no-untyped-call]
                place = _Place(crops, copied, used)
                place.used.record(compute)  # queued work may still read what lay there before
            with cuda.stream(side):
                side.wait_event(place.used)
                for there, here in zip(place.crops, batch.crops, strict=True):
                    there.copy_(here, non_blocking=True)
                place.copied.record(side)
            compute.wait_event(place.copied)
            places.append(place)
            yield replace(batch, crops=place.crops)
    finally:
        side.synchronize()  # before the memory goes

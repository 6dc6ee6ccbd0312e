"""No copy reads memory that is written again, and no batch on the device is overwritten while it is read.

Without a GPU its streams are played: queues of calls that run as late as they may, or as early.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from seer.data import transfer
from seer.data.stream import Batch
from seer.data.transfer import on_device

BATCHES = 12


class PlayedStream:
    """Calls in order, which run when somebody waits for them; at once where the stream is eager."""

    def __init__(self, *, eager: bool) -> None:
        self._eager, self._calls = eager, deque[Callable[[], object]]()
        self.queued = self.done = 0

    def enqueue(self, call: Callable[[], object]) -> None:
        self._calls.append(call)
        self.queued += 1
        if self._eager:
            self.synchronize()

    def run_until(self, place: int) -> None:
        while self.done < place:
            call = self._calls.popleft()
            self.done += 1
            with _disable_current_modes():
                call()

    def synchronize(self) -> None:
        self.run_until(self.queued)

    def wait_event(self, event: PlayedEvent) -> None:
        self.enqueue(event.moment())


class PlayedEvent:
    def record(self, stream: PlayedStream) -> None:
        self._stream, self._place = stream, stream.queued

    def moment(self) -> Callable[[], None]:
        """Waits for what is recorded now, whatever is recorded later."""
        stream, place = self._stream, self._place
        return lambda: stream.run_until(place)

    def synchronize(self) -> None:
        self.moment()()


class Enqueued(TorchDispatchMode):
    """Within it copies are put into a stream's queue."""

    def __init__(self, stream: PlayedStream) -> None:
        super().__init__()
        self._stream = stream

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is torch.ops.aten.copy_.default
        there, here, non_blocking = args
        assert non_blocking
        self._stream.enqueue(lambda: there.copy_(here))
        return there


class PlayedCuda:
    """What of torch.cuda is used, on the CPU."""

    def __init__(self, *, eager: str, refusal: int = 0) -> None:
        self.compute = PlayedStream(eager=eager == "steps")
        self.side = PlayedStream(eager=eager == "copies")
        self.calls: list[tuple[object, ...]] = []
        self._refusal = refusal

    def Stream(self, device: torch.device) -> PlayedStream:
        return self.side

    def Event(self) -> PlayedEvent:
        return PlayedEvent()

    def current_stream(self, device: torch.device) -> PlayedStream:
        return self.compute

    def stream(self, stream: PlayedStream) -> Enqueued:
        return Enqueued(stream)

    def cudart(self) -> PlayedCuda:
        return self

    def cudaHostRegister(self, *range_and_flags: int) -> int:
        self.calls.append(("register", *range_and_flags))
        return self._refusal

    def cudaHostUnregister(self, *start: int) -> int:
        assert self.side.done == self.side.queued, "a copy is under way"
        self.calls.append(("unregister", *start))
        return 0


def ring(rows: int) -> tuple[Iterator[Batch], NDArray[np.uint8]]:
    """Batch n is full of n until the batch after the next one is asked for."""
    memory = np.zeros((2, rows, 8, 8, 3), np.uint8)

    def batches() -> Iterator[Batch]:
        for number in range(BATCHES):
            slot = memory[number % 2]
            slot[:] = number
            cut = rows // 3
            yield Batch([torch.from_numpy(slot[:cut]), torch.from_numpy(slot[cut:])], [torch.ones(2)], [], number)

    return batches(), memory


@pytest.mark.parametrize("eager", ["copies", "steps", "neither"])
def test_every_batch_arrives_whole(eager: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = PlayedCuda(eager=eager)
    monkeypatch.setattr(transfer, "cuda", cuda)
    batches, memory = ring(rows=6)
    seen: list[set[int]] = []
    for batch in transfer.from_pinned(batches, memory, torch.device("cpu")):
        assert [len(crops) for crops in batch.crops] == [2, 4] and batch.photometric[0].device.type == "cpu"
        step = lambda crops=batch.crops: seen.append({*torch.cat(crops).flatten().tolist()})  # noqa: E731
        cuda.compute.enqueue(step)
    cuda.compute.synchronize()
    assert seen == [{number} for number in range(BATCHES)]
    assert cuda.calls == [("register", memory.ctypes.data, memory.nbytes, 0), ("unregister", memory.ctypes.data)]


def test_memory_that_cannot_be_pinned_is_told_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cuda = PlayedCuda(eager="neither", refusal=2)
    monkeypatch.setattr(transfer, "cuda", cuda)
    with transfer.pinned(np.zeros(3 << 20, np.uint8), torch.device("cpu")):
        told = capsys.readouterr().err
    assert told.count("\n") == 1 and "(3 MiB, cudaError 2)" in told and "fewer data.workers" in told
    assert [name for name, *_ in cuda.calls] == ["register"]


def test_on_a_cpu_batches_are_passed_on() -> None:
    batches, memory = ring(rows=6)
    passed = on_device(batches, memory, torch.device("cpu"))
    assert np.shares_memory(next(passed).crops[0].numpy(), memory)
    passed.close()
    with pytest.raises(StopIteration):
        next(batches)


@pytest.mark.gpu
@pytest.mark.parametrize("slow", ["host", "device"])
def test_every_batch_arrives_whole_on_a_gpu(slow: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Of 113 MB each, so that a copy takes longer than what the host does in between."""
    batches, memory = ring(rows=590_000)
    seen = []
    for batch in on_device(batches, memory, torch.device("cuda")):
        if slow == "device":
            torch.cuda._sleep(100_000_000)
        elif slow == "host":
            torch.cuda.synchronize()
        crops = torch.cat(batch.crops)
        seen.append(torch.stack([crops.amin(), crops.amax()]))
    assert torch.stack(seen).tolist() == [[number, number] for number in range(BATCHES)]
    assert capsys.readouterr().err == ""


@pytest.mark.gpu
def test_memory_that_cannot_be_pinned_is_copied_all_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    batches, memory = ring(rows=600)
    device = torch.device("cuda")
    with transfer.pinned(memory, device):
        found = [int(batch.crops[1].amax()) for batch in on_device(batches, memory, device)]
    assert found == [*range(BATCHES)]
    assert "cudaError 712" in capsys.readouterr().err, "it was pinned already"

"""Stopping a run on request: a signal only sets a flag; ranks agree in their next step, save together and leave."""

from __future__ import annotations

import os
import signal
import sys
import time
from types import FrameType

import torch
from torch import Tensor

_ASKS_FOR_ANOTHER_LIFE = (signal.SIGUSR1, signal.SIGUSR2)  # what schedulers send ahead of the end of a job


class StopRequest:
    """Listens for SIGINT, SIGTERM, SIGUSR1 and SIGUSR2 while it is open, and for the clock.

    The first signal, on any rank, asks all ranks to save and leave. A handler must not save by itself: it runs in the
    middle of whatever line is executing, a half-taken step included, and on one rank. A second SIGINT or SIGTERM leaves
    at once.

    Args:
        deadline: unix time at which the run must have been saved and left, and asks to be queued again; only rank 0's
            counts (clocks of machines are never compared). None: there is none.
        patient: whether a second signal too waits for the save: schedulers repeat theirs, and have SIGKILL for those
            who do not listen.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, *_ASKS_FOR_ANOTHER_LIFE)

    def __init__(self, *, deadline: float | None = None, patient: bool = False) -> None:
        self.received: signal.Signals | None = None
        self.save_seconds = 0.0
        self._deadline, self._patient = deadline, patient
        self._told: list[tuple[Tensor, torch.cuda.Event | None]] = []
        self._requests = (False, False)
        self._before = {number: signal.signal(number, self._handle) for number in self.SIGNALS}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        first, self.received = self.received, self.received or signal.Signals(number)
        if first is None:
            print(
                f"seer: {self.received.name} received: saving at the end of this step"
                + ("" if self._patient else "; a second signal leaves at once"),
                file=sys.stderr,
                flush=True,
            )
        elif not self._patient:
            os._exit(128 + number)

    def of_this_rank(self) -> tuple[bool, bool]:
        """Whether this rank asks to stop, and to be queued again: what it tells the others in its next step."""
        # The save comes after one more step at most, and may take longer than the last.
        late = self._deadline is not None and time.time() + 1.5 * self.save_seconds >= self._deadline
        again = late or self.received in _ASKS_FOR_ANOTHER_LIFE
        return again or self.received is not None, again

    def observe(self, requests: Tensor) -> None:
        """Take note of what all ranks asked for in a step, (2,) on the device; nobody waits for it yet."""
        event = None
        if requests.is_cuda:
            requests = requests.to("cpu", non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
        self._told.append((requests, event))

    def agreed(self) -> bool:
        """Whether all ranks save and leave now, the same on all.

        On a GPU as of the step before the last: the last one is still being computed, and waiting for it each time
        would keep the device idle.
        """
        while self._told and (self._told[0][1] is None or len(self._told) > 1):
            requests, event = self._told.pop(0)
            if event is not None:
                event.synchronize()
            stop, again = requests.tolist()
            self._requests = (self._requests[0] or stop > 0, self._requests[1] or again > 0)
        return self._requests[0]

    @property
    def again(self) -> bool:
        """Whether the run shall be queued again, as all ranks agreed."""
        return self._requests[1]

    def close(self) -> None:
        """Give the signals back to whoever had them."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

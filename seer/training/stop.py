"""Stopping a run on request: a signal only sets a flag; the loop saves at the next step boundary and leaves."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

EXIT_STOPPED = 75  # EX_TEMPFAIL: go on with the same command


class StopRequest:
    """Listens for SIGINT, SIGTERM, SIGUSR1 and SIGUSR2 while it is open.

    The first one asks the loop to save and leave; a second one leaves at once. A handler must not save by itself: it
    runs in the middle of whatever line is executing, a half-taken step included.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._before = {number: signal.signal(number, self._handle) for number in self.SIGNALS}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            os._exit(128 + number)
        self.received = signal.Signals(number)
        print(
            f"seer: {self.received.name} received: saving at the end of this step; a second signal leaves at once",
            file=sys.stderr,
            flush=True,
        )

    def agreed(self) -> bool:
        """Whether the run shall save and leave now."""
        return self.received is not None

    def close(self) -> None:
        """Give the signals back to whoever had them."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

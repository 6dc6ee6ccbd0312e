"""Standard output that a run does not depend on."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
from typing import TextIO


class Steadfast(io.TextIOBase):
    """Standard output that may go away (`| head`, a full disk under the log): the run goes on without it."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._or_nowhere(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._or_nowhere(self._stream.flush)

    def isatty(self) -> bool:
        return self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._stream.encoding

    def _or_nowhere(self, act: Callable[[], object]) -> None:
        try:
            act()
        except OSError as error:
            print(f"seer: standard output is gone ({error.strerror}); the run goes on without it", file=sys.stderr)
            # The descriptor itself: what the stream still holds back must find a way out when the process ends.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)

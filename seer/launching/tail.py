"""Showing a log while it is written."""

from __future__ import annotations

import codecs
import sys
from pathlib import Path


class Tail:
    """Copies to standard output what is appended to a file from now on; the file need not exist yet."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._offset = file.stat().st_size if file.exists() else 0
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def copy(self) -> None:
        """Print what came since the last call."""
        try:
            with open(self._file, "rb") as stream:
                stream.seek(self._offset)
                new = stream.read()
        except OSError:  # not there yet, or a network file system that takes its time
            return
        if new:
            self._offset += len(new)
            sys.stdout.write(self._decoder.decode(new))
            sys.stdout.flush()

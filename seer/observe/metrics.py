"""Files of JSON lines: one object a line, each written by one call, so that a kill can only tear the last one."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from seer.files import cannot_write, write_atomically


class MetricsFile:
    """A file of JSON lines that grows at its end; each has the key ``step``. The first makes the file and its folder.

    A number that is not finite is written as null: JSON has no NaN.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._mended = False

    def write(self, line: Mapping[str, Any]) -> None:
        """Append one object.

        Raises:
            UserError: the disk is full or cannot be written.
        """
        data = (json.dumps({key: _plain(value) for key, value in line.items()}, allow_nan=False) + "\n").encode()
        try:
            if not self._mended:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._drop_torn_line()
                self._mended = True
            descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                if os.write(descriptor, data) != len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            finally:
                os.close(descriptor)
        except OSError as error:
            self._mended = False
            raise cannot_write(self.path, error) from None

    def read(self) -> list[dict[str, Any]]:
        """All lines that are whole, in order; none where there is no file.

        Raises:
            UserError: the file cannot be read.
        """
        return [line for _, line in self._lines()]

    def cut_back(self, step: int) -> None:
        """Keep the lines up to and including a step: the run that goes on from there writes the later ones again.

        Raises:
            UserError: the file cannot be read, or the disk is full or cannot be written; the file is unchanged then.
        """
        try:
            if not self.path.exists():
                return
            kept = b"".join(raw + b"\n" for raw, line in self._lines() if line.get("step", 0) <= step)
            write_atomically(self.path, kept)
        except OSError as error:
            raise cannot_write(self.path, error) from None

    def _lines(self) -> list[tuple[bytes, dict[str, Any]]]:
        try:
            whole = self.path.read_bytes().split(b"\n")[:-1]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise cannot_write(self.path, error) from None
        found = []
        for raw in whole:
            try:
                line = json.loads(raw)
            except (ValueError, RecursionError):
                continue  # torn by a kill or a full disk
            if isinstance(line, dict):
                found.append((raw, line))
        return found

    def _drop_torn_line(self) -> None:
        """Cut a last line that a kill left without its end; the next one would be glued to it."""
        try:
            with open(self.path, "rb+") as stream:
                data = stream.read()
                stream.truncate(data.rfind(b"\n") + 1)
        except FileNotFoundError:
            return


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value

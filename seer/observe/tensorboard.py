"""Curves for TensorBoard, where it is installed."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seer.files import cannot_write

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class TensorBoard:
    """Event files in a folder; without TensorBoard one line on stderr says how to get it, and nothing else happens.

    Args:
        folder: where the event files lie; made by the first figures.
        start_step: where the run goes on; TensorBoard hides what an interrupted run wrote after that.
    """

    def __init__(self, folder: Path, start_step: int = 0) -> None:
        self._folder = folder
        self._start_step = start_step
        self._writer: SummaryWriter | None = None
        self._missing = False

    def write(self, step: int, figures: Mapping[str, Any]) -> None:
        """Add a point to the curve of every finite number.

        Raises:
            UserError: the disk is full or cannot be written.
        """
        try:
            writer = self._open()
            if writer is None:
                return
            for name, value in figures.items():
                if isinstance(value, int | float) and math.isfinite(value):
                    writer.add_scalar(name, value, step)
        except OSError as error:
            raise cannot_write(self._folder, error) from None

    def close(self) -> None:
        """Write out what is buffered.

        Raises:
            UserError: the disk is full or cannot be written.
        """
        writer, self._writer = self._writer, None
        if writer is not None:
            try:
                writer.close()
            except OSError as error:
                raise cannot_write(self._folder, error) from None

    def _open(self) -> SummaryWriter | None:
        if self._writer is None and not self._missing:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                self._missing = True
                print(
                    "seer: no TensorBoard curves, it is not installed (metrics.jsonl has all figures); "
                    "to get them: pip install tensorboard",
                    file=sys.stderr,
                )
                return None
            purge = self._start_step + 1 if self._start_step else None
            self._writer = SummaryWriter(str(self._folder), purge_step=purge)
        return self._writer

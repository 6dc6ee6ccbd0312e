"""A run's folder as `seer train` leaves it: opened, and recorded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from seer.run_directory import RunDirectory


def recorded_run(run_dir: str | Path, config: Mapping[str, Any], **recorded: Any) -> RunDirectory:
    """The run, held; its folder is as it was if it cannot be recorded."""
    run = RunDirectory.open(run_dir, config)
    try:
        run.record(**recorded)
    except BaseException:
        run.close()
        raise
    return run

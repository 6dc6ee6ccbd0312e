"""What a process that `seer launch` started reads at its beginning and leaves at its end."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

import yaml

from seer.errors import EXIT_STOPPED, UserError
from seer.files import write_atomically
from seer.rank_environment import rank_environment


def read_frozen(path: str) -> dict[str, Any]:
    """The configuration that `seer launch` wrote, as plain containers.

    Raises:
        UserError: the file cannot be read or is something else.
    """
    try:
        found = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no YAML"
        raise UserError(f"{path} cannot be read ({reason})", "seer launch wrote it", "launch the run again") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} is no configuration", "seer launch wrote it", "launch the run again")
    return found


def leave_status(exit_code: int, message: str | None) -> None:
    """Leave the run's exit code where the launcher looks for it; without a launcher nothing happens.

    Rank 0 speaks for the run, but a rank that leaves for the user's input by itself is its cause: it speaks first, and
    what rank 0 says after it (that another rank is gone) is not heard.
    """
    file = os.environ.get("SEER_STATUS_FILE")
    environment = rank_environment()
    first = environment is None or environment.rank == 0
    if not file or not (first or message) or (exit_code == EXIT_STOPPED and os.path.exists(file)):
        return
    with contextlib.suppress(OSError):  # the run is over, and its own error matters more
        write_atomically(Path(file), json.dumps({"exit_code": exit_code, "message": message}).encode())

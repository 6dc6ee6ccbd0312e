"""`seer runs`: a table of runs, living and ended."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seer.cli.arguments import Arguments, path
from seer.observe.progress import duration

if TYPE_CHECKING:
    from rich.table import Table

    from seer.launching.follow import RunView

HELP = """\
Examples:
  seer runs runs
  seer runs RUN
  seer runs runs --json

Lists the runs in a folder and up to two levels below it, the last active one first. It reads their files, so it works
from any machine that sees them; where squeue is, it also asks which of your jobs wait.

  running   a process holds the run; of one on another machine only the lock is seen: look at the age of the last line
  finished  it took its last step
  stopped   it was asked to stop and saved: the same command goes on
  failed    it ended with an error, which is the last column: the same command goes on from the newest checkpoint
  lost      it ended without saying how: the same command goes on from the newest checkpoint
  queued    seer launch has handed it over, and it has not begun; or its job waits to go on
"""

_STYLES = {
    "running": "green",
    "finished": "bold",
    "stopped": "yellow",
    "failed": "red",
    "lost": "red",
    "queued": "cyan",
}


def run(argv: list[str]) -> int:
    """Exit code of `seer runs ARGV`."""
    arguments = Arguments("seer runs", HELP)
    arguments.add_argument("dir", type=path, metavar="DIR", help="the folder to look in")
    arguments.add_argument("--json", action="store_true", help="print one JSON list and nothing else")
    given = arguments.parse(argv)
    from seer.launching.follow import runs_below

    found = runs_below(given.dir)
    if given.json:
        print(json.dumps([_plain(one) for one in found]))
    elif found:
        from rich.console import Console

        # Where nobody looks at a terminal, in a file or a pipe, a run is one line however long its name is.
        Console(width=None if sys.stdout.isatty() else 1000).print(table(found, given.dir))
    else:
        print(f"no runs in {given.dir}, nor two levels below it")
    return 0


def table(found: list[RunView], base: Path) -> Table:
    """The runs as a table, their folders relative to `base`."""
    from rich.table import Table
    from rich.text import Text

    columns = ("run", "state", "step", "images/s", "loss (chance)", "kNN", "time left", "last line")
    failed = any(one.error for one in found)
    drawn = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in columns:
        drawn.add_column(name, justify="left" if name in ("run", "state") else "right", overflow="fold")
    if failed:
        drawn.add_column("error", overflow="fold")
    for one in found:
        name = one.folder.name if one.folder == base else str(one.folder.relative_to(base))
        state = f"{one.state} on {one.host}" if one.is_elsewhere else one.state
        speed = None if one.images_per_s is None else f"{one.images_per_s:,.{0 if one.images_per_s >= 10 else 1}f}"
        drawn.add_row(
            Text(name),
            Text(state, style=_STYLES[one.state]),
            _step(one),
            speed or "-",
            _loss(one),
            "-" if one.knn_top1 is None else f"{one.knn_top1:.1%}",
            "-" if one.seconds_left is None else duration(one.seconds_left),
            "-" if one.line_age_seconds is None else f"{duration(one.line_age_seconds)} ago",
            *([Text(one.error or "")] if failed else []),
        )
    return drawn


def _step(one: RunView) -> str:
    if one.step is None:
        return "-"
    return f"{one.step:,}/{'?' if one.total_steps is None else format(one.total_steps, ',')}"


def _loss(one: RunView) -> str:
    if one.chance is None:
        return "-"
    return f"{'not finite' if one.loss is None else format(one.loss, '.2f')} ({one.chance:.2f})"


def _plain(one: RunView) -> dict[str, Any]:
    return dataclasses.asdict(one) | {"folder": str(one.folder)}

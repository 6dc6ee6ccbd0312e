"""`seer doctor`: what this machine offers to a run, and what to mend."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from seer.cli.arguments import Arguments

HELP = """\
Examples:
  seer doctor
  seer doctor --json
  srun --nodes=2 --ntasks-per-node=1 seer doctor

Looks over this machine in a few seconds and prints one line a finding, with the remedy where something is to be mended.

  ok        as it should be
  warning   runs work, but slowly, or not on several machines
  problem   runs would fail; the exit code is then 1, else 0
"""

_STYLES = {"ok": "green", "warning": "yellow", "problem": "bold red"}


def run(argv: list[str]) -> int:
    """Exit code of `seer doctor ARGV`."""
    arguments = Arguments("seer doctor", HELP)
    arguments.add_argument("--json", action="store_true", help="print one JSON list and nothing else")
    given = arguments.parse(argv)
    from seer.launching import buckets, machine

    found = machine.look(Path.cwd()) + buckets.look()
    if given.json:
        print(json.dumps([dataclasses.asdict(one) for one in found]))
    else:
        from rich.console import Console
        from rich.text import Text

        console = Console(soft_wrap=True, highlight=False)
        for one in found:
            remedy = f"; {one.remedy}" if one.remedy else ""
            console.print(Text(f"{one.level:9}", style=_STYLES[one.level]) + f"{one.subject:13}{one.message}{remedy}")
    return int(any(one.level == "problem" for one in found))

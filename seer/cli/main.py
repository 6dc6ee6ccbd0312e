"""The command `seer`: finds the verb, hands it the rest of the words, and puts every error into words.

A verb is a module with `run(argv) -> exit code`, imported when it is called: torch takes seconds, help must not.

Exit codes: 0 done; 2 the user's input; 75 stopped, the same command goes on; 130 interrupted; 141 nobody reads the
output; 1, with a traceback, a bug.
"""

from __future__ import annotations

import errno
import importlib
import os
import select
import sys
import time
from collections.abc import Sequence
from typing import NamedTuple

from seer import __version__
from seer.errors import ToldElsewhere, UserError, closest


class Verb(NamedTuple):
    """One line of help, and the module that does it."""

    summary: str
    module: str


VERBS = {
    "shards": Verb("pack images into tar shards, index and verify shards", "seer.cli.shards"),
    "preview": Verb("draw what the network sees: images, their crops, colours", "seer.cli.preview"),
    "train": Verb("pretrain a RegNetY on shards, without labels", "seer.cli.train"),
    "launch": Verb("put a run on the GPUs of this machine or of a SLURM cluster", "seer.cli.launch"),
    "evaluate": Verb("score a run's features on labelled shards", "seer.cli.evaluate"),
    "export": Verb("write a run's weights as a file that timm loads", "seer.cli.export"),
    "runs": Verb("list runs: state, step, speed, loss, time left", "seer.cli.runs"),
    "doctor": Verb("look over this machine, and say what to mend", "seer.cli.doctor"),
}

# What the machine refuses and a user can mend, wherever it surfaces.
_ENVIRONMENT = (errno.ENAMETOOLONG, errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM)

_TELLING_SECONDS = 5.0

_EXAMPLES = """\
seer shards pack PHOTOS_DIR --out SHARDS_DIR
seer train experiment=small data.shards='SHARDS_DIR/*.tar' run_dir=RUN
seer evaluate knn --run RUN --train 'LABELLED/train/*.tar' --val 'LABELLED/val/*.tar'
seer export --run RUN --format timm --out regnety.safetensors
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code.

    Args:
        argv: the words after `seer`; default: those of the process.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        try:
            code = _dispatch(words)
        except SystemExit as end:  # argparse, after the help of a verb
            code = int(end.code or 0)
        sys.stdout.flush()
        return code
    except UserError as error:
        if isinstance(error, ToldElsewhere):
            # Launchers end all processes with the first that leaves: it has to be the one that tells.
            time.sleep(_TELLING_SECONDS)
        else:
            print(f"seer: {error}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        print("seer: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        if not _output_is_gone():
            raise
        return 141
    except OSError as error:
        if error.errno not in _ENVIRONMENT:
            raise
        what = f"{str(error.filename)[:80]}: " if error.filename else ""
        print(f"seer: {what}{error.strerror}: give a place that can be written, and a shorter name", file=sys.stderr)
        return 2


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        print(_help(), end="")
        return 0
    if words[0] == "--version":
        print(f"seer {__version__}")
        return 0
    verb = VERBS.get(words[0])
    if verb is None:
        remedy = f"write seer train {words[0]}" if "=" in words[0] else closest(words[0], VERBS)
        raise UserError(words[0], "the first word after seer is a verb", remedy)
    code: int = importlib.import_module(verb.module).run(words[1:])
    return code


def _help() -> str:
    examples = "".join(f"  {line}\n" for line in _EXAMPLES.splitlines())
    verbs = "".join(f"  {name:10}{verb.summary}\n" for name, verb in VERBS.items())
    return (
        f"Examples:\n{examples}\nseer: self-supervised pretraining of RegNetY on your own images.\n\n"
        f"Verbs:\n{verbs}\n`seer VERB --help` says more; `seer --version` says which version this is.\n"
    )


def _output_is_gone() -> bool:
    """Whether it was standard output that broke (as in `seer train --help | head`), and not a pipe of our own."""
    try:
        output = sys.stdout.fileno()
    except (OSError, ValueError):
        return False
    poll = select.poll()
    poll.register(output, select.POLLOUT)
    if not any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0)):
        return False
    # The interpreter flushes once more at exit, and would complain.
    os.dup2(os.open(os.devnull, os.O_WRONLY), output)
    return True

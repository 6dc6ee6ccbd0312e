"""The command `seer`: finds the verb, hands it the rest of the words, and puts every error into words.

A verb is a module with `run(argv) -> exit code`, imported when it is called: torch takes seconds, help must not.

Exit codes: 0 done; 2 the user's input; 75 stopped, the same command goes on; 130 interrupted; 141 nobody reads the
output; 1, with a traceback, a bug.
"""

from __future__ import annotations

import errno
import importlib
import io
import os
import select
import sys
import time
from collections.abc import Sequence
from typing import NamedTuple

from seer import __version__
from seer.errors import ToldElsewhere, UserError, closest, printable


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
_ENVIRONMENT = (
    *(errno.ENAMETOOLONG, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO),
    *(errno.EROFS, errno.EACCES, errno.EPERM),
)

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
    _mend_streams()
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
            _tell(str(error))
        return 2
    except KeyboardInterrupt:
        _tell("interrupted")
        return 130
    except BrokenPipeError:
        if not _output_is_gone():
            raise
        return 141
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):
            _tell(f"{error.strerror}: raise the limit (ulimit -n 4096), or give fewer --workers")
            return 2
        if error.errno not in _ENVIRONMENT:
            raise
        what = printable(f"{str(error.filename)[:80]}: ") if error.filename else ""
        _tell(f"{what}{error.strerror}: give a place that can be written, and a shorter name")
        return 2


def _tell(sentence: str) -> None:
    try:
        print(f"seer: {sentence}", file=sys.stderr, flush=True)
    except OSError:  # nobody hears it: the exit code still tells, unless Python tries once more when it ends
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115


def _mend_streams() -> None:
    """Takes care that words go out, or nowhere: of a name that the terminal cannot write as an escape."""
    # Where a stream was closed (`2>&-`), the next file that is opened would get its number, and then its words.
    while (file := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(file, True)
    os.close(file)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


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

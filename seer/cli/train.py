"""`seer train`: composes the configuration, checks it, and runs it."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import json
import signal
import sys
import textwrap
import typing
from pathlib import Path

import yaml

from seer import config as schema
from seer.cli.steadfast import Steadfast
from seer.compose import compose, flat, groups, key_types, thaw
from seer.config import TrainConfig, freeze
from seer.errors import EXIT_STOPPED, LostRank, ToldElsewhere, UserError
from seer.launching import slurm
from seer.launching.entry import leave_status, read_frozen
from seer.rank_environment import rank_environment, told_once
from seer.validation import validate

HELP = """\
Examples:
  seer train experiment=small data.shards='SHARDS_DIR/*.tar' run_dir=RUN
  seer train experiment=small data.shards='SHARDS_DIR/train-{000..127}.tar' run_dir=RUN train.steps=20000 backbone=1.6gf
  seer train experiment=demo --print-config
  torchrun --standalone --nproc-per-node 2 -m seer train experiment=small data.shards='SHARDS_DIR/*.tar' run_dir=RUN

Trains until train.steps; the same command goes on where the run stands, and prints the result of one that is finished.
What follows is KEY=VALUE. Patterns stand in quotes, so that the shell leaves them alone; a list is '[a,b]'.
It is one process, or each of several that torchrun or srun started; `seer launch` starts them by itself.

  --print-config  show the composed configuration and train nothing
  --take-over     go on although a process on another machine holds the run: if you know that it is gone
  --frozen FILE   the configuration that `seer launch` composed and saved, in place of KEY=VALUE
"""


def run(argv: list[str]) -> int:
    """Exit code of `seer train ARGV`: 0 finished, 75 stopped and can go on."""
    if "-h" in argv or "--help" in argv:
        print(help_text(), end="")
        return 0
    words = [word for word in argv if word not in ("--print-config", "--take-over")]
    if words[:1] == ["--frozen"]:
        if len(words) != 2:
            raise UserError("seer train --frozen", "it takes one file and no KEY=VALUE", "see seer train --help")
        return _train_frozen(words[1], take_over="--take-over" in argv)
    with told_once():
        config = compose(words)
        environment = rank_environment()
        validate(config, world_size=environment.world_size if environment else 1)
    if "--print-config" in argv:
        print(yaml.safe_dump(freeze(config), sort_keys=False, allow_unicode=True, width=120), end="")
        return 0
    return _train(config, take_over="--take-over" in argv)


def run_frozen(path: str) -> None:
    """What each process of a cluster's job calls: `seer train --frozen PATH`; ends the process if that failed."""
    from seer.cli.main import main

    if code := main(["train", "--frozen", path]):
        raise SystemExit(code)


def _train_frozen(path: str, *, take_over: bool) -> int:
    try:
        with told_once():
            config = thaw(read_frozen(path))
        code = _train(config, take_over=take_over)
    except ToldElsewhere:
        raise
    except UserError as error:
        leave_status(2, str(error))
        raise
    except SystemExit as end:
        leave_status(int(end.code or 0), None)
        raise
    leave_status(code, None)
    return code


def _train(config: TrainConfig, *, take_over: bool) -> int:
    # Until the run has handlers of its own. What schedulers send ahead of the end of a job may come right at its
    # beginning, and says nothing then that the job's deadline does not say better.
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGUSR1, signal.SIGUSR2)}
    before |= {number: signal.signal(number, _stopped_before_it_began) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        from seer.training import loop  # imports torch, and so comes after everything that can be refused without it

        try:
            with contextlib.redirect_stdout(Steadfast(sys.stdout)):
                result = loop.run(config, take_over=take_over)
        except LostRank as lost:
            print(f"seer: {lost}", file=sys.stderr, flush=True)
            return EXIT_STOPPED
        if result.again and (why_not := slurm.requeue()):
            print(f"seer: not queued again ({why_not}); the same command goes on", file=sys.stderr, flush=True)
        return result.exit_code
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stopped_before_it_began(number: int, frame: object) -> None:
    """The run's own handler takes over as soon as there is something to save."""
    print(f"seer: {signal.Signals(number).name} before the first step: nothing to save", file=sys.stderr)
    raise SystemExit(EXIT_STOPPED)


def help_text() -> str:
    """Examples, experiments, the choices of each group, and every key with its default."""
    choices = groups()
    experiments = "".join(f"  {name:12}{line}\n" for name, line in choices["experiment"].items())
    others = "".join(
        textwrap.fill(" ".join(files), 118, initial_indent=f"  {group + '=':12}", subsequent_indent=" " * 14) + "\n"
        for group, files in choices.items()
        if group != "experiment"
    )
    defaults = flat(freeze(TrainConfig()))
    keys = "".join(_entry(key, defaults[key], doc) for key, doc in documentation().items())
    return (
        f"{HELP}\nExperiments (experiment=NAME):\n{experiments}\nChoices:\n{others}\nKeys and their defaults:\n{keys}"
    )


def documentation() -> dict[str, str]:
    """Every dotted key with the docstring that stands below its field in config.py."""
    docs: dict[tuple[str, str], str] = {}
    for section in ast.parse(Path(schema.__file__).read_text()).body:
        if isinstance(section, ast.ClassDef):
            for line, below in zip(section.body, section.body[1:], strict=False):
                if (
                    isinstance(line, ast.AnnAssign)
                    and isinstance(line.target, ast.Name)
                    and isinstance(below, ast.Expr)
                ):
                    docs[section.name, line.target.id] = " ".join(str(ast.literal_eval(below.value)).split())
    return {key: docs[_owner(key)] for key in key_types()}


def _owner(key: str) -> tuple[str, str]:
    """The dataclass and the field of a dotted key."""
    *sections, name = key.split(".")
    owner: type = TrainConfig
    for section in sections:
        owner = typing.get_type_hints(owner)[section]
        assert dataclasses.is_dataclass(owner)
    return owner.__name__, name


def _entry(key: str, default: object, doc: str) -> str:
    shown = "..." if default == schema.MISSING else json.dumps(default, separators=(",", ":")).replace('"', "")
    return textwrap.fill(doc, 118, initial_indent=f"{f'  {key}={shown}':46}", subsequent_indent=" " * 46) + "\n"

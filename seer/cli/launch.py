"""`seer launch`: composes and freezes the configuration once, puts it on processes, and says how to follow them."""

from __future__ import annotations

import json
import shlex
import textwrap
from pathlib import Path

from seer.amounts import many
from seer.cli import train
from seer.compose import compose, flat
from seer.config import TrainConfig, freeze
from seer.errors import UserError, closest
from seer.launching import cluster, local, submission
from seer.launching.folder import LaunchFolder, absolute
from seer.launching.placement import Placement
from seer.launching.tail import Tail
from seer.run_directory import check_can_run, free_from_elsewhere, read_shards, shards_of
from seer.validation import validate, validate_launch

HELP = """\
Examples:
  seer launch experiment=small data.shards='SHARDS_DIR/*.tar' run_dir=RUN
  seer launch launch=slurm launch.nodes=2 launch.gpus_per_node=8 experiment=small data.shards='S/*.tar' run_dir=RUN
  seer launch launch=slurm launch.partition=gpu launch.time_limit_minutes=240 --dry-run experiment=small ...

Trains on all GPUs of this machine (launch=local) or as a job of a SLURM cluster (launch=slurm), and returns at once.
The same command goes on where a stopped run stands. What follows is KEY=VALUE, as for `seer train`.

Options:
  --wait       stay, show what rank 0 says, end with the run's exit code: 0 finished, 75 stopped and can go on, 2 input
  --dry-run    print the command or the sbatch script and start nothing
  --take-over  go on although a process on another machine holds the run: if you know that it is gone
"""

_OPTIONS = ("--wait", "--dry-run", "--take-over", "--help")


def run(argv: list[str]) -> int:
    """Exit code of `seer launch ARGV`."""
    if "-h" in argv or "--help" in argv:
        print(help_text(), end="")
        return 0
    options = [word for word in argv if word.startswith("-")]
    for word in options:
        if word not in _OPTIONS:
            raise UserError(f"seer launch {word}", "there is no such option", closest(word, _OPTIONS))
    config = absolute(compose([word for word in argv if word not in options]))
    placement = _placed(config)
    from seer.launching.finished import finished_result  # imports numpy, which the help does without

    if (result := finished_result(config)) is not None:
        steps = many(result["steps"], "step")
        print(f"{config.run_dir} is finished ({steps}); delete it or name another run_dir to train anew")
        return 0
    _check(config, take_over="--take-over" in options)
    folder = LaunchFolder(Path(config.run_dir))
    if config.launch.name == "slurm":
        return _slurm(config, folder, placement, options)
    return _local(config, folder, placement, options)


def _placed(config: TrainConfig) -> Placement:
    """The processes, of a configuration whose values are valid for them."""
    validate_launch(config.launch)
    placement = cluster.place(config) if config.launch.name == "slurm" else local.place(config)
    validate(config, world_size=placement.world_size)
    if config.launch.name == "slurm" and "%" in config.run_dir:
        raise UserError(f"run_dir={config.run_dir}", "SLURM reads % in a path as a pattern", "choose a name without %")
    return placement


def _check(config: TrainConfig, *, take_over: bool) -> None:
    """Everything else that can be refused before something is written or queued."""
    from seer.data.history import History
    from seer.data.mixture import open_shards, order_of
    from seer.shard_list import ShardList

    index_dir = Path(config.data.index_dir) if config.data.index_dir else None
    shards, sources = open_shards(config.data.shards, config.data.mixture, index_dir, growing=config.data.allow_growth)
    order_of(shards.counts, sources, seed=config.seed, global_batch_size=config.train.global_batch_size)
    for patterns in (config.evaluation.train, config.evaluation.val):
        if config.evaluation.every_steps:
            ShardList.open(patterns)
    init_from = config.train.init_from
    if init_from is not None and not Path(init_from).is_file():
        raise UserError(f"train.init_from={init_from}", "there is no such file", "check the path")
    submission.refuse_queued(LaunchFolder(Path(config.run_dir)))
    check_can_run(config.run_dir, freeze(config), take_over=take_over)
    if (recorded := read_shards(config.run_dir)) is not None:
        # Where it stands will be known when it goes on: for now only what it began with must be there.
        History.from_json(recorded, str(shards_of(config.run_dir))).continued(
            shards,
            sources,
            0,
            global_batch_size=config.train.global_batch_size,
            lanes=1,
            allow_growth=config.data.allow_growth,
        )


def _local(config: TrainConfig, folder: LaunchFolder, placement: Placement, options: list[str]) -> int:
    if "--dry-run" in options:
        print(local.shell_text(config, folder, placement))
        return 0
    with folder.frozen(config) as lock:
        if "--take-over" in options:
            free_from_elsewhere(config.run_dir)
        tail = Tail(folder.rank_log(0))
        pid = local.start(config, folder, placement)
        lock.pass_to(pid)
    _say(
        f"process {pid} ({placement.words})",
        folder,
        log=str(folder.rank_log(0)),
        stop=f"kill -TERM $(cat {shlex.quote(str(folder.rank_pid(0)))})   (saves first; the same seer launch goes on)",
    )
    return local.follow(pid, folder, placement, tail) if "--wait" in options else 0


def _slurm(config: TrainConfig, folder: LaunchFolder, placement: Placement, options: list[str]) -> int:
    if "--dry-run" in options:
        print(submission.text(config.launch, folder, placement), end="")
        return 0
    with folder.frozen(config):
        if "--take-over" in options:
            free_from_elsewhere(config.run_dir)
        job = submission.submit(config.launch, folder, placement, train.run_frozen)
    _say(
        f"job {job} ({placement.words})",
        folder,
        log=str(submission.log(folder, job)),
        stop=f"{submission.stop_command(job)}   "
        f"(saves first; the same seer launch goes on; while it is still queued: scancel {job})",
    )
    return submission.follow(job, folder) if "--wait" in options else 0


def _say(started: str, folder: LaunchFolder, *, log: str, stop: str) -> None:
    print(f"started  {started}")
    print(f"run_dir  {folder.run_dir}")
    print(f"follow   tail -F {shlex.quote(log)}")
    print(f"runs     seer runs {shlex.quote(str(folder.run_dir.parent))}")
    print(f"stop     {stop}", flush=True)


def help_text() -> str:
    """Examples, options, and the keys of `launch` with their defaults."""
    defaults = flat(freeze(TrainConfig()))
    keys = "".join(
        textwrap.fill(
            doc,
            118,
            initial_indent=f"  {key}={json.dumps(defaults[key], separators=(',', ':'))}".replace('"', "").ljust(42),
            subsequent_indent=" " * 42,
        )
        + "\n"
        for key, doc in train.documentation().items()
        if key.startswith("launch.")
    )
    return f"{HELP}\nKeys of launch and their defaults (`seer train --help` lists all others):\n{keys}"

"""A run on the processes of this machine: one by itself, several under torchrun."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from seer.config import TrainConfig
from seer.errors import UserError
from seer.files import cannot_write
from seer.launching.folder import LaunchFolder, network_variables, without_rank_variables
from seer.launching.placement import CPU_PROCESSES, Placement, processes_wanted
from seer.launching.tail import Tail

# torchrun names its own log folders by chance and parts output from errors: each rank opens one file by itself instead.
# `exec` keeps the process number, which is the one to signal: torchrun itself answers a signal with SIGKILL for all.
# ($$$$ is the shell's $$: torchrun takes arguments for templates.)
_RANK = 'echo $$$$ >"$2/rank-$LOCAL_RANK.pid"; exec "$0" -m seer train --frozen "$1" >>"$2/rank-$LOCAL_RANK.log" 2>&1'


def gpu_count() -> int:
    """GPUs that a process started here would see, without importing torch."""
    if shutil.which("nvidia-smi") is None:
        return 0
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    there = sum(line.startswith("GPU ") for line in listed.stdout.splitlines()) if listed.returncode == 0 else 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return there
    names = [name.strip() for name in visible.split(",") if name.strip()]
    # CUDA stops at the first that does not exist; -1 is how people write "none".
    absent = (at for at, name in enumerate(names) if name.lstrip("-").isdecimal() and not 0 <= int(name) < there)
    return min(there, next(absent, len(names)))


def place(config: TrainConfig) -> Placement:
    """The processes of this run on this machine.

    Raises:
        UserError: more machines than this one, more GPUs than there are, more CPU processes than cores.
    """
    if config.launch.nodes > 1:
        raise UserError(
            f"launch.nodes={config.launch.nodes} with launch=local",
            "this command starts processes on this machine only",
            "use launch=slurm, or give launch/torchrun.sh on each machine",
        )
    wanted, gpus = processes_wanted(config), gpu_count()
    if gpus == 0 and config.train.device == "cuda":
        rule = "this machine shows no GPU (nvidia-smi -L, CUDA_VISIBLE_DEVICES)"
        raise UserError("train.device=cuda", rule, "use train.device=auto or cpu")
    if gpus and config.train.device != "cpu":
        if wanted is not None and wanted > gpus:
            raise UserError(
                f"launch.gpus_per_node={wanted}",
                f"this machine has {gpus} GPU{'' if gpus == 1 else 's'} (nvidia-smi -L, CUDA_VISIBLE_DEVICES)",
                f"use launch.gpus_per_node={gpus} or less",
            )
        return Placement(1, wanted or gpus, gpus=True)
    cores = _cores()
    if wanted is not None and wanted > cores:
        raise UserError(
            f"launch.gpus_per_node={wanted} without GPUs",
            f"each process computes on a core of its own, and there are {cores}",
            f"use launch.gpus_per_node={cores} or less",
        )
    return Placement(1, wanted or min(CPU_PROCESSES, cores), gpus=False)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def command(folder: LaunchFolder, placement: Placement) -> list[str]:
    """The argv that runs the frozen configuration."""
    if placement.world_size == 1:
        return [sys.executable, "-m", "seer", "train", "--frozen", str(folder.config)]
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(placement.per_node)),
        *("--local-addr", "127.0.0.1"),  # the machine's own name may lead nowhere, as in many containers
        # A restarted rank would meet the addresses of its predecessors: the same command goes on instead.
        *("--max-restarts", "0", "--no-python"),
        *("/bin/sh", "-c", _RANK, sys.executable, str(folder.config), str(folder.folder)),
    ]


def variables(config: TrainConfig, folder: LaunchFolder) -> dict[str, str]:
    """What the processes get in their environment besides that of this shell."""
    path = os.environ.get("PYTHONPATH")
    return {
        "SEER_STATUS_FILE": str(folder.status),
        "PYTHONPATH": f"{folder.code}{os.pathsep}{path}" if path else str(folder.code),
        "PYTHONSAFEPATH": "1",  # else `-m` takes the package in the current folder
        # The run sets its own number of threads; without this torchrun says in three lines that it sets one.
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
    } | network_variables(config.launch.network_interface)


def shell_text(config: TrainConfig, folder: LaunchFolder, placement: Placement) -> str:
    """Variables and argv as one line of a shell."""
    settings = [f"{name}={shlex.quote(value)}" for name, value in variables(config, folder).items()]
    return " ".join([*settings, shlex.join(command(folder, placement))])


def start(config: TrainConfig, folder: LaunchFolder, placement: Placement) -> int:
    """Starts the run in a session of its own, which outlives this terminal; returns its process number.

    Raises:
        UserError: the log cannot be written.
    """
    alone = placement.world_size == 1
    log = folder.rank_log(0) if alone else folder.agent_log
    try:
        log.touch()
        # No Popen: its object complains when it is left behind, as is meant here.
        pid = os.posix_spawn(
            sys.executable,
            command(folder, placement),
            without_rank_variables(dict(os.environ)) | variables(config, folder),
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                (os.POSIX_SPAWN_OPEN, 1, str(log), os.O_WRONLY | os.O_APPEND, 0),
                (os.POSIX_SPAWN_DUP2, 1, 2),
            ],
            setsid=True,
        )
        if alone:
            folder.rank_pid(0).write_text(f"{pid}\n")
    except OSError as error:
        raise cannot_write(log, error) from None
    return pid


def follow(pid: int, folder: LaunchFolder, placement: Placement, tail: Tail) -> int:
    """Shows rank 0's log until the run has ended; Ctrl-C asks the ranks to save and leave. Returns the exit code.

    Args:
        pid: what `start` returned, a child of this process.
        tail: made of rank 0's log before the start.
    """
    while True:
        try:
            ended, _ = os.waitpid(pid, os.WNOHANG)
            tail.copy()
            if ended:
                break
            time.sleep(0.1)
        except KeyboardInterrupt:
            _stop(pid, folder, placement)
    folder.tell_cause(folder.rank_log(0))
    code = folder.exit_code()
    if code is None:
        logs = folder.rank_log(0) if placement.world_size == 1 else f"{folder.agent_log}, {folder.folder}/rank-*.log"
        print(f"seer: the run ended without saying how: see {logs}", file=sys.stderr)
    return 1 if code is None else code


def _stop(pid: int, folder: LaunchFolder, placement: Placement) -> None:
    """SIGTERM to the ranks and not to torchrun, which would give them 30 seconds to save and then kill them."""
    ranks = [number for rank in range(placement.per_node) if (number := _number(folder.rank_pid(rank))) is not None]
    print(f"seer: SIGTERM to {len(ranks) or 1} processes: the run saves and leaves", file=sys.stderr)
    for number in ranks or [pid]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(number, signal.SIGTERM)


def _number(file: Path) -> int | None:
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None

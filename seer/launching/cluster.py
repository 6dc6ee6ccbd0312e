"""What a SLURM cluster offers, and whether a run fits on it; asked before anything is queued."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass, field

from seer.config import LaunchConfig, TrainConfig
from seer.errors import UserError, closest
from seer.launching.placement import CPU_PROCESSES, Placement, processes_wanted


@dataclass
class Partition:
    """One partition as sinfo shows it.

    Attributes:
        nodes: GPUs and cores of a node -> how many such nodes.
        minutes: longest job, None without limit.
        is_default: whether jobs go there that name none.
    """

    nodes: Counter[tuple[int, int]] = field(default_factory=Counter)
    minutes: float | None = None
    is_default: bool = False

    def nodes_with(self, gpus: int, cores: int = 1) -> int:
        """Nodes that have so many GPUs and cores or more."""
        return sum(count for (has, its_cores), count in self.nodes.items() if has >= gpus and its_cores >= cores)

    def most_gpus(self) -> int:
        """GPUs of the node that has most of them."""
        return max((gpus for gpus, _ in self.nodes), default=0)

    def most_cores(self, gpus: int) -> int:
        """Cores of the largest node that has so many GPUs or more."""
        return max((cores for has, cores in self.nodes if has >= gpus), default=0)


def place(config: TrainConfig) -> Placement:
    """The processes of this run on this cluster.

    Raises:
        UserError: no SLURM here, a partition that does not exist, more GPUs, cores, nodes or time than it has.
    """
    for program in ("sbatch", "srun", "sinfo", "squeue"):
        if shutil.which(program) is None:
            raise UserError(
                f"{program} is not on PATH",
                "launch=slurm hands the run to SLURM",
                "log in to a machine of the cluster, or use launch=local",
            )
    known = partitions()
    names = _names(config.launch, known)
    gpus_anywhere = any(partition.most_gpus() for partition in known.values())
    if config.train.device == "cuda" and not gpus_anywhere:
        raise UserError("train.device=cuda", "sinfo shows no GPU on this cluster", "use train.device=auto or cpu")
    if gpus_anywhere and config.train.device != "cpu":
        placement = _gpus(config, names[0], known)
    else:
        placement = Placement(config.launch.nodes, processes_wanted(config) or CPU_PROCESSES, gpus=False)
    for name in names:
        _fit(placement, config.launch, name, known[name])
    return placement


def partitions() -> dict[str, Partition]:
    """All partitions of the cluster by name.

    Raises:
        UserError: SLURM does not answer.
    """
    # Else sinfo writes 1024 as 1K, and puts nodes that differ in their cores into one line: "64+".
    command = ["sinfo", "-h", "--exact", "--noconvert", "-o", "%P|%D|%G|%l|%c"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise UserError(f"sinfo failed ({said})", "SLURM's controller has to answer", "try again, or ask who runs it")
    found: dict[str, Partition] = {}
    for line in done.stdout.splitlines():
        name, count, resources, limit, cores = line.split("|")
        partition = found.setdefault(name.rstrip("*"), Partition())
        partition.nodes[_gpus_of(resources), int(cores)] += int(count)
        partition.minutes = _minutes(limit)
        partition.is_default = name.endswith("*")
    return found


def _gpus_of(resources: str) -> int:
    """`gpu:a100:8(S:0-1),nvme:2` is 8."""
    parts = re.sub(r"\([^)]*\)", "", resources).split(",")
    counts = [part.rpartition(":")[2] for part in parts if re.match(r"gpu(:|$)", part.strip())]
    return sum(int(count) if count.isdecimal() else 1 for count in counts)


def _minutes(limit: str) -> float | None:
    """`1-12:00:00`, `30:00`, `infinite`."""
    match = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", limit.strip())
    if match is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return days * 1440 + hours * 60 + minutes + seconds / 60


def _names(launch: LaunchConfig, known: dict[str, Partition]) -> list[str]:
    """The partitions that the job may run in: SLURM takes a list with commas."""
    asked = launch.partition or os.environ.get("SBATCH_PARTITION")
    if asked is None:
        default = [name for name, partition in known.items() if partition.is_default]
        if not default:
            choices = ", ".join(known) or "none"
            raise UserError("launch.partition is not given", "this cluster has no default", f"choose one of: {choices}")
        return default
    chosen = asked.split(",")
    for name in chosen:
        if name not in known:
            raise UserError(f"launch.partition={name}", "there is no such partition (sinfo)", closest(name, known))
    return chosen


def _gpus(config: TrainConfig, name: str, known: dict[str, Partition]) -> Placement:
    launch, partition = config.launch, known[name]
    most = partition.most_gpus()
    if most == 0:
        others = [other for other, its in known.items() if its.most_gpus()]
        raise UserError(
            f"partition {name} has no GPUs",
            f"this cluster has them in: {', '.join(others)}",
            f"use launch.partition={others[0]}, or train.device=cpu for CPU processes",
        )
    wanted = processes_wanted(config)
    if wanted is None:  # what as many nodes as are asked for have; too few nodes are told later
        enough = [has for has, _ in partition.nodes if has and partition.nodes_with(has) >= launch.nodes]
        wanted = max(enough, default=most)
    if wanted > most:
        raise UserError(
            f"launch.gpus_per_node={wanted}",
            f"the largest node of partition {name} has {most} GPU{'' if most == 1 else 's'}",
            f"use launch.gpus_per_node={most} or less, and more nodes",
        )
    return Placement(launch.nodes, wanted, gpus=True)


def _fit(placement: Placement, launch: LaunchConfig, name: str, partition: Partition) -> None:
    gpus = placement.per_node if placement.gpus else 0
    cores = placement.per_node * (launch.cpus_per_gpu or 1)
    if 0 < partition.most_cores(gpus) < cores:
        raise _too_few_cores(placement, launch, name, partition.most_cores(gpus))
    nodes = partition.nodes_with(gpus, cores)
    if placement.nodes > nodes:
        needs = [f"{gpus} GPU{'' if gpus == 1 else 's'}"] if gpus else []
        if nodes < partition.nodes_with(gpus):
            needs.append(f"{cores} cores")
        having = f" with {' and '.join(needs)}" if needs else ""
        raise UserError(
            f"launch.nodes={placement.nodes}",
            f"partition {name} has {nodes} node{'' if nodes == 1 else 's'}{having}",
            f"use launch.nodes={nodes} or less" if nodes else "use another partition",
        )
    if partition.minutes is not None and launch.time_limit_minutes > partition.minutes:
        raise UserError(
            f"launch.time_limit_minutes={launch.time_limit_minutes}",
            f"partition {name} runs jobs of at most {partition.minutes:g} minutes",
            f"use launch.time_limit_minutes={int(partition.minutes)}: a longer run queues itself again",
        )


def _too_few_cores(placement: Placement, launch: LaunchConfig, name: str, most: int) -> UserError:
    which = f"partition {name} that would do" if placement.gpus else f"partition {name}"
    largest = f"the largest node of {which} has {most} core{'' if most == 1 else 's'}"
    each = launch.cpus_per_gpu or 1
    if placement.per_node <= most:  # then `each` is more than one
        return UserError(
            f"launch.cpus_per_gpu={each} with {placement.words}",
            largest,
            f"use launch.cpus_per_gpu={most // placement.per_node} or less",
        )
    return UserError(
        f"launch.gpus_per_node={placement.per_node}",
        f"each process computes on {'a core' if each == 1 else f'{each} cores'} of its own, and {largest}",
        f"use launch.gpus_per_node={max(1, most // each)} or less, and more nodes",
    )

"""Which process of a run this is, as the launcher said in the environment; without torch.

torchrun sets RANK and its kin. SLURM sets SLURM_PROCID and its kin in every job, whoever started python there and why
(a python in a batch script is told that it is rank 0 of 4): they count only where SEER_LAUNCHER=slurm says that each
task of the step is a rank.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from seer.errors import ToldElsewhere, UserError

# A host name, or many in one word: a[001-003,7]-x[0-1].
_HOST = r"(?:[\w.-]|\[\d+(?:-\d+)?(?:,\d+(?:-\d+)?)*\])+"


@dataclass(frozen=True)
class RankEnvironment:
    """One of the processes that train together.

    Attributes:
        rank, world_size: this process's number, and how many there are.
        local_rank, local_world_size: the same among those of this machine; local_rank is the number of the GPU.
        master_addr, master_port: where rank 0 listens.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    master_addr: str
    master_port: int


def first_of_machine() -> bool:
    """Whether this process is the one that tells what holds for its whole machine."""
    environment = rank_environment()
    return environment is None or environment.local_rank == 0


def rank_environment(environ: Mapping[str, str] = os.environ) -> RankEnvironment | None:
    """What the launcher set, or None: one process by itself.

    Raises:
        UserError: a variable that is missing or holds something else than the launcher writes, named.
    """
    if "RANK" in environ and "WORLD_SIZE" in environ:
        found = _of_torchrun(environ)
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    elif environ.get("SEER_LAUNCHER") == "slurm":
        found = _of_slurm(environ)
        names = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE")
    else:
        return None
    for name, of, number, count in (
        (names[0], names[1], found.rank, found.world_size),
        (names[2], names[3], found.local_rank, found.local_world_size),
        (names[3], names[1], found.local_world_size - 1, found.world_size),
    ):
        if number >= count:
            raise _wrong(name, environ.get(name), f"it does not fit {of}={environ.get(of)}")
    if not 0 < found.master_port < 65536:
        raise _wrong("MASTER_PORT", str(found.master_port), "it is a port, 1 to 65535")
    return found


@contextlib.contextmanager
def told_once() -> Iterator[None]:
    """A block whose user's errors all ranks meet alike, before they know each other: one of each machine tells them.

    Raises:
        ToldElsewhere: in place of them, on the others.
    """
    try:
        yield
    except UserError as error:
        environment = rank_environment()
        if environment is not None and environment.local_rank:
            raise ToldElsewhere(error.what, error.rule, error.remedy) from None
        raise


def _of_torchrun(environ: Mapping[str, str]) -> RankEnvironment:
    return RankEnvironment(
        rank=_number(environ, "RANK"),
        world_size=_number(environ, "WORLD_SIZE"),
        local_rank=_number(environ, "LOCAL_RANK", "0"),
        local_world_size=_number(environ, "LOCAL_WORLD_SIZE", "1"),
        master_addr=environ.get("MASTER_ADDR", "127.0.0.1"),
        master_port=_number(environ, "MASTER_PORT", "29500"),
    )


def _of_slurm(environ: Mapping[str, str]) -> RankEnvironment:
    per_node = _tasks_per_node(environ)
    node = _number(environ, "SLURM_NODEID", "0")
    if node >= len(per_node):
        raise _wrong("SLURM_NODEID", str(node), f"the step has {len(per_node)} nodes")
    # A life after a requeue must not meet what the last one left at its port; below 32768 the kernel hands out none.
    job, restart = _number(environ, "SLURM_JOB_ID"), _number(environ, "SLURM_RESTART_COUNT", "0")
    return RankEnvironment(
        rank=_number(environ, "SLURM_PROCID"),
        world_size=_number(environ, "SLURM_NTASKS"),
        local_rank=_number(environ, "SLURM_LOCALID"),
        local_world_size=per_node[node],
        master_addr=_first_host(environ),
        master_port=20000 + (job + 7 * restart) % 10000,
    )


def _tasks_per_node(environ: Mapping[str, str]) -> list[int]:
    """`2(x2),1` is [2, 2, 1]."""
    name = "SLURM_STEP_TASKS_PER_NODE"
    counts: list[int] = []
    for part in environ.get(name, "").split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise _wrong(name, environ.get(name), "it reads like 2(x2),1")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def _first_host(environ: Mapping[str, str]) -> str:
    """The first name in `a[001-003,7],b,c[1-2]-x[0-1]`: a001. Without scontrol, which many containers lack."""
    name = "SLURM_STEP_NODELIST"
    match = re.fullmatch(rf"({_HOST})(?:,{_HOST})*", environ.get(name, ""))
    if match is None:
        raise _wrong(name, environ.get(name), "it reads like node[001-003,7],login")
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", match[1])


def _number(environ: Mapping[str, str], name: str, default: str | None = None) -> int:
    text = environ.get(name, default)
    if text is None or not re.fullmatch(r"[0-9]+", text):
        raise _wrong(name, text, "it is a whole number")
    return int(text)


def _wrong(name: str, value: str | None, rule: str) -> UserError:
    if value is None:
        rule = "the launcher sets it for each process" if name.startswith("SLURM_") else rule
    remedy = "start the processes with srun" if name.startswith("SLURM_") else "start the processes with torchrun"
    return UserError(f"{name} is not set" if value is None else f"{name}={value}", rule, f"{remedy}, or unset it")

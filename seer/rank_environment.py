"""Which process of a run this is, as the launcher said in the environment; without torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass


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


def rank_environment(environ: Mapping[str, str] = os.environ) -> RankEnvironment | None:
    """What the launcher set, or None: one process by itself."""
    if "RANK" not in environ or "WORLD_SIZE" not in environ:
        return None
    return RankEnvironment(
        rank=int(environ["RANK"]),
        world_size=int(environ["WORLD_SIZE"]),
        local_rank=int(environ.get("LOCAL_RANK", 0)),
        local_world_size=int(environ.get("LOCAL_WORLD_SIZE", 1)),
        master_addr=environ.get("MASTER_ADDR", "127.0.0.1"),
        master_port=int(environ.get("MASTER_PORT", 29500)),
    )

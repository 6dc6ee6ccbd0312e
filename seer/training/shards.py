"""The shards that a run learns from: all ranks agree on them, and on since when each is among them."""

from __future__ import annotations

import socket
from collections.abc import Sequence

from seer import build, distributed
from seer.config import TrainConfig
from seer.data.history import History
from seer.data.mixture import SourceShare
from seer.data.shard_cache import ShardCache
from seer.errors import UserError
from seer.remote import is_remote
from seer.run_directory import RunDirectory, read_shards, shards_of
from seer.shard_list import ShardList


def agreed_shards(config: TrainConfig) -> tuple[ShardList, list[SourceShare]]:
    """The configured shards and their sources; all ranks together.

    Raises:
        UserError: on all ranks, if they cannot be opened or cached on one, or one finds others than rank 0.
    """
    with distributed.together():
        shards, sources = build.shards(config)
        check_cache(shards)
    found = (shards.digest, len(shards), shards.samples, sources)
    of_first, host = distributed.of_first_rank((found, socket.gethostname()))
    with distributed.together():
        if found != of_first:
            raise UserError(
                f"process {distributed.rank()} on {socket.gethostname()} finds other shards than process 0 on {host} "
                f"({len(shards):,} with {shards.samples:,} images, there {of_first[1]:,} with {of_first[2]:,})",
                "all processes of a run read the same shards",
                "let data.shards (or data.mixture) mean the same files on every machine",
            )
    return shards, sources


def check_cache(shards: ShardList) -> None:
    """Refuses a folder that could not hold the shards, where they are remote.

    Raises:
        UserError: the cache's folder cannot be used on this machine.
    """
    if shards.reading.cache_bytes and any(is_remote(shard.location) for shard in shards.listed):
        ShardCache(shards.reading)


def agreed_history(
    config: TrainConfig, run: RunDirectory, batch_index: int, shards: ShardList, sources: Sequence[SourceShare]
) -> History:
    """Since when the run that goes on at a batch learns from each of these shards; all ranks together.

    Raises:
        UserError: on all ranks, if they are not those that the run can go on with.
    """
    history = None
    with distributed.together():
        if distributed.rank() == 0:
            history = History.beginning(shards, sources)
            if (recorded := read_shards(run.folder)) is not None:
                before = History.from_json(recorded, str(shards_of(run.folder)))
                history = before.continued(
                    shards,
                    sources,
                    batch_index,
                    global_batch_size=config.train.global_batch_size,
                    lanes=build.order(config, before)["data.lanes"].value,
                    allow_growth=config.data.allow_growth,
                )
    agreed = distributed.of_first_rank(history)
    assert isinstance(agreed, History)
    return agreed

"""A run that took its last step, asked for again: its result, unless the command names other data than its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from seer.config import TrainConfig, freeze
from seer.data.history import History
from seer.data.mixture import SourceShare, open_shards
from seer.derived import reading, resolve_order
from seer.errors import UserError
from seer.run_directory import agree_with_run, read_result, read_shards, recorded_data, shards_of
from seer.shard_list import ShardList, list_digest


def finished_result(config: TrainConfig) -> dict[str, Any] | None:
    """What `result.json` says of a finished run of this configuration; None where the run is not finished.

    The data may be gone by now: then they must be spelt as they were. Where they can be listed, what they hold is
    compared, as it is when a run goes on.

    Raises:
        UserError: the folder holds a run of another configuration or of other data.
    """
    result = read_result(config.run_dir)
    if result is None or result.get("state") != "finished" or (before := recorded_data(config.run_dir)) is None:
        return None
    agree_with_run(config.run_dir, freeze(config), data=before)  # all that does not need the data
    index_dir = Path(config.data.index_dir) if config.data.index_dir else None
    try:
        shards, sources = open_shards(
            config.data.shards,
            config.data.mixture,
            index_dir,
            reading(config.data),
            growing=config.data.allow_growth,
        )
    except UserError as unlisted:
        try:
            agree_with_run(config.run_dir, freeze(config))
        except UserError:
            raise unlisted from None
        return result
    agree_with_run(config.run_dir, freeze(config), data=_identity(config, shards, sources, before))
    return result


def _identity(
    config: TrainConfig, shards: ShardList, sources: list[SourceShare], before: dict[str, Any]
) -> dict[str, Any]:
    """`DataStream.identity()` of the data as they are now; what other keys say in it has agreed before."""
    history = History.beginning(shards, sources)
    if (recorded := read_shards(config.run_dir)) is not None:
        known = History.from_json(recorded, str(shards_of(config.run_dir)))
        history = known.continued(
            shards,
            sources,
            config.train.steps,
            global_batch_size=config.train.global_batch_size,
            lanes=before.get("lanes", 1),
            allow_growth=config.data.allow_growth,
        )
    began_with = history.began_with()
    listed = [shard for of_source in began_with.values() for shard in of_source]
    order = resolve_order(
        config, samples=sum(shard.samples for shard in listed), shards=sum(shard.samples > 0 for shard in listed)
    )
    now = {key: value for key, value in before.items() if key != "mixture"}
    now["index_digest"] = list_digest(listed)
    now["lanes"], now["window"] = order["data.lanes"].value, order["data.window_images"].value or "epoch"
    if sources:
        now["mixture"] = [[*source[:2], len(began_with[source.name])] for source in sources]
    if config.data.decoder != "auto":
        now["decoder"] = config.data.decoder
    return now

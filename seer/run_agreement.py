"""Whether a run goes on as the run that it was: which values bind it, and what to say where they differ."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from seer.compose import flat
from seer.config import TrainConfig, freeze
from seer.errors import UserError

# A run goes on only as the run that it was: these keys must stay (all others may change). A group stands for its keys.
_IDENTITY = (
    "seed",
    "data",
    "backbone",
    "objective",
    "optimizer",
    "train.steps",
    "train.global_batch_size",
    "train.precision",
    "train.init_from",
    "parallel.sync_batchnorm",
)
_FREE = (
    *("data.workers", "data.index_dir", "data.max_bad_share", "data.allow_growth"),
    *("data.cache_dir", "data.cache_gb", "data.io_timeout_seconds"),
)
# What these mean for the batches stands in the data's identity: where that is known, their spelling does not matter.
_IN_DATA_IDENTITY = ("data.shards", "data.mixture", "data.lanes", "data.window_images", "data.decoder")
_DATA_NAMES = {
    "data: index_digest": "data.shards, contents",
    "data: decoder": "data.decoder",
    "data: lanes": "data.lanes",
    "data: window: epoch": "data.window_images: 0",
    "data: window": "data.window_images",
}
_LET_JOIN = (
    "; for new ones to join (data.allow_growth=true), go on once with the former shards, which are then recorded"
)
_ABSENT = "(not given)"


def agree_or_raise(
    folder: Path, before: Mapping[str, Any] | None, now: Mapping[str, Any], *, contents_later: bool = False
) -> None:
    """Refuses to go on with a run under values that would make it another one.

    Args:
        folder: the run's, for the message.
        before, now: `config` and, where it is known, `data` (the identity of the batches) as in config.yaml; no before:
            nothing binds.
        contents_later: the identity of the batches will be compared when it is known now, so that how the shards are
            spelt does not matter yet.

    Raises:
        UserError: the values that differ, key by key.
    """
    if before is None:
        return
    # A key that came later than the run has its default in it.
    defaults = flat(freeze(TrainConfig()))
    old, new = (
        defaults | flat(side["config"]) | {f"data: {key}": at for key, at in side.get("data", {}).items()}
        for side in (before, now)
    )
    compared = bool(before.get("data")) and bool(now.get("data"))
    differing = [
        f"{key}: {_short(old.get(key, _ABSENT))} -> {_short(new.get(key, _ABSENT))}"
        for key in dict.fromkeys([*old, *new])
        if (compared if key.startswith("data: ") else _binds(key, data_known=compared or contents_later))
        and old.get(key, _ABSENT) != new.get(key, _ABSENT)
        # Earlier versions did not record it; data.limits.* bind by themselves.
        and not (key == "data: limits" and key not in old)
        # What joined later is for the run's history to judge (seer.data.history); index_digest is of the beginning.
        and key != "data: joined"
    ]
    # What the batches are made of follows from the configuration: it is named only where the shards themselves changed.
    named = [line for line in differing if not line.startswith("data: ")]
    # Where the run recorded its shards, its history has named those that differ.
    unlisted = not named and [line.partition(":")[2].split(":")[0] for line in differing] == [" index_digest"]
    differing = named or [_named(line) for line in differing]
    if differing:
        more = f" and {len(differing) - 5} more" if len(differing) > 5 else ""
        raise UserError(
            f"{folder} holds a run of another configuration ({', '.join(differing[:5])}{more})",
            "a run goes on with the values it began with",
            "use those, name another run_dir, or delete the folder" + _LET_JOIN * unlisted,
        )


def _binds(key: str, *, data_known: bool) -> bool:
    """Whether a key must be the same when a run goes on."""
    if key in _FREE or (key in _IN_DATA_IDENTITY and data_known):
        return False
    return any(key == bound or key.startswith(bound + ".") for bound in _IDENTITY)


def _named(difference: str) -> str:
    """A difference of the data's identity in the words of the configuration."""
    for found, name in _DATA_NAMES.items():
        if difference.startswith(found):
            return name + difference.removeprefix(found)
    return difference


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."

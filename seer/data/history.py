"""Since when a run learns from which shards, and how it goes on when more of them have come (free of torch)."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Self

import numpy as np

from seer.data.growth import Chapter, Growth
from seer.data.mixture import MixedOrder, SourceShare, order_of
from seer.errors import UserError
from seer.shard_list import ShardList, list_digest

_FORMAT = "seer-run-shards-1"
_ALL = ""  # the one source of a run that mixes none


class KnownShard(NamedTuple):
    """What makes a shard itself, wherever it lies: file name, images, blake2b of the tar."""

    name: str
    samples: int
    digest: str


class Arrival(NamedTuple):
    """Shards that came together, and the chapter that begins with them."""

    chapter: Chapter
    shards: list[KnownShard]


class History:
    """The arrivals of every source by its name, in order; a run that mixes none has one source, without a name.

    The shards of a chapter are those of its own arrival and of all before.
    """

    def __init__(self, arrivals: Mapping[str, Sequence[Arrival]]) -> None:
        self._arrivals = {name: list(of_source) for name, of_source in arrivals.items()}

    @classmethod
    def beginning(cls, shards: ShardList, sources: Sequence[SourceShare]) -> Self:
        """All shards from the first batch on."""
        return cls({name: [Arrival(Chapter(0, 0), found)] for name, found in _by_source(shards, sources).items()})

    @classmethod
    def from_json(cls, content: Any, file: str) -> Self:
        """What `to_json` gave.

        Raises:
            UserError: `file` holds something else.
        """
        try:
            if content["format"] != _FORMAT:
                raise ValueError
            found = {
                str(source["name"]): [
                    Arrival(
                        Chapter(int(chapter["first_batch"]), int(chapter["first_epoch"])),
                        [
                            KnownShard(str(name), int(samples), str(digest))
                            for name, samples, digest in chapter["shards"]
                        ],
                    )
                    for chapter in source["chapters"]
                ]
                for source in content["sources"]
            }
            if not all(of_source and of_source[0].chapter == (0, 0) for of_source in found.values()):
                raise ValueError
        except (ValueError, TypeError, LookupError, OverflowError):
            raise UserError(
                f"{file} is not a run's list of shards",
                "it is written by seer and not edited",
                "bring back a copy, or name another run_dir",
            ) from None
        return cls(found)

    def to_json(self) -> dict[str, Any]:
        """What a file can hold, for `from_json`."""
        return {
            "format": _FORMAT,
            "sources": [
                {
                    "name": name,
                    "chapters": [{**arrival.chapter._asdict(), "shards": arrival.shards} for arrival in arrivals],
                }
                for name, arrivals in self._arrivals.items()
            ],
        }

    def continued(
        self,
        shards: ShardList,
        sources: Sequence[SourceShare],
        batch_index: int,
        *,
        global_batch_size: int,
        lanes: int,
        allow_growth: bool,
    ) -> History:
        """The history of a run that goes on at a batch with these shards: the same before it, whatever comes after.

        Shards that are new join where the next epoch of their source begins. Chapters that have not begun (the run was
        killed, and went back) stay if the shards are those that it went on with last; else the new ones replace them.

        Args:
            shards, sources: as they are now.
            batch_index: the batch that the run goes on with.
            global_batch_size, lanes: of the run.
            allow_growth: whether shards may join.

        Raises:
            UserError: the first shard that is missing, changed or, without `allow_growth`, new.
        """
        now = _by_source(shards, sources)
        if now.keys() != self._arrivals.keys():
            return History.beginning(shards, sources)  # another mixture: that is refused where identities are compared
        begun = {
            name: [arrival for number, arrival in enumerate(arrivals) if not number or _begun(arrival, batch_index)]
            for name, arrivals in self._arrivals.items()
        }
        found: dict[str, list[Arrival]] = {}
        new: dict[str, list[KnownShard]] = {}
        for name, arrivals in self._arrivals.items():
            here, known = Counter(now[name]), Counter(_all_shards(arrivals))
            if here == known:
                found[name] = arrivals
                continue
            needed = Counter(_all_shards(begun[name])) if allow_growth else known
            if missing := list((needed - here).elements()):
                raise _missing(missing, (here - known).keys(), name)
            found[name], new[name] = begun[name], list((here - needed).elements())
            if new[name] and not allow_growth:
                raise _unknown(new[name], name)
        if any(new.values()):
            starts = _next_epochs(begun, sources, batch_index, global_batch_size=global_batch_size, lanes=lanes)
            found |= {name: [*begun[name], Arrival(starts[name], joining)] for name, joining in new.items() if joining}
        return History(found)

    def growths(self, shards: ShardList, sources: Sequence[SourceShare]) -> list[Growth]:
        """How the list of each source came together."""
        return [_growth(self._arrivals[name], of_source) for name, of_source in _by_source(shards, sources).items()]

    def began_with(self) -> dict[str, list[KnownShard]]:
        """The shards of the first chapter of each source."""
        return {name: arrivals[0].shards for name, arrivals in self._arrivals.items()}

    def identity(self) -> list[object]:
        """What joined later and when: source, first batch, first epoch, digest of the shards."""
        return [
            [name, *arrival.chapter, list_digest(arrival.shards)]
            for name, arrivals in self._arrivals.items()
            for arrival in arrivals[1:]
        ]

    def to_come(self, batch_index: int, steps: int) -> list[str]:
        """A line on each arrival that is not in use before a batch, of a run of so many steps."""
        return [
            f"{_count(len(arrival.shards), 'new shard')} "
            f"({_count(sum(shard.samples for shard in arrival.shards), 'image')})"
            f"{f' of {name}' * bool(name)} join{'s' * (len(arrival.shards) == 1)} at "
            f"{'its ' * bool(name)}epoch {arrival.chapter.first_epoch:,} (step {arrival.chapter.first_batch:,}"
            f"{', after the last step of this run' * (arrival.chapter.first_batch >= steps)})"
            for name, arrivals in self._arrivals.items()
            for arrival in arrivals[1:]
            if not _begun(arrival, batch_index)
        ]


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' * (number != 1)}"


def _begun(arrival: Arrival, batch_index: int) -> bool:
    return arrival.chapter.first_batch < batch_index


def _by_source(shards: ShardList, sources: Sequence[SourceShare]) -> dict[str, list[KnownShard]]:
    listed = iter([KnownShard(shard.name, shard.samples, shard.digest) for shard in shards.listed])
    if not sources:
        return {_ALL: list(listed)}
    return {source.name: [next(listed) for _ in range(source.shards)] for source in sources}


def _all_shards(arrivals: Iterable[Arrival]) -> list[KnownShard]:
    return [shard for arrival in arrivals for shard in arrival.shards]


def _growth(arrivals: Sequence[Arrival], shards: Sequence[KnownShard]) -> Growth:
    # Copies of one shard are alike: the first ones in the list are those that came first.
    came: defaultdict[KnownShard, list[int]] = defaultdict(list)
    for number in reversed(range(len(arrivals))):
        for shard in arrivals[number].shards:
            came[shard].append(number)
    return Growth(
        [arrival.chapter for arrival in arrivals], np.array([came[shard].pop() for shard in shards], np.int64)
    )


def _next_epochs(
    begun: Mapping[str, Sequence[Arrival]],
    sources: Sequence[SourceShare],
    batch_index: int,
    *,
    global_batch_size: int,
    lanes: int,
) -> dict[str, Chapter]:
    """Where each source's first epoch begins at a batch or after it."""
    names = [source.name for source in sources] or [_ALL]
    shards = {name: _all_shards(begun[name]) for name in names}
    order = order_of(
        np.array([shard.samples for of_source in shards.values() for shard in of_source], np.int64),
        [source._replace(shards=len(shards[source.name])) for source in sources],
        [_growth(begun[name], of_source) for name, of_source in shards.items()],
        seed=0,  # where epochs begin does not depend on it
        global_batch_size=global_batch_size,
        lanes=lanes,
    )
    orders = order.orders if isinstance(order, MixedOrder) else {_ALL: order}
    return {name: of_source.next_epoch(batch_index) for name, of_source in orders.items()}


def _missing(missing: Sequence[KnownShard], new: Iterable[KnownShard], source: str) -> UserError:
    first, others = missing[0], len(missing) - 1
    changed = next((shard for shard in new if shard.name == first.name), None)
    if changed is not None:
        more = f"; {others:,} more are gone or changed" * (others > 0)
        return UserError(
            f"{first.name} changed ({changed.samples:,} images of digest {changed.digest}, the run knows "
            f"{first.samples:,} of {first.digest}{more})",
            "a run goes on with the shards that it knows",
            "bring the former ones back, and pack new images into shards of their own; or name another run_dir",
        )
    more = f" and {others:,} more" * (others > 0)
    return UserError(
        f"{_key(source)} lacks {first.name}{more}, which the run knows",
        "a run goes on with every shard that it knows, and more may join",
        "bring them back, or name another run_dir",
    )


def _unknown(new: Sequence[KnownShard], source: str) -> UserError:
    images, more = sum(shard.samples for shard in new), f" and {len(new) - 1:,} more" * (len(new) > 1)
    return UserError(
        f"{_key(source)} names {new[0].name}{more} ({images:,} images), which the run does not know",
        "a run goes on with the shards that it knows",
        "let them join at the next epoch with data.allow_growth=true, or name the former shards only",
    )


def _key(source: str) -> str:
    return f"source {source} of data.mixture" if source else "data.shards"

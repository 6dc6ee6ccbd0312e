"""The shards to read, as one list: what an order needs is known at once, an index is loaded when its shard is read.

Counts and digests stand in a folder's manifest.json, so that a billion images in 100,000 shards are listed in about a
second; where images lie in a tar is 16 bytes an image, and only the indexes in use are held.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from seer import remote, shard_manifest
from seer.errors import UserError
from seer.shard_index import ShardIndex, index_location, load_index
from seer.shard_patterns import expand_shards

_HELD_SAMPLES = 1 << 22  # of indexes that are held: 64 MB
# What is wrong with the indexes of so few shards is told when they are listed, and not in the middle of a run.
_FEW = 256
_AT_ONCE = 16  # remote indexes that are asked for together
_TURNS = 64  # of loading: shards whose numbers differ by a multiple of it are not loaded at the same time


class ListedShard(NamedTuple):
    """What is known of a shard before its index is loaded: images, bytes of the tar, blake2b of the tar."""

    location: str
    samples: int
    tar_size: int
    digest: str

    @property
    def name(self) -> str:
        """File name of the tar."""
        return remote.file_name(self.location)


class ShardList:
    """Some shards in their order; which sample is drawn when depends on this list through `digest` alone.

    `shards[number]` is the index of a shard; threads may share the list. It can be pickled; the indexes that were
    loaded stay behind.

    Args:
        shards: indexes, or what is known of shards whose index is loaded when it is asked for.
        index_dir: folder of the indexes; None: beside the tars.
        reading: how they are read if they are remote.

    Attributes:
        listed: what is known of each.
        counts: (S,) int64, images of each shard; some may be 0.
        digest: 32 hexadecimal characters over (file name, count, tar digest) of every shard in order, not over folders.
    """

    _OF_A_PROCESS = ("_loaded", "_held", "_keeping", "_turns")

    def __init__(
        self,
        shards: Sequence[ShardIndex | ListedShard],
        index_dir: Path | None = None,
        reading: remote.Reading = remote.BY_DEFAULT,
    ) -> None:
        self.listed = [
            ListedShard(shard.location, len(shard), shard.tar_size, shard.digest)
            if isinstance(shard, ShardIndex)
            else shard
            for shard in shards
        ]
        self.counts: NDArray[np.int64] = np.array([shard.samples for shard in self.listed], np.int64)
        self.digest = list_digest((shard.name, shard.samples, shard.digest) for shard in self.listed)
        self._index_dir, self.reading = index_dir, reading
        self._given = {number: shard for number, shard in enumerate(shards) if isinstance(shard, ShardIndex)}
        self._begin()

    def _begin(self) -> None:
        """With no index loaded."""
        self._loaded: dict[int, ShardIndex] = {}
        self._held, self._keeping = 0, threading.Lock()
        self._turns = [threading.Lock() for _ in range(_TURNS)]

    @classmethod
    def open(
        cls,
        patterns: Sequence[str] | str,
        index_dir: Path | None = None,
        reading: remote.Reading = remote.BY_DEFAULT,
        *,
        growing: bool = False,
    ) -> Self:
        """All shards that the patterns mean, in an order that does not depend on folders.

        Args:
            growing: as for `expand_shards`.

        Raises:
            UserError: from `expand_shards` or `load_index`, or no image in any shard.
        """
        tars = expand_shards([patterns] if isinstance(patterns, str) else patterns, growing=growing)
        shards = sorted(_listed(tars, index_dir, reading.patience), key=lambda shard: (shard.name, shard.digest))
        found = cls(shards, index_dir, reading)
        if found.samples == 0:
            raise UserError(
                f"{tars[0]} and what else was named hold no image",
                "training needs images",
                "check the shards",
            )
        few = range(len(found)) if len(found) <= _FEW else ()
        for number in few:
            if not remote.is_remote(found.listed[number].location) or number == 0:  # a request each
                found[number]
        return found

    @classmethod
    def joined(cls, lists: Sequence[ShardList]) -> ShardList:
        """Several lists, one after the other, whose indexes lie in one place."""
        return cls(
            [one._given.get(number, shard) for one in lists for number, shard in enumerate(one.listed)],
            lists[0]._index_dir,
            lists[0].reading,
        )

    def __getitem__(self, number: int) -> ShardIndex:
        """The index of a shard.

        Raises:
            UserError: from `load_index`, or an index that is not the one that the folder's list tells of.
        """
        if (known := self._known(number)) is not None:
            return known
        with self._turns[number % _TURNS]:
            known = self._known(number)  # whoever was waited for has loaded it
            return self._load(number) if known is None else known

    def is_loaded(self, number: int) -> bool:
        """Whether the index of a shard is here."""
        return self._known(number) is not None

    def _known(self, number: int) -> ShardIndex | None:
        given = self._given.get(number)
        return self._loaded.get(number) if given is None else given

    def _load(self, number: int) -> ShardIndex:
        shard = self.listed[number]
        found = load_index(shard.location, self._index_dir, patience=self.reading.patience)
        if (len(found), found.tar_size, found.digest) != shard[1:]:
            raise UserError(
                f"{index_location(shard.location, self._index_dir)} does not fit {shard_manifest.NAME} beside it",
                "a folder's list tells what its indexes hold",
                f"run: seer shards index '{shard.location}'",
            )
        with self._keeping:
            self._loaded[number] = found
            self._held += len(found)
            while self._held > _HELD_SAMPLES and len(self._loaded) > 1:
                self._held -= len(self._loaded.pop(next(iter(self._loaded))))
        return found

    def __len__(self) -> int:
        return len(self.listed)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in self._OF_A_PROCESS}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()

    @property
    def samples(self) -> int:
        """Images in all shards."""
        return int(self.counts.sum())


def list_digest(shards: Iterable[tuple[str, int, str]]) -> str:
    """32 hexadecimal characters over (file name, count, tar digest) of some shards, in their order."""
    digest = hashlib.blake2b(digest_size=16)
    for shard in shards:
        digest.update("{}\0{}\0{}\n".format(*shard).encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _listed(tars: Sequence[str], index_dir: Path | None, patience: float) -> list[ListedShard | ShardIndex]:
    """From the folders' lists where they tell of a tar of its size; else from its index."""
    lists = cache(_list_of)

    def listed(tar: str) -> ListedShard | None:
        folder = shard_manifest.folder_of(tar) if index_dir is None else os.fspath(index_dir)
        entry = lists(folder).get(remote.file_name(tar))
        try:
            # A remote tar's size is compared when it is read: here it would cost a request.
            fits = entry is not None and (remote.is_remote(tar) or os.stat(tar).st_size == entry[1])
        except OSError:
            fits = False  # load_index tells why
        return ListedShard(tar, *entry) if entry is not None and fits else None

    found: list[ListedShard | ShardIndex | None] = [listed(tar) for tar in tars]
    missing = [number for number, shard in enumerate(found) if shard is None]
    away = sum(remote.is_remote(tars[number]) for number in missing)
    with ThreadPoolExecutor(min(_AT_ONCE, away) or 1) as pool:
        load = partial(load_index, index_dir=index_dir, patience=patience)
        loaded = (pool.map if away else map)(load, [tars[number] for number in missing])
        for number, index in zip(missing, loaded, strict=True):
            found[number] = index
    return [shard for shard in found if shard is not None]


def _list_of(folder: str) -> dict[str, tuple[int, int, str]]:
    """File name -> images, bytes and digest of each shard that FOLDER/manifest.json lists."""
    entries: list[shard_manifest.Entry] = (shard_manifest.read(folder) or {}).get("shards", [])
    return {entry["name"]: (entry["samples"], entry["bytes"], entry["digest"]) for entry in entries}

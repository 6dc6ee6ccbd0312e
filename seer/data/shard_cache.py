"""Whole remote shards on a local disk, shared by the processes of a machine, within a bound (free of torch).

A folder of files under locks (flock), without a server: whatever is killed, its locks are gone with it.

- NAME.shard: a shard whose bytes were compared with its index; NAME says which address, size and digest.
- NAME.part-HOST: one that is being downloaded, locked by the process that does; without a lock it is rubbish. It has
  its full size from the beginning, so that the bound counts what is on its way.
- needs-HOST-PID-...: what a rank needs now and next, locked by its fetcher for as long as that lives.
- lock: held by whoever counts, makes room, or publishes.

Locks belong to open files, which a forked child would keep open: only processes that do not fork meanwhile take them.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from seer import remote
from seer.errors import UserError, printable, shown
from seer.files import LONGEST_LIST, read_at_most
from seer.remote import Reading

_FULL = (errno.ENOSPC, errno.EDQUOT)
_WAIT_SECONDS = 0.05
_ABANDONED_SECONDS = 86400.0
# After which a shard that had no room is tried again.
_ROOM_SECONDS = 10.0


class Tar(Protocol):
    """What is known of a shard before it is read: address, bytes, blake2b (32 hexadecimal characters, and more)."""

    @property
    def location(self) -> str: ...
    @property
    def tar_size(self) -> int: ...
    @property
    def digest(self) -> str: ...


class _Held(NamedTuple):
    """What lies in the folder: bytes of all files, names and status of whole shards, names of those on their way."""

    used: int
    whole: dict[str, os.stat_result]
    coming: set[str]


def say(sentence: str) -> None:
    """Tells the user what is done in another way than asked."""
    print(f"seer: {printable(sentence)}", file=sys.stderr, flush=True)


def nothing() -> None:
    """For those who do not watch."""


class ShardCache:
    """The cached shards as one process sees them; threads may share it.

    Args:
        reading: folder, bound, patience.
        tell: gets each sentence about what cannot be cached once; by default nobody.

    Raises:
        UserError: the folder cannot be made, written or locked.
    """

    def __init__(self, reading: Reading, tell: Callable[[str], None] | None = None) -> None:
        self.reading = reading
        self._folder, self._tell, self._told = reading.cache_folder, tell, set[str]()
        self._host = "".join(letter for letter in socket.gethostname() if letter.isalnum() or letter in "-_")
        self._no_room: dict[str, float] = {}
        self._needs_file, self._needs = -1, set[str]()
        try:
            with self._counting():
                pass
        except OSError as error:
            raise self._unusable(error) from None

    def open(self, tar: Tar, alive: Callable[[], None] = nothing) -> int | None:
        """A file descriptor of a whole shard, after downloading it if need be; the caller closes it.

        Where another process is downloading it, this one waits. The file may be unlinked while it is open.

        Args:
            tar: the shard.
            alive: called whenever something has moved.

        Returns:
            None where there is no room: the shard is to be read in parts.

        Raises:
            UserError: the shard cannot be read, or is not the one that was indexed.
        """
        name, seen, since = self.name(tar), -1, time.monotonic()
        while True:
            if (file := self._whole(name, tar)) is not None:
                return file
            if not self.may_have_room(tar):
                return None
            if (part := self._take(name)) is not None:
                file = self._fill(name, tar, part, self.reading.patience, alive)
                if file is not None:
                    return file
                continue
            moved = self._moved(name)
            if moved != seen:
                seen, since = moved, time.monotonic()
                alive()
            # Whoever downloads is stopped, or its server is silent: half of the patience is left for another try.
            if time.monotonic() - since > self.reading.patience / 2:
                return None
            time.sleep(_WAIT_SECONDS)

    def may_have_room(self, tar: Tar) -> bool:
        """False for a while after there was none."""
        return time.monotonic() >= self._no_room.get(self.name(tar), 0.0)

    def fetch(self, tar: Tar, patience: float) -> bool:
        """Brings a shard in ahead of time; does not wait for another process that does so.

        Returns:
            Whether it is there, or on its way; not where there is no room.

        Raises:
            UserError: as `open`, after less patience.
        """
        name = self.name(tar)
        file = self._whole(name, tar)
        if file is None:
            part = self._take(name)
            if part is None:
                return True
            file = self._fill(name, tar, part, patience, nothing)
        if file is not None:
            os.close(file)
        return file is not None

    def publish(self, now: Sequence[Tar], later: Sequence[Tar]) -> None:
        """Tells the processes of this machine what this rank needs: nobody evicts it until the next call.

        What it needed before and does not need any more is evicted first-needed first.
        """
        needs = [{self.name(tar): tar.tar_size for tar in tars} for tars in (now, later)]
        with self._counting():
            if not self.is_published():
                if self._needs_file >= 0:
                    os.close(self._needs_file)
                # Containers on one machine may have the same name and numbers.
                path = self._folder / f"needs-{self._host}-{os.getpid()}-{os.urandom(4).hex()}"
                self._needs_file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
                fcntl.flock(self._needs_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(self._needs_file, 0)
            with contextlib.suppress(OSError):  # where the disk is full, others do not know
                os.pwrite(self._needs_file, json.dumps(needs).encode(), 0)
            for name in self._needs.difference(*needs):
                with contextlib.suppress(OSError):
                    os.utime(self._folder / f"{name}.shard")
            self._needs = set().union(*needs)

    def is_published(self) -> bool:
        """Whether others can see what this rank needs; not once the folder was cleared away."""
        return self._needs_file >= 0 and os.fstat(self._needs_file).st_nlink > 0

    def needed_bytes(self) -> int:
        """Bytes of what the living ranks of this machine need together, now and later."""
        with self._counting():
            now, later = self._needed()
        return sum((later | now).values())

    def name(self, tar: Tar) -> str:
        """The file name of a shard, without its ending: the same for another signature of the same address."""
        address = shown(tar.location).partition("?(redacted)")[0]
        told = f"{address}\0{tar.tar_size}\0{_digest(tar)}".encode("utf-8", "surrogateescape")
        return hashlib.blake2b(told, digest_size=16).hexdigest()

    def _whole(self, name: str, tar: Tar) -> int | None:
        try:
            file = os.open(self._folder / f"{name}.shard", os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._unusable(error) from None
        if os.fstat(file).st_size == tar.tar_size:
            return file
        os.close(file)  # somebody wrote into it
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._folder / f"{name}.shard")
        return None

    def _take(self, name: str) -> int | None:
        """The part file of a shard, locked; None: another process has it, or it cannot be made."""
        path = self._part(name)
        while True:
            try:
                file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            except FileNotFoundError:  # the folder was cleared away
                self._folder.mkdir(parents=True, exist_ok=True)
                continue
            except OSError as error:
                if error.errno not in _FULL:
                    raise self._unusable(error) from None
                self._say_full()
                self._no_room[name] = time.monotonic() + _ROOM_SECONDS
                return None
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(os.fstat(file), os.stat(path)):
                    return file
            except BlockingIOError:
                os.close(file)
                return None
            except FileNotFoundError:
                pass
            os.close(file)  # it was finished or removed in between

    def _moved(self, name: str) -> int:
        try:
            return os.stat(self._part(name)).st_mtime_ns
        except OSError:
            return 0

    def _fill(self, name: str, tar: Tar, part: int, patience: float, alive: Callable[[], None]) -> int | None:
        """Downloads into a part file that this process has locked; the file, unlocked, or None: there is no room."""
        file = None
        try:
            file = self._whole(name, tar)  # from another process, just before the lock was taken
            if file is None and self._download(name, tar, part, patience, alive):
                fcntl.flock(part, fcntl.LOCK_UN)
                file = part
            return file
        finally:
            if file != part:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(self._part(name))  # before its lock goes
                os.close(part)

    def _download(self, name: str, tar: Tar, part: int, patience: float, alive: Callable[[], None]) -> bool:
        try:
            if not self._reserve(name, tar.tar_size, part):
                self._no_room[name] = time.monotonic() + _ROOM_SECONDS
                return False
            digest, place = hashlib.blake2b(digest_size=16), 0
            for piece in remote.pieces(tar.location, size=tar.tar_size, patience=patience):
                digest.update(piece)
                while piece:
                    written = os.pwrite(part, piece, place)
                    piece, place = piece[written:], place + written
                alive()
            if digest.hexdigest() != _digest(tar):
                raise _changed(tar)
            os.fsync(part)
            with self._counting():  # whoever counts sees it under one of its names
                os.rename(self._part(name), self._folder / f"{name}.shard")
        except OSError as error:
            if error.errno in _FULL:
                self._say_full()
            elif not isinstance(error, FileNotFoundError):  # somebody has cleared the folder away
                raise self._unusable(error) from None
            self._no_room[name] = time.monotonic() + _ROOM_SECONDS
            return False
        return True

    def _reserve(self, name: str, size: int, part: int) -> bool:
        """Gives the part file its full size if there is room, or room can be made without what is needed."""
        with self._counting():
            os.ftruncate(part, 0)
            now, later = self._needed()
            held = self._held()
            used, limit = held.used, self.reading.cache_bytes
            if name not in now:
                # What is needed now goes before what is needed later, or by nobody who says so.
                limit -= sum(now[other] for other in now.keys() - held.whole.keys() - held.coming)
            unneeded = held.whole.keys() - now.keys() - later.keys()
            evictable = sorted(unneeded, key=lambda other: held.whole[other].st_mtime_ns)
            if used + size - sum(held.whole[other].st_size for other in evictable) > limit:
                return False
            for full in (False, True):  # the disk may have less room than the bound
                while evictable and (used + size > limit or full):
                    gone = evictable.pop(0)
                    os.unlink(self._folder / f"{gone}.shard")
                    used -= held.whole[gone].st_size
                try:
                    _allocate(part, size)
                    return True
                except OSError as error:
                    os.ftruncate(part, 0)
                    if error.errno not in _FULL:
                        raise
            self._say_full()
            return False

    def _held(self) -> _Held:
        used, whole, coming = 0, dict[str, os.stat_result](), set[str]()
        for entry in os.scandir(self._folder):
            name, _, ending = entry.name.partition(".")
            if ending != "shard" and not ending.startswith("part-"):
                continue
            if ending == f"part-{self._host}" and _removed_if_free(entry.path):
                continue  # its process was killed
            try:
                status = entry.stat()
                if ending != "shard" and time.time() - status.st_mtime > _ABANDONED_SECONDS:
                    os.unlink(entry.path)  # of another machine, whose locks may not be seen here
                    continue
            except FileNotFoundError:
                continue
            used += status.st_size
            if ending == "shard":
                whole[name] = status
            else:
                coming.add(name)
        return _Held(used, whole, coming)

    def _needed(self) -> tuple[dict[str, int], dict[str, int]]:
        """Names and bytes of what living ranks need now, and of what they need later."""
        needs: tuple[dict[str, int], dict[str, int]] = {}, {}
        for entry in os.scandir(self._folder):
            if entry.name.startswith("needs-") and not _removed_if_free(entry.path):
                for both, one in zip(needs, _told_needs(entry.path), strict=True):
                    both.update(one)
        return needs

    @contextlib.contextmanager
    def _counting(self) -> Iterator[None]:
        self._folder.mkdir(parents=True, exist_ok=True)  # somebody may have cleared it away
        file = os.open(self._folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
        finally:
            os.close(file)

    def _part(self, name: str) -> Path:
        return self._folder / f"{name}.part-{self._host}"

    def tell_once(self, key: str, sentence: str) -> None:
        """Tells a sentence unless one of the same key was told."""
        if self._tell is not None and key not in self._told:
            self._told.add(key)
            self._tell(sentence)

    def _say_full(self) -> None:
        self.tell_once(
            "full",
            f"{self._folder}: the disk is full; shards that have no room are read image by image: free some space,"
            " or name another data.cache_dir or a smaller data.cache_gb",
        )

    def _unusable(self, error: OSError) -> UserError:
        return UserError(
            f"{self._folder} cannot hold remote shards ({error.strerror or error})",
            "they are kept in a folder of a local disk",
            "name another data.cache_dir, or data.cache_gb=0 to read each image by itself",
        )


def _allocate(file: int, size: int) -> None:
    """Gives an empty file its size, and the disk's space where the file system can promise it."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(file, 0, size)
            return
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise
    os.ftruncate(file, size)


def _told_needs(path: str) -> tuple[dict[str, int], dict[str, int]]:
    """What a file of needs says; nothing where it was cut (the disk was full) or is no such file."""
    try:
        now, later = json.loads(read_at_most(path, LONGEST_LIST))
        if all(type(size) is int and size >= 0 for size in (*now.values(), *later.values())):
            return now, later
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        pass
    return {}, {}


def _removed_if_free(path: str) -> bool:
    """Removes a file unless somebody has locked it; under its lock, so that nobody takes it meanwhile."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.unlink(path)
    except BlockingIOError:
        return False
    except FileNotFoundError:
        pass
    finally:
        os.close(file)
    return True


def _digest(tar: Tar) -> str:
    """Of the tar alone, where the index holds a choice of its images."""
    return tar.digest.partition("-")[0]


def _changed(tar: Tar) -> UserError:
    return UserError(
        f"{tar.location} holds other bytes than its index says",
        "the index is stale: the tar was changed after it was indexed",
        f"copy it again, or if the change was meant, run: seer shards index '{tar.location}'",
    )

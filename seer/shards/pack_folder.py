"""The folder that a pack writes: one process at a time."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from seer.errors import UserError
from seer.files import refuse_address

LOCK = ".packing.lock"
_TRIES = 10  # each fails only if another pack ends at that very moment


@contextmanager
def held(out: Path) -> Iterator[None]:
    """Makes the folder and keeps other packs out of it; leaves no empty folder that was not there before.

    The lock goes with the process that holds it, however that ends. Where the file system knows no locks, or the folder
    cannot be written (a pack that is whole may be looked at all the same), it goes on without.

    Raises:
        UserError: an address, a file, a folder that cannot be made, or another pack is writing there.
    """
    refuse_address(out)
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    descriptor = _locked(out)
    try:
        yield
    finally:
        if descriptor is not None:
            with suppress(OSError):
                (out / LOCK).unlink()
            os.close(descriptor)
        with suppress(OSError):  # not empty
            for folder in made:
                folder.rmdir()


def _locked(out: Path) -> int | None:
    """A descriptor that holds the lock, or None where there can be none."""
    for _ in range(_TRIES):
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise cannot_pack(out, error) from None
        try:
            # Python opens with O_CLOEXEC: worker processes do not have it.
            descriptor = os.open(out / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except FileNotFoundError:
            continue  # another one has ended just now, and taken its empty folder away
        except OSError:
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(descriptor), os.stat(out / LOCK)):
                os.truncate(descriptor, 0)
                os.pwrite(descriptor, b"%d" % os.getpid(), 0)
                return descriptor
        except FileNotFoundError:
            pass  # its holder has removed it on leaving: a lock on a file without a name keeps nobody out
        except BlockingIOError:
            holder = os.pread(descriptor, 20, 0).decode("ascii", "replace")
            os.close(descriptor)
            raise UserError(
                f"{out} is being written by another pack (process {holder or 'unknown'})",
                "one pack at a time writes into a folder",
                "wait for it, or name another folder",
            ) from None
        except OSError:
            return descriptor  # a file system without locks, or a full one
        os.close(descriptor)
    return None


def cannot_pack(out: Path, error: OSError) -> UserError:
    """The operating system's refusal to write shards, for the user."""
    if out.is_file():
        return UserError(f"{out} is a file", "a pack goes into a folder of its own", "name another place")
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        remedy = "free space or name another folder; the same command then goes on where it was"
    elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        remedy = "change its permissions, or name a folder that can be written"
    else:
        remedy = "name another folder"
    return UserError(f"{out} cannot be written ({error.strerror})", "the shards need a folder", remedy)

"""Files that survive a crash: whole or not there at all, and on the disk before anything points to them."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from seer import remote
from seer.errors import UserError

LONGEST_LIST = 1 << 26  # bytes of a JSON that lists shards: some 400,000 of them


def read_at_most(file: str | Path, most: int) -> bytes:
    """The bytes of a file that may be somebody else's: one that would fill the memory, or never end, is not begun.

    Raises:
        OSError: no regular file, one of more than `most` bytes, or what `open` raises.
    """
    descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe would keep it waiting
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "no regular file")
        if status.st_size > most:
            raise OSError(errno.EFBIG, f"over {most:,} bytes")
        with open(descriptor, "rb", closefd=False) as stream:
            return stream.read(status.st_size)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable; a rename is only on the disk after this."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_file(file: Path) -> None:
    """Make a file's bytes durable."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(file: Path, data: bytes) -> None:
    """Write a whole file or nothing: a temporary name in the same folder, fsync, rename, fsync of the folder.

    Raises:
        OSError: the folder cannot be written or the disk is full; the former file stands unchanged then.
    """
    temporary = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        with open(temporary, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(file.parent)


def write_unless_other(file: Path, data: bytes, overwrite: bool) -> None:
    """Writes a file that a user may have changed by hand: another content is replaced only if that is asked for.

    Raises:
        UserError: there is a file of another content, or the place cannot be written.
    """
    try:
        if not overwrite and file.exists():
            if file.read_bytes() == data:
                return
            raise UserError(f"{file} says something else", "what is there is not lost", "--overwrite replaces it")
        write_atomically(file, data)
    except OSError as error:
        raise cannot_write(file, error) from None


def refuse_address(place: str | Path) -> None:
    """Refuses to write to an address: as a path it would quietly be a folder called `s3:`.

    Raises:
        UserError: it is an address, also one that has lost a slash by becoming a path.
    """
    scheme, colon, rest = os.fspath(place).partition(":/")
    address = f"{scheme}://{rest.lstrip('/')}"
    if colon and remote.is_remote(address):
        remedy = "write to a folder here, then copy it into the bucket"
        raise UserError(f"{address} is an address", "what seer makes is written to files", remedy)


def cannot_write(place: Path, error: OSError) -> UserError:
    """The operating system's refusal to write, for the user: disk full, no permission, a file in the way."""
    reason = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        remedy = "free some space and give the same command again"
    else:
        remedy = "choose a place that can be written, or change its permissions"
    return UserError(f"{place} cannot be written ({reason})", "what a run produces is stored there", remedy)

"""Remote tars for those who read them whole: through a temporary file, one at a time."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from seer import remote
from seer.errors import UserError
from seer.shards.tar import DamagedTar


def size_of(location: str) -> int:
    """Bytes of a tar.

    Raises:
        UserError: it cannot be read.
    """
    if remote.is_remote(location):
        return remote.size(location)
    try:
        return os.stat(location).st_size
    except OSError as error:
        what = f"{location} cannot be read ({error.strerror})"
        raise UserError(what, "a shard is a tar file", "check the path") from None


@contextlib.contextmanager
def as_file(location: str) -> Iterator[Path]:
    """A tar as a file: itself, or a copy of a remote one, which goes afterwards. Errors of the block name the tar.

    Raises:
        UserError: it cannot be read, or the disk of temporary files is full.
    """
    if not remote.is_remote(location):
        yield Path(location)
        return
    bytes_ = remote.size(location)
    with tempfile.NamedTemporaryFile(prefix="seer-", suffix=".tar") as copy:
        try:
            for piece in remote.pieces(location, size=bytes_, patience=remote.PATIENCE):
                copy.write(piece)
            copy.flush()
        except OSError as error:
            what = f"{tempfile.gettempdir()} cannot hold {location} ({error.strerror})"
            rule = f"a remote tar is read through a temporary file, here of {bytes_:,} bytes"
            raise UserError(what, rule, "free some space, or name another folder in TMPDIR") from None
        try:
            yield Path(copy.name)
        except DamagedTar as error:
            raise DamagedTar(location, error.offset, error.why) from None
        except UserError as error:
            words = (text.replace(copy.name, location) for text in (error.what, error.rule, error.remedy))
            raise UserError(*words) from None

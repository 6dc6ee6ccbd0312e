"""What is known about a shard without reading it: where its images lie, their labels, the tar's size and digest.

The index of `NAME.tar` is `NAME.tar.seer.npz` beside it (or in another folder): plain numpy arrays, loaded without
pickle, so that no code can come out of somebody's data. It is never called `.index` (wids unpickles that) nor `.idx`
(DALI's text format).
"""

from __future__ import annotations

import io
import os
import re
import tokenize
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from seer import remote
from seer.errors import UserError
from seer.files import read_at_most, write_atomically

_FORMAT = 1
DIGEST = re.compile(r"[0-9a-f]{32}(-[0-9a-f]{32})?")  # the second part: of a choice of samples
_ROWS = np.dtype([("offset", "<u8"), ("size", "<u4"), ("label", "<i4")])
_HEADER = re.compile(rf"{_FORMAT} (\d{{1,18}}) ({DIGEST.pattern})")
_LARGEST = 1 << 30  # bytes of an index: 67 million images in one tar
_LONGEST_NPY = 256  # characters with which numpy describes an array: ours take 118
# What numpy and zipfile raise for a damaged file. RuntimeError (NotImplementedError is one): its flags say that it is
# encrypted, or compressed in an unknown way.
_DAMAGE = (
    *(ValueError, TypeError, AttributeError, LookupError, EOFError, OSError, RuntimeError, MemoryError),
    *(zipfile.BadZipFile, tokenize.TokenError),
)


@dataclass(frozen=True)
class ShardIndex:
    """One tar and where its images lie.

    Attributes:
        location: path of the tar, or its address.
        offsets: (n,) uint64, first byte of each image in the tar.
        sizes: (n,) uint32, bytes of each image.
        labels: (n,) int32, class numbers from 0, -1 for none.
        tar_size: bytes of the tar when it was indexed.
        digest: blake2b of the tar's bytes, 16 bytes as 32 hexadecimal characters. Where only some of the tar's images
            were to be taken, "-" and the blake2b of `offsets` follow: another choice is other data.
    """

    location: str
    offsets: NDArray[np.uint64]
    sizes: NDArray[np.uint32]
    labels: NDArray[np.int32]
    tar_size: int
    digest: str

    def __len__(self) -> int:
        return len(self.offsets)

    @property
    def name(self) -> str:
        """File name of the tar."""
        return remote.file_name(self.location)

    @property
    def tar_digest(self) -> str:
        """`digest` without the choice: blake2b of the tar's bytes."""
        return self.digest.partition("-")[0]


def index_location(tar: str | Path, index_dir: Path | None = None) -> str:
    """Path or address of the index of `tar`: NAME.tar.seer.npz beside it, or in `index_dir`."""
    tar = os.fspath(tar)
    name = f"{remote.file_name(tar)}.seer.npz"
    if index_dir is not None:
        return os.path.join(index_dir, name)
    return remote.beside(tar, name) if remote.is_remote(tar) else os.path.join(os.path.dirname(tar), name)


def index_path(tar: str | Path, index_dir: Path | None = None) -> Path:
    """`index_location` of what can be written: a tar that is a file, or any with `index_dir`."""
    return Path(index_location(tar, index_dir))


def save_index(index: ShardIndex, file: Path) -> None:
    """Writes an index atomically; the same index gives the same bytes."""
    buffer = io.BytesIO()
    # Two members instead of six: opening a member costs more than reading its numbers.
    header = np.frombuffer(f"{_FORMAT} {index.tar_size} {index.digest}".encode(), np.uint8)
    rows = np.empty(len(index), _ROWS)
    rows["offset"], rows["size"], rows["label"] = index.offsets, index.sizes, index.labels
    np.savez(buffer, header=header, rows=rows)
    write_atomically(Path(file), buffer.getvalue())


def load_index(tar: str | Path, index_dir: Path | None = None, *, patience: float = remote.PATIENCE) -> ShardIndex:
    """The index of a tar; the tar itself is not read. A file's size is compared (a remote tar's when it is read).

    It costs 0.3 ms for 1,000 images and 0.7 ms for 10,000 from a local disk.

    Args:
        patience: seconds of trying again to read a remote index.

    Raises:
        UserError: no such tar, a tar without index, a damaged index, a tar whose size is not what was indexed.
    """
    tar, file = os.fspath(tar), index_location(tar, index_dir)
    away = remote.is_remote(tar)
    again = f"run: seer shards index '{tar}'"
    again += f" --index-dir '{index_dir or 'DIR'}'" if away or index_dir is not None else ""
    try:
        tar_size = None if away else os.stat(tar).st_size
    except OSError as error:
        raise UserError(f"{tar} cannot be read ({error.strerror})", "a shard is a tar file", "check the path") from None
    missing = UserError(f"{tar} has no index ({file})", "reading in random order needs one", _remedy(tar, index_dir))
    try:
        index = _parsed(tar, _read(file, patience))
    except FileNotFoundError:
        raise missing from None
    except remote.Refused as error:
        if error.status == 404 and away:
            remote.size(tar, patience=patience)  # tells where there is no such tar either
        raise (missing if error.status == 404 else error) from None
    except UserError:
        raise
    except PermissionError as error:
        raise UserError(f"{file} cannot be read ({error.strerror})", "it is the index of a shard", "check it") from None
    except _DAMAGE:
        raise UserError(f"{file} is damaged", "it is no index that this version can read", again) from None
    if tar_size is not None and tar_size != index.tar_size:
        raise UserError(
            f"{tar} has {tar_size} bytes, its index says {index.tar_size}",
            "the tar was cut short or changed after it was indexed",
            f"copy it again, or if the change was meant, {again}",
        )
    return index


def _remedy(tar: str, index_dir: Path | None) -> str:
    """How the tars of a folder get their indexes; http(s):// cannot be listed, so there a tar stands for itself."""
    away = remote.is_remote(tar)
    whole = tar
    if not away and tar.endswith(".tar"):
        whole = os.path.join(os.path.dirname(tar), "*.tar")
    elif away and not tar.startswith("http"):
        whole = remote.beside(tar, "*.tar")
    run = f"run: seer shards index '{whole}'"
    if index_dir is not None:
        return f"{run} --index-dir '{index_dir}'"
    if away:
        return (
            f"{run} --index-dir 'DIR' and name DIR here too (seer train: data.index_dir=DIR, others: --index-dir DIR)"
        )
    return run


def _read(file: str, patience: float) -> bytes:
    if remote.is_remote(file):
        return remote.read_bytes(file, most=_LARGEST, patience=patience)
    return read_at_most(file, _LARGEST)


def _parsed(tar: str, data: bytes) -> ShardIndex:
    """An index out of its bytes, exactly as `save_index` writes them: somebody else's may be made to do harm."""
    with zipfile.ZipFile(io.BytesIO(data)) as members:
        header = _HEADER.fullmatch(_array(members, "header", np.dtype("u1")).tobytes().decode("ascii"))
        rows = _array(members, "rows", _ROWS)
    if header is None:
        raise ValueError
    offsets, sizes, labels = (np.ascontiguousarray(rows[name]) for name in ("offset", "size", "label"))
    tar_size = int(header[1])
    if not ((offsets <= tar_size) & (offsets + sizes <= tar_size) & (labels >= -1)).all():
        raise ValueError
    return ShardIndex(tar, offsets, sizes, labels, tar_size, header[2])


def _array(members: zipfile.ZipFile, name: str, kind: np.dtype[Any]) -> NDArray[Any]:
    """One array of an npz, of one dimension; np.load would make room for as much as the file claims to hold."""
    info = members.getinfo(f"{name}.npy")
    if info.compress_type != zipfile.ZIP_STORED:  # compressed it may be a thousand times as large
        raise ValueError
    stream = io.BytesIO(members.read(info))
    if np.lib.format.read_magic(stream) != (1, 0):
        raise ValueError
    shape, _, found = np.lib.format.read_array_header_1_0(stream, max_header_size=_LONGEST_NPY)
    array = np.frombuffer(stream.getbuffer()[stream.tell() :], kind)
    if found != kind or shape != array.shape:
        raise ValueError
    return array

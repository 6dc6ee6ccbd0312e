"""Indexes of tars that others made: one image a sample, and its label where there is a `.cls` member."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from seer import remote, shard_manifest
from seer.errors import UserError
from seer.files import refuse_address
from seer.shard_index import ShardIndex, index_path, load_index, save_index
from seer.shard_patterns import expand_shards
from seer.shards.processes import Progress, each, silent
from seer.shards.remote_tars import as_file, size_of
from seer.shards.tar import DamagedTar, Member, members

# Chosen by name alone: looking into every file would cost a read, and data workers meet what is no image anyway.
IMAGE_EXTENSIONS = ("bmp", "gif", "jpeg", "jpg", "png", "tif", "tiff", "webp")
_CHUNK = 1 << 22
_LARGEST = 2**32 - 1
# WebDataset's rule: the key is the path up to the first dot of the file name; names that begin with a dot are hidden.
_KEY = re.compile(r"((?:.*/|)[^./][^./]*)\.([^/]*)", re.DOTALL)


@dataclass(frozen=True)
class Oddities:
    """What was seen in tars and left out of an index.

    Attributes:
        without_image: samples in which no member has the extension of an image.
        several_images: samples with more than one image; the first is taken.
        unreadable_labels: `.cls` members that are no class number; their images count as unlabelled.
        not_chosen: images that were left out because only some were asked for.
    """

    without_image: int = 0
    several_images: int = 0
    unreadable_labels: int = 0
    not_chosen: int = 0

    def __add__(self, other: Oddities) -> Oddities:
        return Oddities(
            self.without_image + other.without_image,
            self.several_images + other.several_images,
            self.unreadable_labels + other.unreadable_labels,
            self.not_chosen + other.not_chosen,
        )

    def sentences(self) -> list[str]:
        """One sentence for each kind that was seen."""
        told = [
            (self.without_image, "samples have no image and are left out"),
            (self.several_images, "samples have several images, the first is taken (a name ends at its first dot)"),
            (self.unreadable_labels, "labels (.cls) are no class number; their images count as unlabelled"),
            (self.not_chosen, "images are not listed and are left out"),
        ]
        return [f"{count} {what}" for count, what in told if count]


def tar_digest(tar: Path) -> tuple[int, str]:
    """Bytes of a tar and their blake2b (32 hexadecimal characters)."""
    digest, size = hashlib.blake2b(digest_size=16), 0
    try:
        with open(tar, "rb", buffering=0) as stream:
            while chunk := stream.read(_CHUNK):
                digest.update(chunk)
                size += len(chunk)
    except OSError as error:
        raise UserError(f"{tar} cannot be read ({error.strerror})", "a shard is a tar file", "check the path") from None
    return size, digest.hexdigest()


def samples_of(tar: Path) -> Iterator[list[tuple[str, Member]]]:
    """Samples as WebDataset groups them: neighbours with one key; each as (suffix in lower case, member)."""

    def keyed() -> Iterator[tuple[str, str, Member]]:
        for member in members(tar):
            parts = _KEY.fullmatch(member.name)
            if parts and not (member.name.startswith("__") and member.name.endswith("__")):
                yield parts.group(1), parts.group(2).lower(), member

    for _, group in groupby(keyed(), key=lambda item: item[0]):
        yield [(suffix, member) for _, suffix, member in group]


def _label(file: int, member: Member) -> int | None:
    text = os.pread(file, min(member.size, 20), member.offset).strip()
    number = int(text) if text.isdigit() and member.size <= 20 else -1
    return number if 0 <= number < 2**31 else None


def index_tar(tar: Path) -> tuple[ShardIndex, Oddities]:
    """Reads a whole tar and makes its index: of each sample the image, by its extension alone, and the label.

    A suffix that is an extension (`jpg`) goes before one that ends in it (`rgb.jpg`); among equals the first counts.

    Raises:
        DamagedTar, UserError: see `seer.shards.tar.members`; an image of 4 GiB or more.
    """
    tar_size, digest = tar_digest(tar)
    rows: list[tuple[int, int, int]] = []
    odd = [0, 0, 0]
    file = os.open(tar, os.O_RDONLY | os.O_CLOEXEC)
    try:
        for sample in samples_of(tar):
            images = [(suffix, member) for suffix, member in sample if suffix.rsplit(".", 1)[-1] in IMAGE_EXTENSIONS]
            if not images:
                odd[0] += 1
                continue
            plain = [(suffix, member) for suffix, member in images if suffix in IMAGE_EXTENSIONS]
            image = (plain or images)[0][1]
            odd[1] += len(plain or images) > 1
            if image.size > _LARGEST:
                raise UserError(f"{image.name} in {tar} has {image.size} bytes", "an image is below 4 GiB", "remove it")
            labels = [_label(file, member) for suffix, member in sample if suffix == "cls"]
            odd[2] += None in labels
            rows.append((image.offset, image.size, next((label for label in labels if label is not None), -1)))
    finally:
        os.close(file)
    columns = np.array(rows, np.int64).reshape(-1, 3).T
    index = ShardIndex(
        str(tar),
        columns[0].astype(np.uint64),
        columns[1].astype(np.uint32),
        columns[2].astype(np.int32),
        tar_size,
        digest,
    )
    return index, Oddities(*odd)


@dataclass(frozen=True)
class Indexed:
    """What `index` did: the indexes of all shards, how many of them were there before, what was left out."""

    shards: list[ShardIndex]
    already_there: int
    oddities: Oddities


def _is_valid(tar: str, size: int, index_dir: Path | None) -> bool:
    """Whether there is an index that fits the tar's size and, of a file, was made after its last change."""
    try:
        index = load_index(tar, index_dir)
        if remote.is_remote(tar):
            return index.tar_size == size
        return index_path(tar, index_dir).stat().st_mtime_ns >= os.stat(tar).st_mtime_ns
    except (UserError, OSError):
        return False


def chosen(index: ShardIndex, offsets: NDArray[np.uint64]) -> tuple[ShardIndex, Oddities]:
    """The index of those images alone that begin at some of the offsets."""
    taken = np.isin(index.offsets, offsets)
    if taken.all():
        return index, Oddities()
    rows = (index.offsets[taken], index.sizes[taken], index.labels[taken])
    digest = f"{index.digest}-{hashlib.blake2b(rows[0].astype('<u8').tobytes(), digest_size=16).hexdigest()}"
    left_out = Oddities(not_chosen=int((~taken).sum()))
    return replace(index, offsets=rows[0], sizes=rows[1], labels=rows[2], digest=digest), left_out


def _make(job: tuple[str, Path | None, NDArray[np.uint64] | None]) -> tuple[ShardIndex, Oddities] | DamagedTar:
    tar, index_dir, only = job
    try:
        with as_file(tar) as file:
            index, oddities = index_tar(file)
        index = replace(index, location=tar)
        if only is not None:
            index, left_out = chosen(index, only)
            oddities += left_out
        save_index(index, index_path(tar, index_dir))
    except DamagedTar as error:
        return error
    except OSError as error:
        remedy = "write the indexes elsewhere with --index-dir FOLDER (and data.index_dir=FOLDER when training)"
        what = f"{index_path(tar, index_dir)} cannot be written ({error.strerror})"
        raise UserError(what, "each shard gets an index", remedy) from None
    return index, oddities


def _write_manifests(shards: Sequence[ShardIndex], index_dir: Path | None) -> None:
    folders: dict[Path, list[ShardIndex]] = {}
    for shard in shards:
        folders.setdefault(index_path(shard.location, index_dir).parent, []).append(shard)
    for folder, here in folders.items():
        known = shard_manifest.read(folder)
        if known is None and (folder / shard_manifest.NAME).exists():
            continue  # somebody else's file; training does not need ours
        entries = {entry["name"]: entry for entry in (known or {}).get("shards", [])}
        entries |= {shard.name: shard_manifest.entry(shard, shard.name) for shard in here}
        more = {word: value for word, value in (known or {}).items() if word not in ("format", "samples", "shards")}
        if list(entries.values()) != (known or {}).get("shards"):
            try:
                shard_manifest.write(folder, list(entries.values()), **more)
            except OSError as error:
                what = f"{folder / shard_manifest.NAME} cannot be written ({error.strerror})"
                remedy = "make its folder writable, or write the indexes elsewhere with --index-dir FOLDER"
                raise UserError(what, "it lists the shards of a folder", remedy) from None


def index(
    patterns: Sequence[str],
    index_dir: Path | None = None,
    *,
    only: Mapping[Path, NDArray[np.uint64]] | None = None,
    workers: int = 1,
    progress: Progress = silent,
) -> Indexed:
    """Makes NAME.tar.seer.npz for each tar that the patterns mean, and one manifest.json a folder.

    Shards with a valid index are passed over, so a call that was interrupted goes on where it was.

    Args:
        patterns: see `seer.shard_patterns.expand_shards`.
        index_dir: where the indexes go; None: beside the tars. Remote tars need it; each is fetched once.
        only: of each tar the offsets of the members that may be taken (all indexes are then made anew); None: all.
        workers: processes.
        progress: called with bytes done and bytes in all.

    Raises:
        UserError: nothing matches, a tar is compressed, an index or a manifest cannot be written, a tar cannot be read.
        DamagedTar: after all other tars were indexed.
    """
    tars = expand_shards(patterns)
    if index_dir is None:
        _refuse_remote(tars)
    if index_dir is not None:
        _refuse_equal_names(tars)
        make_folder(index_dir)
    sizes = {tar: size_of(tar) for tar in tars}
    left = [tar for tar in tars if only is not None or not _is_valid(tar, sizes[tar], index_dir)]
    done, total = 0, sum(sizes[tar] for tar in left)
    oddities, damaged = Oddities(), list[DamagedTar]()
    jobs = [(tar, index_dir, None if only is None else only[Path(tar)]) for tar in left]
    for (tar, _, _), result in each(_make, jobs, workers):
        if isinstance(result, DamagedTar):
            damaged.append(result)
        else:
            oddities += result[1]
        done += sizes[tar]
        progress(done, total)
    broken = {str(error.path) for error in damaged}
    shards = [load_index(tar, index_dir) for tar in tars if tar not in broken]
    _write_manifests(shards, index_dir)
    if damaged:
        first = min(damaged, key=lambda error: str(error.path))
        others = f" ({len(damaged) - 1} more tars are damaged)" if len(damaged) > 1 else ""
        raise DamagedTar(first.path, first.offset, first.why + others)
    return Indexed(shards, len(tars) - len(left), oddities)


def _refuse_remote(tars: Sequence[str]) -> None:
    for tar in tars:
        if remote.is_remote(tar):
            rule = "indexes are written into a folder here"
            raise UserError(f"{tar} is remote", rule, "give --index-dir DIR, and data.index_dir=DIR when training")


def _refuse_equal_names(tars: Sequence[str]) -> None:
    seen: dict[str, str] = {}
    for tar in tars:
        other = seen.setdefault(remote.file_name(tar), tar)
        if other != tar:
            rule = "one folder of indexes holds one index a name"
            raise UserError(f"{other} and {tar} have one name", rule, "give each folder its own --index-dir")


def make_folder(folder: Path) -> None:
    """Makes a folder for indexes, if it is not there.

    Raises:
        UserError: an address, or it cannot be made.
    """
    refuse_address(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        what = f"{folder} cannot be made ({error.strerror})"
        raise UserError(what, "the indexes need a folder", "name another folder") from None

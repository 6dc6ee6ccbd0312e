"""Packs images into WebDataset tars: every image's bytes as they are, an index a shard, a manifest a folder.

A sample has up to three members: `000000123.jpg`, the file, its extension in lower case; `000000123.json`, its place in
the input as {"path": ...}, and what its own JSON said where it comes out of a tar; with labels `000000123.cls`, the
class number in decimal. Keys are running numbers because WebDataset ends a key at the first dot of a file name, which
merges photographs such as `www.a.com_1.jpg` and `www.a.com_2.jpg`. The path travels in the shard, where it costs 1 KB a
sample, because a list beside it gets lost.

The tars have the form of webdataset's TarWriter (a test compares the bytes): importing webdataset imports torch, which
costs every worker two to three seconds and 200 MB.
"""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from seer import shard_manifest
from seer.errors import UserError, closest
from seer.files import LONGEST_LIST, read_at_most, sync_folder, write_atomically
from seer.keyed_random import key, splitmix64
from seer.shard_index import ShardIndex, index_path, load_index, save_index
from seer.shards import curation
from seer.shards.archives import parsed_note
from seer.shards.curation import Curation, bytes_of, shrunk
from seer.shards.formats import LONGEST_START, OpenImage, extension_of
from seer.shards.index import IMAGE_EXTENSIONS
from seer.shards.inputs import read
from seer.shards.listing import Listing, list_images
from seer.shards.pack_folder import LOCK, cannot_pack, held
from seer.shards.processes import Progress, cores, each, silent
from seer.shards.tar_writing import TarWriter

Labels = Literal["own", "none", "folders"]
_LEFT = ".packing.npy"  # places of the images that curation leaves, once that is known
_BLOCK = 512


@dataclass(frozen=True)
class Packed:
    """What `pack` did.

    Attributes:
        out: the folder of the shards.
        samples, bytes, shards: images, bytes of all tars, number of tars.
        labelled: images with a label.
        classes: class names in the order of their numbers; empty without labels, or where these are mere numbers.
        left_out: reason -> how many files, folders or members of the input were no image that can be packed.
        dropped: reason -> how many images curation left out; each stands in `dropped.jsonl`.
        already_there: the very same pack was found and nothing was written.
    """

    out: Path
    samples: int
    bytes: int
    shards: int
    labelled: int
    classes: list[str]
    left_out: dict[str, int]
    dropped: dict[str, int]
    already_there: bool


@dataclass(frozen=True)
class _Shard:
    """The job of one process: one tar."""

    tar: Path
    first: int
    images: Listing
    labels: list[int]
    longest_side: int | None
    open_image: OpenImage | None


def pack(
    inputs: Path | Sequence[Path],
    out: Path,
    *,
    labels: Labels = "own",
    shard_bytes: int = 256_000_000,
    samples_per_shard: int | None = None,
    classes: Sequence[str] | None = None,
    seed: int = 0,
    curate: Curation | None = None,
    workers: int | None = None,
    overwrite: bool = False,
    progress: Progress = silent,
) -> Packed:
    """Packs the images of `inputs` into tars in `out`.

    The list of images is sorted, then put into a keyed random order, so that each shard is a mixture of all inputs; the
    same files, options and seed give the same tars, byte for byte, whatever the number of workers. Each tar appears
    under its name whole and with its index; a call that was interrupted goes on where it was.

    Args:
        inputs: see `seer.shards.listing.list_images`.
        out: a new or empty folder, or one of a former pack (which is replaced only with `overwrite`).
        labels: "own": those that tars (`.cls`, `.json`) and lists (`label`) carry; "folders": the first folder of an
            image's path below its input is the class, numbered in alphabetical order; "none".
        shard_bytes: about the size of a tar, before images are shrunk; the tars of a pack are about equally large.
        samples_per_shard: images of a tar, instead of `shard_bytes`.
        classes: class names in the order of their numbers, instead of the names found here.
        seed: of the order.
        curate: what is left out or shrunk.
        workers: processes; None: one a core.
        progress: called with bytes done and bytes in all, for each of the passes.

    Raises:
        UserError: no images, unreadable input, unwritable or foreign `out` or one that another process packs into,
            images outside class folders.
    """
    workers, wishes = workers or cores(), curate or Curation()
    with held(out):
        listing = list_images([inputs] if isinstance(inputs, Path) else inputs, out, workers)
        names, numbers = _labels(listing, labels, classes)
        options = {
            "name": re.sub(r"[^A-Za-z0-9_-]+", "-", Path(os.path.abspath(out)).name).strip("-") or "shard",
            "labels": labels if labels == "folders" or (numbers >= 0).any() else "none",
            "classes": names,
            "shard_bytes": None if samples_per_shard else shard_bytes,
            "samples_per_shard": samples_per_shard,
            "seed": seed,
            **wishes.options(),
            "input": listing.digest,
        }
        found = _former(out, options, overwrite)
        try:
            if found is not None:
                entries, dropped = found, curation.read_report(out) if wishes.drops else {}
            else:
                write_atomically(out / shard_manifest.UNFINISHED, (json.dumps(options) + "\n").encode())
                left, dropped = _left(listing, out, wishes, workers, progress)
                plan = _plan(
                    listing, left, f"{out}/{options['name']}", numbers, shard_bytes, samples_per_shard, seed, wishes
                )
                entries = _write_all(plan, out, options, workers, progress)
        except OSError as error:
            raise cannot_pack(out, error) from None
    samples, size = (sum(shard[word] for shard in entries) for word in ("samples", "bytes"))
    labelled = sum(int((load_index(out / shard["name"]).labels >= 0).sum()) for shard in entries)
    shards = len(entries)
    return Packed(out, samples, size, shards, labelled, names, listing.left_out, dropped, found is not None)


def _labels(listing: Listing, kind: Labels, given: Sequence[str] | None) -> tuple[list[str], NDArray[np.int64]]:
    """Class names, and the class number of each image (n,), -1 for none."""
    if kind == "none":
        return [], np.full(len(listing), -1)
    words = _folders(listing) if kind == "folders" else listing.labels
    known = set(words) - {""}
    if not known:
        return [], np.full(len(listing), -1)
    if kind == "own" and all(map(_is_number, known)):
        names = list(given) if given else listing.classes
        largest = max(map(int, known))
        if names and largest >= len(names):
            rule = f"there are {len(names)} class names, for numbers from 0"
            raise UserError(f"label {largest} has no name", rule, "name the classes of these labels")
        return names, np.array([int(word or -1) for word in words], np.int64)
    names = list(given) if given else sorted(known)
    number = {name: place for place, name in enumerate(names)} | {"": -1}
    unknown = next((word for word in words if word not in number), None)
    if unknown is not None:
        raise UserError(f"{unknown} is no class of the given list", "its number is not known", closest(unknown, names))
    return names, np.array([number[word] for word in words], np.int64)


def _is_number(word: str) -> bool:
    return word.isascii() and word.isdecimal() and len(word) <= 10 and int(word) < 2**31


def _folders(listing: Listing) -> list[str]:
    """The first folder of each image's path below its input."""
    prefixes = [source.prefix for source in listing.sources]
    below = [path.removeprefix(prefixes[at]) for path, at in zip(listing.paths, listing.source.tolist(), strict=True)]
    loose = next((path for path in below if path.find("/") < 1), None)
    if loose is not None:
        rule = "with labels every image lies in the folder of its class"
        remedy = "move it into one, or pack without --labels folders"
        raise UserError(f"{loose} lies in no class folder", rule, remedy)
    return [path.split("/", 1)[0] for path in below]


def _left(
    listing: Listing, out: Path, wishes: Curation, workers: int, progress: Progress
) -> tuple[NDArray[np.int64], dict[str, int]]:
    """Places of the images that are packed, and why how many others are not; looked up if it was found out before."""
    if not wishes.drops:
        return np.arange(len(listing)), {}
    if not (out / _LEFT).exists():
        gone = curation.dropped(listing, wishes, workers, progress)
        curation.write_report(out, listing, gone)
        buffer = io.BytesIO()
        np.save(buffer, np.delete(np.arange(len(listing)), [image.place for image in gone]))
        write_atomically(out / _LEFT, buffer.getvalue())
    left, counts = np.load(out / _LEFT, allow_pickle=False), curation.read_report(out)
    if not len(left):
        what = ", ".join(f"{count} {reason}" for reason, count in counts.items())
        raise UserError(
            f"nothing is left of {len(listing)} images ({what})", "there is nothing to pack", "ask for less"
        )
    return left, counts


def _padded(size: NDArray[np.int64]) -> NDArray[np.int64]:
    """Bytes of a tar's member: header and data in whole blocks."""
    return _BLOCK + -(-size // _BLOCK) * _BLOCK


def _plan(
    listing: Listing,
    left: NDArray[np.int64],
    prefix: str,
    labels: NDArray[np.int64],
    shard_bytes: int,
    samples_per_shard: int | None,
    seed: int,
    wishes: Curation,
) -> list[_Shard]:
    """Which image goes into which tar."""
    count = len(left)
    # A sort of hashed numbers: unlike numpy's generators it is the same in every version.
    order = left[np.argsort(splitmix64(np.arange(count, dtype=np.uint64) + key(seed, "pack")), kind="stable")]
    weights = _padded(listing.sizes[order]) + 2 * _BLOCK * np.where(labels[order] < 0, 1, 2)
    if samples_per_shard:
        shard_of = np.arange(count) // samples_per_shard
    else:
        shards = -(-int(weights.sum()) // shard_bytes)
        shard_of = ((np.cumsum(weights) - weights) / weights.sum() * shards).astype(np.int64)
    starts = np.flatnonzero(np.diff(shard_of, prepend=-1))
    plan = []
    for number, (first, last) in enumerate(zip(starts, [*starts[1:], count], strict=True)):
        chosen = order[first:last]
        tar = Path(f"{prefix}-{number:06d}.tar")
        images, numbers = listing.take(chosen), labels[chosen].tolist()
        plan.append(_Shard(tar, int(first), images, numbers, wishes.longest_side, wishes.open_image))
    return plan


def _former(out: Path, options: dict[str, Any], overwrite: bool) -> list[shard_manifest.Entry] | None:
    """The shards of the same pack if they are there; makes room for a new one or for the rest of an interrupted one.

    Raises:
        UserError: `out` holds something else.
    """
    done = shard_manifest.read(out)
    unfinished = _unfinished_options(out)
    same = _agrees(done, options)
    if unfinished is None and done is not None and same and _is_whole(out, done):
        shards: list[shard_manifest.Entry] = done["shards"]
        return shards
    if unfinished == options:
        return None
    try:
        names = [name for name in os.listdir(out) if name != LOCK]
    except OSError as error:
        raise UserError(
            f"{out} cannot be read ({error.strerror})", "the shards need a folder", "name another"
        ) from None
    former = unfinished or (done if done and "input" in done and isinstance(done.get("name"), str) else None)
    if names and not former:
        remedy = "name a new folder, or empty this one"
        raise UserError(f"{out} is not empty", "a pack goes into a folder of its own", remedy)
    if names and not overwrite:
        what = f"{out} holds a damaged pack" if same else f"{out} holds a pack of other images or options"
        raise UserError(what, "it is not replaced unasked", "name another folder, or add --overwrite")
    # The lists go last: a folder whose clearing was interrupted is still known as ours.
    lists = (shard_manifest.NAME, shard_manifest.UNFINISHED)
    for name in sorted(names, key=lambda name: name in lists):
        tar = rf"\.?{re.escape(str(former and former['name']))}-\d{{6}}\.tar.*"
        if name in (*lists, _LEFT, curation.REPORT) or re.fullmatch(tar, name):
            (out / name).unlink()
    return None


def _agrees(done: dict[str, Any] | None, options: dict[str, Any]) -> bool:
    # A folder that was renamed is still the same pack; its shards keep the name they were given.
    words = (options.keys() | set(curation.OPTIONS)) - {"name"}
    return done is not None and all(done.get(word) == options.get(word) for word in words)


def _unfinished_options(out: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(read_at_most(out / shard_manifest.UNFINISHED, LONGEST_LIST))
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) and isinstance(found.get("name"), str) else None


def _is_whole(out: Path, done: dict[str, Any]) -> bool:
    try:
        return all(load_index(out / shard["name"]).digest == shard["digest"] for shard in done["shards"])
    except (UserError, KeyError, TypeError):
        return False


def _write_all(
    plan: list[_Shard], out: Path, options: dict[str, Any], workers: int, progress: Progress
) -> list[shard_manifest.Entry]:
    done, total = 0, sum(int(shard.images.sizes.sum()) for shard in plan)
    entries = []
    try:
        with closing(each(_write_shard, plan, workers)) as written:
            for shard, entry in written:
                entries.append(entry)
                done += int(shard.images.sizes.sum())
                progress(done, total)
    finally:
        for left in out.glob(".*.part"):
            left.unlink(missing_ok=True)  # from a process that was killed
    shard_manifest.write(out, entries, **options)
    (out / shard_manifest.UNFINISHED).unlink()
    (out / _LEFT).unlink(missing_ok=True)
    return entries


def _write_shard(shard: _Shard) -> shard_manifest.Entry:
    """Writes one tar and its index; takes what is there where an interrupted pack left it whole."""
    try:
        return shard_manifest.entry(load_index(shard.tar), shard.tar.name)
    except UserError:
        pass
    temporary = shard.tar.with_name(f".{shard.tar.name}.{os.getpid()}.part")
    try:
        with open(temporary, "wb") as stream:
            index = _write_tar(stream, shard)
            stream.flush()
            os.fsync(stream.fileno())
        # The index first: a tar that is seen is then never without it.
        save_index(index, index_path(shard.tar))
        os.replace(temporary, shard.tar)
        sync_folder(shard.tar.parent)
    finally:
        temporary.unlink(missing_ok=True)
    return shard_manifest.entry(index, shard.tar.name)


def _write_tar(stream: io.BufferedWriter, shard: _Shard) -> ShardIndex:
    tar, images = TarWriter(stream), shard.images
    offsets, sizes = [], []
    for row, label in enumerate(shard.labels):
        data = bytes_of(images, row)
        source, path = images.sources[int(images.source[row])], images.paths[row]
        extension = _extension(images.names[row], data, trusted=source.kind != "tar")
        if shard.longest_side is not None and shard.open_image is not None:
            smaller = shrunk(data, shard.longest_side, shard.open_image)
            if smaller is not None:
                data, extension = smaller, "jpg"
        note = {"path": path}
        if images.notes[row, 1]:
            told = parsed_note(read(source, images.names[row], int(images.notes[row, 0]), int(images.notes[row, 1])))
            note = told | note
        name = f"{shard.first + row:09d}"
        # JSON in ASCII: names of files need not be valid UTF-8.
        members = {extension: data, "json": json.dumps(note).encode("ascii")}
        if label >= 0:
            members["cls"] = b"%d" % label
        for suffix in sorted(members):
            start = tar.add(f"{name}.{suffix}", members[suffix])
            if suffix == extension:
                offsets.append(start)
                sizes.append(len(data))
    digest = tar.close()
    columns = np.array(offsets, np.uint64), np.array(sizes, np.uint32), np.array(shard.labels, np.int32)
    return ShardIndex(str(shard.tar), *columns, tar.size, digest)


def _extension(name: str, data: bytes, trusted: bool) -> str:
    """That of the name, where it is an image's; in tars, where names promise nothing, only if the content agrees."""
    named = name.rpartition(".")[2].lower()
    if named in IMAGE_EXTENSIONS and trusted:
        return named
    seen = extension_of(data[:LONGEST_START])
    return named if seen is None or {"jpeg": "jpg", "tiff": "tif"}.get(named, named) == seen else seen

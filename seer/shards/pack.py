"""Packs a folder tree into WebDataset tars: every image's bytes as they are, an index a shard, a manifest a folder.

A sample has up to three members: `000000123.jpg`, the file, its extension in lower case; `000000123.json`, its place in
the folder as {"path": ...}; with labels `000000123.cls`, the class number in decimal. Keys are running numbers because
WebDataset ends a key at the first dot of a file name, which merges photographs such as `www.a.com_1.jpg` and
`www.a.com_2.jpg`. The path travels in the shard, where it costs 1 KB a sample, because a list beside it gets lost.

The tars are written by Python's tarfile in the form of webdataset's TarWriter (a test compares the bytes): importing
webdataset imports torch, which costs every worker two to three seconds and 200 MB.
"""

from __future__ import annotations

import io
import json
import os
import re
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from seer.errors import UserError, closest
from seer.files import sync_folder, write_atomically
from seer.keyed_random import key, splitmix64
from seer.shard_index import index_path, load_index, save_index
from seer.shards import manifest
from seer.shards.index import index_tar
from seer.shards.listing import Listing, list_images
from seer.shards.processes import Progress, cores, each, silent

Labels = Literal["none", "folders"]
_UNFINISHED = ".packing.json"
_BLOCK = 512


@dataclass(frozen=True)
class Packed:
    """What `pack` did.

    Attributes:
        out: the folder of the shards.
        samples, bytes, shards: images, bytes of all tars, number of tars.
        classes: class names in the order of their numbers; empty without labels.
        left_out: reason -> how many files or folders of the input were left out.
        already_there: the very same pack was found and nothing was written.
    """

    out: Path
    samples: int
    bytes: int
    shards: int
    classes: list[str]
    left_out: dict[str, int]
    already_there: bool


@dataclass(frozen=True)
class _Shard:
    """The job of one process: one tar."""

    folder: Path
    tar: Path
    first: int
    paths: list[str]
    sizes: list[int]
    labels: list[int] | None


def pack(
    folder: Path,
    out: Path,
    *,
    labels: Labels = "none",
    shard_bytes: int = 256_000_000,
    samples_per_shard: int | None = None,
    classes: Sequence[str] | None = None,
    seed: int = 0,
    workers: int | None = None,
    overwrite: bool = False,
    progress: Progress = silent,
) -> Packed:
    """Packs the images below `folder` into tars in `out`.

    The list of files is sorted, then put into a keyed random order, so that each shard is a mixture of all folders; the
    same files, options and seed give the same tars, byte for byte, whatever the number of workers. Each tar appears
    under its name whole and with its index; a call that was interrupted goes on where it was.

    Args:
        folder: images in any depth; links are followed, each folder once.
        out: a new or empty folder, or one of a former pack (which is replaced only with `overwrite`).
        labels: "folders": the first folder below `folder` is the class, numbered in alphabetical order.
        shard_bytes: about the size of a tar; the tars of a pack are about equally large.
        samples_per_shard: images of a tar, instead of `shard_bytes`.
        classes: class names in the order of their numbers, instead of the folders found here.
        seed: of the order.
        workers: processes; None: one a core.
        progress: called with bytes done and bytes in all.

    Raises:
        UserError: no images, unreadable input, unwritable or foreign `out`, images outside class folders.
    """
    listing = list_images(folder, skip=out)
    names, numbers = _classes(listing, classes) if labels == "folders" else ([], None)
    options = {
        "name": re.sub(r"[^A-Za-z0-9_-]+", "-", Path(os.path.abspath(out)).name).strip("-") or "shard",
        "labels": labels,
        "classes": names,
        "shard_bytes": None if samples_per_shard else shard_bytes,
        "samples_per_shard": samples_per_shard,
        "seed": seed,
        "input": listing.digest,
    }
    found = _former(out, options, overwrite)
    if found is not None:
        total = sum(shard["bytes"] for shard in found)
        return Packed(out, len(listing), total, len(found), names, listing.left_out, already_there=True)
    plan = _plan(listing, f"{out}/{options['name']}", numbers, shard_bytes, samples_per_shard, seed)
    try:
        entries = _write_all(plan, out, options, workers or cores(), progress)
    except OSError as error:
        remedy = "free space or name another folder; the same command then goes on where it was"
        raise UserError(f"{out} cannot be written ({error.strerror})", "the shards need a folder", remedy) from None
    total = sum(shard["bytes"] for shard in entries)
    return Packed(out, len(listing), total, len(entries), names, listing.left_out, already_there=False)


def _classes(listing: Listing, given: Sequence[str] | None) -> tuple[list[str], NDArray[np.int64]]:
    """Class names, and the class number of each file (n,)."""
    loose = next((path for path in listing.paths if "/" not in path), None)
    if loose is not None:
        rule = "with labels every image lies in the folder of its class"
        raise UserError(f"{loose} lies in no class folder", rule, "move it into one, or pack with --labels none")
    folders = [path.split("/", 1)[0] for path in listing.paths]
    names = list(given) if given else sorted(set(folders))
    number = {name: place for place, name in enumerate(names)}
    unknown = next((name for name in folders if name not in number), None)
    if unknown is not None:
        raise UserError(f"{unknown} is no class of the given list", "its number is not known", closest(unknown, names))
    return names, np.array([number[name] for name in folders], np.int64)


def _padded(size: NDArray[np.int64]) -> NDArray[np.int64]:
    """Bytes of a tar's member: header and data in whole blocks."""
    return _BLOCK + -(-size // _BLOCK) * _BLOCK


def _plan(
    listing: Listing,
    prefix: str,
    labels: NDArray[np.int64] | None,
    shard_bytes: int,
    samples_per_shard: int | None,
    seed: int,
) -> list[_Shard]:
    """Which file goes into which tar."""
    count = len(listing)
    # A sort of hashed numbers: unlike numpy's generators it is the same in every version.
    order = np.argsort(splitmix64(np.arange(count, dtype=np.uint64) + key(seed, "pack")), kind="stable")
    sizes = listing.sizes[order]
    weights = _padded(sizes) + (2 if labels is None else 4) * _BLOCK
    if samples_per_shard:
        shard_of = np.arange(count) // samples_per_shard
    else:
        shards = -(-int(weights.sum()) // shard_bytes)
        shard_of = ((np.cumsum(weights) - weights) / weights.sum() * shards).astype(np.int64)
    starts = np.flatnonzero(np.diff(shard_of, prepend=-1))
    plan = []
    for number, (first, last) in enumerate(zip(starts, [*starts[1:], count], strict=True)):
        chosen = order[first:last]
        plan.append(
            _Shard(
                listing.folder,
                Path(f"{prefix}-{number:06d}.tar"),
                int(first),
                [listing.paths[place] for place in chosen],
                listing.sizes[chosen].tolist(),
                None if labels is None else labels[chosen].tolist(),
            )
        )
    return plan


def _former(out: Path, options: dict[str, Any], overwrite: bool) -> list[manifest.Entry] | None:
    """The shards of the same pack if they are there; makes room for a new one or for the rest of an interrupted one.

    Raises:
        UserError: `out` holds something else.
    """
    done = manifest.read(out)
    unfinished = _unfinished_options(out)
    same = _agrees(done, options)
    if unfinished is None and done is not None and same and _is_whole(out, done):
        shards: list[manifest.Entry] = done["shards"]
        return shards
    if unfinished == options:
        return None
    try:
        names = os.listdir(out)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(
            f"{out} cannot be read ({error.strerror})", "the shards need a folder", "name another"
        ) from None
    former = unfinished or (done if done and "input" in done else None)
    if names and not former:
        remedy = "name a new folder, or empty this one"
        raise UserError(f"{out} is not empty", "a pack goes into a folder of its own", remedy)
    if names and not overwrite:
        what = f"{out} holds a damaged pack" if same else f"{out} holds a pack of other images or options"
        raise UserError(what, "it is not replaced unasked", "name another folder, or add --overwrite")
    # The lists go last: a folder whose clearing was interrupted is still known as ours.
    for name in sorted(names, key=lambda name: name in (manifest.NAME, _UNFINISHED)):
        tar = rf"\.?{re.escape(str(former and former['name']))}-\d{{6}}\.tar.*"
        if name in (manifest.NAME, _UNFINISHED) or re.fullmatch(tar, name):
            (out / name).unlink()
    return None


def _agrees(done: dict[str, Any] | None, options: dict[str, Any]) -> bool:
    # A folder that was renamed is still the same pack; its shards keep the name they were given.
    return done is not None and all(done.get(word) == value for word, value in options.items() if word != "name")


def _unfinished_options(out: Path) -> Any:
    try:
        return json.loads((out / _UNFINISHED).read_bytes())
    except (OSError, ValueError):
        return None


def _is_whole(out: Path, done: dict[str, Any]) -> bool:
    try:
        return all(load_index(out / shard["name"]).digest == shard["digest"] for shard in done["shards"])
    except (UserError, KeyError, TypeError):
        return False


def _write_all(
    plan: list[_Shard], out: Path, options: dict[str, Any], workers: int, progress: Progress
) -> list[manifest.Entry]:
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / _UNFINISHED, (json.dumps(options) + "\n").encode())
    done, total = 0, sum(sum(shard.sizes) for shard in plan)
    entries = []
    for shard, entry in each(_write_shard, plan, workers):
        entries.append(entry)
        done += sum(shard.sizes)
        progress(done, total)
    for left in out.glob(".*.part"):
        left.unlink(missing_ok=True)  # from a process that was killed
    manifest.write(out, entries, **options)
    (out / _UNFINISHED).unlink()
    return entries


def _write_shard(shard: _Shard) -> manifest.Entry:
    """Writes one tar and its index; takes what is there where an interrupted pack left it whole."""
    try:
        return manifest.entry(load_index(shard.tar), shard.tar.name)
    except UserError:
        pass
    temporary = shard.tar.with_name(f".{shard.tar.name}.{os.getpid()}.part")
    try:
        with open(temporary, "wb") as stream:
            _write_tar(stream, shard)
            stream.flush()
            os.fsync(stream.fileno())
        index, _ = index_tar(temporary)
        if len(index) != len(shard.paths):
            raise RuntimeError(f"{shard.tar}: {len(shard.paths)} images were written, {len(index)} are found")
        # The index first: a tar that is seen is then never without it.
        save_index(index, index_path(shard.tar))
        os.replace(temporary, shard.tar)
        sync_folder(shard.tar.parent)
    finally:
        temporary.unlink(missing_ok=True)
    return manifest.entry(index, shard.tar.name)


def _write_tar(stream: io.BufferedWriter, shard: _Shard) -> None:
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for place, path in enumerate(shard.paths):
            extension = path.rsplit(".", 1)[1].lower()
            # JSON in ASCII: names of files need not be valid UTF-8.
            sample = {extension: _bytes(shard.folder / path, shard.sizes[place])}
            sample["json"] = json.dumps({"path": path}).encode("ascii")
            if shard.labels is not None:
                sample["cls"] = str(shard.labels[place]).encode("ascii")
            for suffix in sorted(sample):
                member = tarfile.TarInfo(f"{shard.first + place:09d}.{suffix}")
                member.size, member.mode = len(sample[suffix]), 0o444
                tar.addfile(member, io.BytesIO(sample[suffix]))


def _bytes(file: Path, size: int) -> bytes:
    try:
        data = file.read_bytes()
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror})", "it was there before", "mend or move it") from None
    if len(data) != size:
        raise UserError(f"{file} changed while it was packed", "the input must stand still", "run the command again")
    return data

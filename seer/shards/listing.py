"""The images of folders, archives and lists, in a fixed order."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from glob import has_magic
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from seer import shard_manifest
from seer.errors import UserError
from seer.shard_patterns import expand_shards
from seer.shards.archives import in_tar, in_zip
from seer.shards.index import IMAGE_EXTENSIONS
from seer.shards.inputs import Finds, Source
from seer.shards.path_lists import in_list
from seer.shards.processes import each

_ARCHIVES = {".tar": "tar", ".zip": "zip"}
_LISTS = (".csv", ".parquet")
_RULE = "pack takes folders, tars, zips, and lists (.csv, .parquet)"


@dataclass(frozen=True)
class Listing:
    """Images in the order of their paths. Columns have n entries.

    Attributes:
        sources: the folders and archives in which they lie.
        source: (n,) int64, place in `sources`.
        names: file below the source's folder, or member of the archive.
        paths: where the image came from, for people; sorted.
        sizes: (n,) int64, bytes.
        offsets: (n,) int64, for archives.
        stamps: (n,) int64, time of change in ns or, in zips, CRC-32.
        labels: class as the input tells it, a word or a number; "" for none.
        notes: (n, 2) int64, first byte and bytes of the JSON beside the image in its tar; 0 bytes for none.
        classes: names of numbered classes, where all tars agree on them.
        left_out: reason -> how many.
        digest: 32 hexadecimal characters over all paths, sizes, stamps and labels, not over the sources' own place.
    """

    sources: list[Source]
    source: NDArray[np.int64]
    names: list[str]
    paths: list[str]
    sizes: NDArray[np.int64]
    offsets: NDArray[np.int64]
    stamps: NDArray[np.int64]
    labels: list[str]
    notes: NDArray[np.int64]
    classes: list[str]
    left_out: dict[str, int]
    digest: str

    def __len__(self) -> int:
        return len(self.paths)

    def take(self, places: NDArray[np.int64]) -> Listing:
        """Some of the images in another order, with the sources that they need."""
        used, source = np.unique(self.source[places], return_inverse=True)
        chosen = places.tolist()
        return Listing(
            [self.sources[place] for place in used],
            source.astype(np.int64),
            [self.names[place] for place in chosen],
            [self.paths[place] for place in chosen],
            self.sizes[places],
            self.offsets[places],
            self.stamps[places],
            [self.labels[place] for place in chosen],
            self.notes[places],
            self.classes,
            {},
            "",
        )


class _Walk:
    """Follows links, but enters each real folder once, so that a loop of links ends."""

    def __init__(self, skip: Path) -> None:
        self._entered: set[tuple[int, int]] = set()
        self._skip = os.path.realpath(skip)

    def below(self, folder: Path) -> Finds:
        finds = Finds()
        try:
            self._enter(finds, str(folder), "")
        except OSError as error:
            what = f"{error.filename} cannot be read ({error.strerror})"
            raise UserError(what, "pack takes a folder of images", "check the path") from None
        return finds

    def _enter(self, finds: Finds, folder: str, prefix: str) -> None:
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in self._entered:
            finds.left_out["folders met a second time"] += 1
            return
        self._entered.add((status.st_dev, status.st_ino))
        folders: list[tuple[bool, str, str]] = []
        # Files are taken as they come: a list of a million entries would cost more than all that is kept of them.
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    finds.left_out["hidden"] += 1
                elif _is_folder(entry):
                    folders.append((entry.is_symlink(), entry.name, entry.path))
                else:
                    self._file(finds, entry, prefix + entry.name)
        # Real folders before links to them, so that a file keeps its own path.
        for _, name, path in sorted(folders):
            if os.path.realpath(path) != self._skip:
                self._enter(finds, path, f"{prefix}{name}/")

    def _file(self, finds: Finds, entry: os.DirEntry[str], path: str) -> None:
        stem, dot, extension = entry.name.rpartition(".")
        if not (stem and dot and extension.lower() in IMAGE_EXTENSIONS):
            finds.left_out[f"files .{extension.lower()}" if dot else "files without extension"] += 1
            return
        try:
            status = entry.stat()
        except OSError:
            finds.left_out["links to nothing"] += 1
            return
        if not entry.is_file():
            finds.left_out["pipes and devices"] += 1
        else:
            finds.add(path, status.st_size, status.st_mtime_ns)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that points to itself
        return False


def list_images(inputs: Sequence[Path], skip: Path, workers: int = 1) -> Listing:
    """All images of the inputs.

    Args:
        inputs: folders (files with the extension of an image in any depth, hidden and empty ones left out; a folder
            that holds tars and no image stands for its tars, as img2dataset leaves them), tars, patterns of tars, zips,
            lists (.csv, .parquet).
        skip: a folder that is not entered (the output, if it lies inside).
        workers: processes; tars are read in parallel.

    Raises:
        UserError: no such input, no image in all of them, something that cannot be read.
    """
    found = _all_finds(_expanded(inputs), skip, workers)
    several = len(found) > 1
    base = os.path.commonpath([source.path for source, _ in found]) if several else ""
    sources, left_out = [], Counter[str]()
    for source, finds in found:
        prefix = _prefix(source, base)
        sources.append(Source(source.kind, source.path, prefix))
        left_out += finds.left_out
    columns = [finds for _, finds in found]
    paths = [
        path if source.kind == "tar" and path != name else source.prefix + path
        for source, finds in zip(sources, columns, strict=True)
        for name, path in zip(finds.names, finds.paths, strict=True)
    ]
    if not paths:
        told = ", ".join(str(file) for file in inputs[:3]) + (" ..." if len(inputs) > 3 else "")
        seen = ", ".join(f"{count} {reason}" for reason, count in left_out.most_common(3)) or "it is empty"
        remedy = f"check the path; images end in {' '.join(IMAGE_EXTENSIONS)}"
        raise UserError(f"{told} holds no image ({seen})", "there is nothing to pack", remedy)
    return _sorted(sources, columns, paths, dict(left_out.most_common()))


def _sorted(sources: list[Source], columns: list[Finds], paths: list[str], left_out: dict[str, int]) -> Listing:
    order = sorted(range(len(paths)), key=paths.__getitem__)
    place = np.array(order, np.int64)
    names = [name for finds in columns for name in finds.names]
    labels = [label for finds in columns for label in finds.labels]
    sizes, offsets, stamps, notes, note_sizes = (
        np.concatenate([np.array(getattr(finds, word), np.int64) for finds in columns])[place]
        for word in ("sizes", "offsets", "stamps", "notes", "note_sizes")
    )
    source = np.repeat(np.arange(len(columns)), [len(finds.names) for finds in columns])[place]
    paths, names, labels = ([column[at] for at in order] for column in (paths, names, labels))
    digest = hashlib.blake2b(digest_size=16)
    for path, size, stamp, label in zip(paths, sizes.tolist(), stamps.tolist(), labels, strict=True):
        told = f"{path}\0{size}\0{stamp}\0{label}\n" if label else f"{path}\0{size}\0{stamp}\n"
        digest.update(told.encode("utf-8", "surrogateescape"))
    classes = columns[0].classes if all(finds.classes == columns[0].classes for finds in columns) else []
    return Listing(
        *(sources, source.astype(np.int64), names, paths, sizes, offsets, stamps, labels),
        *(np.stack([notes, note_sizes], 1), classes, left_out, digest.hexdigest()),
    )


def _expanded(inputs: Sequence[Path]) -> list[Path]:
    """Absolute paths, patterns of tars replaced by what they mean, nothing twice."""
    expanded: list[Path] = []
    for file in inputs:
        text = str(file)
        scheme, colon, _ = text.partition(":/")  # as a path it has lost a slash
        if colon and scheme.isalnum() and not os.path.exists(text):
            raise UserError(f"{scheme}:// is no folder", "packing reads files", "copy them here, or mount them")
        if os.path.exists(text) or not (has_magic(text) or "{" in text):
            expanded.append(Path(os.path.abspath(text)))
        else:
            expanded += map(Path, expand_shards([text]))
    return list(dict.fromkeys(expanded))


def _all_finds(inputs: list[Path], skip: Path, workers: int) -> list[tuple[Source, Finds]]:
    walk = _Walk(skip)
    found: dict[Path, tuple[Source, Finds]] = {}
    tars: list[Path] = []
    for file in inputs:
        kind = file.suffix.lower()
        if file.is_dir():
            finds = walk.below(file)
            inside = [] if finds.names else sorted(file.glob("*.tar"))
            if inside:
                tars += inside
            else:
                found[file] = (Source("folder", str(file)), finds)
        elif not file.exists():
            raise UserError(f"{file} cannot be read (No such file or directory)", _RULE, "check the path")
        elif kind == ".tar":
            tars.append(file)
        elif kind == ".zip":
            found[file] = (Source("zip", str(file)), in_zip(file))
        elif kind in _LISTS:
            found[file] = (Source("folder", str(file.parent)), in_list(file))
        else:
            raise UserError(f"{file} is a file", _RULE, "name one of these")
    shard_manifest.refuse_unfinished(tars)
    for tar, finds in each(in_tar, list(dict.fromkeys(tars)), workers):
        found[tar] = (Source("tar", str(tar)), finds)
    return [found[file] for file in sorted(found)]


def _prefix(source: Source, base: str) -> str:
    """Several sources are told apart by their place below the folder that they share."""
    if not base:
        return "" if source.kind == "folder" else os.path.basename(source.path) + "/"
    relative = os.path.relpath(source.path, base)
    return "" if relative == "." else relative + "/"

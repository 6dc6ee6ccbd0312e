"""The images of a folder tree, in a fixed order."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from seer.errors import UserError
from seer.shards.index import IMAGE_EXTENSIONS

_LARGEST = 2**32 - 1


@dataclass(frozen=True)
class Listing:
    """Image files below a folder.

    Attributes:
        folder: absolute.
        paths: n paths relative to it, with `/`, sorted.
        sizes: (n,) int64, bytes.
        left_out: reason -> how many.
        digest: 32 hexadecimal characters over all paths, sizes and times of change, not over the folder's own place.
    """

    folder: Path
    paths: list[str]
    sizes: NDArray[np.int64]
    left_out: dict[str, int]
    digest: str

    def __len__(self) -> int:
        return len(self.paths)


class _Walk:
    """Follows links, but enters each real folder once, so that a loop of links ends."""

    def __init__(self, skip: Path) -> None:
        self.files: list[tuple[str, int, int]] = []
        self.left_out: Counter[str] = Counter()
        self._entered: set[tuple[int, int]] = set()
        self._skip = os.path.realpath(skip)

    def enter(self, folder: str, prefix: str) -> None:
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in self._entered:
            self.left_out["folders met a second time"] += 1
            return
        self._entered.add((status.st_dev, status.st_ino))
        # Real folders before links to them, so that a file keeps its own path.
        entries = sorted(os.scandir(folder), key=lambda entry: (entry.is_symlink(), entry.name))
        for entry in entries:
            if entry.name.startswith("."):
                self.left_out["hidden"] += 1
            elif _is_folder(entry):
                if os.path.realpath(entry.path) != self._skip:
                    self.enter(entry.path, f"{prefix}{entry.name}/")
            else:
                self._file(entry, prefix + entry.name)

    def _file(self, entry: os.DirEntry[str], path: str) -> None:
        stem, dot, extension = path.rpartition("/")[2].rpartition(".")
        if not (stem and dot and extension.lower() in IMAGE_EXTENSIONS):
            self.left_out[f"files .{extension.lower()}" if dot else "files without extension"] += 1
            return
        try:
            status = entry.stat()
        except OSError:
            self.left_out["links to nothing"] += 1
            return
        if not entry.is_file():
            self.left_out["pipes and devices"] += 1
        elif status.st_size == 0:
            self.left_out["empty files"] += 1
        elif status.st_size > _LARGEST:
            self.left_out["files of 4 GiB or more"] += 1
        else:
            self.files.append((path, status.st_size, status.st_mtime_ns))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that points to itself
        return False


def list_images(folder: Path, skip: Path) -> Listing:
    """All files below `folder` that have the extension of an image, in any case.

    Hidden files and folders are left out, and so are empty files; what is left out is counted.

    Args:
        folder: where to look.
        skip: a folder that is not entered (the output, if it lies inside).

    Raises:
        UserError: no such folder, no image in it, a folder that cannot be read.
    """
    root = os.path.abspath(folder)
    walk = _Walk(skip)
    try:
        walk.enter(root, "")
    except NotADirectoryError:
        raise UserError(f"{folder} is a file", "pack takes a folder of images", "name the folder") from None
    except OSError as error:
        what = f"{error.filename} cannot be read ({error.strerror})"
        raise UserError(what, "pack takes a folder of images", "check the path") from None
    if not walk.files:
        seen = ", ".join(f"{count} {reason}" for reason, count in walk.left_out.most_common(3)) or "it is empty"
        remedy = f"check the path; images end in {' '.join(IMAGE_EXTENSIONS)}"
        raise UserError(f"{folder} holds no image ({seen})", "there is nothing to pack", remedy)
    walk.files.sort()
    digest = hashlib.blake2b(digest_size=16)
    for path, size, changed in walk.files:
        digest.update(f"{path}\0{size}\0{changed}\n".encode("utf-8", "surrogateescape"))
    paths, sizes, _ = zip(*walk.files, strict=True)
    return Listing(
        Path(root), list(paths), np.array(sizes, np.int64), dict(walk.left_out.most_common()), digest.hexdigest()
    )

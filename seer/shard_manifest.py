"""manifest.json: the list of a folder's shards, so that a run need not open every index before it starts."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypedDict

from seer import remote
from seer.errors import UserError
from seer.files import LONGEST_LIST, read_at_most, write_atomically
from seer.shard_index import DIGEST, ShardIndex

NAME = "manifest.json"
UNFINISHED = ".packing.json"  # the options of a pack that has not ended, in its folder
FORMAT = "seer-shards-1"
_TOO_MANY = 1 << 40  # samples of one tar: a slip of whoever edited the list


# Of a tar in the folder itself. No name on disk has a surrogate other than those that stand for single bytes.
_FILE_NAME = re.compile(r"(?!\.{1,2}$)[^/\0\ud800-\udc7f\udd00-\udfff]{1,255}", re.DOTALL)


class Entry(TypedDict):
    """One shard: file name, images, bytes of the tar, blake2b of the tar (32 hexadecimal characters)."""

    name: str
    samples: int
    bytes: int
    digest: str


def entry(index: ShardIndex, name: str) -> Entry:
    """The manifest's line of an indexed shard."""
    return {"name": name, "samples": len(index), "bytes": index.tar_size, "digest": index.digest}


def write(folder: Path, shards: Sequence[Entry], **more: Any) -> None:
    """Writes FOLDER/manifest.json atomically, shards sorted by name; the same input gives the same bytes."""
    ordered = sorted(shards, key=lambda shard: shard["name"])
    content = {"format": FORMAT, "samples": sum(shard["samples"] for shard in shards), **more, "shards": ordered}
    write_atomically(folder / NAME, (json.dumps(content, indent=1) + "\n").encode())


def folder_of(location: str) -> str:
    """The folder of a tar, path or address, as `read` takes it."""
    return remote.beside(location, "") if remote.is_remote(location) else os.path.dirname(location)


def unfinished(tars: Iterable[str | Path]) -> list[str]:
    """The folders here, of those of the tars, whose pack has not ended: nobody can tell how many shards are missing."""
    folders = {folder_of(os.fspath(tar)) for tar in tars if not remote.is_remote(os.fspath(tar))}
    return sorted(folder for folder in folders if os.path.exists(os.path.join(folder, UNFINISHED)))


def refuse_unfinished(tars: Iterable[str | Path]) -> None:
    """Refuses tars of a folder whose pack has not ended.

    Raises:
        UserError: it names the folder.
    """
    for folder in unfinished(tars):
        raise UserError(
            f"{folder} holds a pack that has not ended",
            "shards are read when all of them are there",
            "give the same seer shards pack command again, which goes on where it was "
            f"(to use just these shards, remove {UNFINISHED} there)",
        )


def read(folder: str | Path) -> dict[str, Any] | None:
    """FOLDER/manifest.json, or None where there is none, or where somebody else has written or edited it.

    Raises:
        UserError: an address that cannot be reached.
    """
    folder = os.fspath(folder)
    try:
        if remote.is_remote(folder):
            content = json.loads(remote.read_bytes(remote.beside(folder, NAME), most=LONGEST_LIST))
        else:
            content = json.loads(read_at_most(os.path.join(folder, NAME), LONGEST_LIST))
    except remote.Refused as error:
        # Buckets say so of what is missing to those who may not list; the indexes will tell if all is refused.
        if error.status in (401, 403, 404):
            return None
        raise
    except UserError:
        raise
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) and content.get("format") == FORMAT and _is_sound(content) else None


def _is_sound(content: dict[str, Any]) -> bool:
    shards, classes = content.get("shards"), content.get("classes", [])
    return (
        isinstance(shards, list)
        and all(map(_is_entry, shards))
        and isinstance(classes, list)
        and all(isinstance(name, str) for name in classes)
    )


def _is_entry(shard: Any) -> bool:
    try:
        name, samples, size, digest = (shard[word] for word in ("name", "samples", "bytes", "digest"))
        return (
            type(samples) is int
            and 0 <= samples < _TOO_MANY
            and type(size) is int
            and 0 <= size < 2**63
            and DIGEST.fullmatch(digest) is not None
            and _FILE_NAME.fullmatch(name) is not None
        )
    except (KeyError, TypeError):
        return False


def class_names(folder: str | Path) -> list[str]:
    """The class names of a folder of shards that was packed with labels: the label is the place in the list.

    Raises:
        UserError: there is no manifest with classes.
    """
    content = read(folder)
    names = content.get("classes") if content else None
    if not names:
        remedy = "name a folder that was written by: seer shards pack --labels folders"
        raise UserError(f"{os.fspath(folder)} tells no class names", f"they stand in its {NAME}", remedy)
    found: list[str] = names
    return found


def class_name(classes: Sequence[str], label: int) -> str:
    """The name of a class, its number where no name is known, nothing for no class (-1)."""
    return "" if label < 0 else str(classes[label]) if label < len(classes) else str(label)

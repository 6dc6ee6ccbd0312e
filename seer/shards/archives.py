"""The images of tars and zips, without unpacking them."""

from __future__ import annotations

import json
import os
import zipfile
from itertools import groupby
from pathlib import Path
from typing import Any

from seer import shard_manifest
from seer.errors import UserError
from seer.shards.formats import LONGEST_START, extension_of
from seer.shards.index import IMAGE_EXTENSIONS
from seer.shards.inputs import ZIP_METHODS, Finds
from seer.shards.tar import Member, members

_NO_IMAGES = ("cls", "json", "txt", "npy", "npz", "pth", "pkl")  # their first bytes need not be looked at
_LONGEST_LABEL = 20
_LONGEST_NOTE = 1 << 20
_ENCRYPTED = 1
# Images hardly shrink in a zip; deflate can make a gigabyte of zeros a megabyte.
_BOMB_BYTES, _BOMB_RATIO = 1 << 26, 100


def in_tar(tar: Path) -> Finds:
    """Images of a WebDataset tar or of any other: told by their first bytes, whatever they are called.

    Members with one key (the name up to its first dot) are one sample. A sample has one image, the first whose suffix
    is plain (`jpg`, not `mask.jpg`); where none is plain and nothing else belongs to the key, the names merely have
    dots in them, and every image counts. The label is that of `.cls`, or `label` or `cls` of `.json`.

    Raises:
        DamagedTar, UserError: see `seer.shards.tar.members`.
    """
    finds = Finds(classes=(shard_manifest.read(tar.parent) or {}).get("classes") or [])
    stamp = 0
    file = -1
    try:
        for _, group in groupby(members(tar), key=lambda member: _split(member.name)[0]):
            if file < 0:
                file = os.open(tar, os.O_RDONLY | os.O_CLOEXEC)
                stamp = os.fstat(file).st_mtime_ns
            _sample(finds, file, stamp, list(group))
    except OSError as error:
        raise UserError(f"{tar} cannot be read ({error.strerror})", "it was there before", "check the disk") from None
    finally:
        if file >= 0:
            os.close(file)
    return finds


def _split(name: str) -> tuple[str, str]:
    """Key and suffix as WebDataset has it: folders and the file's name up to its first dot, and the rest."""
    folder, slash, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    return f"{folder}{slash}{stem}", suffix.lower()


def _sample(finds: Finds, file: int, stamp: int, sample: list[Member]) -> None:
    images: list[tuple[str, Member]] = []
    others: dict[str, Member] = {}
    for member in sample:
        base, suffix = member.name.rpartition("/")[2], _split(member.name)[1]
        if base.startswith("."):
            finds.left_out["hidden"] += 1
        elif suffix in _NO_IMAGES:
            others[suffix] = member
        elif member.size and extension_of(os.pread(file, LONGEST_START, member.offset)):
            images.append((suffix, member))
        elif suffix.rpartition(".")[2] in IMAGE_EXTENSIONS:
            finds.left_out["members named as images that are none" if member.size else "empty files"] += 1
        else:
            finds.left_out[f"files .{suffix.rpartition('.')[2]}" if suffix else "files without extension"] += 1
    plain = [member for suffix, member in images if "." not in suffix]
    chosen = plain[:1] or [member for _, member in images[: 1 if others else None]]
    if len(chosen) < len(images):
        finds.left_out["further images of a sample"] += len(images) - len(chosen)
    note = _note(file, others.get("json"))
    label = _class_number(file, others["cls"]) if "cls" in others else _label_of(note)
    if label is None:
        finds.left_out["labels that are no class number"] += 1
    for member in chosen:
        path = note.get("path") if isinstance(note.get("path"), str) else None
        place = others["json"] if note else None
        finds.add(
            member.name,
            member.size,
            stamp,
            path=path or "",
            offset=member.offset,
            label=label or "",
            note=(place.offset, place.size) if place else (0, 0),
        )


def _class_number(file: int, member: Member) -> str | None:
    text = os.pread(file, min(member.size, _LONGEST_LABEL), member.offset).strip()
    return text.decode() if text.isdigit() and member.size <= _LONGEST_LABEL else None


def parsed_note(data: bytes) -> dict[str, Any]:
    """What a sample's JSON says; nothing where it is not an object."""
    try:
        note = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return note if isinstance(note, dict) else {}


def _note(file: int, member: Member | None) -> dict[str, Any]:
    if member is None or member.size > _LONGEST_NOTE:
        return {}
    return parsed_note(os.pread(file, member.size, member.offset))


def _label_of(note: dict[str, Any]) -> str:
    label = note.get("label", note.get("cls"))
    return str(label) if isinstance(label, int | str) and not isinstance(label, bool) and label != -1 else ""


def in_zip(path: Path) -> Finds:
    """Members of a zip that have the extension of an image, as in a folder.

    Raises:
        UserError: no zip, or it cannot be read.
    """
    finds = Finds()
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError) as error:
        raise UserError(f"{path} is no zip ({error})", "it cannot be read", "copy it again, or unpack it") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})", "pack takes zips", "check the path") from None
    for entry in entries:
        parts = entry.filename.split("/")
        stem, dot, extension = parts[-1].rpartition(".")
        if entry.is_dir():
            continue
        if any(part.startswith(".") for part in parts) or parts[0] == "__MACOSX":
            finds.left_out["hidden"] += 1
        elif not (stem and dot and extension.lower() in IMAGE_EXTENSIONS):
            finds.left_out[f"files .{extension.lower()}" if dot else "files without extension"] += 1
        elif entry.flag_bits & _ENCRYPTED:
            finds.left_out["encrypted"] += 1
        elif entry.compress_type not in ZIP_METHODS:
            finds.left_out["compressed by a method other than deflate"] += 1
        elif entry.file_size > max(_BOMB_BYTES, _BOMB_RATIO * entry.compress_size):
            finds.left_out["larger than an image in a zip can be (a zip bomb?)"] += 1
        else:
            finds.add(entry.filename, entry.file_size, entry.CRC, offset=entry.header_offset)
    return finds

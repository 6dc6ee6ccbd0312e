"""Images as users bring them (folder, tar, zip, list), and what a pack made of them."""

from __future__ import annotations

import csv
import json
import tarfile
import zipfile
from pathlib import Path

from plain_tars import write_tar

JPEG, PNG = b"\xff\xd8\xff jpeg ", b"\x89PNG\r\n\x1a\n png "
FILES = {
    f"{kind}/{number}.{extension}": start + f"{kind} {number}".encode() * (number + 1)
    for kind in ("cat", "dog", "eel")
    for number, (extension, start) in enumerate([("jpg", JPEG), ("png", PNG), ("jpeg", JPEG)] * 4)
}


def folder(place: Path, files: dict[str, bytes] = FILES) -> Path:
    for name, content in files.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(content)
    return place


def tar(place: Path, files: dict[str, bytes]) -> Path:
    return write_tar(place, *files.items())


def zipped(place: Path, files: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(place, "w", method) as archive:
        archive.mkdir("empty")
        for name, content in files.items():
            archive.writestr(name, content)
    return place


def listed(place: Path, rows: list[dict[str, str]]) -> Path:
    place.parent.mkdir(parents=True, exist_ok=True)
    with open(place, "w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return place


def packed_samples(out: Path) -> list[tuple[str, bytes, int, str]]:
    """(path, image, label or -1, extension) of every sample, in order."""
    found = []
    for path in sorted(out.glob("*.tar")):
        with tarfile.open(path) as archive:
            parts: dict[str, dict[str, bytes]] = {}
            for member in archive:
                key, suffix = member.name.split(".", 1)
                content = archive.extractfile(member)
                assert content is not None
                parts.setdefault(key, {})[suffix] = content.read()
        for sample in parts.values():
            note, label = json.loads(sample.pop("json")), int(sample.pop("cls", b"-1"))
            ((extension, image),) = sample.items()
            found.append((note["path"], image, label, extension))
    return found


def tars_of(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.glob("*.tar*"))}

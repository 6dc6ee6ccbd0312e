"""The list of a checkpoint's files with size and SHA-256 of each, and its own: it says if a checkpoint is whole."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from seer.errors import UserError
from seer.files import sync_file

FORMAT = 2
MANIFEST = "manifest.json"


class Damaged(Exception):
    """What is wrong with a checkpoint."""


def sealed(file: Path) -> dict[str, Any]:
    """Size in bytes and SHA-256 of a file, which is on the disk afterwards."""
    with ThreadPoolExecutor(1) as pool:
        on_disk = pool.submit(sync_file, file)  # the disk writes while the processor hashes
        seal = {"bytes": file.stat().st_size, "sha256": _sha256(file)}
        on_disk.result()
    return seal


def manifest_bytes(body: Mapping[str, Any]) -> bytes:
    """The manifest: its body and the SHA-256 of it. The same body gives the same bytes."""
    digest = hashlib.sha256(json.dumps(body, sort_keys=True, allow_nan=False).encode()).hexdigest()
    return (json.dumps({"sha256": digest, **body}, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


def read_manifest(folder: Path, step: int) -> dict[str, Any]:
    """The manifest's body, every byte of it as it was written; the files that it names are not looked at.

    Raises:
        Damaged: it is not.
        UserError: it is of another format.
    """
    try:
        raw = (folder / MANIFEST).read_bytes()
        manifest = json.loads(raw)
    except FileNotFoundError:
        raise Damaged(f"{MANIFEST} is missing") from None
    except OSError as error:
        raise Damaged(f"{MANIFEST} cannot be read, {error.strerror}") from None
    except ValueError:
        raise Damaged(f"{MANIFEST} is not JSON") from None
    body = {key: value for key, value in manifest.items() if key != "sha256"} if isinstance(manifest, dict) else {}
    # Written again it must give the same bytes: this sees what the digest of the values does not, such as white space.
    if raw != manifest_bytes(body):
        raise Damaged(f"{MANIFEST} was changed")
    if body.get("format") != FORMAT:
        raise UserError(
            f"{folder} has format {body.get('format')}",
            f"this seer reads format {FORMAT}",
            "go on with the version of seer that wrote it",
        )
    if body["step"] != step:
        raise Damaged(f"{MANIFEST} is of step {body['step']}")
    return body


def fault_of_files(folder: Path, seals: Mapping[str, Mapping[str, Any]], names: Iterable[str]) -> str | None:
    """What is wrong with the first of these files that is not as it was sealed; None if all are whole."""
    for name in names:
        file, seal = folder / name, seals[name]
        try:
            size = file.stat().st_size
            if size != seal["bytes"]:
                return f"{name} has {size} bytes instead of {seal['bytes']}"
            if _sha256(file) != seal["sha256"]:
                return f"{name} has another SHA-256 than when it was written"
        except OSError as error:
            return f"{name} cannot be read, {error.strerror}"
    return None


def _sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()

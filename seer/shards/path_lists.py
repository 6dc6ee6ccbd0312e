"""Lists of images: CSV or Parquet with a column `path` and, if one likes, a column `label`."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator
from pathlib import Path

from seer.errors import UserError, closest
from seer.shards.formats import LONGEST_START, extension_of
from seer.shards.index import IMAGE_EXTENSIONS
from seer.shards.inputs import Finds


def in_list(file: Path) -> Finds:
    """The images that a list names; relative paths are seen from the list's folder.

    What has no image's extension is told by its first bytes. A path that is listed twice counts once.

    Raises:
        UserError: no such file, no column `path`, no pyarrow for a Parquet.
    """
    finds = Finds()
    folder = os.path.dirname(os.path.abspath(file))
    seen: set[str] = set()
    rows = _parquet(file) if file.suffix.lower() == ".parquet" else _csv(file)
    for path, label in rows:
        if not path:
            finds.left_out["rows without path"] += 1
        elif path in seen:
            finds.left_out["paths listed twice"] += 1
        else:
            seen.add(path)
            _take(finds, folder, path, label)
    return finds


def _take(finds: Finds, folder: str, path: str, label: str) -> None:
    whole = os.path.join(folder, os.path.expanduser(path))
    try:
        status = os.stat(whole)
    except (OSError, ValueError):
        finds.left_out["listed but not there"] += 1
        return
    if not os.path.isfile(whole):
        finds.left_out["folders, pipes and devices"] += 1
    elif status.st_size and path.rpartition(".")[2].lower() not in IMAGE_EXTENSIONS and not _is_image(whole):
        finds.left_out["listed but no image"] += 1
    else:
        finds.add(os.path.expanduser(path), status.st_size, status.st_mtime_ns, path=path, label=label)


def _is_image(path: str) -> bool:
    try:
        with open(path, "rb") as stream:
            return extension_of(stream.read(LONGEST_START)) is not None
    except OSError:
        return False


def _csv(file: Path) -> Iterator[tuple[str, str]]:
    try:
        # utf-8-sig: spreadsheets put a mark before the first column's name.
        with open(file, encoding="utf-8-sig", errors="surrogateescape", newline="") as stream:
            reader = csv.DictReader(stream)
            _require_path(file, list(reader.fieldnames or []))
            for row in reader:
                yield (row["path"] or "").strip(), (row.get("label") or "").strip()
    except csv.Error as error:
        raise UserError(f"{file} is no CSV ({error})", "a list has a header and a column path", "mend it") from None
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror})", "pack takes lists", "check the path") from None


def _parquet(file: Path) -> Iterator[tuple[str, str]]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        remedy = "pip install 'seer[parquet]', or write the list as CSV"
        raise UserError(f"{file} needs pyarrow", "Parquet is read by it, and it is not installed", remedy) from None
    try:
        with ParquetFile(file) as table:
            columns = table.schema_arrow.names
            _require_path(file, columns)
            wanted = [name for name in ("path", "label") if name in columns]
            for batch in table.iter_batches(columns=wanted):
                for row in batch.to_pylist():
                    label = row.get("label")
                    yield str(row["path"] or ""), "" if label is None else str(label)
    except ArrowException as error:
        raise UserError(f"{file} is no Parquet ({error})", "a list has a column path", "mend it") from None
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror})", "pack takes lists", "check the path") from None


def _require_path(file: Path, columns: list[str]) -> None:
    if "path" not in columns:
        told = ", ".join(columns) or "none"
        rule = f"a list of images has a column path (its columns: {told})"
        if {"url", "key", "status"} <= set(columns) or any(file.absolute().parent.glob("*.tar")):
            remedy = f"this is img2dataset's list: pack its folder, {file.parent}"
        else:
            near = closest("path", columns)
            remedy = near if near.startswith("did you mean") else "name the column of the files path"
        raise UserError(f"{file} has no column path", rule, remedy)

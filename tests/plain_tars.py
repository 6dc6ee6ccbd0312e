"""Tars as Python's tarfile writes them."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path


def write_tar(path: Path, *members: tuple[str, bytes], form: int = tarfile.PAX_FORMAT, **fields: object) -> Path:
    """A tar of names and contents; `fields` are set in each header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            for field, value in fields.items():
                setattr(member, field, value)
            tar.addfile(member, io.BytesIO(content))
    return path


def write_names(
    path: Path, *names: str, form: int = tarfile.PAX_FORMAT, size: int = 100, growth: int = 300, **fields: object
) -> Path:
    """A tar of so many bytes behind each name, of another value and by `growth` more than behind the one before."""
    contents = (bytes([place % 251 + 1]) * (size + growth * place) for place in range(len(names)))
    return write_tar(path, *zip(names, contents, strict=True), form=form, **fields)

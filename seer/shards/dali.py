"""DALI's text index of a tar, `NAME.idx`: written, and read as the choice of samples that it is.

The form is the one of DALI's tools/wds2idx.py and dali/operators/reader/loader/webdataset_loader.cc (read in
github.com/NVIDIA/DALI): a first line `v1.2 SAMPLES`, then a line a sample with `EXTENSION OFFSET SIZE NAME` of each
member, all separated by blanks; v1.1 has no NAME. DALI reads the samples that the file lists and no others, which
is how people leave some out without touching the tar.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from seer.errors import UserError
from seer.files import write_unless_other
from seer.shards.processes import Progress, each, silent
from seer.shards.tar import Member, members

_FIRST_LINE = re.compile(rb"v1\.([12])[ \t]+(\d{1,18})\s*")
_BLANK = re.compile(r"[ \t\n\r\x0b\x0c]")
_RULE = "DALI's index is text whose fields are separated by blanks"


def idx_path(tar: Path, idx_dir: Path | None = None) -> Path:
    """Where DALI's index of NAME.tar is: NAME.idx beside it, or in `idx_dir`."""
    return (tar.parent if idx_dir is None else idx_dir) / f"{tar.name.removesuffix('.tar')}.idx"


def _samples(tar: Path) -> Iterator[list[tuple[str, Member]]]:
    """Samples as wds2idx groups them, each as (extension, member).

    A name without a dot is one of its own there: its key lacks the last character (Python's slice up to -1).
    """

    def keyed() -> Iterator[tuple[str, str, Member]]:
        for member in members(tar):
            dot = member.name.find(".", member.name.rfind("/") + 1)
            key, extension = member.name[:dot], member.name[dot + 1 :]
            if key and not key.endswith("/"):  # else a hidden file
                yield key, extension, member

    for _, group in groupby(keyed(), key=lambda item: item[0]):
        yield [(extension, member) for _, extension, member in group]


def idx_bytes(tar: Path) -> tuple[bytes, int]:
    """The index that wds2idx would write for a tar, and its number of samples.

    Raises:
        DamagedTar, UserError: see `seer.shards.tar.members`; a name with a blank or without an extension behind its
            dot, a tar without samples.
    """
    lines = []
    for sample in _samples(tar):
        for extension, member in sample:
            if _BLANK.search(member.name) or not extension:
                remedy = "pack the tar anew (seer shards pack), which gives plain names"
                raise UserError(f"{member.name!r} in {tar} cannot be listed", _RULE, remedy)
        lines.append(
            " ".join(f"{extension} {member.offset} {member.size} {member.name}" for extension, member in sample)
        )
    if not lines:
        raise UserError(f"{tar} has no samples", "DALI refuses an index without any", "leave the tar out")
    text = "".join(f"{line}\n" for line in [f"v1.2 {len(lines)}", *lines])
    return text.encode("utf-8", "surrogateescape"), len(lines)


def _export(job: tuple[Path, Path, bool]) -> int:
    tar, file, overwrite = job
    content, samples = idx_bytes(tar)
    write_unless_other(file, content, overwrite)
    return samples


def export(
    tars: Sequence[Path],
    idx_dir: Path | None = None,
    *,
    overwrite: bool = False,
    workers: int = 1,
    progress: Progress = silent,
) -> int:
    """Writes NAME.idx of each tar, beside it or in `idx_dir`; only headers are read.

    Returns:
        Samples in all tars, those without an image included.

    Raises:
        UserError: see `idx_bytes` and `seer.files.write_unless_other`; two tars whose indexes would have one name.
    """
    places: dict[Path, Path] = {}
    for tar in tars:
        other = places.setdefault(idx_path(tar, idx_dir), tar)
        if other != tar:
            rule = "a folder holds one index a name"
            raise UserError(f"{other} and {tar} have one name", rule, "give each folder of tars its own --dali DIR")
    sizes = {tar: tar.stat().st_size for tar in tars}
    samples, done = 0, 0
    for (tar, _, _), count in each(_export, [(tar, file, overwrite) for file, tar in places.items()], workers):
        samples += count
        done += sizes[tar]
        progress(done, sum(sizes.values()))
    return samples


def _listed(file: Path) -> Iterator[tuple[int, int, int, bytes]]:
    """(line, offset, size, name) of each component; the name is empty in v1.1."""
    try:
        lines = file.read_bytes().split(b"\n")
    except OSError as error:
        remedy = "make it: seer shards export 'TARS/*.tar' --dali"
        raise UserError(f"{file} cannot be read ({error.strerror})", "it is DALI's index of a tar", remedy) from None
    remedy = "make it anew: seer shards export 'TARS/*.tar' --dali --overwrite"
    first = _FIRST_LINE.fullmatch(lines[0])
    if not first:
        raise UserError(
            f"{file} is no index of DALI", "its first line is v1.1 or v1.2 and the number of samples", remedy
        )
    fields, told = 2 + int(first[1]), int(first[2])
    while len(lines) > 1 and not lines[-1].strip():
        lines.pop()
    if told != len(lines) - 1 or not told:
        raise UserError(f"{file} tells {told} samples and has {len(lines) - 1} lines", "a sample is a line", remedy)
    for number, line in enumerate(lines[1:], 2):
        words = line.split()
        numbers = words[1::fields] + words[2::fields]
        if not words or len(words) % fields or not all(word.isdigit() and len(word) < 20 for word in numbers):
            rule = "a member is EXTENSION OFFSET SIZE" + (" NAME" if fields == 4 else "")
            raise UserError(f"{file} is damaged in line {number}", rule, remedy)
        names = words[3::4] if fields == 4 else [b""] * (len(words) // 3)
        for offset, size, name in zip(words[1::fields], words[2::fields], names, strict=True):
            yield number, int(offset), int(size), name


def _choice(job: tuple[Path, Path]) -> NDArray[np.uint64]:
    tar, file = job
    inside = {member.offset: member for member in members(tar)}
    chosen: set[int] = set()
    for line, offset, size, name in _listed(file):
        member = inside.get(offset)
        # GNU tar, on which wds2idx relies, writes unusual characters of a name as backslash and number.
        known = not name or b"\\" in name or (member and name == member.name.encode("utf-8", "surrogateescape"))
        if member is None or member.size != size or not known or offset in chosen:
            told = f"{file} lists {size} bytes at {offset} in line {line}" + (f" as {name!r}"[:200] if name else "")
            rule = "it stands there twice" if offset in chosen else f"{tar} has no such member"
            raise UserError(told, rule, "make it anew: seer shards export 'TARS/*.tar' --dali --overwrite")
        chosen.add(offset)
    return np.array(sorted(chosen), np.uint64)


def choices(
    tars: Sequence[Path], idx_dir: Path | None = None, *, workers: int = 1
) -> Mapping[Path, NDArray[np.uint64]]:
    """Of each tar, the offsets of the members that its DALI index lists; every one is a member of the tar.

    Raises:
        DamagedTar, UserError: see `seer.shards.tar.members`; an index that is missing, damaged, or of another tar.
    """
    jobs = [(tar, idx_path(tar, idx_dir)) for tar in tars]
    return {tar: offsets for (tar, _), offsets in each(_choice, jobs, workers)}

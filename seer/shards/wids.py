"""Lists of shards as wids keeps them: made of tars, and compared with the tars that a list names."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from seer.errors import UserError
from seer.files import write_unless_other
from seer.shards.processes import Progress, each, silent
from seer.shards.tar import BLOCK, Member, members
from seer.wids_json import Listed, list_bytes, read_list

_CHUNK = 1 << 22


def count_samples(tar: Path) -> int:
    """Samples of a tar as wids counts them: neighbours with one key, those without an image and hidden ones included.

    wids 0.1.11 (wids_mmtar.py, `group_by_key` in wids.py) looks at the first 100 bytes of a name alone, and a name that
    comes twice shifts all that follows. Such a tar is refused: wids would return other files than those that it names.

    Raises:
        DamagedTar, UserError: see `seer.shards.tar.members`; a member that wids reads wrongly.
    """
    samples, last, names = 0, None, set[str]()
    try:
        file = os.open(tar, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise UserError(f"{tar} cannot be read ({error.strerror})", "a shard is a tar file", "check the path") from None
    try:
        for member in members(tar):
            if member.name in names or not _is_plain(os.pread(file, BLOCK, member.offset - BLOCK), member):
                why = "comes twice" if member.name in names else "has a name or size beyond the plain header"
                rule = "wids would read other files in its place"
                remedy = "pack the tar anew: seer shards pack"
                raise UserError(f"{member.name!r} in {tar} {why}", rule, remedy)
            names.add(member.name)
            dot = member.name.rfind(".")
            if dot < 0:
                continue
            # The first dot behind the last slash that has a dot behind it.
            key = member.name[: member.name.find(".", member.name.rfind("/", 0, dot) + 1)]
            samples += key != last
            last = key
    finally:
        os.close(file)
    return samples


def _is_plain(header: bytes, member: Member) -> bool:
    name, size = header[:100].rstrip(b"\0"), header[124:135].strip(b" \0")
    return (
        name == member.name.encode("utf-8", "surrogateescape")
        and b"\n" not in name
        and not any(0xDC80 <= ord(character) <= 0xDCFF for character in member.name)
        and header[156:157] in (b"0", b"\0")
        and size.isdigit()
        and int(size, 8) == member.size
    )


def _seen(job: tuple[str, bool]) -> Listed:
    tar, hashed = job
    samples = count_samples(Path(tar))
    if not hashed:
        return Listed(tar, samples)
    digest, size = hashlib.md5(usedforsecurity=False), 0
    with open(tar, "rb", buffering=0) as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return Listed(tar, samples, size, digest.hexdigest())


def export(
    tars: Sequence[Path], file: Path, *, overwrite: bool = False, workers: int = 1, progress: Progress = silent
) -> list[Listed]:
    """Writes the list of some tars, as `wids.ShardListDataset` reads it; every byte is read for the MD5.

    Returns:
        The shards as they were listed.

    Raises:
        UserError: see `count_samples`, `seer.wids_json.list_bytes`, `seer.files.write_unless_other`.
    """
    list_bytes(file, [Listed(str(tar), 0) for tar in tars])  # a name that cannot be listed is told before the reading
    sizes = {str(tar): os.stat(tar).st_size for tar in tars}
    found, done = list[Listed](), 0
    for (tar, _), seen in each(_seen, [(tar, True) for tar in sizes], workers):
        found.append(seen)
        done += sizes[tar]
        progress(done, sum(sizes.values()))
    found.sort(key=lambda shard: (os.path.basename(shard.tar), shard.tar))
    write_unless_other(file, list_bytes(file, found), overwrite)
    return found


def check(lists: Sequence[str], *, workers: int = 1, progress: Progress = silent) -> None:
    """Compares lists with the tars that they name: samples, and bytes and MD5 where they are told; writes nothing.

    Args:
        lists: paths of wids JSON files.
        workers: processes.
        progress: called with bytes done and bytes in all.

    Raises:
        UserError: see `seer.wids_json.read_list`; the first shard that is not as listed.
    """
    told = {shard.tar: (shard, file) for file in lists for shard in read_list(file)}
    sizes = {tar: os.stat(tar).st_size for tar in told}
    for tar, (shard, file) in told.items():
        if shard.size is not None and sizes[tar] != shard.size:
            raise _differs(tar, f"{sizes[tar]} bytes", f"{shard.size}", file)
    done, wrong = 0, list[UserError]()
    for (tar, _), seen in each(_seen, [(tar, shard.md5 is not None) for tar, (shard, _) in told.items()], workers):
        shard, file = told[tar]
        if seen.samples != shard.samples:
            wrong.append(_differs(tar, f"{seen.samples} samples", f"{shard.samples}", file))
        elif seen.md5 != shard.md5:
            wrong.append(_differs(tar, f"the MD5 {seen.md5}", f"{shard.md5}", file))
        done += sizes[tar]
        progress(done, sum(sizes.values()))
    if wrong:
        raise min(wrong, key=str)


def _differs(tar: str, has: str, listed: str, file: str) -> UserError:
    rule = "the tar was cut or changed, or the list is of other shards"
    return UserError(f"{tar} has {has}, {file} lists {listed}", rule, "bring both from one place")

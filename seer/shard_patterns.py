"""Which tars a pattern means: paths and addresses, braces, wildcards."""

from __future__ import annotations

import functools
import glob
import os
import re
import sys
from collections.abc import Iterator, Sequence

from seer import remote, shard_manifest
from seer.errors import UserError
from seer.rank_environment import first_of_machine
from seer.wids_json import is_list, read_list

_MAX_NAMES = 1_000_000  # a typing error such as {0..999999999} must not eat the memory
_MAX_BRACES = 100


def _braces(pattern: str) -> Iterator[str]:
    """All names that {000..127} and {a,b} stand for; other braces stay as they are."""
    for group in re.finditer(r"\{([^{}]*)\}", pattern):
        body = group.group(1)
        span = re.fullmatch(r"([0-9]{1,18})\.\.([0-9]{1,18})", body)
        if span:
            first, last = int(span.group(1)), int(span.group(2))
            # As in bash: leading zeros anywhere set the width of all.
            padded = any(len(end) > 1 and end.startswith("0") for end in span.groups())
            width = max(map(len, span.groups())) if padded else 1
            words: Iterator[str] = (f"{number:0{width}d}" for number in range(first, last + 1))
        elif "," in body:
            words = iter(body.split(","))
        else:
            continue
        for word in words:
            yield from _braces(pattern[: group.start()] + word + pattern[group.end() :])
        return
    yield pattern


def _names(pattern: str) -> Iterator[str]:
    """`_braces`, refused beyond `_MAX_NAMES`."""
    too_many = UserError(f"{pattern} names over {_MAX_NAMES} shards", "braces stand for a list", "use '*' instead")
    if pattern.count("{") > _MAX_BRACES:
        raise too_many
    for number, name in enumerate(_braces(pattern)):
        if number >= _MAX_NAMES:
            raise too_many
        yield name


def _literal_folder(pattern: str) -> tuple[str, str]:
    """Splits a pattern into the folders that exist under that very name ('photos [2024]') and the rest."""
    parts = pattern.split("/")
    taken = 0
    while taken < len(parts) - 1 and os.path.isdir("/".join(parts[: taken + 1]) or "/"):
        taken += 1
    return "".join(part + "/" for part in parts[:taken]), "/".join(parts[taken:])


def _matches(pattern: str) -> list[str]:
    if not os.path.isfile(pattern):
        remote.refuse_other_schemes(pattern)
    if remote.is_remote(pattern):
        return _addresses(pattern)
    if is_list(pattern):
        return [shard.tar for shard in read_list(pattern)]
    if os.path.isfile(pattern):
        return [pattern]
    whole = os.path.expanduser(pattern)
    if os.path.isfile(whole):
        return [whole]
    if os.path.isdir(whole):
        remedy = f"write '{pattern.rstrip('/')}/*.tar'"
        raise UserError(f"{pattern} is a folder", "shards are named by a pattern", remedy)
    folder, rest = _literal_folder(whole)
    found: list[str] = []
    missing: list[str] = []
    others: list[str] = []
    for name in _names(rest):
        if os.path.isfile(folder + name):
            found.append(folder + name)
        elif glob.has_magic(name):
            files = [file for file in glob.glob(glob.escape(folder) + name, recursive=True) if os.path.isfile(file)]
            found += [file for file in files if file.endswith(".tar")]
            others += [file for file in files if not file.endswith(".tar")]
        else:
            missing.append(folder + name)
    if missing and found:
        raise UserError(
            f"{pattern} names {len(missing)} shards that do not exist, first {missing[0]}",
            "braces name every shard",
            "bring the missing ones, or take what is there with '*.tar'",
        )
    if not found:
        rule = f"{others[0]} does not end in .tar" if others else f"there is no such file (seen from {os.getcwd()})"
        raise UserError(f"no shard matches {pattern}", rule, "check the path; shards are made by: seer shards pack")
    return found


def _addresses(pattern: str) -> list[str]:
    """What a remote pattern means. Whether a shard that is named is there is told by its index."""
    address, query = remote.without_query(pattern)
    if address.endswith("/"):
        what = f"{pattern} is a folder"
        raise UserError(what, "shards are named by a pattern", f"write '{address}*.tar'")
    found: list[str] = []
    for name in _names(address):
        if glob.has_magic(name):
            found += [match for match in remote.found(name) if match.endswith(".tar")]
        else:
            found.append(name + query)
    if not found:
        rule = "there is no such file in the bucket"
        raise UserError(f"no shard matches {pattern}", rule, "check the address")
    return found


@functools.cache  # once a process
def _tell(folders: str) -> None:
    if first_of_machine():
        print(f"seer: {folders}: a pack that has not ended; its shards can join later", file=sys.stderr, flush=True)


def expand_shards(patterns: Sequence[str], *, growing: bool = False) -> list[str]:
    """The tars that some patterns mean, as absolute paths or addresses without repetition, sorted by file name, then by
    path.

    A pattern is a path that exists (taken as it is, whatever characters it has), or one with braces ({000..127}, {a,b}:
    all of them must exist), with * ? [...] or ** (only names that end in .tar), or a mixture; ~ is the home folder. A
    file that ends in .json lists tars (`seer.wids_json`).
    Addresses are patterns too; * of http(s):// cannot be listed.

    Args:
        growing: shards of a pack that has not ended are left out, which is told, unless there are no others.

    Raises:
        UserError: a pattern that matches nothing, a folder, a scheme that is not read, a bucket that cannot be listed,
            shards of a pack that has not ended.
    """
    matches = [match for pattern in patterns for match in _matches(str(pattern))]
    found = {match if remote.is_remote(match) else os.path.abspath(match) for match in matches}
    if not found:
        raise UserError("no shards are named", "at least one pattern is needed", "write for example 'SHARDS/*.tar'")
    if growing:
        to_come = set(shard_manifest.unfinished(found))
        ready = {location for location in found if shard_manifest.folder_of(location) not in to_come}
        if ready and to_come:
            _tell(", ".join(sorted(to_come)))
            found = ready
    shard_manifest.refuse_unfinished(found)
    # By file name first, so that moving a folder does not change the order.
    return sorted(found, key=lambda path: (remote.file_name(path), path))

"""The JSON file in which wids lists the shards of a data set: which tars, and how many samples each of them has.

Its form is `{"wids_version": 1, "shardlist": [{"url": ..., "nsamples": ..., "md5sum": ..., "filesize": ...}, ...]}` and
more that is passed over (read in wids 0.1.11, wids_specs.py and wids_index.py). wids runs a url that is a command
(`pipe:`) and fetches one that is remote. Here a url is the path of a tar below the folder of the file: whoever takes
over a list of others gets no command run, nothing fetched, and no index written outside of that folder.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from seer.errors import UserError
from seer.files import LONGEST_LIST, read_at_most

_SHOWN = 200  # characters of a foreign text in a message
# wids takes a url apart: what stands behind ; ? # is lost, a colon ends a scheme, and blanks at the ends are cut.
_LOST_IN_URLS = re.compile(r"[;?#:\\\x00-\x1f\x7f\ud800-\udfff]|^ | $")


class Listed(NamedTuple):
    """A shard as a list tells it.

    Attributes:
        tar: absolute path.
        samples: samples as wids counts them, those without an image included.
        size: bytes of the tar, or None where the list does not tell.
        md5: of the tar, 32 hexadecimal characters in lower case, or None likewise.
    """

    tar: str
    samples: int
    size: int | None = None
    md5: str | None = None


def is_list(pattern: str) -> bool:
    """Whether a pattern of shards is the path of a list: a file that ends in .json."""
    return pattern.endswith(".json") and os.path.isfile(os.path.expanduser(pattern))


def read_list(pattern: str) -> list[Listed]:
    """The shards of a list in its order; ~ is the home folder.

    Raises:
        UserError: a file of another form, a url that leads out of its folder, a tar that is missing or named twice.
    """
    file = os.path.abspath(os.path.expanduser(pattern))
    remedy = "make it anew: seer shards export 'TARS/*.tar' --wids FILE.json"
    try:
        content = json.loads(read_at_most(file, LONGEST_LIST))
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror})", "it lists shards", "check the path") from None
    except (ValueError, RecursionError):
        raise UserError(f"{file} is no JSON", "a list of shards is wids JSON, a shard is a tar", remedy) from None
    version = content.get("wids_version") if isinstance(content, dict) else None
    shards = content.get("shardlist") if isinstance(content, dict) else None
    if type(version) is not int or version != 1 or not isinstance(shards, list):
        raise UserError(f"{file} is no list of shards", 'wids JSON has "wids_version": 1 and a "shardlist"', remedy)
    if content.get("datasets"):
        raise UserError(
            f"{file} names further data sets", "one list of shards is read", "name the list of each of them"
        )
    if not shards:
        raise UserError(f"{file} lists no shard", "at least one is needed", remedy)
    found = [_listed(file, number, entry) for number, entry in enumerate(shards)]
    seen: set[str] = set()
    for shard in found:
        if shard.tar in seen:
            raise UserError(f"{file} lists {_shown(shard.tar)} twice", "a shard is listed once", remedy)
        seen.add(shard.tar)
        if not os.path.isfile(shard.tar):
            rule = f"{file} lists it"
            raise UserError(f"{_shown(shard.tar)} is missing", rule, "bring the tar, or take it from the list")
    return found


def _shown(text: object) -> str:
    whole = repr(text)
    return whole if len(whole) <= _SHOWN else whole[:_SHOWN] + "..."


def _listed(file: str, number: int, entry: Any) -> Listed:
    what = f"shardlist[{number}] in {file}"
    if not isinstance(entry, dict):
        raise UserError(f"{what} is {_shown(entry)}", "a shard is an object with url and nsamples", "mend the list")
    url, md5 = entry.get("url"), entry.get("md5sum")
    if not isinstance(url, str) or not url:
        raise UserError(f"{what} has the url {_shown(url)}", "it is the path of a tar", "mend the list")
    scheme = re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", url)
    if scheme or url.startswith("/") or ".." in url.split("/"):
        rule = "only tars below the folder of the list are taken, and no command is run"
        remedy = "bring the tars there and write their paths as seen from the list"
        raise UserError(f"{what} has the url {_shown(url)}", rule, remedy)
    samples: Any = entry.get("nsamples")
    size: Any = entry.get("filesize")
    for word, value in (("nsamples", samples), ("filesize", 0 if size is None else size)):
        if type(value) is not int or not 0 <= value < 2**63:
            raise UserError(f"{what} has {word} {_shown(value)}", "it is a whole number from 0", "mend the list")
    if md5 is not None and not (isinstance(md5, str) and re.fullmatch(r"[0-9A-Fa-f]{32}", md5)):
        raise UserError(f"{what} has md5sum {_shown(md5)}", "it is 32 hexadecimal characters", "mend the list")
    tar = os.path.normpath(os.path.join(os.path.dirname(file), url))
    return Listed(tar, samples, size, md5.lower() if md5 else None)


def list_bytes(file: Path, shards: Sequence[Listed]) -> bytes:
    """What a list at `file` says of these shards: paths seen from its folder, absolute for tars that lie elsewhere.

    Raises:
        UserError: a path that wids would take for something else than a path.
    """
    folder = os.path.dirname(os.path.abspath(file))
    entries = []
    for shard in shards:
        url = os.path.relpath(shard.tar, folder) if below(shard.tar, folder) else shard.tar
        if _LOST_IN_URLS.search(url):
            rule = "wids reads it as a URL, in which ; ? # : \\ and control characters are not part of a path"
            raise UserError(f"{_shown(shard.tar)} cannot be listed", rule, "rename it")
        entries.append({"url": url, "md5sum": shard.md5, "nsamples": shard.samples, "filesize": shard.size})
    content = {"wids_version": 1, "name": Path(file).stem, "shardlist": entries}
    return (json.dumps(content, indent=1) + "\n").encode()


def below(tar: str, folder: str) -> bool:
    """Whether a tar lies in a folder or deeper (absolute paths)."""
    return os.path.commonpath([tar, folder]) == folder

"""What this machine offers to runs that read shards from buckets and web servers: a part of `seer doctor`.

Without the network, and without the values of what holds credentials.
"""

from __future__ import annotations

import fcntl
import netrc
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

from seer.launching.machine import Finding
from seer.remote import BY_DEFAULT

_CLIENTS = ("fsspec", "aiohttp", "s3fs", "gcsfs")  # of the extra
_INSTALL = "pip install 'seer[remote]'"
_SETTINGS = ("AWS_", "GOOGLE_", "FSSPEC_")
_OTHER_SETTINGS = ("STORAGE_EMULATOR_HOST", "NO_GCE_CHECK", "NETRC")
_NETWORK_DISKS = (
    *("nfs", "nfs4", "cifs", "smb3", "smbfs", "lustre", "gpfs", "beegfs", "ceph", "glusterfs", "afs", "panfs"),
    *("fuse.glusterfs", "fuse.sshfs", "fuse.ceph", "fuse.juicefs", "fuse.s3fs", "fuse.gcsfuse"),
)
_ANOTHER = "name a folder on a local disk: data.cache_dir=DIR"


class Cache(NamedTuple):
    """The folder of remote shards.

    Attributes:
        folder: where it is by default.
        exists: whether it is there already.
        shards: number of files in it.
        held: their bytes.
        limit: bytes that it may hold.
        free: bytes free on its disk.
        disk: the kind of its file system; empty: unknown.
        fault: why no file in it can be written and locked; None: it can.
    """

    folder: Path
    exists: bool
    shards: int
    held: int
    limit: int
    free: int
    disk: str
    fault: str | None


def look() -> list[Finding]:
    """Clients with credentials, and the cache where somebody may use it."""
    installed = _versions()
    found = [clients(installed, _set(os.environ, Path.home()), _faults(os.environ, Path.home()))]
    folder = BY_DEFAULT.cache_folder
    if len(installed) == len(_CLIENTS) or folder.is_dir():
        found.append(cache(_cache(folder, BY_DEFAULT.cache_bytes)))
    return found


# ---- one function a subject: from facts to a finding ----


def clients(installed: Mapping[str, str], names: Sequence[str], faults: Sequence[tuple[str, str]]) -> Finding:
    """Packages of the extra with their versions, names of what is set, what is wrong with it and the remedy."""
    missing = [name for name in _CLIENTS if name not in installed]
    if missing:
        what = "no clients for s3://, gs:// and https://" if "s3fs" in missing and "gcsfs" in missing else ""
        return Finding("buckets", "ok", what or f"clients without {', '.join(missing)}", _INSTALL)
    words = ", ".join(f"{name} {installed[name]}" for name in _CLIENTS if name != "aiohttp")
    words += f"; set: {', '.join(names)}" if names else ""
    if faults:
        what, remedy = faults[0]
        return Finding("buckets", "warning", f"{words}; {what}", remedy)
    return Finding("buckets", "ok", words)


def cache(found: Cache) -> Finding:
    """The shard cache."""
    limit = f"{found.limit / 1e9:g} GB (data.cache_gb)"
    holds = f"{found.shards:,} shard{'s' * (found.shards != 1)}, {found.held / 1e9:.1f} GB of at most"
    words = f"{found.folder}: {holds if found.shards else 'empty, at most'} {limit}, {found.free / 1e9:.1f} GB free"
    if found.fault is not None:
        remedy = f"{_ANOTHER}, or data.cache_gb=0"
        return Finding("shard cache", "warning", f"{found.folder} cannot be locked ({found.fault})", remedy)
    if found.disk in _NETWORK_DISKS:
        return Finding("shard cache", "warning", f"{words}, on a network file system ({found.disk})", _ANOTHER)
    room = found.free + found.held
    if found.exists and room < found.limit:
        remedy = f"data.cache_gb={int(room / 1e9)}, or {_ANOTHER}"
        return Finding("shard cache", "warning", f"{words}: less than it may hold", remedy)
    return Finding("shard cache", "ok", words)


# ---- facts ----


def _versions() -> dict[str, str]:
    found = {}
    for name in _CLIENTS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _set(environ: Mapping[str, str], home: Path) -> list[str]:
    """Names of variables and files that may hold credentials; never what they hold."""
    names = sorted(name for name in environ if name.startswith(_SETTINGS) or name in _OTHER_SETTINGS)
    files = (".netrc", ".aws/credentials", ".aws/config", ".config/gcloud/application_default_credentials.json")
    return names + [f"~/{file}" for file in files if (home / file).is_file()]


def _faults(environ: Mapping[str, str], home: Path) -> list[tuple[str, str]]:
    """What is wrong with it, and the remedy."""
    found = []
    for one, other in (("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"), ("AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID")):
        if environ.get(one) and not environ.get(other):
            found.append((f"{one} without {other}", f"set {other} too"))
    name = "GOOGLE_APPLICATION_CREDENTIALS"
    if environ.get(name) and not os.access(environ[name], os.R_OK):
        found.append((f"{name} names a file that cannot be read", "give the path of the key file"))
    file = environ.get("NETRC") or home / ".netrc"
    try:
        netrc.netrc(file)
    except FileNotFoundError:
        if "NETRC" in environ:
            found.append(("NETRC names a file that is not there", "give its path"))
    except (OSError, UnicodeDecodeError, netrc.NetrcParseError):
        found.append(("the netrc file cannot be read, so it is not used", "mend its syntax, and chmod 600"))
    return found


def _cache(folder: Path, limit: int) -> Cache:
    there = next(one for one in (folder, *folder.parents) if one.is_dir())
    sizes = []
    for file in (*folder.glob("*.shard"), *folder.glob("*.part-*")):
        try:
            sizes.append(file.stat().st_size)
        except FileNotFoundError:  # evicted just now
            continue
    fault = None
    try:
        with tempfile.TemporaryFile(dir=there) as file_there:
            fcntl.flock(file_there, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        fault = error.strerror or str(error)
    free = shutil.disk_usage(there).free
    return Cache(folder, there == folder, len(sizes), sum(sizes), limit, free, _kind_of_disk(there), fault)


def _kind_of_disk(folder: Path, mounts: Path = Path("/proc/mounts")) -> str:
    """The file system that a folder is on, as Linux calls it."""
    try:
        lines = [line.split() for line in mounts.read_text().splitlines()]
    except OSError:
        return ""
    places = {Path(line[1].replace("\\040", " ")): line[2] for line in lines}  # of two on one place the upper one
    real = folder.resolve()
    return next((places[one] for one in (real, *real.parents) if one in places), "")

"""The lock of a run: one living process may write into its folder.

No flock, whose meaning differs between network file systems: a file that comes into being whole (a hard link of a
written one) and says who holds it. It is stale when the same machine has booted since or the process is gone, which is
decided by the process's start time, since numbers of processes are used again; or when a job of a cluster holds it and
is this job, started again.
"""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

from seer.errors import UserError
from seer.files import cannot_write, write_atomically


class RunLock:
    """A lock that this process holds; made by ``RunLock.take``."""

    def __init__(self, file: Path, content: bytes) -> None:
        self._file = file
        self._content = content

    @classmethod
    def take(cls, file: Path, *, take_over: bool = False) -> RunLock:
        """Take the lock; one whose holder is gone is taken over.

        Args:
            file: the lock.
            take_over: take it from a process on another machine too, of which nobody here can tell whether it is gone.

        Raises:
            UserError: a living process, or one on another machine that cannot be seen from here, holds it; or the
                folder cannot be written.
        """
        content = _naming(os.getpid())
        try:
            while not _create(file, content):
                held = _read(file)
                if held is None:
                    continue  # given back a moment ago
                if _alive(held) and not (take_over and not _is_here(held)):
                    raise _in_use(file, held)
                _remove(file, held)
        except OSError as error:
            raise cannot_write(file.parent, error) from None
        return cls(file, content)

    def still_held(self) -> bool:
        """Whether nobody has taken the lock over."""
        return _read(self._file) == self._content

    def pass_to(self, pid: int) -> None:
        """Let a process of this machine hold the lock from now on; when that is gone, it is free."""
        write_atomically(self._file, _naming(pid))

    def release(self) -> None:
        """Give the lock back, unless somebody has taken it over."""
        _remove(self._file, self._content)


def _naming(pid: int) -> bytes:
    """What stands in a lock that a process of this machine holds."""
    holder = {
        "host": socket.gethostname(),
        "boot": _boot(),
        "pid": pid,
        "started": _started(pid),
        "token": os.urandom(8).hex(),  # tells two locks of one process apart
    }
    return (json.dumps(holder | _job()) + "\n").encode()


def _job() -> dict[str, Any]:
    """The cluster's job that this process belongs to, and in which of its lives."""
    if os.environ.get("SEER_LAUNCHER") != "slurm" or "SLURM_JOB_ID" not in os.environ:
        return {}
    return {"job": os.environ["SLURM_JOB_ID"], "restart": int(os.environ.get("SLURM_RESTART_COUNT", 0))}


def _boot() -> str | None:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None


def _started(pid: int) -> int | None:
    """When a process began, in clock ticks since boot; None where it is gone (or there is no /proc)."""
    try:
        # The second field is the program's name in parentheses and may hold anything, further ones do not.
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return None
    return None if fields[0] in (b"Z", b"X") else int(fields[19])


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _alive(content: bytes) -> bool:
    """Whether the holder may still write: unknown counts as alive, a file that nobody can read as gone."""
    try:
        held = json.loads(content)
        host, boot, pid, started = held["host"], held["boot"], int(held["pid"]), held["started"]
    except (ValueError, TypeError, KeyError):
        return False
    own = _job()
    if own and held.get("job") == own["job"] and held.get("restart", 0) < own["restart"]:
        return False  # the cluster ends a job before it starts it again
    if host != socket.gethostname():
        return True
    if boot != _boot():
        return False
    return _exists(pid) if started is None else _started(pid) == started


def _is_here(content: bytes) -> bool:
    return bool(json.loads(content)["host"] == socket.gethostname())


def in_use(file: Path, *, take_over: bool = False) -> UserError | None:
    """What `RunLock.take` would refuse; None where it would take the lock."""
    held = _read(file)
    if held is None or not _alive(held) or (take_over and not _is_here(held)):
        return None
    return _in_use(file, held)


def host_of_holder(file: Path) -> str | None:
    """The machine of the process that holds a lock and may be alive; None where there is none."""
    held = _read(file)
    return str(json.loads(held)["host"]) if held is not None and _alive(held) else None


def _in_use(file: Path, content: bytes) -> UserError:
    held = json.loads(content)
    here = _is_here(content)
    return UserError(
        f"{file.parent} is in use by process {held['pid']} on {held['host']}",
        "one process at a time writes into a run",
        "wait for it, stop it, or name another run_dir" if here else "if that process is gone, add --take-over",
    )


def _create(file: Path, content: bytes) -> bool:
    """Whether the lock came into being here: all of its content at once, or not at all."""
    draft = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        draft.write_bytes(content)
        try:
            os.link(draft, file)
        except FileExistsError:
            raise
        except OSError:  # a file system without hard links; its lock is empty for a moment
            with open(file, "xb") as stream:
                stream.write(content)
    except FileExistsError:
        return False
    finally:
        draft.unlink(missing_ok=True)
    return True


def _read(file: Path) -> bytes | None:
    try:
        return file.read_bytes()
    except FileNotFoundError:
        return None


def _remove(file: Path, content: bytes) -> None:
    """Remove the lock if it is still the one with this content."""
    if _read(file) != content:
        return
    aside = file.with_name(f".{file.name}.{os.getpid()}.gone")
    try:
        os.rename(file, aside)
    except FileNotFoundError:
        return
    taken = _read(aside)
    if taken is not None and taken != content:  # somebody took it over between the look and the rename: put theirs back
        _create(file, taken)
    aside.unlink(missing_ok=True)

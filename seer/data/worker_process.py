"""A data worker as the main process sees it: started, given tasks, listened to, ended (free of torch)."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from seer.data.assembly import BatchAssembler
from seer.data.ring import At, Ring
from seer.data.worker import serve_forked

_GONE_SECONDS = 5.0  # a killed process is gone by then, unless the kernel itself is stuck in a read


@dataclass(frozen=True)
class Task:
    """Rows of a batch. Where they are one row under suspicion: of which sample, and how many workers died of it."""

    batch_index: int
    rows: range
    suspect: tuple[int, int] | None = None
    deaths: int = 0

    @property
    def message(self) -> list[Any]:
        """As `Worker.send` takes it."""
        return ["fill", self.batch_index, self.rows.start, self.rows.stop]

    def alone(self, at: At) -> Task:
        """Only the row that a worker died at, under suspicion."""
        suspect = (at.shard, at.sample)
        deaths = 1 + (self.deaths if self.suspect == suspect else 0)
        return Task(self.batch_index, range(at.row, at.row + 1), suspect, deaths)

    def without(self, row: int) -> list[Task]:
        """The other rows, at most two ranges."""
        parts = (range(self.rows.start, row), range(row + 1, self.rows.stop))
        return [Task(self.batch_index, part) for part in parts if part]


@dataclass(eq=False)
class Worker:
    """A worker as the main process sees it.

    Attributes:
        tasks: what it has not answered; it works on the first.
        rows: of its tasks.
    """

    number: int
    process: _Forked | subprocess.Popen[bytes]
    socket: socket.socket
    tasks: deque[Task] = field(default_factory=deque)
    rows: int = 0
    _received: bytes = b""
    _beat: int = -1
    _since: float = 0.0

    def take(self, task: Task) -> None:
        """Puts a task behind the others; sending it is for the caller, who sends several at once."""
        if not self.tasks:
            self._beat = -1  # it was idle: its time begins when it is looked at next
        self.tasks.append(task)
        self.rows += len(task.rows)

    def finish(self) -> Task:
        """Removes the first task, which was answered."""
        task = self.tasks.popleft()
        self.rows -= len(task.rows)
        return task

    def send(self, messages: Sequence[list[Any]]) -> None:
        """Writes messages without waiting."""
        # So few that they always fit the socket's buffer. A dead worker is found when it is listened to.
        with contextlib.suppress(OSError):
            self.socket.sendall(b"".join(json.dumps(message).encode() + b"\n" for message in messages))

    def receive(self) -> list[tuple[str, Any]] | None:
        """Answers in the order of the tasks; None: it is dead."""
        try:
            data = self.socket.recv(1 << 16, socket.MSG_DONTWAIT)  # never waits for the rest: it may be stopped
        except BlockingIOError:
            return []
        except OSError:
            return None
        if not data:
            return None
        *lines, self._received = (self._received + data).split(b"\n")
        return [tuple(json.loads(line)) for line in lines]

    def stands_still(self, at: At) -> float:
        """Seconds for which calls of this saw it at one place."""
        now = time.monotonic()
        if not self.tasks or at.beat != self._beat:
            self._beat, self._since = at.beat, now
        return now - self._since

    def end(self) -> int | None:
        """Kills it; its exit code, None if even SIGKILL does not end it now (it will write nothing any more)."""
        self.process.kill()
        self.socket.close()
        try:
            return self.process.wait(_GONE_SECONDS)
        except subprocess.TimeoutExpired:
            return None


def forked_worker(number: int, assembler: BatchAssembler, ring: Ring, inherited: Sequence[socket.socket]) -> Worker:
    """A worker at once, with all that this process has loaded; only where nothing is in use that a fork would break.

    Args:
        inherited: this process's ends of the other workers' sockets, which the worker closes.
    """
    ours, its = socket.socketpair()
    with its:
        work = partial(serve_forked, [ours, *inherited], its, assembler, ring, number, os.getpid())
        return Worker(number, _Forked(work), ours)


def write_briefing(file: int, assembler: BatchAssembler, ring: Ring) -> None:
    """What `fresh_worker` hands over, into an empty file."""
    with open(file, "wb", closefd=False) as out:
        pickle.dump((assembler, ring.slots, ring.workers), out)


def fresh_worker(number: int, ring: Ring, briefing: int) -> Worker:
    """A worker in a process started anew (``python -c``).

    That takes no server process, imports neither torch nor the user's script, and does not make a training under way
    copy its memory page by page, as it would beside a fork of it.
    """
    ours, its = socket.socketpair()
    with its:
        files = (its.fileno(), ring.file, briefing)
        arguments = ", ".join(map(str, (*files, number, os.getpid())))
        code = f"import sys; sys.path[:] = {sys.path!r}; from seer.data import worker; worker.serve_anew({arguments})"
        # Its own process group: Ctrl-C in the terminal must not reach it before it has learnt to ignore it.
        process = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.DEVNULL, pass_fds=files, process_group=0
        )
    return Worker(number, process, ours)


def cause_of_death(code: int | None) -> str:
    """In a few words, from an exit code as `Worker.end` gives it."""
    if code is None:
        return "cannot be ended"
    if code >= 0:
        return f"left with exit code {code}"
    try:
        return f"by {signal.Signals(-code).name}" + ": out of memory?" * (code == -signal.SIGKILL)
    except ValueError:
        return f"by signal {-code}"


class _Forked:
    """A forked process, with as much of Popen's face as is needed.

    Not multiprocessing's: its processes may not have children where they are daemons, and are waited for at exit.
    """

    def __init__(self, work: Callable[[], None]) -> None:
        self._code: int | None = None
        with warnings.catch_warnings():
            # From Python 3.12 a fork beside any library's threads is warned of. Python's own were looked at.
            warnings.filterwarnings("ignore", message=".*fork.*", category=DeprecationWarning)
            self.pid = os.fork()
        if self.pid == 0:
            try:
                work()
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)

    def kill(self) -> None:
        if self._code is None:
            with contextlib.suppress(ProcessLookupError):  # somebody else has waited for it
                os.kill(self.pid, signal.SIGKILL)

    def wait(self, timeout: float) -> int:
        end, pause = time.monotonic() + timeout, 0.0005
        while self._code is None:
            try:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
            except ChildProcessError:  # somebody else has
                pid, status = self.pid, 0
            if pid:
                self._code = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > end:
                raise subprocess.TimeoutExpired("worker", timeout)
            else:
                time.sleep(pause := min(2 * pause, 0.05))
        return self._code

"""What runs in a data worker: tasks from the pool, rows of batches into the ring (free of torch)."""

from __future__ import annotations

import contextlib
import ctypes
import json
import mmap
import os
import pickle
import signal
import socket
import sys
import traceback
from collections import deque
from collections.abc import Sequence
from dataclasses import astuple
from functools import partial
from typing import Any

from seer.data.assembly import BatchAssembler
from seer.data.ring import Ring
from seer.errors import UserError

_PR_SET_PDEATHSIG = 1


def serve_anew(task_file: int, ring_file: int, briefing: int, number: int, parent: int) -> None:
    """A worker that was started anew, with the files that it was handed."""
    leave_signals_to_the_parent(parent)
    its = socket.socket(fileno=task_file)
    try:
        with mmap.mmap(briefing, 0, prot=mmap.PROT_READ) as written:
            assembler, slots, workers = pickle.loads(written)
        ring = Ring(assembler, slots, workers, ring_file)
    except Exception:
        its.sendall(_line("bug", traceback.format_exc()))
        return
    _serve(its, assembler, ring, number)


def serve_forked(
    inherited: Sequence[socket.socket],
    its: socket.socket,
    assembler: BatchAssembler,
    ring: Ring,
    number: int,
    parent: int,
) -> None:
    """A worker that was forked; `inherited` are its parent's ends of all workers' sockets."""
    leave_signals_to_the_parent(parent)
    for other in inherited:  # else the others would not see the end of a parent that dies
        other.close()
    _serve(its, assembler, ring, number)


def _serve(its: socket.socket, assembler: BatchAssembler, ring: Ring, number: int) -> None:
    assembler.prepare_worker()
    assembler.announce = partial(ring.announce, number)
    mail = _Mail(its)
    while (message := mail.next()) is not None:
        word, *what = message
        if word == "quarantine":
            assembler.quarantine.update((shard, sample) for shard, sample in what[0])
            continue
        batch_index, start, stop = what
        slot = ring.slot(batch_index)
        try:
            assembler.expect(batch_index, range(start, stop))
            for later, *task in mail.waiting():
                if later == "fill":
                    assembler.expect(task[0], range(*task[1:]))
            bad = assembler.fill(batch_index, range(start, stop), slot.crops, slot.photometric)
            answer = _line("bad", [astuple(sample) for sample in bad])
        except UserError as error:
            answer = _line("user_error", [error.what, error.rule, error.remedy])
        except Exception:
            answer = _line("bug", traceback.format_exc())
        ring.announce(number, -1, -1, -1)  # what kills it between two tasks is nobody's fault
        its.sendall(answer)


class _Mail:
    """Messages from the pool: the next one, and what has come behind it."""

    def __init__(self, its: socket.socket) -> None:
        self._its, self._rest, self._messages = its, b"", deque[list[Any]]()

    def next(self) -> list[Any] | None:
        """Waits for it; None: the pool is gone."""
        while not self._messages:
            if not self._receive(0):
                return None
        return self._messages.popleft()

    def waiting(self) -> list[list[Any]]:
        with contextlib.suppress(BlockingIOError):
            self._receive(socket.MSG_DONTWAIT)
        return list(self._messages)

    def _receive(self, flags: int) -> bool:
        data = self._its.recv(1 << 16, flags)
        *lines, self._rest = (self._rest + data).split(b"\n")
        self._messages.extend(map(json.loads, lines))
        return bool(data)


def leave_signals_to_the_parent(parent: int) -> None:
    """For a process that lives as long as its parent and no longer: it ignores what the parent is told by signals."""
    # The run's own handlers and the terminal's Ctrl-C are for the main process, which ends the workers when it is done.
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(name, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before
            os._exit(1)


def _line(kind: str, what: Any) -> bytes:
    return json.dumps([kind, what]).encode() + b"\n"

"""Runs a function on N gloo ranks that stay up for the whole test run.

    def scaled(x):                      # at the top level of the test's file
        return dist.get_rank() * x

    ranks(2).run(scaled, 3) == [0, 3]

Starting processes that import torch takes seconds, a call to ones that wait takes milliseconds. One process imports
torch and forks the ranks; each has a pipe of its own (a shared queue may give one rank two jobs), one thread, and dies
with its parent. A rank that raises leaves the pool usable if the others answer; where one does not answer in time, all
are ended and the next call starts new ones.
"""

from __future__ import annotations

import atexit
import ctypes
import importlib.util
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import ModuleType
from typing import Any

_POOLS: dict[int, RankPool] = {}
_GRACE_SECONDS = 3.0  # after a rank failed, the others probably wait for it in a collective


def ranks(n: int) -> RankPool:
    """The pool of n ranks of this test run."""
    if n not in _POOLS:
        _POOLS[n] = RankPool(n)
    return _POOLS[n]


class RankPool:
    """N processes with a gloo group as their default group."""

    def __init__(self, n: int) -> None:
        self.n = n
        self._process: subprocess.Popen[bytes] | None = None
        self._pipes: list[Connection] = []
        self._folder = ""
        atexit.register(self.close)

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = 60.0) -> list[Any]:
        """Calls `function(*args)` on every rank at once; the results, in the order of ranks.

        Args:
            function: top level of a file; ranks load that file by its path.
            args: anything that pickles.
            timeout: seconds for all ranks together.

        Raises:
            RuntimeError: a rank raised (its traceback, with the rank) or did not answer.
        """
        if self._process is None:
            self._start()
        job = pickle.dumps((function.__code__.co_filename, function.__qualname__, args))
        for pipe in self._pipes:
            pipe.send_bytes(job)
        answers, failures = self._collect(time.monotonic() + timeout)
        silent = [rank for rank in range(self.n) if rank not in answers and rank not in failures]
        if silent:
            self.close()
        problems = [f"rank {rank}: {failures[rank]}" for rank in sorted(failures)]
        problems += [f"rank {rank}: no answer" for rank in silent]
        if problems:
            raise RuntimeError("\n".join(problems))
        return [answers[rank] for rank in range(self.n)]

    def close(self) -> None:
        """Ends the processes; the next `run` starts new ones."""
        if self._process is not None:
            self._process.kill()  # the ranks die with it
            self._process.wait()
            shutil.rmtree(self._folder, ignore_errors=True)
        for pipe in self._pipes:
            pipe.close()
        self._process, self._pipes = None, []

    def _collect(self, deadline: float) -> tuple[dict[int, Any], dict[int, str]]:
        answers: dict[int, Any] = {}
        failures: dict[int, str] = {}
        open_pipes = dict(zip(self._pipes, range(self.n), strict=True))
        while open_pipes:
            ready = wait(list(open_pipes), timeout=max(deadline - time.monotonic(), 0.0))
            if not ready:
                break
            for pipe in ready:
                assert isinstance(pipe, Connection)
                rank = open_pipes.pop(pipe)
                try:
                    good, answer = pickle.loads(pipe.recv_bytes())
                except (EOFError, OSError):
                    continue  # the process is gone: no answer
                if good:
                    answers[rank] = answer
                else:
                    failures[rank] = answer
                    deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
        return answers, failures

    def _start(self) -> None:
        pairs = [socket.socketpair() for _ in range(self.n)]
        theirs = [child.fileno() for _, child in pairs]
        self._folder = tempfile.mkdtemp(prefix="ranks-")
        store = os.path.join(self._folder, "store")
        command = [sys.executable, __file__, store, str(os.getpid()), *map(str, theirs)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        self._process = subprocess.Popen(command, pass_fds=theirs, env=environment)
        for _, child in pairs:
            child.close()
        self._pipes = [Connection(ours.detach()) for ours, _ in pairs]
        _, failures = self._collect(time.monotonic() + 120.0)  # each says once that its group is up
        if failures:
            raise RuntimeError(str(failures))


def _die_with(parent: int) -> None:
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)  # it had already gone


def _nursery(store: str, parent: int, descriptors: list[int]) -> None:
    _die_with(parent)
    import torch

    torch.set_num_threads(1)
    me = os.getpid()
    for rank, descriptor in enumerate(descriptors):
        if os.fork() == 0:
            _die_with(me)
            for other in descriptors:
                if other != descriptor:
                    os.close(other)
            _serve(rank, len(descriptors), store, Connection(descriptor))
    for descriptor in descriptors:
        os.close(descriptor)
    while True:
        os.wait()  # ChildProcessError, and so the end, when no rank is left


def _serve(rank: int, n: int, store: str, pipe: Connection) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.FileStore(store, n), rank=rank, world_size=n)
    pipe.send_bytes(pickle.dumps((True, None)))
    modules: dict[str, ModuleType] = {}
    while True:
        try:
            job = pipe.recv_bytes()
        except (EOFError, OSError):
            os._exit(0)
        try:
            file, name, args = pickle.loads(job)
            answer = pickle.dumps((True, getattr(_loaded(file, modules), name)(*args)))
        except BaseException:
            answer = pickle.dumps((False, traceback.format_exc()))
        pipe.send_bytes(answer)


def _loaded(file: str, modules: dict[str, ModuleType]) -> ModuleType:
    # By path: how pytest names a test's module cannot be imported elsewhere.
    if file not in modules:
        name = f"_ranks_{len(modules)}_{Path(file).stem}"
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None and spec.loader is not None
        modules[file] = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(modules[file])
    return modules[file]


if __name__ == "__main__":
    _nursery(sys.argv[1], int(sys.argv[2]), [int(word) for word in sys.argv[3:]])

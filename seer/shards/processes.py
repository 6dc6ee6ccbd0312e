"""Runs one function over shards in several processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from seer.errors import UserError

Job = TypeVar("Job")
Result = TypeVar("Result")

Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in all."""


def silent(done: int, total: int) -> None:
    """The progress of those who do not look."""


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def each(
    function: Callable[[Job], Result], jobs: Sequence[Job], workers: int
) -> Generator[tuple[Job, Result], None, None]:
    """Yields (job, result) as they are done, in any order; one worker or one job stays in this process.

    Raises:
        UserError: a process was killed from outside.
    """
    if workers <= 1 or len(jobs) <= 1:
        for job in jobs:
            yield job, function(job)
        return
    # A fork of a process with threads (a progress line has one) can hang; a fork server has none.
    context = multiprocessing.get_context("forkserver" if os.name == "posix" else "spawn")
    pool = ProcessPoolExecutor(min(workers, len(jobs)), mp_context=context, initializer=_begin)
    waiting: dict[Future[Result], Job] = {}
    try:
        for job in jobs:
            # A bounded queue: the jobs of a large data set would otherwise be copied all at once.
            while len(waiting) >= 2 * workers:
                yield from _finished(waiting)
            waiting[pool.submit(function, job)] = job
        while waiting:
            yield from _finished(waiting)
    except BrokenProcessPool:
        remedy = "run the same command again, it goes on where it was; fewer --workers need less memory"
        raise UserError(
            "a worker process was killed", "something outside ended it (often: no memory)", remedy
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _begin() -> None:
    """A worker leaves Ctrl-C to its parent, which ends it in order, and does not outlive a parent that was killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _finished(waiting: dict[Future[Result], Job]) -> Iterator[tuple[Job, Result]]:
    for future in wait(waiting, return_when=FIRST_COMPLETED).done:
        yield waiting.pop(future), future.result()

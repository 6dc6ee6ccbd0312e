"""Processes that fill batches in shared memory, in order, whatever becomes of the processes (free of torch).

A batch lies in a slot of a ring of shared memory and is cut into tasks (ranges of its rows), so that several workers
fill it together. A task is a pure function of its numbers: where a worker dies or hangs, another one is started and
gets the same tasks, and the batches do not change by a byte. No thread and no signal handler watches: whatever happens
to a worker is found, mended or told in `BatchPool.next`.

Workers are forked when the pool is opened, where that is safe. Otherwise, and whenever one is replaced, they are
started anew (`seer.data.worker_process.fresh_worker`).
"""

from __future__ import annotations

import os
import selectors
import signal
import sys
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from seer.data.assembly import BadSample, BatchAssembler
from seer.data.ring import At, Ring, memory_file
from seer.data.shard_cache import say
from seer.data.worker_process import Task, Worker, cause_of_death, forked_worker, fresh_worker, write_briefing
from seer.errors import UserError

DEADLINE_SECONDS = 120.0
# Reading may take so many times the deadline: a source that tries again gives up by itself, and knows better why.
_READING = 5
SILENT_SECONDS = 20.0  # without a byte, after which a shard that is waited for is named

# With fewer rows a task, what is done once a task (numbers looked up, messages) is felt beside decoding.
_MIN_ROWS = 8
# Slots of the consumer: the batch handed out last and the one before.
_HELD = 2
# A sample is found guilty by so many deaths, all but the first of which it caused alone in a fresh process. SIGKILL
# comes from outside more often than from an image, so it has to strike once more.
_DEATHS, _DEATHS_BY_SIGKILL = 2, 3
# Deaths without an answer in between after which there is no hope; four more for each worker.
_HOPELESS = 16


@dataclass(frozen=True)
class Made:
    """A batch in its slot: arrays of one resolution each, as `BatchAssembler.layout` says."""

    crops: list[NDArray[np.uint8]]
    photometric: list[NDArray[np.float32]]
    bad: list[BadSample]
    batch_index: int


class BatchPool:
    """Endless batches from a number on. Work begins at once.

    Args:
        assembler: makes any rows of any batch. A sample that kills its worker is added to its quarantine.
        workers: processes; 0 makes the batches in the calling one, where they live as long (see `next`). On Linux they
            die with the thread that opened the pool, however it ends.
        first: number of the first batch.
        may_fork: nothing is in use that a fork would break (CUDA); threads are looked at here.
        deadline_seconds: a worker that decodes one image for so long, or reads one for five times as long, is replaced.

    Attributes:
        deaths: workers that were replaced.
    """

    def __init__(
        self,
        assembler: BatchAssembler,
        *,
        workers: int,
        first: int,
        may_fork: bool,
        deadline_seconds: float = DEADLINE_SECONDS,
    ) -> None:
        self._assembler, self._deadline = assembler, deadline_seconds
        # Two tasks a worker and batch: more would even out slow images no better, and each wakes the main process once.
        self._rows_a_task = max(_MIN_ROWS, -(-assembler.images // (2 * max(workers, 1))))
        tasks_a_batch = -(-assembler.images // self._rows_a_task)
        # Beyond the batch that is asked for: one, and as many as hold two tasks for each worker.
        self._ahead = 1 + -(-2 * workers // tasks_a_batch) if workers else 0
        self._ring = Ring(assembler, _HELD + self._ahead, workers)
        self._asked = self._submitted = first
        self._filling: dict[int, _Filling] = {}
        self._selector = selectors.PollSelector()  # of all kinds the one without a file that a fork would share
        self._briefing: int | None = None
        self._workers: list[Worker] = []
        self._owner = os.getpid()
        self._deaths_in_a_row = self.deaths = 0
        self._silent_since: float | None = None
        try:
            fork = may_fork and sys.platform == "linux" and threading.active_count() == 1
            for number in range(workers):
                self._workers.append(self._start(number, fork=fork))
            self._submit()
        except BaseException:
            self.close()
            raise

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers."""
        return [worker.process.pid for worker in self._workers]

    @property
    def memory(self) -> NDArray[np.uint8]:
        """Whole pages in which all batches lie; they keep their place."""
        return self._ring.memory

    def next(self) -> Made:
        """The next batch.

        Its arrays are the slot itself: they hold until the batch after the next one is asked for, whose making begins
        by overwriting them.

        Raises:
            UserError: what went wrong in making this batch, or workers die one after another.
            RuntimeError: a bug in a worker, with its traceback.
        """
        index, slot = self._asked, self._ring.slot(self._asked)
        if not self._workers:
            bad = self._assembler.fill(index, range(self._assembler.images), slot.crops, slot.photometric)
        else:
            self._submit()
            filling = self._filling[index]
            while filling.rows_left:
                self._listen()
            del self._filling[index]
            bad = filling.bad_samples()
        self._asked += 1
        return Made(slot.crops, slot.photometric, bad, index)

    def quarantine(self, samples: Iterable[tuple[int, int]]) -> None:
        """Replaces more samples, (shard, place), from the batches on that are not begun."""
        self._assembler.quarantine.update(samples)
        self._share_quarantine()

    def close(self) -> None:
        """Ends the workers. Batches that were handed out keep their memory."""
        if os.getpid() != self._owner:
            return  # in a fork, whose exit must not end the workers of its parent
        for worker in self._workers:
            worker.process.kill()  # all of them before the first is waited for
        while self._workers:
            self._dismiss(self._workers[-1])
        self._selector.close()
        self._ring.close()
        if self._briefing is not None:
            os.close(self._briefing)
            self._briefing = None

    def _submit(self) -> None:
        """Gives the workers every batch for which there is a slot: all but that of the batch handed out last."""
        if not self._workers:
            return
        images = self._assembler.images
        mail: dict[int, list[Task]] = {}
        for batch_index in range(self._submitted, self._asked + self._ahead + 1):
            self._filling[batch_index] = _Filling(images)
            for start in range(0, images, self._rows_a_task):
                task = Task(batch_index, range(start, min(start + self._rows_a_task, images)))
                least = min(self._workers, key=lambda worker: worker.rows)
                least.take(task)
                mail.setdefault(least.number, []).append(task)
        self._submitted = self._asked + self._ahead + 1
        for number, tasks in mail.items():
            self._workers[number].send([task.message for task in tasks])

    def _listen(self) -> None:
        """Waits for an answer, a death, or the time to look for workers that hang."""
        events = self._selector.select(min(1.0, self._deadline / 4))
        for key, _ in events:
            worker: Worker = key.data
            answers = worker.receive()
            if answers is None:
                self._replace(worker, hung=False)
                continue
            for kind, what in answers:
                task = worker.finish()
                self._filling[task.batch_index].answered(task.rows, kind, what)
                self._deaths_in_a_row = 0
        if not events:
            for worker in [*self._workers]:
                at = self._ring.at(worker.number)
                still, reading = worker.stands_still(at), at.shard >= 0 and at.sample < 0
                if still > self._deadline * (1 if at.sample >= 0 else _READING):
                    self._replace(worker, hung=True)
                elif still > SILENT_SECONDS and reading and self._silent_since is None:
                    self._silent_since = time.monotonic() - still
                    path = self._assembler.shard_path(at.shard)
                    say(f"nothing came of shard {path} for {still:.0f} s: its server or disk is waited for")
        elif self._silent_since is not None:
            say(f"shards are read again, after {time.monotonic() - self._silent_since:.0f} s")
            self._silent_since = None

    def _replace(self, worker: Worker, *, hung: bool) -> None:
        """Another process in the place of a dead or hanging one, for the same tasks."""
        code = self._dismiss(worker)
        at = self._ring.at(worker.number)
        self.deaths += 1
        self._deaths_in_a_row += 1
        if self._deaths_in_a_row >= _HOPELESS + 4 * self._ring.workers:
            self._give_up(f"hung for {self._deadline:g} s" if hung else cause_of_death(code), at)
        if self.deaths == 1:
            self._tell(None if hung else cause_of_death(code), at)
        tasks, convicted = [*worker.tasks], False
        if tasks and at.sample >= 0 and at.row in tasks[0].rows:
            enough = _DEATHS_BY_SIGKILL if code == -signal.SIGKILL and not hung else _DEATHS
            alone = tasks[0].alone(at)
            if convicted := len(tasks[0].rows) == 1 and alone.deaths >= enough:
                self._assembler.quarantine.add((at.shard, at.sample))
            # The suspected row first, in the fresh process: what it survives there, something before it had done.
            tasks[:1] = [alone, *tasks[0].without(at.row)]
        if convicted:
            self._share_quarantine()
        fresh = self._start(worker.number, fork=False)
        self._workers.insert(worker.number, fresh)
        for task in tasks:
            fresh.take(task)
        fresh.send([task.message for task in tasks])

    def _share_quarantine(self) -> None:
        for worker in self._workers:
            worker.send([self._quarantine_message()])

    def _quarantine_message(self) -> list[Any]:
        return ["quarantine", sorted(self._assembler.quarantine)]

    def _tell(self, cause: str | None, at: At) -> None:
        """One line of the first death; how many follow is for who reads `deaths`."""
        what = f"hung for {self._deadline:g} s" if cause is None else f"died ({cause})"
        remedy = (
            "see whether the disk answers"
            if cause is None
            else "see `seer doctor`; fewer data.workers need less memory"
        )
        say(
            f"a data worker {what}{self._place(at)}: another one does its work, and no batch changes. "
            f"If it happens often: {remedy}. Further ones are counted as worker_deaths"
        )

    def _place(self, at: At) -> str:
        if at.sample >= 0:
            return f", at sample {at.sample} of shard {self._assembler.shard_path(at.shard)}"
        return "" if at.shard < 0 else f", reading shard {self._assembler.shard_path(at.shard)}"

    def _give_up(self, how: str, at: At) -> NoReturn:
        raise UserError(
            f"{self._deaths_in_a_row} data workers died one after another (the last one {how}{self._place(at)})",
            "memory ran out, the disk does not answer, or the decoder does not fit this CPU or these images",
            "see `seer doctor`; with fewer data.workers less memory is needed",
        )

    def _start(self, number: int, *, fork: bool) -> Worker:
        self._ring.announce(number, -1, -1, -1)
        if fork:
            worker = forked_worker(number, self._assembler, self._ring, [other.socket for other in self._workers])
        else:
            if self._briefing is None:
                self._briefing = memory_file()
                write_briefing(self._briefing, self._assembler, self._ring)
            worker = fresh_worker(number, self._ring, self._briefing)
        self._selector.register(worker.socket, selectors.EVENT_READ, worker)
        if self._assembler.quarantine:
            worker.send([self._quarantine_message()])
        return worker

    def _dismiss(self, worker: Worker) -> int | None:
        """Ends a worker, which writes nothing any more; its exit code, if it has one by now."""
        self._workers.remove(worker)
        self._selector.unregister(worker.socket)
        return worker.end()


class _Filling:
    """What is known of a batch that is being filled."""

    def __init__(self, images: int) -> None:
        self.rows_left = images
        self._answers: list[tuple[int, str, Any]] = []

    def answered(self, rows: range, kind: str, what: Any) -> None:
        self.rows_left -= len(rows)
        self._answers.append((rows.start, kind, what))

    def bad_samples(self) -> list[BadSample]:
        """In the order of rows, as a single process would tell them; raises the first error."""
        bad: list[BadSample] = []
        for _, kind, what in sorted(self._answers, key=lambda answer: answer[0]):
            if kind == "user_error":
                raise UserError(*what)
            if kind == "bug":
                raise RuntimeError(f"a data worker failed:\n{what}")
            bad += [BadSample(*one) for one in what]
        return bad

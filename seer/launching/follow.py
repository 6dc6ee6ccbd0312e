"""What can be seen of runs from outside: their files are read and nothing is locked; of jobs, SLURM is asked once."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seer.errors import EXIT_STOPPED, UserError, closest
from seer.launching.folder import LaunchFolder
from seer.launching.submission import is_waiting, jobs_of, queued_jobs
from seer.run_directory import lock_of, metrics_of, read_result, read_run
from seer.run_lock import host_of_holder

# Hundreds of lines; the whole file may have hundreds of thousands.
_TAIL_BYTES = 1 << 18
_PATIENCE_SECONDS = 5  # for SLURM; without an answer the files alone are believed


@dataclass(frozen=True)
class RunView:
    """A run as its files show it; None: not known (yet).

    Attributes:
        folder: the run's folder.
        state: `running` (a process holds the lock; one on another machine is believed), `finished`, `stopped` (the
            same command goes on), `failed` (ended with an error), `lost` (ended without saying how) or `queued`
            (launched, nothing written yet; or its job waits in the queue, again).
        host: where the process runs that holds the lock; running runs only.
        step, total_steps: steps taken, as of the last line of the metrics or what was saved after it, and of the whole
            run.
        images_per_s: of the last log interval, over all processes.
        loss, chance: of the newest line; the loss of a network that tells nothing apart.
        knn_top1: newest score in [0, 1].
        seconds_left: to the last step at `images_per_s`; running runs only.
        line_age_seconds: since the last line of the metrics was written.
        error: why it failed; failed runs only.
        last_activity: when a file of the run changed last, seconds since 1970.
    """

    folder: Path
    state: str
    host: str | None
    step: int | None
    total_steps: int | None
    images_per_s: float | None
    loss: float | None
    chance: float | None
    knn_top1: float | None
    seconds_left: float | None
    line_age_seconds: float | None
    error: str | None
    last_activity: float

    @property
    def is_elsewhere(self) -> bool:
        """Whether it runs on another machine, where a process that died cannot be told from a living one."""
        return self.host is not None and self.host != socket.gethostname()


def runs_below(folder: Path) -> list[RunView]:
    """The runs in a folder, in its folders and in theirs, the last active one first; a run's own folder is one run.

    Raises:
        UserError: there is no such folder.
    """
    if not folder.is_dir():
        if folder.exists():
            raise UserError(f"{folder} is a file", "runs lie in a folder", f"try seer runs {folder.parent}")
        raise UserError(f"{folder} does not exist", "runs are looked for in a folder", _nearest(folder))
    now, found = time.time(), list(_runs(folder, 2))
    jobs = {run: numbers[-1] for run, _ in found if (numbers := jobs_of(LaunchFolder(run)))}
    queue = queued_jobs(_PATIENCE_SECONDS) if jobs else None
    states = {} if queue is None else {run: queue.get(job, "") for run, job in jobs.items()}
    views = [_view(run, config, states.get(run), now) for run, config in found]
    return sorted(views, key=lambda view: (-view.last_activity, view.folder))


def _nearest(folder: Path) -> str:
    with contextlib.suppress(OSError):
        others = [entry.name for entry in os.scandir(folder.parent) if entry.is_dir()]
        if others:
            return f"in {folder.parent}: {closest(folder.name, others)}"
    return "give the folder that holds the run_dir of your commands"


def _runs(folder: Path, levels: int) -> Iterator[tuple[Path, dict[str, Any] | None]]:
    """Folders of runs, with the configuration of those that wrote theirs."""
    config: dict[str, Any] | None = None
    with contextlib.suppress(UserError):
        config = read_run(folder)
    if config is not None or LaunchFolder(folder).config.is_file():
        yield folder, config
        return
    if levels == 0:
        return
    try:
        inner = [Path(entry.path) for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith(".")]
    except OSError:  # a folder of somebody else
        return
    for one in inner:
        yield from _runs(one, levels - 1)


def _view(folder: Path, config: dict[str, Any] | None, job: str | None, now: float) -> RunView:
    """A run; `job` is the state of its newest job, empty: it is over, None: there was none, or SLURM does not say."""
    metrics, lock, launched = metrics_of(folder), lock_of(folder), LaunchFolder(folder)
    result: dict[str, Any] = {}
    with contextlib.suppress(UserError):
        result = read_result(folder) or {}
    host, written, tail = host_of_holder(lock), _changed(metrics), _tail(metrics)
    line = _newest(tail, "loss")
    begun = config is not None or written is not None
    state = _state(host, result, launched.exit_code(), lock_left=lock.exists(), begun=begun)
    if job and is_waiting(job) and state != "finished" and host != socket.gethostname():
        state = "queued"  # what an earlier life left, and a process on another machine, belong to the past
    elif state == "queued" and job == "" and host_of_holder(launched.lock) is None:
        state = "lost"
    total = _total_steps(config)
    steps = (_whole(tail[-1], "step") if tail else None, _whole(result, "steps"))
    return RunView(
        folder=folder,
        state=state,
        host=host if state == "running" else None,
        step=max((step for step in steps if step is not None), default=None),  # the end was saved, but maybe not logged
        total_steps=total,
        images_per_s=_number(line, "images_per_s"),
        loss=_number(line, "loss"),
        chance=_number(line, "chance"),
        knn_top1=_number(_newest(tail, "knn_top1") or result, "knn_top1"),
        seconds_left=_seconds_left(line, total) if state == "running" else None,
        line_age_seconds=None if written is None else max(0.0, now - written),
        error=(result.get("error") or launched.message()) if state == "failed" else None,
        last_activity=max(filter(None, map(_changed, (metrics, lock, launched.folder, folder))), default=0.0),
    )


def _state(host: str | None, result: dict[str, Any], exit_code: int | None, *, lock_left: bool, begun: bool) -> str:
    if host is not None:
        return "running"
    if result.get("state") == "finished":
        return "finished"
    if result and not lock_left:
        return "failed" if result.get("state") == "failed" else "stopped"
    if exit_code not in (None, 0, EXIT_STOPPED):
        return "failed"
    return "lost" if begun else "queued"


def _tail(metrics: Path) -> list[dict[str, Any]]:
    """The last whole lines of a file of JSON lines; the last one may still be in the making."""
    try:
        with open(metrics, "rb") as stream:
            size = stream.seek(0, os.SEEK_END)
            stream.seek(max(0, size - _TAIL_BYTES))
            lines = stream.read().split(b"\n")[1 if size > _TAIL_BYTES else 0 : -1]
    except OSError:
        return []
    found = []
    for raw in lines:
        with contextlib.suppress(ValueError):
            line = json.loads(raw)
            if isinstance(line, dict):
                found.append(line)
    return found


def _newest(lines: list[dict[str, Any]], key: str) -> dict[str, Any]:
    return next((line for line in reversed(lines) if key in line), {})


def _number(line: dict[str, Any], key: str) -> float | None:
    found = line.get(key)
    return float(found) if isinstance(found, int | float) else None


def _whole(line: dict[str, Any], key: str) -> int | None:
    found = line.get(key)
    return found if isinstance(found, int) else None


def _total_steps(config: dict[str, Any] | None) -> int | None:
    section = (config or {}).get("train")
    return _whole(section, "steps") if isinstance(section, dict) else None


def _seconds_left(line: dict[str, Any], total_steps: int | None) -> float | None:
    step, images, speed = (_number(line, key) for key in ("step", "images_seen", "images_per_s"))
    if total_steps is None or not step or images is None or not speed:
        return None
    return max(0.0, total_steps - step) * images / step / speed


def _changed(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except OSError:
        return None

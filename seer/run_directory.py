"""A run on disk: the names of its files, its frozen configuration, and the lock that keeps a second writer out.

Everything that a run needs to go on lies in its folder; deleting the folder deletes the run. Only this module knows the
names in it.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from seer import frozen_config
from seer.errors import LostRank, UserError, printable, shown
from seer.files import cannot_write, write_atomically
from seer.run_agreement import agree_or_raise
from seer.run_lock import RunLock, in_use

_CONFIG = "config.yaml"
_SHARDS = "shards.json"
_LOCK = "run.lock"
_MOST_WORDS = 1000  # of an error, in the result
_LAUNCH = "launch"  # what `seer launch` keeps: it is there before the run is


class RunDirectory:
    """A run's folder, held by this process until ``close``; made by ``RunDirectory.open``.

    Attributes:
        folder: the folder, absolute.
        config: the configuration as frozen in ``config.yaml``.
    """

    def __init__(self, folder: Path, config: dict[str, Any], lock: RunLock | None, made: Sequence[Path] = ()) -> None:
        self.folder = folder
        self.config = config
        self._lock = lock
        self._made = made
        self._recorded = False

    @classmethod
    def open(cls, run_dir: str | Path, config: Mapping[str, Any], *, take_over: bool = False) -> RunDirectory:
        """Lock the run's folder, to begin or to go on in it; only ``record`` writes what it is.

        Args:
            run_dir: the folder; its parents are made as needed, and removed by ``close`` if nothing was recorded.
            config: the composed configuration, plain dictionaries, lists, strings and numbers.
            take_over: go on although a process on another machine holds the run.

        Raises:
            UserError: the folder cannot be written, is in use, holds a run of another configuration or something else
                than a run; nothing that was made here stays then.
        """
        folder = _absolute(run_dir)
        _refuse_what_is_no_run(folder)
        made = _make(folder)
        try:
            lock = RunLock.take(folder / _LOCK, take_over=take_over)
        except BaseException:
            _unmake(made)
            raise
        run = cls(folder, frozen_config.contents(config)["config"], lock, made)
        try:
            _agree(folder, frozen_config.contents(config), contents_later=True)
        except BaseException:
            run.close()
            raise
        return run

    def record(
        self,
        *,
        resolved: Mapping[str, Any] | None = None,
        data: Mapping[str, Any] | None = None,
        shards: Mapping[str, Any] | None = None,
    ) -> None:
        """Write what the run is and is made of.

        Args:
            resolved: what was derived from the configuration: key -> something with ``value`` and ``reason``.
            data: what the batches are made of (``DataStream.identity()``). Where the run recorded it too, it must
                agree, and ``data.shards`` may then be spelt differently: a moved folder holds the same data.
            shards: since when the run learns from which shards (``History.to_json()``), for ``read_shards``.

        Raises:
            UserError: the run is made of other data, or its folder cannot be written; nothing is written then.
        """
        frozen = frozen_config.contents(self.config, resolved, data)
        _agree(self.folder, frozen)
        _write(self.folder / _CONFIG, frozen_config.as_text(frozen))
        self._made = ()
        # How the life before ended; until this one ends nobody knows how it will.
        self.result.unlink(missing_ok=True)
        self._recorded = True
        if shards is not None:
            _write(shards_of(self.folder), json.dumps(shards, separators=(",", ":")) + "\n")

    @classmethod
    def join(cls, run_dir: str | Path, config: Mapping[str, Any]) -> RunDirectory:
        """A run that rank 0 has opened, for the other ranks of it: they hold no lock."""
        return cls(_absolute(run_dir), dict(config), None)

    def require_ownership(self) -> None:
        """Refuses to go on where another process has taken the run over.

        Raises:
            UserError: it has.
        """
        if self._lock is not None and not self._lock.still_held():
            raise UserError(
                f"{self.folder} was taken over by another process",
                "one process at a time writes into a run",
                "let that one go on",
            )

    @property
    def metrics(self) -> Path:
        """JSON lines, one a log step."""
        return self.folder / "metrics.jsonl"

    @property
    def evaluations(self) -> Path:
        """JSON lines, one an evaluation."""
        return self.folder / "evaluations.jsonl"

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.folder / "checkpoints"

    @property
    def tensorboard(self) -> Path:
        """Folder of TensorBoard's event files."""
        return self.folder / "tensorboard"

    @property
    def exports(self) -> Path:
        """Folder of the weights that others load."""
        return self.folder / "exports"

    @property
    def result(self) -> Path:
        """How the run ended, JSON."""
        return self.folder / "result.json"

    def quarantine(self, rank: int = 0) -> Path:
        """JSON lines of the samples that could not be used, one file a rank."""
        return self.folder / "quarantine" / f"rank-{rank}.jsonl"

    def write_result(self, result: Mapping[str, Any]) -> None:
        """Write ``result.json`` as a whole."""
        _write(self.result, json.dumps(dict(result), indent=2, allow_nan=False) + "\n")

    def update_result(self, changes: Mapping[str, Any]) -> None:
        """Set some keys of ``result.json`` and keep the others."""
        self.write_result((read_result(self.folder) or {}) | dict(changes))

    def close(self) -> None:
        """Give the lock back; of a run that was not recorded nothing stays."""
        if self._lock is not None:
            self._lock.release()
        _unmake(self._made)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, Exception) and not isinstance(error, LostRank):  # why, that one may have told
            self._leave(error)
        self.close()

    def _leave(self, error: Exception) -> None:
        """Note in the result what ended the run, if this process may write it: the error itself is told by others."""
        if self._lock is None or not self._recorded:
            return
        words = shown(str(error)) if isinstance(error, UserError) else f"{type(error).__name__}: {shown(str(error))}"
        # A full disk may be what ended it.
        with contextlib.suppress(OSError, UserError):
            if self._lock.still_held():
                self.write_result({"state": "failed", "error": printable(" ".join(words.split()))[:_MOST_WORDS]})


def read_run(run_dir: str | Path) -> dict[str, Any]:
    """The frozen configuration of a run, without taking its lock (evaluation and export look at living runs too).

    Raises:
        UserError: there is no such folder, or it holds no run.
    """
    folder = Path(run_dir).expanduser()
    remedy = "give the run_dir of a `seer train` command"
    if not folder.is_dir():
        what = f"{folder} is a file" if folder.exists() else f"{folder} does not exist"
        raise UserError(what, "a run is a folder", remedy)
    found = frozen_config.read(folder / _CONFIG)
    if found is None:
        raise UserError(f"{folder} is no run", f"a run's folder holds {_CONFIG}", remedy)
    config: dict[str, Any] = found["config"]
    return config


def recorded_data(run_dir: str | Path) -> dict[str, Any] | None:
    """What ``record`` was given as ``data``; None where the run has not begun.

    Raises:
        UserError: the configuration of the run cannot be read.
    """
    folder = _absolute(run_dir)
    found = frozen_config.read(folder / _CONFIG) if _has_begun(folder) else None
    return None if found is None else found.get("data", {})


def agree_with_run(run_dir: str | Path, config: Mapping[str, Any], *, data: Mapping[str, Any] | None = None) -> None:
    """Refuses a configuration that a run in a folder could not go on with; nothing is locked.

    Args:
        run_dir: the folder.
        config: as for ``RunDirectory.open``.
        data: as for ``record``; without it the shards must be spelt as they were.

    Raises:
        UserError: the values that differ.
    """
    _agree(_absolute(run_dir), frozen_config.contents(config, data=data))


def check_can_run(run_dir: str | Path, config: Mapping[str, Any], *, take_over: bool = False) -> None:
    """Whether a run could begin or go on in a folder, for those who start it later; nothing is made.

    Args:
        run_dir: the folder.
        config, take_over: as for ``RunDirectory.open``.

    Raises:
        UserError: as ``RunDirectory.open``.
    """
    folder = _absolute(run_dir)
    _refuse_what_is_no_run(folder)
    _probe(folder)
    if (taken := in_use(folder / _LOCK, take_over=take_over)) is not None:
        raise taken
    _agree(folder, frozen_config.contents(config), contents_later=True)


def free_from_elsewhere(run_dir: str | Path) -> None:
    """Take the lock from a process on another machine, for a run that is started here and takes it later."""
    RunLock.take(_absolute(run_dir) / _LOCK, take_over=True).release()


def launch_folder_of(run_dir: str | Path) -> Path:
    """Where ``seer launch`` keeps the frozen configuration, the logs and the exit code of a run."""
    return _absolute(run_dir) / _LAUNCH


def checkpoints_of(run_dir: str | Path) -> Path:
    """The folder of a run's checkpoints, for those who read a run without opening it."""
    return Path(run_dir).expanduser() / "checkpoints"


def metrics_of(run_dir: str | Path) -> Path:
    """The file of a run's metrics, for those who read a run without opening it."""
    return Path(run_dir).expanduser() / "metrics.jsonl"


def lock_of(run_dir: str | Path) -> Path:
    """The file of a run's lock, for `run_lock.in_use`."""
    return Path(run_dir).expanduser() / _LOCK


def shards_of(run_dir: str | Path) -> Path:
    """The file that says since when a run learns from which shards."""
    return Path(run_dir).expanduser() / _SHARDS


def read_shards(run_dir: str | Path) -> Any:
    """What ``record`` was given as ``shards``; None: the run has not begun, or it did before that was recorded.

    Raises:
        UserError: the file is gone or cannot be read.
    """
    folder, file = Path(run_dir).expanduser(), shards_of(run_dir)
    if not _has_begun(folder):
        return None
    rule, remedy = "it tells which shards the run learned from", "bring back a copy, or name another run_dir"
    try:
        return json.loads(file.read_bytes())
    except FileNotFoundError:
        if "joined" not in ((frozen_config.read(folder / _CONFIG) or {}).get("data") or {}):
            return None
        raise UserError(f"{file} is gone", rule, remedy) from None
    except (OSError, ValueError, RecursionError):
        raise UserError(f"{file} cannot be read", rule, remedy) from None


def read_result(run_dir: str | Path) -> dict[str, Any] | None:
    """What ``result.json`` says, None where the run has not ended yet.

    Raises:
        UserError: the file cannot be read, or holds something else.
    """
    file = Path(run_dir).expanduser() / "result.json"
    try:
        result = json.loads(file.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        what = f"{file} cannot be read ({error.strerror})"
        raise UserError(what, "it holds a run's result", "name another run_dir, or change its permissions") from None
    except (ValueError, RecursionError):
        result = None
    if not isinstance(result, dict):
        raise UserError(f"{file} cannot be read", "it is the JSON object with a run's result", "delete that file")
    return result


def update_result(run_dir: str | Path, changes: Mapping[str, Any]) -> None:
    """Set some keys in the result of a run that has ended, from outside; one that has no result yet is left alone.

    Raises:
        UserError: the run is living.
    """
    if read_result(run_dir) is None:
        return
    folder = Path(run_dir).expanduser()
    with RunDirectory(folder, read_run(run_dir), RunLock.take(folder / _LOCK)) as run:
        run.update_result(changes)


def _absolute(run_dir: str | Path) -> Path:
    return Path(os.path.abspath(os.path.expanduser(run_dir)))


def _refuse_what_is_no_run(folder: Path) -> None:
    """Refuses a folder of other files, except those of a process that died before it wrote config.yaml."""
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return  # there is nothing, or what `_make` refuses
    ours = (".probe-", f".{_LOCK}.", f".{_CONFIG}.")
    others = [name for name in names if name not in (_LOCK, _LAUNCH) and not name.startswith(ours)]
    if others and _CONFIG not in names:
        raise UserError(
            f"{folder} is no run and is not empty (it holds {others[0]})",
            "a run needs a folder of its own",
            "name another run_dir, one that does not exist yet",
        )


def _make(folder: Path) -> list[Path]:
    """Make a folder and its parents; returns those that were made, the innermost first."""
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Permission bits do not tell the truth about read-only mounts; a file does.
        probe = folder / f".probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        _unmake(missing)
        raise cannot_write(folder, error) from None
    return missing


def _probe(folder: Path) -> None:
    """Whether a folder could be made or written; itself it is not touched, since others may be making it just now."""
    place = next(place for place in (folder, *folder.parents) if place.exists())
    try:
        os.rmdir(tempfile.mkdtemp(prefix=".probe-", dir=place))
    except OSError as error:
        raise cannot_write(folder, error) from None


def _unmake(made: Sequence[Path]) -> None:
    for place in made:
        try:
            place.rmdir()
        except FileNotFoundError:
            continue  # it was not reached
        except OSError:
            return


def _write(file: Path, text: str) -> None:
    try:
        write_atomically(file, text.encode())
    except OSError as error:
        raise cannot_write(file, error) from None


def _agree(folder: Path, frozen: Mapping[str, Any], *, contents_later: bool = False) -> None:
    if _has_begun(folder):  # a run that ended before its first step binds nobody
        agree_or_raise(folder, frozen_config.read(folder / _CONFIG), frozen, contents_later=contents_later)


def _has_begun(folder: Path) -> bool:
    if any((folder / name).exists() for name in ("metrics.jsonl", "checkpoints")):
        return True
    return (read_result(folder) or {"state": "failed"}).get("state") != "failed"

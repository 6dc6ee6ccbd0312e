"""What the launcher leaves in a run: RUN/launch with the frozen configuration, the code it runs with, and the logs.

config.yaml      the composed configuration, absolute paths; ranks read it and compose nothing
code/            the package as it was at the launch: what is edited later is not used by a job that starts later
status.json      how the last life ended, written by rank 0
rank-0.log ...   local: what each process said; rank-0.pid ...: its number; torchrun.log: what torchrun said
lock             host and pid of the launcher, then of the process that it started here
17_0_log.out     slurm: what task 0 of job 17 said; 17_submission.sh: what was submitted
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

import seer
from seer.compose import conf_folder
from seer.config import TrainConfig, freeze
from seer.errors import UserError, shown
from seer.files import cannot_write, write_atomically
from seer.run_directory import launch_folder_of
from seer.run_lock import RunLock
from seer.source_list import read_sources

_HEAD = "# Written by seer launch: what the processes of this run read. To change a run, launch it again.\n"
# What launchers tell their processes: left over in a shell, it would make strangers of ours.
_STALE = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE"),
    *("ROLE_RANK", "ROLE_WORLD_SIZE", "ROLE_NAME", "MASTER_ADDR", "MASTER_PORT", "SEER_LAUNCHER", "SEER_STATUS_FILE"),
)
_STALE_PREFIXES = ("SLURM_", "TORCHELASTIC_", "PET_", "SUBMITIT_")
_OF_THE_SITE = ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT")


@dataclass(frozen=True)
class LaunchFolder:
    """The names in RUN/launch.

    Attributes:
        run_dir: the run's folder, absolute.
    """

    run_dir: Path

    @property
    def folder(self) -> Path:
        """RUN/launch."""
        return launch_folder_of(self.run_dir)

    @property
    def config(self) -> Path:
        """The frozen configuration."""
        return self.folder / "config.yaml"

    @property
    def code(self) -> Path:
        """Folder that holds the package `seer` of this launch."""
        return self.folder / "code"

    @property
    def status(self) -> Path:
        """JSON that rank 0 writes at its end: {"exit_code": int, "message": str or null}."""
        return self.folder / "status.json"

    @property
    def lock(self) -> Path:
        """What the launcher holds, and after it the process that it started here."""
        return self.folder / "lock"

    @property
    def agent_log(self) -> Path:
        """What torchrun said."""
        return self.folder / "torchrun.log"

    def rank_log(self, rank: int) -> Path:
        """What a process on this machine said."""
        return self.folder / f"rank-{rank}.log"

    def rank_pid(self, rank: int) -> Path:
        """The number of a process on this machine."""
        return self.folder / f"rank-{rank}.pid"

    def exit_code(self) -> int | None:
        """How the last life ended, None where it did not say."""
        try:
            return int(json.loads(self.status.read_bytes())["exit_code"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def message(self) -> str | None:
        """Why the last life ended with the user's input, None where it did not."""
        try:
            found = json.loads(self.status.read_bytes())["message"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return found if isinstance(found, str) else None

    def tell_cause(self, log: Path) -> None:
        """Say on stderr why the last life ended, where the log of rank 0 does not: another process met the error."""
        message = self.message()
        with contextlib.suppress(OSError):
            if message and message not in log.read_text(encoding="utf-8", errors="replace"):
                print(f"seer: {message}", file=sys.stderr)

    @contextlib.contextmanager
    def frozen(self, config: TrainConfig) -> Iterator[RunLock]:
        """Writes configuration and code for the block that starts the run; if that fails, what was made here goes.

        The block holds a lock that keeps other launches of this run out, and may pass it on to what it started: the
        run's own lock comes only after the imports, and a second launch would replace the files under the first.

        Args:
            config: what `absolute` gave.

        Raises:
            UserError: the folder cannot be written, or another launch of this run is under way or its process lives.
        """
        missing = [place for place in self.folder.parents if not place.exists()]
        made, lock = False, None
        try:
            try:
                self.run_dir.mkdir(parents=True, exist_ok=True)
                with contextlib.suppress(FileExistsError):
                    self.folder.mkdir()
                    made = True
                # On another machine nobody can tell whether it lives; the run's own lock and the queue say more of it.
                lock = RunLock.take(self.lock, take_over=True)
                self._copy_code()
                text = yaml.safe_dump(freeze(config), sort_keys=False, allow_unicode=True, width=120)
                write_atomically(self.config, (_HEAD + text).encode())
                for old in (self.status, *self.folder.glob("rank-*.pid")):
                    old.unlink(missing_ok=True)
            except OSError as error:
                raise cannot_write(self.folder, error) from None
            yield lock
            lock.release()  # which leaves one that was passed on
        except BaseException:
            if made:
                shutil.rmtree(self.folder, ignore_errors=True)
            elif lock is not None:
                lock.release()
            with contextlib.suppress(OSError):  # somebody else's by now
                for place in missing:
                    place.rmdir()
            raise

    def _copy_code(self) -> None:
        draft = self.folder / f".code.{os.getpid()}.part"
        # Where `seer.compose.conf_folder` looks first.
        shutil.copytree(Path(seer.__file__).parent, draft / "seer", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copytree(conf_folder(), draft / "seer" / "conf", dirs_exist_ok=True)
        if self.code.exists():
            shutil.rmtree(self.code)
        draft.rename(self.code)


def absolute(config: TrainConfig) -> TrainConfig:
    """The same configuration with paths and patterns that mean the same from any folder.

    Raises:
        UserError: an address that holds a secret.
    """

    def path(text: str) -> str:
        if shown(text) != text:
            raise UserError(
                f"{text} holds a password or a signature",
                "seer launch writes the configuration into a file",
                "give credentials in the environment or ~/.netrc, or use `seer train`",
            )
        # Not os.path.abspath, which would tidy up patterns; a ~ that is no file's name is the home folder.
        home = text if "://" in text or os.path.exists(text) else os.path.expanduser(text)
        return home if "://" in home else os.path.join(os.getcwd(), home)

    run_dir, data, evaluation, train = config.run_dir, config.data, config.evaluation, config.train
    return dataclasses.replace(
        config,
        # An address is refused later.
        run_dir=os.path.abspath(os.path.expanduser(run_dir)) if run_dir and "://" not in run_dir else run_dir,
        data=dataclasses.replace(
            data,
            shards=[path(pattern) if pattern else "" for pattern in data.shards],
            mixture=[str(source._replace(pattern=path(source.pattern))) for source in read_sources(data.mixture)],
            index_dir=path(data.index_dir) if data.index_dir else data.index_dir,
            cache_dir=path(data.cache_dir) if data.cache_dir else data.cache_dir,
        ),
        evaluation=dataclasses.replace(
            evaluation,
            train=[path(pattern) if pattern else "" for pattern in evaluation.train],
            val=[path(pattern) if pattern else "" for pattern in evaluation.val],
        ),
        train=dataclasses.replace(train, init_from=path(train.init_from) if train.init_from else train.init_from),
    )


def without_rank_variables(environ: dict[str, str]) -> dict[str, str]:
    """An environment without what another launcher, or the job that this shell belongs to, told its processes."""
    return {
        name: value
        for name, value in environ.items()
        if name in _OF_THE_SITE or (name not in _STALE and not name.startswith(_STALE_PREFIXES))
    }


def network_variables(interface: str | None) -> dict[str, str]:
    """What makes gloo and NCCL use this network interface."""
    return {} if interface is None else {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": interface}

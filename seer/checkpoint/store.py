"""Checkpoints on disk: published by one rename, verified before anything of them is used, from any number of ranks.

    checkpoints/
      step-00001200/manifest.json     format, step, world size, size and SHA-256 of each other file, state, own SHA-256
      step-00001200/__RANK_0.distcp   the tensors that this rank wrote
      step-00001200/.metadata         which tensor lies where (torch.distributed.checkpoint)
      latest                          name of the newest folder, moved last; for people and scripts

A checkpoint is written into a temporary folder by all ranks, flushed to the disk, and renamed by rank 0; older ones go
only after that. So at every moment, whatever is killed, the newest folder that verifies is a whole checkpoint, and
``newest`` takes that one. What one rank meets, all are told: nobody waits for one that has left.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from seer.checkpoint.dcp import read_metadata, read_tensors, write_tensors
from seer.checkpoint.manifest import FORMAT, MANIFEST, Damaged, fault_of_files, manifest_bytes, read_manifest, sealed
from seer.distributed import gather_objects, of_first_rank, rank, together, world_size
from seer.errors import UserError
from seer.files import cannot_write, sync_file, sync_folder, write_atomically

_FOLDER = re.compile(r"step-(\d{8,})")
_T = TypeVar("_T")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files were verified.

    Attributes:
        step: steps taken when it was saved.
        folder: where it lies.
        state: the JSON state that was saved with the tensors.
    """

    step: int
    folder: Path
    state: dict[str, Any]

    def entries(self) -> dict[str, tuple[torch.Size, torch.dtype]]:
        """Shape (of the whole tensor) and dtype of everything in it, by name.

        Raises:
            UserError: its description was written by somebody else.
        """
        return {
            name: (entry.size, entry.properties.dtype)
            for name, entry in self._metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }

    @torch.no_grad()
    def load_into(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy everything into these tensors, in place; all ranks together.

        Args:
            tensors: plain ones or DTensors of any mesh and placements, whatever they were when they were saved. Names,
                shapes and dtypes must be the same.

        Raises:
            UserError: on all ranks, if the tensors are others than the checkpoint's (none is changed then), or it
                cannot be read.
        """
        with together():
            saved = self.entries()
            given = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
            unlike = sorted(name for name in saved.keys() | given.keys() if saved.get(name) != given.get(name))
            if unlike:
                there, here = (_in_words(entries.get(unlike[0])) for entries in (saved, given))
                raise UserError(
                    f"checkpoint {self.folder} does not fit: {unlike[0]} is {there} in it and {here} in this run",
                    "a run goes on with the network, objective and optimizer it began with",
                    "give the run's own settings, or another run_dir",
                )
        with together(), _refusal_to_read(self.folder):
            read_tensors(self.folder, self._metadata, tensors, alone=False)

    def tensors(self, prefix: str = "") -> dict[str, Tensor]:
        """Whole tensors by name on the CPU, for this process alone; others than those under the prefix are not read."""
        found = {
            name: torch.empty(shape, dtype=dtype)
            for name, (shape, dtype) in self.entries().items()
            if name.startswith(prefix)
        }
        with _refusal_to_read(self.folder):
            read_tensors(self.folder, self._metadata, found, alone=True)
        return found

    @cached_property
    def _metadata(self) -> Metadata:
        with _refusal_to_read(self.folder):
            return read_metadata(self.folder)


def _nothing() -> None:
    """Any process may publish."""


class CheckpointStore:
    """The checkpoints of one run. The ranks of one run write; any process may read.

    Args:
        folder: where they lie, the same for all ranks; made by the first ``save``.
        keep: how many of the newest stay, at least 2: the newest may turn out damaged.
        keep_every_steps: checkpoints of steps divisible by this stay as well; None keeps no others.
        may_publish: called on rank 0 before drafts of others are removed, and again right before a checkpoint is
            published; it raises a UserError when the run belongs to another process by now.
    """

    def __init__(
        self,
        folder: Path,
        keep: int = 2,
        keep_every_steps: int | None = None,
        may_publish: Callable[[], None] = _nothing,
    ) -> None:
        if keep < 2:
            raise UserError(
                f"checkpoint.keep={keep}",
                "the newest checkpoint may turn out damaged, so two are kept",
                "use 2 or more",
            )
        if keep_every_steps is not None and keep_every_steps < 1:
            raise UserError(
                f"checkpoint.keep_every_steps={keep_every_steps}", "it counts steps", "use 1 or more, or null"
            )
        self._folder = Path(folder)
        self._keep = keep
        self._keep_every_steps = keep_every_steps
        self._may_publish = may_publish
        self._damaged: set[int] = set()

    def save(self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> Path:
        """Write a checkpoint, publish it, then let older ones go; all ranks together. Returns its folder.

        A valid checkpoint of the same step with the same content is kept as it is; with other content it is replaced; a
        damaged one is renamed aside.

        Args:
            step: steps taken.
            tensors: by name, any dtype, shape and device; shared and strided memory is fine. A DTensor's part is
                written by the rank that holds it; a plain tensor must be equal on all ranks, and one of them writes it.
            state: what JSON can hold, equal on all ranks.

        Raises:
            UserError: on all ranks, if the disk of any is full or cannot be written, or the run belongs to another
                process; the former checkpoints are untouched then.
        """
        target = self._folder / f"step-{step:08d}"
        draft = self._folder / f"{target.name}.tmp-{of_first_rank(os.urandom(8).hex())}"
        try:
            _on_first_rank(lambda: self._begin(draft, target))
            with together(), _refusal_to_write(target):
                own = {name: sealed(draft / name) for name in write_tensors(draft, tensors)}
            files = {name: seal for part in gather_objects(own) for name, seal in part.items()}
            manifest = manifest_bytes(
                {"format": FORMAT, "step": step, "world_size": world_size(), "files": files, "state": dict(state)}
            )
            _on_first_rank(lambda: self._finish(draft, target, step, manifest))
        except BaseException:
            if rank() == 0:
                shutil.rmtree(draft, ignore_errors=True)
            raise
        self._damaged.discard(step)
        return target

    def is_empty(self) -> bool:
        """Whether no checkpoint was ever published here; none is verified, and a save that failed leaves none."""
        return not _on_first_rank(self._steps)

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint that verifies, or None where none was ever saved; all ranks together.

        Damaged ones are named on stderr, in one line together with what is taken instead.

        Raises:
            UserError: there are checkpoints, and all are damaged; or one is of another format.
        """
        faults: list[str] = []
        for step in sorted(_on_first_rank(self._steps), reverse=True):
            folder = self._folder / f"step-{step:08d}"
            try:
                body = _verify_together(folder, step)
            except Damaged as fault:
                faults.append(f"{folder} is damaged ({fault})")
                self._damaged.add(step)
                continue
            if faults and rank() == 0:
                print(f"seer: {'; '.join(faults)}: going on from {folder.name}", file=sys.stderr, flush=True)
            return Checkpoint(step, folder, body["state"])
        with together():
            if faults:
                raise UserError(
                    "; ".join(faults),
                    "a run goes on from a checkpoint that is whole, and there is none",
                    f"bring back a copy, or delete {self._folder} to start anew",
                )
        return None

    def newest_state(self) -> dict[str, Any]:
        """The JSON state of the newest checkpoint whose manifest is as it was written; its tensors are not looked at.

        For this process alone, and without a word on damaged ones. Empty where none was ever saved.

        Raises:
            UserError: the folder cannot be read, or the checkpoint is of another format.
        """
        for step in sorted(self._steps(), reverse=True):
            with contextlib.suppress(Damaged):  # a living run may just have removed it
                state: dict[str, Any] = read_manifest(self._folder / f"step-{step:08d}", step)["state"]
                return state
        return {}

    def _steps(self) -> list[int]:
        try:
            names = os.listdir(self._folder)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise UserError(
                f"{self._folder} cannot be read ({error.strerror})", "the run's checkpoints lie there", "check it"
            ) from None
        return [int(match[1]) for name in names if (match := _FOLDER.fullmatch(name))]

    def _begin(self, draft: Path, target: Path) -> None:
        with _refusal_to_write(target):
            self._may_publish()
            self._folder.mkdir(parents=True, exist_ok=True)
            # What killed processes left unfinished; only one run writes here at a time.
            for place in self._folder.glob("step-*.tmp-*"):
                shutil.rmtree(place, ignore_errors=True)
            draft.mkdir()

    def _finish(self, draft: Path, target: Path, step: int, manifest: bytes) -> None:
        with _refusal_to_write(target):
            (draft / MANIFEST).write_bytes(manifest)
            sync_file(draft / MANIFEST)
            sync_folder(draft)
            self._publish(draft, target, step, manifest)
            write_atomically(self._folder / "latest", f"{target.name}\n".encode())
            self._prune(published=step)

    def _publish(self, draft: Path, target: Path, step: int, manifest: bytes) -> None:
        former_is_whole = target.exists() and _is_whole(target, step)
        self._may_publish()
        if former_is_whole and (target / MANIFEST).read_bytes() == manifest:
            shutil.rmtree(draft)
            return
        if former_is_whole:
            # Two renames: a kill between them leaves the checkpoint before this one as the newest.
            os.rename(target, replaced := target.with_name(f"{target.name}.tmp-replaced"))
        elif target.exists():
            os.rename(target, _free_name(target, "damaged"))
        os.rename(draft, target)
        sync_folder(self._folder)
        if former_is_whole:
            shutil.rmtree(replaced)

    def _prune(self, published: int) -> None:
        whole = sorted(step for step in self._steps() if step not in self._damaged or step == published)
        for step in whole[: -self._keep]:
            if self._keep_every_steps is None or step % self._keep_every_steps:
                place = self._folder / f"step-{step:08d}"
                # Renamed first, so that a kill in the middle of removing leaves nothing that looks damaged.
                doomed = place.with_name(f"{place.name}.tmp-removed")
                os.rename(place, doomed)
                shutil.rmtree(doomed)


def _on_first_rank(action: Callable[[], _T]) -> _T:
    """What an action gives on rank 0, on all ranks; a user's error that it raises, too."""
    result = None
    with together():
        if rank() == 0:
            result = action()
    return cast(_T, of_first_rank(result))


def _verify_together(folder: Path, step: int) -> dict[str, Any]:
    """The manifest of a checkpoint of which every byte is as it was written; each rank reads some of the files."""
    body, fault = _on_first_rank(lambda: _manifest_or_fault(folder, step))
    if fault is None:
        part = sorted(body["files"])[rank() :: world_size()]
        faults = gather_objects(fault_of_files(folder, body["files"], part))
        fault = next((found for found in faults if found is not None), None)
    if fault is not None:
        raise Damaged(fault)
    return body


def _manifest_or_fault(folder: Path, step: int) -> tuple[dict[str, Any], str | None]:
    try:
        return read_manifest(folder, step), None
    except Damaged as fault:
        return {}, str(fault)


def _is_whole(folder: Path, step: int) -> bool:
    """As this process alone sees it."""
    body, fault = _manifest_or_fault(folder, step)
    return fault is None and fault_of_files(folder, body["files"], body["files"]) is None


def _in_words(entry: tuple[torch.Size, torch.dtype] | None) -> str:
    return "missing" if entry is None else f"{str(entry[1]).removeprefix('torch.')} {tuple(entry[0])}"


@contextlib.contextmanager
def _refusal_to_write(place: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise cannot_write(place, error) from None


@contextlib.contextmanager
def _refusal_to_read(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{folder} cannot be read ({error.strerror or error})",
            "it was whole a moment ago; a living run may have removed it for a newer one",
            "give the same command again",
        ) from None


def _free_name(target: Path, word: str) -> Path:
    number = 0
    while (place := target.with_name(f"{target.name}.{word}-{number}")).exists():
        number += 1
    return place

"""Checkpoints on disk: published by one rename, verified before anything of them is used, never unpickled.

    checkpoints/
      step-00001200/manifest.json        format, step, size and SHA-256 of every other file, state; its own SHA-256
      step-00001200/state.safetensors    the tensors
      latest                             name of the newest folder, moved last; for people and scripts

A checkpoint is written into a temporary folder, flushed to the disk, and renamed; older ones go only after that. So at
every moment, whatever is killed, the newest folder that verifies is a whole checkpoint, and ``newest`` takes that one.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from seer.errors import UserError
from seer.files import cannot_write, sync_file, sync_folder, write_atomically

_FORMAT = 1
_MANIFEST = "manifest.json"
_TENSORS = "state.safetensors"
_FOLDER = re.compile(r"step-(\d{8,})")


class _Damaged(Exception):
    """What is wrong with a checkpoint."""


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

    def tensors(self, device: str | torch.device = "cpu") -> dict[str, Tensor]:
        """All tensors by name, with the shapes and dtypes that were saved."""
        return load_file(self.folder / _TENSORS, device=str(device))


class CheckpointStore:
    """The checkpoints of one run. One process writes; any may read.

    Args:
        folder: where they lie; made by the first ``save``.
        keep: how many of the newest stay, at least 2: the newest may turn out damaged.
        keep_every_steps: checkpoints of steps divisible by this stay as well; None keeps no others.
    """

    def __init__(self, folder: Path, keep: int = 2, keep_every_steps: int | None = None) -> None:
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
        self._damaged: set[int] = set()

    def save(self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> Path:
        """Write a checkpoint, publish it, then let older ones go. Returns its folder.

        A valid checkpoint of the same step with the same content is kept as it is; with other content it is replaced; a
        damaged one is renamed aside.

        Args:
            step: steps taken.
            tensors: by name, any dtype, shape and device; shared and strided memory is fine.
            state: what JSON can hold.

        Raises:
            UserError: the disk is full or cannot be written; the former checkpoints are untouched then.
        """
        target = self._folder / f"step-{step:08d}"
        draft = self._folder / f"{target.name}.tmp-{os.getpid()}"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._sweep()
            draft.mkdir()
            _write(draft, step, tensors, state)
            self._publish(draft, target)
            write_atomically(self._folder / "latest", f"{target.name}\n".encode())
            self._damaged.discard(step)
            self._prune()
        except OSError as error:
            shutil.rmtree(draft, ignore_errors=True)
            raise cannot_write(target, error) from None
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            raise
        return target

    def is_empty(self) -> bool:
        """Whether no checkpoint was ever published here; none is verified, and a save that failed leaves none."""
        return not self._steps()

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint that verifies, or None where none was ever saved.

        Damaged ones are named on stderr, in one line together with what is taken instead.

        Raises:
            UserError: there are checkpoints, and all are damaged.
        """
        faults: list[str] = []
        for step in sorted(self._steps(), reverse=True):
            folder = self._folder / f"step-{step:08d}"
            try:
                manifest = _verify(folder, step)
            except _Damaged as fault:
                faults.append(f"{folder} is damaged ({fault})")
                self._damaged.add(step)
                continue
            if faults:
                print(f"seer: {'; '.join(faults)}: going on from {folder.name}", file=sys.stderr, flush=True)
            return Checkpoint(step, folder, manifest["state"])
        if faults:
            raise UserError(
                "; ".join(faults),
                "a run goes on from a checkpoint that is whole, and there is none",
                f"bring back a copy, or delete {self._folder} to start anew",
            )
        return None

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

    def _sweep(self) -> None:
        """Remove what killed processes left unfinished; only one process writes here at a time."""
        for place in self._folder.glob("step-*.tmp-*"):
            shutil.rmtree(place, ignore_errors=True)

    def _publish(self, draft: Path, target: Path) -> None:
        if target.exists():
            try:
                _verify(target, _step_of(target))
            except _Damaged:
                os.rename(target, _free_name(target, "damaged"))
            else:
                if (target / _MANIFEST).read_bytes() == (draft / _MANIFEST).read_bytes():
                    shutil.rmtree(draft)
                    return
                # Two renames: a kill between them leaves the checkpoint before this one as the newest.
                replaced = target.with_name(f"{target.name}.tmp-replaced")
                os.rename(target, replaced)
                os.rename(draft, target)
                sync_folder(self._folder)
                shutil.rmtree(replaced)
                return
        os.rename(draft, target)
        sync_folder(self._folder)

    def _prune(self) -> None:
        whole = sorted(step for step in self._steps() if step not in self._damaged)
        for step in whole[: -self._keep]:
            if self._keep_every_steps is None or step % self._keep_every_steps:
                place = self._folder / f"step-{step:08d}"
                # Renamed first, so that a kill in the middle of removing leaves nothing that looks damaged.
                doomed = place.with_name(f"{place.name}.tmp-removed")
                os.rename(place, doomed)
                shutil.rmtree(doomed)


def _write(folder: Path, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    file = folder / _TENSORS
    try:
        save_file(_separate(tensors), file)
    except SafetensorError as error:
        raise _os_error(error) from None
    sync_file(file)
    files = {file.name: {"bytes": file.stat().st_size, "sha256": _sha256(file)}}
    body = {"format": _FORMAT, "step": step, "files": files, "state": dict(state)}
    manifest = folder / _MANIFEST
    manifest.write_bytes(_manifest_bytes(body))
    sync_file(manifest)
    sync_folder(folder)


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU, contiguous, each with memory of its own (safetensors refuses views of shared memory)."""
    separate: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        plain = tensor.detach().to("cpu").contiguous()
        storage = plain.untyped_storage()
        if storage.nbytes() != plain.nbytes or storage.data_ptr() in seen:
            plain = plain.clone(memory_format=torch.contiguous_format)
        seen.add(plain.untyped_storage().data_ptr())
        separate[name] = plain
    return separate


def _os_error(error: SafetensorError) -> Exception:
    """The operating system's error inside safetensors' own, which carries it as words only."""
    code = re.search(r"os error (\d+)", str(error))
    return OSError(int(code[1]), os.strerror(int(code[1]))) if code else OSError(errno.EIO, str(error))


def _manifest_bytes(body: Mapping[str, Any]) -> bytes:
    """The manifest: its body and the SHA-256 of it. The same body gives the same bytes."""
    digest = hashlib.sha256(json.dumps(body, sort_keys=True, allow_nan=False).encode()).hexdigest()
    return (json.dumps({"sha256": digest, **body}, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


def _verify(folder: Path, step: int) -> dict[str, Any]:
    """The manifest of a checkpoint of which every byte is as it was written."""
    try:
        raw = (folder / _MANIFEST).read_bytes()
        manifest = json.loads(raw)
    except FileNotFoundError:
        raise _Damaged(f"{_MANIFEST} is missing") from None
    except OSError as error:
        raise _Damaged(f"{_MANIFEST} cannot be read, {error.strerror}") from None
    except ValueError:
        raise _Damaged(f"{_MANIFEST} is not JSON") from None
    body = {key: value for key, value in manifest.items() if key != "sha256"} if isinstance(manifest, dict) else {}
    # Written again it must give the same bytes: this sees what the digest of the values does not, such as white space.
    if raw != _manifest_bytes(body):
        raise _Damaged(f"{_MANIFEST} was changed")
    if body.get("format") != _FORMAT:
        raise UserError(
            f"{folder} has format {body.get('format')}",
            f"this seer reads format {_FORMAT}",
            "go on with the version of seer that wrote it",
        )
    if body["step"] != step:
        raise _Damaged(f"{_MANIFEST} is of step {body['step']}")
    for name, known in body["files"].items():
        _verify_file(folder / name, known)
    return body


def _verify_file(file: Path, known: Mapping[str, Any]) -> None:
    try:
        size = file.stat().st_size
        if size != known["bytes"]:
            raise _Damaged(f"{file.name} has {size} bytes instead of {known['bytes']}")
        if _sha256(file) != known["sha256"]:
            raise _Damaged(f"{file.name} has another SHA-256 than when it was written")
    except OSError as error:
        raise _Damaged(f"{file.name} cannot be read, {error.strerror}") from None


def _sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _free_name(target: Path, word: str) -> Path:
    number = 0
    while (place := target.with_name(f"{target.name}.{word}-{number}")).exists():
        number += 1
    return place

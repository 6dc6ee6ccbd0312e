"""torch's distributed checkpoint (DCP): tensors, whole or sharded over ranks, in a folder and back on any ranks.

The only module that knows DCP. A folder holds a file a rank (archives of torch.save one after the other, read with
``weights_only``) and ``.metadata``, which says what lies where and is a pickle: DCP's own reader runs whatever such a
file names, so here it is read through a list of what may occur in it. torch's own tools read the folder as well.
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from seer.distributed import rank, world_size
from seer.errors import UserError

METADATA = ".metadata"

_METADATA_NAMES = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    # Not BytesStorageMetadata: what it announces is unpickled by DCP without any restriction.
    *(
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    ),
}


def write_tensors(folder: Path, tensors: Mapping[str, Tensor]) -> list[str]:
    """Write tensors into an empty folder; all ranks together, under ``together``. The files that this rank wrote: none
    where another rank could not.

    A DTensor's part is written by the rank that holds it, and what several ranks hold by one of them: plain tensors,
    which must be equal on all ranks, and copies of shards. Nothing is flushed to the disk.

    Raises:
        OSError: on the ranks that could not write.
    """
    try:
        with _one_process_may_be_meant():
            save(
                dict(tensors),
                storage_writer=_Writer(folder, sync_files=False, overwrite=False),
                planner=DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
                no_dist=world_size() == 1,
            )
    except CheckpointException as error:
        _raise_own(error, rank())
        return []
    own = [name for name in os.listdir(folder) if name.startswith(f"__{rank()}_")]
    return sorted(own) + ([METADATA] if rank() == 0 else [])


def read_metadata(folder: Path) -> Metadata:
    """What lies where in the folder; nothing that the file names is run.

    Raises:
        OSError: it cannot be read.
        UserError: it holds something else than the description of tensors.
    """
    raw = (folder / METADATA).read_bytes()
    try:
        found = _Unpickler(io.BytesIO(raw)).load()
        if not _describes_tensors(found):
            raise pickle.UnpicklingError("it describes something else than tensors of this folder")
    except Exception as error:  # bytes that are no pickle of ours raise nearly anything
        raise _foreign(folder / METADATA, str(error)) from None
    assert isinstance(found, Metadata)
    return found


def read_tensors(folder: Path, metadata: Metadata, tensors: Mapping[str, Tensor], *, alone: bool) -> None:
    """Fill tensors in place from a folder; names, shapes and dtypes must be checked before, since DCP casts silently.

    Args:
        folder: where they lie.
        metadata: of the folder, from ``read_metadata``.
        tensors: by name, plain or DTensors of any mesh and placements.
        alone: by this process for itself; else all ranks together, under ``together``.

    Raises:
        OSError: on the ranks that could not read.
        UserError: on all ranks, if a file holds something else than tensors.
    """
    try:
        with _one_process_may_be_meant():
            load(
                dict(tensors),
                storage_reader=_Reader(folder, metadata),
                planner=DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
                no_dist=alone or world_size() == 1,
            )
    except CheckpointException as error:
        if any(isinstance(failure, pickle.UnpicklingError) for failure, _ in error.failures.values()):
            raise _foreign(folder, "something else than tensors is stored in it") from None
        _raise_own(error, 0 if alone else rank())


class _Writer(FileSystemWriter):
    def storage_meta(self) -> StorageMeta:
        # DCP's own holds the temporary folder and a random number: the same content would not give the same bytes.
        return StorageMeta()

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        try:
            return super().write_data(plan, planner)
        except Exception as error:
            # torch.save covers the system's error by one of its own, and only the outermost reaches the other ranks.
            raise _system_error(error) or error from None


class _Reader(FileSystemReader):
    def __init__(self, folder: Path, metadata: Metadata) -> None:
        super().__init__(folder)
        self._given = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._given


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _METADATA_NAMES:
            return super().find_class(module, name)
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def _describes_tensors(found: object) -> bool:
    """Only tensors, in files of the folder itself, stored as they are."""
    return (
        isinstance(found, Metadata)
        and all(isinstance(entry, TensorStorageMetadata) for entry in found.state_dict_metadata.values())
        and all(
            os.path.basename(place.relative_path) == place.relative_path and not place.transform_descriptors
            for place in found.storage_data.values()
        )
    )


@contextlib.contextmanager
def _one_process_may_be_meant() -> Iterator[None]:
    with warnings.catch_warnings():
        # DCP tells that it works for one process even when it was asked to.
        warnings.filterwarnings("ignore", message="torch.distributed is .*, assuming the intent is to")
        yield


def _system_error(error: BaseException | None) -> OSError | None:
    """The operating system's error among those that led to this one."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def _raise_own(error: CheckpointException, own_rank: int) -> None:
    """What this rank met, if all that ranks met are refusals of their systems; else all that is known, on all ranks.

    DCP's own exception is no ``Exception``; whoever catches those would miss it.
    """
    met = {number: failure for number, (failure, _) in error.failures.items()}
    own = met.get(own_rank)
    if own is not None and not isinstance(own, Exception):
        raise own  # somebody wants this process to end
    if not all(isinstance(failure, OSError) for failure in met.values()):
        raise RuntimeError(str(error)) from None
    if own is not None:
        raise own from None


def _foreign(place: Path, reason: str) -> UserError:
    return UserError(
        f"{place} was not written by seer ({reason})",
        "a checkpoint holds tensors, their names and places, and nothing that could be run",
        "do not use it: bring back a copy, or delete this checkpoint to go on from the one before",
    )

"""Checkpoints of several processes: any number of them reads what any number wrote, and what one meets all are told."""

from __future__ import annotations

import contextlib
import io
import os
import random
import resource
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
from ranks import ranks
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from seer.checkpoint import dcp as dcp_module
from seer.checkpoint import store as store_module
from seer.checkpoint.store import CheckpointStore
from seer.distributed import mesh, rank, world_size
from seer.errors import ToldElsewhere, UserError

CPU = torch.device("cpu")
FLAT = torch.arange(40.0)
WHOLE = {
    "plain": torch.arange(20.0).reshape(4, 5),
    "plain_view": FLAT[3:9],
    "count": torch.tensor(7),
    "three_rows": torch.randn(3, 4, generator=torch.Generator().manual_seed(0)),  # none for the fourth rank
    "one_row": torch.randn(1, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64),
    "no_row": torch.empty(0, 4),
    "queue": torch.arange(2 * 3 * 8 * 4.0).reshape(2, 3, 8, 4),
    "half": torch.arange(10.0).bfloat16(),
    "copied": torch.arange(6),
}
PLACEMENTS = {
    "three_rows": Shard(0),
    "one_row": Shard(0),
    "no_row": Shard(0),
    "queue": Shard(2),
    "half": Shard(0),
    "copied": Replicate(),
}


def given(layout: str, whole: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as strategies hold them: "plain" on each rank, "sharded" over all, or over "pairs" of ranks."""
    if layout == "plain":
        return {name: tensor.clone() for name, tensor in whole.items()}
    over = mesh(CPU, 2 if layout == "pairs" else None)
    return {
        name: distribute_tensor(
            tensor, over, [*([Replicate()] if over.ndim == 2 else []), PLACEMENTS[name]], src_data_rank=None
        )
        if name in PLACEMENTS
        else tensor.clone()
        for name, tensor in whole.items()
    }


def same(tensors: dict[str, Tensor]) -> bool:
    found = {name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor for name, tensor in tensors.items()}
    return found.keys() == WHOLE.keys() and all(
        found[name].dtype == WHOLE[name].dtype and torch.equal(found[name], WHOLE[name]) for name in WHOLE
    )


def save(folder: Path, layout: str, step: int = 1) -> str:
    return str(CheckpointStore(folder).save(step, given(layout, WHOLE), {"n": step}))


def load(folder: Path, layout: str) -> bool:
    found = CheckpointStore(folder).newest()
    assert found is not None and found.state == {"n": 1}
    assert found.entries() == {name: (tensor.shape, tensor.dtype) for name, tensor in WHOLE.items()}
    tensors = given(layout, {name: torch.zeros_like(tensor) for name, tensor in WHOLE.items()})
    found.load_into(tensors)
    return same(tensors)


def on(number: int, function, *args) -> list:
    return [function(*args)] if number == 1 else ranks(number).run(function, *args, timeout=30.0)


@pytest.mark.parametrize(
    ("writers", "written", "readers", "read"),
    [
        (2, "sharded", 1, "plain"),
        (2, "sharded", 2, "plain"),
        (2, "sharded", 4, "sharded"),
        (2, "sharded", 4, "pairs"),
        (4, "sharded", 2, "sharded"),
        (4, "pairs", 2, "plain"),
        (1, "plain", 2, "sharded"),
        (2, "plain", 1, "plain"),
        (2, "plain", 4, "pairs"),
    ],
)
def test_any_ranks_read_what_any_ranks_wrote(tmp_path, writers, written, readers, read):
    assert on(writers, save, tmp_path, written) == [str(tmp_path / "step-00000001")] * writers
    assert on(readers, load, tmp_path, read) == [True] * readers
    assert same(CheckpointStore(tmp_path).newest().tensors())
    files = {f"__{number}_0.distcp" for number in range(writers)}
    assert set(os.listdir(tmp_path / "step-00000001")) == files | {".metadata", "manifest.json"}


def save_copies(folder: Path) -> None:
    copies = {f"copy-{number}": torch.zeros(25_000) for number in range(4)}
    CheckpointStore(folder).save(1, copies, {})


def test_what_all_ranks_hold_is_written_once_and_by_turns(tmp_path):
    ranks(2).run(save_copies, tmp_path)
    sizes = [(tmp_path / "step-00000001" / f"__{number}_0.distcp").stat().st_size for number in range(2)]
    assert all(200_000 < size < 210_000 for size in sizes)


@contextlib.contextmanager
def small_disk(limit: int = 1_500) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def cannot_flush() -> contextlib.AbstractContextManager[object]:
    return mock.patch.object(store_module, "sealed", side_effect=OSError(28, "No space left on device"))


def cannot_be_listed() -> contextlib.AbstractContextManager[object]:
    return mock.patch.object(dcp_module.os, "listdir", side_effect=OSError(5, "Input/output error"))


TROUBLES = {
    "small_disk": "step-00000002 cannot be written (File too large",
    "cannot_flush": "step-00000002 cannot be written (No space left on device",
    "cannot_be_listed": "step-00000002 cannot be written (Input/output error",
    "taken_over": "the run was taken over",
}


def save_with_trouble(folder: Path, trouble: str, where: int) -> tuple[str, str]:
    store = CheckpointStore(folder, may_publish=taken_over if trouble == "taken_over" else lambda: None)
    with contextlib.ExitStack() as stack:
        if trouble in globals() and trouble != "taken_over" and rank() == where:
            stack.enter_context(globals()[trouble]())
        try:
            store.save(2, {"a": torch.zeros(1000), "b": given("sharded", WHOLE)["queue"]}, {})
        except UserError as error:
            return type(error).__name__, str(error)
    return "", ""


def taken_over() -> None:
    raise UserError("the run was taken over", "one process writes", "leave")


@pytest.mark.parametrize("where", [0, 1])
@pytest.mark.parametrize("trouble", TROUBLES)
def test_what_one_rank_cannot_write_all_ranks_leave(tmp_path, trouble, where):
    ranks(2).run(save, tmp_path, "sharded")
    before = sorted(os.listdir(tmp_path))
    told = ranks(2).run(save_with_trouble, tmp_path, trouble, where, timeout=20.0)
    assert [kind for kind, _ in told] == ["UserError", "ToldElsewhere"]  # so that it is printed once
    assert all(TROUBLES[trouble] in said for _, said in told)
    assert sorted(os.listdir(tmp_path)) == before
    assert ranks(2).run(load, tmp_path, "sharded") == [True, True]


def save_with_bug(folder: Path) -> str:
    def broken(writer, plan, planner):
        raise ZeroDivisionError("a bug")

    with contextlib.ExitStack() as stack:
        if rank() == 1:
            stack.enter_context(mock.patch.object(dcp_module._Writer, "write_data", broken))
        try:
            CheckpointStore(folder).save(2, WHOLE, {})
        except RuntimeError as error:
            return str(error)
    return ""


def test_a_bug_on_one_rank_is_told_on_all(tmp_path):
    assert all("(RANK 1)" in said and "a bug" in said for said in ranks(2).run(save_with_bug, tmp_path, timeout=20.0))
    assert os.listdir(tmp_path) == []


def newest(folder: Path) -> tuple[int, str]:
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        found = CheckpointStore(folder).newest()
    return found.step, said.getvalue()


def test_damage_in_any_file_is_seen_by_all_and_told_once(tmp_path):
    for step in (1, 2):
        ranks(2).run(save, tmp_path, "sharded", step)
    folder, generator = tmp_path / "step-00000002", random.Random(0)
    for name in sorted(os.listdir(folder)):
        good = (folder / name).read_bytes()
        for place in (0, len(good) - 1, *(generator.randrange(len(good)) for _ in range(6))):
            bad = bytearray(good)
            bad[place] ^= 1 << generator.randrange(8)
            (folder / name).write_bytes(bad)
            (step, said), (other_step, silence) = ranks(2).run(newest, tmp_path)
            assert (step, other_step, silence) == (1, 1, "")
            assert said.count("\n") == 1 and name in said and "going on from step-00000001" in said
        (folder / name).write_bytes(good)
    assert ranks(2).run(newest, tmp_path) == [(2, ""), (2, "")]


def refused(folder: Path) -> list[str]:
    kinds = []
    for action in (
        lambda: CheckpointStore(folder / "damaged").newest(),
        lambda: CheckpointStore(folder / "format").newest(),
        lambda: load_other_on_rank_1(folder / "whole"),
        lambda: load_without_file(folder / "whole"),
    ):
        try:
            action()
        except ToldElsewhere:
            kinds.append("elsewhere")
        except UserError as error:
            kinds.append(error.what)
    return kinds


def load_other_on_rank_1(folder: Path) -> None:
    tensors = given("plain", WHOLE)
    if rank() == 1:
        tensors["plain"] = tensors["plain"].double()
    CheckpointStore(folder).newest().load_into(tensors)


def load_without_file(folder: Path) -> None:
    found = CheckpointStore(folder).newest()
    found.entries()
    torch.distributed.barrier()
    if rank() == 0:
        (found.folder / "__1_0.distcp").unlink()
    torch.distributed.barrier()
    found.load_into(given("plain", WHOLE))


def test_what_cannot_be_read_is_told_once(tmp_path, monkeypatch):
    for name in ("damaged", "format", "whole"):
        ranks(2).run(save, tmp_path / name, "sharded")
    (tmp_path / "damaged" / "step-00000001" / "__1_0.distcp").write_bytes(b"")
    monkeypatch.setattr(store_module, "FORMAT", 1)
    CheckpointStore(tmp_path / "format").save(1, {}, {})
    first, second = ranks(2).run(refused, tmp_path, timeout=20.0)
    assert "__1_0.distcp has 0 bytes" in first[0] and "has format 1" in first[1]
    assert "does not fit: plain is float32 (4, 5) in it and float64 (4, 5) in this run" in first[2]
    assert "step-00000001 cannot be read (No such file" in first[3]
    assert second == ["elsewhere"] * 4
    assert second == ["elsewhere"] * 4


def read_on_last_rank(folder: Path) -> bool:
    found = CheckpointStore(folder).newest()
    return rank() != world_size() - 1 or found.tensors("que").keys() == {"queue"}


def test_one_rank_reads_alone(tmp_path):
    ranks(2).run(save, tmp_path, "sharded")
    assert ranks(2).run(read_on_last_rank, tmp_path, timeout=20.0) == [True, True]


def is_empty(folder: Path) -> bool:
    return CheckpointStore(folder).is_empty()


def test_empty_is_empty_for_all(tmp_path):
    assert ranks(2).run(is_empty, tmp_path / "none") == [True, True]
    ranks(2).run(save, tmp_path, "plain")
    assert ranks(2).run(is_empty, tmp_path) == [False, False]

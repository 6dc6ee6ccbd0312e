"""Checkpoints: whole or not there, never silently wrong."""

import os
import random
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors import SafetensorError

from seer.checkpoint import store as store_module
from seer.checkpoint.store import CheckpointStore
from seer.errors import UserError

STATE = {"step": 7, "batch_index": 9, "note": "ü", "share": 0.1}


def tensors(value: float = 1.0) -> dict[str, torch.Tensor]:
    flat = torch.arange(12.0)
    image = torch.arange(24.0).reshape(1, 2, 3, 4)
    return {
        "model/weight": torch.full((3, 4), value),
        "model/half": torch.full((5,), value, dtype=torch.bfloat16),
        "model/double": torch.tensor(value, dtype=torch.float64),
        "model/count": torch.tensor(3),
        "model/mask": torch.tensor([True, False]),
        "model/empty": torch.empty(0, 4),
        "model/view_a": flat[:4],
        "model/view_b": flat[4:],
        "model/same": flat,
        "model/channels_last": image.contiguous(memory_format=torch.channels_last),
        "model/strided": image[..., ::2],
    }


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


def steps(folder) -> list[int]:
    return sorted(int(name[5:]) for name in os.listdir(folder) if re.fullmatch(r"step-\d+", name))


def test_everything_comes_back(tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints")
    assert store.newest() is None
    folder = store.save(1200, tensors(), STATE)
    assert folder == tmp_path / "checkpoints" / "step-00001200"
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-00001200\n"
    found = CheckpointStore(tmp_path / "checkpoints").newest()
    assert (found.step, found.state, found.folder) == (1200, STATE, folder)
    assert equal(found.tensors(), tensors())


def test_what_stays(tmp_path):
    store = CheckpointStore(tmp_path, keep=2, keep_every_steps=30)
    for step in range(10, 101, 10):
        store.save(step, tensors(), {})
    assert steps(tmp_path) == [30, 60, 90, 100]
    assert sorted(os.listdir(tmp_path)) == ["latest"] + [f"step-{step:08d}" for step in (30, 60, 90, 100)]


@pytest.mark.parametrize("options", [{"keep": 1}, {"keep_every_steps": 0}])
def test_settings_that_lose_runs_are_refused(tmp_path, options):
    with pytest.raises(UserError):
        CheckpointStore(tmp_path, **options)


def test_any_flipped_byte_is_seen_and_the_older_one_taken(tmp_path, capsys):
    store = CheckpointStore(tmp_path)
    store.save(1, {"a": torch.arange(6.0)}, {"n": 1})
    newest = store.save(2, {"a": torch.arange(6.0) + 1}, {"n": 22})
    generator = random.Random(0)
    for name in os.listdir(newest):
        good = (newest / name).read_bytes()
        for place in range(len(good)):
            bad = bytearray(good)
            bad[place] ^= 1 << generator.randrange(8)
            (newest / name).write_bytes(bad)
            found = store.newest()
            assert found.step == 1, f"byte {place} of {name}"
            lines = capsys.readouterr().err.splitlines()
            assert len(lines) == 1
            assert str(newest) in lines[0] and "going on from step-00000001" in lines[0]
        (newest / name).write_bytes(good)
    assert store.newest().step == 2


@pytest.mark.parametrize("name", ["manifest.json", "state.safetensors"])
@pytest.mark.parametrize("damage", ["cut", "longer", "gone"])
def test_files_cut_short_or_gone(tmp_path, capsys, name, damage):
    store = CheckpointStore(tmp_path)
    store.save(1, tensors(), {})
    file = store.save(2, tensors(), {}) / name
    data = file.read_bytes()
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(data[:-1] if damage == "cut" else data + b" ")
    assert store.newest().step == 1
    assert name in capsys.readouterr().err


def test_manifest_of_another_step(tmp_path, capsys):
    store = CheckpointStore(tmp_path)
    store.save(1, tensors(), {})
    os.rename(tmp_path / "step-00000001", tmp_path / "step-00000005")
    store.save(2, tensors(), {})
    assert store.newest().step == 2
    assert "is of step 1" in capsys.readouterr().err


def test_nothing_whole_is_not_a_fresh_start(tmp_path):
    store = CheckpointStore(tmp_path)
    for step in (1, 2):
        (store.save(step, tensors(), {}) / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match=r"step-00000002 is damaged.*step-00000001 is damaged.*delete"):
        store.newest()


def test_a_later_format_is_not_called_damaged(tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "_FORMAT", 2)
    CheckpointStore(tmp_path).save(1, tensors(), {})
    monkeypatch.undo()
    with pytest.raises(UserError, match="format 2"):
        CheckpointStore(tmp_path).newest()


def test_damaged_ones_do_not_push_out_whole_ones(tmp_path):
    store = CheckpointStore(tmp_path, keep=2)
    store.save(1, tensors(), {})
    (store.save(3, tensors(), {}) / "manifest.json").write_text("{}")
    assert store.newest().step == 1
    store.save(2, tensors(), {})
    assert steps(tmp_path) == [1, 2, 3]


def test_same_step_again(tmp_path):
    store = CheckpointStore(tmp_path)
    folder = store.save(1, tensors(), {"n": 1})
    inode = folder.stat().st_ino
    store.save(1, tensors(), {"n": 1})
    assert folder.stat().st_ino == inode  # the same content: kept
    store.save(1, tensors(2.0), {"n": 2})
    assert store.newest().state == {"n": 2} and equal(store.newest().tensors(), tensors(2.0))
    (folder / "state.safetensors").write_bytes(b"")
    store.save(1, tensors(3.0), {"n": 3})
    assert store.newest().state == {"n": 3}
    assert sorted(os.listdir(tmp_path)) == ["latest", "step-00000001", "step-00000001.damaged-0"]


def test_latest_moves_last(tmp_path, monkeypatch):
    store = CheckpointStore(tmp_path)
    store.save(1, tensors(), {})
    seen = []

    def look(file, data):
        seen.append((file.name, data, store.newest().step, (tmp_path / "latest").read_text()))

    monkeypatch.setattr(store_module, "write_atomically", look)
    store.save(2, tensors(), {})
    assert seen == [("latest", b"step-00000002\n", 2, "step-00000001\n")]


@pytest.mark.parametrize(
    "error", [SafetensorError("I/O error: No space left on device (os error 28)"), OSError(28, "full")]
)
def test_full_disk_keeps_what_is_there(tmp_path, monkeypatch, error):
    store = CheckpointStore(tmp_path)
    store.save(1, tensors(), {"n": 1})
    before = sorted(os.listdir(tmp_path))

    def fail(separate, file):
        file.write_bytes(b"half")
        raise error

    monkeypatch.setattr(store_module, "save_file", fail)
    with pytest.raises(UserError, match=r"step-00000002 cannot be written.*free some space"):
        store.save(2, tensors(), {})
    assert sorted(os.listdir(tmp_path)) == before
    assert store.newest().state == {"n": 1}


def test_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        CheckpointStore(tmp_path / "file").save(1, tensors(), {})


def test_no_pickle(tmp_path):
    folder = CheckpointStore(tmp_path).save(1, tensors(), {})
    assert sorted(os.listdir(folder)) == ["manifest.json", "state.safetensors"]


SAVERS = """
import os, sys, torch
from seer.checkpoint.store import CheckpointStore
torch.set_num_threads(1)
for line in sys.stdin:  # each line asks for one more saver, which saves until it is killed
    child = os.fork()
    if child == 0:
        store = CheckpointStore(sys.argv[1])
        step = store.newest().step
        os.write(1, f"{os.getpid()}\\n".encode())
        while True:
            step += 1
            store.save(step, {"a": torch.full((50_000,), float(step))}, {"n": step})
    os.waitpid(child, 0)
    os.write(1, b"gone\\n")
"""


def test_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path):
    """Killed ten times while saving all the time: the newest is whole, not older than before, and the next goes on."""
    generator = random.Random(1)
    CheckpointStore(tmp_path).save(1, {"a": torch.full((50_000,), 1.0)}, {"n": 1})
    last = 1
    # Forked from one interpreter: importing torch ten times would be most of the test.
    savers = subprocess.Popen(
        [sys.executable, "-c", SAVERS, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    child = 0
    try:
        for _ in range(10):
            savers.stdin.write("\n")
            savers.stdin.flush()
            child = int(savers.stdout.readline())
            time.sleep(generator.uniform(0.005, 0.15))
            os.kill(child, signal.SIGKILL)
            assert savers.stdout.readline() == "gone\n"
            child = 0
            found = CheckpointStore(tmp_path).newest()
            assert found.step >= last
            assert found.state == {"n": found.step}
            assert torch.equal(found.tensors()["a"], torch.full((50_000,), float(found.step)))
            last = found.step
    finally:
        if child:
            os.kill(child, signal.SIGKILL)
        savers.communicate()
    assert last > 1
    CheckpointStore(tmp_path).save(last + 1, tensors(), {})
    assert not [name for name in os.listdir(tmp_path) if ".tmp-" in name]

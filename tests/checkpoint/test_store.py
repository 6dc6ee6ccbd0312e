"""Checkpoints: whole or not there, never silently wrong."""

import contextlib
import io
import json
import os
import pickle
import random
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from seer.checkpoint import dcp as dcp_module
from seer.checkpoint import manifest as manifest_module
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
        # Every byte of what is read as text; the others are under a hash, which cares for none in particular.
        for place in range(0, len(good), 1 if name == "manifest.json" else 9):
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


@pytest.mark.parametrize("name", ["manifest.json", "__0_0.distcp", ".metadata"])
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


def test_the_newest_state_is_that_of_a_whole_manifest_whatever_became_of_the_tensors(tmp_path, capsys):
    store = CheckpointStore(tmp_path / "checkpoints", keep=3)
    assert store.newest_state() == {} and not (tmp_path / "checkpoints").exists()
    for step in (1, 2, 3):
        store.save(step, tensors(), {"n": step})
    (tmp_path / "checkpoints" / "step-00000003" / "manifest.json").write_text("{}")
    (tmp_path / "checkpoints" / "step-00000002" / "__0_0.distcp").unlink()
    assert store.newest_state() == {"n": 2} and capsys.readouterr().err == ""


@pytest.mark.parametrize("number", [1, 3])
def test_another_format_is_not_called_damaged(tmp_path, monkeypatch, number):
    monkeypatch.setattr(store_module, "FORMAT", number)
    CheckpointStore(tmp_path).save(1, tensors(), {})
    monkeypatch.undo()
    with pytest.raises(UserError, match=f"has format {number}: this seer reads format 2; go on with the version"):
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
    (folder / "__0_0.distcp").write_bytes(b"")
    store.save(1, tensors(3.0), {"n": 3})
    assert store.newest().state == {"n": 3}
    assert sorted(os.listdir(tmp_path)) == ["latest", "step-00000001", "step-00000001.damaged-0"]


def test_all_is_on_the_disk_before_it_is_published(tmp_path, monkeypatch):
    happened = []
    fsync, rename = os.fsync, os.rename

    def noted_fsync(descriptor):
        happened.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def noted_rename(source, target):
        happened.append(f"{source} -> {target}")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "rename", noted_rename)
    folder = CheckpointStore(tmp_path).save(1, tensors(), {})
    (published,) = (place for place, what in enumerate(happened) if what.endswith(f" -> {folder}"))
    draft = happened[published].split(" -> ")[0]
    flushed = {what for what in happened[:published] if " -> " not in what}
    assert flushed == {draft, *(f"{draft}/{name}" for name in os.listdir(folder))}
    assert happened[published - 1] == draft and happened[published + 1] == str(tmp_path)


def test_latest_moves_last(tmp_path, monkeypatch):
    store = CheckpointStore(tmp_path)
    store.save(1, tensors(), {})
    seen = []

    def look(file, data):
        seen.append((file.name, data, store.newest().step, (tmp_path / "latest").read_text()))

    monkeypatch.setattr(store_module, "write_atomically", look)
    store.save(2, tensors(), {})
    assert seen == [("latest", b"step-00000002\n", 2, "step-00000001\n")]


def test_full_disk_keeps_what_is_there(tmp_path, monkeypatch):
    store = CheckpointStore(tmp_path)
    store.save(1, tensors(), {"n": 1})
    before = sorted(os.listdir(tmp_path))
    monkeypatch.setattr(dcp_module._Writer, "write_data", _full)
    with pytest.raises(UserError, match=r"step-00000002 cannot be written.*free some space"):
        store.save(2, tensors(), {})
    assert sorted(os.listdir(tmp_path)) == before
    assert store.newest().state == {"n": 1}


def _full(writer, plan, planner):
    (writer.path / "__0_0.distcp").write_bytes(b"half")
    raise OSError(28, "full")


@pytest.mark.parametrize("limit", [0, 100, 5_000, 100_000, 408_000])
def test_system_that_refuses_bytes(tmp_path, limit):
    """A real refusal: in the middle of a tensor, which torch.save covers by an error of its own, or in `.metadata`."""
    store = CheckpointStore(tmp_path)
    store.save(1, tensors(), {"n": 1})
    before = sorted(os.listdir(tmp_path))
    with file_size_limit(limit), pytest.raises(UserError, match="step-00000002 cannot be written"):
        store.save(2, {"a": torch.zeros(1000), "b" * 500_000: torch.zeros(100_000)}, {})
    assert sorted(os.listdir(tmp_path)) == before
    assert store.newest().state == {"n": 1}


@contextlib.contextmanager
def file_size_limit(limit: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        CheckpointStore(tmp_path / "file").save(1, tensors(), {})


def test_a_bug_is_no_mistake_of_the_user(tmp_path, monkeypatch):
    def broken(writer, plan, planner):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(dcp_module._Writer, "write_data", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        CheckpointStore(tmp_path).save(1, tensors(), {})
    assert os.listdir(tmp_path) == []


def test_whoever_lost_the_run_publishes_and_removes_nothing(tmp_path):
    """The second question, right before the rename, is the one that a process meets that was asleep while it wrote."""
    CheckpointStore(tmp_path).save(1, tensors(), {})
    answers = []

    def asked() -> None:
        if answers.pop(0) == "lost":
            raise UserError("the run was taken over", "one process writes", "leave")

    store = CheckpointStore(tmp_path, may_publish=asked)
    (tmp_path / "step-00000009.tmp-another").mkdir()
    before = sorted(os.listdir(tmp_path))
    for said in (["lost"], ["mine", "lost"]):
        answers[:] = said
        for step in (1, 2):
            answers[:] = said
            with pytest.raises(UserError, match="taken over"):
                store.save(step, tensors(2.0), {})
        assert steps(tmp_path) == [1] and equal(store.newest().tensors(), tensors())
        assert sorted(os.listdir(tmp_path)) == (before if said == ["lost"] else ["latest", "step-00000001"])
    answers[:] = ["mine", "mine"]
    store.save(2, tensors(2.0), {})
    assert steps(tmp_path) == [1, 2]


def test_views_are_saved_without_the_memory_they_lie_in(tmp_path):
    flat = torch.arange(1_000_000.0)
    folder = CheckpointStore(tmp_path).save(1, {"a": flat[:10], "b": flat[10:30].view(4, 5)}, {})
    assert sum(file.stat().st_size for file in folder.iterdir()) < 10_000
    found = CheckpointStore(tmp_path).newest().tensors()
    assert torch.equal(found["a"], flat[:10]) and torch.equal(found["b"], flat[10:30].view(4, 5))


def test_only_the_prefix_is_read(tmp_path):
    folder = CheckpointStore(tmp_path).save(1, {"model/a": torch.ones(3), "optim/a": torch.ones(4)}, {})
    found = CheckpointStore(tmp_path).newest()
    assert found.entries() == {"model/a": ((3,), torch.float32), "optim/a": ((4,), torch.float32)}
    assert found.tensors("model/").keys() == {"model/a"} and found.tensors("no") == {}
    (folder / "__0_0.distcp").unlink()
    assert found.tensors("no") == {}
    with pytest.raises(UserError, match="step-00000001 cannot be read"):
        found.tensors("model/")


def test_load_into_fills_views_in_place(tmp_path):
    """Running statistics are views of one buffer and must stay so; strides are the target's own."""
    store = CheckpointStore(tmp_path)
    store.save(1, tensors(2.0), STATE)
    targets = {name: torch.zeros_like(tensor) for name, tensor in tensors().items()}
    flat = torch.zeros(12)
    targets |= {
        "model/view_a": flat[:4],
        "model/view_b": flat[4:],
        "model/weight": torch.nn.Parameter(torch.ones(3, 4)),
    }
    targets["model/strided"] = torch.zeros(1, 2, 3, 4)[..., ::2]
    before = {name: tensor.data_ptr() for name, tensor in targets.items()}
    store.newest().load_into(targets)
    assert equal(targets, tensors(2.0)) and torch.equal(flat, torch.arange(12.0))
    assert before == {name: tensor.data_ptr() for name, tensor in targets.items()}


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("b", None, r"does not fit: b is float32 \(2, 3\) in it and missing in this run"),
        ("c", torch.zeros(1), r"does not fit: c is missing in it and float32 \(1,\) in this run"),
        ("a", torch.zeros(6), r"does not fit: a is float32 \(2, 3\) in it and float32 \(6,\) in this run"),
        ("a", torch.zeros(2, 3).double(), r"does not fit: a is float32 \(2, 3\) in it and float64 \(2, 3\) in"),
    ],
)
def test_load_into_casts_and_leaves_out_nothing(tmp_path, name, value, words):
    store = CheckpointStore(tmp_path)
    store.save(1, {"a": torch.ones(2, 3), "b": torch.ones(2, 3)}, {})
    given = {"a": torch.zeros(2, 3), "b": torch.zeros(2, 3), name: value}
    given = {key: tensor for key, tensor in given.items() if tensor is not None}
    with pytest.raises(UserError, match=words):
        store.newest().load_into(given)
    assert not any(tensor.any() for tensor in given.values())


def test_tools_of_torch_read_it(tmp_path):
    folder = CheckpointStore(tmp_path).save(1, tensors(), {})
    found = {name: torch.zeros_like(tensor) for name, tensor in tensors().items()}
    with pytest.warns(UserWarning, match="single process"):
        dcp.load(found, checkpoint_id=folder, no_dist=True)
    assert equal(found, tensors())


class Harm:
    """Pickles as a call that leaves a file."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


def tampered(folder: Path, name: str, data: bytes) -> None:
    """Replace a file and make the manifest agree, as one does who means it."""
    (folder / name).write_bytes(data)
    body = json.loads((folder / "manifest.json").read_bytes())
    del body["sha256"]
    body["files"][name] = manifest_module.sealed(folder / name)
    (folder / "manifest.json").write_bytes(manifest_module.manifest_bytes(body))


def with_other(folder: Path, change) -> bytes:
    metadata = dcp.FileSystemReader(folder).read_metadata()
    return pickle.dumps(change(metadata) or metadata)


def bytes_entry(metadata):
    metadata.state_dict_metadata["a"] = BytesStorageMetadata()  # what DCP unpickles without restriction


def other_entry(metadata):
    metadata.state_dict_metadata["a"] = metadata.storage_meta


def elsewhere(metadata):
    for place in metadata.storage_data.values():
        place.relative_path = "../step-00000001/__0_0.distcp"


def not_metadata(metadata):
    return metadata.storage_meta


def eval_of_torch(metadata):
    class Evil:
        def __reduce__(self):
            return torch.load, ("x",)

    metadata.planner_data = Evil()


@pytest.mark.parametrize("change", [bytes_entry, other_entry, elsewhere, not_metadata, eval_of_torch])
def test_a_crafted_description_is_refused(tmp_path, change):
    store = CheckpointStore(tmp_path)
    folder = store.save(1, {"a": torch.ones(2)}, {})
    tampered(folder, ".metadata", with_other(folder, change))
    found = store.newest()
    assert found.step == 1
    for read in (found.entries, found.tensors, lambda: found.load_into({"a": torch.zeros(2)})):
        with pytest.raises(UserError, match=r"\.metadata was not written by seer .* do not use it"):
            read()


@pytest.mark.parametrize("raw", [b"", b"no pickle", b"\x80\x04."])
def test_a_description_that_is_no_pickle_is_refused(tmp_path, raw):
    store = CheckpointStore(tmp_path)
    tampered(store.save(1, {"a": torch.ones(2)}, {}), ".metadata", raw)
    with pytest.raises(UserError, match=r"\.metadata was not written by seer"):
        store.newest().tensors()


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp"])
def test_nothing_in_a_checkpoint_is_run(tmp_path, name):
    canary, harm = tmp_path / "canary", Harm(tmp_path / "canary")
    store = CheckpointStore(tmp_path / "checkpoints")
    folder = store.save(1, {"a": torch.ones(2)}, {})
    if name == ".metadata":
        crafted = with_other(folder, lambda metadata: setattr(metadata, "planner_data", harm))
    else:
        size = (folder / name).stat().st_size
        file = io.BytesIO()
        torch.save(harm, file)
        crafted = file.getvalue()
        tampered(folder, ".metadata", with_other(folder, lambda metadata: lengthen(metadata, len(crafted))))
        assert size != len(crafted)
    tampered(folder, name, crafted)
    found = store.newest()
    for read in (found.tensors, lambda: found.load_into({"a": torch.zeros(2)})):
        with pytest.raises(UserError, match="was not written by seer"):
            read()
    assert not canary.exists()
    if name == ".metadata":  # the canary sings where nobody takes care
        dcp.FileSystemReader(folder).read_metadata()
        assert canary.exists()


def lengthen(metadata, length: int) -> None:
    for place in metadata.storage_data.values():
        place.length = length


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


MOMENTS = """
import os, signal, sys, torch
from seer.checkpoint.store import CheckpointStore
torch.set_num_threads(1)
folder, countdown = "", 0

def before_each_call(event, words):
    global countdown
    if event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir") or (event == "open" and folder in str(words[0])):
        countdown -= 1
        if countdown == -1:
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(before_each_call)
for line in sys.stdin:  # each line: where to save which step with which value, and before which call to die
    folder, *numbers = line.split()
    step, value, moment = map(int, numbers)
    child = os.fork()
    if child == 0:
        store = CheckpointStore(folder)
        countdown = moment
        store.save(step, {"a": torch.full((1000,), float(value))}, {"n": value})
        os._exit(0)
    os.write(1, b"killed\\n" if os.waitpid(child, 0)[1] == signal.SIGKILL else b"saved\\n")
"""


def test_kill_before_each_call_to_the_file_system(tmp_path, capsys):
    """A save makes some dozens of calls that change files; it is killed before each of them in turn."""
    savers = subprocess.Popen([sys.executable, "-c", MOMENTS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        killed_at_each_call(savers, tmp_path / "new", same_step=False)
        killed_at_each_call(savers, tmp_path / "same", same_step=True)
    finally:
        savers.communicate()
    assert capsys.readouterr().err == ""  # nothing ever looked damaged


def killed_at_each_call(savers: subprocess.Popen[str], folder: Path, *, same_step: bool) -> None:
    store = CheckpointStore(folder)
    older, step, last = 1, 2, 2
    for value in (older, step):
        store.save(value, {"a": torch.full((1000,), float(value))}, {"n": value})
    for moment in range(200):
        value = 1000 + moment
        step += not same_step
        savers.stdin.write(f"{folder} {step} {value} {moment}\n")
        savers.stdin.flush()
        ended = savers.stdout.readline()
        found = CheckpointStore(folder).newest()
        # Between the two renames that replace a checkpoint of the same step, the one before it is the newest.
        assert found.state["n"] in ((last, value, older) if same_step else (last, value))
        assert torch.equal(found.tensors()["a"], torch.full((1000,), float(found.state["n"])))
        assert all(store_module._is_whole(folder / f"step-{other:08d}", other) for other in steps(folder))
        if ended == "saved\n":
            break
        if found.state["n"] == older:
            store.save(step, {"a": torch.full((1000,), float(last))}, {"n": last})
        last = store.newest().state["n"]
    assert ended == "saved\n" and moment > 10
    assert found.state["n"] == value and not [name for name in os.listdir(folder) if ".tmp-" in name]

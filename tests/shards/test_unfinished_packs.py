"""A pack that was killed, and one that another process is writing: neither passes as a whole one."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from image_inputs import folder, tar

from seer.cli.main import main
from seer.errors import UserError
from seer.shard_list import ShardList
from seer.shards.pack import pack

ROOT = Path(__file__).parents[2]
KILLED = """
import os, signal, sys
from pathlib import Path
from seer.shards import pack as module
write, left = module._write_shard, [2]
def dying(shard):
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    left[0] -= 1
    return write(shard)
module._write_shard = dying
module.pack(Path(sys.argv[1]), Path(sys.argv[2]), samples_per_shard=7, workers=1)
"""

SLOW = """
import sys, time
from seer.cli.main import main
from seer.shards import pack as module
read = module.bytes_of
def slowly(images, row):
    time.sleep(0.02)
    return read(images, row)
module.bytes_of = slowly
if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
"""


def slow_pack(tmp_path: Path, workers: int) -> subprocess.Popen[str]:
    """A pack of photos into out that writes its first tars; in a process group of its own."""
    (tmp_path / "slow.py").write_text(SLOW)
    words = ["shards", "pack", str(folder(tmp_path / "photos")), "--out", str(tmp_path / "out"), "--samples", "9"]
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "slow.py"), *words, "--workers", str(workers)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 60
    while not list((tmp_path / "out").glob(".*.tar.*.part")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    return process


@pytest.fixture
def killed(tmp_path: Path) -> Path:
    """Two of six shards: the process was ended by SIGKILL."""
    out = tmp_path / "K" / "big"
    command = [sys.executable, "-c", KILLED, str(folder(tmp_path / "photos")), str(out)]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == -9
    assert len(list(out.glob("*.tar"))) == 2
    return out


def test_the_rest_of_a_killed_pack_is_refused_wherever_shards_are_listed(
    killed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = re.escape(f"{killed} holds a pack that has not ended: ") + r".*seer shards pack .* remove \.packing\.json"
    pattern = f"{killed}/*.tar"
    for words in (
        ["shards", "stats", pattern],
        ["shards", "verify", pattern],
        ["shards", "index", pattern],
        ["shards", "index", pattern, "--index-dir", f"{tmp_path}/indexes"],
        ["shards", "export", pattern, "--wids", f"{tmp_path}/set.json"],
        ["shards", "pack", str(killed), "--out", f"{tmp_path}/new"],
        ["shards", "pack", pattern, "--out", f"{tmp_path}/new"],
        ["shards", "pack", f"{killed}/big-000000.tar", "--out", f"{tmp_path}/new"],
    ):
        assert main(words) == 2
        printed = capsys.readouterr()
        assert printed.out == "" and re.fullmatch(f"seer: {told}.*\n", printed.err), words
    with pytest.raises(UserError, match=told):
        ShardList.open(pattern)
    assert not {"new", "set.json", "indexes"} & {path.name for path in tmp_path.iterdir()}

    (killed / ".packing.json").rename(tmp_path / "kept")
    assert len(ShardList.open(pattern)) == 2
    (tmp_path / "kept").rename(killed / ".packing.json")
    pack(tmp_path / "photos", killed, samples_per_shard=7, workers=1)
    assert len(ShardList.open(pattern)) == 6


def test_a_growing_list_takes_them_when_their_pack_has_ended(
    killed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pack(tmp_path / "photos", tmp_path / "K" / "small", samples_per_shard=30, workers=1)
    before, pattern = len(list((tmp_path / "K" / "small").glob("*.tar"))), f"{tmp_path}/K/*/*.tar"
    for _ in range(2):
        assert len(ShardList.open(pattern, growing=True)) == before
    assert capsys.readouterr().err == f"seer: {killed}: a pack that has not ended; its shards can join later\n"
    for patterns, growing in ((pattern, False), (f"{killed}/*.tar", True)):
        with pytest.raises(UserError, match="holds a pack that has not ended"):
            ShardList.open(patterns, growing=growing)
    pack(tmp_path / "photos", killed, samples_per_shard=7, workers=1)
    assert len(ShardList.open(pattern, growing=True)) == before + 6


def test_of_two_packs_into_one_folder_the_second_is_refused_before_it_touches_anything(tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = slow_pack(tmp_path, 1)
    os.kill(first.pid, signal.SIGSTOP)
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    told = re.escape(f"{out} is being written by another pack (process {first.pid}): ")
    for overwrite in (False, True):
        with pytest.raises(UserError, match=told):
            pack(tmp_path / "photos", out, samples_per_shard=5, workers=1, overwrite=overwrite)
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before
    os.kill(first.pid, signal.SIGCONT)
    printed = first.communicate()
    assert first.returncode == 0 and printed[1] == ""
    pack(tmp_path / "photos", tmp_path / "alone" / "out", samples_per_shard=9, workers=1)
    alone = {path.name: path.read_bytes() for path in (tmp_path / "alone" / "out").iterdir()}
    assert {path.name: path.read_bytes() for path in out.iterdir()} == alone  # nothing of the lock is left


def test_a_lock_goes_with_its_holder_however_that_ends(tmp_path: Path) -> None:
    first = slow_pack(tmp_path, 2)
    first.kill()
    first.communicate()
    assert (tmp_path / "out" / ".packing.lock").exists()
    pack(tmp_path / "photos", tmp_path / "out", samples_per_shard=9, workers=1)
    assert {path.suffix for path in (tmp_path / "out").iterdir()} == {".tar", ".npz", ".json"}
    assert not list((tmp_path / "out").glob(".*"))


def test_where_there_are_no_locks_packs_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(descriptor: int, how: int) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", unknown)
    pack(folder(tmp_path / "photos"), tmp_path / "out", workers=1)
    assert not list((tmp_path / "out").glob(".*"))


def test_what_cannot_be_packed_leaves_no_folder(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no image"):
        pack(tmp_path / "empty", tmp_path / "a" / "b" / "out", workers=1)
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("send", [os.kill, os.killpg])
def test_sigterm_ends_a_pack_as_ctrl_c_does(tmp_path: Path, workers: int, send: Callable[[int, int], None]) -> None:
    """Sent to the process alone, or to its workers as well, as schedulers do."""
    process = slow_pack(tmp_path, workers)
    send(process.pid, signal.SIGTERM)
    out, err = process.communicate()
    assert (process.returncode, out, err) == (130, "", "seer: interrupted\n")
    assert [path.name for path in (tmp_path / "out").glob(".*")] == [".packing.json"]
    pack(tmp_path / "photos", tmp_path / "out", samples_per_shard=9, workers=1)


@pytest.mark.parametrize(
    ("what", "told"),
    [("file", "is a file: "), ("file/out", r"\(Not a directory\): "), ("shut/out", "permissions, or name")],
)
def test_an_output_that_cannot_be_says_why(
    tmp_path: Path, what: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "shut").mkdir(mode=0o555)
    if what.startswith("shut"):  # whoever may write everywhere is told likewise

        def shut(*_: object, **__: object) -> None:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(Path, "mkdir", shut)
    with pytest.raises(UserError, match=re.escape(str(tmp_path / what)) + ".*" + told) as caught:
        pack(folder(tmp_path / "photos") if not what.startswith("shut") else tmp_path, tmp_path / what, workers=1)
    assert "free space" not in str(caught.value)


ADDRESS = "s3://photos/new"


@pytest.mark.parametrize(
    "words",
    [
        ["shards", "pack", "photos", "--out", ADDRESS],
        ["shards", "index", "*.tar", "--index-dir", ADDRESS],
        ["shards", "export", "*.tar", "--wids", f"{ADDRESS}.json"],
        ["shards", "export", "*.tar", "--dali", ADDRESS],
        ["shards", "stats", "*.tar", "--sheet", f"{ADDRESS}.png"],
        ["export", "--run", "run", "--out", f"{ADDRESS}.safetensors"],
        ["evaluate", "knn", "--run", "run", "--train", "*.tar", "--val", "*.tar", "--picture", f"{ADDRESS}.png"],
        ["preview", "data.shards=*.tar", "--out", f"{ADDRESS}.png"],
    ],
)
def test_nothing_is_written_to_an_address(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder(tmp_path / "photos", {"a.jpg": b"jpg"})
    tar(tmp_path / "a.tar", {"a.jpg": b"jpg"})
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and re.fullmatch(rf"seer: {words[-1]} is an address: .* copy it .*\n", printed.err)
    assert sorted(tmp_path.rglob("*")) == before

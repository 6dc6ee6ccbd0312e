"""No code comes out of data, by pickle, by the shell or by Ghostscript, through index, verify, pack and train."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import pytest
from plain_tars import write_tar
from tiny_run import make_images, tiny_config

from seer.cli.main import main
from seer.training import loop


class Canary:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch '{self.path}'",)


@pytest.fixture
def canary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that must not appear; a Ghostscript that would make it comes first in PATH."""
    path = tmp_path / "canary"
    (tmp_path / "bin").mkdir()
    for name in ("gs", "gswin32c", "convert"):
        program = tmp_path / "bin" / name
        program.write_text(f"#!/bin/sh\ntouch '{path}'\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    return path


def hostile_files(canary: Path) -> dict[str, bytes]:
    """Names and contents that some reader somewhere would run."""
    pickled = pickle.dumps(Canary(canary))
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 40\n%%EndComments\n(%pipe%touch canary) (w) file\nshowpage\n"
    return {
        "s0.jpg": eps,
        "s1.png": pickled,
        "s2.pkl": pickled,
        "s3.pth": pickled,
        "s4.pyd": pickled,
        "s4.jpg": pickled,
        "s5.cls": f"__import__('os').system('touch {canary}')".encode(),
        "s6.json": b'{"__reduce__": "os.system"}',
        f"pipe:touch {canary};.jpg": eps,
        f"s7$(touch {canary}).jpg": eps,
        f"s8;touch {canary}|.png": pickled,
        "s9.index": pickled,
    }


def test_the_canary_would_be_seen(canary: Path) -> None:
    pickle.loads(hostile_files(canary)["s2.pkl"])
    assert canary.exists()


def test_nothing_runs(tmp_path: Path, canary: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = sorted(make_images(tmp_path / "images", classes=2, each=16).rglob("*.png"))
    hostile = hostile_files(canary)
    shards = tmp_path / f"pipe:touch {canary.name}"
    good = ((f"good{number:03d}.png", image.read_bytes()) for number, image in enumerate(images))
    write_tar(shards / "a.tar", *good, *hostile.items())
    for name in ("a.tar.index", "a.index", "a.tar.idx", "a.tar.pkl", "wids.pkl"):
        (shards / name).write_bytes(hostile["s2.pkl"])

    assert main(["shards", "index", str(shards / "*.tar")]) == 0
    assert main(["shards", "verify", str(shards / "*.tar")]) == 0
    config = tiny_config(
        tmp_path / "run", "SHARDS", "train.steps=4", "data.max_bad_share=1", "train.global_batch_size=12"
    )
    config.data.shards = [str(shards / "*.tar")]
    assert loop.run(config).result["bad_samples"] > 0
    assert not canary.exists()

    # Lists and indexes of other loaders, of which wids would run the one and unpickle the other.
    listed = {"url": f"pipe:touch '{canary}'", "nsamples": 1}
    (shards / "set.json").write_text(json.dumps({"wids_version": 1, "shardlist": [listed]}))
    assert main(["shards", "index", str(shards / "set.json")]) == 2
    (shards / "a.idx").write_bytes(hostile["s2.pkl"])
    assert main(["shards", "index", str(shards / "a.tar"), "--from-dali"]) == 2
    assert not canary.exists()

    # An index of our own name that is a pickle: refused, and not by way of loading it.
    for index in shards.glob("*.npz"):
        index.write_bytes(hostile["s2.pkl"])
    capsys.readouterr()
    assert main(["shards", "verify", str(shards / "*.tar")]) != 0
    assert not canary.exists()

    folder = tmp_path / "folder"
    folder.mkdir()
    for name, content in hostile.items():
        (folder / name.replace("/", "_")).write_bytes(content)
    for number, image in enumerate(images[:4]):
        (folder / f"good{number}.png").write_bytes(image.read_bytes())
    assert main(["shards", "pack", str(folder), "--out", str(tmp_path / "packed")]) == 0
    assert main(["shards", "verify", str(tmp_path / "packed" / "*.tar")]) == 0
    assert not canary.exists() and not list(tmp_path.rglob("canary*"))

"""What `seer doctor` says of buckets and of the cache: names and never values, one remedy."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from seer.launching import buckets
from seer.launching.buckets import Cache
from seer.launching.machine import Finding

ALL = {"fsspec": "1", "aiohttp": "2", "s3fs": "3", "gcsfs": "4"}
CACHE = Cache(Path("/c"), True, 1, 2 * 10**9, 50 * 10**9, 100 * 10**9, "ext4", None)
SECRET = "CANARY"


@pytest.mark.parametrize(
    ("finding", "level", "words"),
    [
        (
            buckets.clients({}, ["AWS_PROFILE"], []),
            "ok",
            "no clients for s3://, gs:// and https://; pip install 'se",
        ),
        (buckets.clients({"fsspec": "1", "s3fs": "3"}, [], []), "ok", "clients without aiohttp, gcsfs; pip install"),
        (buckets.clients(ALL, [], []), "ok", "fsspec 1, s3fs 3, gcsfs 4; None"),
        (buckets.clients(ALL, ["AWS_PROFILE", "~/.netrc"], []), "ok", "gcsfs 4; set: AWS_PROFILE, ~/.netrc; None"),
        (buckets.clients(ALL, ["A"], [("A is wrong", "do"), ("B", "no")]), "warning", "set: A; A is wrong; do"),
        (buckets.cache(CACHE), "ok", "/c: 1 shard, 2.0 GB of at most 50 GB (data.cache_gb), 100.0 GB free; None"),
        (
            buckets.cache(CACHE._replace(exists=False, shards=0)),
            "ok",
            "/c: empty, at most 50 GB (data.cache_gb), 100.0 GB free",
        ),
        (buckets.cache(CACHE._replace(free=47 * 10**9)), "warning", "less than it may hold; data.cache_gb=49, or name"),
        (buckets.cache(CACHE._replace(free=48 * 10**9)), "ok", "48.0 GB free; None"),
        (buckets.cache(CACHE._replace(exists=False, free=47 * 10**9)), "ok", "47.0 GB free; None"),
        (buckets.cache(CACHE._replace(disk="nfs4")), "warning", "network file system (nfs4); name a folder on a local"),
        (buckets.cache(CACHE._replace(fault="no locks")), "warning", "/c cannot be locked (no locks); name a folder"),
    ],
)
def test_facts_become_findings(finding: Finding, level: str, words: str) -> None:
    assert finding.level == level
    assert words in f"{finding.message}; {finding.remedy}"


def test_names_of_what_is_set(tmp_path: Path) -> None:
    (tmp_path / ".aws").mkdir()
    (tmp_path / ".aws" / "credentials").write_text(SECRET)
    environ = {"AWS_PROFILE": SECRET, "GOOGLE_CLOUD_PROJECT": SECRET, "FSSPEC_S3_ANON": SECRET, "HOME": SECRET}
    names = ["AWS_PROFILE", "FSSPEC_S3_ANON", "GOOGLE_CLOUD_PROJECT", "~/.aws/credentials"]
    assert buckets._set(environ, tmp_path) == names
    assert buckets._set({}, tmp_path / "none") == []


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({}, []),
        ({"AWS_ACCESS_KEY_ID": SECRET, "AWS_SECRET_ACCESS_KEY": SECRET}, []),
        ({"AWS_ACCESS_KEY_ID": SECRET}, ["AWS_ACCESS_KEY_ID without AWS_SECRET_ACCESS_KEY"]),
        ({"AWS_SECRET_ACCESS_KEY": SECRET}, ["AWS_SECRET_ACCESS_KEY without AWS_ACCESS_KEY_ID"]),
        ({"GOOGLE_APPLICATION_CREDENTIALS": f"/{SECRET}"}, ["GOOGLE_APPLICATION_CREDENTIALS names a file that cannot"]),
        ({"GOOGLE_APPLICATION_CREDENTIALS": __file__}, []),
        ({"NETRC": f"/{SECRET}"}, ["NETRC names a file that is not there"]),
    ],
)
def test_faults_of_what_is_set(environ: dict[str, str], words: list[str], tmp_path: Path) -> None:
    found = buckets._faults(environ, tmp_path)
    assert len(found) == len(words)
    for (what, remedy), start in zip(found, words, strict=True):
        assert what.startswith(start) and SECRET not in what + remedy


def test_a_netrc_that_no_client_reads(tmp_path: Path) -> None:
    (tmp_path / ".netrc").write_text(f"machine host login user password {SECRET}\n")
    assert buckets._faults({}, tmp_path) == []
    (tmp_path / ".netrc").write_text(f"machine host {SECRET}\n")
    ((what, remedy),) = buckets._faults({}, tmp_path)
    assert "netrc file cannot be read" in what and SECRET not in what + remedy


def test_the_cache_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "seer" / "shards"
    found = buckets._cache(folder, 7)
    assert (found.exists, found.shards, found.held, found.limit, found.fault) == (False, 0, 0, 7, None)
    assert found.free > 0 and found.disk and not list(tmp_path.iterdir())  # nothing was made
    folder.mkdir(parents=True)
    (folder / "a.shard").write_bytes(bytes(1000))
    (folder / "b.part-host").write_bytes(bytes(500))
    (folder / "needs-host").write_bytes(bytes(9))
    found = buckets._cache(folder, 7)
    assert (found.exists, found.shards, found.held) == (True, 2, 1500)
    assert len(list(folder.iterdir())) == 3

    def refused(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refused)
    assert buckets._cache(folder, 7).fault == "No locks available"


def test_kinds_of_disks(tmp_path: Path) -> None:
    far = f"{tmp_path}/far\\040away"
    lines = ("/dev/a / ext4 rw 0 0", f"h:/x {far} nfs4 rw 0 0", f"m {far}/l lustre rw 0 0")
    (tmp_path / "mounts").write_text("\n".join(lines))
    kinds = {"": "ext4", "far away": "nfs4", "far away/in/it": "nfs4", "far away/l": "lustre", "far": "ext4"}
    for place, kind in kinds.items():
        assert buckets._kind_of_disk(tmp_path / place, tmp_path / "mounts") == kind
    assert buckets._kind_of_disk(tmp_path, tmp_path / "none") == ""


def test_what_a_user_sees(tmp_path: Path) -> None:
    """No value, no network, nothing made."""
    code = (
        "import json, socket, sys, dataclasses; from seer.launching import buckets\n"
        "socket.socket = None\n"
        "print(json.dumps([dataclasses.asdict(one) for one in buckets.look()]))\n"
        "assert not {'torch', 'fsspec', 'gcsfs', 's3fs'} & set(sys.modules)"
    )
    environ = {**os.environ, "HOME": str(tmp_path), "AWS_ACCESS_KEY_ID": SECRET, "XDG_CACHE_HOME": str(tmp_path / "x")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environ, check=False)
    assert done.returncode == 0, done.stderr
    about, cache = json.loads(done.stdout)
    assert "AWS_ACCESS_KEY_ID without" in about["message"] and SECRET not in done.stdout
    assert cache["message"].startswith(f"{tmp_path}/x/seer/shards: empty, at most 50 GB")
    assert list(tmp_path.iterdir()) == []

"""`seer doctor`: one line a finding, an exit code that a script can ask."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from seer.cli.main import main
from seer.launching import buckets, machine
from seer.launching.machine import Finding

FINE = Finding("torch", "ok", "2.13.0")
SLOW = Finding("images", "warning", "Pillow [red]", "install it")
BROKEN = Finding("disk", "problem", "full " + 30 * "of everything ", "free some space")


@pytest.mark.parametrize(("found", "code"), [([FINE, SLOW], 0), ([FINE, BROKEN, SLOW], 1)])
def test_lines_and_exit_code(
    found: list[Finding], code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(machine, "look", lambda folder: found[:1])
    monkeypatch.setattr(buckets, "look", lambda: found[1:])
    assert main(["doctor"]) == code
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(found)
    assert lines[0] == "ok       torch        2.13.0"
    assert lines[-1] == "warning  images       Pillow [red]; install it"
    assert main(["doctor", "--json"]) == code
    assert [one["level"] for one in json.loads(capsys.readouterr().out)] == [one.level for one in found]


def test_this_machine() -> None:
    command = [sys.executable, "-m", "seer", "doctor", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    found = json.loads(done.stdout)
    subjects = {one["subject"] for one in found}
    assert subjects >= {"cores", "torch", "devices", "images", "network", "slurm", "disk", "buckets"}
    assert all(one["remedy"] for one in found if one["level"] != "ok")
    assert done.returncode == int(any(one["level"] == "problem" for one in found)) and done.stderr == ""

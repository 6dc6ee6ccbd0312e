"""What a started process reads, and the exit code that it leaves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from seer.errors import UserError
from seer.launching.entry import leave_status, read_frozen


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00", b"[1, 2]", b"a: [", b""])
def test_what_is_no_frozen_configuration_is_refused(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "config.yaml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match="launch the run again"):
        read_frozen(str(file))


def of_rank(monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    for name, value in {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))


@pytest.mark.parametrize(
    ("told", "wanted"),
    [
        ([(0, 0, None)], (0, None)),
        ([(1, 75, None)], None),  # rank 0 speaks for the run
        ([(0, 75, None), (1, 75, None)], (75, None)),
        ([(1, 2, "a shard is gone"), (0, 75, None)], (2, "a shard is gone")),  # the cause, then who noticed
        ([(0, 75, None), (1, 2, "a shard is gone")], (2, "a shard is gone")),
    ],
)
def test_the_cause_is_what_the_launcher_finds(
    tmp_path: Path,
    told: list[tuple[int, int, str | None]],
    wanted: tuple[int, str | None] | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = tmp_path / "status.json"
    monkeypatch.setenv("SEER_STATUS_FILE", str(file))
    for rank, code, message in told:
        of_rank(monkeypatch, rank)
        leave_status(code, message)
    found = json.loads(file.read_text()) if file.exists() else None
    assert found == (None if wanted is None else {"exit_code": wanted[0], "message": wanted[1]})


def test_without_a_launcher_nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SEER_STATUS_FILE", raising=False)
    leave_status(0, None)

"""Lines of JSON: whole, valid, cut back to where a run goes on."""

import json
import os

import pytest

from seer.errors import UserError
from seer.observe.metrics import MetricsFile


def test_lines_come_back_in_order(tmp_path):
    file = MetricsFile(tmp_path / "new" / "metrics.jsonl")
    assert file.read() == []
    lines = [{"step": step, "loss": 1 / step, "name": "ü\n"} for step in range(1, 4)]
    for line in lines:
        file.write(line)
    assert file.read() == lines
    assert len((tmp_path / "new" / "metrics.jsonl").read_text().splitlines()) == 3


def test_each_line_is_one_write(tmp_path, monkeypatch):
    file = MetricsFile(tmp_path / "m.jsonl")
    written = []
    monkeypatch.setattr(os, "write", lambda descriptor, data: written.append(data) or len(data))
    file.write({"step": 1, "text": "x" * 10_000})
    assert len(written) == 1 and written[0].endswith(b"\n")


def test_line_cut_by_a_full_disk_is_said_and_mended(tmp_path, monkeypatch):
    file = MetricsFile(tmp_path / "m.jsonl")
    file.write({"step": 1})
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:4]))
    with pytest.raises(UserError, match=r"cannot be written \(No space left"):
        file.write({"step": 2})
    monkeypatch.undo()
    file.write({"step": 3})
    assert [json.loads(line)["step"] for line in file.path.read_text().splitlines()] == [1, 3]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_null(tmp_path, value):
    file = MetricsFile(tmp_path / "m.jsonl")
    file.write({"step": 1, "loss": value})
    assert json.loads((tmp_path / "m.jsonl").read_text(), parse_constant=pytest.fail) == {"step": 1, "loss": None}


def test_cut_back_keeps_what_was_there(tmp_path):
    file = MetricsFile(tmp_path / "m.jsonl")
    file.cut_back(5)
    assert not file.path.exists()
    for step in range(2, 11, 2):
        file.write({"step": step})
    before = file.path.read_bytes()
    file.cut_back(10)
    assert file.path.read_bytes() == before
    file.cut_back(6)
    assert [line["step"] for line in file.read()] == [2, 4, 6]
    file.write({"step": 8})
    assert [line["step"] for line in file.read()] == [2, 4, 6, 8]
    file.cut_back(0)
    assert file.read() == []


@pytest.mark.parametrize("torn", [b'{"step": 3, "lo', b"{", b"\xff", b""])
def test_torn_last_line_harms_no_other(tmp_path, torn):
    path = tmp_path / "m.jsonl"
    MetricsFile(path).write({"step": 2})
    with open(path, "ab") as stream:
        stream.write(torn)
    file = MetricsFile(path)
    assert file.read() == [{"step": 2}]
    file.write({"step": 4})
    assert file.read() == [{"step": 2}, {"step": 4}]
    assert path.read_bytes().count(b"\n") == 2
    with open(path, "ab") as stream:
        stream.write(torn)
    MetricsFile(path).cut_back(2)
    assert path.read_bytes() == b'{"step": 2}\n'


def test_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        MetricsFile(tmp_path / "file" / "m.jsonl").write({"step": 1})


def test_place_that_cannot_be_read(tmp_path):
    (tmp_path / "m.jsonl").mkdir()
    for look in (MetricsFile(tmp_path / "m.jsonl").read, lambda: MetricsFile(tmp_path / "m.jsonl").cut_back(3)):
        with pytest.raises(UserError, match=r"m\.jsonl cannot be written \(Is a directory\)"):
            look()

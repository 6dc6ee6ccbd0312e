import io
import os
import re
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from indexed_shards import shard

from seer.errors import UserError
from seer.shard_index import ShardIndex, index_path, load_index, save_index


def test_an_index_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    saved = shard(tmp_path / "a.tar", 5)
    loaded = load_index(tmp_path / "a.tar")
    assert (loaded.location, loaded.tar_size, loaded.digest, len(loaded)) == (saved.location, 1000, saved.digest, 5)
    for name, dtype in (("offsets", np.uint64), ("sizes", np.uint32), ("labels", np.int32)):
        assert getattr(loaded, name).dtype == dtype
        np.testing.assert_array_equal(getattr(loaded, name), getattr(saved, name))
    assert sorted(os.listdir(tmp_path)) == ["a.tar", "a.tar.seer.npz"]  # nothing temporary is left


def test_the_largest_numbers_survive(tmp_path: Path) -> None:
    tar = tmp_path / "a.tar"
    with open(tar, "wb") as stream:
        stream.truncate(2**40)  # sparse: no space is taken
    largest = np.array([2**32 - 1], np.uint32)
    index = ShardIndex(
        str(tar), np.array([2**39], np.uint64), largest, np.array([2**31 - 1], np.int32), 2**40, "0" * 32
    )
    save_index(index, index_path(tar))
    loaded = load_index(tar)
    assert (int(loaded.offsets[0]), int(loaded.sizes[0]), int(loaded.labels[0])) == (2**39, 2**32 - 1, 2**31 - 1)


def test_an_index_may_lie_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    shard(tmp_path / "a.tar", 4, index_dir=tmp_path / "elsewhere")
    assert len(load_index(tmp_path / "a.tar", tmp_path / "elsewhere")) == 4
    with pytest.raises(UserError, match=r"has no index .*run: seer shards index '.*/\*\.tar'$"):
        load_index(tmp_path / "a.tar")
    with pytest.raises(UserError, match="--index-dir"):
        load_index(tmp_path / "a.tar", tmp_path)


def test_a_tar_of_another_size_is_refused(tmp_path: Path) -> None:
    shard(tmp_path / "a.tar")
    (tmp_path / "a.tar").write_bytes(bytes(999))
    with pytest.raises(UserError, match="has 999 bytes, its index says 1000"):
        load_index(tmp_path / "a.tar")


def test_a_missing_tar_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        load_index(tmp_path / "a.tar")


def test_a_damaged_index_is_named_whatever_the_damage(tmp_path: Path) -> None:
    tar = tmp_path / "a.tar"
    shard(tar)
    file = index_path(tar)
    whole = file.read_bytes()
    damaged = [b"", b"no index", whole[:-1], whole[: len(whole) // 2]]
    damaged += [whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1 :] for at in range(0, len(whole), 23)]
    # Flags and methods in each member's headers (local: PK 03 04, central: PK 01 02): encrypted, deflated, unknown.
    for mark, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        places = [found.start() + flags for found in re.finditer(re.escape(mark), whole)]
        damaged += [
            whole[:at] + bytes([value]) + whole[at + 1 :]
            for place in places
            for at, value in ((place, 1), (place, 32), (place + 2, 8), (place + 2, 77))
        ]
    for content in damaged:
        file.write_bytes(content)
        try:
            loaded = load_index(tar)
        except UserError as error:
            assert str(file) in str(error) or "its index says" in str(error)
        else:  # a flip in a field that zip does not check
            np.testing.assert_array_equal(loaded.offsets, [0, 10, 20])


def test_images_beyond_the_end_of_the_tar_are_refused(tmp_path: Path) -> None:
    tar = tmp_path / "a.tar"
    for offset, size in ((999, 2), (2**64 - 1, 2)):
        index = shard(tar)
        wrong = ShardIndex(
            str(tar), np.array([offset], np.uint64), np.array([size], np.uint32), index.labels[:1], 1000, index.digest
        )
        save_index(wrong, index_path(tar))
        with pytest.raises(UserError, match="is damaged"):
            load_index(tar)


def test_no_pickle_is_loaded(tmp_path: Path) -> None:
    tar = tmp_path / "a.tar"
    shard(tar)
    canary = tmp_path / "canary"

    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(canary),)

    evil = np.array([Evil()], dtype=object)
    with open(index_path(tar), "wb") as stream:
        np.savez(stream, header=evil, rows=evil)
    with pytest.raises(UserError, match="is damaged"):
        load_index(tar)
    assert not canary.exists()


_HEADER = np.frombuffer(f"1 1000 {'ab' * 16}".encode(), np.uint8)
_KINDS = [("offset", "<u8"), ("size", "<u4"), ("label", "<i4")]


def _npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def _claimed(descr: str, shape: str) -> bytes:
    """The beginning of an array of which nothing follows."""
    words = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}"
    words += " " * (-(len(words) + 11) % 64) + "\n"
    return b"\x93NUMPY\x01\x00" + len(words).to_bytes(2, "little") + words.encode()


def _rows(kinds: list[tuple[str, str]], *row: float) -> bytes:
    return _npy(np.array([row], kinds))


def _text(header: str) -> bytes:
    return _npy(np.frombuffer(header.encode(), np.uint8))


@pytest.mark.parametrize(
    ("header", "rows"),
    [
        (None, _claimed(str(_KINDS), "(1000000000000,)")),
        (None, _claimed(str(_KINDS), "(300000000,)")),
        (None, _claimed("[" * 9000, "(1,)")),
        (None, _claimed(str(_KINDS), "(0,)") + bytes(2**26)),
        (None, _rows([("offset", "<f8"), ("size", "<f8"), ("label", "<f8")], 0.5, 1, 0)),
        (None, _rows([("offset", "<i8"), ("size", "<u4"), ("label", "<i4")], -5, 1, 0)),
        (None, _rows([("offset", "<u8"), ("size", "<u8"), ("label", "<i4")], 900, 2**64 - 800, 0)),
        (None, _rows([("offset", "<u8"), ("size", "<u4"), ("label", "<i8")], 0, 1, 2**40)),
        (None, _rows(_KINDS, 0, 1, -7)),
        (_text("1 1000 \x1b[2J\x1b]0;name\x07"), None),
        (_text(f"1 -1000 {'ab' * 16}"), _npy(np.zeros(0, _KINDS))),
        (_text(f"1 {2**70} {'ab' * 16}"), None),
    ],
)
def test_an_index_made_to_do_harm_is_damaged(tmp_path: Path, header: bytes | None, rows: bytes | None) -> None:
    shard(tmp_path / "a.tar")
    with zipfile.ZipFile(index_path(tmp_path / "a.tar"), "w") as members:
        method = zipfile.ZIP_DEFLATED if rows and len(rows) > 2**20 else zipfile.ZIP_STORED
        members.writestr("header.npy", header or _npy(_HEADER))
        members.writestr("rows.npy", rows or _rows(_KINDS, 0, 1, 0), method)
    tracemalloc.start()
    try:
        # A tar of another size is told afterwards: what the index says of itself comes first.
        with pytest.raises(UserError, match="is damaged: it is no index"):
            load_index(tmp_path / "a.tar")
        assert tracemalloc.get_traced_memory()[1] < 2**22
    finally:
        tracemalloc.stop()


def test_an_index_that_never_ends_is_not_begun(tmp_path: Path) -> None:
    shard(tmp_path / "a.tar")
    file = index_path(tmp_path / "a.tar")

    def sparse(path: Path) -> None:
        with open(path, "wb") as stream:
            stream.truncate(2**40)

    for make in (sparse, os.mkfifo, lambda path: os.symlink("/dev/zero", path)):
        file.unlink()
        make(file)
        with pytest.raises(UserError, match="is damaged"):
            load_index(tmp_path / "a.tar")

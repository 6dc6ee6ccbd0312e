"""The walk through a tar against Python's tarfile, whole and damaged."""

import io
import os
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from plain_tars import write_names

from seer.errors import UserError
from seer.shards.tar import DamagedTar, Member, members


def oracle(path: Path) -> list[tuple[str, int, int]]:
    """What tarfile finds; it ends without a word where a header behind the first is bad."""
    try:
        with tarfile.open(path, "r:") as tar:
            return [
                (member.name, member.offset_data, member.size)
                for member in tar
                if member.isreg() and not member.issparse()
            ]
    except tarfile.TarError:
        return []


def ours(path: Path) -> list[tuple[str, int, int]]:
    return [tuple(member) for member in members(path)]


def write(path: Path, names: list[str], form: int = tarfile.USTAR_FORMAT, size: int = 700, **fields: object) -> Path:
    return write_names(path, *names, form=form, size=size, growth=1, **fields)


LONG = "folder/" * 20 + "name.jpg"  # 148 characters: beyond the 100 of the old field
FORMS = {
    "ustar": tarfile.USTAR_FORMAT,
    "gnu": tarfile.GNU_FORMAT,
    "pax": tarfile.PAX_FORMAT,
}


@pytest.mark.parametrize("form", FORMS)
def test_names_of_every_form(tmp_path: Path, form: str) -> None:
    names = ["a.jpg", "folder/b.jpg", LONG, "c.jpg", "/absolute.jpg", "../up.jpg", "no_extension", "d" * 100]
    if form != "ustar":
        names += ["x" * 300 + ".jpg", "ünï/日本.jpg", "e.jpg"]
    path = write(tmp_path / "a.tar", names, FORMS[form])
    assert ours(path) == oracle(path)
    assert [member.name for member in members(path)] == names


def test_the_bytes_are_where_the_walk_says(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tar", ["a.jpg", LONG, "b.jpg"], tarfile.PAX_FORMAT)
    whole = path.read_bytes()
    for place, (_, offset, size) in enumerate(members(path)):
        assert whole[offset : offset + size] == bytes([place + 1]) * (700 + place)


@pytest.mark.parametrize("size", [0, 1, 511, 512, 513])
def test_sizes_around_a_block(tmp_path: Path, size: int) -> None:
    path = write(tmp_path / "a.tar", ["a.jpg", "b.jpg", "c.jpg"], size=size)
    assert ours(path) == oracle(path) != []


def test_links_folders_and_pipes_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for kind in (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE):
            special = tarfile.TarInfo(f"special{kind.decode()}")
            special.type, special.linkname = kind, "y" * 200
            tar.addfile(special)
            file = tarfile.TarInfo(f"after{kind.decode()}.jpg")
            file.size = 5
            tar.addfile(file, io.BytesIO(b"12345"))
    assert ours(path) == oracle(path)
    assert [member.name for member in members(path)] == [f"after{kind}.jpg" for kind in (5, 2, 1, 6, 3)]


def test_sparse_files_are_passed_over_and_what_follows_is_found(tmp_path: Path) -> None:
    for place in range(6):  # many holes: the map then goes on in further blocks
        with open(tmp_path / f"sparse{place}.jpg", "wb") as stream:
            for hole in range(2 + 20 * (place % 2)):
                stream.seek(hole * 65536)
                stream.write(b"data")
            stream.truncate(30 * 65536)
    (tmp_path / "plain.jpg").write_bytes(b"12345")
    files = [f"sparse{place}.jpg" for place in range(6)] + ["plain.jpg"]
    for form in ("gnu", "pax"):
        path = tmp_path / f"{form}.tar"
        command = ["tar", "--sparse", f"--format={form}", "-cf", str(path), *files]
        subprocess.run(command, cwd=tmp_path, check=True)
        found = list(members(path))
        assert found[-1].name == "plain.jpg"
        assert path.read_bytes()[found[-1].offset :][:5] == b"12345"
        # Where the file system keeps no holes, tar stores whole files.
        with tarfile.open(path) as tar:
            assert [member.name for member in found] == [member.name for member in tar if not member.issparse()]


def test_a_size_in_base_256(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tar", ["a.jpg", "b.jpg"], tarfile.GNU_FORMAT)
    data = bytearray(path.read_bytes())
    data[124:136] = b"\x80" + (700).to_bytes(11, "big")
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    path.write_bytes(data)
    assert ours(path) == oracle(path) and len(ours(path)) == 2


def test_a_member_beyond_8_gib(tmp_path: Path) -> None:
    path, huge = tmp_path / "a.tar", 9 * 2**30
    with open(path, "wb") as stream:  # a hole in the file: no space is taken
        member = tarfile.TarInfo("huge.jpg")
        member.size = huge
        stream.write(member.tobuf(tarfile.GNU_FORMAT))
        stream.seek(huge, os.SEEK_CUR)
        small = tarfile.TarInfo("small.jpg")
        stream.write(small.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    assert list(members(path)) == [Member("huge.jpg", 512, huge), Member("small.jpg", 512 + huge + 512, 0)]


def test_a_size_and_a_path_in_pax_records(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tar", ["a.jpg", "b.jpg"], tarfile.PAX_FORMAT, pax_headers={"path": "other.jpg"})
    assert [member.name for member in members(path)] == ["other.jpg", "other.jpg"]
    path = write(tmp_path / "b.tar", ["a.jpg"], tarfile.PAX_FORMAT, pax_headers={"size": "700", "comment": "a\nb=c"})
    assert ours(path) == oracle(path) and ours(path)[0][2] == 700


def test_lasting_pax_records_hold_for_all_that_follows(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT, pax_headers={"path": "same.jpg"}) as tar:
        for name in ("a.jpg", "b.jpg"):
            tar.addfile(tarfile.TarInfo(name))
    assert ours(path) == oracle(path)
    assert [member.name for member in members(path)] == ["same.jpg", "same.jpg"]


def test_what_gnu_tar_writes(tmp_path: Path) -> None:
    (tmp_path / "in" / ("deep" * 30)).mkdir(parents=True)
    for name in ("a.jpg", "b c.jpg", "deep" * 30 + "/" + "e" * 120 + ".jpg"):
        (tmp_path / "in" / name).write_bytes(name.encode() * 99)
    os.symlink("a.jpg", tmp_path / "in" / "link.jpg")
    os.link(tmp_path / "in" / "a.jpg", tmp_path / "in" / "z.jpg")
    for form in ("v7", "oldgnu", "gnu", "ustar", "pax"):
        path = tmp_path / f"{form}.tar"
        names = ["a.jpg", "b c.jpg", "link.jpg", "z.jpg"] if form in ("v7", "ustar") else ["."]
        subprocess.run(["tar", f"--format={form}", "-cf", path, *names], cwd=tmp_path / "in", check=True)
        assert ours(path) == oracle(path) and len(ours(path)) >= 2


def test_an_empty_tar_has_no_members(tmp_path: Path) -> None:
    assert ours(write(tmp_path / "a.tar", [])) == []


@pytest.mark.parametrize("command", ["gzip", "bzip2", "xz"])
def test_compressed_tars_are_refused(tmp_path: Path, command: str) -> None:
    path = write(tmp_path / "a.tar", ["a.jpg"])
    data = subprocess.run([command, "-c", str(path)], check=True, capture_output=True).stdout
    path.write_bytes(data)
    with pytest.raises(UserError, match=rf"a.tar is no plain tar: it is compressed \({command}\)"):
        ours(path)


def test_a_name_that_looks_like_a_compressed_file(tmp_path: Path) -> None:
    assert len(ours(write(tmp_path / "a.tar", ["BZh1.jpg"]))) == 1


def damaged(path: Path) -> DamagedTar:
    with pytest.raises(DamagedTar) as caught:
        ours(path)
    assert str(path) in str(caught.value) and f"byte {caught.value.offset}" in str(caught.value)
    return caught.value


def test_what_is_no_tar_is_named(tmp_path: Path) -> None:
    for content in (b"", b"<html>" * 200, bytes(range(256)) * 4):
        (tmp_path / "a.tar").write_bytes(content)
        assert damaged(tmp_path / "a.tar").offset == 0
    with pytest.raises(UserError, match="No such file"):
        ours(tmp_path / "b.tar")
    with pytest.raises(UserError, match="Is a directory"):
        ours(tmp_path)


def test_a_cut_between_two_members_is_found_at_its_place(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tar", ["a.jpg", "b.jpg", "c.jpg"])
    third = list(members(path))[2].offset - 512
    path.write_bytes(path.read_bytes()[:third])
    assert len(oracle(path)) == 2  # tarfile sees nothing wrong
    error = damaged(path)
    assert error.offset == third and "zero block" in error.why


def test_two_tars_joined_are_no_shard(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tar", ["a.jpg"])
    path.write_bytes(path.read_bytes() * 2)
    assert "behind the block" in damaged(path).why


@pytest.mark.parametrize("form", FORMS)
def test_every_cut_is_an_error(tmp_path: Path, form: str) -> None:
    path = write(tmp_path / "a.tar", ["a.jpg", LONG, "b.jpg"], FORMS[form])
    whole = path.read_bytes()
    last = list(members(path))[-1]
    closing = -(-(last.offset + last.size) // 512) * 512 + 512
    boundaries = range(0, len(whole), 512)  # where tarfile sees a shorter list and nothing wrong
    for length in sorted({*range(0, len(whole), 97), *boundaries}):
        path.write_bytes(whole[:length])
        if length >= closing:
            assert len(ours(path)) == 3  # only padding is missing
        else:
            damaged(path)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mask", [0x01, 0xFF])
def test_every_flip_is_an_error_or_changes_no_member(tmp_path: Path, form: str, mask: int) -> None:
    path = write(tmp_path / "a.tar", ["a.jpg", LONG, "ü.jpg", "b.jpg"], FORMS[form])
    whole = path.read_bytes()
    true = oracle(path)
    assert len(true) == 4
    outcomes = {"same": 0, "error": 0}
    for at in range(0, len(whole), 97):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ mask]) + whole[at + 1 :])
        try:
            found = ours(path)
        except DamagedTar:
            outcomes["error"] += 1
        else:
            # A flip in data goes unseen here (the digest finds it); one in a long name gives both the same name.
            assert found == oracle(path) and [place[1:] for place in found] == [place[1:] for place in true]
            outcomes["same"] += 1
    assert min(outcomes.values()) > 5


def test_errors_cross_process_borders(tmp_path: Path) -> None:
    import pickle

    error = DamagedTar(tmp_path, 512, "why")
    copy: DamagedTar = pickle.loads(pickle.dumps(error))
    assert (copy.path, copy.offset, copy.why, str(copy)) == (tmp_path, 512, "why", str(error))


def test_hostile_headers_end_in_an_error(tmp_path: Path) -> None:
    def header(**changes: bytes) -> bytes:
        field = {"size": (124, 12), "kind": (156, 1), "checksum": (148, 8)}
        data = bytearray(tarfile.TarInfo("a.jpg").tobuf(tarfile.USTAR_FORMAT))
        for name, value in changes.items():
            start, length = field[name]
            data[start : start + length] = value.ljust(length, b"\0")
        if "checksum" not in changes:
            data[148:156] = b" " * 8
            data[148:156] = b"%06o\0 " % sum(data)
        return bytes(data)

    build: dict[str, Callable[[], bytes]] = {
        "negative size": lambda: header(size=b"\xff" * 12),
        "a size of words": lambda: header(size=b"0o17"),
        "a size beyond the file": lambda: header(size=b"77777777777"),
        "a long name of eight GiB": lambda: header(size=b"77777777777", kind=b"L"),
        "pax records of a megabyte and more": lambda: header(size=b"%o" % (2 << 20), kind=b"x") + bytes(3 << 20),
        "a pax record without length": lambda: header(size=b"10", kind=b"x") + b"path=abc".ljust(512, b"\0"),
        "a pax record too long": lambda: header(size=b"10", kind=b"x") + b"99 a=bc\n".ljust(512, b"\0"),
        "a pax record of length 0": lambda: header(size=b"10", kind=b"x") + b"0 abcde\n".ljust(512, b"\0"),
        "a pax size of words": lambda: header(size=b"13", kind=b"x") + b"11 size=-1\n".ljust(512, b"\0") + header(),
        "a checksum of words": lambda: header(checksum=b"checksum"),
    }
    for name, content in build.items():
        path = tmp_path / "a.tar"
        path.write_bytes(content() + bytes(1024))
        with pytest.raises(DamagedTar):
            print(name, ours(path))

"""Damaged tars of every form: the members that tarfile finds, or a named damage; never another answer without a word.

Long form: python -m pytest -m slow tests/shards/test_fuzz_tars.py
"""

from __future__ import annotations

import io
import subprocess
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from seer.shards.tar import BLOCK, DamagedTar, members

Members = list[tuple[str, int, int]]


class Tolerant(tarfile.TarInfo):
    """tarfile breaks down over the damaged map of a sparse file, which is none of the members that are compared."""

    def _proc_gnusparse_10(self, member: tarfile.TarInfo, *_: object) -> None:
        member.sparse = []

    _proc_gnusparse_01 = _proc_gnusparse_10


def oracle(path: Path) -> Members:
    with tarfile.open(path, "r:", tarinfo=Tolerant) as tar:
        return [
            (member.name, member.offset_data, member.size) for member in tar if member.isreg() and not member.issparse()
        ]


def verdict(path: Path, data: bytes) -> str:
    """``damaged``, or ``read`` where tarfile reads the same."""
    path.write_bytes(data)
    try:
        found = [tuple(member) for member in members(path)]
    except DamagedTar:
        return "damaged"
    assert found == oracle(path)
    return "read"


def add(tar: tarfile.TarFile, name: str, size: int = 0, **fields: object) -> None:
    member = tarfile.TarInfo(name)
    member.size = size
    for field, value in fields.items():
        setattr(member, field, value)
    tar.addfile(member, io.BytesIO(bytes([len(name) % 251 + 1]) * size) if member.isreg() else None)


def written(form: int) -> bytes:
    """Folders, links, `..`, names of every length and labels."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        add(tar, "a.jpg", 700)
        add(tar, "folder", type=tarfile.DIRTYPE)
        add(tar, "folder/" * 20 + "n.jpg", 513)
        add(tar, "../up.jpg", 5)
        add(tar, "link.jpg", type=tarfile.SYMTYPE, linkname="a.jpg" if form == tarfile.USTAR_FORMAT else "y" * 150)
        add(tar, "hard.jpg", type=tarfile.LNKTYPE, linkname="a.jpg")
        if form != tarfile.USTAR_FORMAT:
            add(tar, "x" * 300 + ".jpg", 10)
            add(tar, "ü.jpg", 1)
        add(tar, "b.jpg", 100)
        add(tar, "b.cls", 1)
    return buffer.getvalue()


def sparse(folder: Path, form: str) -> bytes:
    for number, holes in enumerate((2, 7, 2)):
        with open(folder / f"sparse{number}.jpg", "wb") as stream:
            for hole in range(holes):
                stream.seek(hole << 16)
                stream.write(b"data")
            stream.truncate(30 << 16)
    (folder / "plain.jpg").write_bytes(b"12345")
    names = ["sparse0.jpg", "sparse1.jpg", "plain.jpg", "sparse2.jpg"]
    command = ["tar", "--sparse", f"--format={form}", "-cf", "-", *names]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True).stdout


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("sparse")
    forms = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
    whole = {name: written(form) for name, form in forms.items()}
    return whole | {f"sparse-{form}": sparse(folder, form) for form in ("gnu", "pax")}


def headers(data: bytes) -> list[int]:
    return [at for at in range(0, len(data) - BLOCK + 1, BLOCK) if data[at + 257 : at + 262] == b"ustar"]


def cuts_and_flips(data: bytes, step: int) -> Iterator[bytes]:
    """Not behind the zero block that closes the tar: only padding stands there."""
    for at in range(0, len(data), step):
        yield data[:at]
        mask = (0x01, 0x80, 0xFF)[at // step % 3]
        yield data[:at] + bytes([data[at] ^ mask]) + data[at + 1 :]


NAMES = ("ustar", "gnu", "pax", "sparse-gnu", "sparse-pax")


@pytest.mark.parametrize("name", NAMES)
def test_cuts_and_flips_at_every_97th_byte(tmp_path: Path, corpus: dict[str, bytes], name: str) -> None:
    data = corpus[name]
    assert verdict(tmp_path / "a.tar", data) == "read"
    seen = Counter(verdict(tmp_path / "a.tar", damaged) for damaged in cuts_and_flips(data, 97))
    assert min(seen["damaged"], seen["read"]) > len(data) / 1940


# Fields of a header: where each begins and its length.
_FIELDS = ((0, 100), (100, 24), (124, 12), (148, 8), (156, 1), (157, 100), (257, 8), (345, 155), (386, 109))


def with_checksums(data: bytes) -> bytes:
    """Headers whose checksums are right again: what stands in them is then believed."""
    out = bytearray(data)
    for at in headers(data):
        out[at + 148 : at + 156] = b" " * 8
        out[at + 148 : at + 156] = b"%06o\0 " % sum(out[at : at + BLOCK])
    return bytes(out)


def flipped(data: bytes, other: bytes, rng: np.random.Generator) -> bytes:
    out = bytearray(data)
    for _ in range(rng.integers(1, 4)):
        out[rng.integers(len(out))] ^= int(rng.integers(1, 256))
    return bytes(out)


def another_field(data: bytes, other: bytes, rng: np.random.Generator) -> bytes:
    out, places = bytearray(data), headers(data)
    for _ in range(rng.integers(1, 3)):
        start, length = _FIELDS[rng.integers(len(_FIELDS))]
        values = (int(rng.integers(256)), int(rng.choice(list(b"01234567xgLKSDVMNX\0 "))), 0x80, 0xFF, 0)
        out[places[rng.integers(len(places))] + start + rng.integers(length)] = values[rng.integers(5)]
    return bytes(out)


def another_record(data: bytes, other: bytes, rng: np.random.Generator) -> bytes:
    """In the block behind a header: pax records, long names, sparse maps."""
    out, places = bytearray(data), headers(data)
    at = places[rng.integers(len(places))] + BLOCK
    for _ in range(rng.integers(1, 3)):
        out[at + rng.integers(60)] = int(rng.choice([*b"0123456789 =\n\0pathsize", 200]))
    return bytes(out)


def blocks_in_another_order(data: bytes, other: bytes, rng: np.random.Generator) -> bytes:
    blocks = [data[at : at + BLOCK] for at in range(0, len(data), BLOCK)]
    one, two = rng.integers(len(blocks), size=2)
    if rng.integers(2):
        blocks[one], blocks[two] = blocks[two], blocks[one]
    else:
        del blocks[one]
    return b"".join(blocks)


def spliced(data: bytes, other: bytes, rng: np.random.Generator) -> bytes:
    return data[: rng.integers(len(data) // BLOCK) * BLOCK] + other[rng.integers(len(other) // BLOCK) * BLOCK :]


MUTATIONS: tuple[Callable[[bytes, bytes, np.random.Generator], bytes], ...] = (
    flipped,
    another_field,
    another_field,
    another_record,
    blocks_in_another_order,
    spliced,
)


def mutated(corpus: dict[str, bytes], number: int) -> bytes:
    rng = np.random.default_rng(number)
    data, other = (corpus[NAMES[place]] for place in rng.integers(len(NAMES), size=2))
    for _ in range(rng.integers(1, 3)):
        if headers(data):
            data = MUTATIONS[rng.integers(len(MUTATIONS))](data, other, rng)
    return with_checksums(data) if rng.integers(3) else data


def judge(tmp_path: Path, corpus: dict[str, bytes], numbers: range) -> Counter[str]:
    seen = Counter[str]()
    for number in numbers:
        try:
            seen[verdict(tmp_path / "a.tar", mutated(corpus, number))] += 1
        except Exception as error:
            raise AssertionError(f"tar {number}") from error
    assert min(seen["damaged"], seen["read"]) > len(numbers) / 10
    return seen


def test_mutated_tars(tmp_path: Path, corpus: dict[str, bytes]) -> None:
    judge(tmp_path, corpus, range(600))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_many_mutated_tars(tmp_path: Path, corpus: dict[str, bytes]) -> None:
    print(judge(tmp_path, corpus, range(1_000_000, 1_030_000)))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", ["ustar", "gnu", "pax"])
def test_cuts_and_flips_at_every_byte(tmp_path: Path, corpus: dict[str, bytes], name: str) -> None:
    data = corpus[name].rstrip(b"\0") + bytes(2 * BLOCK)
    print(Counter(verdict(tmp_path / "a.tar", damaged) for damaged in cuts_and_flips(data, 1)))

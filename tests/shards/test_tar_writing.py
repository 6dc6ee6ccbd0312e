import hashlib
import io
import tarfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seer.shards.tar_writing import TarWriter, header

NAMES = st.text("abcdefghijklmnopqrstuvwxyz0123456789./-_", min_size=1, max_size=100)


def theirs(name: str, size: int) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.size, member.mode = size, 0o444
    return member


@given(NAMES, st.integers(0, 2**32 - 1))
def test_headers_are_those_of_tarfile(name: str, size: int) -> None:
    assert header(name.encode(), size) == theirs(name, size).tobuf(tarfile.USTAR_FORMAT)


@given(st.lists(st.tuples(NAMES, st.binary(max_size=2000).map(lambda data: data * 40)), max_size=8))
def test_tars_are_those_of_tarfile(files: list[tuple[str, bytes]]) -> None:
    ours, expected = io.BytesIO(), io.BytesIO()
    writer = TarWriter(ours)
    places = [writer.add(name, data) for name, data in files]
    digest = writer.close()
    with tarfile.open(fileobj=expected, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in files:
            tar.addfile(theirs(name, len(data)), io.BytesIO(data))
    assert ours.getvalue() == expected.getvalue() and writer.size == len(ours.getvalue())
    assert digest == hashlib.blake2b(ours.getvalue(), digest_size=16).hexdigest()
    for place, (_, data) in zip(places, files, strict=True):
        assert ours.getvalue()[place : place + len(data)] == data


def test_a_long_name_is_refused() -> None:
    with pytest.raises(ValueError, match="longer header"):
        header(b"x" * 101, 0)

import shutil
from pathlib import Path

import numpy as np
import pytest

from seer.errors import UserError
from seer.shard_index import ShardIndex, index_path, load_index, save_index
from seer.shards.tar import members
from seer.shards.verify import verify

SAMPLE = Path(__file__).parents[2] / "data_shards" / "sample" / "train"


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    shutil.copytree(SAMPLE, tmp_path / "train")
    return tmp_path / "train"


def problems(folder: Path) -> list[str]:
    findings, tars = verify([f"{folder}/*.tar"])
    assert tars == len(list(folder.glob("*.tar")))
    assert all(str(finding.tar) in finding.problem for finding in findings)
    return [f"{finding.tar.name}: {finding.problem}" for finding in findings]


def flip(tar: Path, at: int) -> None:
    data = bytearray(tar.read_bytes())
    data[at] ^= 1
    tar.write_bytes(data)


def test_whole_shards_have_no_finding(shards: Path) -> None:
    assert problems(shards) == []
    assert verify([f"{shards}/*.tar"], workers=2) == ([], 2)


def test_a_flipped_byte_anywhere_is_found(shards: Path) -> None:
    tar = shards / "train-000001.tar"
    whole = tar.read_bytes()
    image = next(member for member in members(tar) if member.name.endswith("jpg"))
    places = {"header": image.offset - 500, "image": image.offset + 9, "end": len(whole) - 1}
    places |= {f"at {at}": at for at in range(3, len(whole), len(whole) // 9)}
    for name, at in places.items():
        tar.write_bytes(whole)
        flip(tar, at)
        (problem,) = problems(shards)
        assert problem.startswith("train-000001.tar: ")
        if name == "header":
            assert f"damaged at byte {image.offset - 512}: a header" in problem
        if name == "image":
            assert "is altered" in problem


def test_a_cut_tar_is_found(shards: Path) -> None:
    tar = shards / "train-000000.tar"
    whole = tar.read_bytes()
    boundary = list(members(tar))[9].offset - 512
    for length in (boundary, boundary + 100, boundary + 700, len(whole) - 1024, 0):
        tar.write_bytes(whole[:length])
        (problem,) = problems(shards)
        assert problem.startswith("train-000000.tar: ")
        if length == boundary:
            assert f"damaged at byte {boundary}: the file ends without the zero block" in problem


def test_a_tar_that_was_cut_between_members_and_closed_again_is_found(shards: Path) -> None:
    """Such a tar is sound for every program that reads tars: only its index knows better, by size and by digest."""
    tar = shards / "train-000000.tar"
    whole, index = tar.read_bytes(), load_index(tar)
    boundary = list(members(tar))[9].offset - 512
    tar.write_bytes(whole[:boundary] + bytes(1024))
    (problem,) = problems(shards)
    assert f"has {boundary + 1024} bytes, its index says {len(whole)}" in problem
    tar.write_bytes(whole[:boundary].ljust(len(whole), b"\0"))
    assert load_index(tar).digest == index.digest  # the size alone does not tell
    (problem,) = problems(shards)
    assert "is altered" in problem


def test_a_missing_shard_and_a_missing_index_are_found(shards: Path) -> None:
    (shards / "train-000000.tar").unlink()
    index_path(shards / "train-000001.tar").unlink()
    first, second = problems(shards)
    assert "train-000000.tar is missing" in first and "has no index" in second


def test_an_index_that_does_not_fit_is_found(shards: Path) -> None:
    tar = shards / "train-000000.tar"
    good = load_index(tar)
    moved = good.offsets + np.uint64(1)
    save_index(ShardIndex(tar, moved, good.sizes, good.labels, good.tar_size, good.digest), index_path(tar))
    (problem,) = problems(shards)
    assert "does not fit its tar" in problem


def test_indexes_elsewhere(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "indexes").mkdir()
    for file in shards.glob("*.npz"):
        file.rename(tmp_path / "indexes" / file.name)
    assert verify([f"{shards}/*.tar"], tmp_path / "indexes") == ([], 2)


def test_nothing_to_verify_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no shard matches"):
        verify([f"{tmp_path}/*.tar"])

import shutil
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from plain_tars import write_tar

from seer.errors import UserError
from seer.shard_index import ShardIndex, index_path, load_index, save_index
from seer.shards.index import chosen, index
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
    assert all(finding.tar in finding.problem for finding in findings)
    return [f"{Path(finding.tar).name}: {finding.problem}" for finding in findings]


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


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_flip_of_every_97th_byte_and_a_cut_at_every_boundary_is_found(tmp_path: Path, form: int) -> None:
    """Of headers, names, images, labels and padding; of members and the blocks inside of them."""
    names = ("a.jpg", "a.cls", "folder/" * 20 + "b.jpg", "c.jpg")
    contents = [(name, bytes(range(70)) * 10) for name in names]
    tar = write_tar(tmp_path / "a.tar", *contents, form=form, mtime=1.5 if form == tarfile.PAX_FORMAT else 1)
    index([str(tar)])
    assert problems(tmp_path) == []
    whole = tar.read_bytes()
    ends = [-(-(member.offset + member.size) // 512) * 512 for member in members(tar)]
    for at in range(0, len(whole), 97):
        tar.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
        (problem,) = problems(tmp_path)
        assert "is damaged at byte" in problem or "is altered" in problem, at
    for length in range(0, len(whole), 512):
        tar.write_bytes(whole[:length])
        (problem,) = problems(tmp_path)
        if length in ends:
            assert f"damaged at byte {length}: the file ends without the zero block" in problem
    tar.write_bytes(whole)
    assert problems(tmp_path) == []


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


def test_an_index_of_fewer_images_is_sound_one_of_others_is_not(shards: Path) -> None:
    tar = shards / "train-000000.tar"
    good = load_index(tar)

    def rows(*numbers: int) -> dict[str, Any]:
        places = list(numbers)
        return {"offsets": good.offsets[places], "sizes": good.sizes[places], "labels": good.labels[places]}

    some, _ = chosen(good, good.offsets[[0, 3, 19]])
    save_index(some, index_path(tar))
    assert len(load_index(tar)) == 3 and problems(shards) == []
    others = [replace(some, digest=good.digest), replace(good, digest=some.digest)]
    others += [replace(some, labels=some.labels + np.int32(1))]
    others += [replace(some, **rows(0, 3, 3)), replace(some, **rows(0, 3))]
    for wrong in others:
        save_index(wrong, index_path(tar))
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

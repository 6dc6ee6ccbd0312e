"""DALI's text index: against an own reading of it, tarfile, and DALI itself.

Long form, with DALI itself (pip install nvidia-dali-cuda120; no GPU is needed):
python -m pytest -m slow tests/shards/test_dali.py
"""

from __future__ import annotations

import json
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_tars import write_names

from seer.errors import UserError
from seer.shard_index import index_path, load_index
from seer.shard_list import ShardList
from seer.shards.dali import choices, export, idx_bytes, idx_path
from seer.shards.index import Oddities, index, index_tar
from seer.shards.tar import DamagedTar
from seer.shards.verify import verify

SAMPLE = Path(__file__).parents[2] / "data_shards" / "sample" / "train"


def read(idx: bytes) -> list[list[tuple[str, int, int, str]]]:
    """What stands in an index of version 1.2: (extension, offset, size, name) of the members of each sample."""
    first, *lines = idx.decode().splitlines()
    assert first == f"v1.2 {len(lines)}"
    words = [line.split() for line in lines]
    assert all(len(line) % 4 == 0 for line in words)
    return [
        [(line[at], int(line[at + 1]), int(line[at + 2]), line[at + 3]) for at in range(0, len(line), 4)]
        for line in words
    ]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_where_tarfile_finds_them_and_grouped_as_wds2idx_does(tmp_path: Path, form: int) -> None:
    long = "deep/" * 25
    path = write_names(
        tmp_path / "a.tar",
        *("a.jpg", "a.CLS", "a.seg.png", "x/a.jpg", ".hidden.jpg", "x/._b.jpg", "b.jpg", "c.jpg", "b.cls"),
        *(f"{long}a.jpg", f"{long}a.cls", "README", "__meta__.json", "x.y/z.jpg", "./a.jpg"),
        form=form,
        mtime=1.5 if form == tarfile.PAX_FORMAT else 1,
    )
    content, samples = idx_bytes(path)
    found = read(content)
    with tarfile.open(path) as tar:
        places = {member.name: (member.offset_data, member.size) for member in tar}
    assert [name for sample in found for *_, name in sample] == [
        name for name in places if name not in (".hidden.jpg", "x/._b.jpg")
    ]
    assert all(places[name] == (offset, size) for sample in found for _, offset, size, name in sample)
    # As tools/wds2idx.py of DALI groups them, run on this tar: a name without a dot is its own extension.
    assert [[extension for extension, *_ in sample] for sample in found] == [
        *(["jpg", "CLS", "seg.png"], ["jpg"], ["jpg"], ["jpg"], ["cls"], ["jpg", "cls"]),
        *(["README"], ["json"], ["jpg"], ["jpg"]),
    ]
    assert samples == len(found)


@pytest.mark.parametrize("name", ["my photo.jpg", "x y/a.jpg", "a\t.jpg", "a\n.jpg", "a.my jpg", "a."])
def test_names_that_break_the_form_are_refused(tmp_path: Path, name: str) -> None:
    tar = write_names(tmp_path / "a.tar", "a.jpg", name)
    with pytest.raises(UserError) as caught:
        export([tar])
    assert f"{name!r} in {tar} cannot be listed" in str(caught.value) and "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == ["a.tar"]


def test_a_tar_without_samples_and_a_damaged_one_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a\.tar has no samples: DALI refuses"):
        export([write_names(tmp_path / "a.tar", ".hidden.jpg")])
    tar = write_names(tmp_path / "a.tar", "a.jpg", "b.jpg")
    tar.write_bytes(tar.read_bytes()[:512])
    with pytest.raises(DamagedTar):
        export([tar])
    assert os.listdir(tmp_path) == ["a.tar"]


def test_where_indexes_go_and_what_is_there_stays(tmp_path: Path) -> None:
    one, two = write_names(tmp_path / "x" / "a.tar", "a.jpg"), write_names(tmp_path / "y" / "a.tar", "a.jpg", "b.jpg")
    assert export([one, two], workers=2) == 3
    assert (tmp_path / "x" / "a.idx").read_bytes() == idx_bytes(one)[0]
    with pytest.raises(UserError, match="have one name"):
        export([one, two], tmp_path)
    (tmp_path / "x" / "a.idx").write_text("v1.2 1\njpg 512 0 a.jpg\n# mine")
    with pytest.raises(UserError, match=r"a\.idx says something else: .*--overwrite"):
        export([one])
    assert export([one], overwrite=True) == 1
    assert (tmp_path / "x" / "a.idx").read_bytes() == idx_bytes(one)[0]
    export([two], tmp_path)
    assert idx_path(two, tmp_path) == tmp_path / "a.idx" and (tmp_path / "a.idx").exists()
    with pytest.raises(UserError, match="cannot be written"):
        export([two], tmp_path / "none")


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    shutil.copytree(SAMPLE, tmp_path / "train")
    export(sorted((tmp_path / "train").glob("*.tar")))
    return tmp_path / "train"


def rows(tar: Path) -> list[tuple[int, int, int]]:
    known = load_index(tar)
    return list(zip(known.offsets.tolist(), known.sizes.tolist(), known.labels.tolist(), strict=True))


def take(folder: Path) -> Oddities:
    tars = sorted(folder.glob("*.tar"))
    return index([f"{folder}/*.tar"], only=choices(tars)).oddities


def test_a_whole_index_of_dali_gives_our_own_index(shards: Path) -> None:
    before = {path.name: path.read_bytes() for path in shards.glob("*.npz")}
    assert take(shards) == Oddities()
    assert {path.name: path.read_bytes() for path in shards.glob("*.npz")} == before


@pytest.mark.parametrize("names", [True, False])
def test_what_dali_leaves_out_we_leave_out(shards: Path, names: bool) -> None:
    tar = shards / "train-000001.tar"
    whole = rows(tar)
    _, *lines = idx_path(tar).read_text().splitlines()
    kept = [place for place in range(len(lines)) if place % 3]
    if names:
        chosen = [lines[place] for place in reversed(kept)]
    else:  # version 1.1 has no names; of each sample only the image is listed, as some tools do
        chosen = [" ".join(lines[place].split()[4:7]) for place in kept]
    head = f"v1.{2 if names else 1} {len(chosen)}"
    idx_path(tar).write_text("\n".join([head, *chosen]) + "\n\n")
    assert take(shards) == Oddities(not_chosen=len(lines) - len(kept))
    assert rows(tar) == [whole[place] for place in kept]
    assert len(rows(shards / "train-000000.tar")) == 20
    # Such an index is sound, and is not taken for an unfinished one.
    assert verify([f"{shards}/*.tar"])[0] == []
    assert index([f"{shards}/*.tar"]).already_there == 2
    index_path(tar).unlink()
    index([f"{shards}/*.tar"])
    assert rows(tar) == whole


def test_as_many_samples_of_another_choice_are_other_data(shards: Path) -> None:
    """Else a run would go on with them."""
    idx = idx_path(shards / "train-000001.tar")
    _, *lines = idx.read_text().splitlines()
    digests = set()
    for chosen in (lines, lines[1:], lines[:-1]):
        idx.write_text("\n".join([f"v1.2 {len(chosen)}", *chosen]))
        take(shards)
        digests.add(ShardList.open(f"{shards}/*.tar").digest)
        (_, entry) = json.loads((shards / "manifest.json").read_bytes())["shards"]
        assert (entry["samples"], entry["digest"]) == (len(chosen), load_index(shards / entry["name"]).digest)
    assert len(digests) == 3


FIRST = "cls 512 1 000000020.cls jpg 1536"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda text: "", "is no index of DALI"),
        (lambda text: "v1.0 20\n" + text.split("\n", 1)[1], "is no index of DALI"),
        (lambda text: text.replace("v1.2 20", "v1.2"), "is no index of DALI"),
        (lambda text: text.replace("v1.2 20", "v1.2 -1"), "is no index of DALI"),
        (lambda text: text.replace("v1.2 20", "v1.2 " + "9" * 5000), "is no index of DALI"),
        (lambda text: text.replace("v1.2 20", "v1.2 999999999999"), "tells 999999999999 samples and has 20 lines"),
        (lambda text: text.replace("v1.2 20", "v1.2 19"), "tells 19 samples and has 20 lines"),
        (lambda text: "v1.2 0\n", "tells 0 samples"),
        (lambda text: text.replace("v1.2", "v1.1"), "is damaged in line 2: a member is EXTENSION OFFSET SIZE;"),
        (lambda text: text.replace(FIRST, FIRST.replace("512", "-512")), "is damaged in line 2"),
        (lambda text: text.replace(FIRST, FIRST.replace("512", "9" * 20)), "is damaged in line 2"),
        (lambda text: text.replace(FIRST, FIRST.replace("512", "5.1")), "is damaged in line 2"),
        (lambda text: text.replace(" 000000020.cls", " 000000020 .cls"), "is damaged in line 2"),
        (lambda text: text.replace("\ncls", "\n\ncls", 1).replace("v1.2 20", "v1.2 21"), "is damaged in line 2"),
        (lambda text: text.replace(FIRST, FIRST.replace("512", "1024")), "lists 1 bytes at 1024 in line 2 as"),
        (lambda text: text.replace(FIRST, FIRST.replace("512", "99999999999744")), "has no such member"),
        (lambda text: text.replace(FIRST, FIRST.replace(" 1 ", " 2 ")), "lists 2 bytes at 512 in line 2 as"),
        (lambda text: text.replace("000000020.cls", "000000021.cls"), "has no such member"),
        (lambda text: text.replace("v1.2 20", "v1.2 21") + text.split("\n")[1], "it stands there twice"),
    ],
)
def test_an_index_that_does_not_fit_is_refused_and_nothing_written(shards: Path, change, told: str) -> None:  # type: ignore[no-untyped-def]
    idx = idx_path(shards / "train-000001.tar")
    text = idx.read_text()
    assert FIRST in text and change(text) != text
    idx.write_text(change(text))
    for file in shards.glob("*.npz"):
        file.unlink()
    with pytest.raises(UserError) as caught:
        take(shards)
    assert told in str(caught.value) and str(idx) in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000
    assert not list(shards.glob("*.npz"))


def test_an_index_that_is_missing_is_named(shards: Path) -> None:
    idx_path(shards / "train-000001.tar").unlink()
    with pytest.raises(UserError, match=r"train-000001\.idx cannot be read \(No such file"):
        take(shards)


def test_names_as_gnu_tar_writes_them_are_not_compared(tmp_path: Path) -> None:
    tar = write_names(tmp_path / "a.tar", "a.jpg", "ü.jpg")
    idx = idx_bytes(tar)[0].decode().replace("ü", r"\303\274")
    idx_path(tar).write_text(idx)
    assert choices([tar])[tar].tolist() == index_tar(tar)[0].offsets.tolist()


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_any_content_is_a_choice_of_members_or_one_line(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    tar = write_names(tmp_path_factory.getbasetemp() / "fuzz" / "a.tar", "a.jpg", "a.cls", "b.jpg", "c.jpg")
    whole = idx_bytes(tar)[0]
    content = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content)))
        piece = data.draw(st.binary(max_size=3) | st.sampled_from([b"\n", b" ", b"-", b"0", b"9" * 19, b"512", b"\\"]))
        content[at : at + data.draw(st.integers(0, 3))] = piece
    idx_path(tar).write_bytes(content)
    try:
        chosen = choices([tar])[tar]
    except UserError as error:
        assert len(str(error).splitlines()) == 1
    else:
        with tarfile.open(tar) as members:
            assert np.isin(chosen, [member.offset_data for member in members]).all()


@pytest.mark.slow
@pytest.mark.parametrize("names", [["a.jpg", "a.cls", "b.cls", "b.jpg", "c.jpg", "d.txt"], None])
def test_dali_reads_by_our_index_what_it_finds_itself(tmp_path: Path, names: list[str] | None) -> None:
    pytest.importorskip("nvidia.dali")
    from nvidia.dali import fn, pipeline_def

    if names is None:
        shutil.copytree(SAMPLE, tmp_path / "tars")
    else:
        write_names(tmp_path / "tars" / "a.tar", "0.jpg", *names, mtime=1.5)
    tars = sorted((tmp_path / "tars").glob("*.tar"))
    samples = export(tars)

    @pipeline_def(batch_size=1, num_threads=1, device_id=None)
    def pipeline(indexes: list[str]):  # type: ignore[no-untyped-def]
        paths = [str(tar) for tar in tars]
        return tuple(fn.readers.webdataset(paths=paths, index_paths=indexes, ext=["jpg", "cls"]))

    def all_samples(indexes: list[str]) -> list[tuple[bytes, ...]]:
        built = pipeline(indexes)
        built.build()
        (count,) = built.epoch_size().values()
        assert count == samples
        return [tuple(np.asarray(part.at(0)).tobytes() for part in built.run()) for _ in range(count)]

    assert all_samples([str(idx_path(tar)) for tar in tars]) == all_samples([])

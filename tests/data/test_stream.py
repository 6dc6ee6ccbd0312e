"""The stream is a pure function of its identity: workers, ranks and the starting batch change nothing."""

from __future__ import annotations

import io
import itertools
import json
import mmap
import os
import pickle
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evaluation_shards import png, shard
from lives import alive, gone
from PIL import Image
from plain_tars import write_tar
from webdataset.tariterators import group_by_keys, tar_file_expander

from seer.data.crops import CropSpec, evaluation_crop
from seer.data.decode import ImageLimits, decode
from seer.data.history import History
from seer.data.mixture import SourceShare
from seer.data.photometric_parameters import COLUMNS, PhotometricSpec
from seer.data.sources import ShardReader
from seer.data.stream import BadSample, Batch, DataStream
from seer.errors import UserError
from seer.shard_index import ShardIndex
from seer.shard_list import ShardList
from seer.shards.index import index_tar

SPECS = [CropSpec(2, 24, 0.3, 1.0), CropSpec(3, 16, 0.1, 0.4)]
BROKEN = {(0, 3): "not_an_image", (1, 0): "truncated", (1, 1): "truncated", (2, 4): "not_an_image"}


def picture(number: int) -> bytes:
    return png(np.random.default_rng(number).integers(0, 256, (20 + number % 7, 30, 3), np.uint8))


def write_shard(path: Path, images: list[bytes]) -> ShardIndex:
    return shard(path, [(image, -1) for image in images])


def write_shards(
    folder: Path, counts: tuple[int, ...] = (7, 5, 0, 9), broken: dict[tuple[int, int], str] | None = None
) -> ShardList:
    shards = []
    for number, count in enumerate(counts):
        images = [picture(100 * number + sample) for sample in range(count)]
        for (place, sample), reason in (broken or {}).items():
            if place == number and sample < count:
                images[sample] = b"<html>" if reason == "not_an_image" else images[sample][: len(images[sample]) // 2]
        shards.append(write_shard(folder / f"train-{number:03d}.tar", images))
    return ShardList(shards)


def open_stream(shards: ShardList, *, workers: int = 0, batch: int = 6, **options: Any) -> DataStream:
    return DataStream(
        shards,
        seed=options.pop("seed", 11),
        global_batch_size=batch,
        crops=SPECS,
        flip_probability=0.5,
        photometric=PhotometricSpec(),
        workers=workers,
        **options,
    )


def take(stream: DataStream, start: int, count: int) -> list[Batch]:
    batches = [kept(batch) for batch in itertools.islice(stream.batches(start), count)]
    stream.close()
    return batches


def kept(batch: Batch) -> Batch:
    """A copy: the stream writes the batch after next into the same memory."""
    crops, photometric = ([tensor.clone() for tensor in tensors] for tensors in (batch.crops, batch.photometric))
    return replace(batch, crops=crops, photometric=photometric)


def same(one: Batch, other: Batch) -> bool:
    return (
        all(torch.equal(a, b) for a, b in zip(one.crops, other.crops, strict=True))
        and all(torch.equal(a, b) for a, b in zip(one.photometric, other.photometric, strict=True))
        and one.bad == other.bad
        and one.batch_index == other.batch_index
    )


@pytest.fixture
def shards(tmp_path: Path) -> ShardList:
    return write_shards(tmp_path)


def test_shapes_and_types(shards: ShardList) -> None:
    (batch,) = take(open_stream(shards), 5, 1)
    assert batch.batch_index == 5 and batch.bad == []
    assert [tuple(crops.shape) for crops in batch.crops] == [(12, 24, 24, 3), (18, 16, 16, 3)]
    assert [tuple(rows.shape) for rows in batch.photometric] == [(12, COLUMNS), (18, COLUMNS)]
    assert {crops.dtype for crops in batch.crops} == {torch.uint8}
    assert {rows.dtype for rows in batch.photometric} == {torch.float32}


@pytest.mark.parametrize("workers", [0, 2])
def test_all_batches_lie_in_whole_pages_of_one_memory(shards: ShardList, workers: int) -> None:
    stream = open_stream(shards, workers=workers)
    batches = stream.batches(0)
    memory = stream.memory
    assert memory.ctypes.data % mmap.PAGESIZE == memory.nbytes % mmap.PAGESIZE == 0
    for batch in itertools.islice(batches, 5):
        for tensor in (*batch.crops, *batch.photometric):
            assert np.shares_memory(tensor.numpy(), memory)
    stream.close()


def test_workers_change_nothing_and_no_global_randomness_is_drawn(tmp_path: Path, no_global_randomness: None) -> None:
    shards = write_shards(tmp_path, broken=BROKEN)
    inline = take(open_stream(shards), 2, 7)
    assert [batch.batch_index for batch in inline] == list(range(2, 9))
    assert any(batch.bad for batch in inline)
    for workers in (1, 2):
        others = take(open_stream(shards, workers=workers), 2, 7)
        assert all(same(one, other) for one, other in zip(inline, others, strict=True))


def test_ranks_take_slices_of_the_global_batch(tmp_path: Path) -> None:
    shards = write_shards(tmp_path, broken=BROKEN)
    whole = take(open_stream(shards), 1, 4)
    parts = [take(open_stream(shards, rank=rank, world_size=2), 1, 4) for rank in range(2)]
    for number, batch in enumerate(whole):
        for resolution, spec in enumerate(SPECS):
            for field in ("crops", "photometric"):
                pieces = [getattr(part[number], field)[resolution] for part in parts]
                pieces = [piece.reshape(spec.count, 3, *piece.shape[1:]) for piece in pieces]
                joined = torch.cat(pieces, dim=1).flatten(0, 1)
                assert torch.equal(joined, getattr(batch, field)[resolution])
        assert sorted(map(str, batch.bad)) == sorted(str(bad) for part in parts for bad in part[number].bad)


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker:UserWarning")  # fewer cores than that
@pytest.mark.parametrize(
    ("counts", "batch", "options"),
    [
        ((7, 5, 0, 9), 8, {"lanes": 4, "window": 2}),
        ((13, 1, 0, 0, 4), 12, {"lanes": 4, "window": 3}),
        ((9,), 8, {}),  # more workers and ranks than shards
    ],
)
def test_ranks_and_workers_of_any_number_make_the_same_batches(
    tmp_path: Path, counts: tuple[int, ...], batch: int, options: dict[str, int]
) -> None:
    shards = write_shards(tmp_path, counts=counts, broken=BROKEN)
    expected = take(open_stream(shards, batch=batch, **options), 1, 3)
    plain = take(open_stream(shards, batch=batch), 1, 3)
    assert all(map(same, expected, plain)) == (not options)
    for world_size, workers in ((1, 1), (1, 3), (2, 1), (4, 0), (4, 3)):
        parts = [
            take(open_stream(shards, batch=batch, workers=workers, rank=rank, world_size=world_size, **options), 1, 3)
            for rank in range(world_size)
        ]
        for number, whole in enumerate(expected):
            assert joined([part[number] for part in parts]) == joined([whole])


def joined(parts: list[Batch]) -> tuple[list[bytes], list[bytes], list[str], int]:
    """A global batch of the parts of its ranks: bytes of crops and parameters a resolution, bad samples, number."""

    def together(field: str) -> list[bytes]:
        rows = [[getattr(part, field)[number].unflatten(0, (spec.count, -1)) for part in parts] for number, spec in at]
        return [torch.cat(pieces, dim=1).numpy().tobytes() for pieces in rows]

    at = list(enumerate(SPECS))
    (batch_index,) = {part.batch_index for part in parts}
    return (
        together("crops"),
        together("photometric"),
        sorted(str(bad) for part in parts for bad in part.bad),
        batch_index,
    )


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("images", [1, 4, 99])
def test_a_look_shows_the_first_images_of_a_batch(tmp_path: Path, workers: int, images: int) -> None:
    shards = write_shards(tmp_path, broken=BROKEN)
    stream = open_stream(shards, workers=workers)
    replaced = 0
    for whole in take(stream, 1, 4):
        looked, origins = stream.look(whole.batch_index, images)
        count = min(images, 6)
        for field in ("crops", "photometric"):
            for found, every, spec in zip(getattr(looked, field), getattr(whole, field), SPECS, strict=True):
                expected = every.unflatten(0, (spec.count, 6))[:, :count]
                assert torch.equal(found, expected.reshape(found.shape))
        assert looked.bad == whole.bad[: len(looked.bad)] and (count < 6 or looked.bad == whole.bad)
        assert looked.bad == [bad for origin in origins for bad in origin.bad] and len(origins) == count
        replaced += sum(bool(origin.bad) for origin in origins)
    assert replaced or images == 1


def test_a_look_tells_what_was_cut(tmp_path: Path) -> None:
    """Each crop again, by Pillow alone: the box of the named file, resized and mirrored."""
    shards = write_shards(tmp_path, broken=BROKEN)
    replaced = 0
    for number in range(4):
        batch, origins = open_stream(shards).look(number, 6)
        for row, origin in enumerate(origins):
            at = {shard.location: shard for shard in shards.listed}[origin.shard]
            index = shards[shards.listed.index(at)]
            start = int(index.offsets[origin.sample])
            assert origin.data == Path(origin.shard).read_bytes()[start : start + int(index.sizes[origin.sample])]
            assert origin.key == f"{origin.sample:06d}" and origin.name == ""
            picture = Image.open(io.BytesIO(origin.data))
            crops = [crop for of_size in batch.crops for crop in of_size[row::6].numpy()]
            for crop, box, flip in zip(crops, origin.boxes.tolist(), origin.flips.tolist(), strict=True):
                again = np.asarray(picture.resize(crop.shape[:2], Image.Resampling.BILINEAR, box=box))
                assert np.array_equal(crop, again[:, ::-1] if flip else again)
            replaced += len(origin.bad)
    assert replaced


def test_a_look_leaves_a_running_iterator_alone(shards: ShardList) -> None:
    plain = take(open_stream(shards), 0, 3)
    stream = open_stream(shards)
    found = []
    for batch in itertools.islice(stream.batches(0), 3):
        stream.look(7, 4)
        found.append(kept(batch))
    stream.close()
    assert all(map(same, plain, found))


def test_any_batch_can_be_the_first(shards: ShardList) -> None:
    whole = take(open_stream(shards), 0, 9)  # three epochs of three batches
    for start in (1, 3, 8):
        (batch,) = take(open_stream(shards), start, 1)
        assert same(batch, whole[start])
    assert not torch.equal(whole[0].crops[0], whole[3].crops[0])


def test_seed_changes_order_crops_and_colours(shards: ShardList) -> None:
    (one,), (other,) = take(open_stream(shards), 0, 1), take(open_stream(shards, seed=12), 0, 1)
    assert not torch.equal(one.crops[0], other.crops[0]) and not torch.equal(one.photometric[0], other.photometric[0])


def test_crops_show_the_sample_that_the_order_names(tmp_path: Path) -> None:
    # Images of one colour each: whatever is cut out, the colour tells which image it was.
    images = []
    for level in range(12):
        buffer = io.BytesIO()
        Image.new("RGB", (40, 30), (level * 20, 255 - level * 20, level)).save(buffer, "PNG")
        images.append(buffer.getvalue())
    shards = ShardList([write_shard(tmp_path / "a.tar", images[:5]), write_shard(tmp_path / "b.tar", images[5:])])
    (batch,) = take(open_stream(shards, batch=12), 0, 1)
    for crops, spec in zip(batch.crops, SPECS, strict=True):
        blue = crops.reshape(spec.count, 12, -1, 3)[..., 2]
        assert (blue == blue[:1, :, :1]).all()  # every crop of a row is of the same image
        assert sorted(blue[0, :, 0].tolist()) == list(range(12))  # all of them, once


def test_every_batch_shows_the_shares_of_its_sources(tmp_path: Path) -> None:
    def images(colour: str, count: int) -> list[bytes]:
        buffer = io.BytesIO()
        Image.new("RGB", (40, 30), colour).save(buffer, "PNG")
        return [buffer.getvalue()] * count

    shards = [write_shard(tmp_path / f"{colour}.tar", images(colour, count)) for colour, count in COLOURS.items()]
    sources = [SourceShare(colour, weight, 1) for colour, weight in (("red", 1.0), ("blue", 2.0))]
    stream = DataStream(
        ShardList(shards),
        seed=0,
        global_batch_size=6,
        crops=SPECS,
        flip_probability=0.5,
        photometric=PhotometricSpec(),
        workers=0,
        sources=sources,
    )
    for batch in take(stream, 0, 5):
        assert (batch.crops[0].unflatten(0, (2, 6))[0, :, 0, 0] == torch.tensor([0, 0, 255])).all(1).sum() == 4


COLOURS = {"red": 30, "blue": 5}


def test_bad_images_are_replaced_by_their_followers_and_counted(tmp_path: Path) -> None:
    shards = write_shards(tmp_path, counts=(7, 2, 0, 9), broken=BROKEN)
    found: set[tuple[str, int, str]] = set()
    for batch in take(open_stream(shards), 0, 6):
        assert all(crops.float().std() > 20 for crops in batch.crops)  # never a grey image
        found |= {(Path(bad.shard).name, bad.sample, bad.reason) for bad in batch.bad}
    # Both of shard 1 are bad: its replacement is the first of shard 3 (shard 2 is empty).
    assert {("train-000.tar", 3, "not_an_image"), ("train-001.tar", 0, "truncated")} <= found
    assert found <= {(f"train-{shard:03d}.tar", sample, reason) for (shard, sample), reason in BROKEN.items()}


@pytest.mark.parametrize("workers", [0, 2])
def test_stand_ins_that_would_not_do_either_are_told_apart(tmp_path: Path, workers: int) -> None:
    """A shard that is bad as a whole is asked for many, and still no more images were replaced than stood in it."""
    shards = write_shards(tmp_path, counts=(7, 6), broken={(1, sample): "truncated" for sample in range(6)})
    stream = open_stream(shards, batch=13, workers=workers)
    (batch,) = take(stream, 0, 1)
    stream.close()
    assert batch.replaced == 6 and len(batch.bad) == 6 * 6
    assert sorted(bad.sample for bad in batch.bad if not bad.stand_in) == [*range(6)]


def test_images_beyond_the_limits_are_replaced_and_too_large_files_are_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = write_shards(tmp_path, counts=(6,))
    sizes = shards[0].sizes
    largest = int(sizes.max())
    assert (sizes == largest).sum() == 1
    read: list[int] = []

    def reading(reader: ShardReader, shard: ShardIndex, sample: int, alive: Callable[[], None]) -> bytes:
        read.append(sample)
        return read_of(reader, shard, sample, alive)

    read_of = ShardReader.read
    monkeypatch.setattr(ShardReader, "read", reading)
    (batch,) = take(open_stream(shards, limits=ImageLimits(max_bytes=largest - 1)), 0, 1)
    assert [(bad.sample, bad.reason) for bad in batch.bad] == [(int(sizes.argmax()), "too_many_bytes")]
    assert int(sizes.argmax()) not in read and len(read) == 6
    # Heights are 20 to 25, widths 30.
    (batch,) = take(open_stream(shards, limits=ImageLimits(min_side=22, max_pixels=24 * 30)), 0, 1)
    assert {(bad.sample, bad.reason) for bad in batch.bad} == {
        *((sample, "side_too_short") for sample in (0, 1)),
        (5, "too_many_pixels"),
    }


def test_a_replacement_equals_the_follower_in_the_same_slot(tmp_path: Path) -> None:
    (tmp_path / "broken").mkdir(), (tmp_path / "copied").mkdir()
    broken = write_shards(tmp_path / "broken", counts=(6,), broken={(0, 5): "truncated"})
    images = [picture(sample) for sample in range(6)]
    copied = ShardList([write_shard(tmp_path / "copied" / "train-000.tar", [*images[:5], images[0]])])
    (one,), (other,) = take(open_stream(broken), 0, 1), take(open_stream(copied), 0, 1)
    assert (
        one.bad == [BadSample(str(tmp_path / "broken" / "train-000.tar"), 5, "000005", "truncated")] and other.bad == []
    )
    assert torch.equal(one.crops[0], other.crops[0]) and torch.equal(one.crops[1], other.crops[1])


@pytest.mark.parametrize(("world", "workers"), [(1, 0), (1, 1), (2, 0), (3, 0)])
def test_shards_that_join_later_change_no_batch_before(tmp_path: Path, world: int, workers: int) -> None:
    """Nor what stands in for the images of a shard that are all bad: the first of the next shard of the time."""
    old = write_shards(tmp_path, counts=(7, 2, 0, 9), broken=BROKEN)
    joined = write_shard(tmp_path / "train-001b.tar", [picture(1000 + sample) for sample in range(6)])
    new = ShardList([old[0], old[1], joined, old[2], old[3]])
    history = History.beginning(old, []).continued(new, [], 4, global_batch_size=6, lanes=1, allow_growth=True)
    assert history.to_come(4, 100) == ["1 new shard (6 images) joins at epoch 2 (step 6)"]
    for rank in range(world):
        part = {"workers": workers, "rank": rank, "world_size": world}
        before, grown = take(open_stream(old, **part), 0, 6), open_stream(new, history=history, **part)
        assert all(same(one, other) for one, other in zip(take(grown, 0, 6), before, strict=True))
        assert grown.epochs(6) == 2 and grown.epochs(10) == 3
        if world == 1:
            assert any(bad.shard.endswith("train-001.tar") for batch in before for bad in batch.bad)


def test_nothing_but_bad_images_is_one_error(tmp_path: Path) -> None:
    broken = {(0, sample): "not_an_image" for sample in range(6)}
    with pytest.raises(UserError, match=r"decoded \(not_an_image\).*5 others.*pack the folder again"):
        take(open_stream(write_shards(tmp_path, counts=(6,), broken=broken)), 0, 1)


def test_a_lone_bad_image_is_told_with_its_reason(tmp_path: Path) -> None:
    images = write_shards(tmp_path, counts=(1,), broken={(0, 0): "truncated"})
    with pytest.raises(UserError, match=r"sample 0 cannot be decoded \(truncated\): there is no other"):
        take(open_stream(images, batch=1), 0, 1)


def remove(path: Path) -> None:
    path.unlink()


def cut_short(path: Path) -> None:
    os.truncate(path, 4096)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("damage", [remove, cut_short])
def test_a_lost_tar_is_one_error_from_next(shards: ShardList, workers: int, damage: Callable[[Path], None]) -> None:
    path = Path(shards[3].location)
    damage(path)
    stream = open_stream(shards, workers=workers)
    with pytest.raises(UserError) as caught:
        take(stream, 0, 10)
    stream.close()
    assert str(path) in str(caught.value) and "Traceback" not in str(caught.value)
    assert isinstance(pickle.loads(pickle.dumps(caught.value)), UserError)


def test_a_tar_cut_after_it_was_opened(tmp_path: Path) -> None:
    (shard,) = write_shards(tmp_path, counts=(4,))
    reader = ShardReader()
    assert reader.read(shard, 0) == picture(0)
    os.truncate(shard.location, int(shard.offsets[3]) + 5)
    with pytest.raises(UserError, match="ends inside a sample"):
        reader.read(shard, 3)
    reader.close()


def tar_of(path: Path, files: dict[str, bytes], **how: Any) -> Path:
    with tarfile.open(path, "w", **how) as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def test_a_tar_that_another_of_the_same_size_replaced(tmp_path: Path) -> None:
    path = tar_of(tmp_path / "a.tar", {"a.jpg": bytes(100), "b.jpg": bytes(99), "c.jpg": bytes(600)})
    index, _ = index_tar(path)
    size = path.stat().st_size
    tar_of(path, {"a.jpg": bytes(100), "b.jpg": bytes(600), "c.jpg": bytes(99)})
    assert path.stat().st_size == size
    reader = ShardReader()
    assert reader.read(index, 0) == bytes(100)  # its header is the same
    for sample in (1, 2):
        with pytest.raises(UserError, match=r"a\.tar: its bytes are others .* since it was indexed"):
            reader.read(index, sample)
    reader.close()


def test_pax_records_may_overrule_the_size_in_a_header(tmp_path: Path) -> None:
    path = tar_of(
        tmp_path / "a.tar", {"a.jpg": b"abc", "b.jpg": b"defg"}, format=tarfile.PAX_FORMAT, pax_headers={"size": "3"}
    )
    index, _ = index_tar(path)
    reader = ShardReader()
    assert [reader.read(index, sample) for sample in range(2)] == [b"abc", b"def"]
    reader.close()


def test_open_files_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("seer.data.sources._OPEN_FILES", 3)
    shards = write_shards(tmp_path, counts=(1,) * 8)
    reader = ShardReader()
    before = len(os.listdir("/proc/self/fd"))
    for number in (*range(8), 0, 7, 7):
        assert reader.read(shards[number], 0) == picture(100 * number)
    assert len(os.listdir("/proc/self/fd")) == before + 3
    reader.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_batch_that_cannot_be_cut(shards: ShardList) -> None:
    with pytest.raises(UserError, match="use a multiple of 4"):
        open_stream(shards, batch=6, world_size=4)
    with pytest.raises(UserError, match="21 samples"):
        open_stream(shards, batch=22)


def test_identity_names_what_changes_batches_and_nothing_else(shards: ShardList, tmp_path: Path) -> None:
    identity = open_stream(shards).identity()
    assert json.loads(json.dumps(identity)) == identity
    assert open_stream(shards, workers=2, rank=1, world_size=2).identity() == identity
    assert open_stream(shards, seed=5).identity() != identity
    assert open_stream(shards, batch=7).identity() != identity
    assert open_stream(shards, limits=ImageLimits(min_side=2)).identity() != identity
    assert open_stream(shards, lanes=2).identity() != identity != open_stream(shards, window=2).identity()
    (tmp_path / "moved").mkdir()
    assert open_stream(write_shards(tmp_path / "moved")).identity() == identity
    assert open_stream(write_shards(tmp_path / "moved", counts=(7, 5, 0, 8))).identity() != identity


def test_samples_are_read_for_evaluation_too(shards: ShardList) -> None:
    data = ShardReader().read(shards[3], 4)
    assert data == picture(304)
    assert evaluation_crop(decode(data), 16).shape == (16, 16, 3)


def test_a_later_iterator_ends_the_earlier_one(shards: ShardList) -> None:
    stream = open_stream(shards, workers=1)
    first = stream.batches(0)
    next(first)
    (again,) = take(stream, 4, 1)
    assert again.batch_index == 4
    assert next(first, None) is None


PARENT = """
import os, pickle, signal, sys
from seer.data.crops import CropSpec
from seer.data.photometric_parameters import PhotometricSpec
from seer.data.stream import DataStream

signal.signal(signal.SIGUSR1, lambda *_: print("handled", os.getpid(), flush=True))
with open(sys.argv[1], "rb") as file:
    shards = pickle.load(file)
stream = DataStream(shards, seed=0, global_batch_size=6, crops=[CropSpec(1, 8, 0.5, 1.0)], flip_probability=0.5,
                    photometric=PhotometricSpec(), workers=2)
batches = stream.batches(0)
next(batches)
print(*stream.worker_pids, flush=True)
for line in sys.stdin:
    print(next(batches).batch_index, flush=True)
"""


@pytest.fixture
def parent(shards: ShardList, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    (tmp_path / "shards.pkl").write_bytes(pickle.dumps(shards))
    (tmp_path / "parent.py").write_text(PARENT)
    root = str(Path(__file__).resolve().parents[2])
    with subprocess.Popen(
        [sys.executable, str(tmp_path / "parent.py"), str(tmp_path / "shards.pkl")],
        env={**os.environ, "PYTHONPATH": root},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        yield process, [int(pid) for pid in process.stdout.readline().split()]
        process.kill()


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no signal of a parent's death")
def test_workers_leave_signals_to_the_parent_and_die_with_it(parent: tuple[subprocess.Popen[str], list[int]]) -> None:
    process, workers = parent
    assert process.stdin is not None and process.stdout is not None
    assert len(workers) == 2 and all(map(alive, workers))
    for worker in workers:
        for name in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
            os.kill(worker, name)
    for expected in range(1, 9):
        process.stdin.write("next\n")
        process.stdin.flush()
        assert process.stdout.readline() == f"{expected}\n"
    assert all(map(alive, workers))
    process.kill()
    assert gone(workers)


def test_a_parent_that_closes_nothing_still_exits(parent: tuple[subprocess.Popen[str], list[int]]) -> None:
    process, workers = parent
    assert process.stdin is not None
    process.stdin.close()
    assert process.wait(timeout=20) == 0
    assert not any(map(alive, workers))


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_sample_is_called_as_webdataset_calls_it(tmp_path: Path, kind: int) -> None:
    names = ["a.jpg", "b/c.d.jpg", "./www.site.jpg", "ü/ñ.png", f"{'d' * 90}/{'e' * 80}.jpg", f"{'f' * 90}.x.jpg"]
    path = write_tar(tmp_path / "a.tar", *((name, b"abc") for name in names), form=kind)
    index, _ = index_tar(path)
    keys = [ShardReader().key(index, sample) for sample in range(len(index))]
    with path.open("rb") as stream:
        expected = [sample["__key__"] for sample in group_by_keys(tar_file_expander([{"url": "", "stream": stream}]))]
    assert keys == expected


_MANY_SHARDS = """
import pickle, resource, sys
from seer.data.sources import ShardReader
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
reader = ShardReader()
for shard in pickle.load(sys.stdin.buffer):
    sys.stdout.buffer.write(reader.read(shard, 0))
"""


def test_a_low_limit_of_open_files_is_kept(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "0.tar", [picture(0)])
    for number in range(1, 100):
        (tmp_path / f"{number}.tar").symlink_to("0.tar")
    shards = [replace(shard, location=str(tmp_path / f"{number}.tar")) for number in range(100)]
    read = subprocess.check_output([sys.executable, "-c", _MANY_SHARDS], input=pickle.dumps(shards))
    assert read == picture(0) * 100

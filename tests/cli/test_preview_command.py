"""`seer preview`: the picture shows what training learns from, of configurations and of runs, which it only reads."""

from __future__ import annotations

import io
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from recorded_run import recorded_run
from tiny_run import make_shards, tiny_config, tiny_words

from seer import build
from seer.checkpoint.store import CheckpointStore
from seer.cli.main import main
from seer.config import TrainConfig, freeze
from seer.data.history import History
from seer.data.stream import DataStream, QuarantinedSample
from seer.observe import preview
from seer.observe.preview import PreviewRow
from seer.shards.index import index
from seer.training.step import float_crops, step_settings

MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    """48 labelled images, 6 batches of 8."""
    return make_shards(tmp_path_factory.mktemp("images"))


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[PreviewRow]:
    """The rows of the pictures that are drawn."""
    rows: list[PreviewRow] = []
    draw = preview.preview_picture

    def record(given: list[PreviewRow], title: str, below: str) -> Image.Image:
        rows[:] = given
        return draw(given, title, below)

    monkeypatch.setattr(preview, "preview_picture", record)
    return rows


def what_training_sees(config: TrainConfig, stream: DataStream, batch_index: int) -> list[np.ndarray]:
    """An array (crops, N, S, S, 3) a resolution: the whole batch as the step gets it, as levels of 0 to 255."""
    batch = next(iter(stream.batches(batch_index)))
    floats = float_crops(batch, step_settings(config, torch.device("cpu")))
    stream.close()
    levels = [255 * (crops.permute(0, 2, 3, 1).double().numpy() * STD + MEAN) for crops in floats]
    return [of_size.reshape(2, -1, *of_size.shape[1:]) for of_size in levels]


def is_what_training_sees(rows: list[PreviewRow], expected: list[np.ndarray]) -> bool:
    crops = [crop for of_size in expected for crop in of_size]
    return all(
        np.abs(found - crop[number]).max() < 0.501  # rounded
        for number, row in enumerate(rows)
        for found, crop in zip(row.crops, crops, strict=True)
    )


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(file.relative_to(folder)): (file.stat().st_mtime_ns, file.read_bytes() if file.is_file() else b"")
        for file in [folder, *sorted(folder.rglob("*"))]
    }


def test_it_shows_what_training_sees(
    shards: str, tmp_path: Path, drawn: list[PreviewRow], capsys: pytest.CaptureFixture[str]
) -> None:
    out, config = tmp_path / "new" / "preview.png", tiny_config(tmp_path / "run", shards, "train.steps=20")
    pictures = []
    for workers in (0, 2):
        given = ("train.steps=20", "data.decoder=pillow", f"data.workers={workers}")
        words = tiny_words(tmp_path / "run", shards, *given)
        assert main(["preview", *words[:3], "--out", str(out), *words[3:], "--batch", "13", "--images", "5"]) == 0
        said = "the first 5 of 8 images of batch 13 (epoch 2), 2 crops of 32 and 2 crops of 24 pixels"
        assert capsys.readouterr() == (f"{out}: {said}\n", "")
        pictures.append(out.read_bytes())
        stream = build.stream(config, workers=workers, decoder="pillow")
        assert len(drawn) == 5 and is_what_training_sees(drawn, what_training_sees(config, stream, 13))
    assert pictures[0] == pictures[1] and not (tmp_path / "run").exists()
    with Image.open(out) as picture:
        shown = np.asarray(picture)
    for row in drawn:
        for crop in row.crops:
            enlarged = crop.repeat(6, 0).repeat(6, 1)
            first = np.argwhere((shown == enlarged[0, 0]).all(-1))
            assert any(np.array_equal(shown[y : y + len(crop) * 6, x : x + len(crop) * 6], enlarged) for y, x in first)
    assert main(["preview", *words, "--out", str(out), "--batch", "12", "--images", "5"]) == 0
    assert out.read_bytes() != pictures[0]


def test_without_colour_a_crop_is_its_box_of_the_source(tmp_path: Path, drawn: list[PreviewRow]) -> None:
    """Smooth photographs of odd sizes, as JPEG, some of them lying on their side by EXIF."""
    y, x = np.mgrid[0:400, 0:300] / 300
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for number in range(8):
            pixels = np.stack([np.sin(number + 3 * x), np.cos(2 * y + number), np.sin(4 * x * y)], -1) * 100 + 128
            exif, buffer = Image.Exif(), io.BytesIO()
            exif[0x0112] = 6 if number % 2 else 1
            Image.fromarray(pixels[: 400 - 20 * number].astype(np.uint8)).save(buffer, "JPEG", quality=95, exif=exif)
            member = tarfile.TarInfo(f"{number}.jpg")
            member.size = buffer.tell()
            tar.addfile(member, io.BytesIO(buffer.getvalue()))
    index([str(tmp_path / "a.tar")])
    plain = [f"data.photometric.{key}=0" for key in ("jitter_probability", "grayscale_probability", "blur_probability")]
    words = tiny_words(tmp_path / "run", str(tmp_path / "a.tar"), *plain, "data.flip_probability=0")
    assert main(["preview", *words, "--out", str(tmp_path / "a.png")]) == 0
    assert {row.source.size == row.size for row in drawn} == {True} and len({row.size for row in drawn}) == 8
    for row in drawn:
        assert len(row.crops) == len(row.boxes) == 4
        for crop, box in zip(row.crops, row.boxes.tolist(), strict=True):
            again = np.asarray(row.source.crop(box).resize(crop.shape[:2], Image.Resampling.LANCZOS))
            assert np.abs(again.astype(int) - crop).mean() < 4
            other = np.asarray(row.source.resize(crop.shape[:2], Image.Resampling.LANCZOS))
            whole = (box[2] - box[0]) * (box[3] - box[1]) > 0.8 * row.size[0] * row.size[1]
            assert whole or np.abs(other.astype(int) - crop).mean() > 4


def test_captions_and_what_replaces_a_bad_image(
    shards: str, tmp_path: Path, drawn: list[PreviewRow], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["preview", *tiny_words(tmp_path / "run", shards), "--out", str(tmp_path / "a.png")]) == 0
    assert {row.about.split(",")[1] for row in drawn} == {" 40 x 40"} and {row.warning for row in drawn} == {""}
    assert {row.about.partition("class ")[2] for row in drawn} <= {"class0", "class1", "class2"}
    folder = tmp_path / "tars"
    folder.mkdir()
    with tarfile.open(folder / "a.tar", "w") as tar:
        for number in range(8):
            buffer = io.BytesIO()
            Image.new("RGB", (40 + number, 40)).save(buffer, "PNG")
            data = buffer.getvalue() if number % 4 else buffer.getvalue()[:40]
            member = tarfile.TarInfo(f"{number}.png")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    index([str(folder / "a.tar")])
    capsys.readouterr()
    assert main(["preview", *tiny_words(tmp_path, str(folder / "a.tar")), "--out", str(tmp_path / "a.png")]) == 0
    assert capsys.readouterr().out.endswith("24 pixels; 2 bad images replaced\n")
    found = {row.warning: row.name for row in drawn if row.warning}
    assert found == {f"in the place of a bad image (not_an_image): {bad} of a.tar": str(bad + 1) for bad in (0, 4)}
    assert {row.about for row in drawn if row.name == "5"} == {"a.tar, 45 x 40"}


def test_a_run_under_way_is_only_read(
    shards: str, tmp_path: Path, drawn: list[PreviewRow], capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(tmp_path / "run", shards)
    stream = build.stream(config, workers=0, decoder="pillow")
    with recorded_run(config.run_dir, freeze(config), data=stream.identity()) as run:
        run.metrics.write_text("{}\n")
        before = contents(run.folder)
        assert main(["preview", "--run", str(run.folder), "--batch", "4", "--out", str(tmp_path / "a.png")]) == 0
        assert contents(run.folder) == before
        run.require_ownership()
    assert capsys.readouterr().err == ""
    assert is_what_training_sees(drawn, what_training_sees(config, stream, 4))


def test_of_a_run_it_knows_the_deadly_images(shards: str, tmp_path: Path, drawn: list[PreviewRow]) -> None:
    config = tiny_config(tmp_path / "run", shards)
    stream = build.stream(config, workers=0, decoder="pillow")
    _, origins = stream.look(2, 8)
    deadly = next(one for one in build.shards(config)[0].listed if one.location == origins[3].shard)
    with recorded_run(config.run_dir, freeze(config), data=stream.identity()) as run:
        quarantine = [[deadly.name, deadly.digest, origins[3].sample]]
        CheckpointStore(run.checkpoints).save(5, {"a": torch.zeros(1)}, {"quarantine": quarantine})
    assert main(["preview", "--run", config.run_dir, "--batch", "2", "--out", str(tmp_path / "a.png")]) == 0
    warnings = [row.warning for row in drawn]
    assert (
        warnings
        == [""] * 3 + [f"in the place of a bad image (killed_worker): {origins[3].key} of {deadly.name}"] + [""] * 4
    )
    stream.add_to_quarantine([QuarantinedSample(deadly.name, deadly.digest, origins[3].sample)])
    assert is_what_training_sees(drawn, what_training_sees(config, stream, 2))


def test_a_run_that_grew(
    shards: str, tmp_path: Path, drawn: list[PreviewRow], capsys: pytest.CaptureFixture[str]
) -> None:
    """Shards joined at batch 6; then more came, of which the run knows nothing. Either way a batch stays what it is."""
    folder = tmp_path / "collection"
    for name, made in (("b", shards), ("a", make_shards(tmp_path / "more", each=8, seed=1))):
        (folder / name).mkdir(parents=True)
        for file in Path(made).parent.iterdir():
            if file.name != "manifest.json":
                shutil.copy(file, folder / name / file.name.replace("shards-", f"{name}-"))

    def config_of(pattern: str) -> TrainConfig:
        return tiny_config(tmp_path / "run", f"{folder}/{pattern}", "train.steps=40")

    began, grown = config_of("b/*.tar"), config_of("*/*.tar")
    opened = build.shards(grown)
    history = History.beginning(*build.shards(began)).continued(
        *opened, 3, global_batch_size=8, lanes=1, allow_growth=True
    )
    streams = {
        name: build.stream(config, workers=0, decoder="pillow", opened=shards, history=its)
        for name, config, shards, its in (
            ("began", began, build.shards(began), None),
            ("grown", grown, opened, history),
            ("as if all were there", grown, opened, None),
        )
    }
    with recorded_run(grown.run_dir, freeze(grown), data=streams["grown"].identity(), shards=history.to_json()) as run:
        run.metrics.write_text("{}\n")
    expected = {
        (name, batch): what_training_sees(grown, stream, batch) for name, stream in streams.items() for batch in (5, 7)
    }

    def looked(batch: int) -> list[PreviewRow]:
        words = ["preview", "--run", grown.run_dir, "--batch", str(batch), "--out", str(tmp_path / "a.png")]
        assert main(words) == 0
        return [*drawn]

    for more_came in (False, True):
        if more_came:
            (folder / "later").mkdir()
            for file in (folder / "a").iterdir():
                shutil.copy(file, folder / "later" / f"aa-{file.name}")
        found = {batch: looked(batch) for batch in (5, 7)}
        right = [key for key, pixels in expected.items() if is_what_training_sees(found[key[1]], pixels)]
        assert right == [("began", 5), ("grown", 5), ("grown", 7)]
    (run.folder / "shards.json").unlink()
    capsys.readouterr()
    assert main(["preview", "--run", grown.run_dir, "--out", str(tmp_path / "a.png")]) == 2
    assert "shards.json is gone" in capsys.readouterr().err


def test_other_shards_than_the_runs_are_refused(
    shards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run of before shards.json, whose patterns have come to mean more."""
    config = tiny_config(tmp_path / "run", shards)
    data = build.stream(config, workers=0, decoder="pillow").identity()
    with recorded_run(config.run_dir, freeze(config), data=data | {"index_digest": "0" * 32}) as run:
        run.metrics.write_text("{}\n")
    assert main(["preview", "--run", config.run_dir, "--out", str(tmp_path / "a.png")]) == 2
    assert "data.shards, contents" in capsys.readouterr().err and not (tmp_path / "a.png").exists()


@pytest.mark.parametrize("fault", ["cut", "place", "run", "folder", "decoder", "smaller"])
def test_what_is_wrong_is_one_line_and_leaves_nothing(
    fault: str, shards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, folder = tmp_path / "out" / "a.png", tmp_path / "tars"
    out.parent.mkdir()
    shutil.copytree(Path(shards).parent, folder)
    words = [*tiny_words(tmp_path / "run", f"{folder}/*.tar"), "--out", str(out)]
    if fault == "cut":
        for tar in folder.glob("*.tar"):
            os.truncate(tar, tar.stat().st_size - 512)
    elif fault == "place":
        words[-1] = "/proc/nothing/a.png"
    elif fault == "run":
        words = ["--run", str(folder), *words[-2:]]
    elif fault == "folder":
        out.mkdir()
    elif fault == "decoder":
        words.insert(0, "data.decoder=pillow-simd")
    else:
        words = [*tiny_words(tmp_path / "run", f"{folder}/*.tar", "train.global_batch_size=49"), *words[-2:]]
    assert main(["preview", *words]) == 2
    said, error = capsys.readouterr()
    assert said == "" and error.startswith("seer: ") and error.count("\n") == 1
    assert [*out.parent.iterdir()] == ([out] if fault == "folder" else []) and not (tmp_path / "run").exists()


def test_small_batches_are_drawn_whole_and_one_resolution_will_do(
    shards: str, tmp_path: Path, drawn: list[PreviewRow], capsys: pytest.CaptureFixture[str]
) -> None:
    few = ("train.global_batch_size=2", "data.small.count=0", "data.large.count=2")
    assert main(["preview", *tiny_words(tmp_path / "run", shards, *few), "--out", str(tmp_path / "a.png")]) == 0
    assert capsys.readouterr().out.endswith("the first 2 of 2 images of batch 0 (epoch 0), 2 crops of 32 pixels\n")
    assert [len(row.crops) for row in drawn] == [2, 2]

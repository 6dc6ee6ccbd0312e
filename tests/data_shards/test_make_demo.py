import importlib.util
import io
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

SCRIPT = Path(__file__).parents[2] / "data_shards" / "make_demo.py"


@pytest.fixture(scope="module")
def make_demo() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_demo", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, SCRIPT, *map(str, words)], capture_output=True, text=True)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.jpg")}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "images"
    result = run(out, "--train", 30, "--val", 20, "--workers", 2)
    assert result.returncode == 0 and "30 + 20 images" in result.stdout and result.stderr == ""
    return out


def test_an_image_is_a_function_of_seed_split_and_index(make_demo: ModuleType) -> None:
    image = make_demo.draw(3, "train", 17)
    assert image.shape == (96, 96, 3) and image.dtype == np.uint8
    make_demo.draw(3, "train", 18)
    np.testing.assert_array_equal(make_demo.draw(3, "train", 17), image)
    for other in ((4, "train", 17), (3, "val", 17), (3, "train", 27)):
        assert np.mean(make_demo.draw(*other) != image) > 0.9


def test_the_global_stream_is_not_drawn(make_demo: ModuleType, no_global_randomness: None) -> None:
    make_demo.draw(0, "train", 0)


def test_classes_take_turns(made: Path, make_demo: ModuleType) -> None:
    assert len(make_demo.CLASSES) == 10
    counts = Counter(path.split("/")[1] for path in files(made / "train").keys() | files(made).keys() if "/" in path)
    assert len(files(made)) == 50
    for split, each in (("train", 3), ("val", 2)):
        counts = Counter(path.split("/")[0] for path in files(made / split))
        assert counts == dict.fromkeys(make_demo.CLASSES, each)


def test_files_are_the_drawn_images(made: Path, make_demo: ModuleType) -> None:
    for index in range(10):
        name = f"val/{make_demo.CLASSES[index]}/{index:05d}.jpg"
        image = np.asarray(Image.open(io.BytesIO((made / name).read_bytes())))
        difference = np.abs(image.astype(int) - make_demo.draw(0, "val", index))
        assert difference.mean() < 8


def test_light_and_dark_are_swapped_as_often_as_not(make_demo: ModuleType) -> None:
    # A class must not be known by its mean colour: the class means of the images differ by less than their spread.
    means = np.array([[make_demo.draw(0, "train", 10 * i + c).mean() for i in range(12)] for c in range(10)])
    assert means.mean(axis=1).std() < means.std(axis=1).mean()


def test_the_same_call_does_nothing_and_other_options_replace(made: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    assert run(first, "--train", 10, "--val", 0, "--workers", 1).returncode == 0
    stamp = first.stat().st_mtime_ns
    assert "already holds" in run(first, "--train", 10, "--val", 0).stdout
    assert first.stat().st_mtime_ns == stamp
    next((first / "train").rglob("*.jpg")).unlink()  # an incomplete result is made anew
    assert run(first, "--train", 10, "--val", 0, "--workers", 1).returncode == 0
    assert run(second, "--train", 10, "--val", 0, "--workers", 2).returncode == 0
    assert files(first) == files(second) and len(files(first)) == 10
    assert run(first, "--train", 10, "--val", 0, "--seed", 1, "--workers", 1).returncode == 0
    assert files(first) != files(second) and len(files(first)) == 10
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]  # nothing temporary


def test_a_folder_of_others_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    result = run(tmp_path, "--train", 10, "--val", 0)
    assert result.returncode == 2 and "is not empty" in result.stderr and "Traceback" not in result.stderr
    result = run(tmp_path / "mine.txt" / "out", "--train", 10, "--val", 0)
    assert result.returncode == 2 and "cannot be written" in result.stderr and "Traceback" not in result.stderr

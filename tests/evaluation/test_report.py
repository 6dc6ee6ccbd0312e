"""Scores beside baselines, and the picture of neighbours."""

import io

import numpy as np
import pytest
import torch
from evaluation_shards import labelled
from PIL import Image
from rich.console import Console

from seer.errors import UserError
from seer.evaluation.features import LabelledCrops
from seer.evaluation.knn import Neighbours
from seer.evaluation.report import baselines, neighbours_picture, one_a_class, picture_of, table


def colour(images: torch.Tensor) -> torch.Tensor:
    return images.mean((2, 3))


def nothing(images: torch.Tensor) -> torch.Tensor:
    return torch.ones(len(images), 3)


def crops(labels: list[int], size: int = 32) -> LabelledCrops:
    shades = torch.tensor(labels, dtype=torch.uint8)[:, None, None, None] * 40 + 20
    return LabelledCrops(shades.expand(-1, size, size, 3).contiguous(), torch.tensor(labels), {})


def test_baselines_and_their_table(tmp_path):
    bank, queries = labelled(tmp_path / "bank", (20, 20)), labelled(tmp_path / "queries", (16,))
    found = baselines(colour, nothing, bank, queries, image_size=16, k=5)
    assert list(found.scores) == ["knn_top1_pixels", "knn_top1_untrained", "knn_top1"]
    assert found.scores["knn_top1_untrained"] == 0.25 and found.scores["knn_top1"] == 1.0
    console = Console(file=io.StringIO(), width=80)
    console.print(table(found.scores))
    text = console.file.getvalue()
    assert all(words in text for words in ("raw pixels", "untrained network", "trained network", "25.0%", "100.0%"))
    picture_of(found, tmp_path / "n.png", title="Neighbours", class_names=["red", "green", "blue", "yellow"])
    with Image.open(tmp_path / "n.png") as picture:
        assert picture.format == "PNG"


def test_queries_are_of_different_classes():
    labels = torch.tensor([2, 2, 2, 0, 0, 1, 2])
    assert one_a_class(labels, 3).tolist() == [3, 5, 0]
    assert one_a_class(labels, 5).tolist() == [3, 4, 5, 0, 1]
    assert one_a_class(labels, 100).tolist() == [3, 4, 5, 0, 1, 2, 6]


@pytest.mark.parametrize(("size", "tile"), [(28, 84), (32, 96), (96, 96), (224, 224)])
def test_size_and_frames(tmp_path, size, tile):
    queries, bank = crops([0, 1], size), crops([0, 1, 1, 2], size)
    indices = torch.tensor([[0, 1, 3], [2, 0, 1]])
    neighbours_picture(queries, bank, Neighbours(torch.zeros(2, 3), indices), tmp_path / "a" / "n.png", title="T")
    picture = np.asarray(Image.open(tmp_path / "a" / "n.png").convert("RGB")).astype(int)
    framed = tile + 8
    assert picture.shape == (92 + 2 * (framed + 8) + 20 - 8, 40 + 120 + 4 * (framed + 8) + 16, 3)
    greens = (picture == (34, 139, 84)).all(axis=2)
    reds = (picture == (205, 52, 52)).all(axis=2)
    left = 20 + 120 + framed + 8 + 16  # of the first neighbour
    for row, agree in enumerate([[True, False, False], [True, False, True]]):
        for column, same in enumerate(agree):
            y, x = 92 + row * (framed + 8), left + column * (framed + 8)
            assert (greens if same else reds)[y, x : x + framed].all()
            inside = picture[y + framed // 2, x + framed // 2]
            assert (inside == int(bank.crops[indices[row, column], 0, 0, 0])).all()


def test_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        neighbours_picture(
            crops([0]),
            crops([0]),
            Neighbours(torch.zeros(1, 1), torch.zeros(1, 1, dtype=torch.int64)),
            tmp_path / "file" / "n.png",
            title="T",
        )

"""kNN while a run goes on."""

import pytest
import torch
from evaluation_shards import coloured, labelled, shard

from seer.errors import UserError
from seer.evaluation import online as online_module
from seer.evaluation.online import OnlineEvaluation
from seer.shard_index import ShardList


def colour(images: torch.Tensor) -> torch.Tensor:
    return images.mean((2, 3))


def nothing(images: torch.Tensor) -> torch.Tensor:
    return torch.ones(len(images), 3)


def test_when_it_is_due():
    empty = ShardList([])
    evaluation = OnlineEvaluation(empty, empty, every_steps=10, image_size=16)
    assert [step for step in range(26) if evaluation.due(step)] == [10, 20]
    assert [step for step in range(26) if evaluation.due(step, 25)] == [10, 20, 25]
    assert not any(OnlineEvaluation(empty, empty, every_steps=0, image_size=16).due(step, 25) for step in range(26))
    with pytest.raises(UserError, match="every_steps=-1"):
        OnlineEvaluation(empty, empty, every_steps=-1, image_size=16)


def test_score_tells_features_that_know_from_those_that_do_not(tmp_path):
    bank, queries = labelled(tmp_path / "bank", (20, 20)), labelled(tmp_path / "queries", (16,))
    evaluation = OnlineEvaluation(bank, queries, every_steps=1, image_size=16, k=5)
    assert evaluation.score(colour)["knn_top1"] == 1.0
    assert evaluation.score(nothing)["knn_top1"] == 0.25


def test_images_are_decoded_once(tmp_path, monkeypatch):
    bank, queries = labelled(tmp_path / "bank"), labelled(tmp_path / "queries")
    decoded = []
    crops = online_module.labelled_crops
    monkeypatch.setattr(
        online_module, "labelled_crops", lambda shards, **options: decoded.append(1) or crops(shards, **options)
    )
    evaluation = OnlineEvaluation(bank, queries, every_steps=1, image_size=16, max_bank_images=8, max_query_images=4)
    first = evaluation.score(colour)
    assert len(decoded) == 2
    assert evaluation.score(colour)["knn_top1"] == first["knn_top1"]
    assert len(decoded) == 2
    monkeypatch.setattr(online_module, "_KEEP_BYTES", 0)
    again = OnlineEvaluation(bank, queries, every_steps=1, image_size=16, max_bank_images=8, max_query_images=4)
    assert [again.score(colour)["knn_top1"] for _ in range(2)] == [first["knn_top1"]] * 2
    assert len(decoded) == 6


def test_images_without_labels_are_refused_at_once_if_they_are_taken(tmp_path):
    good = labelled(tmp_path / "good")
    samples = [(coloured(0, number), -1 if number == 1 else 0) for number in range(4)]
    lacking = ShardList([shard(tmp_path / "lacking.tar", samples)])
    for bank, queries in ((lacking, good), (good, lacking)):
        with pytest.raises(UserError, match=r"lacking\.tar holds images without labels"):
            OnlineEvaluation(bank, queries, every_steps=1, image_size=16)
    OnlineEvaluation(good, lacking, every_steps=1, image_size=16, max_query_images=1)  # takes the third


def test_bad_images_are_said_once(tmp_path, capsys):
    bank = ShardList([shard(tmp_path / "a.tar", [(coloured(0, 0), 0), (b"no image", 1)])])
    evaluation = OnlineEvaluation(bank, labelled(tmp_path / "queries"), every_steps=1, image_size=16)
    for _ in range(2):
        evaluation.score(colour)
    assert capsys.readouterr().err == "seer: evaluation, bank: left out 1 image (not_an_image 1)\n"

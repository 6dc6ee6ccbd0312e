"""kNN while a run goes on."""

import contextlib
import io
import os
from typing import Any
from unittest import mock

import pytest
import torch
from evaluation_shards import coloured, labelled, shard
from ranks import ranks

from seer.errors import UserError
from seer.evaluation import online as online_module
from seer.evaluation.knn import knn_top1
from seer.evaluation.online import OnlineEvaluation
from seer.shard_list import ShardList


class Counting(torch.nn.Module):
    """The mean colour, and how often it was asked."""

    calls = 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        assert len(images)
        self.calls += 1
        return images.mean((2, 3))


def scored(bank: ShardList, queries: ShardList, times: int = 1, **options: Any) -> dict[str, Any]:
    """What a rank sees: the score, what was compared, calls of the network, what was printed or raised."""
    compared: list[torch.Tensor] = []
    network, said = Counting(), io.StringIO()
    found: dict[str, Any] = {}

    def spy(*tensors: torch.Tensor, **settings: Any) -> float:
        compared.extend(tensors)
        return knn_top1(*tensors, **settings)

    with mock.patch.object(online_module, "knn_top1", spy), contextlib.redirect_stderr(said):
        evaluation = OnlineEvaluation(bank, queries, every_steps=1, image_size=16, **options)
        try:
            found["scores"] = [evaluation.score(network) for _ in range(times)]
        except UserError as error:
            found["error"] = type(error).__name__, str(error)
    return found | {"compared": compared, "calls": network.calls, "said": said.getvalue()}


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


@pytest.mark.parametrize(
    ("bank_counts", "query_counts", "calls"),
    [
        ((5, 4), (4, 2), 2 + 1),  # shares of 4 and 5 in batches of 4: the first rank has one batch too few
        ((1,), (1,), 1 + 1),  # the first rank has no image at all
    ],
)
@pytest.mark.parametrize("keep_bytes", [0, online_module._KEEP_BYTES])
def test_ranks_share_the_images_and_the_votes_are_those_of_one_process(
    tmp_path, bank_counts, query_counts, calls, keep_bytes
):
    bank, queries = labelled(tmp_path / "bank", bank_counts), labelled(tmp_path / "queries", query_counts)
    one = scored(bank, queries)
    first, second = ranks(2).run(scored_keeping, keep_bytes, bank, queries)
    assert [score["knn_top1"] for score in first["scores"]] == [one["scores"][0]["knn_top1"]] * 2
    assert first["scores"][0].keys() == one["scores"][0].keys() and second["scores"] == [None, None]
    assert all(map(torch.equal, first["compared"], one["compared"] * 2)) and len(first["compared"]) == 8
    assert first["calls"] == second["calls"] == 2 * calls
    assert second["compared"] == []


def scored_keeping(keep_bytes: int, bank: ShardList, queries: ShardList) -> dict[str, Any]:
    with mock.patch.object(online_module, "_KEEP_BYTES", keep_bytes):
        return scored(bank, queries, times=2, batch_size=4)


def test_bad_images_of_all_ranks_are_said_by_the_first(tmp_path):
    samples = [(coloured(0, 0), 0), (b"no image", 1), (b"no image", 2), (b"no image", 3)]
    bank, queries = ShardList([shard(tmp_path / "a.tar", samples)]), labelled(tmp_path / "queries")
    one, (first, second) = scored(bank, queries), ranks(2).run(scored, bank, queries, 2)
    assert first["said"] == one["said"] == "seer: evaluation, bank: left out 3 images (not_an_image 3)\n"
    assert second["said"] == ""
    assert all(map(torch.equal, first["compared"], one["compared"] * 2))


def test_ranks_fail_together_and_the_first_tells(tmp_path):
    queries = labelled(tmp_path / "queries")
    nothing = ShardList([shard(tmp_path / "a.tar", [(b"no image", 1)] * 3)])
    lacking = labelled(tmp_path / "bank", (4, 4))
    os.unlink(lacking[1].location)  # the second rank's share
    for bank, says in ((nothing, "not_an_image 3"), (lacking, "1.tar")):
        first, second = (found["error"] for found in ranks(2).run(scored, bank, queries))
        assert (first[0], second[0]) == ("UserError", "ToldElsewhere")
        assert says in first[1] and says in second[1]

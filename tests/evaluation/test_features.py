"""Features of labelled shards: the decided crop, in order, in evaluation mode; bad images are left out and counted."""

import io
import math

import numpy as np
import pytest
import torch
from evaluation_shards import coloured, labelled, shard
from PIL import Image
from torch import nn

from seer.data.crops import MEAN, STD, evaluation_crop
from seer.errors import UserError
from seer.evaluation.features import (
    LabelledCrops,
    chosen_samples,
    described,
    features_of,
    image_features,
    labelled_crops,
    pixel_features,
)
from seer.shard_list import ShardList


def flat(images: torch.Tensor) -> torch.Tensor:
    return images.flatten(1)


def test_features_are_those_of_the_evaluation_crop(tmp_path):
    shards = labelled(tmp_path)
    found = image_features(flat, shards, image_size=16, batch_size=5, threads=2)
    crops = np.stack([evaluation_crop(Image.open(io.BytesIO(coloured(i % 4, i))), 16) for i in range(12)])
    expected = (crops / 255 - np.array(MEAN)) / np.array(STD)
    np.testing.assert_allclose(found.features, expected.transpose(0, 3, 1, 2).reshape(12, -1), atol=1e-6)
    assert found.labels.tolist() == [i % 4 for i in range(12)]
    assert found.features.dtype == torch.float32 and found.labels.dtype == torch.int64
    assert not found.bad


@pytest.mark.parametrize("batch_size", [1, 4, 12, 100])
@pytest.mark.parametrize("threads", [1, 3])
def test_batches_and_threads_change_nothing(tmp_path, batch_size, threads):
    shards = labelled(tmp_path)
    one = image_features(flat, shards, image_size=16)
    other = image_features(flat, shards, image_size=16, batch_size=batch_size, threads=threads)
    assert torch.equal(one.features, other.features) and torch.equal(one.labels, other.labels)


@pytest.mark.parametrize("images", [3, 4, 9])
@pytest.mark.parametrize("n", [1, 2, 4])
def test_shares_of_ranks_make_up_the_whole_in_order_and_have_equally_many_batches(tmp_path, n, images):
    shards = labelled(tmp_path, (images - 2, 2))
    (whole,) = labelled_crops(shards, image_size=16)
    shares = [list(labelled_crops(shards, image_size=16, batch_size=2, rank=rank, ranks=n)) for rank in range(n)]
    assert {len(share) for share in shares} == {math.ceil(math.ceil(images / n) / 2)}
    for part in ("crops", "labels"):
        rows = torch.cat([getattr(batch, part) for share in shares for batch in share])
        assert torch.equal(rows, getattr(whole, part))
    sizes = [sum(len(batch.labels) for batch in share) for share in shares]
    assert max(sizes) - min(sizes) <= 1


def test_an_empty_batch_is_a_forward_too(tmp_path):
    (batch,) = labelled_crops(labelled(tmp_path), image_size=16)
    calls = []
    empty = LabelledCrops(batch.crops[:0], batch.labels[:0], batch.bad)
    found = features_of(lambda images: calls.append(len(images)) or flat(images), [empty, batch, empty])
    assert calls == [1, 12, 1]
    assert found.features.shape == (12, 768) and torch.equal(found.labels, batch.labels)
    assert features_of(flat, [empty]).features.shape == (0, 768)


def test_bad_images_are_left_out_and_counted(tmp_path):
    good = coloured(0, 0)
    samples = [(good, 0), (b"no image", 1), (good[: len(good) // 2], 2), (coloured(3, 3), 3)]
    shards = ShardList([shard(tmp_path / "a.tar", samples)])
    for batch_size in (1, 4):
        found = image_features(flat, shards, image_size=16, batch_size=batch_size)
        assert found.labels.tolist() == [0, 3] and len(found.features) == 2
        assert found.bad.total() == 2 and found.bad["not_an_image"] == 1
    assert described(found.bad).startswith("2 images (")


def test_nothing_but_bad_images(tmp_path):
    shards = ShardList([shard(tmp_path / "a.tar", [(b"no image", 1)] * 3)])
    with pytest.raises(UserError, match=r"no image of .*a\.tar.*not_an_image 3.*pack the folder again"):
        image_features(flat, shards, image_size=16)


def test_shards_without_labels_are_refused(tmp_path):
    shards = ShardList([shard(tmp_path / "a.tar", [(coloured(0, 0), 0), (coloured(1, 1), -1)])])
    with pytest.raises(UserError, match=r"a\.tar holds images without labels.*--labels folders"):
        image_features(flat, shards, image_size=16)


@pytest.mark.parametrize(
    ("counts", "max_images", "per_shard"),
    [
        ([10, 10, 10], 6, [2, 2, 2]),
        ([10, 10, 10], 7, [3, 2, 2]),
        ([1, 10, 10], 9, [1, 4, 4]),
        ([0, 3, 100], 50, [0, 3, 47]),
        ([2, 2], 100, [2, 2]),
        ([5, 5], 1, [1, 0]),
        ([4, 3], None, [4, 3]),
    ],
)
def test_images_are_taken_evenly_from_the_shards(counts, max_images, per_shard):
    shards, samples = chosen_samples(np.array(counts), max_images)
    assert np.bincount(shards, minlength=len(counts)).tolist() == per_shard
    for number, count in enumerate(counts):
        taken = samples[shards == number]
        assert len(set(taken.tolist())) == len(taken) and ((taken >= 0) & (taken < count)).all()
        assert (np.diff(taken) > 0).all()


def test_images_are_taken_evenly_within_a_shard():
    """One shard whose classes follow each other, 100 images each, as packing folder by folder gives."""
    _, samples = chosen_samples(np.array([1000]), 50)
    assert np.bincount(samples // 100).tolist() == [5] * 10


def test_no_images_asked():
    with pytest.raises(UserError, match="max_images=0"):
        chosen_samples(np.array([3]), 0)


class Network(nn.Module):
    """Its BatchNorm gives other features, and changes, in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.frozen = nn.BatchNorm2d(3).eval()

    def forward(self, crops: list[torch.Tensor]) -> torch.Tensor:
        raise AssertionError("this is the way of training")

    def features(self, images: torch.Tensor) -> torch.Tensor:
        assert not torch.is_grad_enabled()
        return self.frozen(self.norm(images)).mean((2, 3))


def test_evaluation_mode_for_the_time(tmp_path):
    network = Network()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    found = image_features(network.features, labelled(tmp_path), image_size=16, batch_size=5)
    assert torch.equal(found.features, image_features(network.features, labelled(tmp_path), image_size=16).features)
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert network.training and network.norm.training and not network.frozen.training


def test_mode_comes_back_after_an_error(tmp_path):
    network = nn.Sequential(nn.Linear(1, 1))
    with pytest.raises(RuntimeError):
        image_features(network, labelled(tmp_path), image_size=16)
    assert network.training and network[0].training


@pytest.mark.parametrize(
    ("dtype", "weights", "result"),
    [
        (torch.float32, torch.float32, torch.float32),
        (torch.float64, torch.float64, torch.float64),
        (torch.bfloat16, torch.float32, torch.float32),
    ],
)
def test_precisions(tmp_path, dtype, weights, result):
    linear = nn.Linear(3 * 16 * 16, 4).to(weights)
    seen = []

    def forward(images):
        out = linear(images.flatten(1))
        seen.append(out.dtype)
        return out

    found = image_features(forward, labelled(tmp_path), image_size=16, dtype=dtype)
    assert found.features.dtype == result and set(seen) == {dtype}


def test_pixels_are_the_normalised_crop(tmp_path):
    batches = list(labelled_crops(labelled(tmp_path), image_size=16, batch_size=5))
    found = pixel_features(batches)
    assert found.features.shape == (12, 16 * 16 * 3)
    image = np.concatenate([batch.crops.numpy() for batch in batches])[7] / 255
    expected = ((image - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]).reshape(-1)
    assert np.allclose(found.features[7].double().numpy(), expected, atol=2e-3)


def test_images_lie_channels_last(tmp_path):
    def forward(images):
        assert images.shape[1:] == (3, 16, 16) and images.is_contiguous(memory_format=torch.channels_last)
        return images.flatten(1)

    image_features(forward, labelled(tmp_path), image_size=16)

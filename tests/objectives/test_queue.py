"""The queue against a list of batches, and one that is spread over ranks against one that is not."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from host_sync import NoHostSync
from objective_suite import FEATURES, SmallBackbone, figures_of
from ranks import ranks

from seer.objectives.swav import SwAV, swav_loss

IMAGES, CROPS, SLOTS, START = 8, 5, 3, 2
NOT_FINITE = (4,)  # steps that push nothing


def objective(**settings):
    return SwAV(
        FEATURES,
        **{
            "prototypes": 6,
            "embedding_size": 7,
            "head_hidden_sizes": [9],
            "head_batchnorm": False,
            "temperature": 0.1,
            "epsilon": 0.05,
            "iterations": 3,
            "queue_images": SLOTS * IMAGES + 5,
            "queue_start_steps": START,
            "global_batch_size": IMAGES,
            "dtype": torch.float64,
            **settings,
        },
    )


def small_backbone():
    torch.manual_seed(2)
    return SmallBackbone().double()


def batch(step, part=0, parts=1):
    """Crops of a part of the global batch of a step, crop-major."""
    generator = torch.Generator().manual_seed(100 + step)
    groups = []
    for crops, size in ((2, 9), (3, 6)):
        whole = torch.randn(crops, IMAGES, 3, size, size, generator=generator, dtype=torch.float64)
        groups.append(whole.chunk(parts, dim=1)[part].flatten(0, 1))
    return groups


def train_step(model, backbone, step, part=0, parts=1, not_finite=NOT_FINITE, lr=0.5):
    for parameter in [*model.parameters(), *backbone.parameters()]:
        parameter.grad = None
    outcome = model(backbone, batch(step, part, parts))
    outcome.loss.backward()
    finite = step not in not_finite
    with torch.no_grad():
        for parameter in [*model.parameters(), *backbone.parameters()]:
            if parts > 1:
                dist.all_reduce(parameter.grad)
            if finite:
                parameter -= lr * parameter.grad / parts
    model.after_step(torch.tensor(finite), step)
    return outcome


@pytest.mark.parametrize("not_finite", [(), (4,), (2, 5, 6, 9)])
def test_a_list_of_batches_gives_the_same_losses(not_finite):
    model, backbone = objective(), small_backbone()
    assert model.queue_slots == SLOTS
    assert model.queue.shape == (SLOTS, 2, IMAGES, 7)
    newest_first = []
    took_part = []
    for step in range(12):
        features = torch.cat(backbone(batch(step)))
        embeddings = F.normalize(model.head(features), dim=1).detach()
        prototypes = model.prototypes.weight.detach()
        scores = (embeddings @ prototypes.T).reshape(CROPS, IMAGES, -1)
        # facebookresearch/swav: the queue takes part once its last row was pushed; use it, then push at the front.
        full = len(newest_first) == SLOTS
        took_part.append(full)
        queue_scores = torch.cat(newest_first, dim=1) @ prototypes.T if full else None
        wanted, _ = swav_loss(
            scores, assigned_crops=2, temperature=0.1, epsilon=0.05, iterations=3, queue_scores=queue_scores
        )
        seen = train_step(model, backbone, step, not_finite=not_finite)
        assert seen.loss.item() == pytest.approx(wanted.item(), rel=1e-11), step
        if step >= START and step not in not_finite:
            newest_first = [embeddings[: 2 * IMAGES].reshape(2, IMAGES, -1), *newest_first][:SLOTS]
    pushes = [step for step in range(START, 12) if step not in not_finite]
    assert took_part.index(True) == pushes[SLOTS - 1] + 1
    assert int(model.queue_pushes) == len(pushes)
    for age, rows in enumerate(newest_first):
        assert torch.equal(model.queue[(int(model.queue_pushes) - 1 - age) % SLOTS], rows)


def test_evaluation_and_a_step_without_forward_push_nothing():
    model, backbone = objective(queue_start_steps=0), small_backbone()
    model.eval()
    with torch.no_grad():
        model(backbone, batch(0))
    model.after_step(torch.tensor(True), 0)
    assert int(model.queue_pushes) == 0 and not model.queue.any()
    model.train()
    train_step(model, backbone, 0)
    model.after_step(torch.tensor(True), 1)
    assert int(model.queue_pushes) == 1


def test_a_full_queue_is_not_asked_again():
    model, backbone = objective(queue_start_steps=0), small_backbone()
    looks = []

    class Looked(torch.Tensor):
        def __int__(self):
            looks.append(1)
            return int(self.as_subclass(torch.Tensor))

    model.queue_pushes = model.queue_pushes.as_subclass(Looked)
    for step in range(10):
        train_step(model, backbone, step, not_finite=())
    assert len(looks) == 2  # what was restored, and whether it is full now
    state = copy.deepcopy(objective(queue_start_steps=0).state_dict())
    model.load_state_dict(state)
    model(backbone, batch(0))
    assert len(looks) == 3


def test_a_step_with_a_full_queue_never_waits_for_the_device():
    model, backbone = objective(queue_start_steps=0), small_backbone()
    for step in range(SLOTS + 1):
        train_step(model, backbone, step, not_finite=())
    finite = torch.tensor(True)
    with NoHostSync():
        model(backbone, batch(SLOTS + 1)).loss.backward()
        model.after_backward(SLOTS + 1)
        model.after_step(finite, SLOTS + 1)
    assert int(model.queue_pushes) == SLOTS + 2


def trained(steps):
    part, parts = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(part)  # nothing may come from here
    model, backbone = objective(), small_backbone()
    figures = [figures_of(train_step(model, backbone, step, part, parts)) for step in range(steps)]
    return model.queue, int(model.queue_pushes), figures, model.prototypes.weight.detach()


@pytest.mark.parametrize("n", [2, 4])
def test_several_ranks_equal_one(n):
    model, backbone = objective(), small_backbone()
    wanted = [figures_of(train_step(model, backbone, step)) for step in range(9)]
    parts = ranks(n).run(trained, 9)
    assert {part[1] for part in parts} == {int(model.queue_pushes)} == {6}
    assert parts[0][0].shape == (SLOTS, 2, IMAGES // n, 7)
    assert torch.allclose(torch.cat([part[0] for part in parts], dim=2), model.queue, rtol=0, atol=1e-11)
    for part in parts:
        assert torch.allclose(part[3], model.prototypes.weight, rtol=0, atol=1e-11)
        for one, several in zip(wanted, part[2], strict=True):
            for name in ("loss", "assignment_entropy", "mean_assignment_entropy", "prototypes_in_use"):
                assert several[name].item() == pytest.approx(one[name].item(), rel=1e-10), name


def build_with_nine_images():
    return objective(global_batch_size=9)


def test_a_batch_that_does_not_divide_by_the_ranks_is_refused():
    with pytest.raises(RuntimeError, match="UserError: a global batch of 9 on 2 ranks"):
        ranks(2).run(build_with_nine_images)


def test_what_was_restored_is_looked_up_again():
    model = objective()
    assert not model._queue_takes_part()
    model.queue_pushes.fill_(SLOTS)  # as a checkpoint that is loaded in place
    assert not model._queue_takes_part(), "nobody waits for the device to find out"
    model.restored()
    assert model._queue_takes_part()

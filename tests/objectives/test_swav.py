"""SwAV's loss against published numbers, and the module around it."""

import math

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from objective_suite import FEATURES, ObjectiveSuite, SmallBackbone, figures_of
from ranks import ranks
from torch import nn

from seer.errors import UserError
from seer.objectives.sinkhorn import sinkhorn_assignments
from seer.objectives.swav import SwAV, swapped_prediction_loss, swav_loss

N, K, V = 6, 5, 4


def grid(n, k):
    return torch.arange(n, dtype=torch.float64)[:, None], torch.arange(k, dtype=torch.float64)


def golden_scores():
    i, j = grid(N, K)
    return [torch.sin(0.7 * i + 1.3 * j + 0.1 * i * j + 0.5 * v).requires_grad_() for v in range(V)]


def golden_queue():
    i, j = grid(7, K)
    return [torch.sin(0.9 * i + 1.1 * j + 0.2 * i * j + 0.3 * a) for a in range(2)]


def checksum(gradients):
    i, j = grid(N, K)
    return float(sum((gradient * torch.cos(i + 2 * j + 3 * v)).sum() for v, gradient in enumerate(gradients)))


# From executing the original implementations in float64.
@pytest.mark.parametrize(
    "queue, loss, gradients, total, image_0",
    [
        (
            False,
            3.337649189,
            (9.484292126e-06, 2.56969835e-05, -0.1551880304, 2.254732392e-08),
            -0.8692568389,
            (1.126770444e-08, 0.9453757238, 0.0546242649, 9.228682165e-15, 1.106273569e-15),
        ),
        (
            True,
            3.313027825,
            (-3.900310969e-05, 2.569698342e-05, -0.1139735976, 2.251265907e-08),
            -0.864949285,
            (1.195058277e-08, 0.9988250168, 0.001174971223, 1.122470484e-14, 6.452381398e-16),
        ),
    ],
)
@pytest.mark.parametrize("stacked", [False, True])
def test_published_numbers(queue, loss, gradients, total, image_0, stacked):
    scores, queue_scores = golden_scores(), golden_queue() if queue else None
    if stacked and queue:
        queue_scores = torch.stack(queue_scores)
    seen, assignments = swav_loss(
        torch.stack(scores) if stacked else scores,
        assigned_crops=2,
        temperature=0.1,
        epsilon=0.05,
        iterations=3,
        queue_scores=queue_scores,
    )
    assert seen.item() == pytest.approx(loss, rel=1e-9)
    assert assignments.shape == (2, N, K) and not assignments.requires_grad
    assert assignments[0, 0].tolist() == pytest.approx(image_0, rel=1e-9)
    seen.backward()
    g = [score.grad for score in scores]
    places = [g[0][0, 0].item(), g[1][2, 3].item(), g[2][3, 4].item(), g[3][5, 0].item()]
    assert places == pytest.approx(gradients, rel=1e-8)
    assert checksum(g) == pytest.approx(total, rel=1e-9)


def test_published_numbers_at_seers_settings_and_with_one_assigned_crop():
    scores = golden_scores()
    loss, _ = swav_loss(scores, assigned_crops=2, temperature=0.1, epsilon=0.03, iterations=10)
    assert loss.item() == pytest.approx(3.400709453, rel=1e-9)
    loss.backward()
    assert checksum([score.grad for score in scores]) == pytest.approx(-0.8354057269, rel=1e-9)
    loss, assignments = swav_loss(golden_scores(), assigned_crops=1, temperature=0.1, epsilon=0.05, iterations=3)
    assert loss.item() == pytest.approx(4.754524347, rel=1e-9)
    assert assignments.shape == (1, N, K)


def test_published_numbers_through_the_normalisations():
    i, d = grid(N, 4)
    embeddings = [torch.cos(0.4 * i + 0.9 * d + 0.2 * i * d + 0.6 * v).requires_grad_() for v in range(V)]
    k, d = grid(K, 4)
    prototypes = F.normalize(torch.sin(0.5 * k + 0.8 * d + 0.3 * k * d), dim=1).requires_grad_()
    scores = [F.normalize(embedding, dim=1) @ prototypes.T for embedding in embeddings]
    loss, _ = swav_loss(scores, assigned_crops=2, temperature=0.1, epsilon=0.05, iterations=3)
    loss.backward()
    assert loss.item() == pytest.approx(3.707212946, rel=1e-9)
    assert scores[0][0, 0].item() == pytest.approx(-0.1859029076, rel=1e-9)
    seen = [prototypes.grad[0, 0], prototypes.grad[4, 3], embeddings[0].grad[0, 0], embeddings[3].grad[5, 3]]
    wanted = [-0.208848091, 0.4528787704, 0.00471288936, -0.2222074803]
    assert [value.item() for value in seen] == pytest.approx(wanted, rel=1e-9)


def pairwise_loss(scores, assignments, temperature):
    terms = []
    for a, q in enumerate(assignments):
        others = [s for v, s in enumerate(scores) if v != a]
        terms.append(sum(-(q * F.log_softmax(s / temperature, dim=1)).sum(1).mean() for s in others) / len(others))
    return sum(terms) / len(terms)


@pytest.mark.parametrize("crops, assigned", [(2, 1), (2, 2), (6, 2), (5, 5)])
def test_loss_is_the_mean_over_pairs_and_its_gradient_the_closed_form(crops, assigned):
    torch.manual_seed(0)
    scores = (torch.rand(crops, 7, 11, dtype=torch.float64) * 2 - 1).requires_grad_()
    loss, q = swav_loss(scores, assigned_crops=assigned, temperature=0.1, epsilon=0.05, iterations=3)
    assert loss.item() == pytest.approx(pairwise_loss(scores, q, 0.1).item(), rel=1e-12)
    loss.backward()
    p = torch.softmax(scores.detach() / 0.1, dim=2)
    for v in range(crops):
        wanted = sum(p[v] - q[a] for a in range(assigned) if a != v) / (assigned * 0.1 * 7 * (crops - 1))
        assert torch.allclose(scores.grad[v], torch.zeros_like(p[v]) + wanted, rtol=1e-10, atol=1e-13)


def test_half_precision_scores_give_a_float32_loss_under_autocast():
    scores = torch.rand(3, 4, 5).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, q = swav_loss(scores, assigned_crops=2, temperature=0.1, epsilon=0.05, iterations=3)
    assert loss.dtype == q.dtype == torch.float32
    assert loss.item() == pytest.approx(pairwise_loss(scores.float(), q, 0.1).item(), rel=1e-5)


@pytest.mark.parametrize("crops, assigned", [(1, 1), (3, 0), (3, 4)])
def test_crops_that_cannot_predict(crops, assigned):
    with pytest.raises(UserError):
        swav_loss(torch.zeros(crops, 2, 3), assigned_crops=assigned, temperature=0.1, epsilon=0.05, iterations=3)


def loss_of_my_rows(scores, queue, temperature=0.1):
    rank, world = dist.get_rank(), dist.get_world_size()
    mine = scores.chunk(world, dim=1)[rank].clone().requires_grad_()
    loss, q = swav_loss(
        mine,
        assigned_crops=2,
        temperature=temperature,
        epsilon=0.05,
        iterations=3,
        queue_scores=queue.chunk(world, dim=1)[rank],
    )
    loss.backward()
    return loss.detach(), q, mine.grad


@pytest.mark.parametrize("n", [2, 4])
def test_loss_gradient_and_assignments_of_several_ranks_equal_those_of_one(n):
    torch.manual_seed(1)
    scores = torch.rand(4, 16, 9, dtype=torch.float64) * 2 - 1
    queue = torch.rand(2, 20, 9, dtype=torch.float64) * 2 - 1
    parts = ranks(n).run(loss_of_my_rows, scores, queue)
    whole = scores.clone().requires_grad_()
    loss, q = swav_loss(whole, assigned_crops=2, temperature=0.1, epsilon=0.05, iterations=3, queue_scores=queue)
    loss.backward()
    assert torch.stack([part[0] for part in parts]).mean().item() == pytest.approx(loss.item(), rel=1e-12)
    assert torch.allclose(torch.cat([part[1] for part in parts], dim=1), q, rtol=0, atol=1e-12)
    assert torch.allclose(torch.cat([part[2] for part in parts], dim=1) / n, whole.grad, rtol=1e-9, atol=1e-13)


SETTINGS = {
    "prototypes": 10,
    "embedding_size": 8,
    "head_hidden_sizes": [9],
    "head_batchnorm": False,
    "temperature": 0.1,
    "epsilon": 0.05,
    "iterations": 3,
    "global_batch_size": 6,
}


class TestSwAV(ObjectiveSuite):
    def make(self, **settings):
        return SwAV(FEATURES, **{**SETTINGS, **settings})


class TestSwAVWithQueueAndBatchNorm(ObjectiveSuite):
    def make(self, **settings):
        # Two slots: filled by the first steps of the suite's runs.
        # (the bias before BatchNorm gets a gradient of rounding noise only)
        return SwAV(FEATURES, **{**SETTINGS, "queue_images": 12, "head_batchnorm": True, **settings})


@pytest.mark.parametrize("hidden, batchnorm", [([], False), ([9], True), ([9, 7], False), ([9, 7], True)])
def test_head_and_names(hidden, batchnorm):
    objective = SwAV(FEATURES, **{**SETTINGS, "head_hidden_sizes": hidden, "head_batchnorm": batchnorm})
    kinds = [type(layer) for layer in objective.head]
    assert kinds == [nn.Linear, *([nn.BatchNorm1d] if batchnorm else []), nn.ReLU] * len(hidden) + [nn.Linear]
    sizes = [(layer.in_features, layer.out_features) for layer in objective.head if isinstance(layer, nn.Linear)]
    assert sizes == list(zip([FEATURES, *hidden], [*hidden, 8], strict=True))
    assert [name for name, _ in objective.named_parameters() if "prototypes" in name] == ["prototypes.weight"]
    assert list(objective.named_buffers()) == [] or batchnorm
    assert objective.chance == math.log(10)


def test_initial_values():
    big = SwAV(100, **{**SETTINGS, "head_hidden_sizes": [400], "embedding_size": 64, "prototypes": 300})
    for layer in (big.head[0], big.head[2]):
        bound = layer.in_features**-0.5
        for values in (layer.weight, layer.bias):
            assert values.abs().max() <= bound
            assert values.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
    norms = big.prototypes.weight.norm(dim=1)
    assert torch.allclose(norms, torch.ones(300), atol=1e-6)
    double = SwAV(100, **{**SETTINGS, "head_hidden_sizes": [400], "embedding_size": 64, "dtype": torch.float64})
    assert torch.equal(double.head[0].weight.float(), big.head[0].weight)


def test_forward_is_head_unit_rows_prototypes_and_loss():
    objective, suite = SwAV(FEATURES, **SETTINGS, dtype=torch.float64), TestSwAV()
    backbone = suite.backbone(torch.float64)
    crops = suite.crops(dtype=torch.float64)
    outcome = objective(backbone, crops)
    embeddings = F.normalize(objective.head(torch.cat(backbone(crops))), dim=1)
    scores = (embeddings @ objective.prototypes.weight.T).reshape(5, 6, 10)
    loss, q = swav_loss(scores, assigned_crops=2, temperature=0.1, epsilon=0.05, iterations=3)
    assert outcome.loss.item() == pytest.approx(loss.item(), rel=1e-12)
    other = sinkhorn_assignments(-scores[:2].detach(), epsilon=0.05, iterations=3)
    given = objective(backbone, crops, assignments=other)
    wanted = swapped_prediction_loss(scores, other, temperature=0.1)
    assert given.loss.item() == pytest.approx(wanted.item(), rel=1e-12)
    figures = figures_of(outcome)
    rows = q.flatten(0, 1)
    entropy = -(rows * rows.log()).sum(1).mean() / math.log(10)
    assert figures["assignment_entropy"].item() == pytest.approx(entropy.item(), rel=1e-9)
    mean = rows.mean(0)
    assert figures["mean_assignment_entropy"].item() == pytest.approx(-(mean * mean.log()).sum().item() / math.log(10))
    assert figures["prototypes_in_use"].item() == pytest.approx(len(set(rows.argmax(1).tolist())) / 10)
    unit = F.normalize(backbone(crops)[0][:6], dim=1)
    assert figures["feature_std"].item() == pytest.approx(
        unit.std(0, correction=0).mean().item() * math.sqrt(FEATURES), rel=1e-9
    )


def test_figures_tell_collapse():
    objective, suite = SwAV(FEATURES, **{**SETTINGS, "prototypes": 4}), TestSwAV()
    same = [torch.ones_like(group) for group in suite.crops()]
    outcome = objective(suite.backbone(), same)
    assert figures_of(outcome)["assignment_entropy"].item() == pytest.approx(1.0, abs=1e-4)
    assert figures_of(outcome)["mean_assignment_entropy"].item() == pytest.approx(1.0, abs=1e-4)
    assert figures_of(outcome)["feature_std"].item() < 1e-3


def test_scores_and_figures_stay_wide_under_autocast_while_linears_of_the_head_are_narrow():
    objective, suite = SwAV(FEATURES, **SETTINGS), TestSwAV()
    seen = {}
    objective.head[-1].register_forward_hook(lambda module, args, output: seen.update(head=output.dtype))
    objective.prototypes.register_forward_hook(lambda module, args, output: seen.update(scores=output.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outcome = objective(suite.backbone(), suite.crops())
    assert seen == {"head": torch.bfloat16, "scores": torch.float32}
    assert {figure.dtype for figure in figures_of(outcome).values()} == {torch.float32}
    outcome.loss.backward()
    assert objective.prototypes.weight.grad.dtype == torch.float32


def test_prototypes_stay_where_they_are_while_frozen_and_on_the_sphere_afterwards():
    suite = TestSwAV()
    objective, backbone = suite.make(freeze_prototypes_steps=2), suite.backbone()
    start = objective.prototypes.weight.detach().clone()
    for step in range(4):
        suite.one_step(objective, backbone, step, lr=3.0)
        moved = not torch.equal(objective.prototypes.weight, start)
        assert moved == (step >= 2)
        assert (objective.prototypes.weight.grad is None) == (step < 2)
        assert torch.allclose(objective.prototypes.weight.norm(dim=1), torch.ones(10), atol=1e-6)


def test_forward_does_not_normalise_prototypes():
    objective, suite = SwAV(FEATURES, **SETTINGS), TestSwAV()
    with torch.no_grad():
        objective.prototypes.weight.mul_(0.5)
    objective(suite.backbone(), suite.crops())
    assert torch.allclose(objective.prototypes.weight.norm(dim=1), torch.full((10,), 0.5), atol=1e-6)


def test_works_on_the_meta_device():
    objective = SwAV(FEATURES, **SETTINGS, device="meta")
    crops = [torch.empty(12, 3, 10, 10, device="meta"), torch.empty(18, 3, 7, 7, device="meta")]
    outcome = objective(SmallBackbone().to("meta"), crops)
    assert outcome.loss.is_meta and outcome.loss.shape == ()


@pytest.mark.parametrize(
    "wrong, words",
    [
        ({"epsilon": 0.001}, "0.001"),
        ({"iterations": -1}, "iterations"),
        ({"prototypes": 1}, "prototypes"),
        ({"temperature": 0.0}, "temperature"),
        ({"queue_images": 5}, "queue_images 5 .* batch of 6"),
    ],
)
def test_settings_that_are_refused(wrong, words):
    with pytest.raises(UserError, match=words):
        SwAV(FEATURES, **{**SETTINGS, **wrong})


def test_crops_that_do_not_fit_are_refused():
    objective, suite = SwAV(FEATURES, **SETTINGS), TestSwAV()
    large, small = suite.crops()
    for crops in ([large[:-1], small], [large, small[:-1]], [large[:0], small]):
        with pytest.raises(UserError):
            objective(suite.backbone(), crops)
    with pytest.raises(UserError, match=r"2 images .* 6 images"):
        suite.make(queue_images=6)(suite.backbone(), [large[:4], small[:4]])

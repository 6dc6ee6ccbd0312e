"""SwAV: every crop predicts the prototype assignments of the other crops of its image (Caron et al. 2020).

V crops an image, of which the first A are assigned; N images of this rank, B of the global batch; K prototypes, D the
size of an embedding, Q queue rows. The suffix of a name is its shape. Rows of stacked crops are crop-major: [v N,
(v + 1) N) is crop v.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from seer import distributed, keyed_tensors
from seer.errors import UserError
from seer.objectives.outcome import Outcome
from seer.objectives.sinkhorn import check_sinkhorn, sinkhorn_assignments


def swav_loss(
    scores_VNK: Tensor | Sequence[Tensor],
    *,
    assigned_crops: int,
    temperature: float,
    epsilon: float,
    iterations: int,
    queue_scores: Tensor | Sequence[Tensor] | None = None,
    group: distributed.Group | None = None,
) -> tuple[Tensor, Tensor]:
    """The swapped prediction loss, and the assignments that it predicts (SwAV, equations 1 and 2, with multi-crop).

    Args:
        scores_VNK: cosines of embeddings and prototypes, one tensor or V tensors (N, K); crops 0..A-1 are assigned.
        assigned_crops: A; at least 1, at most V.
        temperature: of the predicted distribution.
        epsilon: Sinkhorn's, at least 0.003.
        iterations: Sinkhorn's.
        queue_scores: (Q, K) for each assigned crop (one (A, Q, K) tensor or a list): rows that only make Sinkhorn's
            batch larger; they are neither predicted nor returned.
        group: ranks whose images are assigned together; default: the default group, else this process.

    Returns:
        The loss, a scalar, at least float32: the mean over this rank's images, so that averaging gradients over ranks
        gives the gradient of the global mean. And the assignments (A, N, K), without gradient, at least float32.

    Raises:
        UserError: fewer than two crops, A outside 1..V, settings that Sinkhorn refuses.
    """
    scores_VNK = _stacked(scores_VNK)
    _check_crops(len(scores_VNK), assigned_crops)
    assigned_ANK = scores_VNK[:assigned_crops].detach()
    images = assigned_ANK.shape[1]
    if queue_scores is not None:
        assigned_ANK = torch.cat([assigned_ANK, _stacked(queue_scores).detach().to(assigned_ANK.dtype)], dim=1)
    assignments_ANK = sinkhorn_assignments(assigned_ANK, epsilon=epsilon, iterations=iterations, group=group)[
        :, :images
    ]
    return swapped_prediction_loss(scores_VNK, assignments_ANK, temperature=temperature), assignments_ANK


def swapped_prediction_loss(scores_VNK: Tensor, assignments_ANK: Tensor, *, temperature: float) -> Tensor:
    """Cross-entropy of every other crop's scores against each assigned crop's assignments.

    mean over a of [ mean over v != a of ( - mean over images of q_a . log_softmax(s_v / temperature) ) ]

    Args:
        scores_VNK: (V, N, K), V >= 2; less than float32 is widened.
        assignments_ANK: (A, N, K), rows sum to 1; crop a of the scores has assignments a.
        temperature: of the predicted distribution.

    Returns:
        Scalar, at least float32; each term weighs the same, whatever its crop's size.
    """
    crops, images, _ = scores_VNK.shape
    assigned_crops = len(assignments_ANK)
    with _without_autocast(scores_VNK):
        log_p_VNK = F.log_softmax(_at_least_float32(scores_VNK) / temperature, dim=-1)
        assignments_ANK = assignments_ANK.to(log_p_VNK.dtype)
        # Over all pairs (a, v), less those of a crop with itself: the sum over a and v factors.
        all_pairs = (assignments_ANK.sum(dim=0) * log_p_VNK.sum(dim=0)).sum()
        own_pairs = (assignments_ANK * log_p_VNK[:assigned_crops]).sum()
        return (own_pairs - all_pairs) / (assigned_crops * (crops - 1) * images)


class SwAV(nn.Module):
    """Projection head, prototypes, queue and loss of SwAV.

    The head is Linear, [BatchNorm], ReLU for each hidden layer, then Linear; its output is scaled to unit rows.
    Prototypes are unit rows without bias: they are normalised at initialisation and after each update, never in the
    forward (the gradient is with respect to the unit rows; facebookresearch/swav normalises before each forward). Head
    output, prototypes, Sinkhorn and loss are outside autocast and at least float32.

    The queue holds the embeddings of the assigned crops of the last batches, which make Sinkhorn's batch larger. It is
    a ring of whole global batches, `queue` (slots, A, B / ranks, D): slot = pushes mod slots. A step first uses the
    queue as it was, and only once all slots are filled, then pushes its own rows (the rule of facebookresearch/swav).
    Joined over ranks along dimension 2 it does not depend on how many there are.

    Args:
        feature_dim: F, the backbone's.
        prototypes: K.
        embedding_size: D.
        head_hidden_sizes: widths of the head's hidden layers.
        head_batchnorm: BatchNorm on hidden layers (SEER has none); it sees all crops at once.
        temperature, epsilon, iterations: as `swav_loss`.
        assigned_crops: A; the first group of crops given to `forward` has exactly these.
        freeze_prototypes_steps: steps at the start in which prototypes do not move.
        queue_images: images in the queue, rounded down to whole global batches (`queue_slots` says how many); 0 is
            none.
        queue_start_steps: first step that pushes.
        global_batch_size: B; only the queue depends on it.
        group: ranks that share the batch; default: the default group if one is initialised, else this process.
        device, dtype: of the parameters; on the meta device values come with `initialise` after `to_empty`.

    Raises:
        UserError: settings that Sinkhorn refuses, a queue shorter than a batch, a batch that does not divide by the
            ranks.
    """

    queue: Tensor
    queue_pushes: Tensor

    BATCH_DIMENSIONS = MappingProxyType({"queue": 2})
    """Buffers that hold this rank's part of global batches, and the dimension in which the parts of all ranks join."""

    def __init__(
        self,
        feature_dim: int,
        *,
        prototypes: int,
        embedding_size: int,
        head_hidden_sizes: Sequence[int],
        head_batchnorm: bool,
        temperature: float,
        epsilon: float,
        iterations: int,
        assigned_crops: int = 2,
        freeze_prototypes_steps: int = 0,
        queue_images: int = 0,
        queue_start_steps: int = 0,
        global_batch_size: int,
        group: distributed.Group | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sinkhorn(epsilon, iterations)
        if prototypes < 2:
            raise UserError(
                f"{prototypes} prototypes", "there is something to predict only among several", "use 2 or more"
            )
        if not temperature > 0:
            raise UserError(f"temperature {temperature}", "it divides the scores", "0.1 is usual")
        wide = torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)
        # Built on the meta device and filled by name: torch's own initial values would draw from its global stream.
        self.head = _head(feature_dim, head_hidden_sizes, embedding_size, head_batchnorm, dtype)
        self.prototypes = nn.Linear(embedding_size, prototypes, bias=False, device="meta", dtype=wide)
        self.temperature, self.epsilon, self.iterations = temperature, epsilon, iterations
        self.assigned_crops, self.group = assigned_crops, group
        self.freeze_prototypes_steps, self.queue_start_steps = freeze_prototypes_steps, queue_start_steps
        self.queue_slots = _queue_slots(queue_images, global_batch_size, distributed.world_size(group))
        if self.queue_slots:
            images = global_batch_size // distributed.world_size(group)
            shape = (self.queue_slots, assigned_crops, images, embedding_size)
            self.register_buffer("queue", torch.zeros(shape, device="meta", dtype=wide))
            self.register_buffer("queue_pushes", torch.zeros((), device="meta", dtype=torch.int64))
            self.register_load_state_dict_post_hook(_forget_pushes)  # type: ignore[no-untyped-call]
        self._new_rows_AND: Tensor | None = None
        # What this process knows of `queue_pushes` without waiting for the device; None: look.
        self._pushes_at_most: int | None = None
        self._queue_is_full = False
        device = torch.device(device) if device is not None else torch.get_default_device()
        if device.type != "meta":
            self.to_empty(device=device)
            self.initialise(0)

    @property
    def chance(self) -> float:
        """The loss of predictions that say nothing, ln K: where a collapsed run stays."""
        return math.log(self.prototypes.out_features)

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Sets every parameter and buffer: linears U(-1/sqrt(fan_in), 1/sqrt(fan_in)), prototypes then to unit rows.

        Values depend on the seed and a parameter's name alone, so that they are right after `to_empty`.
        """
        for name, module in self.named_modules(prefix="objective"):
            if isinstance(module, nn.Linear):
                for part, parameter in module.named_parameters():
                    keyed_tensors.uniform_(parameter, module.in_features**-0.5, seed=seed, name=f"{name}.{part}")
            elif isinstance(module, _BatchNorm):
                module.reset_parameters()
        weight = distributed.local(self.prototypes.weight)
        weight.copy_(F.normalize(weight, dim=1))
        if self.queue_slots:
            self.queue.zero_()
            self.queue_pushes.zero_()
        _forget_pushes(self)

    def projection(self, features_MF: Tensor) -> Tensor:
        """Unit embeddings (M, D), at least float32, of features (M, F); the head's linears follow autocast."""
        projected_MD = self.head(features_MF)
        with _without_autocast(projected_MD):
            return F.normalize(_at_least_float32(projected_MD), dim=1)

    def forward(
        self, backbone: Callable[[list[Tensor]], list[Tensor]], crops: list[Tensor], assignments: Tensor | None = None
    ) -> Outcome:
        """Loss and figures of one batch.

        Args:
            backbone: from a list of crops, one tensor a resolution, to a list of features (crops x N, F).
            crops: list of (crops x N, 3, H, W), crop-major; the first holds exactly the assigned crops.
            assignments: (A, N, K) to predict instead of those that Sinkhorn would give.

        Returns:
            The loss (see `swav_loss`) and the figures, all over the images of all ranks:
            `loss`;
            `assignment_entropy`: mean entropy of single assignments over ln K; 1 tells collapse;
            `mean_assignment_entropy`: entropy of the mean assignment over ln K;
            `prototypes_in_use`: share of prototypes that are the largest of some assignment;
            `feature_std`: standard deviation between images (first crop, unit rows), mean over dimensions, times
            sqrt(F): 0 when all images look alike, 1 at most.

        Raises:
            UserError: crops that do not fit `assigned_crops` or, with a queue, the global batch.
        """
        features = backbone(crops)
        images = self._images(features)
        features_MF = torch.cat(features)
        embeddings_MD = self.projection(features_MF)
        rows = len(embeddings_MD)
        with _without_autocast(embeddings_MD):
            if self.queue_slots and self.training:
                self._new_rows_AND = embeddings_MD[: len(features[0])].detach().view(-1, images, embeddings_MD.shape[1])
            queue_scores = None
            if assignments is None and self._queue_takes_part():
                # One call for both, so that sharded prototypes are gathered once.
                queue_RD = self.queue.transpose(0, 1).flatten(0, 2)
                scores = self.prototypes(torch.cat([embeddings_MD, queue_RD.to(embeddings_MD.dtype)]))
                queue_scores = scores[rows:].view(self.assigned_crops, -1, scores.shape[1])
            else:
                scores = self.prototypes(embeddings_MD)
            scores_VNK = scores[:rows].view(-1, images, scores.shape[1])
            if assignments is None:
                loss, assignments = swav_loss(
                    scores_VNK,
                    assigned_crops=self.assigned_crops,
                    temperature=self.temperature,
                    epsilon=self.epsilon,
                    iterations=self.iterations,
                    queue_scores=queue_scores,
                    group=self.group,
                )
            else:
                loss = swapped_prediction_loss(scores_VNK, assignments, temperature=self.temperature)
            shares = self._shares(loss.detach(), assignments, features_MF[:images].detach())
            return Outcome(loss, shares, self._figures)

    def after_backward(self, step: int) -> None:
        """Drops the prototypes' gradient while they are frozen: no step, no decay, no momentum."""
        if step < self.freeze_prototypes_steps:
            self.prototypes.weight.grad = None

    @torch.no_grad()
    def after_step(self, finite: Tensor, step: int) -> None:
        """After the update: prototype rows back to unit norm, the new embeddings into the queue.

        Args:
            finite: boolean scalar on the device, equal on all ranks; where it is false nothing changes.
            step: the step that was taken, from 0.
        """
        weight = distributed.local(self.prototypes.weight)  # sharded prototypes are whole rows
        if step >= self.freeze_prototypes_steps:
            weight.copy_(torch.where(finite, F.normalize(weight, dim=1), weight))
        rows_AND, self._new_rows_AND = self._new_rows_AND, None
        if rows_AND is None or step < self.queue_start_steps:
            return
        # index_select and index_copy_: indexing by a device scalar would wait for it.
        slot = (self.queue_pushes % self.queue_slots).reshape(1)
        rows_1AND = rows_AND.to(self.queue.dtype).unsqueeze(0)
        self.queue.index_copy_(0, slot, torch.where(finite, rows_1AND, self.queue.index_select(0, slot)))
        self.queue_pushes += finite
        if self._pushes_at_most is not None:
            self._pushes_at_most += 1

    def restored(self) -> None:
        """After its buffers were written from outside: what this process knows of them is looked up again."""
        _forget_pushes(self)

    def units(self) -> list[tuple[str, nn.Module]]:
        """What is sharded, checkpointed and compiled as one, by name; prototypes stay in full precision."""
        return [("head", self.head), ("prototypes", self.prototypes)]

    def _images(self, features: list[Tensor]) -> int:
        images, rest = divmod(len(features[0]), self.assigned_crops)
        if rest or not images or any(len(rows) % images for rows in features):
            raise UserError(
                f"groups of {[len(rows) for rows in features]} crops",
                f"the first holds {self.assigned_crops} crops of each image, the others whole crops of the same images",
                "stack them crop by crop",
            )
        _check_crops(sum(len(rows) for rows in features) // images, self.assigned_crops)
        if self.queue_slots and images != self.queue.shape[2]:
            raise UserError(
                f"{images} images on this rank",
                f"the queue is made of global batches with {self.queue.shape[2]} images on each rank",
                "use the global batch size that the objective was built with",
            )
        return images

    def _queue_takes_part(self) -> bool:
        if not self.queue_slots:
            return False
        if not self._queue_is_full and (self._pushes_at_most is None or self._pushes_at_most >= self.queue_slots):
            # Waits for the device, but only in a step that could be the first with a full queue: steps that were not
            # finite pushed nothing. A full queue stays full.
            self._pushes_at_most = int(self.queue_pushes)
            self._queue_is_full = self._pushes_at_most >= self.queue_slots
        return self._queue_is_full

    @torch.no_grad()
    def _shares(self, loss: Tensor, assignments_ANK: Tensor, features_NF: Tensor) -> Tensor:
        flat_MK = assignments_ANK.flatten(0, 1)
        used_K = torch.zeros_like(flat_MK[0]).index_fill_(0, flat_MK.argmax(dim=1), 1.0)
        entropy = torch.special.entr(flat_MK).sum(dim=1).mean()
        unit_NF = F.normalize(_at_least_float32(features_NF), dim=1).to(flat_MK.dtype)
        means = [flat_MK.mean(dim=0), unit_NF.mean(dim=0), unit_NF.square().mean(dim=0)]
        means += [torch.stack([entropy, loss.to(entropy.dtype)])]
        return torch.cat([used_K, torch.cat(means) / distributed.world_size(self.group)])

    @torch.no_grad()
    def _figures(self, sums: Tensor) -> dict[str, Tensor]:
        prototypes = self.prototypes.out_features
        used_K, mean_K = sums[:prototypes], sums[prototypes : 2 * prototypes]
        mean_F, mean_square_F = sums[2 * prototypes : -2].chunk(2)
        deviation_F = (mean_square_F - mean_F.square()).clamp_(min=0).sqrt_()
        return {
            "loss": sums[-1],
            "assignment_entropy": sums[-2] / self.chance,
            "mean_assignment_entropy": torch.special.entr(mean_K).sum() / self.chance,
            "prototypes_in_use": (used_K > 0).to(mean_K.dtype).mean(),
            "feature_std": deviation_F.mean() * len(mean_F) ** 0.5,
        }


def _head(
    feature_dim: int,
    hidden_sizes: Sequence[int],
    embedding_size: int,
    batchnorm: bool,
    dtype: torch.dtype | None,
) -> nn.Sequential:
    layers: list[nn.Module] = []
    width = feature_dim
    for hidden in hidden_sizes:
        layers.append(nn.Linear(width, hidden, device="meta", dtype=dtype))
        if batchnorm:
            layers.append(nn.BatchNorm1d(hidden, device="meta", dtype=dtype))
        layers.append(nn.ReLU(inplace=True))
        width = hidden
    return nn.Sequential(*layers, nn.Linear(width, embedding_size, device="meta", dtype=dtype))


def _queue_slots(queue_images: int, global_batch_size: int, ranks: int) -> int:
    if queue_images == 0:
        return 0
    if queue_images < global_batch_size:
        raise UserError(
            f"queue_images {queue_images} with a global batch of {global_batch_size}",
            "the queue holds whole batches, at least one",
            f"use 0 for no queue, or {global_batch_size} or more",
        )
    if global_batch_size % ranks:
        raise UserError(
            f"a global batch of {global_batch_size} on {ranks} ranks",
            "a global batch is cut into equal parts, one a rank",
            f"use a multiple of {ranks}",
        )
    return queue_images // global_batch_size


def _check_crops(crops: int, assigned_crops: int) -> None:
    if crops < 2 or not 1 <= assigned_crops <= crops:
        raise UserError(
            f"{assigned_crops} assigned of {crops} crops",
            "each assigned crop is predicted from the other crops of its image",
            "use at least 2 crops and assign 1 or more of them",
        )


def _forget_pushes(objective: SwAV, _incompatible_keys: Any = None) -> None:
    objective._pushes_at_most, objective._queue_is_full, objective._new_rows_AND = None, False, None


def _stacked(scores: Tensor | Sequence[Tensor]) -> Tensor:
    return scores if isinstance(scores, Tensor) else torch.stack(list(scores))


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _without_autocast(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    kind = tensor.device.type
    # The meta device (planning) has no autocast to leave.
    return torch.autocast(kind, enabled=False) if kind != "meta" else contextlib.nullcontext()

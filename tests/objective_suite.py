"""What every objective keeps to: a new one inherits these tests by saying how it is made."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seer import distributed
from seer.objectives.outcome import Outcome

FEATURES = 12


def figures_of(outcome: Outcome) -> dict[str, Tensor]:
    """What the step makes of an outcome: the figures of the sums over ranks."""
    return outcome.figures(distributed.sum_over_ranks(outcome.shares.clone()))


class SmallBackbone(nn.Module):
    """A stand-in: from a list of crops to a list of (rows, FEATURES)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, FEATURES, 3)

    def forward(self, crops: list[Tensor]) -> list[Tensor]:
        return [F.relu(self.conv(group)).mean(dim=(2, 3)) for group in crops]


class ObjectiveSuite:
    """Inherit it, give `make`: a new objective for FEATURES features, IMAGES images a batch, two large crops each."""

    IMAGES = 6

    def make(self, **settings: object) -> nn.Module:
        raise NotImplementedError

    def crops(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        shapes = [(2 * self.IMAGES, 3, 10, 10), (3 * self.IMAGES, 3, 7, 7)]
        return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]

    def backbone(self, dtype: torch.dtype = torch.float32) -> SmallBackbone:
        torch.manual_seed(3)
        return SmallBackbone().to(dtype)

    def one_step(self, objective, backbone, step, finite=True, lr=0.1):
        """Forward, backward and a plain gradient step under the mask; the outcome."""
        parameters = [*objective.parameters(), *backbone.parameters()]
        for parameter in parameters:
            parameter.grad = None
        outcome = objective(backbone, self.crops(seed=step, dtype=parameters[0].dtype))
        outcome.loss.backward()
        objective.after_backward(step)
        with torch.no_grad():
            for parameter in parameters if finite else []:
                if parameter.grad is not None:
                    parameter -= lr * parameter.grad
        objective.after_step(torch.tensor(finite), step)
        return outcome

    def test_loss_is_a_wide_scalar_and_figures_are_detached(self):
        for dtype in (torch.float32, torch.float64):
            objective, backbone = self.make(dtype=dtype), self.backbone(dtype)
            outcome = objective(backbone, self.crops(dtype=dtype))
            assert outcome.loss.shape == () and outcome.loss.dtype == dtype and outcome.loss.requires_grad
            assert torch.isfinite(outcome.loss)
            assert figures_of(outcome)["loss"].item() == outcome.loss.item()
            for name, figure in figures_of(outcome).items():
                assert not figure.requires_grad and figure.isfinite().all(), name

    def test_loss_is_float32_under_autocast(self):
        objective, backbone = self.make(), self.backbone()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outcome = objective(backbone, self.crops())
        assert outcome.loss.dtype == torch.float32

    def test_every_parameter_gets_a_gradient(self):
        objective, backbone = self.make(), self.backbone()
        self.one_step(objective, backbone, step=0)
        for name, parameter in [*objective.named_parameters(), *backbone.named_parameters()]:
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name

    def test_forward_works_without_gradient_and_in_evaluation(self):
        objective, backbone = self.make().eval(), self.backbone()
        with torch.no_grad():
            outcome = objective(backbone, self.crops())
        assert not outcome.loss.requires_grad and torch.isfinite(outcome.loss)

    def test_a_step_that_is_not_finite_changes_no_bit(self):
        objective, backbone = self.make(), self.backbone()
        for step in range(3):
            self.one_step(objective, backbone, step)
        objective.eval()  # running statistics are the step's to keep, not the objective's
        before = self.bits(objective)
        objective.train()
        crops = self.crops(seed=9)
        crops[0][0, 0, 0, 0] = float("inf")
        outcome = objective(backbone, crops)
        assert not torch.isfinite(outcome.loss)
        outcome.loss.backward()
        objective.after_backward(3)
        objective.after_step(torch.tensor(False), 3)
        assert self.bits(objective) == before

    def bits(self, objective):
        names = [name for name in objective.state_dict() if "running_" not in name and "num_batches" not in name]
        return {name: objective.state_dict()[name].numpy().tobytes() for name in names}

    def test_state_goes_on_where_it_was_saved(self):
        straight, backbone = self.make(), self.backbone()
        for step in range(4):
            self.one_step(straight, backbone, step)
        resumed, other_backbone = self.make(), self.backbone()
        self.one_step(resumed, other_backbone, 7)  # whatever it knew before
        resumed.load_state_dict(straight.state_dict())
        other_backbone.load_state_dict(backbone.state_dict())
        for step in range(4, 7):
            a = self.one_step(straight, backbone, step)
            b = self.one_step(resumed, other_backbone, step)
            assert torch.equal(a.loss, b.loss)
        assert self.bits(resumed) == self.bits(straight)

    def test_built_on_meta_it_has_the_same_values(self, no_global_randomness):
        objective = self.make(device="meta")
        assert all(tensor.is_meta for tensor in objective.state_dict().values())
        objective.to_empty(device="cpu")
        with torch.no_grad():
            for tensor in objective.state_dict().values():
                tensor.fill_(float("nan") if tensor.is_floating_point() else -1)
        objective.initialise(0)
        wanted = self.make().state_dict()
        for name, tensor in objective.state_dict().items():
            assert torch.equal(tensor, wanted[name]), name
        objective.initialise(1)
        assert any(not torch.equal(tensor, wanted[name]) for name, tensor in objective.state_dict().items())

    def test_units_hold_all_parameters_once(self):
        objective = self.make()
        of_units = [id(p) for _, unit in objective.units() for p in unit.parameters()]
        assert sorted(of_units) == sorted(id(p) for p in objective.parameters())

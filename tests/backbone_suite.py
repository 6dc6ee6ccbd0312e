"""What every backbone must do. A new backbone's test inherits `BackboneSuite` and gives a factory."""

import torch
from torch import Tensor, nn


class BackboneSuite:
    """Inherit as `class TestMine(BackboneSuite)` and override `backbone`; a few thousand parameters suffice."""

    sizes = (64, 32)

    def backbone(self) -> nn.Module:
        """A small backbone, initialised, the same each time, with `feature_dim` and `units()`."""
        raise NotImplementedError

    def crops(self, rows: int = 3) -> list[Tensor]:
        generator = torch.Generator().manual_seed(7)
        return [torch.randn(rows, 3, size, size, generator=generator) for size in self.sizes]

    def test_features_are_one_row_an_image(self) -> None:
        backbone = self.backbone()
        for images in self.crops(rows=2):
            assert backbone(images).shape == (2, backbone.feature_dim)

    def test_a_list_of_resolutions_gives_what_each_gives_alone(self) -> None:
        alone, together = self.backbone().train(), self.backbone().train()
        crops = self.crops()
        expected = [alone(images) for images in crops]
        found = together(crops)
        assert isinstance(found, list)
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
        for (name, a), b in zip(alone.state_dict().items(), together.state_dict().values(), strict=True):
            assert torch.equal(a, b), f"{name}: running statistics depend on how the crops are passed"

    def test_every_parameter_gets_a_gradient(self) -> None:
        backbone = self.backbone().train()
        torch.stack([features.pow(2).sum() for features in backbone(self.crops())]).sum().backward()
        without = [name for name, p in backbone.named_parameters() if p.grad is None or not p.grad.any()]
        assert without == []

    def test_evaluation_looks_at_one_image_and_changes_nothing(self) -> None:
        backbone = self.backbone()
        backbone.train()(self.crops())  # statistics that are not the initial ones
        backbone.eval()
        before = {name: value.clone() for name, value in backbone.state_dict().items()}
        images = self.crops(rows=4)[0]
        with torch.no_grad():
            torch.testing.assert_close(backbone(images)[1:2], backbone(images[1:2]), rtol=1e-4, atol=1e-5)
            assert not torch.allclose(backbone.eval()(images), self.backbone().train()(images))
        assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())

    def test_the_units_hold_every_parameter_once(self) -> None:
        backbone = self.backbone()
        names = [f"{unit}.{name}" for unit, module in backbone.units() for name, _ in module.named_parameters()]
        assert sorted(names) == sorted(name for name, _ in backbone.named_parameters())

    def test_building_and_calling_draw_nothing(self, no_global_randomness: None) -> None:
        self.backbone()(self.crops())

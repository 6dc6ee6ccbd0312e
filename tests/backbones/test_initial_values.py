import math

import pytest
import torch
from torch import nn

from seer.backbones.initial_values import initialise
from seer.backbones.regnet import RegNetY, regnet_shape, regnety
from seer.keyed_tensors import normal_, uniform_


def _equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class TestKeyedTensors:
    def test_values_depend_on_seed_name_and_shape_alone(self) -> None:
        first = normal_(torch.empty(4, 3, 2, 2), 2.0, seed=5, name="a")
        normal_(torch.empty(7), 1.0, seed=5, name="b")
        again = normal_(torch.empty(4, 3, 2, 2).to(memory_format=torch.channels_last), 2.0, seed=5, name="a")
        assert torch.equal(first, again)
        for other in (dict(seed=6, name="a"), dict(seed=5, name="b")):
            assert not torch.isclose(normal_(torch.empty(4, 3, 2, 2), 2.0, **other), first).any()

    def test_other_types_hold_the_same_values_rounded(self) -> None:
        for fill in (normal_, uniform_):
            reference = fill(torch.empty(100), 0.3, seed=0, name="w")
            for dtype in (torch.float64, torch.bfloat16):
                assert torch.equal(fill(torch.empty(100, dtype=dtype), 0.3, seed=0, name="w"), reference.to(dtype))

    def test_a_default_device_changes_nothing(self) -> None:
        tensor = torch.empty(5)
        with torch.device("meta"):
            normal_(tensor, 1.0, seed=0, name="w")
        assert torch.equal(tensor, normal_(torch.empty(5), 1.0, seed=0, name="w"))

    def test_moments(self) -> None:
        values = normal_(torch.empty(40_000), 0.5, seed=1, name="n").double()
        assert abs(values.mean()) < 0.01 and abs(values.std() - 0.5) < 0.01
        values = uniform_(torch.empty(40_000), 0.5, seed=1, name="u").double()
        assert abs(values.mean()) < 0.01 and abs(values.std() - 0.5 / math.sqrt(3)) < 0.01
        assert -0.5 <= values.min() < -0.499 and 0.499 < values.max() <= 0.5

    def test_needs_no_gradient_context_and_draws_nothing(self, no_global_randomness: None) -> None:
        parameter = nn.Parameter(torch.zeros(3))
        normal_(parameter, 1.0, seed=0, name="p")
        assert parameter.requires_grad and parameter.any()


def test_convolutions_follow_the_rule_of_the_trained_networks() -> None:
    """N(0, 2/(k^2 C_out)) with all output channels, not those of one group; SE biases U(+-1/sqrt(C_in))."""
    network = regnety("200mf")
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            weight = module.weight.double()
            std = math.sqrt(2 / (module.kernel_size[0] ** 2 * module.out_channels))
            # A sample's standard deviation scatters by std/sqrt(2n); five times that never happens by chance.
            assert abs(weight.std() / std - 1) < 5 / math.sqrt(2 * weight.numel()), name
            if module.bias is not None:
                bound = 1 / math.sqrt(module.in_channels)
                assert 0.5 * bound < module.bias.abs().max() <= bound, name


def test_normalisations_start_as_identity() -> None:
    network = regnety("tiny")
    with torch.no_grad():
        for value in network.state_dict().values():
            value.fill_(float("nan")) if value.is_floating_point() else value.fill_(9)
    initialise(network)
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms
    for norm in norms:
        assert (norm.weight == 1).all() and (norm.bias == 0).all()
        assert (norm.running_mean == 0).all() and (norm.running_var == 1).all()
        assert norm.num_batches_tracked == 0


def test_every_value_is_set_after_to_empty() -> None:
    direct, empty = regnety("tiny"), regnety("tiny", device="meta").to_empty(device="cpu")
    with torch.no_grad():
        for value in empty.state_dict().values():
            value.fill_(float("nan")) if value.is_floating_point() else value.fill_(9)
    initialise(empty)
    assert _equal(direct.state_dict(), empty.state_dict())


def test_types_hold_the_same_values_rounded() -> None:
    reference = regnety("tiny").state_dict()
    for dtype in (torch.float64, torch.bfloat16):
        network = regnety("tiny", dtype=dtype)
        assert all(parameter.dtype == dtype for parameter in network.parameters())
        for name, value in network.state_dict().items():
            assert torch.equal(value, reference[name].to(value.dtype)), name


def test_seeds_and_names_give_other_values() -> None:
    network = regnety("tiny")
    before = {name: value.clone() for name, value in network.state_dict().items()}
    weights = [name for name in before if name.endswith("conv.weight") or ".se." in name]
    initialise(network, seed=1)
    assert not any(torch.equal(before[name], network.state_dict()[name]) for name in weights)
    assert not torch.equal(before["s3.b2.conv1.conv.weight"], before["s3.b2.conv3.conv.weight"])
    initialise(network, seed=0)
    assert _equal(before, network.state_dict())


def test_values_do_not_depend_on_the_rest_of_the_network() -> None:
    """Blocks of the same name and shape are equal in networks of other depths: nothing is drawn in turn."""
    short, long = regnety("tiny").state_dict(), RegNetY(regnet_shape(7, 32, 30.0, 2.0, 16)).state_dict()
    shared = [name for name in short if name in long and short[name].shape == long[name].shape]
    assert "s3.b2.conv1.conv.weight" in shared
    assert all(torch.equal(short[name], long[name]) for name in shared)


def test_a_module_without_a_rule_is_named() -> None:
    with pytest.raises(TypeError, match=r"no rule for the initial values of 0 \(Linear\)"):
        initialise(nn.Sequential(nn.Linear(2, 2)))

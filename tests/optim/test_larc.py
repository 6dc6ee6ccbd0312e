import copy
import math

import pytest
import torch
from host_sync import NoHostSync
from torch import nn

from seer.errors import UserError
from seer.optim import larc
from seer.optim.groups import parameter_groups
from seer.optim.larc import LARC

# From executing VISSL's LARC in float64.
GOLDEN = [
    (
        [-0.004622921194, 0.9599050155, 0.6400477902, 0.8606200727, 0.9821169189, 0.2379762664],
        [-0.4585615148, -0.3671242499, -0.2177261383],
    ),
    (
        [-0.01390903297, 0.9531044601, 0.6320028877, 0.8562252794, 0.9760559305, 0.2364236111],
        [-0.8734705626, -0.6989597855, -0.4140986269],
    ),
    (
        [-0.02792859486, 0.943806227, 0.6204539525, 0.8510449913, 0.9680477623, 0.2358940619],
        [-1.25067394, -0.9990117769, -0.5896276205],
    ),
]


@pytest.fixture(params=[True, False], ids=["host reads finite", "device keeps finite"], autouse=True)
def both_ways(request, monkeypatch):
    """Every test runs as on a CPU, where `finite` is read, and as on a device, where it is not waited for."""
    if not request.param:
        monkeypatch.setattr(larc, "_HOSTS", ())


def golden_parameters():
    i, j = torch.arange(3, dtype=torch.float64)[:, None], torch.arange(2, dtype=torch.float64)
    return nn.Parameter(torch.sin(0.7 * i + 1.3 * j + 0.1 * i * j)), nn.Parameter(torch.zeros(3, dtype=torch.float64))


def golden_gradients(t):
    i, j = torch.arange(3, dtype=torch.float64)[:, None], torch.arange(2, dtype=torch.float64)
    return torch.cos(0.3 * i + 0.5 * j + 0.2 * t), 0.1 * torch.cos(0.4 * i[:, 0] + 0.3 * t)


@pytest.mark.parametrize("finite", [None, torch.tensor(True)])
def test_published_numbers(finite):
    p, z = golden_parameters()
    optimizer = LARC([p, z], lr=4.8, momentum=0.9, weight_decay=0.01)
    for t, (p_values, z_values) in enumerate(GOLDEN, start=1):
        p.grad, z.grad = golden_gradients(t)
        optimizer.step(finite=finite)
        assert p.flatten().tolist() == pytest.approx(p_values, rel=5e-10)
        assert z.tolist() == pytest.approx(z_values, rel=5e-10)


def one_by_one(p, g, b, group):
    """A step of one tensor as the recipe is written, with comparisons on the host."""
    if not group["exclude"] and p.norm() != 0 and g.norm() != 0:
        rate = group["trust_coefficient"] * p.norm() / (g.norm() + group["weight_decay"] * p.norm() + group["eps"])
        g = (g + group["weight_decay"] * p) * rate
    b = group["momentum"] * b + g
    return p - group["lr"] * b, b


def network(dtype=torch.float64):
    torch.manual_seed(0)
    parts = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 5), nn.Linear(5, 2, bias=False)
    return nn.Sequential(*parts).to(dtype)


@pytest.mark.parametrize("exclude", [False, True])
def test_equals_the_recipe_tensor_by_tensor_while_lr_changes(exclude):
    model = network()
    groups = parameter_groups(model.named_parameters(), exclude)
    assert [len(group["params"]) for group in groups] == ([3, 4] if exclude else [7])
    optimizer = LARC(groups, lr=0.0, momentum=0.9, weight_decay=0.05, trust_coefficient=0.01)
    momenta = {p: torch.zeros_like(p) for p in model.parameters()}
    for step in range(6):
        model.zero_grad()
        model(torch.randn(8, 3, 8, 8, dtype=torch.float64)).square().sum().backward()
        if step == 3:
            model[4].weight.grad.zero_()  # only momentum moves it
        if step < 2:
            model[0].bias.grad = None  # frozen at the start
        wanted = {}
        for group in optimizer.param_groups:
            group["lr"] = 0.3 * (step + 1)
            for p in group["params"]:
                wanted[p] = (p.detach(), momenta[p])
                if p.grad is not None:
                    wanted[p] = one_by_one(p.detach(), p.grad, momenta[p], group)
        optimizer.step(finite=torch.tensor(True))
        for p, (value, momentum) in wanted.items():
            assert torch.allclose(p, value, rtol=1e-12, atol=1e-14)
            assert torch.allclose(optimizer.state[p]["momentum"], momentum, rtol=1e-12, atol=1e-14)
            momenta[p] = momentum


def test_without_decay_and_scaling_it_is_sgd():
    ours, theirs = network(), network()
    larc = LARC([{"params": list(ours.parameters()), "exclude": True}], lr=0.1, momentum=0.9, weight_decay=0.5)
    sgd = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9)
    for _ in range(3):
        x = torch.randn(8, 3, 8, 8, dtype=torch.float64)
        for model, optimizer in ((ours, larc), (theirs, sgd)):
            model.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_step_that_is_not_finite_changes_no_bit(dtype, poison):
    model = network(dtype)
    optimizer = LARC(parameter_groups(model.named_parameters(), True), lr=0.1, momentum=0.9, weight_decay=0.01)
    with torch.no_grad():
        model[1].bias.fill_(-0.0)  # a bit that adding 0 would flip
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    model[1].bias.grad = torch.full_like(model[1].bias, 0.0)
    optimizer.step(finite=torch.tensor(True))
    before = [p.detach().numpy().tobytes() for p in model.parameters()]
    momentum = [optimizer.state[p]["momentum"].numpy().tobytes() for p in model.parameters()]
    for p in model.parameters():
        p.grad.flatten()[0] = poison
    optimizer.step(finite=torch.tensor(False))
    assert [p.detach().numpy().tobytes() for p in model.parameters()] == before
    assert [optimizer.state[p]["momentum"].numpy().tobytes() for p in model.parameters()] == momentum


def test_a_step_never_waits_for_the_device(monkeypatch):
    monkeypatch.setattr(larc, "_HOSTS", ())
    model = network()
    optimizer = LARC(parameter_groups(model.named_parameters(), True), lr=0.1, momentum=0.9, weight_decay=0.01)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    with NoHostSync():
        optimizer.step(finite=torch.tensor(True))
        optimizer.step()
    with pytest.raises(AssertionError, match="waits"), NoHostSync():
        bool(model[0].weight.norm() != 0)


def test_momentum_is_there_from_the_start_and_travels_in_the_state():
    model = network()
    optimizer = LARC(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    assert all(torch.equal(optimizer.state[p]["momentum"], torch.zeros_like(p)) for p in model.parameters())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    again = LARC(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for p in model.parameters():
        assert torch.equal(again.state[p]["momentum"], optimizer.state[p]["momentum"])


@pytest.mark.parametrize("wrong", [{"lr": -1}, {"momentum": 1.0}, {"weight_decay": math.nan}, {"eps": -1e-8}])
def test_bad_arguments(wrong):
    with pytest.raises(UserError):
        LARC([nn.Parameter(torch.ones(1))], **{"lr": 0.1, "momentum": 0.9, "weight_decay": 0.0, **wrong})

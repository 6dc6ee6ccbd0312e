import math

import pytest
import torch
from torch import nn

from seer.optim.adamw import MaskedAdamW
from seer.optim.groups import parameter_groups


def network(dtype):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 2)).to(dtype)


def give_gradients(model, x):
    model.zero_grad()
    model(x).square().mean().backward()


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.float64, 1e-13)])
@pytest.mark.parametrize("finite", [None, torch.tensor(True)])
def test_equals_torchs_plain_adamw(dtype, tolerance, finite):
    ours, theirs = network(dtype), network(dtype)
    settings = {"lr": 0.01, "betas": (0.8, 0.95), "weight_decay": 0.1}
    masked = MaskedAdamW(parameter_groups(ours.named_parameters(), True), **settings)
    weights = [p for p in theirs.parameters() if p.ndim > 1]
    rest = [p for p in theirs.parameters() if p.ndim <= 1]
    plain = torch.optim.AdamW([{"params": weights}, {"params": rest, "weight_decay": 0.0}], foreach=False, **settings)
    for step in range(5):
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        for group in [*masked.param_groups, *plain.param_groups]:
            group["lr"] = 0.01 / (step + 1)
        if step == 2:
            ours[0].bias.grad = theirs[0].bias.grad = None
        masked.step(finite=finite)
        plain.step()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=tolerance, atol=tolerance)
        assert masked.state[p]["step"] == plain.state[q]["step"]


def everything(model, optimizer):
    tensors = [*model.parameters(), *(value for p in model.parameters() for value in optimizer.state[p].values())]
    return [tensor.detach().numpy().tobytes() for tensor in tensors]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_step_that_is_not_finite_changes_no_bit(dtype, poison):
    model = network(dtype)
    optimizer = MaskedAdamW(model.parameters(), lr=0.1)
    give_gradients(model, torch.randn(7, 6, dtype=dtype))
    optimizer.step(finite=torch.tensor(True))
    before = everything(model, optimizer)
    for p in model.parameters():
        p.grad.flatten()[0] = poison
    optimizer.step(finite=torch.tensor(False))
    assert everything(model, optimizer) == before
    give_gradients(model, torch.randn(7, 6, dtype=dtype))
    optimizer.step(finite=torch.tensor(True))
    assert everything(model, optimizer) != before


def test_state_is_there_from_the_start_and_travels():
    model = network(torch.float32)
    optimizer = MaskedAdamW(model.parameters(), lr=0.1)
    assert all(set(optimizer.state[p]) == {"step", "exp_avg", "exp_avg_sq"} for p in model.parameters())
    give_gradients(model, torch.randn(7, 6))
    optimizer.step()
    again = MaskedAdamW(model.parameters(), lr=0.1)
    again.load_state_dict(optimizer.state_dict())
    assert everything(model, again) == everything(model, optimizer)

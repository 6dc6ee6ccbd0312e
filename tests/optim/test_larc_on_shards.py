"""LARC on tensors that are cut over ranks, some of them with nothing on some ranks."""

from __future__ import annotations

import pytest
import torch
from host_sync import NoHostSync
from ranks import ranks
from strategy_run import Collectives
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from seer import distributed
from seer.optim import larc
from seer.optim.larc import LARC

SHAPES = [(3, 4), (1, 5), (7,), (2, 2)]  # of 4 ranks, 1, 3 and 2 hold no row of the first, the second and the last
SHARDED = (0, 1, 2)


def values(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def part(whole: Tensor) -> Tensor:
    """As FSDP2 cuts it."""
    mesh = distributed.mesh(torch.device("cpu"))
    chunks = whole.chunk(distributed.world_size())
    own = chunks[distributed.rank()] if distributed.rank() < len(chunks) else whole[:0]
    return DTensor.from_local(own.clone(), mesh, [Shard(0)], run_check=False, shape=whole.shape, stride=whole.stride())


def steps(sharded: bool, exclude: bool, on_device: bool) -> tuple[list[Tensor], int]:
    """Weights after three steps, the second of which is not finite; collectives of the last one."""
    before, larc._HOSTS = larc._HOSTS, () if on_device else ("cpu",)
    try:
        cut = [part if sharded and at in SHARDED else torch.clone for at in range(len(SHAPES))]
        parameters = [nn.Parameter(cut[at](values(shape, at))) for at, shape in enumerate(SHAPES)]
        groups = [{"params": parameters[:2]}, {"params": parameters[2:], "exclude": exclude}]
        optimizer = LARC(groups, lr=0.5, momentum=0.9, weight_decay=0.01, trust_coefficient=0.1)
        counted = 0
        for step, finite in enumerate((True, False, True)):
            for at, parameter in enumerate(parameters):
                parameter.grad = cut[at](values(SHAPES[at], 10 * step + at) * (1.0 if finite else float("nan")))
            with Collectives() as collectives:
                optimizer.step(finite=torch.tensor(finite))
            counted = collectives.counts.total()
        whole = [p.full_tensor() if isinstance(p, DTensor) else p.detach() for p in parameters]
        return whole, counted
    finally:
        larc._HOSTS = before


@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize("exclude", [False, True])
@pytest.mark.parametrize("on_device", [False, True])
def test_a_step_is_that_of_whole_tensors_and_costs_one_all_reduce(n: int, exclude: bool, on_device: bool) -> None:
    wanted, none = steps(False, exclude, on_device)
    assert none == 0
    for found, collectives in ranks(n).run(steps, True, exclude, on_device):
        assert collectives == 1
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-14)


def waits_for_nothing() -> bool:
    larc._HOSTS = ()
    parameter = nn.Parameter(part(values((3, 4), 0)))
    optimizer = LARC([parameter], lr=0.5, momentum=0.9, weight_decay=0.01)
    parameter.grad = part(values((3, 4), 1))
    norms = distributed.sum_over_ranks(optimizer.partial_square_norms())
    with NoHostSync():
        optimizer.step(finite=torch.tensor(True), square_norms=norms)
    larc._HOSTS = ("cpu",)
    return True


def test_a_step_waits_for_nothing() -> None:
    assert ranks(2).run(waits_for_nothing) == [True, True]

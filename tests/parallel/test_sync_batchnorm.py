"""SyncBatchNorm on several ranks equals nn.BatchNorm on the joined batch, and costs two collectives a layer."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from host_sync import NoHostSync
from ranks import ranks
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from seer import distributed
from seer.backbones.regnet import BatchNorm, regnety
from seer.parallel.sync_batchnorm import SyncBatchNorm, synchronise_batchnorms

CHANNELS = 5
SPLITS = {2: [[4, 4], [1, 7]], 4: [[2, 2, 2, 2], [3, 1, 1, 3]]}


class Collectives(TorchDispatchMode):
    """Counts what travels between ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.counts["gather" if "gather" in func.__name__ else func.__name__.split(".")[0]] += 1
        return func(*args, **(kwargs or {}))


def maps_of(shapes: list[tuple[int, ...]], dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Tensor]:
    """Each with a mean and a deviation of its own a channel."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for shape in shapes:
        mean, deviation = (
            torch.randn(shape[1], generator=generator, dtype=torch.float64).view(-1, *[1] * (len(shape) - 2))
            for _ in range(2)
        )
        values = torch.randn(shape, generator=generator, dtype=torch.float64) * (deviation.abs() + 0.5) + 3 * mean
        made.append(values.to(dtype))
    return made


def weighted(norm: nn.Module) -> nn.Module:
    """With a weight and a bias that are not the initial ones."""
    with torch.no_grad():
        for parameter, (values,) in zip(
            norm.parameters(), [maps_of([(CHANNELS, 1)], seed=s) for s in (7, 8)], strict=False
        ):
            parameter.copy_(values.flatten())
    return norm


def results(norm: nn.Module, maps: list[Tensor], output_gradients: list[Tensor]) -> dict[str, list[Tensor]]:
    maps = [x.clone().requires_grad_() for x in maps]
    outputs = norm(maps)
    torch.autograd.backward(outputs, output_gradients)
    return {
        "outputs": [y.detach() for y in outputs],
        "inputs": [x.grad for x in maps],
        "parameters": [parameter.grad for parameter in norm.parameters()],
        "statistics": [buffer.double() for buffer in norm.buffers()],
    }


def own_rows(maps: list[Tensor], split: list[int]) -> list[Tensor]:
    return [x.split(split)[distributed.rank()] for x in maps]


def on_a_rank(shapes: list[tuple[int, ...]], split: list[int], options: dict[str, Any]) -> dict[str, list[Tensor]]:
    norm = weighted(SyncBatchNorm(CHANNELS, dtype=torch.float64, **options))
    return results(norm, own_rows(maps_of(shapes), split), own_rows(maps_of(shapes, seed=1), split))


def joined(found: list[dict[str, list[Tensor]]]) -> dict[str, list[Tensor]]:
    """What one process would have seen: rows after each other, gradients of parameters added up."""
    return {
        "outputs": [torch.cat(parts) for parts in zip(*(each["outputs"] for each in found), strict=True)],
        "inputs": [torch.cat(parts) for parts in zip(*(each["inputs"] for each in found), strict=True)],
        "parameters": [sum(parts) for parts in zip(*(each["parameters"] for each in found), strict=True)],
    }


@pytest.mark.parametrize("options", [{}, {"momentum": None}, {"affine": False}, {"track_running_stats": False}])
@pytest.mark.parametrize("shapes", [[(8, CHANNELS, 6, 6), (8, CHANNELS, 3, 2)], [(8, CHANNELS)]], ids=["maps", "rows"])
@pytest.mark.parametrize("n", [1, 2, 4])
def test_equals_batchnorm_on_the_joined_batch(n: int, shapes: list[tuple[int, ...]], options: dict[str, Any]) -> None:
    class Plain(BatchNorm):
        def _check_input_dim(self, input: Tensor) -> None:
            pass

    norm = weighted(Plain(CHANNELS, dtype=torch.float64, **options))
    expected = results(norm, maps_of(shapes), maps_of(shapes, seed=1))
    for split in SPLITS.get(n, [[8]]):
        arguments = shapes, split, options
        found = ranks(n).run(on_a_rank, *arguments) if n > 1 else [on_a_rank(*arguments)]
        for name, tensors in joined(found).items():
            torch.testing.assert_close(tensors, expected[name], rtol=1e-12, atol=1e-12)
        for each in found:
            torch.testing.assert_close(each["statistics"], expected["statistics"], rtol=1e-12, atol=1e-12)


def _variance_of_values_far_from_zero() -> tuple[float, float]:
    (x,) = maps_of([(64, 1, 16, 16)])
    x = ((x - x.mean()) / x.std() + 1e4 + 2 * distributed.rank()).float()
    norm = SyncBatchNorm(1, momentum=1.0)
    norm(x)
    sums = torch.stack([x.sum(), x.square().sum(), torch.tensor(float(x.numel()))])
    total, squares, count = distributed.sum_over_ranks(sums)
    return norm.running_var.item(), (squares / count - (total / count).square()).item()


def test_variances_are_merged_by_chans_formula() -> None:
    """Two ranks with variance 1 each, means 2 apart: variance 2. The sum of squares minus a square says anything."""
    for merged, by_squares in ranks(2).run(_variance_of_values_far_from_zero):
        assert merged == pytest.approx(2.0, rel=1e-3)
        assert abs(by_squares - 2.0) > 0.5


def _in_bfloat16(autocast: bool) -> list[tuple[Tensor, ...]]:
    found: list[tuple[Tensor, ...]] = []
    for dtype in (torch.bfloat16, torch.float64):
        norm = weighted(SyncBatchNorm(CHANNELS, dtype=torch.promote_types(dtype, torch.float32)))
        x, dy = (own_rows(maps_of([(8, CHANNELS, 6, 6)], torch.bfloat16, seed), [3, 5])[0].to(dtype) for seed in (0, 1))
        x.requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast and dtype == torch.bfloat16):
            y = norm(x)
        y.backward(dy)
        found.append((y.detach(), x.grad, norm.weight.grad, norm.bias.grad, norm.running_mean, norm.running_var))
    return found


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_maps_with_float32_weights(autocast: bool) -> None:
    for half, exact in ranks(2).run(_in_bfloat16, autocast):
        assert [tensor.dtype for tensor in half] == [torch.bfloat16] * 2 + [torch.float32] * 4
        for place, (a, b) in enumerate(zip(half, exact, strict=True)):
            # Maps are rounded to 8 bits, an input gradient three times; sums and statistics are float32.
            allowed = (2**-8 if place == 0 else 2**-7) * b.abs().max().item() if place < 2 else 1e-4
            torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=allowed)


def _all_in_bfloat16() -> list[torch.dtype]:
    norm = SyncBatchNorm(CHANNELS, dtype=torch.bfloat16)
    found = results(
        norm, maps_of([(8, CHANNELS, 6, 6)], torch.bfloat16), maps_of([(8, CHANNELS, 6, 6)], torch.bfloat16)
    )
    buffers = [norm.running_mean, norm.running_var]
    return [tensor.dtype for tensor in [*found["outputs"], *found["inputs"], *found["parameters"], *buffers]]


def test_a_module_in_bfloat16_stays_so() -> None:
    for dtypes in ranks(2).run(_all_in_bfloat16):
        assert dtypes == [torch.bfloat16] * 6


def _collectives_and_formats() -> tuple[Any, ...]:
    norm, formats = SyncBatchNorm(CHANNELS), []
    maps = []
    for x in maps_of([(4, CHANNELS, 6, 6), (2, CHANNELS, 3, 3)], torch.float32):
        maps.append(x.to(memory_format=torch.channels_last).requires_grad_().mul(1))
        # A leaf would bring its gradient into its own format.
        maps[-1].register_hook(lambda dx: formats.append(dx.is_contiguous(memory_format=torch.channels_last)))
    with Collectives() as forward, NoHostSync():
        outputs = norm(maps)
    formats += [y.is_contiguous(memory_format=torch.channels_last) for y in outputs]
    with Collectives() as backward, NoHostSync():
        torch.autograd.backward(outputs, [y.detach().contiguous() for y in outputs])
    norm.eval()
    with Collectives() as evaluation:
        norm(maps)
    return dict(forward.counts), dict(backward.counts), dict(evaluation.counts), formats


def test_one_gather_one_reduction_no_waiting_and_the_memory_format_stays() -> None:
    for forward, backward, evaluation, formats in ranks(2).run(_collectives_and_formats):
        assert (list(forward.values()), list(forward)) == ([1], ["gather"])
        assert (list(backward.values()), evaluation) == ([1], {})
        assert "allreduce" in next(iter(backward))
        assert formats == [True] * 4


def test_evaluation_and_one_process_are_batchnorm_to_the_last_bit() -> None:
    plain, synchronised = (weighted(kind(CHANNELS)) for kind in (BatchNorm, SyncBatchNorm))
    maps = maps_of([(4, CHANNELS, 6, 6), (2, CHANNELS, 3, 3)], torch.float32)
    for training in (True, False):
        found, expected = (norm.train(training)(maps) for norm in (synchronised, plain))
        assert all(map(torch.equal, found, expected))
        assert all(map(torch.equal, synchronised.buffers(), plain.buffers()))
        assert torch.equal(synchronised(maps[0]), plain(maps[:1])[0])


class Network(nn.Module):
    """A backbone that gives lists, a head that does not."""

    def __init__(self, device: str = "cpu") -> None:
        super().__init__()
        self.backbone = regnety("tiny", device=device, dtype=torch.float64)
        with torch.device(device):
            self.head = nn.Sequential(nn.BatchNorm1d(256, dtype=torch.float64), nn.ReLU(inplace=True))

    def forward(self, images: list[Tensor]) -> list[Tensor]:
        features = self.backbone(images)
        return list(self.head(torch.cat(features)).split([len(x) for x in features]))


def _network_on_a_rank(split: list[int]) -> dict[str, list[Tensor]]:
    torch.manual_seed(0)
    network = Network()
    synchronise_batchnorms(network)
    shapes, gradients = [(8, 3, 32, 32), (8, 3, 16, 16)], [(8, 256), (8, 256)]
    return results(network, own_rows(maps_of(shapes), split), own_rows(maps_of(gradients, seed=1), split))


def test_a_converted_network_on_two_ranks_equals_one_process() -> None:
    # Each image of a resolution on the same rank as in the joined batch; the head's batch is the same set of rows.
    found, expected = ranks(2).run(_network_on_a_rank, [3, 5]), _network_on_a_rank([8])
    for name, tensors in joined(found).items():
        torch.testing.assert_close(tensors, expected[name], rtol=1e-9, atol=1e-9)
    for each in found:
        torch.testing.assert_close(each["statistics"], expected["statistics"], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_conversion_keeps_tensors_names_and_settings(device: str) -> None:
    network = Network(device)
    network.head.eval()
    network.head[0].momentum = 0.3
    tensors = network.state_dict(keep_vars=True)
    synchronise_batchnorms(network)
    converted = network.state_dict(keep_vars=True)
    assert list(converted) == list(tensors)
    assert all(converted[name] is tensor for name, tensor in tensors.items())
    norms = [module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    assert len(norms) == 21 and all(type(norm) is SyncBatchNorm for norm in norms)
    head = network.head[0]
    assert (head.momentum, head.training, norms[0].training) == (0.3, False, True)

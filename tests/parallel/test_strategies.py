"""Every strategy on any number of ranks is the same training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import ranks
from strategy_run import EVERYTHING, losses_and_weights
from tiny_run import NARROW, make_shards

STEPS = 20
FP64 = (*EVERYTHING, *NARROW, "train.precision=fp64", f"train.steps={STEPS}")
COUNTS = ("skipped_steps", "bad_samples")
MATRIX = [
    pytest.param(2, "ddp", (), id="ddp 2"),
    pytest.param(2, "fsdp", (), id="fsdp 2"),
    pytest.param(4, "ddp", (), id="ddp 4"),
    pytest.param(4, "fsdp", (), id="fsdp 4"),
    pytest.param(4, "fsdp", ("parallel.shard_ranks=2",), id="hsdp 2x2"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("strategies"))


@pytest.fixture(scope="module")
def shards(folder: str) -> str:
    return make_shards(Path(folder))


@pytest.fixture(scope="module")
def one_process(folder: str, shards: str) -> dict[str, Any]:
    return losses_and_weights(folder, shards, "single", FP64, STEPS, None)


def difference(found: dict[str, Any], wanted: dict[str, Any]) -> float:
    assert found.keys() == wanted.keys()
    return max(
        float((found[name] - wanted[name]).abs().max())
        for name in wanted
        if wanted[name].numel() and name not in COUNTS
    )


@pytest.mark.parametrize(("n", "strategy", "overrides"), MATRIX)
def test_float64_training_is_that_of_one_process(
    n: int, strategy: str, overrides: tuple[str, ...], folder: str, shards: str, one_process: dict[str, Any]
) -> None:
    found = ranks(n).run(losses_and_weights, folder, shards, strategy, (*FP64, *overrides), STEPS, None, timeout=150)
    for of_rank in found:
        assert of_rank["losses"] == found[0]["losses"]
        assert of_rank["replicas_equal"]
        assert all(torch.equal(of_rank["first"][name], one_process["first"][name]) for name in one_process["first"])
        assert of_rank["losses"] == pytest.approx(one_process["losses"], rel=0, abs=1e-9)
        assert difference(of_rank["last"], one_process["last"]) < 1e-9
        assert of_rank["last"]["bad_samples"] == STEPS * sum(range(n))
    assert one_process["losses"][0] != one_process["losses"][-1]

    units, norms, iterations = found[0]["units"], found[0]["norms"], 3
    # Each BatchNorm sends statistics forward and their gradients backward; Sinkhorn a maximum and a sum an iteration;
    # norms, flags, counts and figures share one all-reduce.
    wanted = {"_allgather_base_": norms, "allreduce_": norms + 1 + iterations + 1}
    if strategy == "fsdp":
        wanted["_allgather_base_"] += 2 * units  # forward and backward, for both resolutions at once
        wanted["_reduce_scatter_base_"] = units
        wanted["allreduce_"] += 1  # BatchNorm's gradients
    else:
        wanted["allreduce_"] += 1  # all gradients in one bucket: the network is small
    if overrides:
        wanted["allreduce_"] += units  # gradients between the copies
    assert found[0]["collectives"] == wanted


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_float32_begins_with_the_same_loss(strategy: str, folder: str, shards: str) -> None:
    # Sinkhorn divides scores by epsilon, and their rounding with it: at the demo's 0.02 one process in float32 is 1e-6
    # to 3e-6 away from float64, and so are strategies from each other.
    settings = (*EVERYTHING, "objective.epsilon=0.1", "train.global_batch_size=48", "objective.queue_images=48")
    (wanted,) = losses_and_weights(folder, shards, "single", settings, 1, None)["losses"]
    (found,) = ranks(2).run(losses_and_weights, folder, shards, strategy, settings, 1, None)[1]["losses"]
    assert found == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_one_infinite_pixel_on_one_rank_changes_nothing_on_any(strategy: str, folder: str, shards: str) -> None:
    run = ranks(2).run
    before = run(losses_and_weights, folder, shards, strategy, FP64, 5, None)
    after = run(losses_and_weights, folder, shards, strategy, FP64, 6, (5, 1))
    for then, now in zip(before, after, strict=True):
        assert now["last"]["skipped_steps"] == then["last"]["skipped_steps"] + 1
        for name, tensor in then["last"].items():
            assert name in COUNTS or torch.equal(tensor, now["last"][name]), name


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_without_synchronised_batchnorm_replicas_and_their_statistics_stay_equal(
    strategy: str, folder: str, shards: str
) -> None:
    local = (*FP64, "parallel.sync_batchnorm=false")
    found = ranks(2).run(losses_and_weights, folder, shards, strategy, local, 4, None)
    assert all(of_rank["replicas_equal"] for of_rank in found)
    assert found[0]["losses"] == found[1]["losses"]
    wanted = {"allreduce_": 1 + 3 + 1 + 1 + 1}  # Sinkhorn; norms and flags; gradients of BatchNorm or all; statistics
    if strategy == "fsdp":
        wanted |= {"_allgather_base_": 2 * found[0]["units"], "_reduce_scatter_base_": found[0]["units"]}
    assert found[0]["collectives"] == wanted


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_adamw_is_the_same_too(strategy: str, folder: str, shards: str) -> None:
    settings = (*FP64, "optimizer=adamw")
    wanted = losses_and_weights(folder, shards, "single", settings, 6, None)
    found = ranks(2).run(losses_and_weights, folder, shards, strategy, settings, 6, None)[1]
    # Adam divides by the size of the gradient: rounding of gradients that ought to be zero becomes whole steps.
    assert found["losses"] == pytest.approx(wanted["losses"], rel=0, abs=1e-6)
    assert found["replicas_equal"]


def test_low_precision_under_fsdp_is_that_of_ddp(folder: str, shards: str) -> None:
    settings = (*EVERYTHING, *NARROW, "train.precision=bf16")
    ddp, fsdp = (
        ranks(2).run(losses_and_weights, folder, shards, strategy, settings, 4, None)[0] for strategy in ("ddp", "fsdp")
    )
    assert fsdp["losses"][0] == pytest.approx(ddp["losses"][0], rel=1e-3)
    assert fsdp["losses"][-1] == pytest.approx(ddp["losses"][-1], rel=0.05)
    assert fsdp["replicas_equal"]
    assert {tensor.dtype for tensor in fsdp["last"].values() if tensor.is_floating_point()} == {torch.float32}

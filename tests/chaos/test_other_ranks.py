"""A run goes on with any number of ranks and any strategy, wherever it stopped."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from lives import final_tensors, losses
from ranks import ranks
from strategy_run import EVERYTHING, started, whole
from tiny_run import tiny_config
from torch import Tensor

from seer.checkpoint.store import CheckpointStore
from seer.training import loop
from seer.training.state import load_state, state_tensors

SETTINGS = (*EVERYTHING, "train.precision=fp64", "train.steps=8", "optimizer.learning_rate=0.1")


def train(run: str, shards: str, strategy: str, overrides: tuple[str, ...], stop_after: int | None) -> int:
    """A run in the processes of a pool; the last rank is asked to stop in one of its steps."""
    step = loop.train_step

    def interrupted(state: Any, *args: Any, **more: Any) -> Any:
        if state.step + 1 == stop_after and loop.distributed.rank() == loop.distributed.world_size() - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(state, *args, **{**more, "requests": (state.step + 1 == stop_after, False)})

    loop.train_step = interrupted
    try:
        config = tiny_config(Path(run), shards, f"parallel.strategy={strategy}", *overrides)
        return loop.run(config).exit_code
    finally:
        loop.train_step = step


def loaded(folder: str, run: str, shards: str, strategy: str) -> dict[str, Tensor]:
    state, _, _ = started(folder, shards, strategy, *SETTINGS)
    newest = CheckpointStore(Path(run) / "checkpoints").newest()
    assert newest is not None
    load_state(state, newest)
    return {name: whole(tensor) for name, tensor in state_tensors(state).items()}


def test_a_checkpoint_of_two_ranks_loads_bit_for_bit_on_one_and_four(tmp_path: Path, shards: str) -> None:
    for strategy, others in (("ddp", ((1, "single"), (4, "fsdp"), (2, "fsdp"))), ("fsdp", ((1, "single"), (4, "ddp")))):
        run = str(tmp_path / strategy)
        assert ranks(2).run(train, run, shards, strategy, SETTINGS, 5) == [75, 75]
        saved = final_tensors(Path(run))
        assert saved["model/objective.queue"].shape[2] == 8 and saved["model/objective.queue_pushes"] == 4
        for n, other in others:
            arguments = (str(tmp_path), run, shards, other)
            found = loaded(*arguments) if n == 1 else ranks(n).run(loaded, *arguments, timeout=120)[-1]
            assert found.keys() == saved.keys()
            for name, tensor in saved.items():
                assert torch.equal(found[name], tensor), (strategy, n, other, name)


def test_the_number_of_ranks_and_the_strategy_may_change_in_the_middle(tmp_path: Path, shards: str) -> None:
    alone, many = tmp_path / "alone", tmp_path / "many"
    assert train(str(alone), shards, "single", SETTINGS, None) == 0
    assert ranks(2).run(train, str(many), shards, "ddp", SETTINGS, 3) == [75, 75]
    assert ranks(2).run(train, str(many), shards, "fsdp", SETTINGS, 5) == [75, 75]
    assert train(str(many), shards, "auto", SETTINGS, None) == 0
    for (step, found), (same, wanted) in zip(losses(many), losses(alone), strict=True):
        assert step == same and found == pytest.approx(wanted, rel=0, abs=1e-9)
    found_tensors, wanted_tensors = final_tensors(many), final_tensors(alone)
    assert found_tensors.keys() == wanted_tensors.keys()
    for name, tensor in wanted_tensors.items():
        assert torch.allclose(found_tensors[name].double(), tensor.double(), rtol=0, atol=1e-9), name


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_ranks_stopped_again_and_again_end_bit_for_bit_as_if_they_had_not(
    tmp_path: Path, shards: str, strategy: str
) -> None:
    """Before the queue is full and prototypes move, at a step that is saved anyway, and later."""
    settings = (*EVERYTHING, "train.steps=8", "optimizer.learning_rate=0.1")
    wanted, run = tmp_path / "whole", tmp_path / "stopped"
    assert ranks(2).run(train, str(wanted), shards, strategy, settings, None) == [0, 0]
    for stop_after in (1, 4, 7):
        assert ranks(2).run(train, str(run), shards, strategy, settings, stop_after) == [75, 75]
        assert losses(run)[-1][0] == stop_after
    assert ranks(2).run(train, str(run), shards, strategy, settings, None) == [0, 0]
    assert losses(run) == losses(wanted)
    found = final_tensors(run)
    for name, tensor in final_tensors(wanted).items():
        assert torch.equal(found[name], tensor), name

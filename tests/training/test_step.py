"""A step moves everything, or nothing where it is not finite."""

import copy
from pathlib import Path

import pytest
import torch
from tiny_run import tiny_config

from seer import build
from seer.config import TrainConfig
from seer.derived import resolve
from seer.training.state import TrainState, fresh_state, state_tensors
from seer.training.step import StepSettings, float_crops, set_learning_rate, step_settings, train_step


def start(config: TrainConfig) -> tuple[TrainState, StepSettings]:
    device = torch.device("cpu")
    state = fresh_state(config, device=device, strategy="single", learning_rate=1e-3)
    return state, step_settings(config, device)


@pytest.mark.parametrize(
    "overrides",
    [("optimizer=adamw",), ("optimizer=larc", "objective.queue_images=16"), ("train.precision=bf16",)],
    ids=["adamw", "larc and queue", "bf16"],
)
def test_one_infinite_pixel_changes_nothing(tmp_path: Path, shards: str, overrides: tuple[str, ...]) -> None:
    config = tiny_config(tmp_path / "run", shards, *overrides)
    state, settings = start(config)
    batches = build.stream(config, workers=0, decoder="pillow").batches(0)
    for _ in range(4):  # momentum, statistics and queue are no longer what they were at the start
        train_step(state, float_crops(next(batches), settings), settings)
    crops = float_crops(next(batches), settings)
    crops[0][0, 0, 5, 5] = float("inf")
    before = copy.deepcopy(state_tensors(state))

    train_step(state, crops, settings)

    after = state_tensors(state)
    assert after.pop("skipped_steps") == before.pop("skipped_steps") + 1 == 1
    assert state.step == state.batch_index == 5
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name

    moved = train_step(state, float_crops(next(batches), settings), settings)
    assert torch.isfinite(moved.figures["loss"])
    still = [name for name, tensor in before.items() if torch.equal(tensor, state_tensors(state)[name])]
    assert not [name for name in still if name.startswith("model/")], "a finite step moves every weight and statistic"


def test_a_step_draws_from_no_global_stream(tmp_path: Path, shards: str, no_global_randomness: None) -> None:
    config = tiny_config(tmp_path / "run", shards)
    state, settings = start(config)
    train_step(
        state, float_crops(next(build.stream(config, workers=0, decoder="pillow").batches(0)), settings), settings
    )


def test_the_loss_falls_on_one_batch(tmp_path: Path, shards: str) -> None:
    config = tiny_config(tmp_path / "run", shards, "train.precision=fp64")
    state, settings = start(config)
    crops = float_crops(next(build.stream(config, workers=0, decoder="pillow").batches(0)), settings)
    set_learning_rate(state.optimizer, 3e-3)
    losses = [float(train_step(state, crops, settings).figures["loss"]) for _ in range(25)]
    assert losses[-1] < losses[0] - 0.2


def test_derived_values_say_why(tmp_path: Path, shards: str) -> None:
    config = tiny_config(tmp_path / "run", shards, "optimizer=larc")
    rate = resolve(config)["optimizer.learning_rate"]
    assert rate.value == pytest.approx(0.3 * 8 / 256) and "256" in rate.reason

"""A run: it ends with its files, goes on where it stopped as if nothing had been, and refuses what it cannot do."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from recorded_run import recorded_run
from tiny_run import tiny_config

from seer.checkpoint.store import CheckpointStore
from seer.config import freeze
from seer.errors import EXIT_STOPPED, UserError
from seer.handoff.timm_format import load_exported
from seer.training import loop


def metrics(run: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def final_tensors(run: Path) -> dict[str, torch.Tensor]:
    newest = CheckpointStore(run / "checkpoints").newest()
    assert newest is not None
    return newest.tensors()


def test_a_run_leaves_what_the_documents_promise(tmp_path: Path, shards: str) -> None:
    run = tmp_path / "run"
    evaluation = ("evaluation.every_steps=3", f"evaluation.train={shards}", f"evaluation.val={shards}")
    outcome = loop.run(tiny_config(run, shards, *evaluation))
    assert outcome.exit_code == 0
    lines = [line for line in metrics(run) if "loss" in line]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert {"images_seen", "chance", "lr", "images_per_s", "data_wait_share", "bad_samples", "skipped_steps"} <= set(
        lines[0]
    )
    assert {"assignment_entropy", "mean_assignment_entropy", "prototypes_in_use", "feature_std"} <= set(lines[0])
    assert [line["step"] for line in metrics(run) if "knn_top1" in line] == [3, 6]
    result = json.loads((run / "result.json").read_text())
    assert result["state"] == "finished" and result["steps"] == 6 and result["knn_top1"] > 0.5
    assert load_exported(Path(result["exports"][0])).architecture["name"] == "tiny"
    assert not (run / "run.lock").exists()

    before = (run / "metrics.jsonl").read_bytes()
    assert loop.run(tiny_config(run, shards, *evaluation)).exit_code == 0, "a finished run says so again"
    assert (run / "metrics.jsonl").read_bytes() == before


def test_a_stopped_run_goes_on_as_if_nothing_had_been(
    tmp_path: Path, shards: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Again and again: at steps that are saved anyway (2 and 4), and at one that is not (7)."""
    larc = (
        *("optimizer=larc", "objective.queue_images=16", "objective.queue_start_steps=1", "data.workers=1"),
        "train.steps=8",
    )
    whole = tmp_path / "whole"
    loop.run(tiny_config(whole, shards, *larc))

    parts = tmp_path / "parts"
    step, told = loop.train_step, [1, 3, 6]

    def interrupted(state, crops, settings, **more):  # type: ignore[no-untyped-def]
        outcome = step(state, crops, settings, **more)
        if state.step in told:
            os.kill(os.getpid(), signal.SIGTERM)
        return outcome

    monkeypatch.setattr(loop, "train_step", interrupted)
    for last in (2, 4, 7):  # one step later, when ranks have agreed
        assert loop.run(tiny_config(parts, shards, *larc)).exit_code == EXIT_STOPPED
        assert metrics(parts)[-1]["step"] == last
    assert loop.run(tiny_config(parts, shards, *larc)).exit_code == 0

    assert [(line["step"], line["loss"]) for line in metrics(parts)] == [
        (line["step"], line["loss"]) for line in metrics(whole)
    ]
    expected, found = final_tensors(whole), final_tensors(parts)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name


def test_a_run_starts_from_exported_weights(tmp_path: Path, shards: str) -> None:
    first = loop.run(tiny_config(tmp_path / "first", shards))
    weights = first.result["exports"][0]
    still = (f"train.init_from={weights}", "train.steps=2", "optimizer.learning_rate=1e-12")
    second = loop.run(tiny_config(tmp_path / "second", shards, *still))
    expected, found = load_exported(Path(weights)).tensors, load_exported(Path(second.result["exports"][0])).tensors
    convolutions = [name for name in expected if name.endswith("conv.weight")]
    assert all(torch.allclose(expected[name], found[name], atol=1e-6) for name in convolutions)


def test_a_first_save_that_failed_does_not_lose_the_initial_weights(tmp_path: Path, shards: str) -> None:
    weights = loop.run(tiny_config(tmp_path / "first", shards)).result["exports"][0]
    config = tiny_config(tmp_path / "second", shards, f"train.init_from={weights}", "train.steps=1")
    with recorded_run(tmp_path / "second", freeze(config)):
        (tmp_path / "second" / "checkpoints").mkdir()  # as a full disk leaves it
    second = loop.run(config)
    untrained = loop.run(tiny_config(tmp_path / "third", shards, "train.steps=1"))
    found, other = (load_exported(Path(run.result["exports"][0])).tensors for run in (second, untrained))
    assert not torch.allclose(found["stem.conv.weight"], other["stem.conv.weight"], atol=1e-3)


def test_init_from_another_architecture_is_refused(tmp_path: Path, shards: str) -> None:
    weights = loop.run(tiny_config(tmp_path / "first", shards)).result["exports"][0]
    with pytest.raises(UserError, match="architecture"):
        loop.run(tiny_config(tmp_path / "second", shards, f"train.init_from={weights}", "backbone.name=200mf"))
    assert not (tmp_path / "second").exists()


def test_a_shape_that_is_no_regnet_leaves_nothing(tmp_path: Path, shards: str) -> None:
    five = ("name=custom", "depth=4", "w0=32", "wa=1", "wm=2", "group_width=16")
    with pytest.raises(UserError, match="stages"):
        loop.run(tiny_config(tmp_path / "run", shards, *(f"backbone.{key}" for key in five)))
    assert not (tmp_path / "run").exists()


def test_another_configuration_is_refused_and_nothing_is_lost(tmp_path: Path, shards: str) -> None:
    run = tmp_path / "run"
    loop.run(tiny_config(run, shards))
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"optimizer\.weight_decay"):
        loop.run(tiny_config(run, shards, "optimizer.weight_decay=0.5"))
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_fewer_samples_than_a_batch(tmp_path: Path, shards: str) -> None:
    with pytest.raises(UserError, match="64"):
        loop.run(tiny_config(tmp_path / "run", shards, "train.global_batch_size=64"))
    assert not (tmp_path / "run").exists()

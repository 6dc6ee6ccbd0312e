"""A run on each device. On a GPU: `make test PYTEST_ARGS='-m gpu'`."""

import json
from pathlib import Path

import pytest
import torch
from lives import Life, losses
from tiny_run import tiny_config

from seer.training import loop

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("optimizer", ["adamw", "larc"])
def test_a_run_of_each_precision_finishes(tmp_path: Path, shards: str, device: str, optimizer: str) -> None:
    first = {}
    for precision in ("fp64", "fp32", "bf16"):
        run = tmp_path / precision
        choice = (f"optimizer={optimizer}", f"train.device={device}", f"train.precision={precision}")
        queue = ("objective.queue_images=16", "evaluation.every_steps=6")
        evaluation = (f"evaluation.train={shards}", f"evaluation.val={shards}")
        outcome = loop.run(tiny_config(run, shards, *choice, *queue, *evaluation))
        assert outcome.exit_code == 0 and outcome.result["skipped_steps"] == 0
        assert 0 <= outcome.result["knn_top1"] <= 1
        first[precision] = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])["loss"]
    assert first["fp32"] == pytest.approx(first["fp64"], rel=1e-4)
    assert first["bf16"] == pytest.approx(first["fp64"], rel=0.05)


@pytest.mark.gpu
def test_the_first_loss_on_a_gpu_is_that_of_the_cpu(tmp_path: Path, shards: str) -> None:
    losses = {}
    for device in ("cpu", "cuda"):
        torch.backends.cudnn.allow_tf32 = False
        loop.run(tiny_config(tmp_path / device, shards, f"train.device={device}", "train.precision=fp64"))
        losses[device] = json.loads((tmp_path / device / "metrics.jsonl").read_text().splitlines()[0])["loss"]
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_all_gpus_of_this_machine_train_as_one(tmp_path: Path, shards: str, strategy: str, precision: str) -> None:
    """With one GPU this is one process, and proves nothing about strategies."""
    first = []
    for ranks in (1, torch.cuda.device_count()):
        run = tmp_path / f"run{ranks}-{len(first)}"
        settings = (f"parallel.strategy={strategy}", "train.device=cuda", f"train.precision={precision}")
        with Life(run, shards, *settings, "train.global_batch_size=16", ranks=ranks) as life:
            assert life.end() == 0, life.log.read_text()[-3000:]
        first.append(losses(run)[0][1])
    assert first[1] == pytest.approx(first[0], rel=1e-4 if precision == "fp32" else 1e-2)


@pytest.mark.gpu
def test_a_run_on_a_gpu_compiles_its_colours_and_pins_its_batches(
    tmp_path: Path, shards: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """What falls back to something slower would say so."""
    torch.compiler.reset()
    outcome = loop.run(tiny_config(tmp_path / "run", shards, "train.device=cuda", "data.workers=2"))
    assert outcome.exit_code == 0
    told = capsys.readouterr().err
    assert "not compiled" not in told and "does not pin" not in told

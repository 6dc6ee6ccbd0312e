"""Runs that are killed while their collection grows end as one that knew from the beginning what would come when."""

from __future__ import annotations

import json
import random
import shutil
import signal
from pathlib import Path

import pytest
import torch
from lives import Life, descendants, final_tensors, gone, kill, last_step, losses
from tiny_run import make_images

from seer.shards.pack import pack


def pack_part(folder: Path, number: int) -> None:
    """Shards of a folder of their own, as the documents say; every other one comes before those that are there."""
    name = f"{number if number % 2 else 9 - number}-part"
    images = make_images(folder / "images" / name, each=16 if number == 0 else 5, seed=number)
    pack(images, folder / name, samples_per_shard=10, workers=1)


@pytest.mark.slow
@pytest.mark.timeout(1800)  # some forty lives of seconds each
@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_at_random_moments_while_shards_come(tmp_path: Path, ranks: int) -> None:
    draw = random.Random(ranks)
    for number in range(4):
        folder = tmp_path / f"shards{number}"
        run, whole = tmp_path / f"run{number}", tmp_path / f"whole{number}"
        shards, grow = f"{folder}/*-part/*.tar", "data.allow_growth=true"
        pack_part(folder, 0)
        for one, step in ((whole, 1), (run, draw.randint(1, 9))):
            with Life(one, shards, ranks=ranks) as life:
                life.wait_for_step(step)
                kill(life.process.pid, signal.SIGTERM)
                assert life.end() != 0
        for part in range(1, 4):
            if draw.random() < 0.7:
                pack_part(folder, part)
            with Life(run, shards, grow, ranks=ranks) as life:
                life.wait_for_step(last_step(run) + draw.randint(0, 9))
                everybody = [life.process.pid, *descendants(life.process.pid)]
                for pid in everybody:
                    kill(pid, signal.SIGKILL)
                life.end()
                assert gone(everybody)
        with Life(run, shards, grow, ranks=ranks) as life:
            assert life.end() == 0, life.log.read_text()[-3000:]
        history = json.loads((run / "shards.json").read_text())["sources"][0]["chapters"]
        assert len(history) > 1
        # The same history, known before the first batch.
        shutil.rmtree(whole / "checkpoints", ignore_errors=True)
        shutil.copy(run / "shards.json", whole / "shards.json")
        with Life(whole, shards, ranks=ranks) as life:
            assert life.end() == 0, life.log.read_text()[-3000:]
        assert losses(run) == losses(whole)
        found, wanted = final_tensors(run), final_tensors(whole)
        for name, tensor in wanted.items():
            assert torch.equal(found[name], tensor), name

"""Every experiment builds on the meta device, and the published ones have the published sizes."""

from __future__ import annotations

import pytest
import torch

from seer import build
from seer.compose import compose, groups

# Trunk, head and prototypes, counted in closed form from the generating parameters and facebookresearch/vissl's head.
PARAMETERS = {"seer_256gf": 1_431_032_042, "seer_10b": 9_628_923_288}


@pytest.mark.parametrize("experiment", sorted(groups()["experiment"]))
def test_builds_without_memory(experiment: str) -> None:
    config = compose([f"experiment={experiment}", "run_dir=x", "data.shards=a.tar"])
    learner = build.learner(config, device=torch.device("meta"))
    assert {parameter.device.type for parameter in learner.parameters()} == {"meta"}
    count = sum(parameter.numel() for parameter in learner.parameters())
    assert count == PARAMETERS.get(experiment, count)

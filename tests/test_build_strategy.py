"""Which strategy `auto` is."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from ranks import ranks

from seer import build
from seer.compose import compose
from seer.derived import Resolved

CPU = torch.device("cpu")


def chosen(strategy: str, memory_gib: float) -> Resolved:
    config = compose(["run_dir=r", "data.shards=[a.tar]", "backbone=tiny", f"parallel.strategy={strategy}"])
    with mock.patch.object(build, "_memory_bytes", lambda _: int(memory_gib * 2**30)):
        return build.strategy(config, device=CPU)


@pytest.mark.parametrize(
    ("strategy", "memory_gib", "wanted"),
    [("auto", 16.0, "ddp"), ("auto", 0.001, "fsdp"), ("ddp", 0.001, "ddp"), ("fsdp", 16.0, "fsdp")],
)
def test_two_ranks(strategy: str, memory_gib: float, wanted: str) -> None:
    for value, reason in ranks(2).run(chosen, strategy, memory_gib):
        assert value == wanted
        assert "GiB" in reason if strategy == "auto" else reason == "given"


@pytest.mark.parametrize("strategy", ["auto", "single", "ddp", "fsdp"])
def test_one_process_is_single_whatever_was_asked_for(strategy: str) -> None:
    config = compose(["run_dir=r", "data.shards=[a.tar]", "backbone=tiny", f"parallel.strategy={strategy}"])
    assert build.strategy(config, device=CPU) == ("single", "one process")

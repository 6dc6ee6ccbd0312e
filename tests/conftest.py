"""Shared by all tests: one thread, no leftovers in the environment, and no draw from a global random stream."""

import os
import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch

torch.set_num_threads(1)  # two cores serve the whole suite and its processes; results then do not depend on them


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Three shards of 48 images for runs of seconds; all tests read the same ones, so that none may write there."""
    from tiny_run import make_shards

    return make_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remote files are read in parts of 30,000 bytes."""
    monkeypatch.setattr("seer.remote.PART", 30_000)


@pytest.fixture(autouse=True)
def _restored_environment() -> Iterator[None]:
    before = dict(os.environ)
    threads = torch.get_num_threads()
    yield
    os.environ.clear()
    os.environ.update(before)
    torch.set_num_threads(threads)


@pytest.fixture
def no_global_randomness() -> Iterator[None]:
    """Fails the test when it drew from the global stream of torch, numpy or random."""
    before = (torch.get_rng_state().clone(), np.random.get_state()[1].copy(), random.getstate())  # type: ignore[index]
    yield
    after = (torch.get_rng_state(), np.random.get_state()[1], random.getstate())  # type: ignore[index]
    assert torch.equal(before[0], after[0]), "torch's global stream was drawn"
    assert (before[1] == after[1]).all(), "numpy's global stream was drawn"
    assert before[2] == after[2], "random's global stream was drawn"

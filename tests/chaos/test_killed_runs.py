"""A run that is stopped or killed, in whatever way, goes on with the same command as if nothing had been."""

from __future__ import annotations

import random
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lives import Life, descendants, final_tensors, gone, kill, last_step, losses


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, shards: str) -> Callable[[int], Path]:
    """An uninterrupted run of so many processes."""
    made: dict[int, Path] = {}

    def run_of(ranks: int) -> Path:
        if ranks not in made:
            made[ranks] = tmp_path_factory.mktemp("whole") / "run"
            with Life(made[ranks], shards, ranks=ranks) as life:
                assert life.end() == 0, life.log.read_text()[-3000:]
        return made[ranks]

    return run_of


def assert_same_outcome(found: Path, wanted: Path) -> None:
    assert losses(found) == losses(wanted)
    one, other = final_tensors(found), final_tensors(wanted)
    assert one.keys() == other.keys()
    for name, tensor in other.items():
        assert torch.equal(one[name], tensor), name


def kill_one_rank(life: Life) -> None:
    kill(life.rank_pids()[-1], signal.SIGKILL)


def kill_the_launcher(life: Life) -> None:
    kill(life.process.pid, signal.SIGKILL)


def kill_everything(life: Life) -> None:
    for pid in [life.process.pid, *descendants(life.process.pid)]:
        kill(pid, signal.SIGKILL)


def stop_one_rank(life: Life) -> None:
    kill(life.rank_pids()[0], signal.SIGTERM)


def stop_the_launcher(life: Life) -> None:
    kill(life.process.pid, signal.SIGTERM)


@pytest.mark.timeout(500)  # five lives, most of it starting: on a busy machine half a minute each
def test_two_processes(tmp_path: Path, shards: str, whole: Callable[[int], Path]) -> None:
    """One run that meets its end in three ways: starting two processes takes longer than all of their steps."""
    run = tmp_path / "run"
    for end, step in ((kill_one_rank, 7), (kill_the_launcher, 14), (stop_one_rank, 21)):
        with Life(run, shards, ranks=2) as life:
            life.wait_for_step(step)
            everybody = descendants(life.process.pid)
            assert len(everybody) >= 2
            end(life)
            assert life.end() != 0, end.__name__
            assert gone(everybody), f"{end.__name__}: nobody trains on unseen"
        assert step <= last_step(run) < 30
    with Life(run, shards, ranks=2) as life:
        assert life.end() == 0, life.log.read_text()[-3000:]
    assert not (run / "run.lock").exists()
    assert_same_outcome(run, whole(2))


@pytest.mark.slow
@pytest.mark.timeout(1800)  # some sixty lives of seconds each
@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_at_random_moments(tmp_path: Path, shards: str, whole: Callable[[int], Path], ranks: int) -> None:
    """Ten runs, each killed in one to three lives, in ways and at moments drawn from a fixed seed."""
    draw = random.Random(ranks)
    ways = [kill_everything] if ranks == 1 else [kill_one_rank, kill_the_launcher, kill_everything, stop_one_rank]
    ways.append(stop_the_launcher)
    for number in range(10):
        run = tmp_path / f"run{number}"
        for _ in range(draw.randint(1, 3)):
            with Life(run, shards, ranks=ranks) as life:
                life.wait_for_step(last_step(run) + draw.randint(1, 9))
                everybody = descendants(life.process.pid)
                draw.choice(ways)(life)
                life.end()
                assert gone(everybody)
        with Life(run, shards, ranks=ranks) as life:
            assert life.end() == 0, life.log.read_text()[-3000:]
        assert_same_outcome(run, whole(ranks))

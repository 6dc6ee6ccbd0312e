"""Who asks to stop, and when all ranks do."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import pytest
import torch
from ranks import ranks

from seer import distributed
from seer.training.stop import StopRequest


@pytest.fixture
def stop() -> Iterator[StopRequest]:
    request = StopRequest(patient=True)
    yield request
    request.close()


@pytest.mark.parametrize(
    ("number", "wanted"),
    [
        (signal.SIGINT, (True, False)),
        (signal.SIGTERM, (True, False)),
        (signal.SIGUSR1, (True, True)),
        (signal.SIGUSR2, (True, True)),
    ],
)
def test_signals_ask_to_stop_and_those_of_a_scheduler_for_another_life(
    stop: StopRequest, number: signal.Signals, wanted: tuple[bool, bool], capsys: pytest.CaptureFixture[str]
) -> None:
    assert stop.of_this_rank() == (False, False)
    os.kill(os.getpid(), number)
    assert stop.of_this_rank() == wanted
    assert not stop.agreed(), "the others have not heard of it"
    os.kill(os.getpid(), signal.SIGTERM)  # schedulers repeat themselves
    assert stop.of_this_rank() == wanted
    assert capsys.readouterr().err.count("\n") == 1


def test_the_deadline_leaves_time_for_a_save() -> None:
    for deadline, save_seconds, wanted in ((100.0, 10.0, False), (10.0, 10.0, True), (-1.0, 0.0, True)):
        stop = StopRequest(deadline=time.time() + deadline)
        stop.save_seconds = save_seconds
        assert stop.of_this_rank() == (wanted, wanted)
        stop.close()


def one_of_two_is_asked() -> list[tuple[bool, bool]]:
    stop = StopRequest()
    seen = []
    for step in range(3):
        if step == 1 and distributed.rank() == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        stop.observe(distributed.sum_over_ranks(torch.tensor(stop.of_this_rank(), dtype=torch.float32)))
        seen.append((stop.agreed(), stop.again))
    stop.close()
    return seen


def test_all_ranks_stop_after_the_same_step() -> None:
    assert ranks(2).run(one_of_two_is_asked) == [[(False, False), (True, True), (True, True)]] * 2

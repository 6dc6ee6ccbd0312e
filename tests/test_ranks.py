import os
import time

import pytest
import torch
import torch.distributed as dist
from ranks import ranks


def summed(x):
    values = x + dist.get_rank()
    dist.all_reduce(values)
    return dist.get_rank(), values, os.getpid(), torch.get_num_threads()


def raises_on_rank_1():
    if dist.get_rank() == 1:
        raise ValueError("rank one does not want to")
    return dist.get_rank()


def waits_alone():
    if dist.get_rank() == 0:
        time.sleep(60)


def test_each_rank_answers_in_order_and_stays_the_same_process():
    first = ranks(2).run(summed, torch.ones(3))
    second = ranks(2).run(summed, torch.ones(3))
    assert [answer[0] for answer in first] == [0, 1]
    assert all(torch.equal(answer[1], torch.full((3,), 3.0)) for answer in first)
    assert [answer[2] for answer in first] == [answer[2] for answer in second]
    assert len({answer[2] for answer in first} | {os.getpid()}) == 3
    assert [answer[3] for answer in first] == [1, 1]


def test_a_traceback_names_its_rank_and_the_pool_goes_on():
    with pytest.raises(RuntimeError, match=r"rank 1: Traceback[\s\S]*rank one does not want to"):
        ranks(2).run(raises_on_rank_1)
    assert [answer[0] for answer in ranks(2).run(summed, torch.zeros(1))] == [0, 1]


def test_a_rank_that_hangs_is_named_and_the_next_call_has_new_processes():
    pool = ranks(2)
    before = [answer[2] for answer in pool.run(summed, torch.zeros(1))]
    with pytest.raises(RuntimeError, match="rank 0: no answer"):
        pool.run(waits_alone, timeout=0.5)
    after = [answer[2] for answer in pool.run(summed, torch.zeros(1))]
    assert not set(before) & set(after)

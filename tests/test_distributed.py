"""Ranks that tell each other what happened."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ranks import ranks
from torch.distributed.tensor import DTensor, Shard

from seer import distributed
from seer.errors import ToldElsewhere, UserError
from seer.keyed_tensors import normal_
from seer.rank_environment import told_once


def fails_on(failing: tuple[int, ...]) -> tuple[str, str] | None:
    try:
        with distributed.together():
            if distributed.rank() in failing:
                raise UserError(f"shard {distributed.rank()} is gone", "rule", "remedy")
    except UserError as error:
        return type(error).__name__, error.what.partition(" (on ")[0]
    return None


@pytest.mark.parametrize(("failing", "told"), [((1,), "shard 1 is gone"), ((0, 1), "shard 0 is gone")])
def test_a_users_error_on_one_rank_is_one_on_all_and_rank_0_tells_it(failing: tuple[int, ...], told: str) -> None:
    assert ranks(2).run(fails_on, failing) == [("UserError", told), ("ToldElsewhere", told)]


def test_nothing_happens_where_no_rank_fails() -> None:
    assert ranks(2).run(fails_on, ()) == [None, None]
    assert fails_on(()) is None and fails_on((0,)) == ("UserError", "shard 0 is gone")


def exchange() -> tuple[object, ...]:
    own = torch.full((2, 3), float(distributed.rank()))
    return (
        distributed.gather_rows(own).tolist(),
        distributed.gather_objects({"rank": distributed.rank()}),
        distributed.of_first_rank(f"from {distributed.rank()}"),
    )


def test_every_rank_gets_what_all_have() -> None:
    rows = [[[float(rank)] * 3] * 2 for rank in range(2)]
    assert ranks(2).run(exchange) == [(rows, [{"rank": 0}, {"rank": 1}], "from 0")] * 2
    assert exchange() == ([[[0.0] * 3] * 2], [{"rank": 0}], "from 0")


def initial_part() -> torch.Tensor:
    mesh = distributed.mesh(torch.device("cpu"))
    sharded = DTensor.from_local(
        torch.empty(2 if distributed.rank() == 0 else 1, 5), mesh, [Shard(0)], shape=(3, 5), stride=(5, 1)
    )
    return normal_(sharded, 1.0, seed=3, name="weight").to_local()


def test_initial_values_do_not_depend_on_how_a_tensor_is_cut() -> None:
    whole = normal_(torch.empty(3, 5), 1.0, seed=3, name="weight")
    assert torch.equal(torch.cat(ranks(2).run(initial_part)), whole)


@pytest.mark.parametrize(("local_rank", "kind"), [("0", UserError), ("1", ToldElsewhere)])
def test_what_all_ranks_meet_is_told_by_one_of_each_machine(
    local_rank: str, kind: type[UserError], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {
        "RANK": local_rank,
        "WORLD_SIZE": "2",
        "LOCAL_RANK": local_rank,
        "LOCAL_WORLD_SIZE": "2",
    }.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as caught, told_once():
        raise UserError("what", "rule", "remedy")
    assert type(caught.value) is kind


def test_a_peer_that_is_gone_is_recognised(tmp_path: Path) -> None:
    words = "[/pytorch/gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:22964: Connection reset by peer. This is"
    assert not distributed.lost_rank(RuntimeError(words)), "one process has no peers"
    assert ranks(2).run(recognised, words) == [(True, False)] * 2


def recognised(words: str) -> tuple[bool, bool]:
    return distributed.lost_rank(RuntimeError(words)), distributed.lost_rank(RuntimeError("shapes do not match"))

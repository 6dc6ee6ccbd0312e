"""A run stops when its input goes bad, all ranks together, and goes on from its checkpoint when that is mended."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from ranks import ranks
from tiny_run import make_images, tiny_config

from seer import distributed
from seer.data.stream import BadSample
from seer.errors import ToldElsewhere, UserError
from seer.launching.follow import runs_below
from seer.shards.pack import pack
from seer.training import bad_share, loop
from seer.training.bad_share import BadShare


def stopped_at(bad_of_step: list[int], *, most: float = 0.05, batch: int = 100, step: int = 0) -> tuple[int, str]:
    """The step in which `BadShare` stops, and what it says; 0 if it does not."""
    total = torch.tensor(1000)  # of the steps before
    watched = BadShare(most, global_batch_size=batch, step=step, bad_samples=total, lists="LIST")
    for number, bad in enumerate(bad_of_step, start=step + 1):
        total += bad
        names = [BadSample("a.tar", 0, "0", "truncated" if place % 3 else "not_an_image") for place in range(bad)]
        names += [BadSample("a.tar", 1, "1", "animated", stand_in=True)] * 50
        try:
            watched.observe(number, total, names)
        except UserError as error:
            return number, str(error)
    return 0, ""


def test_a_share_beyond_the_limit_stops_with_its_reasons() -> None:
    step, words = stopped_at([6] * 30)
    # Looked at after 1,000 images, read one step later.
    assert step == 11
    assert words.startswith("60 of the last 1,000 images are bad (6.0%: truncated 40, not_an_image 20)")
    assert "data.max_bad_share=0.05" in words and "LIST" in words and "same command" in words and "\n" not in words


@pytest.mark.parametrize(
    ("bad", "most", "stops"),
    [
        ([5] * 300, 0.05, False),
        ([6] * 8, 0.05, False),  # too few images to tell
        ([100] * 5 + [0] * 90, 0.5, False),  # half of the first 1,000 and a burst is over
        ([0] * 200 + [20] * 100, 0.05, True),
        ([100] * 300, 1.0, False),
        ([1] * 30, 0.0, True),
        ([0] * 300, 0.0, False),
    ],
)
def test_what_stops_and_what_does_not(bad: list[int], most: float, stops: bool) -> None:
    assert bool(stopped_at(bad, most=most)[0]) == stops


def test_the_window_forgets() -> None:
    """6 % in the last 10,000 images stop after a million good ones: within a window's length, not after 50,000."""
    step, words = stopped_at([0] * 10_000 + [6] * 200)
    assert 10_000 < step <= 10_102
    share = float(words.split("(")[1].split("%")[0])
    assert 5 <= share < 6.1


@pytest.mark.parametrize("batch", [8, 100, 4096, 50_000])
def test_any_batch_size(batch: int) -> None:
    images = batch * stopped_at([batch // 8] * 1000, batch=batch)[0]
    assert 1000 * 8 / 9 <= images <= 1000 + 2 * batch, "as soon as a thousand were opened"
    assert stopped_at([batch // 100] * 1000, batch=batch)[0] == 0


def test_a_run_that_goes_on_begins_a_new_window() -> None:
    assert stopped_at([0] * 50, step=7)[0] == 0, "the bad ones of before are not counted again"
    assert stopped_at([50] * 50, step=7)[0] > 0


def bad_on_one_rank() -> tuple[int, str, str]:
    total = torch.tensor(0)
    watched = BadShare(0.05, global_batch_size=100, step=0, bad_samples=total, lists="LIST")
    for step in range(1, 100):
        own = [BadSample("a.tar", 0, "0", "truncated")] * (20 if distributed.rank() == 1 else 0)
        total += distributed.sum_over_ranks(torch.tensor(len(own)))
        try:
            watched.observe(step, total, own)
        except UserError as error:
            return step, type(error).__name__, str(error)
    return 0, "", ""


def test_all_ranks_stop_after_the_same_step_and_one_tells() -> None:
    (step, kind, words), other = ranks(2).run(bad_on_one_rank)
    assert (step, kind) == (11, UserError.__name__) and other[:2] == (11, ToldElsewhere.__name__)
    assert "truncated 200" in words, "though the first rank met none of them"


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory: pytest.TempPathFactory) -> str:
    """48 images, every sixth an HTML page."""
    folder = tmp_path_factory.mktemp("spoilt")
    for number, path in enumerate(sorted(make_images(folder / "images").rglob("*.png"))):
        if number % 6 == 0:
            path.write_bytes(b"<html>not found</html>")
    pack(folder / "images", folder / "shards", labels="folders", samples_per_shard=20, workers=1)
    return str(folder / "shards" / "*.tar")


def test_a_run_keeps_its_checkpoint_and_goes_on_when_the_key_is_raised(
    tmp_path: Path, spoilt: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bad_share, "FEWEST_IMAGES", 20)
    run = tmp_path / "run"
    with pytest.raises(UserError) as caught:
        loop.run(tiny_config(run, spoilt))
    assert "not_an_image" in str(caught.value) and str(run / "quarantine" / "rank-0.jsonl") in str(caught.value)
    listed = (run / "quarantine" / "rank-0.jsonl").read_text().splitlines()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    # Of two images the first in their places would not do either: that is listed too.
    assert (lines[-1]["step"], lines[-1]["bad_samples"], len(listed)) == (4, 7, 9)
    assert sorted(path.name for path in (run / "checkpoints").glob("step-*")) == ["step-00000002"]
    (seen,) = runs_below(run)
    assert (seen.state, seen.error) == ("failed", str(caught.value))

    assert loop.run(tiny_config(run, spoilt, "data.max_bad_share=0.5")).exit_code == 0
    assert runs_below(run)[0].state == "finished"
    whole = tmp_path / "whole"
    assert loop.run(tiny_config(whole, spoilt, "data.max_bad_share=1")).exit_code == 0
    for name, keys in (
        ("metrics.jsonl", ("step", "loss", "bad_samples")),
        ("quarantine/rank-0.jsonl", ("step", "sample")),
    ):
        lines = [[json.loads(line) for line in (folder / name).read_text().splitlines()] for folder in (run, whole)]
        told, expected = ([[line[key] for key in keys] for line in of_run] for of_run in lines)
        assert told == expected

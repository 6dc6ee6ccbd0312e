"""How a run mixes its images reaches the stream and is saved with its reason."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from tiny_run import make_shards, tiny_config

from seer import build
from seer.data.mixture import open_shards
from seer.training import loop


@pytest.mark.parametrize(
    ("overrides", "lanes", "window"),
    [((), (1, "48 images are mixed as a whole"), "epoch"), (("data.lanes=4", "data.window_images=5"), (4, "given"), 5)],
)
def test_lanes_and_window_of_a_run(
    tmp_path: Path, overrides: tuple[str, ...], lanes: tuple[int, str], window: int | str
) -> None:
    shards = make_shards(tmp_path / "data")
    loop.run(tiny_config(tmp_path / "run", shards, "train.steps=1", *overrides))
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (saved["data"]["lanes"], saved["data"]["window"]) == (lanes[0], window)
    assert saved["resolved"]["data.lanes"] == {"value": lanes[0], "reason": lanes[1]}


def test_sources_in_fixed_shares(tmp_path: Path) -> None:
    one, other = make_shards(tmp_path / "one"), make_shards(tmp_path / "other", classes=1, seed=5)
    config = tiny_config(tmp_path / "run", "[]", f"data.mixture=[one 3 {one},other 1 {other}]", "train.steps=1")
    shards, sources = open_shards([], config.data.mixture)
    assert [tuple(source) for source in sources] == [("one", 3.0, 3), ("other", 1.0, 1)]
    assert shards.counts.tolist() == [20, 20, 8, 16]
    loop.run(config)
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert saved["resolved"]["data.mixture"]["value"] == {"one": 6, "other": 2}
    assert saved["data"]["mixture"] == [["one", 3.0, 3], ["other", 1.0, 1]]
    assert "mixture" not in build.stream(tiny_config(tmp_path / "run", one), workers=0, decoder="pillow").identity()

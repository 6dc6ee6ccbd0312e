"""Which decoder a run takes, on all its ranks and whenever it goes on."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import pytest
import yaml
from ranks import ranks
from tiny_run import tiny_config

from seer import distributed
from seer.decoders import installed_decoders
from seer.errors import UserError
from seer.training import loop

FASTEST = installed_decoders()[0]


def saved(run: Path) -> tuple[str, dict[str, str]]:
    found = yaml.safe_load((run / "config.yaml").read_text())
    return found["data"]["decoder"], found["resolved"]["data.decoder"]


def test_a_run_takes_the_fastest_and_says_so(tmp_path: Path, shards: str, capsys: pytest.CaptureFixture[str]) -> None:
    loop.run(tiny_config(tmp_path / "run", shards, "train.steps=1"))
    decoder, resolved = saved(tmp_path / "run")
    assert decoder == resolved["value"] == FASTEST
    assert capsys.readouterr().out.count(f"data.decoder = {FASTEST}: {resolved['reason']}\n") == 1


def test_a_run_goes_on_with_the_decoder_it_began_with(
    tmp_path: Path, shards: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = "pillow" if "pillow" in installed_decoders() else "pillow-simd"
    if own == FASTEST:
        pytest.skip("simplejpeg is not installed")
    run = tmp_path / "run"
    loop.run(tiny_config(run, shards, f"data.decoder={own}"))
    (run / "result.json").unlink()
    loop.run(tiny_config(run, shards))
    assert saved(run) == (own, {"value": own, "reason": "the run began with it"})
    (run / "result.json").unlink()
    with pytest.raises(UserError, match=rf"\(data\.decoder: {own} -> {FASTEST.replace('+', '[+]')}\)"):
        loop.run(tiny_config(run, shards, f"data.decoder={FASTEST}"))
    monkeypatch.setattr(loop, "installed_decoders", lambda: ["other"])
    with pytest.raises(UserError, match=f"data.decoder={own} is not installed"):
        loop.run(tiny_config(run, shards))


def decoder_of(installed: list[list[str]], run_dir: str) -> tuple[str, str]:
    config = tiny_config(Path(run_dir), "none.tar")
    with patch.object(loop, "installed_decoders", lambda: installed[distributed.rank()]):
        try:
            return "taken", loop._decoder(config).value
        except UserError as error:
            return type(error).__name__, error.what.partition(" (on ")[0]


def test_all_ranks_decode_alike(tmp_path: Path) -> None:
    both, run = ["simplejpeg", "pillow"], str(tmp_path / "run")
    assert ranks(2).run(decoder_of, [both, both], run) == [("taken", "simplejpeg")] * 2
    assert ranks(2).run(decoder_of, [["pillow"], both], run) == [("taken", "pillow")] * 2
    told = "data.decoder=simplejpeg is not installed (there is pillow)"
    assert ranks(2).run(decoder_of, [both, ["pillow"]], run) == [("UserError", told), ("ToldElsewhere", told)]

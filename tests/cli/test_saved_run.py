"""Evaluation and export of a run on disk, by the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from recorded_run import recorded_run
from tiny_run import tiny_config

from seer import build
from seer.checkpoint.store import CheckpointStore
from seer.cli.main import main
from seer.cli.saved_run import load_run, untrained_backbone
from seer.config import freeze
from seer.handoff.timm_format import load_exported
from seer.run_directory import RunDirectory, read_result, read_run


@pytest.fixture
def run_dir(tmp_path: Path, shards: str) -> Path:
    """A run that was saved at step 7 with random weights, and ended."""
    config = tiny_config(tmp_path / "run", shards)
    learner = build.learner(config, device=torch.device("cpu"))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in learner.backbone.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))
    with recorded_run(config.run_dir, freeze(config)) as run:
        tensors = {f"model/{name}": tensor for name, tensor in learner.state_dict().items()}
        CheckpointStore(run.checkpoints).save(7, tensors, {})
        run.write_result({"state": "finished", "steps": 7, "exports": ["w.safetensors"]})
    return tmp_path / "run"


def test_the_backbone_is_the_checkpoints(run_dir: Path) -> None:
    saved = load_run(str(run_dir))
    tensors = CheckpointStore(run_dir / "checkpoints").newest().tensors()  # type: ignore[union-attr]
    assert saved.step == 7 and not saved.backbone.training
    for name, tensor in saved.backbone.state_dict().items():
        assert torch.equal(tensor, tensors[f"model/backbone.{name}"])


def test_the_untrained_backbone_is_the_learners(run_dir: Path) -> None:
    saved = load_run(str(run_dir))
    learner = build.learner(saved.config, device=torch.device("cpu"))
    for name, tensor in untrained_backbone(saved.config).state_dict().items():
        assert torch.equal(tensor, learner.backbone.state_dict()[name])


def test_export(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "regnety.safetensors"
    assert main(["export", "--run", str(run_dir), "--format", "timm", "--out", str(out)]) == 0
    assert "timm.create_model" in capsys.readouterr().out
    exported = load_exported(out)
    assert exported.architecture["name"] == "tiny" and exported.preprocessing["image_size"] == 32
    for name, tensor in load_run(str(run_dir)).backbone.state_dict().items():
        assert torch.equal(exported.tensors[name], tensor)


def test_knn_prints_a_line_or_one_json_object(run_dir: Path, shards: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["evaluate", "knn", "--run", str(run_dir), "--train", shards, "--val", shards, "--k", "3"]
    assert main(words) == 0
    line = capsys.readouterr().out
    assert line.startswith("kNN top-1 ") and line.count("\n") == 1
    assert main([*words, "--json", "--max-val", "5", "--max-train", "12"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["step"], found["k"], found["val_images"], found["train_images"]) == (7, 3, 5, 12)
    assert 0 <= found["knn_top1"] <= 1
    assert "knn_top1" not in (read_result(run_dir) or {})


def test_baselines_enter_the_result_and_the_picture_is_drawn(
    run_dir: Path, shards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "n.png"
    words = ["evaluate", "knn", "--run", str(run_dir), "--train", shards, "--val", shards, "--picture", str(picture)]
    assert main([*words, "--baselines", "--next-steps"]) == 0
    text = capsys.readouterr().out
    for part in (
        "raw pixels",
        "untrained network",
        "trained network",
        str(picture),
        "w.safetensors",
        "seer shards pack",
    ):
        assert part in text
    assert picture.read_bytes().startswith(b"\x89PNG")
    result = read_result(run_dir) or {}
    assert {"knn_top1_pixels", "knn_top1_untrained", "knn_top1", "steps", "exports"} <= result.keys()
    assert not (run_dir / "run.lock").exists()
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["knn_top1_pixels"] == result["knn_top1_pixels"]


@pytest.mark.parametrize(
    "words", [["export", "--out", "w.safetensors"], ["evaluate", "knn", "--train", "SHARDS", "--val", "SHARDS"]]
)
def test_what_is_no_run_is_refused(
    words: list[str], shards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    words = [shards if word == "SHARDS" else word for word in words]
    assert main([*words, "--run", "nowhere"]) == main([*words, "--run", "empty"]) == 2
    assert capsys.readouterr().err.count("\n") == 2
    with recorded_run("young", freeze(tiny_config(Path("young"), "a.tar"))):
        assert main([*words, "--run", "young"]) == 2
    assert "no checkpoint yet" in capsys.readouterr().err
    assert not (tmp_path / "w.safetensors").exists()


def test_scores_that_cannot_be_noted_are_told(run_dir: Path, shards: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["evaluate", "knn", "--run", str(run_dir), "--train", shards, "--val", shards, "--max-val", "4"]
    with RunDirectory.open(run_dir, read_run(run_dir)):
        assert main([*words, "--baselines", "--json"]) == 0
    printed = capsys.readouterr()
    assert "knn_top1_pixels" in json.loads(printed.out)
    assert printed.err.startswith("seer: ") and "in use" in printed.err and printed.err.count("\n") == 1
    assert "knn_top1" not in (read_result(run_dir) or {})


def test_shards_whose_classes_differ_are_refused(
    run_dir: Path, shards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, classes in (("val", ["dog", "cat"]), ("train", ["cat", "dog"]), ("unnamed", None)):
        shutil.copytree(Path(shards).parent, tmp_path / name)
        file = tmp_path / name / "manifest.json"
        content = json.loads(file.read_text())
        file.write_text(json.dumps(content | {"classes": classes}))
    words = ["evaluate", "knn", "--run", str(run_dir), "--train", f"{tmp_path}/train/*.tar", "--max-val", "4", "--val"]
    assert main([*words, f"{tmp_path}/val/*.tar"]) == 2
    assert f"pack the second with --classes {tmp_path}/train" in capsys.readouterr().err
    for same in ("train", "unnamed"):
        assert main([*words, f"{tmp_path}/{same}/*.tar"]) == 0


@pytest.mark.parametrize("temperature", ["0", "-1", "nan", "inf", "warm"])
def test_a_temperature_that_is_none_is_refused_first(temperature: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["evaluate", "knn", "--run", "none", "--train", "none", "--val", "none", "--temperature", temperature]
    assert main(words) == 2
    assert f"'{temperature}' is no number greater than 0" in capsys.readouterr().err


@pytest.mark.parametrize(("out", "example"), [("w.pth", "w.pth.safetensors"), (".", "regnety.safetensors")])
def test_an_export_that_timm_would_not_load_is_refused(
    out: str, example: str, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", "--run", str(run_dir), "--out", out]) == 2
    assert f"use --out {example}" in capsys.readouterr().err


def test_the_home_folder(run_dir: Path, shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    words = ["--run", "~/run", "--train", shards, "--val", shards, "--max-val", "4", "--picture", "~/n.png"]
    assert main(["evaluate", "knn", *words]) == main(["export", "--run", "~/run", "--out", "~/w.safetensors"]) == 0
    assert (tmp_path / "n.png").exists() and (tmp_path / "w.safetensors").exists()

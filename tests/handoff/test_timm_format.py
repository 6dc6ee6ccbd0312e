import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torchvision_shim import make_torchvision_importable

from seer import __version__
from seer.backbones.regnet import FAMILY, RegNetY, regnet_shape, regnety
from seer.errors import UserError
from seer.handoff import timm_format
from seer.handoff.timm_format import export_timm, load_exported, timm_snippet

make_torchvision_importable()


def _randomised(network: RegNetY) -> RegNetY:
    """Every weight and statistic at random: in a fresh timm network most weights do not matter (last gammas are 0)."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, value in network.state_dict().items():
            if not value.is_floating_point():
                value.fill_(17)
            elif name.endswith("running_var") or (".bn." in name and name.endswith("weight")):
                value.copy_(0.5 + torch.rand(value.shape, generator=generator))
            else:
                value.copy_(torch.randn(value.shape, generator=generator) * value[0].numel() ** -0.5)
    return network.eval()


def _run(snippet: str) -> torch.nn.Module:
    names: dict[str, torch.nn.Module] = {}
    exec(snippet, names)  # imports timm, as a user would
    return names["model"]


def _metadata(file: Path) -> dict[str, str]:
    with safe_open(file, framework="pt") as handle:
        return handle.metadata()


OTHER_STRIDES = {
    "stem": dict(stem_stride=1),
    "stages": dict(stage_strides=(1, 2, 2, 1)),
    "both": dict(stem_stride=1, stage_strides=(1, 2, 2, 3)),
}


@pytest.mark.parametrize("name", ["tiny", "200mf", *OTHER_STRIDES])
def test_timm_loads_the_export_and_finds_the_same_features(name: str, tmp_path: Path) -> None:
    strides = OTHER_STRIDES.get(name, {})
    shape = regnet_shape(*FAMILY["tiny" if strides else name])
    network = _randomised(RegNetY(shape, **strides))
    file = export_timm(network, tmp_path / "regnety.safetensors", image_size=64)
    model = _run(timm_snippet(load_exported(file).architecture, file))
    images = [torch.randn(3, 3, side, side, generator=torch.Generator().manual_seed(side)) for side in (96, 64)]
    with torch.no_grad():
        for x, listed in zip(images, network(images), strict=True):
            assert torch.equal(network(x), model(x))
            assert torch.equal(listed, model(x))
            assert model(x).std() > 0.01 and torch.isfinite(model(x)).all()  # something is compared
    state = model.state_dict()
    assert state.keys() == network.state_dict().keys()
    assert all(torch.equal(state[key], value) for key, value in network.state_dict().items())


def test_the_comparison_would_see_any_tensor_that_is_not_exported() -> None:
    """The oracle's own test: each tensor of the file matters for the features."""
    network = _randomised(regnety("tiny"))
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = network(x)
        for name, value in network.state_dict().items():
            if value.is_floating_point():
                kept = value.clone()
                value.mul_(1.5)
                assert not torch.equal(network(x), before), name
                value.copy_(kept)


def test_timm_refuses_a_file_that_lacks_a_tensor(tmp_path: Path) -> None:
    """What the snippet writes loads strictly."""
    file = export_timm(regnety("tiny"), tmp_path / "a.safetensors", image_size=64)
    exported = load_exported(file)
    del exported.tensors["s4.b1.conv3.bn.running_mean"]
    save_file(exported.tensors, file)
    with pytest.raises(RuntimeError, match="Missing key"):
        _run(timm_snippet(exported.architecture, file))


def test_metadata_says_how_to_build_and_how_to_prepare_images(tmp_path: Path) -> None:
    network = RegNetY(regnet_shape(*FAMILY["tiny"]), stem_stride=1, stage_strides=(1, 2, 2, 2))
    out = tmp_path / "a.safetensors"
    file = export_timm(network, out, image_size=96, step=1200, extra={"run": "demo", "format": "lost"})
    metadata = _metadata(file)
    assert file == out
    assert json.loads(metadata["architecture"]) == {
        "name": "tiny", "depth": 5, "w0": 32, "wa": 45.0, "wm": 2.0, "group_width": 16,
        "stem_stride": 1, "stage_strides": [1, 2, 2, 2],
    }  # fmt: skip
    assert json.loads(metadata["preprocessing"]) == {
        "image_size": 96, "resize": 110, "crop_pct": 0.875, "interpolation": "bilinear",
        "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225],
    }  # fmt: skip
    assert "model.stem.conv.stride = (1, 1)" in metadata["timm"]
    assert "(1, 2, 2, 2)" in metadata["timm"]
    assert (metadata["format"], metadata["step"], metadata["run"]) == ("pt", "1200", "demo")
    assert metadata["seer_version"] == __version__
    assert "step" not in _metadata(export_timm(regnety("tiny"), out, image_size=96))
    assert "stride" not in _metadata(out)["timm"]


def test_any_layout_and_type_is_written_as_contiguous_float32(tmp_path: Path) -> None:
    network = _randomised(regnety("tiny", dtype=torch.float64)).to(memory_format=torch.channels_last)
    shared = torch.zeros(2, 32, dtype=torch.float64)
    network.stem.bn.running_mean, network.stem.bn.running_var = shared[0], shared[1]
    tensors = load_exported(export_timm(network, tmp_path / "a.safetensors", image_size=64)).tensors
    assert list(tensors.keys() ^ network.state_dict().keys()) == []
    for name, value in network.state_dict().items():
        assert tensors[name].is_contiguous()
        expected = value.float() if value.is_floating_point() else value
        assert tensors[name].dtype == expected.dtype
        assert torch.equal(tensors[name], expected), name


def test_others_may_read_the_file_as_far_as_the_umask_says(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        file = export_timm(regnety("tiny"), tmp_path / "a.safetensors", image_size=64)
    finally:
        os.umask(before)
    assert file.stat().st_mode & 0o777 == 0o640


class TestUnwritableOutput:
    def test_missing_folder(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"there is no folder .*nowhere; mkdir -p '.*nowhere'"):
            export_timm(regnety("tiny"), tmp_path / "nowhere" / "a.safetensors", image_size=64)
        assert list(tmp_path.iterdir()) == []

    def test_a_folder(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="it is a folder"):
            export_timm(regnety("tiny"), tmp_path, image_size=64)

    def test_a_folder_that_takes_no_files(self) -> None:
        with pytest.raises(UserError, match=r"cannot write /proc/a\.safetensors"):
            export_timm(regnety("tiny"), Path("/proc/a.safetensors"), image_size=64)

    def test_an_interrupted_write_leaves_the_old_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        out = tmp_path / "a.safetensors"
        out.write_bytes(b"old")

        def full_disk(tensors: dict[str, torch.Tensor], file: Path, metadata: dict[str, str]) -> None:
            Path(file).write_bytes(b"half")
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(timm_format, "save_file", full_disk)
        with pytest.raises(UserError, match="No space left on device"):
            export_timm(regnety("tiny"), out, image_size=64)
        assert out.read_bytes() == b"old"
        assert list(tmp_path.iterdir()) == [out]


class TestUnreadableInput:
    def test_no_file(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="no file"):
            load_exported(tmp_path / "a.safetensors")

    def test_another_format(self, tmp_path: Path) -> None:
        file = tmp_path / "a.safetensors"
        torch.save({"a": torch.zeros(1)}, file)
        with pytest.raises(UserError, match=r"cannot read .*whole safetensors file"):
            load_exported(file)

    def test_a_truncated_file(self, tmp_path: Path) -> None:
        file = export_timm(regnety("tiny"), tmp_path / "a.safetensors", image_size=64)
        os.truncate(file, file.stat().st_size - 100)
        with pytest.raises(UserError, match=r"cannot read .*whole safetensors file"):
            load_exported(file)

    @pytest.mark.parametrize("metadata", [None, {"architecture": "regnety"}, {"architecture": '{"depth": 5}'}])
    def test_no_architecture(self, metadata: dict[str, str] | None, tmp_path: Path) -> None:
        save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors", metadata=metadata)
        with pytest.raises(UserError, match=r"does not say how its network is built.*depth, w0, wa, wm, group_width"):
            load_exported(tmp_path / "a.safetensors")

    @pytest.mark.parametrize("damaged", ['{"image_size": 6', "[]"])
    def test_damaged_preprocessing(self, damaged: str, tmp_path: Path) -> None:
        file = export_timm(regnety("tiny"), tmp_path / "a.safetensors", image_size=64)
        metadata = _metadata(file) | {"preprocessing": damaged}
        save_file({"a": torch.zeros(1)}, file, metadata=metadata)
        with pytest.raises(UserError, match="does not say how images are prepared"):
            load_exported(file)


def test_an_export_initialises_a_network(tmp_path: Path) -> None:
    network = _randomised(regnety("tiny"))
    exported = load_exported(export_timm(network, tmp_path / "a.safetensors", image_size=64))
    other = regnety(exported.architecture["name"])
    other.load_state_dict(exported.tensors, strict=True)
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in network.state_dict().items())

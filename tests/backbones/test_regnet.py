import subprocess
import sys

import pytest
import torch
from backbone_suite import BackboneSuite
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision_shim import make_torchvision_importable

from seer.backbones.regnet import FAMILY, BatchNorm, RegNetY, regnet_shape, regnety
from seer.errors import UserError

make_torchvision_importable()
import timm  # noqa: E402
from timm.models.regnet import adjust_widths_groups_comp, generate_regnet  # noqa: E402

# name: stage widths, stage depths, parameters, multiply-adds at 224, BatchNorm channels. Computed in closed form and
# equal to ClassyVision's and timm's own classes; multiply-adds equal to half of FlopCounterMode on timm's models.
GOLDEN = {
    "tiny": ("32 64 128 256", "1 1 2 1", 331_872, None, None),
    "200mf": ("24 56 152 368", "1 1 4 7", 2_793_996, 199_146_080, 10_424),
    "400mf": ("48 104 208 440", "1 3 6 6", 3_903_144, 401_402_848, 13_576),
    "600mf": ("48 112 256 608", "1 3 7 4", 5_446_160, 600_612_992, 14_880),
    "800mf": ("64 128 320 768", "1 3 8 2", 5_494_168, 796_408_832, 14_944),
    "1.6gf": ("48 120 336 888", "2 6 17 2", 10_313_430, 1_611_188_160, 26_336),
    "3.2gf": ("72 216 576 1512", "2 5 13 1", 17_923_338, 3_174_970_752, 33_080),
    "4gf": ("128 192 512 1088", "2 6 12 2", 19_557_656, 3_972_200_448, 31_136),
    "6.4gf": ("144 288 576 1296", "2 7 14 2", 29_286_252, 6_353_908_992, 41_216),
    "8gf": ("168 448 896 2016", "2 4 10 1", 37_163_068, 7_961_041_312, 42_872),
    "12gf": ("224 448 896 2240", "2 5 11 1", 49_581_544, 12_090_136_576, 48_192),
    "16gf": ("224 448 1232 3024", "2 4 11 1", 80_565_140, 15_908_486_272, 61_408),
    "32gf": ("232 696 1392 3712", "2 5 12 1", 141_333_770, 32_275_840_832, 79_144),
    "64gf": ("328 984 1968 4920", "2 5 12 1", 276_457_786, 64_065_039_616, 110_568),
    "128gf": ("528 1056 2904 7392", "2 7 17 1", 637_419_894, 127_510_423_680, 207_536),
    "256gf": ("746 1492 4103 10444", "2 7 17 1", 1_272_156_138, 254_374_370_734, 293_210),
    "256gf_cv": ("640 1696 2544 5088", "3 7 16 1", 821_051_008, 256_892_516_224, 188_752),
    "10b": ("2020 4040 11110 28280", "2 7 17 1", 9_323_934_872, 1_863_284_508_176, 793_892),
}


def _timm(name: str, **more: object) -> nn.Module:
    depth, w0, wa, wm, group_width = FAMILY[name]
    return timm.create_model(
        "regnety_002", num_classes=0, depth=depth, w0=w0, wa=wa, wm=wm, group_size=group_width, **more
    )


class TestRegNetYAsABackbone(BackboneSuite):
    def backbone(self) -> RegNetY:
        return regnety("tiny")


class TestRegNetYWithOtherStridesAsABackbone(BackboneSuite):
    sizes = (32, 16)

    def backbone(self) -> RegNetY:
        return RegNetY(regnet_shape(*FAMILY["tiny"]), stem_stride=1, stage_strides=(1, 2, 2, 2))


def test_the_golden_table_covers_the_family() -> None:
    assert list(GOLDEN) == list(FAMILY)


@pytest.mark.parametrize("name", FAMILY)
def test_every_member_is_the_published_one(name: str) -> None:
    widths, depths, parameters, macs, channels = GOLDEN[name]
    network = regnety(name, device="meta").eval()
    assert network.shape.widths == tuple(map(int, widths.split()))
    assert network.shape.depths == tuple(map(int, depths.split()))
    assert network.feature_dim == network.shape.widths[-1]
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    assert all(norm.eps == 1e-5 and norm.momentum == 0.1 for norm in norms)
    if channels is not None:
        assert sum(norm.num_features for norm in norms) == channels
    if macs is not None:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network(torch.empty(1, 3, 224, 224, device="meta"))
        assert counter.get_total_flops() == 2 * macs


@pytest.mark.parametrize("name", ["tiny", "256gf", "256gf_cv", "10b"])
def test_names_and_shapes_are_those_of_timm(name: str) -> None:
    ours, theirs = regnety(name, device="meta").state_dict(), _timm(name, device="meta").state_dict()
    assert [(key, value.shape, value.dtype) for key, value in ours.items()] == [
        (key, value.shape, value.dtype) for key, value in theirs.items()
    ]


@pytest.mark.parametrize(
    ("name", "hidden"),
    [
        ("16gf", [(8, 56), (56, 112), (112, 308), (308, None)]),
        ("256gf", [(8, 186), (186, 373), (373, 1026), (1026, None)]),
        ("10b", [(8, 505), (505, 1010), (1010, 2778), (2778, None)]),
    ],
)
def test_squeeze_widths_follow_the_block_input_half_to_even(name: str, hidden: list[tuple[int, int | None]]) -> None:
    network = regnety(name, device="meta")
    for stage, (first, others) in enumerate(hidden, start=1):
        found = [
            network.get_submodule(f"s{stage}.b{b}.se.fc1").out_channels
            for b in range(1, network.shape.depths[stage - 1] + 1)
        ]
        assert found == [first] + [others] * (len(found) - 1)


def test_group_widths() -> None:
    assert regnet_shape(*FAMILY["256gf_cv"]).group_widths == (640, 848, 848, 848)
    for name in FAMILY.keys() - {"256gf_cv"}:
        assert regnet_shape(*FAMILY[name]).group_widths == (FAMILY[name][4],) * 4


@settings(max_examples=100, deadline=None)
@given(
    depth=st.integers(4, 30),
    w0=st.integers(1, 40).map(lambda n: 8 * n),
    wa=st.integers(500, 30_000).map(lambda n: n / 100),
    wm=st.integers(190, 320).map(lambda n: n / 100),
    group_width=st.integers(1, 16).map(lambda n: 8 * n),
)
@example(depth=15, w0=304, wa=152.0, wm=2.25, group_width=56)  # ties in the rounding of the exponents
def test_shapes_are_timms_for_any_parameters(depth: int, w0: int, wa: float, wm: float, group_width: int) -> None:
    """Also for shapes that nobody published: an export of any network must fit what timm builds."""
    widths, stages, groups = generate_regnet(wa, w0, wm, depth, group_width)
    if stages != 4:
        with pytest.raises(UserError, match=f"has {stages} stages"):
            regnet_shape(depth, w0, wa, wm, group_width)
        return
    stage_widths, group_widths = adjust_widths_groups_comp(sorted(set(widths)), [1.0] * 4, groups)
    shape = regnet_shape(depth, w0, wa, wm, group_width)
    assert (shape.widths, shape.group_widths) == (tuple(stage_widths), tuple(group_widths))
    assert shape.depths == tuple(widths.count(width) for width in sorted(set(widths)))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_training_equals_timm_to_the_last_bit(memory_format: torch.memory_format) -> None:
    """Features, running statistics and gradients of one training pass over two resolutions."""
    ours, theirs = regnety("tiny").train(), _timm("tiny").train()
    theirs.load_state_dict(ours.state_dict())
    ours, theirs = ours.to(memory_format=memory_format), theirs.to(memory_format=memory_format)
    crops = [torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(size)) for size in (64, 48)]
    crops = [images.to(memory_format=memory_format) for images in crops]
    found, expected = ours(crops), [theirs(images) for images in crops]
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)
    for features in (found, expected):
        (features[0].pow(2).sum() + features[1].pow(3).sum()).backward()
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), name
    for (name, a), b in zip(ours.named_buffers(), theirs.buffers(), strict=True):
        assert torch.equal(a, b), name


def test_batchnorm_sees_each_resolution_by_itself_in_list_order() -> None:
    network = regnety("tiny").train()
    crops = TestRegNetYAsABackbone().crops()
    expected = network.stem.bn.running_mean.clone()
    with torch.no_grad():
        for images in crops:
            expected.lerp_(network.stem.conv(images).mean((0, 2, 3)), 0.1)
    network(crops)
    torch.testing.assert_close(network.stem.bn.running_mean, expected)
    assert network.stem.bn.num_batches_tracked == 2


def test_a_block_is_called_once_for_all_resolutions() -> None:
    network = regnety("tiny")
    calls: list[str] = []
    for name, unit in network.units():
        unit.register_forward_hook(lambda module, inputs, outputs, name=name: calls.append(name))
    network(TestRegNetYAsABackbone().crops())
    assert calls == ["stem", "s1.b1", "s2.b1", "s3.b1", "s3.b2", "s4.b1"]


def test_a_batchnorm_is_called_once_for_all_resolutions() -> None:
    network = regnety("tiny").train()
    norms = {name: module for name, module in network.named_modules() if isinstance(module, BatchNorm)}
    calls: list[tuple[str, int]] = []
    for name, norm in norms.items():
        norm.register_forward_hook(lambda module, inputs, outputs, name=name: calls.append((name, len(outputs))))
    network(TestRegNetYAsABackbone().crops())
    assert sorted(calls) == sorted((name, 2) for name in norms) and len(norms) == 20


def test_architecture_rebuilds_the_network() -> None:
    shape = regnet_shape(*FAMILY["tiny"])
    assert RegNetY(shape, device="meta").architecture() == {
        "name": "tiny", "depth": 5, "w0": 32, "wa": 45.0, "wm": 2.0, "group_width": 16
    }  # fmt: skip
    other = RegNetY(shape, stem_stride=1, stage_strides=[1, 2, 2, 1], device="meta")
    assert other.architecture()["stem_stride"] == 1
    assert other.architecture()["stage_strides"] == [1, 2, 2, 1]
    assert RegNetY(regnet_shape(7, 16, 16.0, 2.0, 8), device="meta").architecture()["name"] == "custom"


@pytest.mark.parametrize(
    ("stem", "stages", "side"), [(2, (2, 2, 2, 2), 2), (1, (1, 2, 2, 2), 8), (1, (1, 2, 2, 1), 16)]
)
def test_strides_set_the_size_of_the_last_map(stem: int, stages: tuple[int, ...], side: int) -> None:
    network = RegNetY(regnet_shape(*FAMILY["tiny"]), stem_stride=stem, stage_strides=stages, device="meta")
    maps = [torch.empty(1, 3, 64, 64, device="meta")]
    for _, unit in network.units():
        maps = unit(maps)
    assert maps[0].shape == (1, 256, side, side)


def test_a_default_device_or_type_is_respected() -> None:
    with torch.device("meta"):
        assert all(parameter.is_meta for parameter in regnety("tiny").parameters())
        assert not any(parameter.is_meta for parameter in regnety("tiny", device="cpu").parameters())


@pytest.mark.parametrize(
    ("parameters", "says"),
    [
        ((5, 33, 45.0, 2.0, 16), "w0 is a positive multiple of 8; use w0 32"),
        ((3, 32, 45.0, 2.0, 16), r"has 3 stages \(widths 32, 64, 128\)"),
        ((30, 32, 45.0, 2.0, 16), "a RegNet has 4 stages"),
        ((0, 32, 45.0, 2.0, 16), "depth and group width are at least 1"),
        ((5, 32, 45.0, 1.0, 16), "wm above 1"),
        ((5, 32, 45.0, 2.0, 0), "group width are at least 1"),
        ((5, 32, -1.0, 2.0, 16), "wa at least 0"),
        ((5, 0, 45.0, 2.0, 16), "use w0 8"),
    ],
)
def test_what_is_no_regnet_is_refused(parameters: tuple[int, int, float, float, int], says: str) -> None:
    with pytest.raises(UserError, match=says):
        regnet_shape(*parameters)


def test_an_unknown_name_and_bad_strides_are_refused() -> None:
    with pytest.raises(UserError, match="did you mean '400mf'"):
        regnety("400mff")
    for stem, stages in ((2, (2, 2, 2)), (0, (2, 2, 2, 2)), (2, (2, 2, 2, 0))):
        with pytest.raises(UserError, match="each at least 1"):
            RegNetY(regnet_shape(*FAMILY["tiny"]), stem_stride=stem, stage_strides=stages)


def test_the_core_imports_neither_torchvision_nor_timm() -> None:
    code = "import sys, seer.backbones.regnet; print([m for m in ('torchvision', 'timm') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

"""The checks of `validate`, and what `resolve` derives."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import pytest

from seer.config import (
    BACKBONES,
    SMALLEST_EPSILON,
    BackboneConfig,
    DataConfig,
    TrainConfig,
    freeze,
)
from seer.decoders import DECODERS, missing_speed
from seer.derived import MIXED_IMAGES, resolve, resolve_decoder, resolve_order
from seer.errors import UserError
from seer.objectives import sinkhorn
from seer.validation import validate


def valid(**values: Any) -> TrainConfig:
    """The defaults with the two values that have none, and some keys changed: `section__key=value`."""
    config = TrainConfig(run_dir="runs/test", data=DataConfig(shards=["a.tar"]))
    for path, value in values.items():
        *sections, name = path.split("__")
        place: Any = config
        for section in sections:
            place = getattr(place, section)
        assert hasattr(place, name), path
        setattr(place, name, value)
    return config


CUSTOM = {
    **{"backbone__name": "custom", "backbone__depth": 5, "backbone__w0": 32},
    **{"backbone__wa": 45.0, "backbone__wm": 2.0, "backbone__group_width": 16},
}


@pytest.mark.parametrize(
    "values",
    [
        {},
        CUSTOM,
        {"data__small__count": 0},
        {"data__large__count": 3},
        {"data__workers": 0},
        {"objective__epsilon": 0.003},
        {"objective__iterations": 0},
        {"objective__head_hidden_sizes": []},
        {"objective__queue_images": 256},
        {"optimizer__warmup_steps": 99_999},
        {"evaluation__train": ["a"], "evaluation__val": ["b"], "evaluation__every_steps": 5},
        {"evaluation__train": ["a"], "evaluation__val": ["b"]},
        {"parallel__strategy": "single"},
        {"data__photometric__hue": 0.5},
        {"data__limits__max_pixels": 178_956_970, "data__limits__max_aspect_ratio": 1.0, "data__max_bad_share": 0.0},
    ],
)
def test_accepted(values: dict[str, Any]) -> None:
    config = valid(**values)
    before = freeze(config)
    validate(config)
    assert freeze(config) == before


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"run_dir": ""}, "run_dir is empty"),
        ({"run_dir": "s3://photos/runs"}, "run_dir=s3://photos/runs is an address"),
        ({"data__cache_dir": "gs://photos/cache"}, "data.cache_dir=gs://photos/cache is an address"),
        ({"data__index_dir": "https://host/index"}, "data.index_dir=https://host/index is an address"),
        ({"train__init_from": "s3://photos/w.safetensors"}, "train.init_from=s3://photos/w.safetensors is an address"),
        ({"seed": -1}, "seed=-1"),
        ({"data__shards": []}, "data.shards='SHARDS_DIR/*.tar'"),
        ({"data__shards": [""]}, "empty pattern"),
        ({"data__index_dir": ""}, "data.index_dir is empty"),
        ({"data__workers": -1}, "data.workers=-1: at least 0"),
        ({"data__cache_dir": ""}, "data.cache_dir is empty"),
        ({"data__cache_gb": -1.0}, "data.cache_gb=-1: at least 0"),
        ({"data__cache_gb": 1e300}, "data.cache_gb=1e+300: at least 0"),
        ({"data__io_timeout_seconds": 501}, "data.io_timeout_seconds=501: at least 1 and at most 500"),
        ({"data__large__count": 1}, "at least 2"),
        ({"data__small__count": -1}, "data.small.count=-1"),
        ({"data__large__size": 4}, "data.large.size=4"),
        ({"data__large__min_area": 0.0}, "data.large.min_area=0: greater than 0"),
        ({"data__small__max_area": 1.5}, "at most 1"),
        (
            {"data__large__min_area": 0.9, "data__large__max_area": 0.5},
            "data.large.min_area=0.9 with data.large.max_area",
        ),
        ({"data__limits__max_pixels": 178_956_971}, "use at most that"),
        ({"data__limits__max_pixels": 0}, "data.limits.max_pixels=0: at least 1"),
        ({"data__limits__min_side": 0}, "data.limits.min_side=0: at least 1"),
        (
            {"data__limits__max_side": 8, "data__limits__min_side": 9},
            "data.limits.min_side=9 with data.limits.max_side=8",
        ),
        ({"data__limits__max_bytes": 0}, "data.limits.max_bytes=0: at least 1"),
        ({"data__limits__max_aspect_ratio": 0.5}, "data.limits.max_aspect_ratio=0.5: at least 1"),
        ({"data__max_bad_share": 1.1}, "data.max_bad_share=1.1"),
        ({"data__flip_probability": 1.1}, "data.flip_probability=1.1"),
        ({"data__flip_probability": math.nan}, "data.flip_probability=nan"),
        ({"data__photometric__grayscale_probability": -0.1}, "grayscale_probability=-0.1"),
        ({"data__photometric__hue": 0.6}, "at most 0.5"),
        ({"data__photometric__blur_min_sigma": 3.0}, "blur_min_sigma=3 with data.photometric.blur_max_sigma=2"),
        ({"data__photometric__blur_max_sigma": 2.1}, "blur_max_sigma=2.1: at most 2: the blur has 13 taps"),
        ({"backbone__name": "400fm"}, "did you mean '400mf'?"),
        ({"backbone__name": "custom"}, "backbone.depth, backbone.w0, backbone.wa, backbone.wm, backbone.group_width"),
        ({**CUSTOM, "backbone__wm": None}, "without backbone.wm:"),
        ({**CUSTOM, "backbone__w0": 30}, "use 32"),
        ({**CUSTOM, "backbone__wm": 1.0}, "backbone.wm=1: greater than 1"),
        ({"backbone__depth": 5}, "backbone.depth is given beside backbone.name=400mf"),
        ({"backbone__stage_strides": [1, 2, 2]}, "there are four stages"),
        ({"backbone__stem_stride": 3}, "a stride of 3"),
        ({"objective__name": "swaw"}, "did you mean 'swav'?"),
        ({"objective__prototypes": 1}, "objective.prototypes=1"),
        ({"objective__head_hidden_sizes": [0]}, "objective.head_hidden_sizes=0"),
        ({"objective__temperature": 0.0}, "objective.temperature=0"),
        ({"objective__epsilon": 0.002}, "objective.epsilon=0.002"),
        ({"objective__epsilon": math.nan}, "objective.epsilon=nan"),
        ({"objective__iterations": -1}, "objective.iterations=-1"),
        ({"objective__queue_images": 255}, "use 0 (no queue) or at least 256"),
        ({"optimizer__name": "adam"}, "did you mean 'adamw'?"),
        ({"optimizer__schedule": "rebase"}, "did you mean 'rebased'?"),
        ({"optimizer__learning_rate": 0.0}, "optimizer.learning_rate=0"),
        ({"optimizer__learning_rate": math.inf}, "optimizer.learning_rate=inf"),
        ({"optimizer__momentum": 1.0}, "less than 1"),
        ({"optimizer__warmup_steps": 100, "train__steps": 100}, "use optimizer.warmup_steps=5"),
        ({"train__steps": 0}, "train.steps=0"),
        ({"train__global_batch_size": 0}, "train.global_batch_size=0"),
        ({"train__device": "gpu"}, "train.device=gpu"),
        ({"train__precision": "fp16"}, "train.precision=fp16"),
        ({"train__threads": 0}, "train.threads=0"),
        ({"train__log_every_steps": 0}, "train.log_every_steps=0"),
        ({"train__init_from": ""}, "train.init_from is empty"),
        ({"checkpoint__every_steps": 0}, "checkpoint.every_steps=0"),
        ({"checkpoint__keep": 1}, "checkpoint.keep=1"),
        ({"checkpoint__keep_every_steps": 0}, "checkpoint.keep_every_steps=0"),
        ({"evaluation__val": ["a"]}, "give evaluation.train too"),
        ({"evaluation__train": ["a"]}, "give evaluation.val too"),
        ({"evaluation__every_steps": 10}, "evaluation.every_steps=10 without shards"),
        ({"evaluation__k": 0}, "evaluation.k=0"),
        ({"evaluation__max_val_images": 0}, "evaluation.max_val_images=0"),
        ({"parallel__strategy": "ddp", "parallel__shard_ranks": 2}, "only fsdp cuts"),
        ({"parallel__timeout_seconds": 0}, "parallel.timeout_seconds=0"),
        ({"launch__name": "slrum"}, "did you mean 'slurm'?"),
        ({"launch__nodes": 0}, "launch.nodes=0"),
        ({"parallel__strategy": "sinlge"}, "did you mean 'single'?"),
    ],
)
def test_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as caught:
        validate(valid(**values))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_field_is_looked_at() -> None:
    """A number that makes no sense anywhere is refused in whichever numeric field it stands."""
    free = {"backbone.depth", "backbone.w0", "backbone.wa", "backbone.wm", "backbone.group_width"}  # need `custom`

    def sections(place: Any, path: str) -> list[tuple[str, str]]:
        found = []
        for field in dataclasses.fields(place):
            value, name = getattr(place, field.name), f"{path}{field.name}"
            if dataclasses.is_dataclass(value):
                found += sections(value, f"{name}.")
            elif "int" in str(field.type) or "float" in str(field.type):
                found.append((name, str(field.type)))
        return found

    numeric = [(name, kind) for name, kind in sections(TrainConfig(), "") if name not in free]
    assert len(numeric) > 50
    for name, kind in numeric:
        bad: Any = [-7] if "list" in kind else -7 if "int" in kind else -7.0
        with pytest.raises(UserError):
            validate(valid(**{name.replace(".", "__"): bad}))


@pytest.mark.parametrize(
    ("batch", "world_size", "remedy"), [(50, 4, "use 48 or 52"), (3, 4, "use 4"), (257, 2, "use 256 or 258")]
)
def test_batch_divides_by_processes(batch: int, world_size: int, remedy: str) -> None:
    config = valid(train__global_batch_size=batch)
    validate(config)
    with pytest.raises(UserError, match=remedy):
        validate(config, world_size=world_size)
    validate(valid(train__global_batch_size=4 * batch), world_size=world_size)


def test_backbones_are_the_family() -> None:
    from seer.backbones.regnet import FAMILY

    assert set(BACKBONES) == set(FAMILY)


def test_schedule_styles_are_those_of_the_part() -> None:
    from seer.optim.schedules import STYLES, WarmupCosine

    for style in STYLES:
        validate(valid(optimizer__schedule=style))
        WarmupCosine(0.0, 1.0, 0.0, 1, 10, style=style)


def test_learning_rate_follows_the_batch() -> None:
    """SEER's linear rule: 0.3 for 256 images; 9.6 for 8192 (facebookresearch/vissl, MODEL_DOCUMENTATION.md)."""
    found = resolve(valid(train__global_batch_size=8192), cores=8)["optimizer.learning_rate"]
    assert found.value == pytest.approx(9.6, rel=1e-12)
    assert "8192" in found.reason
    given = resolve(valid(train__global_batch_size=8192, optimizer__learning_rate=0.1), cores=8)
    assert given["optimizer.learning_rate"] == (0.1, "given")


@pytest.mark.parametrize(
    ("granted", "processes", "device", "workers", "threads"),
    [
        (1, 1, "cpu", 0, 1),
        (2, 1, "cpu", 0, 2),
        (8, 1, "cpu", 2, 6),
        (8, 4, "cpu", 0, 2),
        (2, 4, "cpu", 0, 1),
        (16, 1, "cuda", 15, 1),
        (96, 8, "cuda", 11, 1),
    ],
)
def test_workers_and_threads(
    granted: int, processes: int, device: str, workers: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(granted)))
    for found in (
        resolve(valid(), processes=processes, device=device),
        resolve(valid(), processes=7, cores=max(1, granted // processes), device=device),
    ):
        assert (found["data.workers"].value, found["train.threads"].value) == (workers, threads)
    given = resolve(valid(data__workers=0, train__threads=3), device=device)
    assert (given["data.workers"].value, given["train.threads"].value) == (0, 3)


def test_queue_holds_whole_batches() -> None:
    rounded = resolve(valid(objective__queue_images=1000), cores=1)["objective.queue_images"]
    assert rounded == (768, "1000 rounded down to whole batches")
    for whole in (0, 1024):
        assert "objective.queue_images" not in resolve(valid(objective__queue_images=whole), cores=1)


def test_epsilon_is_refused_where_sinkhorn_refuses_it() -> None:
    assert SMALLEST_EPSILON == sinkhorn.SMALLEST_EPSILON


def test_defaults_are_not_shared() -> None:
    one, other = BackboneConfig(), BackboneConfig()
    one.stage_strides.append(1)
    assert other.stage_strides == [2, 2, 2, 2]


def test_data_of_ordinary_size_is_mixed_as_a_whole() -> None:
    for samples in (300, 50_000, 1_281_167, MIXED_IMAGES):
        found = resolve_order(valid(), samples=samples, shards=100)
        assert found["data.lanes"].value == 1 and found["data.window_images"].value == 0
        assert f"{samples:,} images" in found["data.lanes"].reason


@pytest.mark.parametrize(
    ("samples", "shards", "batch", "lanes", "window"),
    [
        (10**9, 100_000, 4096, 64, 40_000),  # four shards of 10,000
        (10**8, 100_000, 4096, 64, 40_000),  # forty of 1,000
        (10**9, 10_000, 4096, 64, 400_000),  # four of 100,000
        (10**9, 100_000, 1000, 50, 51_200),  # a divisor of the batch
        (10**9, 100_000, 4099, 1, 2_560_000),  # it has none
        (10**7, 100, 4096, 8, 400_000),  # lanes have shards enough
        (10**7, 3, 4096, 1, 4 * 10**7 // 3),
        (10**7, 10_000, 16, 16, 160_000),
    ],
)
def test_big_data_is_mixed_in_lanes_and_windows(samples: int, shards: int, batch: int, lanes: int, window: int) -> None:
    config = valid(train__global_batch_size=batch)
    found = resolve_order(config, samples=samples, shards=shards)
    assert (found["data.lanes"].value, found["data.window_images"].value) == (lanes, window)
    assert batch % lanes == 0 and "mixed at a time" in found["data.window_images"].reason


def test_given_lanes_and_windows_are_taken() -> None:
    found = resolve_order(valid(data__lanes=4, data__window_images=0), samples=10**9, shards=10**5)
    assert found == {"data.lanes": (4, "given"), "data.window_images": (0, "given")}
    window = resolve_order(valid(data__lanes=4), samples=10**9, shards=10**5)["data.window_images"]
    assert window.value == 640_000 and window.reason.startswith("2,560,000 of 1,000,000,000 images")


def test_a_mixture_stands_instead_of_shards() -> None:
    validate(valid(data__shards=[], data__mixture=["web 1 a.tar"]))
    with pytest.raises(UserError, match=r"data.mixture is given beside data.shards"):
        validate(valid(data__mixture=["web 1 a.tar"]))
    mixture = ["web 2 a.tar", "own 1 b.tar"]
    found = resolve_order(valid(data__mixture=mixture, data__lanes=4), samples=10**4, shards=9)["data.mixture"]
    assert found.value == {"web": 172, "own": 84}  # 43 and 21 in each of four lanes


def test_lanes_divide_a_batch() -> None:
    validate(valid(data__lanes=64, data__window_images=0))
    with pytest.raises(UserError, match=r"data.lanes=48 with train.global_batch_size=256: .*, such as 16"):
        validate(valid(data__lanes=48))
    for key in ("lanes", "window_images"):
        with pytest.raises(UserError, match=f"data.{key}=-1"):
            validate(valid(**{f"data__{key}": -1}))


def test_the_fastest_decoder_is_taken_and_what_it_lacks_is_told() -> None:
    found = resolve_decoder(valid(), recorded=None, installed=["pillow"])
    assert found.value == "pillow"
    assert found.reason.endswith("simplejpeg makes crops about twice as fast: pip install 'seer[fast]'")
    for installed in (["simplejpeg", "pillow"], ["simplejpeg+pillow-simd", "pillow-simd", "simplejpeg"]):
        assert missing_speed(installed) is None
        found = resolve_decoder(valid(), recorded=None, installed=installed)
        assert found == (installed[0], "the fastest that is installed")


def test_a_run_keeps_its_decoder() -> None:
    installed = ["simplejpeg", "pillow"]
    assert resolve_decoder(valid(), recorded="pillow", installed=installed) == ("pillow", "the run began with it")
    given = valid(data__decoder="simplejpeg")  # the run's identity is then another one
    assert resolve_decoder(given, recorded="pillow", installed=installed) == ("simplejpeg", "given")


@pytest.mark.parametrize(
    ("decoder", "installed", "remedy"),
    [
        ("simplejpeg", ["pillow"], "pip install 'seer[fast]'"),
        ("pillow-simd", ["pillow"], "data_shards/install_pillow_simd.sh"),
        ("simplejpeg+pillow-simd", ["simplejpeg", "pillow"], "data_shards/install_pillow_simd.sh"),
        ("simplejpeg+pillow-simd", ["pillow"], "pip install 'seer[fast]' && data_shards/install_pillow_simd.sh"),
        ("pillow", ["pillow-simd"], "pip uninstall pillow-simd && pip install --force-reinstall pillow"),
    ],
)
def test_a_decoder_that_is_not_installed_is_refused_with_its_remedy(
    decoder: str, installed: list[str], remedy: str
) -> None:
    for config, recorded in ((valid(data__decoder=decoder), None), (valid(), decoder)):
        with pytest.raises(UserError, match=f"data.decoder={re.escape(decoder)} is not installed") as caught:
            resolve_decoder(config, recorded=recorded, installed=installed)
        assert caught.value.remedy == remedy


def test_names_of_decoders() -> None:
    for decoder in ("auto", *DECODERS):
        validate(valid(data__decoder=decoder))
    with pytest.raises(UserError, match=r"data\.decoder=simplejpg") as caught:
        validate(valid(data__decoder="simplejpg"))
    assert "simplejpeg" in caught.value.remedy

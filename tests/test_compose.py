"""Words to configuration: what is typed arrives whole, what is mistyped is refused in one line; and the tree conf/."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

import seer
from seer import compose as composing
from seer.compose import compose, conf_folder, flat, groups, key_types, quote_override, thaw
from seer.config import BACKBONES, TrainConfig, freeze
from seer.errors import UserError
from seer.validation import validate

GIVEN = ["run_dir=runs/test", "data.shards=a.tar"]
TEXTS = (
    *("train.device", "train.precision", "backbone.name", "objective.name", "optimizer.name", "optimizer.schedule"),
    *("parallel.strategy", "data.index_dir"),
)
SCHEMA = OmegaConf.structured(TrainConfig)
LISTS = ("data.shards", "evaluation.train", "evaluation.val")
# Texts that Hydra, YAML, OmegaConf or a shell's habits would change.
HARD = [
    *("train-{000..127}.tar", "train-{a,b}.tar", "[0-9]*.tar", "a[0-9].tar", "2024_01", "007", "1e3", "0x10", "12:30"),
    *(
        "null",
        "true",
        "on",
        "nan",
        "a=b",
        "a b",
        " a ",
        "#a",
        "a#b",
        ";",
        "a,b",
        "a;b",
        "$HOME",
        "${seed}",
        "${",
        "\\${x}",
    ),
    *(
        "https://h/p?X=1&sig=a%3D",
        "s3://b/x-{0..9}.tar",
        "a'b",
        'a"b',
        "'a'",
        '"a"',
        "\\",
        "a\\",
        "\\'",
        "a\\'b",
        "\\\\",
    ),
    *(
        "{",
        "}",
        "(",
        ")",
        "[",
        "]",
        "a]",
        "~~",
        "@",
        "|",
        "*",
        "?",
        "%",
        "été/фото/写真.tar",
        "a\tb",
        "a:b",
        "- a",
        "!tag",
    ),
    *("oc.env:HOME", "${oc.env:HOME}", "choice(a,b)", "range(1,3)", "glob(*)", "int(3)"),
]
TEXT = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=30)
# Pieces that mean something to one of the readers on the way, in every order.
PIECES = st.lists(st.sampled_from(["\\", "'", '"', "$", "{", "}", "[", "]", ",", "=", " ", "a", "~", "#", "?", "${a}"]))
ANY = (TEXT | PIECES.map("".join).filter(bool)).filter(lambda text: text != "???")


def arrive(override: str) -> object:
    """The value of one override after Hydra's grammar and OmegaConf's conversion: `compose` without reading files."""
    parsed = OverridesParser.create().parse_override(quote_override(override))
    OmegaConf.update(SCHEMA, parsed.key_or_group, parsed.value())
    value = OmegaConf.select(SCHEMA, parsed.key_or_group)
    return OmegaConf.to_object(value) if OmegaConf.is_config(value) else value


@pytest.mark.parametrize("first", range(0, len(HARD), len(TEXTS)))
def test_hard_texts_arrive_whole(first: int) -> None:
    given = dict(zip(TEXTS, HARD[first : first + len(TEXTS)], strict=False))
    config = compose(["run_dir=x", *(f"{key}={text}" for key, text in given.items())])
    found = flat(freeze(config))
    assert {key: found[key] for key in given} == given
    assert thaw(freeze(config)) == config
    assert thaw(yaml.safe_load(yaml.safe_dump(freeze(config), allow_unicode=True))) == config


@pytest.mark.parametrize("text", HARD)
def test_hard_patterns_arrive_whole(text: str) -> None:
    assert arrive(f"data.shards={text}") == [text]


def test_null_is_none_where_a_key_may_be_null() -> None:
    config = compose(["run_dir=null", "data.index_dir=null", "train.device=null", "data.shards=null"])
    assert (config.run_dir, config.data.index_dir) == ("null", None)
    assert (config.train.device, config.data.shards) == ("null", ["null"])


@given(key=st.sampled_from(TEXTS), text=ANY)
@settings(max_examples=60, deadline=None)
def test_any_text_arrives_unchanged(key: str, text: str) -> None:
    optional = key_types()[key].optional
    assert arrive(f"{key}={text}") == (None if optional and text == "null" else text)


@given(key=st.sampled_from(LISTS), text=ANY)
@settings(max_examples=60, deadline=None)
def test_a_text_is_a_list_of_one(key: str, text: str) -> None:
    if text.startswith("[") and text.endswith("]"):
        text = f"./{text}"
    assert arrive(f"{key}={text}") == [text]


@given(texts=st.lists(st.text(st.sampled_from("ab{}$\\=#?*~ é"), min_size=1).map(str.strip).filter(bool), min_size=1))
@settings(max_examples=60, deadline=None)
def test_a_bracketed_list_is_its_parts(texts: list[str]) -> None:
    texts = [f"a{text}".replace("{", "").replace("}", "") + "{x,y}" for text in texts]
    assert arrive(f"data.shards=[{', '.join(texts)}]") == texts


@pytest.mark.parametrize(
    ("value", "parts"),
    [
        ("", []),
        ("[]", []),
        ("[a]", ["a"]),
        ("[a,b]", ["a", "b"]),
        ("[ a , b ]", ["a", "b"]),
        ("[a-{0,1}.tar,b[0-9].tar]", ["a-{0,1}.tar", "b[0-9].tar"]),
        ("['a,b',\"c d\"]", ["a,b", "c d"]),
        ("[it's,b]", ["it's", "b"]),
        ("[0-9]*.tar", ["[0-9]*.tar"]),
        ("a,b", ["a,b"]),
    ],
)
def test_lists(value: str, parts: list[str]) -> None:
    assert compose([*GIVEN[:1], f"data.shards={value}"]).data.shards == parts


def test_numbers_and_choices() -> None:
    config = compose(
        [
            *GIVEN,
            *(
                "optimizer=adamw",
                "experiment=seer_10b",
                "backbone=1.6gf",
                "train.steps=1_000",
                "seed=007",
                "data.workers=0",
            ),
            *("optimizer.weight_decay=1", "optimizer.beta1=.5", "parallel.sync_batchnorm=No", "train.threads=null"),
            "backbone.stage_strides=[1, 2,2,1]",
        ]
    )
    assert (config.optimizer.name, config.backbone.name, config.experiment) == ("adamw", "1.6gf", "seer_10b")
    assert (config.train.steps, config.seed, config.data.workers, config.train.threads) == (1000, 7, 0, None)
    assert (config.optimizer.weight_decay, config.optimizer.beta1) == (1.0, 0.5)
    assert config.parallel.sync_batchnorm is False
    assert config.backbone.stage_strides == [1, 2, 2, 1]


def test_home_is_expanded_where_a_folder_is_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    config = compose(["run_dir=~/run", "data.index_dir=~/index", "train.init_from=~/w", "data.shards=~/[0-9].tar"])
    assert (config.run_dir, config.data.index_dir, config.train.init_from) == (
        *("/home/me/run", "/home/me/index", "/home/me/w"),
    )
    assert config.data.shards == ["~/[0-9].tar"]  # expand_shards does that, after it looked for the literal name


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([], "run_dir is missing"),
        (["run_dri=x"], "did you mean 'run_dir'?"),
        (["train.stps=3"], "did you mean 'train.steps'?"),
        (["epsilon=0.02"], "did you mean 'objective.epsilon'?"),
        (["batch_size=3"], "did you mean 'train.global_batch_size'?"),
        (["expermient=small"], "did you mean 'experiment'?"),
        (["nothing_like_it=3"], "seer train --help"),
        (["=3"], "no such key"),
        (["train=3"], "it holds other keys; give one of them: train.steps"),
        (["data.large=3"], "data.large.count"),
        (["hydra.run.dir=x"], "there is no such key"),
        (["hydra/launcher=x"], "there is no such key"),
        (["experiment=smal"], "did you mean 'small'?"),
        (["backbone=16fg"], "did you mean '16gf'?"),
        (["optimizer=sgd"], "there are: adamw, larc"),
        (["train.steps=ten"], "it takes a whole number; for example train.steps=100000"),
        (["train.steps=1e5"], "write 100000"),
        (["train.steps=1.5"], "it takes a whole number"),
        (["train.steps="], "it takes a whole number"),
        (["train.steps=null"], "it takes a whole number"),
        (["train.threads=many"], "a whole number or null"),
        (["seed=1,2"], "one value: a command is one run"),
        (["objective.epsilon=small"], "it takes a number"),
        (["objective.epsilon=${seed}"], "it takes a number"),
        (["objective.head_batchnorm=maybe"], "it takes true or false"),
        (["backbone.stage_strides=[1,x]"], "a list of whole numbers"),
        (["train.steps=1", "train.steps=2"], "train.steps is given 2 times (1, 2)"),
        (["experiment=demo", "experiment=small"], "experiment is given 2 times"),
        (
            ["data.shards=a-0.tar", "data.shards=a-1.tar", "data.shards=a-2.tar"],
            "given 3 times (a-0.tar, a-1.tar, ...)",
        ),
        (["data.shards=a-0.tar", "data.shards=a-1.tar"], "with the quotes"),
        (["+seed=1"], "write seed=VALUE"),
        (["++train.steps=1"], "write train.steps=VALUE"),
        (["~seed=1"], "write seed=VALUE"),
        (["shards"], "a verb comes first: seer shards"),
        (["small"], "write experiment=small"),
        (["seed"], "write seed=VALUE"),
        (["sed"], "write seed=VALUE"),
        (["--steps"], "there is no such option"),
        (["photos/a.tar"], "data.shards='photos/a.tar'"),
        (["run_dir=???"], "write ./???"),
        (["data.shards=[a,???]"], "write ./???"),
    ],
)
def test_refused_in_one_line(overrides: list[str], words: str) -> None:
    with pytest.raises(UserError) as caught:
        compose(overrides)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@given(st.lists(ANY, max_size=2))
@settings(max_examples=60, deadline=None)
def test_whatever_is_typed_is_refused_or_taken(words: list[str]) -> None:
    with contextlib.suppress(UserError):
        for word in words:
            quote_override(word)
            OverridesParser.create().parse_override(quote_override(f"run_dir={word}"))


def test_a_file_that_does_not_fit_names_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(conf_folder(), tmp_path / "conf")
    monkeypatch.setattr(composing, "conf_folder", lambda: tmp_path / "conf")
    (tmp_path / "conf" / "optimizer" / "typo.yaml").write_text("momentun: 0.9\n")
    (tmp_path / "conf" / "optimizer" / "kind.yaml").write_text("momentum: much\n")
    for option, words in (("typo", "momentun"), ("kind", "momentum: In 'optimizer/kind'")):
        with pytest.raises(UserError) as caught:
            compose([*GIVEN, f"optimizer={option}"])
        assert words in str(caught.value) and "\n" not in str(caught.value)


def test_thaw_refuses_another_version() -> None:
    frozen = freeze(compose(GIVEN))
    with pytest.raises(UserError, match="momentun"):
        thaw(frozen | {"optimizer": {"momentun": 0.9}})
    with pytest.raises(UserError, match=r"train\.steps"):
        thaw(frozen | {"train": {"steps": "many"}})
    assert thaw({"run_dir": "x"}) == TrainConfig(run_dir="x")


def test_conf_is_found_from_a_checkout_and_from_a_wheel(tmp_path: Path) -> None:
    """As in site-packages: conf inside the package, and no folder beside it."""
    assert conf_folder() == Path(seer.__file__).parents[1] / "conf" or conf_folder().parent.name == "seer"
    shutil.copytree(Path(seer.__file__).parent, tmp_path / "seer", ignore=shutil.ignore_patterns("__pycache__", "conf"))
    shutil.copytree(conf_folder(), tmp_path / "seer" / "conf")
    (tmp_path / "elsewhere").mkdir()
    code = "from seer import compose; print(compose.conf_folder(), compose.compose(['experiment=demo']).run_dir)"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path / "elsewhere", env=environment, capture_output=True, text=True
    )
    assert found.stdout.split() == [str(tmp_path / "seer" / "conf"), "runs/demo"], found.stderr


# --- the tree conf/


@pytest.mark.parametrize("experiment", sorted(groups()["experiment"]))
def test_every_experiment_composes_and_validates(experiment: str) -> None:
    config = compose([f"experiment={experiment}", *GIVEN])
    validate(config)
    assert config.experiment == experiment
    assert thaw(freeze(config)) == config


OPTIONS = [f"{group}={option}" for group in set(groups()) - {"backbone", "experiment"} for option in groups()[group]]


@pytest.mark.parametrize("choice", sorted([*OPTIONS, "backbone=16gf", "backbone=for_32px"]))
def test_choices_compose_and_validate(choice: str) -> None:
    validate(compose([*GIVEN, choice]))


def test_every_choice_says_what_it_is() -> None:
    for group, options in groups().items():
        for option, comment in options.items():
            assert comment.endswith((".", ":")), f"{group}/{option}.yaml begins with a comment"


def test_published_recipes() -> None:
    """facebookresearch/vissl, projects/SEER/MODEL_DOCUMENTATION.md and configs/config/pretrain/seer."""
    for name, batch, peak, warmup, steps, large in (
        ("seer_256gf", 8192, 9.6, 8000, 122_070, 224),
        ("seer_10b", 7936, 9.3, 5500, 126_008, 160),
    ):
        config = compose([f"experiment={name}", *GIVEN])
        optimizer, objective, data = config.optimizer, config.objective, config.data
        assert config.backbone.name == name.removeprefix("seer_")
        assert (config.train.global_batch_size, config.train.steps, optimizer.warmup_steps) == (batch, steps, warmup)
        assert optimizer.name == "larc" and optimizer.learning_rate is None and optimizer.decay_norms_and_biases
        assert optimizer.base_learning_rate * batch / 256 == pytest.approx(peak, rel=1e-12)
        assert (optimizer.warmup_start_learning_rate, optimizer.end_learning_rate_share) == (0.15, 0.001)
        assert (optimizer.weight_decay, optimizer.momentum, optimizer.trust_coefficient) == (1e-5, 0.9, 0.001)
        assert (objective.prototypes, objective.embedding_size, objective.head_hidden_sizes) == (
            16000,
            256,
            [8192, 8192],
        )
        assert (objective.epsilon, objective.iterations, objective.temperature) == (0.03, 10, 0.1)
        assert (objective.head_batchnorm, objective.freeze_prototypes_steps, objective.queue_images) == (False, 313, 0)
        assert (data.large.count, data.large.size, data.large.min_area, data.large.max_area) == (2, large, 0.14, 1.0)
        assert (data.small.count, data.small.size, data.small.min_area, data.small.max_area) == (4, 96, 0.05, 0.14)


def test_every_backbone_of_the_family_is_a_choice() -> None:
    for name in BACKBONES:
        assert yaml.safe_load((conf_folder() / "backbone" / f"{name}.yaml").read_text()) == {"name": name}


def test_train_yaml_gives_and_explains_every_key() -> None:
    text = (conf_folder() / "train.yaml").read_text()
    given = yaml.safe_load(text)
    given.pop("defaults")
    assert given.keys() | flat(given).keys() >= key_types().keys()
    bare = [
        line
        for line in text.splitlines()
        if re.match(r"\s*[a-z_0-9]+:(\s|$)", line) and not re.search(r"\S +# \S", line)
    ]
    assert [line for line in bare if not line.endswith(":")] == []
    sections = {"defaults", *TrainConfig.__dataclass_fields__}
    assert {line.strip(": ") for line in bare} <= sections


def test_train_yaml_and_the_dataclasses_have_the_same_defaults() -> None:
    assert flat(freeze(compose(GIVEN))) | {"run_dir": "???", "data.shards": []} == flat(freeze(TrainConfig()))


def test_every_folder_with_yaml_is_a_package() -> None:
    """Without __init__.py setuptools leaves the folder out of the wheel."""
    for file in conf_folder().rglob("*.yaml"):
        assert (file.parent / "__init__.py").is_file(), file


def test_experiments_open_with_command_hardware_time_and_result() -> None:
    for name in groups()["experiment"]:
        lines = (conf_folder() / "experiment" / f"{name}.yaml").read_text().splitlines()
        comment = "\n".join(lines[: lines.index("defaults:")])
        for word in ("# Command:", "# Hardware:", "# Time:", "# Expect:"):
            assert word in comment, (name, word)
        assert f"experiment={name}" in comment

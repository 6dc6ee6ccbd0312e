"""From words on the command line to a `TrainConfig`, and from a `TrainConfig` to a file and back.

Hydra composes the YAML under ``conf/``; its override grammar, which would refuse or convert many a path and pattern
(`train-{000..127}.tar`, `~`, `2024_01`, a URL), is never shown what a user typed: each value is read by the type of its
key and handed on quoted. Without torch; Hydra is imported when something is composed.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import os
import re
import types
import typing
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from seer.config import MISSING, TrainConfig, freeze
from seer.errors import UserError, closest

# Only to recognise one that stands in a wrong place.
VERBS = ("preview", "train", "launch", "shards", "evaluate", "export", "runs", "doctor")
_BOOLEANS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


@dataclasses.dataclass(frozen=True)
class KeyType:
    """What a key takes: `kind` is str, int, float or bool; a list of it, or null besides it."""

    kind: type
    is_list: bool
    optional: bool

    @property
    def words(self) -> str:
        """For error messages: "a whole number or null"."""
        one, many = {
            str: ("a text", "texts"),
            int: ("a whole number", "whole numbers"),
            float: ("a number", "numbers"),
            bool: ("true or false", "true or false"),
        }[self.kind]
        return (f"[a,b], a list of {many}" if self.is_list else one) + (" or null" if self.optional else "")


def conf_folder() -> Path:
    """The folder of the YAML tree: `seer/conf` in an installed wheel, `conf` beside `seer` in a checkout.

    Found by place and not by importing `seer.conf`: an editable install of another checkout would answer instead.
    """
    package = Path(__file__).resolve().parent
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / "train.yaml").is_file():
            return folder
    raise UserError(f"no conf/train.yaml beside {package}", "seer reads its configuration there", "install seer again")


def groups() -> dict[str, dict[str, str]]:
    """The choices of each group of ``conf/``: group -> option -> the first comment of its file."""
    return _groups(conf_folder())


@functools.cache
def _groups(folder: Path) -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = {}
    for file in sorted(folder.glob("*/*.yaml")):
        comments = (line.lstrip("# ").rstrip() for line in file.read_text().splitlines() if line.startswith("#"))
        first = next((line for line in comments if not line.startswith("@package")), "")
        found.setdefault(file.parent.name, {})[file.stem] = first
    return found


@functools.cache
def key_types() -> dict[str, KeyType]:
    """Every dotted key of `TrainConfig` with what it takes."""
    return dict(_key_types(TrainConfig, ""))


def _key_types(section: type, prefix: str) -> typing.Iterator[tuple[str, KeyType]]:
    for name, hint in typing.get_type_hints(section).items():
        if dataclasses.is_dataclass(hint):
            assert isinstance(hint, type)
            yield from _key_types(hint, f"{prefix}{name}.")
            continue
        optional = isinstance(hint, types.UnionType)
        if optional:
            hint = next(part for part in typing.get_args(hint) if part is not types.NoneType)
        is_list = typing.get_origin(hint) is list
        yield f"{prefix}{name}", KeyType(typing.get_args(hint)[0] if is_list else hint, is_list, optional)


def compose(overrides: Sequence[str]) -> TrainConfig:
    """The configuration of these `key=value` words: names and types are right, `validation.validate` does the rest.

    Raises:
        UserError: an unknown key or choice, a wrong type, a key given twice, a missing run_dir, a word without `=`.
    """
    quoted = [quote_override(override) for override in overrides]
    _refuse_repetition(overrides)
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.config_store import ConfigStore
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

    ConfigStore.instance().store(name="seer_schema", node=TrainConfig)
    try:
        with initialize_config_dir(config_dir=str(conf_folder()), version_base="1.3"):
            config = OmegaConf.to_object(hydra_compose("train", overrides=quoted))
    except MissingMandatoryValue as error:
        key = error.full_key or "run_dir"
        raise UserError(f"{key} is missing", "it has no default", f"add {key}=runs/NAME") from None
    except (HydraException, OmegaConfBaseException) as error:
        # What the command line can do wrong was refused above; this is a file under conf/.
        raise UserError(
            _reason(error), f"a file under {conf_folder()} does not fit seer/config.py", "mend it"
        ) from error
    assert isinstance(config, TrainConfig)
    config.run_dir = os.path.expanduser(config.run_dir)
    config.data.index_dir = config.data.index_dir and os.path.expanduser(config.data.index_dir)
    config.data.cache_dir = config.data.cache_dir and os.path.expanduser(config.data.cache_dir)
    config.train.init_from = config.train.init_from and os.path.expanduser(config.train.init_from)
    return config


def quote_override(override: str) -> str:
    """`key=value` in Hydra's grammar, so that a text arrives as it was typed.

    A text is taken whole; for a list of texts `[a,b]` is several and anything else is one; where a key may be null,
    `null` is that. Choices of a group (`experiment=small`) stay as they are.

    Raises:
        UserError: no `=`, an unknown key or choice, a value that its key does not take.
    """
    key, equals, value = override.partition("=")
    if not equals:
        raise _no_assignment(override)
    if key.startswith(("+", "~")):
        raise UserError(override, "every key exists already, with a default", f"write {key.lstrip('+~')}=VALUE")
    choices = groups().get(key)
    if choices is not None:
        if value not in choices and value != "null":
            raise UserError(f"{key}={value}", f"there is no such file in conf/{key}", closest(value, choices))
        return f"{key}={value}"
    takes = key_types().get(key)
    if takes is None:
        raise _unknown_key(key)
    if takes.optional and value == "null":
        return override
    if takes.is_list:
        return f"{key}=[{','.join(_quoted(part, override, takes) for part in _parts(value))}]"
    return f"{key}={_quoted(value, override, takes)}"


def _quoted(value: str, override: str, takes: KeyType) -> str:
    """One value in Hydra's grammar."""
    if takes.kind is str:
        if value == MISSING:  # OmegaConf's mark for a missing value cannot be quoted
            raise UserError(override, "??? alone stands for a missing value", "write ./???")
        value = re.sub(r"(\\+)(?='|$)", r"\1\1", escape(value))  # Hydra reads backslashes before a quote only
        return "'" + value.replace("'", "\\'") + "'"
    try:
        if takes.kind is bool:
            return str(_BOOLEANS[value.lower()]).lower()
        return repr(takes.kind(value))
    except (KeyError, ValueError):
        key = override.partition("=")[0]
        default = json.dumps(flat(freeze(TrainConfig()))[key], separators=(",", ":"))
        remedy = f"for example {key}={default}"
        if "," in value and not takes.is_list:
            remedy = "give one value: a command is one run"
        elif takes.kind is int and re.fullmatch(r"\d+(\.0*)?(e\+?\d{1,2})?", value.lower()):
            remedy = f"write {int(float(value))}"
        raise UserError(override, f"it takes {takes.words}", remedy) from None


def escape(text: str) -> str:
    """The text so that OmegaConf finds no interpolation in it: `\\${` for `${`, backslashes before it doubled."""
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", text)


def _parts(value: str) -> list[str]:
    """`[a,b]` as its parts, anything else as one part, nothing as none.

    Commas inside {}, [] or quotes do not part; quotes around a whole part fall away.
    """
    if not value:
        return []
    if not (value.startswith("[") and value.endswith("]")):
        return [value]
    parts, depth, quote = [""], 0, ""
    for letter in value[1:-1]:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"" and not parts[-1].strip():
            quote = letter
        elif letter in "{[":
            depth += 1
        elif letter in "}]":
            depth -= 1
        if letter == "," and depth <= 0 and not quote:
            parts.append("")
        else:
            parts[-1] += letter
    stripped = [part.strip() for part in parts]
    if stripped == [""]:
        return []
    return [part[1:-1] if len(part) > 1 and part[0] == part[-1] and part[0] in "'\"" else part for part in stripped]


def _no_assignment(word: str) -> UserError:
    rule = "what follows the verb is KEY=VALUE"
    if word in VERBS:
        return UserError(word, rule, f"a verb comes first: seer {word} ...")
    if word.startswith("-"):
        return UserError(word, rule, "there is no such option; --help lists them")
    if word in groups() or word in key_types():
        return UserError(word, rule, f"write {word}=VALUE")
    if word in groups()["experiment"]:
        return UserError(word, rule, f"write experiment={word}")
    if "/" in word or word.endswith(".tar") or os.path.exists(word):
        return UserError(word, rule, f"shards are given in quotes as data.shards='{word}'")
    return UserError(word, rule, f"write {_nearest_key(word) or 'KEY'}=VALUE")


def _unknown_key(key: str) -> UserError:
    inside = [name for name in key_types() if name.startswith(f"{key}.")]
    if inside:
        return UserError(key, "it holds other keys", f"give one of them: {', '.join(inside[:4])} ...")
    near = _nearest_key(key)
    remedy = f"did you mean {near!r}?" if near else "`seer train --help` lists all keys"
    return UserError(f"{key or '(nothing)'} before '='", "there is no such key", remedy)


def _nearest_key(key: str) -> str | None:
    """The key that was meant: spelt nearly so, or with the same last part (`epsilon` for `objective.epsilon`)."""
    known = [*key_types(), *groups()]
    last = key.rpartition(".")[2]
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.75)
    near = near or [name for name in known if name.rpartition(".")[2] == last]
    near = near or difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    if not near:
        parts = {name.rpartition(".")[2]: name for name in known}
        near = [parts[part] for part in difflib.get_close_matches(last, parts, n=1, cutoff=0.75)]
    return near[0] if near else None


def _refuse_repetition(overrides: Sequence[str]) -> None:
    counts = Counter(override.partition("=")[0] for override in overrides)
    key, count = max(counts.items(), key=lambda item: item[1], default=("", 0))
    if count > 1:
        given = [override.partition("=")[2] for override in overrides if override.startswith(f"{key}=")]
        what = f"{key} is given {count} times ({given[0]}, {given[1]}{', ...' if count > 2 else ''})"
        if key in key_types() and key_types()[key].is_list:
            rule = "a key is given once, and the shell makes several words of {000..127} that stands outside of quotes"
            raise UserError(what, rule, f"write {key}='PATTERN' with the quotes, or {key}='[a,b]'")
        raise UserError(what, "a key is given once", f"leave {count - 1} of them out")


def _reason(error: BaseException) -> str:
    """Hydra's or OmegaConf's message as one line: the key, and the file where the first line says no more than that."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    key = re.search(r"full_key: (\S+)", str(error))
    return " ".join(([f"{key[1]}:"] if key else []) + lines[: 2 if lines[0].endswith(":") else 1])


def thaw(frozen: Mapping[str, Any]) -> TrainConfig:
    """The configuration from plain containers; what they do not mention has its default.

    Raises:
        UserError: a key that this version does not know, or a value of another type.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(TrainConfig), _escaped(frozen)))
    except OmegaConfBaseException as error:
        raise UserError(_reason(error), "the saved configuration is of another version", "use that version") from None
    assert isinstance(config, TrainConfig)
    return config


def _escaped(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _escaped(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_escaped(part) for part in value]
    return escape(value) if isinstance(value, str) else value


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A tree of sections as dotted keys: {"train": {"steps": 6}} is {"train.steps": 6}."""
    keys: dict[str, Any] = {}
    for name, value in tree.items():
        keys |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return keys

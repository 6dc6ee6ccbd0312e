"""What a run's config.yaml holds: the composed configuration, what was derived from it, what batches are made of."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from seer.errors import UserError, shown

_HEAD = """\
# Written by seer; the run goes on from these values. `config` is what was composed, `hash` its SHA-256,
# `resolved` what was derived from it and why, `data` what the batches were made of.
"""


def contents(
    config: Mapping[str, Any], resolved: Mapping[str, Any] | None = None, data: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """What there is to write, without what is secret in addresses; the arguments are those of `RunDirectory.record`."""
    plain = _without_secrets(config)
    frozen: dict[str, Any] = {"config": plain}
    frozen = {"hash": _hash(frozen)} | frozen
    if resolved:
        frozen["resolved"] = {key: {"value": at.value, "reason": at.reason} for key, at in resolved.items()}
    if data:
        # Through JSON, so that tuples and lists compare alike after reading.
        frozen["data"] = json.loads(json.dumps(dict(data)))
    return frozen


def as_text(frozen: Mapping[str, Any]) -> str:
    """The YAML that `read` reads."""
    return _HEAD + yaml.safe_dump(dict(frozen), sort_keys=False, allow_unicode=True, width=120)


def read(file: Path) -> dict[str, Any] | None:
    """What a config.yaml holds, None where there is none.

    Raises:
        UserError: it cannot be read, was cut or was edited.
    """
    remedy = "delete the folder to start anew, or name another run_dir"
    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror})", "it is a run's configuration", remedy) from None
    except (yaml.YAMLError, UnicodeDecodeError):
        found = None
    if not isinstance(found, dict) or not isinstance(found.get("config"), dict) or _hash(found) != found.get("hash"):
        raise UserError(f"{file} is no configuration of a run", "it is written by seer and not edited", remedy)
    return found


def _hash(frozen: Mapping[str, Any]) -> str:
    """SHA-256 of the configuration: tells a file that was cut or edited."""
    return hashlib.sha256(json.dumps(frozen["config"], sort_keys=True, default=str).encode()).hexdigest()


def _without_secrets(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_secrets(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_secrets(inner) for inner in value]
    return shown(value) if isinstance(value, str) else value

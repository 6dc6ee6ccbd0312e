"""Who may import whom (docs/architecture.md): from floors below, never up, never sideways."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import seer

ROOT = Path(seer.__file__).parent
FLOORS = {
    "cli": 6,
    "training": 5,
    "evaluation": 4,
    "handoff": 4,
    "launching": 4,
    "build": 3,
    "checkpoint": 2,
    "observe": 2,
    "shards": 1,
    "data": 1,
    "backbones": 1,
    "objectives": 1,
    "optim": 1,
    "parallel": 1,
}
ENTRY = "__main__"  # `python -m seer`: calls the command line and is imported by nobody
# What a data worker, the launcher and `--help` import: they start in a fraction of the time that torch takes to import.
WITHOUT_TORCH = (
    *("__init__", "errors", "config", "compose", "keyed_random", "shard_index", "files", "run_directory", "run_lock"),
    *("amounts", "frozen_config", "remote_clients"),
    *("remote", "run_agreement", "shard_list", "shard_manifest", "shard_patterns", "wids_json", "decoders"),
    *("validation", "derived", "source_list", "rank_environment", "pictures", "observe/preview"),
    *(
        f"data/{name}"
        for name in (
            "__init__",
            "order",
            "growth",
            "mixture",
            "history",
            "decode",
            "crops",
            "cutters",
            "sources",
            "photometric_parameters",
        )
    ),
    *("data/ahead", "data/assembly", "data/pool", "data/ring", "data/worker", "data/worker_process"),
    *("data/shard_cache", "data/fetching"),
    *("cli/__init__", "cli/main", "cli/arguments", "cli/launch", "cli/train", "cli/runs", "cli/doctor", "cli/preview"),
    *(f"launching/{name}" for name in ("cluster", "entry", "finished", "folder", "follow", "local", "placement")),
    *(f"launching/{name}" for name in ("buckets", "machine", "machine_facts", "slurm", "submission", "tail")),
)


def modules() -> dict[str, Path]:
    """Dotted name below seer -> file; a package's own file has the package's name."""
    found = {}
    for file in ROOT.rglob("*.py"):
        parts = file.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)] = file
    return found


def imports(source: str) -> Iterator[str]:
    """What a file imports of seer, wherever in it, as dotted names below seer ("data.crops.CropSpec")."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (name.removeprefix("seer.") for name in names if name.startswith("seer."))


def fault(importer: str, imported: str) -> str | None:
    """Why this import is forbidden, or None."""
    room, other = importer.partition(".")[0], imported.partition(".")[0]
    if room == other or importer == ENTRY:
        return None
    if other not in FLOORS:
        return None  # the ground: errors, config, the version
    own, its = FLOORS.get(room, 0), FLOORS[other]
    if its < own:
        return None
    return f"seer.{importer} (floor {own}) imports seer.{imported} (floor {its})"


@pytest.mark.parametrize(
    ("importer", "imported", "allowed"),
    [
        ("training.loop", "build.learner", True),
        ("data.stream", "shard_list.ShardList", True),
        ("data.stream", "data.order.ShardOrder", True),
        ("build", "optim.larc.LARC", True),
        ("config", "errors.UserError", True),
        ("optim.larc", "build", False),
        ("objectives.swav", "backbones.regnet", False),
        ("evaluation.knn", "handoff.timm_format", False),
        ("config", "data.crops", False),
    ],
)
def test_rule(importer: str, imported: str, allowed: bool) -> None:
    assert (fault(importer, imported) is None) == allowed


def test_no_import_goes_up_or_sideways() -> None:
    faults = [
        found for name, file in modules().items() for what in imports(file.read_text()) if (found := fault(name, what))
    ]
    assert faults == []


def test_every_room_has_a_floor() -> None:
    packages = {folder.name for folder in ROOT.iterdir() if (folder / "__init__.py").is_file()} - {"conf"}
    assert packages <= FLOORS.keys()


def test_the_page_names_every_module_and_none_that_is_gone() -> None:
    """A row of the table of floors is of a package, of `build.py` or of the ground."""
    there = {name: set[str]() for name in (*FLOORS, "ground")}
    for name in modules().keys() - {"__init__", ENTRY}:
        room, _, module = name.partition(".")
        if module or room not in FLOORS:
            there[room if module else "ground"].add(module or room)
    there["build"] = {"build"}
    named = {name: set[str]() for name in there}
    for line in (ROOT.parent / "docs" / "architecture.md").read_text().splitlines():
        if row := re.match(r"\| \d \| (?:`(\w+)(?:/|\.py)` \|)?", line):
            named[row[1] or "ground"] |= set(re.findall(r"`(\w+)\.py`", line))
    assert named == there


PAGES = [page for folder in (".", "docs", "benchmarks", "data_shards") for page in (ROOT.parent / folder).glob("*.md")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_name_scripts_and_modules_that_are_there(page: Path) -> None:
    files = [
        f"/{file.relative_to(ROOT.parent)}"
        for folder in ("seer", "tests", "benchmarks", "launch", "data_shards")
        for file in (ROOT.parent / folder).rglob("*.*")
    ]
    words = {word.lstrip("./") for word in re.findall(r"[\w./-]*\w\.(?:py|sh)\b", page.read_text())}
    assert [word for word in words - {"utils.py"} if not any(file.endswith(f"/{word}") for file in files)] == []


def test_ground_has_no_cycle() -> None:
    ground = {name: file for name, file in modules().items() if "." not in name and name not in (*FLOORS, ENTRY)}
    graph = {
        name: {what.partition(".")[0] for what in imports(file.read_text())} & ground.keys() - {name}
        for name, file in ground.items()
    }
    order = list(TopologicalSorter(graph).static_order())  # raises CycleError
    assert set(order) >= {"errors", "config", "compose"}


@pytest.mark.parametrize("name", WITHOUT_TORCH)
def test_imports_no_torch(name: str) -> None:
    """At the top of the file, that is: what a function imports when it is called is its own affair."""
    tree = ast.parse((ROOT / f"{name}.py").read_text())
    roots = set()
    for node in tree.body:
        if isinstance(node, ast.Import):
            roots |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            roots.add(str(node.module).partition(".")[0])
    assert not roots & {"torch", "torchvision", "timm", "webdataset", "hydra", "omegaconf", "submitit"}


def test_core_imports_neither_torchvision_nor_timm() -> None:
    for name, file in modules().items():
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                roots = {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                roots = {str(node.module).partition(".")[0]}
            else:
                continue
            assert not roots & {"torchvision", "timm"}, name

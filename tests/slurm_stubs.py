"""Programs that play SLURM or a GPU machine: small scripts that note their arguments and say what a test wants."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import yaml

from seer.config import TrainConfig

# Two nodes with 8 GPUs, one with 4 and more cores in the same partition; a partition of CPUs; one GPU for tries.
CLUSTER = (
    "gpu*|2|gpu:a100:8(S:0-1)|2-00:00:00|64\ngpu*|1|gpu:4|2-00:00:00|96\n"
    "cpu|9|(null)|infinite|16\ncpu|1|(null)|infinite|32\nshort|1|gpu:1|30:00|8\n"
)
NO_GPUS = "debug*|2|(null)|infinite|4\n"


class Programs:
    """The only programs on PATH, in a folder of their own."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        folder.mkdir()
        monkeypatch.setenv("PATH", str(folder))
        for name in ("CUDA_VISIBLE_DEVICES", "SBATCH_PARTITION", "SEER_LAUNCHER", "PYTHONPATH", "OMP_NUM_THREADS"):
            monkeypatch.delenv(name, raising=False)

    def add(self, name: str, says: str = "", *, complains: str = "", code: int = 0, first: str = "") -> None:
        """A program that says this; `first` is shell, without other programs, that runs before."""
        note = f'for word in "$@"; do printf \'%s\\t\' "$word"; done >>{shlex.quote(str(self.folder / name))}.calls'
        file = self.folder / name
        file.write_text(
            f"#!/bin/sh\n{note}\necho >>{shlex.quote(str(self.folder / name))}.calls\n{first}\n"
            f"printf %s {shlex.quote(says)}\nprintf %s {shlex.quote(complains)} >&2\nexit {code}\n"
        )
        file.chmod(0o755)

    def calls(self, name: str) -> list[list[str]]:
        """The arguments of each call."""
        file = self.folder / f"{name}.calls"
        return [line.split("\t")[:-1] for line in file.read_text().splitlines()] if file.exists() else []

    def cluster(self, sinfo: str = CLUSTER) -> None:
        """All of SLURM that a launch calls; the job's number is 17."""
        self.add("sinfo", sinfo)
        self.add("sbatch", "Submitted batch job 17\n")
        self.add("srun")
        self.add("squeue")


def configured(*words: str) -> TrainConfig:
    """The defaults with some SECTION.KEY=VALUE, without Hydra, which takes a third of a second."""
    config = TrainConfig(run_dir="r")
    config.data.shards = ["s.tar"]
    for word in words:
        key, _, value = word.partition("=")
        section, _, name = key.partition(".")
        assert hasattr(getattr(config, section), name)
        setattr(getattr(config, section), name, yaml.safe_load(value))
    return config

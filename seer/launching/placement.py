"""How many processes a run will be, and what each of them computes on."""

from __future__ import annotations

from dataclasses import dataclass

from seer.config import TrainConfig

CPU_PROCESSES = 2  # a machine where there are no GPUs to count


@dataclass(frozen=True)
class Placement:
    """Processes on machines.

    Attributes:
        nodes: machines.
        per_node: processes of each.
        gpus: whether each process has a GPU of its own; else it computes on the CPU.
    """

    nodes: int
    per_node: int
    gpus: bool

    @property
    def world_size(self) -> int:
        """Processes in all."""
        return self.nodes * self.per_node

    @property
    def words(self) -> str:
        """For people: "2 nodes x 8 GPUs"."""
        unit = "GPU" if self.gpus else "CPU process"
        many = f"{self.per_node} {unit}{'' if self.per_node == 1 else 'es' if unit.endswith('s') else 's'}"
        return f"{self.nodes} node{'' if self.nodes == 1 else 's'} x {many}"


def processes_wanted(config: TrainConfig) -> int | None:
    """Processes a machine as the configuration asks for them, or None: what is there."""
    if config.launch.gpus_per_node is None and config.parallel.strategy == "single":
        return 1
    return config.launch.gpus_per_node

"""What a report says of the machine that it was made on."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path


def machine(*packages: str) -> dict[str, str | int | None]:
    """Name of the CPU, number of cores, and the versions of torch and of other packages."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    versions = {package: version(package) for package in ("torch", *packages)}
    return {"cpu": names[0] if names else platform.processor(), "cores": os.cpu_count(), **versions}

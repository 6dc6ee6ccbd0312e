"""What can be found out about this machine in a few seconds (without torch until it is asked which torch there is)."""

from __future__ import annotations

import array
import contextlib
import fcntl
import io
import os
import shutil
import socket
import struct
import subprocess
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, metadata, version
from pathlib import Path

import numpy as np

from seer.decoders import installed_decoders

SLURM_SECONDS = 2.0
_IMAGES_TRIED = 30


@dataclass(frozen=True)
class Gpu:
    """A CUDA device: name, memory in bytes, compute capability such as (9, 0)."""

    name: str
    memory: int
    capability: tuple[int, int]


def interfaces() -> dict[str, str]:
    """IPv4 addresses by the name of their network interface; none where the system cannot be asked so."""
    request = 0x8915  # SIOCGIFADDR of Linux
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            asked = array.array("B", struct.pack("256s", name.encode()[:15]))
            with contextlib.suppress(OSError):  # without an address
                fcntl.ioctl(probe.fileno(), request, asked)
                found[name] = socket.inet_ntoa(asked[20:24].tobytes())
    return found


def addresses(host: str) -> list[str]:
    """What a host name maps to, IPv4 and IPv6, each once; none where it is not known."""
    try:
        return list(dict.fromkeys(str(entry[4][0]) for entry in socket.getaddrinfo(host, None)))
    except OSError:
        return []


def torch() -> tuple[str | None, bool, list[Gpu], str | None]:
    """Version, whether it was built for CUDA, the GPUs, NCCL's version."""
    try:
        import torch as library
    except (ImportError, OSError):  # OSError: a library that it loads is missing
        return None, False, [], None
    found = []
    if library.cuda.is_available():
        for number in range(library.cuda.device_count()):
            about = library.cuda.get_device_properties(number)
            found.append(Gpu(about.name, about.total_memory, (about.major, about.minor)))
    nccl = None
    if found and library.distributed.is_available() and library.distributed.is_nccl_available():
        nccl = ".".join(map(str, library.cuda.nccl.version()))  # type: ignore[no-untyped-call]  # torch has no types there
    return library.__version__, library.version.cuda is not None, found, nccl


def cpu_flags() -> frozenset[str]:
    """What the CPU can, as Linux calls it."""
    for line in _text(Path("/proc/cpuinfo")).splitlines():
        if line.startswith("flags"):
            return frozenset(line.partition(":")[2].split())
    return frozenset()


def core_quota() -> float | None:
    """Cores whose time this container may use (cgroup v2, then v1), None without limit."""
    share, _, period = _text(Path("/sys/fs/cgroup/cpu.max")).partition(" ")
    if not share:
        share, period = (_text(Path(f"/sys/fs/cgroup/cpu/cpu.cfs_{name}_us")) for name in ("quota", "period"))
    try:
        return int(share) / int(period) if int(share) > 0 else None
    except ValueError:  # "max", or no such file
        return None


def memory() -> tuple[int, int]:
    """Bytes in all and available: of the machine, or what the container's limit leaves."""
    lines = dict(line.split(":", 1) for line in _text(Path("/proc/meminfo")).splitlines())
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    total = int(lines["MemTotal"].split()[0]) * 1024 if "MemTotal" in lines else pages
    available = int(lines["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in lines else total
    with contextlib.suppress(ValueError):  # "max", or no such file
        limit = int(_text(Path("/sys/fs/cgroup/memory.max")))
        used = int(_text(Path("/sys/fs/cgroup/memory.current")))
        total, available = min(total, limit), min(available, max(0, limit - used))
    return total, available


def pillow() -> tuple[str | None, str | None, list[str]]:
    """Version, flavour of pillow-simd, formats that are missing."""
    try:
        import PIL
        from PIL import features
    except ImportError:
        return None, None, []
    missing = [name for name, key in (("JPEG", "jpg"), ("PNG", "zlib"), ("WebP", "webp")) if not features.check(key)]
    try:
        version("pillow-simd")
    except PackageNotFoundError:
        return PIL.__version__, None, missing
    flavour = "unknown flavour"
    with contextlib.suppress(PackageNotFoundError):  # the installer's shim says how it was compiled
        summary = metadata("pillow")["Summary"] or ""
        flavour = next((name for name in ("avx2", "sse4") if name in summary), flavour)
    return PIL.__version__, flavour, missing


def images_a_second() -> dict[str, float]:
    """Of a photograph's size and the default crops, on one core, by each decoder that is installed."""
    try:
        from PIL import Image

        from seer.data.crops import DRAWS, CropSpec, plan_crops
        from seer.data.cutters import cutter_of
        from seer.data.decode import open_image
    except ImportError:
        return {}
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (40, 54, 3), np.uint8))
    file = io.BytesIO()
    coarse.resize((500, 375), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    specs = [CropSpec(2, 224, 0.14, 1.0), CropSpec(4, 96, 0.05, 0.14)]
    plan = plan_crops(np.array([[500, 375]]), specs, rng.random((1, 6, DRAWS)), 0.5)
    out = [np.zeros((spec.count, spec.size, spec.size, 3), np.uint8) for spec in specs]
    found = {}
    for name in installed_decoders():
        cut = cutter_of(name)
        for images in (1, _IMAGES_TRIED):  # the first one warms up
            began = time.thread_time()
            for _ in range(images):
                cut(open_image(file.getvalue()), 1.0, plan.boxes[0], plan.flips[0], specs, out, 0)
        found[name] = images / (time.thread_time() - began)
    return found


def disk(folder: Path) -> tuple[int, int] | None:
    """Size and free bytes of the disk of a folder, None where it cannot be looked at."""
    try:
        found = shutil.disk_usage(folder)
    except OSError:
        return None
    return found.total, found.free


def slurm() -> tuple[str | None, str | None, list[str] | None]:
    """Where sbatch is, its version, names of partitions."""
    sbatch = shutil.which("sbatch")
    answer = _said("sinfo", "--noheader", "--format=%R") if sbatch else None
    if answer is None:
        return sbatch, None, None
    return sbatch, _said("sbatch", "--version"), list(dict.fromkeys(answer.split()))


def _said(*words: str) -> str | None:
    """What a program printed; None where it failed or took too long."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=SLURM_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _text(file: Path) -> str:
    try:
        return file.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return ""

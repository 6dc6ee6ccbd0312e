"""What this machine offers to a run, and what to mend: one function a subject judges the facts."""

from __future__ import annotations

import ipaddress
import os
import platform
import resource
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import seer
from seer.decoders import PILLOW_SIMD, missing_speed
from seer.launching import machine_facts as facts
from seer.launching.machine_facts import Gpu

GIB = 1 << 30


@dataclass(frozen=True)
class Finding:
    """One line of `seer doctor`.

    Attributes:
        subject: what was looked at.
        level: `ok`; `warning`: works, but slowly or not everywhere; `problem`: runs would fail.
        message: what is there.
        remedy: what to do; None where nothing is to be done.
    """

    subject: str
    level: Literal["ok", "warning", "problem"]
    message: str
    remedy: str | None = None


def look(folder: Path) -> list[Finding]:
    """Everything that can be found out in a few seconds.

    Args:
        folder: whose disk is looked at.
    """
    torch_version, cuda_build, found, nccl_version = facts.torch()
    granted = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    flags = facts.cpu_flags()
    return [
        Finding("machine", "ok", f"{platform.system()} {platform.release()}, {platform.machine()}"),
        cores(granted, os.cpu_count() or granted, facts.core_quota()),
        memory(*facts.memory()),
        python(sys.version_info[:2]),
        Finding("seer", "ok", f"{seer.__version__} in {Path(seer.__file__).parent}"),
        torch(torch_version),
        gpus(found, nccl_version, cuda_build=cuda_build, driver=Path("/proc/driver/nvidia/version").exists()),
        bf16(found, flags),
        images(*facts.pillow(), cpu_has_avx2="avx2" in flags),
        decoder(facts.images_a_second(), machine=platform.machine()),
        shared_memory(facts.disk(Path("/dev/shm"))),
        open_files(*resource.getrlimit(resource.RLIMIT_NOFILE)),
        disk(folder, facts.disk(folder)),
        slurm(*facts.slurm()),
        network(socket.gethostname(), facts.addresses(socket.gethostname()), facts.interfaces()),
        tensorboard(find_spec("tensorboard") is not None),
        threads(os.environ, granted),
    ]


def cores(granted: int, there: int, quota: float | None) -> Finding:
    """Cores that this process may use; a container's quota of time (None: none) binds, but is not counted as cores."""
    words = f"{granted} of {there}" if granted < there else str(there)
    if quota is not None and quota < granted:
        return Finding(
            "cores",
            "warning",
            f"{words}, but this container may use the time of {quota:g} only",
            f"give it whole cores (docker run --cpuset-cpus), or set train.threads and data.workers for {quota:g}",
        )
    return Finding("cores", "ok", words)


def memory(total: int, available: int) -> Finding:
    """Main memory in bytes, within the container's limit."""
    words = f"{available / GIB:.1f} GiB available of {total / GIB:.1f}"
    if available < 2 * GIB:
        return Finding("memory", "warning", words, "end other programs, or ask for more: launch.memory_per_node_gb")
    return Finding("memory", "ok", words)


def python(found: tuple[int, ...]) -> Finding:
    """Major and minor version."""
    words = ".".join(map(str, found))
    if (3, 11) <= found <= (3, 13):
        return Finding("python", "ok", words)
    return Finding("python", "problem", f"{words} is not one of 3.11 to 3.13", "make test PYTHON=python3.12 in a clone")


def torch(found: str | None) -> Finding:
    """torch's version, None where it cannot be imported."""
    remedy = "pip install 'torch>=2.11,<2.14'"
    if found is None:
        return Finding("torch", "problem", "it cannot be imported", remedy)
    number = tuple(int(part) for part in found.split("+")[0].split(".")[:2] if part.isdecimal())
    if (2, 11) <= number <= (2, 13):
        return Finding("torch", "ok", found)
    return Finding("torch", "problem", f"{found} is not one of 2.11 to 2.13", remedy)


def gpus(found: Sequence[Gpu], nccl: str | None, *, cuda_build: bool, driver: bool) -> Finding:
    """CUDA devices that torch sees; `driver`: NVIDIA's is loaded, `cuda_build`: torch was built for it."""
    if found:
        kinds = {(gpu.name, round(gpu.memory / GIB)) for gpu in found}
        words = ", ".join(
            f"{sum((gpu.name, round(gpu.memory / GIB)) == kind for gpu in found)} x {kind[0]} ({kind[1]} GiB)"
            for kind in sorted(kinds)
        )
        if nccl is None and len(found) > 1:
            return Finding("devices", "warning", f"{words}, without NCCL", "install a torch for Linux with CUDA")
        return Finding("devices", "ok", f"{words}, NCCL {nccl}")
    if driver and not cuda_build:
        what = "there is an NVIDIA driver, but this torch is for CPUs"
        return Finding("devices", "warning", what, "install a torch with CUDA (pytorch.org)")
    if driver:
        what = "there is an NVIDIA driver, but torch sees no GPU"
        return Finding("devices", "warning", what, "look at nvidia-smi, CUDA_VISIBLE_DEVICES, docker run --gpus all")
    return Finding("devices", "ok", "no GPU: runs train on the CPU")


def bf16(found: Sequence[Gpu], flags: frozenset[str]) -> Finding:
    """Whether train.precision=bf16, the default, is computed by the hardware; `flags` of the CPU."""
    if found:
        old = sorted({gpu.name for gpu in found if gpu.capability < (8, 0)})
        if old:
            return Finding("bf16", "warning", f"{', '.join(old)}: not in hardware", "use train.precision=fp32")
        return Finding("bf16", "ok", "in hardware, on the GPU")
    ways = sorted(flags & {"avx512_bf16", "amx_bf16"})
    if ways:
        return Finding("bf16", "ok", f"in hardware, on the CPU ({', '.join(ways)})")
    return Finding("bf16", "warning", "this CPU imitates it, slower than fp32", "use train.precision=fp32")


def images(pillow: str | None, simd: str | None, missing: Sequence[str], *, cpu_has_avx2: bool) -> Finding:
    """The image library: version, pillow-simd's flavour (`avx2`, `sse4`; None: the plain Pillow), formats it lacks."""
    if pillow is None:
        return Finding("images", "problem", "Pillow cannot be imported", "pip install 'pillow>=11'")
    words = f"Pillow {pillow}" if simd is None else f"pillow-simd {pillow} ({simd})"
    if missing:
        remedy = "pip install --force-reinstall pillow" if simd is None else PILLOW_SIMD
        return Finding("images", "problem", f"{words} without {', '.join(missing)}", remedy)
    if simd == "avx2" and not cpu_has_avx2:
        return Finding(
            "images", "problem", f"{words} on a CPU without AVX2 ends with SIGILL", f"{PILLOW_SIMD} --no-avx2"
        )
    if cpu_has_avx2 and simd not in (None, "avx2"):
        return Finding("images", "warning", f"{words} on a CPU with AVX2", PILLOW_SIMD)
    return Finding("images", "ok", words)


def decoder(speeds: Mapping[str, float], *, machine: str) -> Finding:
    """What makes the crops under data.decoder=auto; images a second and core of each one installed, the first first."""
    if not speeds:
        return Finding("decoder", "problem", "none works", "look at images above")
    installed = list(speeds)
    words = ", ".join(f"{name} {speed:,.0f}" for name, speed in speeds.items())
    words = f"{installed[0]}; crops of images a second and core: {words}"
    if installed[0] == "simplejpeg" and machine == "x86_64":
        what = f"{words}; with pillow-simd too, workers started anew need no torch"
        return Finding("decoder", "ok", what, PILLOW_SIMD)
    if (faster := missing_speed(installed)) is not None:
        what, command = faster
        return Finding("decoder", "warning" if installed == ["pillow"] else "ok", f"{words}; {what}", command)
    return Finding("decoder", "ok", words)


def shared_memory(found: tuple[int, int] | None) -> Finding:
    """Size and free bytes of /dev/shm, through which NCCL connects the GPUs of a machine."""
    if found is None:
        return Finding("/dev/shm", "ok", "not here")
    size, free = found
    words = f"{free / GIB:.2f} GiB free of {size / GIB:.2f}"
    if size < GIB:
        return Finding("/dev/shm", "warning", words, "docker run --shm-size=8g")
    if free < GIB // 2:
        return Finding("/dev/shm", "warning", words, "remove what dead programs left in /dev/shm")
    return Finding("/dev/shm", "ok", words)


def open_files(soft: int, hard: int) -> Finding:
    """Limits of open files; each data worker keeps up to 128 shards open."""
    unlimited = resource.RLIM_INFINITY
    words = "unlimited" if soft == unlimited else f"{soft:,}"
    if soft != unlimited and soft < 1024:
        most = "65536" if hard == unlimited else str(hard)
        return Finding("open files", "warning", f"at most {words}", f"ulimit -n {most}")
    return Finding("open files", "ok", f"at most {words}")


def disk(folder: Path, found: tuple[int, int] | None) -> Finding:
    """Size and free bytes of the disk of a folder."""
    if found is None:
        return Finding("disk", "problem", f"{folder} cannot be looked at", "go to a folder that exists")
    words = f"{found[1] / GIB:.1f} GiB free of {found[0] / GIB:.1f} at {folder}"
    if found[1] < GIB:
        return Finding("disk", "problem", words, "free some space, or name a run_dir on another disk")
    if found[1] < 10 * GIB:
        return Finding("disk", "warning", words, "checkpoints may not fit: free some space, or use another disk")
    return Finding("disk", "ok", words)


def slurm(sbatch: str | None, found: str | None, partitions: Sequence[str] | None) -> Finding:
    """Where sbatch is, SLURM's version, the partitions (None: no controller answered in time)."""
    if sbatch is None:
        return Finding("slurm", "ok", "no sbatch here: launch=local is there, launch=slurm is not")
    if partitions is None:
        what = f"{sbatch} is here, but no controller answers within {facts.SLURM_SECONDS:g} s"
        return Finding("slurm", "warning", what, "look at `scontrol ping` and SLURM_CONF; launch=local works")
    if not partitions:
        return Finding("slurm", "warning", f"{found} shows no partition", "ask who runs the cluster for access")
    return Finding("slurm", "ok", f"{found}, partitions: {', '.join(partitions)}")


def network(host: str, addresses: Sequence[str], known: Mapping[str, str]) -> Finding:
    """The addresses that the host name maps to, which other machines are told; interfaces with their addresses."""
    outside = {name: address for name, address in known.items() if not _is_loopback(address)}
    listed = ", ".join(f"{name} {address}" for name, address in outside.items()) or "no interface leads outside"
    if addresses and not any(map(_is_loopback, addresses)):
        return Finding("network", "ok", f"{host} is {', '.join(addresses)} ({listed})")
    where = f"{host} maps to {', '.join(addresses) or 'no address'}"
    if not outside:
        return Finding("network", "ok", f"{where}, {listed}: runs stay on this machine")
    what = f"{where}: processes on other machines would not find this one ({listed})"
    return Finding("network", "warning", what, f"for launch.nodes > 1: launch.network_interface={next(iter(outside))}")


def tensorboard(there: bool) -> Finding:
    """The optional extra."""
    if there:
        return Finding("tensorboard", "ok", "installed")
    return Finding("tensorboard", "ok", "not installed; with it a run writes event files", "pip install tensorboard")


def threads(environ: Mapping[str, str], granted: int) -> Finding:
    """OMP_NUM_THREADS against the cores granted."""
    given = environ.get("OMP_NUM_THREADS")
    if given is None:
        return Finding("threads", "ok", "OMP_NUM_THREADS is not set: train.threads decides")
    if given.isdecimal() and int(given) > granted:
        words = f"OMP_NUM_THREADS={given} on {granted} core{'' if granted == 1 else 's'}"
        return Finding("threads", "warning", words, "unset OMP_NUM_THREADS")
    return Finding("threads", "ok", f"OMP_NUM_THREADS={given}; in training train.threads decides")


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address.partition("%")[0]).is_loopback
    except ValueError:
        return False

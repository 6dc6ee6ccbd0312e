"""From facts to findings: what is right is told, what is not has its remedy."""

from __future__ import annotations

import os
import resource
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from seer.decoders import installed_decoders
from seer.launching import machine, machine_facts
from seer.launching.machine import GIB, Finding
from seer.launching.machine_facts import Gpu

H100 = Gpu("H100", 80 * GIB, (9, 0))
V100 = Gpu("V100", 16 * GIB, (7, 0))
NONE: frozenset[str] = frozenset()
ETH = {"lo": "127.0.0.1", "eth0": "10.0.0.5"}
HERE = Path("/here")


@pytest.mark.parametrize(
    ("finding", "level", "words"),
    [
        (machine.cores(8, 8, None), "ok", "8"),
        (machine.cores(4, 64, None), "ok", "4 of 64"),
        (machine.cores(64, 64, 2.0), "warning", "time of 2 only"),
        (machine.cores(2, 64, 2.0), "ok", "2 of 64"),
        (machine.memory(64 * GIB, 32 * GIB), "ok", "32.0 GiB available of 64.0"),
        (machine.memory(64 * GIB, GIB), "warning", "launch.memory_per_node_gb"),
        (machine.python((3, 11)), "ok", "3.11"),
        (machine.python((3, 13)), "ok", "3.13"),
        (machine.python((3, 10)), "problem", "3.11 to 3.13"),
        (machine.python((3, 14)), "problem", "3.11 to 3.13"),
        (machine.torch("2.11.0+cu128"), "ok", "2.11.0+cu128"),
        (machine.torch("2.13.1"), "ok", "2.13.1"),
        (machine.torch("2.14.0a0+git1"), "problem", "torch>=2.11,<2.14"),
        (machine.torch("2.9.0"), "problem", "torch>=2.11,<2.14"),
        (machine.torch(None), "problem", "cannot be imported"),
        (machine.gpus([H100, H100], "2.27", cuda_build=True, driver=True), "ok", "2 x H100 (80 GiB), NCCL 2.27"),
        (machine.gpus([H100, V100], None, cuda_build=True, driver=True), "warning", "without NCCL"),
        (machine.gpus([], None, cuda_build=False, driver=False), "ok", "CPU"),
        (machine.gpus([], None, cuda_build=False, driver=True), "warning", "torch with CUDA"),
        (machine.gpus([], None, cuda_build=True, driver=True), "warning", "CUDA_VISIBLE_DEVICES"),
        (machine.bf16([H100], NONE), "ok", "GPU"),
        (machine.bf16([H100, V100], NONE), "warning", "V100"),
        (machine.bf16([], frozenset({"avx512_bf16", "avx2"})), "ok", "avx512_bf16"),
        (machine.bf16([], frozenset({"avx2"})), "warning", "train.precision=fp32"),
        (machine.images("12.1", "avx2", [], cpu_has_avx2=True), "ok", "pillow-simd 12.1 (avx2)"),
        (machine.images("12.1", None, [], cpu_has_avx2=False), "ok", "Pillow 12.1"),
        (machine.images("12.1", "sse4", [], cpu_has_avx2=True), "warning", "install_pillow_simd.sh"),
        (machine.images("12.1", "sse4", [], cpu_has_avx2=False), "ok", "sse4"),
        (machine.images("12.1", "avx2", [], cpu_has_avx2=False), "problem", "--no-avx2"),
        (machine.images("12.1", "avx2", ["WebP"], cpu_has_avx2=True), "problem", "without WebP"),
        (machine.images("12.1", None, ["WebP"], cpu_has_avx2=True), "problem", "force-reinstall"),
        (machine.images(None, None, [], cpu_has_avx2=True), "problem", "cannot be imported"),
        (machine.decoder({}, machine="x86_64"), "problem", "none works"),
        (machine.decoder({"pillow": 300}, machine="x86_64"), "warning", "pip install 'seer[fast]'"),
        (machine.decoder({"pillow-simd": 1234}, machine="x86_64"), "ok", "pip install 'seer[fast]'"),
        (machine.decoder({"simplejpeg": 600, "pillow": 3}, machine="x86_64"), "ok", "install_pillow_simd.sh"),
        (machine.decoder({"simplejpeg": 600, "pillow": 3}, machine="arm64"), "ok", "simplejpeg 600, pillow 3; None"),
        (machine.decoder({"simplejpeg+pillow-simd": 1234}, machine="x86_64"), "ok", "1,234; None"),
        (machine.shared_memory((8 * GIB, 8 * GIB)), "ok", "8.00 GiB free"),
        (machine.shared_memory((64 << 20, 64 << 20)), "warning", "--shm-size"),
        (machine.shared_memory((8 * GIB, 1 << 20)), "warning", "dead programs"),
        (machine.shared_memory(None), "ok", "not here"),
        (machine.open_files(1024, 4096), "ok", "1,024"),
        (machine.open_files(256, 4096), "warning", "ulimit -n 4096"),
        (machine.open_files(256, resource.RLIM_INFINITY), "warning", "ulimit -n 65536"),
        (machine.open_files(resource.RLIM_INFINITY, resource.RLIM_INFINITY), "ok", "unlimited"),
        (machine.disk(HERE, (100 * GIB, 50 * GIB)), "ok", "50.0 GiB free of 100.0 at /here"),
        (machine.disk(HERE, (100 * GIB, 5 * GIB)), "warning", "free some space"),
        (machine.disk(HERE, (100 * GIB, 1)), "problem", "free some space"),
        (machine.disk(HERE, None), "problem", "/here"),
        (machine.slurm(None, None, None), "ok", "launch=local"),
        (machine.slurm("/bin/sbatch", None, None), "warning", "no controller answers"),
        (machine.slurm("/bin/sbatch", "slurm 23.11", []), "warning", "no partition"),
        (machine.slurm("/bin/sbatch", "slurm 23.11", ["gpu", "cpu"]), "ok", "slurm 23.11, partitions: gpu, cpu"),
        (machine.network("n1", ["10.0.0.5"], ETH), "ok", "n1 is 10.0.0.5 (eth0 10.0.0.5)"),
        (machine.network("n1", ["127.0.1.1"], ETH), "warning", "launch.network_interface=eth0"),
        (machine.network("n1", ["::1", "10.0.0.5"], ETH), "warning", "launch.network_interface=eth0"),
        (machine.network("n1", [], ETH), "warning", "no address"),
        (machine.network("n1", ["127.0.1.1"], {"lo": "127.0.0.1"}), "ok", "stay on this machine"),
        (machine.tensorboard(True), "ok", "installed"),
        (machine.tensorboard(False), "ok", "pip install tensorboard"),
        (machine.threads({}, 4), "ok", "not set"),
        (machine.threads({"OMP_NUM_THREADS": "1"}, 4), "ok", "OMP_NUM_THREADS=1"),
        (machine.threads({"OMP_NUM_THREADS": "64"}, 4), "warning", "unset OMP_NUM_THREADS"),
    ],
)
def test_facts_become_findings(finding: Finding, level: str, words: str) -> None:
    assert finding.level == level
    assert words in f"{finding.message}; {finding.remedy}"
    assert level == "ok" or finding.remedy


def test_every_installed_decoder_is_measured_in_a_second() -> None:
    began = time.process_time()
    speeds = machine_facts.images_a_second()
    assert time.process_time() - began < 3
    assert list(speeds) == installed_decoders() and min(speeds.values()) > 10


def test_interfaces_of_this_machine() -> None:
    assert machine_facts.interfaces()["lo"] == "127.0.0.1"


def program(folder: Path, name: str, script: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


def test_a_controller_that_does_not_answer_costs_two_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(tmp_path / "bin", "sbatch", "echo slurm 23.11")
    program(tmp_path / "bin", "sinfo", "exec sleep 60")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setattr(machine_facts, "SLURM_SECONDS", 0.2)
    began = time.perf_counter()
    assert machine_facts.slurm() == (str(tmp_path / "bin" / "sbatch"), None, None)
    assert time.perf_counter() - began < 5
    program(tmp_path / "bin", "sinfo", "echo gpu; echo cpu; echo gpu")
    monkeypatch.setattr(machine_facts, "SLURM_SECONDS", 20)
    assert machine_facts.slurm() == (str(tmp_path / "bin" / "sbatch"), "slurm 23.11", ["gpu", "cpu"])


def test_a_host_name_without_address() -> None:
    assert machine_facts.addresses("no.such.host.invalid") == []
    assert socket.gethostname() and machine_facts.addresses("localhost")


def test_imports_no_torch() -> None:
    code = "import sys, seer.launching.machine, seer.launching.follow; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0

"""Reads shards whole and says which of them are not what was indexed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from seer import remote, shard_manifest
from seer.errors import UserError, shown
from seer.shard_index import index_location, load_index
from seer.shard_patterns import expand_shards
from seer.shards.index import chosen, index_tar
from seer.shards.processes import Progress, each, silent
from seer.shards.remote_tars import as_file, size_of


@dataclass(frozen=True)
class Finding:
    """A tar that is not what it should be, and in which way."""

    tar: str
    problem: str


def verify(
    patterns: Sequence[str], index_dir: Path | None = None, *, workers: int = 1, progress: Progress = silent
) -> tuple[list[Finding], int]:
    """Compares every byte of the tars with what was indexed, and the folder's list with what is there.

    Args:
        patterns: see `seer.shard_patterns.expand_shards`.
        index_dir: where the indexes are; None: beside the tars.
        workers: processes.
        progress: called with bytes done and bytes in all.

    Returns:
        The findings, sorted by tar, and the number of tars that were read.

    Raises:
        UserError: nothing matches.
    """
    tars = expand_shards(patterns)
    sizes = {tar: size_of(tar) for tar in tars}
    done, total = 0, sum(sizes.values())
    findings = []
    for (tar, _), problem in each(_problem, [(tar, index_dir) for tar in tars], workers):
        if problem is not None:
            findings.append(Finding(tar, problem))
        done += sizes[tar]
        progress(done, total)
    findings += _missing(tars, index_dir)
    return sorted(findings, key=lambda finding: finding.tar), len(tars)


def _problem(job: tuple[str, Path | None]) -> str | None:
    tar, index_dir = job
    problem = None
    try:
        known = load_index(tar, index_dir)
    except UserError as error:
        # Where the tar itself is damaged its own message says more.
        problem, known = str(error), None
    try:
        with as_file(tar) as file:
            seen, _ = index_tar(file)
    except UserError as error:
        return str(error)
    if known is None:
        return problem
    if seen.digest != known.tar_digest:
        seen_as = "its headers are sound but not all bytes are those that were indexed"
        return f"{shown(tar)} is altered: {seen_as}; copy it again"
    if known.digest != known.tar_digest:
        seen, _ = chosen(seen, known.offsets)
    same = seen.digest == known.digest and all(
        np.array_equal(ours, theirs)
        for ours, theirs in ((seen.offsets, known.offsets), (seen.sizes, known.sizes), (seen.labels, known.labels))
    )
    if same:
        return None
    return shown(f"{index_location(tar, index_dir)} does not fit its tar; run: seer shards index {tar}")


def _missing(tars: Sequence[str], index_dir: Path | None) -> list[Finding]:
    """Shards that a folder's manifest lists but that are not there (only folders of the tars that were named)."""
    findings = []
    if index_dir is None:
        for folder in {Path(tar).parent for tar in tars if not remote.is_remote(tar)}:
            for shard in (shard_manifest.read(folder) or {}).get("shards", []):
                tar = folder / shard["name"]
                if not tar.exists():
                    findings.append(
                        Finding(str(tar), f"{tar} is missing: {folder / shard_manifest.NAME} lists it; bring it back")
                    )
    return findings

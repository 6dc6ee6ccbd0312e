"""Tars of nothing with an index: for tests that read no image."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from seer.shard_index import ShardIndex, index_path, save_index


def shard(tar: Path, count: int = 3, *, digest: str = "ab" * 16, index_dir: Path | None = None) -> ShardIndex:
    """A tar of 1,000 zero bytes and its index of some images, saved."""
    tar.parent.mkdir(parents=True, exist_ok=True)
    tar.write_bytes(bytes(1000))
    numbers = np.arange(count)
    index = ShardIndex(
        str(tar), numbers.astype(np.uint64) * 10, numbers.astype(np.uint32), numbers.astype(np.int32) - 1, 1000, digest
    )
    save_index(index, index_path(tar, index_dir))
    return index

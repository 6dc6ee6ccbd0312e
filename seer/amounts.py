"""Counts and bytes in words."""

from __future__ import annotations


def said(size: float) -> str:
    """Bytes with three digits: "94.3 MB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB" if size < 999.5 else f"{size:.0f} TB"


def many(count: int, word: str) -> str:
    """ "1 image", "2,000 images", "3 classes"."""
    return f"{count:,} {word}{'' if count == 1 else 'es' if word.endswith('s') else 's'}"


def share(count: int, total: int) -> str:
    """ "12 (3.4%)"."""
    return f"{count:,} ({count / total:.1%})"

"""What `seer shards stats` prints."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from seer.amounts import many, said, share
from seer.errors import printable
from seer.files import cannot_write, write_atomically
from seer.remote import file_name
from seer.shard_manifest import class_name
from seer.shards.bad_images import BadImage, Named
from seer.shards.stats import QUANTILES, Stats

_EXAMPLES = 3  # of each reason
_CLASSES = 20  # of more, the largest and the smallest are shown


def examples(images: Sequence[BadImage]) -> list[BadImage]:
    """A few bad images of each reason."""
    reasons = sorted({image.reason for image in images})
    return [image for word in reasons for image in [other for other in images if other.reason == word][:_EXAMPLES]]


def write_lines(file: Path, images: Sequence[Named]) -> None:
    """Writes one JSON object a line for each image, atomically.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        write_atomically(file, "".join(json.dumps(image._asdict()) + "\n" for image in images).encode("ascii"))
    except OSError as error:
        raise cannot_write(file, error) from None


def described(found: Stats, bad: Sequence[Named]) -> Iterator[str]:
    """Lines about what was found; `bad`: the examples by name."""
    every = "all images" if found.sampled == found.images else f"{many(found.sampled, 'image')}, evenly spread"
    yield f"decoded: {every}"
    yield "formats: " + ", ".join(f"{word} {share(count, found.sampled)}" for word, count in found.formats.items())
    told = ", ".join(f"{reason} {share(count, found.sampled)}" for reason, count in found.bad.items())
    yield f"cannot be used: {told or 'none'}"
    for image in bad:
        words = (f"{image.reason}:", file_name(image.shard), image.key, image.path and f"({image.path})")
        yield printable("  " + " ".join(word for word in words if word))
    quantiles = found.quantiles()
    if quantiles:
        yield (
            f"{'':14}{'smallest':>9}" + "".join(f"{f'{share:.0%}':>9}" for share in QUANTILES[1:-1]) + f"{'largest':>9}"
        )
    for word, values in quantiles.items():
        shown = [said(value) if word == "bytes" else f"{value:,}" for value in values]
        yield f"{word.replace('_', ' '):14}" + "".join(f"{value:>9}" for value in shown)
    common = [size for size in found.common_sizes(4) if size[2] > 1]
    if common:
        good = len(found.widths)
        sizes = ", ".join(f"{width}x{height} {share(images, good)}" for width, height, images in common)
        yield f"most common sizes: {sizes}"
    yield from _histogram(found)


def _histogram(found: Stats) -> Iterator[str]:
    """A bar for each class; of many classes the largest and the smallest."""
    if not len(found.labels):
        yield "labels: none"
        return
    ranked = sorted(found.labels.items(), key=lambda item: (-item[1], item[0]))
    some = f", {found.unlabelled:,} images without label" if found.unlabelled else ""
    yield f"labels: {many(len(ranked), 'class')}{some}"
    shown = ranked if len(ranked) <= _CLASSES else [*ranked[: _CLASSES // 2], None, *ranked[-_CLASSES // 2 :]]
    names = {label: printable(class_name(found.classes, label)) for label, _ in filter(None, shown)}
    width = min(30, max(map(len, names.values())))
    for entry in shown:
        if entry is None:
            yield f"  ... {len(ranked) - len(shown) + 1:,} more"
        else:
            bar = "\u2588" * round(40 * entry[1] / ranked[0][1])
            yield f"  {names[entry[0]][:width]:{width}} {entry[1]:>9,} {bar}".rstrip()

"""`seer shards`: from folders to tars, indexes for tars made by others, and the search for damage."""

from __future__ import annotations

import argparse
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from seer.cli.arguments import Arguments, path, positive
from seer.errors import UserError, closest
from seer.shards.processes import Progress, cores

HELP = """\
Examples:
  seer shards pack PHOTOS --out SHARDS                       # a folder tree to tars, without labels
  seer shards pack LABELLED --out SHARDS --labels folders    # LABELLED/cat/..., LABELLED/dog/...: folder is class
  seer shards index 'THEIRS/*.tar'                           # WebDataset tars made by others: only an index is added
  seer shards verify 'SHARDS/*.tar'                          # reads every byte and names what is damaged

Makes shards (tars with an index) out of images and looks after them. More: seer shards pack --help
"""

_PACK = """\
Examples:
  seer shards pack PHOTOS --out SHARDS
  seer shards pack PHOTOS --out SHARDS --size 1GB --workers 16
  seer shards pack LABELLED/train --out SHARDS/train --labels folders
  seer shards pack LABELLED/val --out SHARDS/val --labels folders --classes SHARDS/train

Packs every image below PHOTOS into WebDataset tars, byte for byte, in a keyed random order, with an index a tar and a
manifest.json. The same command again does nothing; after an interruption it goes on where it was.
"""

_INDEX = """\
Examples:
  seer shards index 'THEIRS/*.tar'
  seer shards index 'THEIRS/train-{000..127}.tar' --workers 16
  seer shards index '/read/only/*.tar' --index-dir INDEXES       # train with data.index_dir=INDEXES

Writes NAME.tar.seer.npz for each tar: where the image of each sample lies, and its class if it has a .cls member. Tars
with a valid index are passed over.
"""

_VERIFY = """\
Examples:
  seer shards verify 'SHARDS/*.tar'
  seer shards verify 'SHARDS/*.tar' --workers 16

Reads every tar whole and compares it with its index; prints a line for each tar that was cut, altered or lost, and
exits with 2 if there is any.
"""


def _arguments(verb: str, examples: str) -> Arguments:
    arguments = Arguments(f"seer shards {verb}", examples)
    arguments.add_argument("--workers", type=positive, default=cores(), help="processes (default: one a core)")
    return arguments


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([kmgt]?)b?", text.strip().lower())
    size = round(float(match.group(1)) * 1000 ** " kmgt".index(match.group(2) or " ")) if match else 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write for example 256MB or 1GB")
    return size


def _said(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB" if size < 999.5 else f"{size:.0f} TB"


def _many(count: int, word: str) -> str:
    return f"{count:,} {word}" if count == 1 else f"{count:,} {word}s"


@contextmanager
def _progress(doing: str) -> Iterator[Progress]:
    """A live bar on a terminal; elsewhere a line every ten seconds, none for what is done at once."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
        from rich.progress import Progress as Bar

        columns = (TextColumn(doing), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(doing, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)
        return
    last = time.monotonic()

    def line(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last > 10:
            last = time.monotonic()
            print(f"{doing}: {_said(done)} of {_said(total)}", file=sys.stderr, flush=True)

    yield line


def _pack(argv: Sequence[str]) -> int:
    arguments = _arguments("pack", _PACK)
    arguments.add_argument("folder", metavar="PHOTOS", type=path, help="images in any depth")
    arguments.add_argument("--out", metavar="SHARDS", type=path, required=True, help="a new folder for the tars")
    labels = "none, or folders: the first folder level is the class"
    arguments.add_argument("--labels", choices=("none", "folders"), default="none", help=labels)
    arguments.add_argument(
        "--classes", metavar="SHARDS", type=path, help="number classes as this folder of shards does"
    )
    sizes = arguments.add_mutually_exclusive_group()
    sizes.add_argument("--size", metavar="BYTES", type=_bytes, default=256_000_000, help="of a tar, about (256MB)")
    sizes.add_argument("--samples", metavar="N", type=positive, help="images of a tar, instead of --size")
    arguments.add_argument("--seed", type=int, default=0, help="another seed, another order (0)")
    arguments.add_argument("--overwrite", action="store_true", help="replace a former pack of other images or options")
    chosen = arguments.parse(argv)

    from seer.shards import manifest
    from seer.shards.pack import pack

    start = time.monotonic()
    with _progress("packing") as progress:
        packed = pack(
            chosen.folder,
            chosen.out,
            labels=chosen.labels,
            shard_bytes=chosen.size,
            samples_per_shard=chosen.samples,
            classes=manifest.class_names(chosen.classes) if chosen.classes else None,
            seed=chosen.seed,
            workers=chosen.workers,
            overwrite=chosen.overwrite,
            progress=progress,
        )
    if packed.left_out:
        print("left out: " + ", ".join(f"{reason} ({count})" for reason, count in packed.left_out.items()))
    labels = f"{len(packed.classes):,} classes" if packed.classes else "no labels"
    what = f"{_many(packed.samples, 'image')} in {_many(packed.shards, 'shard')}, {_said(packed.bytes)}, {labels}"
    took = "already there, nothing to do" if packed.already_there else f"{time.monotonic() - start:.1f} s"
    print(f"{packed.out}: {what} ({took})")
    _say_next(packed.out)
    return 0


def _say_next(folder: Path, index_dir: Path | None = None) -> None:
    more = f"data.index_dir={shlex.quote(str(index_dir))} " if index_dir else ""
    pattern = shlex.quote(f"{folder}/*.tar")
    print(f"next: seer train data.shards={pattern} {more}experiment=small run_dir=runs/mine")


def _index(argv: Sequence[str]) -> int:
    arguments = _arguments("index", _INDEX)
    arguments.add_argument("patterns", metavar="TARS", nargs="+", help="paths or quoted patterns")
    arguments.add_argument("--index-dir", type=path, help="where the indexes go (default: beside the tars)")
    chosen = arguments.parse(argv)

    from seer.shards.index import index

    start = time.monotonic()
    with _progress("indexing") as progress:
        indexed = index(chosen.patterns, chosen.index_dir, workers=chosen.workers, progress=progress)
    for sentence in indexed.oddities.sentences():
        print(sentence)
    samples = sum(len(shard) for shard in indexed.shards)
    labelled = sum(int((shard.labels >= 0).sum()) for shard in indexed.shards)
    before = f"{indexed.already_there} had their index before; " if indexed.already_there else ""
    what = f"{_many(samples, 'image')} in {_many(len(indexed.shards), 'shard')}, {labelled:,} with a label"
    print(f"{what} ({before}{time.monotonic() - start:.1f} s)")
    _say_next(indexed.shards[0].path.parent, chosen.index_dir)
    return 0


def _verify(argv: Sequence[str]) -> int:
    arguments = _arguments("verify", _VERIFY)
    arguments.add_argument("patterns", metavar="TARS", nargs="+", help="paths or quoted patterns")
    arguments.add_argument("--index-dir", type=path, help="where the indexes are (default: beside the tars)")
    chosen = arguments.parse(argv)

    from seer.shards.verify import verify

    start = time.monotonic()
    with _progress("verifying") as progress:
        findings, tars = verify(chosen.patterns, chosen.index_dir, workers=chosen.workers, progress=progress)
    for finding in findings:
        print(finding.problem, file=sys.stderr)
    took = f"{time.monotonic() - start:.1f} s"
    if findings:
        print(f"{len(findings)} findings in {_many(tars, 'shard')} ({took})", file=sys.stderr)
        return 2
    print(f"{_many(tars, 'shard')}: every byte is as it was indexed ({took})")
    return 0


_VERBS: dict[str, Callable[[Sequence[str]], int]] = {"pack": _pack, "index": _index, "verify": _verify}


def run(argv: list[str]) -> int:
    """Runs `seer shards ...`; returns the exit code.

    Raises:
        UserError: to be printed as one line.
    """
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(HELP, end="")
        return 0 if argv else 2
    if argv[0] not in _VERBS:
        raise UserError(f"seer shards {argv[0]}", "there is no such verb", closest(argv[0], _VERBS))
    return _VERBS[argv[0]](argv[1:])

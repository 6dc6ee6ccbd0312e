"""`seer shards`: from folders to tars, indexes for tars made by others, and the search for damage."""

from __future__ import annotations

import argparse
import json
import re
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from seer.amounts import many, said
from seer.cli.arguments import Arguments, path, png, positive
from seer.errors import UserError, closest, printable, shown
from seer.files import refuse_address
from seer.shards.processes import Progress, cores

HELP = """\
Examples:
  seer shards pack PHOTOS --out SHARDS                       # a folder tree to tars, without labels
  seer shards pack LABELLED --out SHARDS --labels folders    # LABELLED/cat/..., LABELLED/dog/...: folder is class
  seer shards index 'THEIRS/*.tar'                           # WebDataset tars made by others: only an index is added
  seer shards stats 'SHARDS/*.tar' --sheet sheet.png         # what is in them, in figures and as a picture
  seer shards verify 'SHARDS/*.tar'                          # reads every byte and names what is damaged
  seer shards export 'SHARDS/*.tar' --wids SHARDS/set.json   # lists and indexes for wids and DALI

Makes shards (tars with an index) out of images and looks after them. More: seer shards pack --help
"""
_ON_SHEET = 60
_BESIDE = object()  # an option that may name a folder was given without one

_PACK = """\
Examples:
  seer shards pack PHOTOS --out SHARDS
  seer shards pack PHOTOS --out SHARDS --size 1GB --workers 16
  seer shards pack LABELLED/train --out SHARDS/train --labels folders
  seer shards pack LABELLED/val --out SHARDS/val --labels folders --classes SHARDS/train
  seer shards pack 'LAION/*.tar' MORE.zip list.csv --out SHARDS     # tars (of img2dataset too), zips, lists of paths
  seer shards pack PHOTOS --out SHARDS --drop-duplicates --min-side 64 --longest-side 1024

Packs every image into WebDataset tars, byte for byte, in a keyed random order, with an index a tar and a manifest.json.
The same command again does nothing; after an interruption it goes on where it was.
"""

_INDEX = """\
Examples:
  seer shards index 'THEIRS/*.tar'
  seer shards index 'THEIRS/train-{000..127}.tar' --workers 16
  seer shards index '/read/only/*.tar' --index-dir INDEXES       # train with data.index_dir=INDEXES
  seer shards index THEIRS/set.json                              # the tars that a list of wids names, compared with it
  seer shards index 'THEIRS/*.tar' --from-dali                   # only the samples that DALI's NAME.idx lists

Writes NAME.tar.seer.npz for each tar: where the image of each sample lies, and its class if it has a .cls member. A
manifest.json beside them lists the tars of a folder (one that somebody else wrote stays as it is). Tars with a valid
index are passed over; --from-dali makes all anew (to take all samples again, delete an index of it).
"""

_EXPORT = """\
Examples:
  seer shards export 'SHARDS/*.tar' --wids SHARDS/set.json       # for wids.ShardListDataset
  seer shards export 'SHARDS/*.tar' --dali                       # NAME.idx beside each tar, for fn.readers.webdataset
  seer shards export '/read/only/*.tar' --dali INDEXES           # in a folder of their own

Tells other loaders what is in tars, those without an index of ours included. All samples are listed, also those
without an image, as these loaders count them. The tars are not changed.
"""

_VERIFY = """\
Examples:
  seer shards verify 'SHARDS/*.tar'
  seer shards verify 'SHARDS/*.tar' --workers 16

Reads every tar whole and compares it with its index; prints a line for each tar that was cut, altered or lost, and
exits with 2 if there is any.
"""

_STATS = """\
Examples:
  seer shards stats 'SHARDS/*.tar'
  seer shards stats 'SHARDS/*.tar' --sheet sheet.png            # with a picture of 60 random images
  seer shards stats 'SHARDS/*.tar' --sheet more.png --seed 1    # of 60 others
  seer shards stats 'SHARDS/*.tar' --max all --json             # decodes every image; one JSON object
  seer shards stats 'SHARDS/*.tar' --max all --bad bad.jsonl    # and lists each that cannot be used

Says what is in the shards: counts and labels of all images, from the indexes; sizes, formats and what cannot be
decoded, from a sample of 2,000 images evenly spread over all. It changes nothing.
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
            print(f"{doing}: {said(done)} of {said(total)}", file=sys.stderr, flush=True)

    yield line


def _pack(argv: Sequence[str]) -> int:
    arguments = _arguments("pack", _PACK)
    what = "folders, tars, patterns of tars in quotes, zips, lists (.csv, .parquet)"
    arguments.add_argument("inputs", metavar="PHOTOS", type=path, nargs="+", help=what)
    arguments.add_argument("--out", metavar="SHARDS", type=path, required=True, help="a new folder for the tars")
    labels = "own: those that tars and lists carry (default); folders: the first folder level is the class; none"
    arguments.add_argument("--labels", choices=("own", "none", "folders"), default="own", help=labels)
    arguments.add_argument(
        "--classes", metavar="SHARDS", type=path, help="number classes as this folder of shards does"
    )
    sizes = arguments.add_mutually_exclusive_group()
    sizes.add_argument("--size", metavar="BYTES", type=_bytes, default=256_000_000, help="of a tar, about (256MB)")
    sizes.add_argument("--samples", metavar="N", type=positive, help="images of a tar, instead of --size")
    arguments.add_argument("--seed", type=int, default=0, help="another seed, another order (0)")
    arguments.add_argument("--drop-duplicates", action="store_true", help="of equal files keep the first by path")
    near = "of images that look the same keep the one with the most pixels (needs seer[dedup])"
    arguments.add_argument("--drop-near-duplicates", action="store_true", help=near)
    arguments.add_argument("--min-side", metavar="N", type=positive, help="drop images whose shorter side is below N")
    longest = "shrink larger images to a longer side of N pixels, as JPEG of quality 92"
    arguments.add_argument("--longest-side", metavar="N", type=positive, help=longest)
    arguments.add_argument("--overwrite", action="store_true", help="replace a former pack of other images or options")
    chosen = arguments.parse(argv)

    from seer import shard_manifest
    from seer.data.decode import open_image
    from seer.shards.curation import QUALITY, REPORT, Curation
    from seer.shards.pack import pack

    start = time.monotonic()
    curate = Curation(
        open_image, chosen.drop_duplicates, chosen.drop_near_duplicates, chosen.min_side, chosen.longest_side
    )
    with _progress("packing") as progress:
        packed = pack(
            chosen.inputs,
            chosen.out,
            labels=chosen.labels,
            shard_bytes=chosen.size,
            samples_per_shard=chosen.samples,
            classes=shard_manifest.class_names(chosen.classes) if chosen.classes else None,
            seed=chosen.seed,
            curate=curate,
            workers=chosen.workers,
            overwrite=chosen.overwrite,
            progress=progress,
        )
    if packed.left_out:
        told = ", ".join(f"{reason} ({count})" for reason, count in packed.left_out.items())
        print(printable(f"left out: {told}"))
    if packed.dropped:
        told = ", ".join(f"{reason} ({count})" for reason, count in packed.dropped.items())
        print(f"dropped: {told}; each with its reason in {packed.out / REPORT}")
    if chosen.longest_side:
        print(f"shrunk: images with a side over {chosen.longest_side} pixels, to JPEG of quality {QUALITY}")
    labelled = f"{packed.labelled:,} labelled, " if packed.labelled not in (0, packed.samples) else ""
    numbers = "labels by number" if packed.labelled else "no labels"
    labels = labelled + (many(len(packed.classes), "class") if packed.classes else numbers)
    what = f"{many(packed.samples, 'image')} in {many(packed.shards, 'shard')}, {said(packed.bytes)}, {labels}"
    took = "already there, nothing to do" if packed.already_there else f"{time.monotonic() - start:.1f} s"
    print(printable(f"{packed.out}: {what} ({took})"))
    _say_next(f"{packed.out}/*.tar")
    return 0


def _say_next(pattern: str, index_dir: Path | None = None) -> None:
    more = f"data.index_dir={shlex.quote(str(index_dir))} " if index_dir else ""
    shards = shlex.quote(shown(pattern))
    print(f"next: seer train data.shards={shards} {more}experiment=small run_dir=runs/mine")


def _index(argv: Sequence[str]) -> int:
    arguments = _arguments("index", _INDEX)
    arguments.add_argument("patterns", metavar="TARS", nargs="+", help="paths or quoted patterns")
    arguments.add_argument("--index-dir", type=path, help="where the indexes go (default: beside the tars)")
    from_dali = "only the samples that NAME.idx of DALI lists, in DIR or beside the tars"
    arguments.add_argument("--from-dali", metavar="DIR", type=path, nargs="?", const=_BESIDE, help=from_dali)
    chosen = arguments.parse(argv)

    from seer.remote import is_remote
    from seer.shards import dali, wids
    from seer.shards.index import index
    from seer.wids_json import is_list

    start, only = time.monotonic(), None
    lists = [pattern for pattern in chosen.patterns if is_list(pattern)]
    if lists:
        with _progress("comparing with the list") as progress:
            wids.check(lists, workers=chosen.workers, progress=progress)
    if chosen.from_dali is not None:
        idx_dir = None if chosen.from_dali is _BESIDE else chosen.from_dali
        only = dali.choices(_files(chosen.patterns), idx_dir, workers=chosen.workers)
    with _progress("indexing") as progress:
        indexed = index(chosen.patterns, chosen.index_dir, only=only, workers=chosen.workers, progress=progress)
    for sentence in indexed.oddities.sentences():
        print(sentence)
    chosen_before = sum(shard.digest != shard.tar_digest for shard in indexed.shards) if only is None else 0
    if chosen_before:
        print(f"{chosen_before} indexes hold only samples of a former --from-dali; delete them to take all")
    samples = sum(len(shard) for shard in indexed.shards)
    labelled = sum(int((shard.labels >= 0).sum()) for shard in indexed.shards)
    before = f"{indexed.already_there} had their index before; " if indexed.already_there else ""
    what = f"{many(samples, 'image')} in {many(len(indexed.shards), 'shard')}, {labelled:,} with a label"
    print(f"{what} ({before}{time.monotonic() - start:.1f} s)")
    first = indexed.shards[0].location
    if is_remote(first) or lists == chosen.patterns:
        whole = chosen.patterns[0] if len(chosen.patterns) == 1 else f"[{','.join(chosen.patterns)}]"
    else:
        whole = f"{Path(first).parent}/*.tar"
    _say_next(whole, chosen.index_dir)
    return 0


def _files(patterns: Sequence[str]) -> list[Path]:
    """The tars that some patterns mean, where each must be a file."""
    from seer.remote import is_remote
    from seer.shard_patterns import expand_shards

    tars = expand_shards(patterns)
    for tar in tars:
        if is_remote(tar):
            raise UserError(f"{tar} is remote", "files of other loaders are read and written here", "copy the tars")
    return [Path(tar) for tar in tars]


def _export(argv: Sequence[str]) -> int:
    arguments = _arguments("export", _EXPORT)
    arguments.add_argument("patterns", metavar="TARS", nargs="+", help="paths or quoted patterns")
    arguments.add_argument("--wids", metavar="FILE.json", type=path, help="list the tars for wids (reads every byte)")
    beside = "write NAME.idx for DALI, in DIR or beside the tars (reads headers)"
    arguments.add_argument("--dali", metavar="DIR", type=path, nargs="?", const=_BESIDE, help=beside)
    arguments.add_argument("--overwrite", action="store_true", help="replace files that say something else")
    chosen = arguments.parse(argv)
    if chosen.wids is None and chosen.dali is None:
        raise UserError("seer shards export", "it writes for one loader or both", "add --wids FILE.json or --dali")
    if chosen.wids is not None and chosen.wids.suffix != ".json":
        raise UserError(f"--wids {chosen.wids}", "a list of wids is named FILE.json", f"write {chosen.wids}.json")

    if chosen.wids is not None:
        refuse_address(chosen.wids)

    from seer.shards import dali, wids
    from seer.shards.index import make_folder
    from seer.wids_json import below

    tars = _files(chosen.patterns)
    asked = {"overwrite": chosen.overwrite, "workers": chosen.workers}
    if chosen.wids is not None:
        make_folder(chosen.wids.parent)
        with _progress("reading") as progress:
            listed = wids.export(tars, chosen.wids, progress=progress, **asked)
        samples = sum(shard.samples for shard in listed)
        print(printable(str(chosen.wids)) + f": {many(samples, 'sample')} in {many(len(tars), 'shard')}")
        folder = str(chosen.wids.absolute().parent)
        elsewhere = sum(not below(shard.tar, folder) for shard in listed)
        if elsewhere:
            where = "not below its folder: listed by absolute path, which wids reads and seer shards index refuses"
            print(f"{many(elsewhere, 'shard')} {where}")
    if chosen.dali is not None:
        idx_dir = None if chosen.dali is _BESIDE else chosen.dali
        if idx_dir is not None:
            make_folder(idx_dir)
        with _progress("listing") as progress:
            samples = dali.export(tars, idx_dir, progress=progress, **asked)
        place = "beside the tars" if idx_dir is None else f"in {idx_dir}"
        print(f"NAME.idx {place}: {many(samples, 'sample')} in {many(len(tars), 'shard')}")
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
        print(printable(finding.problem), file=sys.stderr)
    took = f"{time.monotonic() - start:.1f} s"
    if findings:
        print(f"{len(findings)} findings in {many(tars, 'shard')} ({took})", file=sys.stderr)
        return 2
    print(f"{many(tars, 'shard')}: every byte is as it was indexed ({took})")
    return 0


def _sample(text: str) -> int | None:
    return None if text == "all" else positive(text)


def _stats(argv: Sequence[str]) -> int:
    arguments = _arguments("stats", _STATS)
    arguments.add_argument("patterns", metavar="TARS", nargs="+", help="paths or quoted patterns")
    arguments.add_argument("--index-dir", type=path, help="where the indexes are (default: beside the tars)")
    arguments.add_argument("--max", metavar="N", type=_sample, default=2000, help="images to decode, or all (2000)")
    arguments.add_argument("--sheet", metavar="PNG", type=png, help="also draw random images into this file")
    listed = "also list the images found that cannot be used, one JSON object a line: shard, key, path, reason"
    arguments.add_argument("--bad", metavar="FILE", type=path, help=listed)
    arguments.add_argument("--seed", type=int, default=0, help="another seed, other images on the sheet (0)")
    arguments.add_argument("--json", action="store_true", help="print one JSON object")
    chosen = arguments.parse(argv)
    for file in filter(None, (chosen.sheet, chosen.bad)):
        refuse_address(file)

    from seer.cli.shards_stats import described, examples, write_lines
    from seer.data.decode import open_image
    from seer.shards.bad_images import named
    from seer.shards.stats import Shards, stats

    shards = Shards(chosen.patterns, chosen.index_dir)
    with _progress("reading") as progress:
        found = stats(shards, open_image, max_images=chosen.max, workers=chosen.workers, progress=progress)
    few = named(examples(found.bad_images), chosen.workers)
    if chosen.bad:
        write_lines(chosen.bad, named(found.bad_images, chosen.workers))
    summary = f"{many(found.images, 'image')} in {many(found.shards, 'shard')}, {said(found.tar_bytes)}"
    if chosen.sheet:
        from seer.pictures import save_png
        from seer.shards.sheet import contact_sheet

        picked = shards.pick(_ON_SHEET, chosen.seed)
        title = f"{len(picked)} of {summary}"
        below = f"{' '.join(chosen.patterns)}  seed {chosen.seed}"
        save_png(contact_sheet(picked, open_image, title, below), chosen.sheet)
    if chosen.json:
        print(json.dumps(found.as_json() | {"bad_examples": [image._asdict() for image in few]}))
        return 0
    print("\n".join([summary, *described(found, few)]))
    if chosen.sheet:
        print(f"{chosen.sheet}: {many(len(picked), 'random image')}")
    if chosen.bad:
        print(f"{chosen.bad}: {many(len(found.bad_images), 'bad image')}")
    return 0


_VERBS: dict[str, Callable[[Sequence[str]], int]] = {
    "pack": _pack,
    "index": _index,
    "stats": _stats,
    "verify": _verify,
    "export": _export,
}


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
    # As Ctrl-C: what is half-written goes, and one line is said.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return _VERBS[argv[0]](argv[1:])
    finally:
        signal.signal(signal.SIGTERM, before)

"""`seer preview`: what the network sees of a batch, as a picture."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from seer.amounts import many
from seer.cli.arguments import Arguments, path, png, positive, whole
from seer.compose import compose, thaw
from seer.config import TrainConfig
from seer.errors import UserError
from seer.files import refuse_address
from seer.run_directory import agree_with_run, checkpoints_of, read_run, read_shards, recorded_data, shards_of
from seer.validation import validate

if TYPE_CHECKING:  # imports torch: only what draws may
    from seer.data.assembly import Origin
    from seer.data.stream import Batch, DataStream
    from seer.observe.preview import PreviewRow

HELP = """\
Examples:
  seer preview experiment=small data.shards='SHARDS_DIR/*.tar' --out preview.png
  seer preview data.shards='SHARDS_DIR/*.tar' data.small.min_area=0.1 --out preview.png --batch 100 --images 16
  seer preview --run RUN --batch 5000 --out preview.png

Draws the first images of a batch as training makes it: the image with the boxes of its crops, then each crop after
flip, colour, grey and blur, in a frame of its box's colour. Takes the KEY=VALUE words of `seer train` (run_dir may be
left out), or a run, which may be living: it is only read. Step S of metrics.jsonl learned from batch S - 1.
"""

_MOST_IMAGES = 64
_SOURCE_SIDE = 700  # pixels of a source that are enough to draw it


def run(argv: list[str]) -> int:
    """Exit code of `seer preview ARGV`."""
    arguments = Arguments("seer preview", HELP)
    add = arguments.add_argument
    add("--out", required=True, type=png, metavar="FILE", help="the picture, *.png")
    add("--batch", type=whole, default=0, metavar="N", help="which batch, counted from 0 (0)")
    add("--images", type=positive, default=8, metavar="N", help=f"rows, at most {_MOST_IMAGES} (8)")
    add("--run", type=path, metavar="RUN", help="a run's folder, in place of KEY=VALUE")
    given, words = arguments.parse_among_words(argv)
    refuse_address(given.out)
    if given.images > _MOST_IMAGES:
        raise UserError(f"--images {given.images}", "a picture has a row an image", f"use {_MOST_IMAGES} at most")
    config = _composed(words) if given.run is None else _frozen(given.run, words)
    if given.batch >= (steps := config.train.steps):
        raise UserError(
            f"--batch {given.batch}",
            f"a run of train.steps={steps} ends with batch {steps - 1}",
            f"use {steps - 1} at most",
        )
    # torch is imported from here on, so that help and what is misspelt answer at once.
    from seer.observe.preview import preview_picture
    from seer.pictures import save_png

    stream = _stream(config, given.run, given.batch)
    batch, origins = stream.look(given.batch, given.images)
    size, epoch = config.train.global_batch_size, int(stream.epochs(given.batch))
    drawn = f"the first {len(origins)} of {many(size, 'image')} of batch {given.batch:,} (epoch {epoch:,})"
    crops = " and ".join(
        f"{many(crop.count, 'crop')} of {crop.size}" for crop in (config.data.large, config.data.small) if crop.count
    )
    title = drawn[0].upper() + drawn[1:] if given.run is None else f"{given.run}: {drawn}"
    below = f"{crops} pixels, framed in the colour of their box: mirrored or not, with their colours and blur"
    save_png(preview_picture(_rows(config, batch, origins), title, below), given.out)
    replaced = f"; {many(len(batch.bad), 'bad image')} replaced" * bool(batch.bad)
    print(f"{given.out}: {drawn}, {crops} pixels{replaced}")
    return 0


def _composed(words: Sequence[str]) -> TrainConfig:
    named = any(word.startswith("run_dir=") for word in words)
    config = compose([*words, *([] if named else [f"run_dir={os.devnull}"])])  # it is not looked at
    validate(config)
    return config


def _frozen(run: Path, words: Sequence[str]) -> TrainConfig:
    if words:
        raise UserError(f"--run and {words[0]}", "a run has its own configuration", "give one of them")
    return thaw(read_run(run))


def _stream(config: TrainConfig, run: Path | None, batch_index: int) -> DataStream:
    """The stream that training reads; of a run, with what it knows of shards that came later and of deadly images."""
    from seer import build
    from seer.checkpoint.store import CheckpointStore
    from seer.data.history import History
    from seer.data.stream import QuarantinedSample
    from seer.decoders import installed_decoders
    from seer.derived import resolve_decoder

    recorded = None if run is None else (recorded_data(run) or {}).get("decoder")
    decoder = resolve_decoder(config, recorded=recorded, installed=installed_decoders()).value
    shards, sources = build.shards(config)
    history = None
    if run is not None and (known := read_shards(run)) is not None:
        before = History.from_json(known, str(shards_of(run)))
        # What came after this batch changes nothing in it, whether the run has taken note of it or not.
        history = before.continued(
            shards,
            sources,
            batch_index + 1,
            global_batch_size=config.train.global_batch_size,
            lanes=build.order(config, before)["data.lanes"].value,
            allow_growth=True,
        )
    stream = build.stream(config, workers=0, decoder=decoder, opened=(shards, sources), history=history)
    if run is not None:
        agree_with_run(run, read_run(run), data=stream.identity())
        deadly = CheckpointStore(checkpoints_of(run)).newest_state().get("quarantine", [])
        stream.add_to_quarantine(QuarantinedSample(*sample) for sample in deadly)
    return stream


def _rows(config: TrainConfig, batch: Batch, origins: Sequence[Origin]) -> list[PreviewRow]:
    import torch

    from seer import build
    from seer.data.decode import open_image
    from seer.data.photometric_operations import pixels_of
    from seer.observe.preview import PreviewRow
    from seer.training.step import float_crops, step_settings

    # On the CPU, wherever the run is: a GPU's crops are the same, and may be busy.
    crops = [pixels_of(crops).numpy() for crops in float_crops(batch, step_settings(config, torch.device("cpu")))]
    rows = []
    for number, origin in enumerate(origins):
        opened = open_image(origin.data, build.image_limits(config.data))
        size = opened.size
        label = f", class {origin.name}" * bool(origin.name)
        rows.append(
            PreviewRow(
                source=opened.load(min(1.0, _SOURCE_SIDE / min(size))),
                size=size,
                boxes=origin.boxes,
                crops=[crop for of_size in crops for crop in of_size[number :: len(origins)]],
                name=origin.key,
                about=f"{os.path.basename(origin.shard)}, {size[0]} x {size[1]}{label}",
                warning=_replaced(origin),
            )
        )
    return rows


def _replaced(origin: Origin) -> str:
    if not origin.bad:
        return ""
    first, others = origin.bad[0], len(origin.bad) - 1
    more = f" and {others} more" * (others > 0)
    return f"in the place of a bad image ({first.reason}){more}: {first.key} of {os.path.basename(first.shard)}"

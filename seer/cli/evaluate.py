"""`seer evaluate`: what a run's features are worth, on labelled shards."""

from __future__ import annotations

import argparse
import contextlib
import json
import shlex
import sys
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seer.cli.arguments import Arguments, path, png, positive, positive_number
from seer.errors import UserError, closest
from seer.files import refuse_address

if TYPE_CHECKING:  # imports torch: only what runs may
    from seer.cli.saved_run import SavedRun
    from seer.evaluation.report import Baselines
    from seer.shard_list import ShardList

HELP = """\
Examples:
  seer evaluate knn --run RUN --train 'LABELLED/train/*.tar' --val 'LABELLED/val/*.tar'
  seer evaluate knn --run RUN --train 'TRAIN/*.tar' --val 'VAL/*.tar' --json
  seer evaluate knn --run RUN --train 'TRAIN/*.tar' --val 'VAL/*.tar' --baselines --picture neighbours.png

Looks up each image of --val among those of --train by the features of the run's newest checkpoint, and prints the share
of images whose nearest neighbours vote for the right class. The run may still be living.
"""

_NEXT = """
Next, with your own images:
  seer shards pack PHOTOS_DIR --out SHARDS_DIR
  seer train experiment=small data.shards='SHARDS_DIR/*.tar' run_dir=runs/mine
  seer export --run runs/mine --format timm --out regnety.safetensors
"""


def run(argv: list[str]) -> int:
    """Exit code of `seer evaluate ARGV`."""
    if not argv or argv[0] in ("-h", "--help"):
        print(HELP + "\n`seer evaluate knn --help` lists the options.")
        return 0 if argv else 2
    if argv[0] != "knn":
        raise UserError(f"seer evaluate {argv[0]}", "there is no such evaluation", closest(argv[0], ["knn"]))
    given = _arguments().parse(argv[1:])
    if given.picture is not None:
        refuse_address(given.picture)
    # torch is imported from here on, so that help and misspelt options answer at once.
    from seer.cli.saved_run import load_run
    from seer.derived import reading
    from seer.run_directory import update_result
    from seer.shard_list import ShardList

    bank, queries = ShardList.open(given.train, given.index_dir), ShardList.open(given.val, given.index_dir)
    _same_classes_or_raise(bank, queries)
    saved = load_run(given.run)
    bank.reading = queries.reading = reading(saved.config.data)
    scores: dict[str, Any]
    if given.baselines or given.picture:
        scores, found = _with_baselines(given, saved, bank, queries)
        if given.picture:
            _picture(given.picture, found, queries, f"{given.run}, step {saved.step}")
            scores["picture"] = str(given.picture)
    else:
        scores = _trained_only(given, saved, bank, queries)
    _say(given, {"run": given.run, "step": saved.step, "k": given.k, "temperature": given.temperature} | scores)
    if given.baselines:
        try:
            update_result(given.run, {name: score for name, score in scores.items() if name.startswith("knn_top1")})
        except UserError as error:  # the scores are printed; whoever asked for them has them
            print(f"seer: the scores are not noted in result.json: {error}", file=sys.stderr)
    return 0


def _arguments() -> Arguments:
    arguments = Arguments("seer evaluate knn", HELP)
    add = arguments.add_argument
    add("--run", required=True, metavar="RUN", help="the run's folder")
    add(
        "--train",
        required=True,
        nargs="+",
        metavar="TARS",
        help="labelled shards, where neighbours are looked for",
    )
    add("--val", required=True, nargs="+", metavar="TARS", help="labelled shards whose classes are predicted")
    add("--index-dir", type=path, metavar="DIR", help="where the shards' indexes are (default: beside the tars)")
    add("--k", type=positive, default=20, help="neighbours that vote (20)")
    add("--temperature", type=positive_number, default=0.07, help="of the votes (0.07)")
    add("--max-train", type=positive, metavar="N", help="at most so many images of --train, spread evenly (all)")
    add("--max-val", type=positive, metavar="N", help="at most so many images of --val (all)")
    add("--json", action="store_true", help="print one JSON object and nothing else")
    baselines = "score raw pixels and the untrained network too; RUN/result.json of an ended run keeps the three scores"
    add("--baselines", action="store_true", help=baselines)
    add("--picture", type=png, metavar="FILE", help="draw queries with their nearest neighbours, a PNG")
    add("--next-steps", action="store_true", help="end with what to try on your own images")
    return arguments


def _class_names(folder: str) -> list[str] | None:
    from seer.shard_manifest import class_names

    with contextlib.suppress(UserError):  # shards made by others know numbers only
        return class_names(folder)
    return None


def _same_classes_or_raise(bank: ShardList, queries: ShardList) -> None:
    from seer.shard_manifest import folder_of

    known, asked = (
        {folder: names for folder in folders if (names := _class_names(folder))}
        for folders in ({folder_of(shard.location): None for shard in shards.listed} for shards in (bank, queries))
    )
    for train, val in product(known, asked):
        if known[train] != asked[val]:
            raise UserError(
                f"the classes of {train} (--train) and {val} (--val) differ",
                "numbers of classes must mean the same in both",
                f"pack the second with --classes {shlex.quote(train)}",
            )


def _trained_only(given: argparse.Namespace, saved: SavedRun, bank: ShardList, queries: ShardList) -> dict[str, Any]:
    from seer.evaluation.features import described, image_features
    from seer.evaluation.knn import knn_top1

    network = saved.backbone.to(saved.device)
    known, asked = (
        image_features(
            network,
            shards,
            image_size=saved.config.data.large.size,
            limits=saved.limits,
            max_images=at_most,
            device=saved.device,
            dtype=saved.backbone_dtype,
        )
        for shards, at_most in ((bank, given.max_train), (queries, given.max_val))
    )
    if bad := known.bad + asked.bad:
        print(f"seer: left out {described(bad)}", file=sys.stderr)
    score = knn_top1(
        known.features, known.labels, asked.features, asked.labels, k=given.k, temperature=given.temperature
    )
    return {"train_images": len(known.labels), "val_images": len(asked.labels), "knn_top1": score}


def _with_baselines(
    given: argparse.Namespace, saved: SavedRun, bank: ShardList, queries: ShardList
) -> tuple[dict[str, Any], Baselines]:
    from seer.cli.saved_run import untrained_backbone
    from seer.evaluation.features import described
    from seer.evaluation.report import baselines

    found = baselines(
        saved.backbone.to(saved.device),
        untrained_backbone(saved.config).to(saved.device),
        bank,
        queries,
        image_size=saved.config.data.large.size,
        limits=saved.limits,
        k=given.k,
        temperature=given.temperature,
        max_bank_images=given.max_train,
        max_query_images=given.max_val,
        device=saved.device,
        dtype=saved.backbone_dtype,
    )
    if bad := found.bank.bad + found.queries.bad:
        print(f"seer: left out {described(bad)}", file=sys.stderr)
    images = {"train_images": len(found.bank.labels), "val_images": len(found.queries.labels)}
    return images | found.scores, found


def _picture(out: Path, found: Baselines, queries: ShardList, title: str) -> None:
    from seer.evaluation.report import picture_of
    from seer.shard_manifest import folder_of

    picture_of(found, out, title=title, class_names=_class_names(folder_of(queries.listed[0].location)))


def _say(given: argparse.Namespace, found: dict[str, Any]) -> None:
    if given.json:
        print(json.dumps(found))
        return
    images = f"{found['val_images']:,} images among {found['train_images']:,}"
    if given.baselines:
        import rich

        from seer.evaluation.report import table

        print()
        rich.print(table({name: found[name] for name in ("knn_top1_pixels", "knn_top1_untrained", "knn_top1")}))
        print(f"k {given.k}, {images}, step {found['step']}")
    else:
        print(f"kNN top-1 {found['knn_top1']:.2%} (k {given.k}, {images}, step {found['step']})")
    if "picture" in found:
        print(f"queries and their nearest neighbours: {found['picture']}")
    if given.next_steps:
        from seer.run_directory import read_result

        for weights in (read_result(given.run) or {}).get("exports", []):
            print(f"weights for timm: {weights}")
        print(_NEXT, end="")

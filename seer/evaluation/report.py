"""What a person looks at after a run: scores beside their baselines, and images with their nearest neighbours."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from rich.table import Table
from torch import Tensor

from seer.data.decode import DEFAULT_LIMITS, ImageLimits
from seer.evaluation.features import (
    Forward,
    LabelledCrops,
    LabelledFeatures,
    features_of,
    labelled_crops,
    pixel_features,
)
from seer.evaluation.knn import Neighbours, knn_top1, nearest
from seer.pictures import INK, RED, fitted, font, save_png
from seer.shard_list import ShardList

_NAMES = {"knn_top1_pixels": "raw pixels", "knn_top1_untrained": "untrained network", "knn_top1": "trained network"}

_PAPER, _FAINT = (250, 250, 248), (120, 126, 133)
_RIGHT, _WRONG = (34, 139, 84), RED
_GAP, _FRAME, _MARGIN = 8, 4, 20
_MIN_TILE = 72


@dataclass(frozen=True)
class Baselines:
    """kNN of raw pixels, the untrained and the trained network on the same images.

    Attributes:
        scores: ``knn_top1_pixels``, ``knn_top1_untrained``, ``knn_top1``, shares in [0, 1].
        bank, queries: the crops.
        bank_features, query_features: of the trained network.
    """

    scores: dict[str, float]
    bank: LabelledCrops
    queries: LabelledCrops
    bank_features: LabelledFeatures
    query_features: LabelledFeatures


def baselines(
    trained: Forward,
    untrained: Forward,
    bank: ShardList,
    queries: ShardList,
    *,
    image_size: int,
    limits: ImageLimits = DEFAULT_LIMITS,
    k: int = 20,
    temperature: float = 0.07,
    max_bank_images: int | None = None,
    max_query_images: int | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    threads: int | None = None,
) -> Baselines:
    """Score a network beside what it has to beat. All crops are held in memory: image_size^2 x 3 bytes each.

    Args:
        trained, untrained: normalised images (n, 3, size, size) to features (n, F).
        bank, queries: labelled shards.
        others: as in ``evaluation.online.OnlineEvaluation``.
    """

    def crops(shards: ShardList, max_images: int | None) -> LabelledCrops:
        return _gathered(
            labelled_crops(shards, image_size=image_size, limits=limits, max_images=max_images, threads=threads)
        )

    bank_crops, query_crops = crops(bank, max_bank_images), crops(queries, max_query_images)

    def features(forward: Forward, crops: LabelledCrops) -> LabelledFeatures:
        return features_of(forward, _batches(crops), device=device, dtype=dtype)

    def top1(known: LabelledFeatures, asked: LabelledFeatures) -> float:
        return knn_top1(known.features, known.labels, asked.features, asked.labels, k=k, temperature=temperature)

    pixels = top1(pixel_features([bank_crops]), pixel_features([query_crops]))
    start = top1(features(untrained, bank_crops), features(untrained, query_crops))
    bank_features, query_features = features(trained, bank_crops), features(trained, query_crops)
    scores = {
        "knn_top1_pixels": pixels,
        "knn_top1_untrained": start,
        "knn_top1": top1(bank_features, query_features),
    }
    return Baselines(scores, bank_crops, query_crops, bank_features, query_features)


def table(scores: Mapping[str, float], *, title: str = "Held-out images") -> Table:
    """The scores as a table for ``rich.print``; names that are not known here stand as they are."""
    built = Table(title=title, title_justify="left", title_style="bold")
    built.add_column("features of")
    built.add_column("kNN top-1", justify="right")
    best = max(scores.values(), default=0.0)
    for name, value in scores.items():
        style = "bold green" if value == best and len(scores) > 1 else ""
        built.add_row(_NAMES.get(name, name), f"{value:.1%}", style=style)
    return built


def picture_of(found: Baselines, out: Path, *, title: str, class_names: Sequence[str] | None = None) -> None:
    """``neighbours_picture`` of ten queries, of different classes as far as there are."""
    rows = one_a_class(found.queries.labels, 10)
    neighbours = nearest(found.bank_features.features, found.query_features.features[rows], k=8)
    queries = LabelledCrops(found.queries.crops[rows], found.queries.labels[rows], found.queries.bad)
    neighbours_picture(queries, found.bank, neighbours, out, title=title, class_names=class_names)


def one_a_class(labels: Tensor, rows: int) -> Tensor:
    """Rows of `labels`, at most so many: the first image of every class, then the second, and so on; by class."""
    seen: dict[int, int] = {}
    turn = []
    for row, label in enumerate(labels.tolist()):
        turn.append((seen.get(label, 0), label, row))
        seen[label] = seen.get(label, 0) + 1
    chosen = sorted(turn)[:rows]
    return torch.tensor([row for _, _, row in sorted(chosen, key=lambda at: (at[1], at[0]))], dtype=torch.int64)


def neighbours_picture(
    queries: LabelledCrops,
    bank: LabelledCrops,
    neighbours: Neighbours,
    out: Path,
    *,
    title: str,
    class_names: Sequence[str] | None = None,
) -> None:
    """A PNG with a row a query: the query, then its neighbours, nearest first, framed in green where the class agrees.

    Args:
        queries: R queries.
        bank: the images that `neighbours` points to.
        neighbours: (R, K) from ``evaluation.knn.nearest``.
        out: the file; written whole or not at all.
        title: above everything.
        class_names: by label; default: ``class 3``.

    Raises:
        UserError: the file cannot be written.
    """
    indices_RK = neighbours.indices_MK
    sheet = _Sheet(rows=len(queries.labels), columns=indices_RK.shape[1], side=int(queries.crops.shape[1]))
    known = queries.labels[:, None] == bank.labels[indices_RK]
    agree = f"{float(known.double().mean()):.0%} of these neighbours are of the query's class"
    sheet.head(title, agree if known.numel() else "")

    def name(label: int) -> str:
        return class_names[label] if class_names is not None and label < len(class_names) else f"class {label}"

    for row in range(len(queries.labels)):
        sheet.tile(row, 0, queries.crops[row], INK)
        sheet.name(row, name(int(queries.labels[row])))
        for column, index in enumerate(indices_RK[row].tolist()):
            sheet.tile(row, column + 1, bank.crops[index], _RIGHT if known[row, column] else _WRONG)
    save_png(sheet.image, out)


class _Sheet:
    """Where things lie: names at the left, the queries, a wider gap, the neighbours; a strip with the title above."""

    _HEAD = 92
    _NAMES_WIDTH = 120

    def __init__(self, rows: int, columns: int, side: int) -> None:
        # Small images are enlarged by a whole factor, without blurring their pixels.
        self._scale = max(1, -(-_MIN_TILE // side))
        self._tile = side * self._scale + 2 * _FRAME
        self._step = self._tile + _GAP
        width = 2 * _MARGIN + self._NAMES_WIDTH + self._step * (columns + 1) + 2 * _GAP
        height = self._HEAD + self._step * rows + _MARGIN - _GAP
        self.image = Image.new("RGB", (width, height), _PAPER)
        self._draw = ImageDraw.Draw(self.image)

    def head(self, title: str, below: str) -> None:
        width = self.image.width - 2 * _MARGIN
        self._draw.text((_MARGIN, 14), fitted(self._draw, title, 20, width), fill=INK, font=font(20))
        self._draw.text((_MARGIN, 42), fitted(self._draw, below, 13, width), fill=_FAINT, font=font(13))
        base = self._HEAD - 22
        self._draw.text((self._left(0), base), "query", fill=_FAINT, font=font(13))
        self._draw.text((self._left(1), base), "nearest neighbours", fill=_FAINT, font=font(13))
        x = self._left(1) + 130
        for colour, words in ((_RIGHT, "same class"), (_WRONG, "another class")):
            self._draw.rectangle((x, base + 3, x + 10, base + 13), fill=colour)
            self._draw.text((x + 16, base), words, fill=_FAINT, font=font(13))
            x += 110

    def name(self, row: int, text: str) -> None:
        text = fitted(self._draw, text, 14, self._NAMES_WIDTH - 12)
        self._draw.text((_MARGIN, self._top(row) + self._tile // 2 - 9), text, fill=INK, font=font(14))

    def tile(self, row: int, column: int, crop: Tensor, colour: tuple[int, int, int]) -> None:
        x, y = self._left(column), self._top(row)
        self._draw.rectangle((x, y, x + self._tile - 1, y + self._tile - 1), fill=colour)
        picture = Image.fromarray(crop.numpy())
        size = (picture.width * self._scale, picture.height * self._scale)
        self.image.paste(picture.resize(size, Image.Resampling.NEAREST), (x + _FRAME, y + _FRAME))

    def _left(self, column: int) -> int:
        return _MARGIN + self._NAMES_WIDTH + self._step * column + (2 * _GAP if column else 0)

    def _top(self, row: int) -> int:
        return self._HEAD + self._step * row


def _gathered(batches: Iterable[LabelledCrops]) -> LabelledCrops:
    parts = list(batches)
    bad = sum((part.bad for part in parts), Counter[str]())
    return LabelledCrops(torch.cat([part.crops for part in parts]), torch.cat([part.labels for part in parts]), bad)


def _batches(crops: LabelledCrops) -> Iterator[LabelledCrops]:
    for first in range(0, len(crops.labels), 256):
        part = slice(first, first + 256)
        yield LabelledCrops(crops.crops[part], crops.labels[part], Counter())

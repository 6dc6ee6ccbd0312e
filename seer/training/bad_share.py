"""Stops a run whose input has gone bad: too many images of the last batches had to be replaced."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from seer import distributed
from seer.data.stream import BadSample
from seer.errors import UserError

WINDOW_IMAGES = 10_000
FEWEST_IMAGES = 1_000  # of which a share is told; and looks are so many apart


class BadShare:
    """Looks about every thousand images at how many of the last ten thousand or so were bad.

    The counts are those that the step sums over ranks, and looks depend on the step alone: all ranks come to one
    verdict. Nobody waits for the device: a count is read one step after it was asked for. The window begins anew when a
    run goes on.

    Args:
        most: largest share of images that were replaced; 1 never stops. What was tried in their places is not counted:
            bad images lie together, and a shard that is bad as a whole is asked for many stand-ins.
        global_batch_size: images a step, over all ranks.
        step: steps already taken.
        bad_samples: int64 scalar, images replaced so far.
        lists: where the bad samples are listed, for the message.
    """

    def __init__(self, most: float, *, global_batch_size: int, step: int, bad_samples: Tensor, lists: str) -> None:
        self._most, self._batch, self._lists = most, global_batch_size, lists
        self._every = -(-FEWEST_IMAGES // global_batch_size)
        self._reasons = Counter[str]()  # of this rank, since the start
        # Images, replaced ones and reasons so far, at each look; the oldest is the beginning of the window.
        self._looks = [(step * global_batch_size, int(bad_samples), Counter[str]())]
        self._asked: tuple[int, Tensor, torch.cuda.Event | None] | None = None

    def observe(self, step: int, bad_samples: Tensor, bad: Sequence[BadSample]) -> None:
        """After a step: all ranks call it.

        Args:
            step: steps taken, this one included.
            bad_samples: int64 scalar on any device, images replaced so far, of all ranks.
            bad: those of this rank's part of the step's batch, and their stand-ins.

        Raises:
            UserError: more than the largest share were bad (`ToldElsewhere` on all ranks but the first).
        """
        self._settle()
        self._reasons.update(sample.reason for sample in bad if not sample.stand_in)
        if step % self._every == 0:
            event = None
            count = bad_samples.to("cpu", non_blocking=True, copy=True)  # the step adds to it in place
            if bad_samples.is_cuda:
                event = torch.cuda.Event()  # type: ignore[no-untyped-call]
                event.record()
            self._asked = (step * self._batch, count, event)

    def _settle(self) -> None:
        if self._asked is None:
            return
        (images, count, event), self._asked = self._asked, None
        if event is not None:
            event.synchronize()
        while len(self._looks) > 1 and images - self._looks[1][0] >= WINDOW_IMAGES:
            del self._looks[0]
        before, bad_before, reasons_before = self._looks[0]
        seen, bad = images - before, int(count) - bad_before
        self._looks.append((images, int(count), self._reasons.copy()))
        if seen >= FEWEST_IMAGES and bad > self._most * seen:
            self._stop(bad, seen, self._reasons - reasons_before)

    def _stop(self, bad: int, seen: int, own_reasons: Counter[str]) -> None:
        reasons = sum(distributed.gather_objects(own_reasons), Counter[str]())
        named = ", ".join(f"{reason} {count:,}" for reason, count in reasons.most_common(3))
        with distributed.together():
            raise UserError(
                f"{bad:,} of the last {seen:,} images are bad ({bad / seen:.1%}: {named})",
                f"data.max_bad_share={self._most:g}; they are listed in {self._lists}",
                "restore shards that were damaged (`seer shards verify` names them), or raise data.max_bad_share: the "
                "same command then goes on from the last checkpoint",
            )

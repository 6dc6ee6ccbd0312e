"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass

from seer.errors import UserError, closest

STYLES = ("rebased", "swav", "vissl")
_VISSL_SLACK = 1e-6  # fvcore's WHERE_EPSILON: the warm-up ends this share of the run early


@dataclass(frozen=True)
class WarmupCosine:
    """A linear warm-up, then half a cosine wave, per step, without restarts.

    Attributes:
        start: learning rate of step 0 (unused where warmup_steps is 0).
        peak: learning rate at the end of the warm-up.
        end: learning rate that the cosine falls to at total_steps.
        warmup_steps: length of the warm-up, in steps (a fraction of a step is allowed).
        total_steps: length of the run, in steps.
        style: how the two parts meet.
            `rebased`: the peak is reached at step warmup_steps, where a whole half wave begins.
            `swav`: facebookresearch/swav. The warm-up's points include both ends, so that steps warmup_steps - 1 and
            warmup_steps both have the peak.
            `vissl`: facebookresearch/vissl with interval scaling [rescaled, fixed]. The half wave spans the whole run
            and the warm-up covers its beginning: the rate drops below the peak at the joint.

    Raises:
        UserError: a negative or non-finite rate, a warm-up that is negative or longer than the run, an unknown style.
    """

    start: float
    peak: float
    end: float
    warmup_steps: float
    total_steps: int
    style: str = "rebased"

    def __post_init__(self) -> None:
        for name in ("start", "peak", "end"):
            rate = getattr(self, name)
            if not (math.isfinite(rate) and rate >= 0):
                raise UserError(f"{name} learning rate {rate}", "learning rates are finite and not negative", "mend it")
        if self.total_steps < 1:
            raise UserError(f"total_steps {self.total_steps}", "a run has at least one step", "use 1 or more")
        if not 0 <= self.warmup_steps <= self.total_steps:
            raise UserError(
                f"warmup_steps {self.warmup_steps}",
                f"the warm-up lies within the run of {self.total_steps} steps",
                f"use 0 to {self.total_steps}",
            )
        if self.style not in STYLES:
            raise UserError(f"schedule style {self.style!r}", "it is not known", closest(self.style, STYLES))

    def at(self, step: int) -> float:
        """The learning rate of a step, counted from 0; at and beyond total_steps where the cosine ends."""
        if step < 0:
            raise UserError(f"step {step}", "steps count from 0", "ask for 0 or more")
        if self._warming_up(step):
            # swav's n points are n - 1 intervals; a single point is the start.
            intervals = max(self.warmup_steps - 1, 1) if self.style == "swav" else self.warmup_steps
            return self.start + (self.peak - self.start) * step / intervals
        begin = 0.0 if self.style == "vissl" else self.warmup_steps
        progress = min((step - begin) / max(self.total_steps - begin, 1), 1.0)
        return self.end + (self.peak - self.end) * (1 + math.cos(math.pi * progress)) / 2

    def _warming_up(self, step: int) -> bool:
        if self.style == "vissl":
            return step / self.total_steps + _VISSL_SLACK <= self.warmup_steps / self.total_steps
        return step < self.warmup_steps

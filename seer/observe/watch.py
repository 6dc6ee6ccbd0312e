"""What is seen of a run while it goes: metrics.jsonl, TensorBoard, the progress line, the lists of bad samples."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from seer import distributed
from seer.observe.metrics import MetricsFile
from seer.observe.progress import Progress
from seer.observe.tensorboard import TensorBoard
from seer.run_directory import RunDirectory


class BadSample(Protocol):
    """A sample that could not be used, as the data stream tells it."""

    @property
    def shard(self) -> str: ...
    @property
    def sample(self) -> int: ...
    @property
    def key(self) -> str: ...
    @property
    def reason(self) -> str: ...


class Quarantine:
    """This rank's list of the samples that could not be used; steps after ``start_step`` are taken again.

    Args:
        run: the run's files.
        start_step: steps already taken.
    """

    def __init__(self, run: RunDirectory, start_step: int) -> None:
        self._file = MetricsFile(run.quarantine(distributed.rank()))
        self._file.cut_back(start_step)

    def record(self, step: int, bad: Sequence[BadSample]) -> None:
        """Take note of the samples of a step's batch that were replaced.

        Raises:
            UserError: the file cannot be written.
        """
        for sample in bad:
            self._file.write(
                {
                    "step": step,
                    "shard": str(sample.shard),
                    "sample": int(sample.sample),
                    "key": sample.key,
                    "reason": sample.reason,
                }
            )


class Watch:
    """The observer that rank 0 calls after every step.

    Between log steps nothing waits for the device: figures stay tensors, only times and counts of the host are summed.
    ``loss`` and the other figures of a line are those of its step (a mean over steps would change with where a run was
    interrupted); ``images_per_s`` and ``data_wait_share`` are of all steps since the line before.

    Each line of metrics.jsonl: ``step``, ``images_seen``, ``epoch`` (passes over the data), ``loss``, ``chance``,
    ``lr``, ``images_per_s``, ``data_wait_share``, ``bad_samples``, ``skipped_steps``, ``worker_deaths`` (all since the
    run began), the objective's other figures, ``seconds`` (of training, evaluation and saving, since the run began),
    and ``knn_top1`` where the step was evaluated. What is not finite is null.

    Lines of steps after ``start_step`` are removed at the start: the run takes those steps again.

    Args:
        run: the run's files.
        start_step: steps already taken.
        total_steps: steps of the run.
        chance: loss of a network that tells nothing apart.
        log_every_steps: steps between two lines; the last step has one too.
        global_batch_size: images a step, over all processes.
        epochs: passes over the data in so many steps.
        progress: the line on the terminal; default: on standard output.
    """

    def __init__(
        self,
        run: RunDirectory,
        *,
        start_step: int,
        total_steps: int,
        chance: float,
        log_every_steps: int,
        global_batch_size: int,
        epochs: Callable[[int], float],
        progress: Progress | None = None,
    ) -> None:
        self._metrics = MetricsFile(run.metrics)
        self._evaluations = MetricsFile(run.evaluations)
        for file in (self._metrics, self._evaluations):
            file.cut_back(start_step)
        self._tensorboard = TensorBoard(run.tensorboard, start_step)
        self._progress = progress or Progress(total_steps, chance)
        self.total_steps = total_steps
        self._chance = chance
        self._log_every_steps = log_every_steps
        self._global_batch_size = global_batch_size
        self._epochs = epochs
        self._start_step = start_step

        self._figures: Mapping[str, Tensor] = {}
        self._pending: dict[str, Any] | None = None  # the line of a step whose evaluation is still to come
        before, evaluated = self._metrics.read(), self._evaluations.read()
        self._last_loss: float | None = before[-1].get("loss") if before else None
        self.last_evaluation: dict[str, float] | None = None
        if evaluated:
            self.last_evaluation = {key: value for key, value in evaluated[-1].items() if key not in _PLACE}
        self._seconds_before = float(before[-1].get("seconds", 0.0)) if before else 0.0
        self._deaths_before = int(before[-1].get("worker_deaths", 0)) if before else 0
        self._deaths: Tensor | None = None  # since start_step
        self._began = time.perf_counter()
        self._interval_began, self._interval_step, self._waited = self._began, start_step, 0.0

    @property
    def seconds(self) -> float:
        """Seconds of the run so far, those before an interruption included (up to its last line)."""
        return self._seconds_before + time.perf_counter() - self._began

    @property
    def worker_deaths(self) -> int:
        """Data workers that were replaced since the run began. Waits for the device."""
        return self._deaths_before + (0 if self._deaths is None else int(self._deaths))

    @property
    def last_loss(self) -> float | None:
        """The loss of the newest step; None if it was not finite or no step was taken. Waits for the device."""
        if "loss" not in self._figures:
            return self._last_loss
        return _finite(float(self._figures["loss"]))

    def record(
        self,
        step: int,
        figures: Mapping[str, Tensor],
        learning_rate: float,
        data_wait_seconds: float,
        *,
        bad_samples: Tensor,
        skipped_steps: Tensor,
        worker_deaths: Tensor,
        evaluation_follows: bool = False,
    ) -> None:
        """Take note of a step.

        Args:
            step: steps taken, this one included.
            figures: scalars on any device, ``loss`` among them; detached.
            learning_rate: of this step.
            data_wait_seconds: how long the step waited for its batch.
            bad_samples: integer scalar, all images so far, of all ranks, that were replaced.
            skipped_steps: integer scalar, all steps so far that changed nothing because they were not finite.
            worker_deaths: integer scalar, data workers of all ranks that were replaced since ``start_step``.
            evaluation_follows: ``record_evaluation`` will be called for this step; its scores join the step's line.

        Raises:
            UserError: the run's files cannot be written.
        """
        self._write_pending()
        self._figures, self._deaths = figures, worker_deaths
        self._waited += data_wait_seconds
        if step % self._log_every_steps and step != self.total_steps and not evaluation_follows:
            return
        self._pending = self._line(step, figures, learning_rate, bad_samples, skipped_steps, worker_deaths)
        if not evaluation_follows:
            self._write_pending()

    def record_evaluation(self, step: int, scores: Mapping[str, float]) -> None:
        """Take note of scores, such as ``knn_top1`` in [0, 1]; ``evaluation_seconds`` among them is not training time.

        Raises:
            UserError: the run's files cannot be written.
        """
        self.last_evaluation = dict(scores)
        images = {"step": step, "images_seen": step * self._global_batch_size}
        self._evaluations.write(images | dict(scores))
        if self._pending is not None and self._pending["step"] == step:
            self._pending |= scores
            self._write_pending()
        else:
            self._metrics.write(images | dict(scores))
            self._tensorboard.write(step, scores)
        self._interval_began += scores.get("evaluation_seconds", 0.0)

    def close(self) -> None:
        """Write what is still held back."""
        self._write_pending()
        self._tensorboard.close()
        self._progress.close()

    def _line(
        self,
        step: int,
        figures: Mapping[str, Tensor],
        learning_rate: float,
        bad_samples: Tensor,
        skipped_steps: Tensor,
        worker_deaths: Tensor,
    ) -> dict[str, Any]:
        # One copy from the device, which waits once for all figures.
        scalars = (bad_samples, skipped_steps, worker_deaths, *figures.values())
        bad, skipped, deaths, *numbers = torch.stack([value.detach().double() for value in scalars]).tolist()
        values = dict(zip(figures, map(_finite, numbers), strict=True))
        now = time.perf_counter()
        elapsed = max(now - self._interval_began, 1e-9)
        images = (step - self._interval_step) * self._global_batch_size
        line = {
            "step": step,
            "images_seen": step * self._global_batch_size,
            "epoch": round(self._epochs(step), 4),
            "loss": values.pop("loss"),
            "chance": self._chance,
            "lr": learning_rate,
            "images_per_s": round(images / elapsed, 2),
            "data_wait_share": round(min(1.0, self._waited / elapsed), 4),
            "bad_samples": int(bad),
            "skipped_steps": int(skipped),
            "worker_deaths": self._deaths_before + int(deaths),
            **values,
            "seconds": round(self.seconds, 3),
        }
        self._interval_began, self._interval_step, self._waited = now, step, 0.0
        return line

    def _write_pending(self) -> None:
        if self._pending is None:
            return
        line, self._pending = self._pending, None
        self._metrics.write(line)
        self._tensorboard.write(line["step"], {key: value for key, value in line.items() if key not in _PLACE})
        done = line["step"] - self._start_step
        self._progress.update(
            line["step"],
            loss=line["loss"],
            images_per_s=line["images_per_s"],
            data_wait_share=line["data_wait_share"],
            seconds_left=(time.perf_counter() - self._began) / done * (self.total_steps - line["step"]),
            knn_top1=(self.last_evaluation or {}).get("knn_top1"),
            bad_samples=line["bad_samples"],
        )


_PLACE = ("step", "images_seen")


def _finite(value: float) -> float | None:
    return value if value - value == 0 else None

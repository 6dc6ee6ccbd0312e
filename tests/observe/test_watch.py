"""What is written of a run, and that looking costs nothing between log steps."""

import errno
import io
import json
import math
import os
import sys
from types import SimpleNamespace

import pytest
import torch
from recorded_run import recorded_run
from rich.console import Console

from seer.errors import UserError
from seer.observe.metrics import MetricsFile
from seer.observe.progress import Progress
from seer.observe.tensorboard import TensorBoard
from seer.observe.watch import Quarantine, Watch
from seer.run_directory import RunDirectory

KEYS = {
    "step",
    "images_seen",
    "epoch",
    "loss",
    "chance",
    "lr",
    "images_per_s",
    "data_wait_share",
    "bad_samples",
    "skipped_steps",
    "worker_deaths",
    "assignment_entropy",
    "mean_assignment_entropy",
    "prototypes_in_use",
    "feature_std",
    "seconds",
}


COUNTS = ("bad_samples", "skipped_steps", "worker_deaths")


@pytest.fixture
def run(tmp_path):
    with recorded_run(tmp_path, {"seed": 0}) as run:
        yield run


def watching(run: RunDirectory, *, start_step: int = 0, every: int = 2) -> Watch:
    return Watch(
        run,
        start_step=start_step,
        total_steps=5,
        chance=math.log(64),
        log_every_steps=every,
        global_batch_size=8,
        epochs=lambda step: step / 3,
        progress=Progress(5, math.log(64), Console(file=io.StringIO())),
    )


def figures(loss: float = 3.0) -> dict[str, torch.Tensor]:
    names = ("assignment_entropy", "mean_assignment_entropy", "prototypes_in_use", "feature_std")
    return {"loss": torch.tensor(loss, dtype=torch.float64)} | {name: torch.tensor(0.5) for name in names}


def record(
    watch: Watch, step: int, *, loss: float = 3.0, bad: int = 0, skipped: int = 0, deaths: int = 0, **options
) -> None:
    counts = dict(zip(COUNTS, map(torch.tensor, (bad, skipped, deaths)), strict=True))
    watch.record(step, figures(loss), 0.1, 0.001, **counts, **options)


def bad(sample: int) -> SimpleNamespace:
    return SimpleNamespace(shard="a.tar", sample=sample, key="k", reason="truncated")


def test_lines_and_their_keys(run):
    watch = watching(run)
    for step in range(1, 6):
        record(watch, step, loss=float(step), bad=1 if step < 4 else 2)
    watch.close()
    lines = MetricsFile(run.metrics).read()
    assert [line["step"] for line in lines] == [2, 4, 5]  # every second one, and the last
    assert all(line.keys() == KEYS for line in lines)
    assert [line["loss"] for line in lines] == [2.0, 4.0, 5.0]
    assert [line["images_seen"] for line in lines] == [16, 32, 40]
    assert [line["bad_samples"] for line in lines] == [1, 2, 2]
    assert lines[0]["epoch"] == pytest.approx(2 / 3, abs=1e-4)
    assert lines[0]["lr"] == 0.1 and lines[0]["feature_std"] == 0.5
    assert all(0 < line["data_wait_share"] <= 1 and line["images_per_s"] > 0 for line in lines)
    assert list(run.tensorboard.iterdir())


def test_worker_deaths_are_counted_over_the_lives_of_a_run(run):
    watch = watching(run, every=1)
    for step in (1, 2, 3):
        record(watch, step, deaths=step)
    watch.close()
    again = watching(run, start_step=2, every=1)
    assert again.worker_deaths == 2, "those of steps that are taken again are counted again"
    record(again, 3, deaths=0)
    record(again, 4, deaths=4)
    assert again.worker_deaths == 6
    again.close()
    assert [line["worker_deaths"] for line in MetricsFile(run.metrics).read()] == [1, 2, 2, 6]


def test_figures_are_looked_at_on_log_steps_only(run):
    """A tensor on the meta device has no value: reading one raises, as waiting for a GPU would cost time."""
    watch = watching(run, every=2)
    nothing = {name: torch.empty((), device="meta") for name in figures()}
    counts = {name: torch.empty((), dtype=torch.int64, device="meta") for name in COUNTS}
    watch.record(1, nothing, 0.1, 0.0, **counts)
    with pytest.raises(NotImplementedError):
        watch.record(2, nothing, 0.1, 0.0, **counts)


def test_the_quarantine_lists_each_sample_and_forgets_steps_that_are_taken_again(run):
    quarantine = Quarantine(run, 0)
    for step in (1, 4):
        quarantine.record(step, [bad(step), bad(step + 10)])
    wanted = [{"step": 1, "shard": "a.tar", "sample": sample, "key": "k", "reason": "truncated"} for sample in (1, 11)]
    Quarantine(run, 2)
    assert MetricsFile(run.quarantine()).read() == wanted


def test_step_that_is_not_finite_is_valid_json(run):
    watch = watching(run, every=1)
    record(watch, 1, loss=math.nan, skipped=1)
    assert watch.last_loss is None
    watch.close()
    (line,) = [json.loads(text, parse_constant=pytest.fail) for text in run.metrics.read_text().splitlines()]
    assert line["loss"] is None and line["skipped_steps"] == 1


def test_scores_join_the_line_of_their_step(run):
    watch = watching(run, every=2)
    record(watch, 1)
    record(watch, 2, evaluation_follows=True)
    assert MetricsFile(run.metrics).read() == []  # held back until the scores are known
    watch.record_evaluation(2, {"knn_top1": 0.25, "evaluation_seconds": 0.0})
    record(watch, 3, evaluation_follows=True)
    watch.record_evaluation(3, {"knn_top1": 0.5, "evaluation_seconds": 0.0})
    record(watch, 4)
    watch.close()
    lines = MetricsFile(run.metrics).read()
    assert [(line["step"], line.get("knn_top1")) for line in lines] == [(2, 0.25), (3, 0.5), (4, None)]
    assert lines[0].keys() == KEYS | {"knn_top1", "evaluation_seconds"}
    assert [line["knn_top1"] for line in MetricsFile(run.evaluations).read()] == [0.25, 0.5]
    assert watch.last_evaluation == {"knn_top1": 0.5, "evaluation_seconds": 0.0}


def test_scores_outside_a_step_get_a_line(run):
    watch = watching(run)
    watch.record_evaluation(0, {"knn_top1": 0.125})
    watch.close()
    assert MetricsFile(run.metrics).read() == [{"step": 0, "images_seen": 0, "knn_top1": 0.125}]


def test_line_is_not_lost_when_its_evaluation_fails(run):
    watch = watching(run)
    record(watch, 2, evaluation_follows=True)
    watch.close()
    assert [line["step"] for line in MetricsFile(run.metrics).read()] == [2]


def test_evaluation_does_not_count_as_slow_training(run, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    watch = watching(run, every=1)
    clock[0] = 2.0
    record(watch, 1, evaluation_follows=True)
    clock[0] = 102.0
    watch.record_evaluation(1, {"knn_top1": 0.5, "evaluation_seconds": 100.0})
    clock[0] = 104.0
    record(watch, 2)
    monkeypatch.undo()
    watch.close()
    assert [line["images_per_s"] for line in MetricsFile(run.metrics).read()] == [4.0, 4.0]


def test_going_on_continues_lines_and_counters(run):
    watch = watching(run, every=1)
    for step in range(1, 5):
        record(watch, step, bad=step, evaluation_follows=True)
        watch.record_evaluation(step, {"knn_top1": step / 10})
    watch.close()
    again = watching(run, start_step=2, every=1)  # steps 3 and 4 were not in the checkpoint
    assert again.last_evaluation == {"knn_top1": 0.2}
    assert again.last_loss == 3.0
    assert again.seconds >= MetricsFile(run.metrics).read()[-1]["seconds"]
    record(again, 3, bad=3)
    again.close()
    lines = MetricsFile(run.metrics).read()
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert [line["bad_samples"] for line in lines] == [1, 2, 3]
    assert [line["step"] for line in MetricsFile(run.evaluations).read()] == [1, 2]


def test_without_tensorboard_one_line_says_how_to_get_it(run, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    watch = watching(run, every=1)
    for step in (1, 2):
        record(watch, step)
    watch.close()
    assert capsys.readouterr().err.count("pip install tensorboard") == 1
    assert len(MetricsFile(run.metrics).read()) == 2


def test_curves_that_cannot_be_written_are_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file/tensorboard cannot be written"):
        TensorBoard(tmp_path / "file" / "tensorboard").write(1, {"loss": 1.0})


def test_buffered_curves_that_meet_a_full_disk_are_told(tmp_path, monkeypatch):
    curves = TensorBoard(tmp_path)
    curves.write(1, {"loss": 1.0})
    writer = curves._writer
    close = writer.close

    def full():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(writer, "close", full)
    with pytest.raises(UserError, match="No space left"):
        curves.close()
    close()

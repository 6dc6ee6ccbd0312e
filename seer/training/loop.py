"""The run: whoever reads only this file knows what the system does."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seer import build
from seer.checkpoint.store import CheckpointStore
from seer.config import TrainConfig, freeze
from seer.data.stream import DataStream, lost_worker
from seer.derived import Resolved, resolve
from seer.errors import UserError
from seer.evaluation.online import OnlineEvaluation
from seer.handoff.timm_format import export_timm, load_exported
from seer.observe.watch import Watch
from seer.parallel.running_statistics import RunningStatistics
from seer.run_directory import RunDirectory, checkpoints_of
from seer.shard_index import ShardList
from seer.training.state import TrainState, load_state, state_tensors
from seer.training.step import StepSettings, float_crops, set_learning_rate, train_step
from seer.training.stop import EXIT_STOPPED, StopRequest
from seer.validation import validate


@dataclass(frozen=True)
class Result:
    """How a run ended: ``result`` is what stands in RUN/result.json."""

    exit_code: int
    result: dict[str, Any]


def run(config: TrainConfig) -> Result:
    """Train from wherever the run directory stands to ``train.steps``, or until a signal asks to stop.

    Raises:
        UserError: what the configuration or the data make impossible, before anything is written where possible.
    """
    validate(config)
    device = build.device_of(config)
    resolved = resolve(config, device=device.type)
    torch.set_num_threads(resolved["train.threads"].value)
    stream = build.stream(config, workers=resolved["data.workers"].value)
    evaluation = _evaluation(config)
    peak = resolved["optimizer.learning_rate"].value
    schedule = build.schedule(config, peak=peak, warmup_steps=resolved["optimizer.warmup_steps"].value)
    initial_weights = _initial_weights(config)

    with RunDirectory.open(config.run_dir, freeze(config), resolved=resolved, data=stream.identity()) as run:
        finished = run.finished()
        if finished is not None:
            stream.close()
            _conclude(run, finished)
            print(f"{run.folder} is finished; delete it or name another run_dir to train anew")
            return Result(0, finished)
        state = _start(config, device, peak)
        if initial_weights is not None:
            state.learner.backbone.load_state_dict(initial_weights, strict=True)
        checkpoints = CheckpointStore(run.checkpoints, config.checkpoint.keep, config.checkpoint.keep_every_steps)
        newest = checkpoints.newest()
        if newest is not None:
            load_state(state, newest)
        saved_step = None if newest is None else newest.step
        settings = _settings(config, device)
        watch = Watch(
            run,
            start_step=state.step,
            total_steps=config.train.steps,
            chance=state.learner.objective.chance,
            log_every_steps=config.train.log_every_steps,
            global_batch_size=config.train.global_batch_size,
            batches_per_epoch=stream.batches_per_epoch,
            bad_samples=state.bad_samples,
        )
        _introduce(config, run, stream, state, device, resolved)
        stop = StopRequest()
        batches = stream.batches(state.batch_index)
        try:
            while state.step < config.train.steps and not stop.agreed():
                set_learning_rate(state.optimizer, learning_rate := schedule.at(state.step))
                asked = time.perf_counter()
                batch = next(batches)
                waited = time.perf_counter() - asked
                outcome = train_step(state, float_crops(batch, settings), settings)
                state.bad_samples += len(batch.bad)
                evaluating = evaluation is not None and evaluation.due(state.step, config.train.steps)
                watch.record(
                    state.step,
                    outcome.figures,
                    learning_rate,
                    waited,
                    batch.bad,
                    state.skipped_steps,
                    evaluation_follows=evaluating,
                )
                if evaluation is not None and evaluating:
                    watch.record_evaluation(state.step, evaluation.score(state.learner.features, device))
                if state.step % config.checkpoint.every_steps == 0:
                    saved_step = _save(checkpoints, state)
            if saved_step != state.step:
                _save(checkpoints, state)
        except RuntimeError as error:
            if lost := lost_worker(error):
                raise lost from None
            raise
        finally:
            stop.close()
            stream.close()
            watch.close()
        return _close(config, run, state, watch)


def _start(config: TrainConfig, device: torch.device, learning_rate: float) -> TrainState:
    learner = build.learner(config, device=device)
    return TrainState(
        learner=learner,
        statistics=RunningStatistics(learner),
        optimizer=build.optimizer(config, learner, learning_rate),
        skipped_steps=torch.zeros((), dtype=torch.int64, device=device),
    )


def _initial_weights(config: TrainConfig) -> dict[str, Tensor] | None:
    """The weights that the backbone starts from, if any; refuses what cannot be built before a file is written.

    Raises:
        UserError: a shape that is no RegNet, or weights of another one.
    """
    architecture = build.learner(config, device=torch.device("meta")).backbone.architecture()
    if config.train.init_from is None or not CheckpointStore(checkpoints_of(config.run_dir)).is_empty():
        return None  # a run that goes on has better weights, and may outlive the file
    weights = load_exported(Path(config.train.init_from))
    if weights.architecture != architecture:
        raise UserError(
            f"train.init_from={config.train.init_from} holds another architecture ({weights.architecture})",
            f"weights fit the network that they were trained in, and this run's is {architecture}",
            "set backbone.name (and strides) to the file's, or leave train.init_from out",
        )
    return weights.tensors


def _settings(config: TrainConfig, device: torch.device) -> StepSettings:
    dtype, autocast = build.precision_of(config)
    return StepSettings(
        device=device,
        dtype=dtype,
        autocast=autocast,
        channels_last=build.channels_last(device),
        photometric=build.photometric_spec(config.data),
        average_statistics=not config.parallel.sync_batchnorm,
    )


def _evaluation(config: TrainConfig) -> OnlineEvaluation | None:
    settings = config.evaluation
    if not settings.every_steps:
        return None
    return OnlineEvaluation(
        ShardList.open(settings.train),
        ShardList.open(settings.val),
        every_steps=settings.every_steps,
        image_size=config.data.large.size,
        max_bank_images=settings.max_train_images,
        max_query_images=settings.max_val_images,
        k=settings.k,
        temperature=settings.temperature,
        dtype=build.precision_of(config)[0],
    )


def _save(checkpoints: CheckpointStore, state: TrainState) -> int:
    position = {"step": state.step, "batch_index": state.batch_index, "bad_samples": state.bad_samples}
    checkpoints.save(state.step, state_tensors(state), position)
    return state.step


def _introduce(
    config: TrainConfig,
    run: RunDirectory,
    stream: DataStream,
    state: TrainState,
    device: torch.device,
    resolved: dict[str, Resolved],
) -> None:
    """What is about to happen, and every derived value with its reason."""
    weights = sum(parameter.numel() for parameter in state.learner.backbone.parameters())
    print(
        f"{run.folder}: {config.backbone.name} ({weights / 1e6:.2f} M weights) on {device.type}, "
        f"{config.train.precision}, {stream.samples:,} images, batches of {config.train.global_batch_size}, "
        f"{config.train.steps:,} steps ({config.train.steps / stream.batches_per_epoch:.1f} epochs)"
    )
    for key, (value, reason) in resolved.items():
        if reason != "given":
            print(f"  {key} = {value}: {reason}")
    if state.step:
        print(f"  going on from step {state.step:,}")
    print(f"  first news after {config.train.log_every_steps} steps", flush=True)


def _conclude(run: RunDirectory, result: dict[str, Any]) -> None:
    minutes, seconds = divmod(round(result["seconds"]), 60)
    scores = f", kNN top-1 {result['knn_top1']:.1%}" if "knn_top1" in result else ""
    loss = "not finite" if result["loss"] is None else f"{result['loss']:.3f}"
    print(
        f"{result['state']}: {result['steps']:,} steps in {minutes} min {seconds} s, "
        f"loss {loss} (chance {result['chance']:.3f}){scores}"
    )
    if result["loss"] is not None and result["loss"] > 0.98 * result["chance"]:
        print("the loss has not left chance: too few steps yet, or docs/troubleshooting.md, first section")
    for weights in result["exports"]:
        print(f"weights for timm: {weights}")
    if result["state"] != "finished":
        print(f"the same command goes on from {run.checkpoints}")


def _close(config: TrainConfig, run: RunDirectory, state: TrainState, watch: Watch) -> Result:
    finished = state.step >= config.train.steps
    result: dict[str, Any] = {
        "state": "finished" if finished else "stopped",
        "steps": state.step,
        "seconds": watch.seconds,
        "loss": watch.last_loss,
        "chance": state.learner.objective.chance,
        "skipped_steps": int(state.skipped_steps),
        "bad_samples": state.bad_samples,
        "exports": [],
    }
    if watch.last_evaluation is not None:
        result |= watch.last_evaluation
    if finished:
        run.exports.mkdir(exist_ok=True)
        weights = export_timm(
            state.learner.backbone,
            run.exports / "regnety.safetensors",
            image_size=config.data.large.size,
            step=state.step,
        )
        result["exports"] = [str(weights.resolve())]
    run.write_result(result)
    _conclude(run, result)
    return Result(0 if finished else EXIT_STOPPED, result)

"""The run: whoever reads only this file knows what the system does."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seer import build, distributed
from seer.amounts import many, said
from seer.checkpoint.store import CheckpointStore
from seer.config import TrainConfig, freeze
from seer.data.stream import DataStream, QuarantinedSample
from seer.data.transfer import on_device
from seer.decoders import installed_decoders, require_decoder
from seer.derived import Resolved, reading, resolve, resolve_decoder
from seer.errors import EXIT_STOPPED, LostRank, UserError
from seer.evaluation.online import OnlineEvaluation
from seer.handoff.timm_format import export_timm, load_exported
from seer.launching import slurm
from seer.launching.finished import finished_result
from seer.observe.progress import duration
from seer.observe.watch import Quarantine, Watch
from seer.rank_environment import rank_environment, told_once
from seer.run_directory import RunDirectory, check_can_run, checkpoints_of, recorded_data
from seer.shard_list import ShardList
from seer.training.bad_share import BadShare
from seer.training.shards import agreed_history, agreed_shards, check_cache
from seer.training.state import TrainState, fresh_state, load_state, state_tensors
from seer.training.step import float_crops, set_learning_rate, step_settings, train_step
from seer.training.stop import StopRequest
from seer.validation import validate

_FEWEST_STEPS = 300  # before which a loss at chance says nothing


@dataclass(frozen=True)
class Result:
    """How a run ended on this rank.

    Attributes:
        exit_code: 0 finished, 75 stopped.
        result: what stands in RUN/result.json; empty on other ranks than the first.
        again: the run was stopped by the end of its job and made progress in it: it shall be queued again.
    """

    exit_code: int
    result: dict[str, Any]
    again: bool = False


def run(config: TrainConfig, *, take_over: bool = False) -> Result:
    """Train from wherever the run directory stands to ``train.steps``, or until a signal or the clock asks to stop.

    Every process of the run calls it; what the launcher set in the environment says which one this is.

    Args:
        config: composed.
        take_over: go on although a process on another machine holds the run, of which nobody can tell whether it lives.

    Raises:
        UserError: what the configuration or the data make impossible, before anything is written where possible.
        LostRank: another process of the run is gone.
    """
    with told_once():
        environment = rank_environment()
        validate(config, world_size=environment.world_size if environment else 1)
        device = build.device_of(config)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    with distributed.processes(device, timeout_seconds=config.parallel.timeout_seconds):
        return _run(config, device, take_over)


def _run(config: TrainConfig, device: torch.device, take_over: bool) -> Result:
    first = distributed.rank() == 0
    with distributed.together():
        finished = finished_result(config) if first else None
        if first and finished is None:
            check_can_run(config.run_dir, freeze(config), take_over=take_over)
    if (finished := distributed.of_first_rank(finished)) is not None:
        if first:
            _conclude(config, finished)
            folder = Path(config.run_dir).expanduser().absolute()
            print(f"{folder} is finished; delete it or name another run_dir to train anew")
        return Result(0, finished if first else {})
    fresh = CheckpointStore(checkpoints_of(config.run_dir)).is_empty()
    with distributed.together():
        strategy = build.strategy(config, device=device)
        processes = environment.local_world_size if (environment := rank_environment()) else 1
        resolved = resolve(config, processes=processes, cores=slurm.cores_of_task(), device=device.type)
        resolved["parallel.strategy"] = strategy
        torch.set_num_threads(resolved["train.threads"].value)
        evaluation = _evaluation(config)
        peak = resolved["optimizer.learning_rate"].value
        schedule = build.schedule(config, peak=peak, warmup_steps=resolved["optimizer.warmup_steps"].value)
        initial_weights = _initial_weights(config, fresh=fresh)
    opened = agreed_shards(config)
    with distributed.together():
        run = (
            RunDirectory.open(config.run_dir, freeze(config), take_over=take_over)
            if first
            else RunDirectory.join(config.run_dir, freeze(config))
        )

    with run:
        checkpoints = CheckpointStore(
            run.checkpoints,
            config.checkpoint.keep,
            config.checkpoint.keep_every_steps,
            may_publish=run.require_ownership,
        )
        newest = checkpoints.newest()
        batch_index = 0 if newest is None else newest.state["batch_index"]
        history = agreed_history(config, run, batch_index, *opened)
        resolved["data.decoder"] = decoder = _decoder(config)
        with distributed.together():
            resolved |= build.order(config, history)
            workers = resolved["data.workers"].value
            stream = build.stream(config, workers=workers, decoder=decoder.value, opened=opened, history=history)
            if first:
                run.record(resolved=resolved, data=stream.identity(), shards=history.to_json())
        state = fresh_state(config, device=device, strategy=strategy.value, learning_rate=peak)
        if initial_weights is not None:
            for name, tensor in state.learner.backbone.state_dict().items():
                distributed.fill(tensor, initial_weights[name])
        if newest is not None:
            load_state(state, newest)
            stream.add_to_quarantine(QuarantinedSample(*sample) for sample in newest.state.get("quarantine", []))
        start_step = saved_step = None if newest is None else newest.step
        with distributed.together():
            quarantine = Quarantine(run, state.step)
            watch = _watch(config, run, state, stream) if first else None
        bad_share = BadShare(
            config.data.max_bad_share,
            global_batch_size=config.train.global_batch_size,
            step=state.step,
            bad_samples=state.bad_samples,
            lists=str(run.quarantine().with_stem("rank-*" if distributed.world_size() > 1 else "rank-0")),
        )
        if first:
            _introduce(config, run, stream, state, device, resolved)
            for arrival in history.to_come(state.batch_index, config.train.steps):
                print(arrival)
        settings = step_settings(config, device)
        stop = _stop_request(config)
        batches = on_device(stream.batches(state.batch_index), stream.memory, device)
        try:
            while state.step < config.train.steps and not stop.agreed():
                set_learning_rate(state.optimizer, learning_rate := schedule.at(state.step))
                asked = time.perf_counter()
                batch = next(batches)
                waited = time.perf_counter() - asked
                crops = float_crops(batch, settings)
                outcome = train_step(
                    state,
                    crops,
                    settings,
                    bad_samples=batch.replaced,
                    worker_deaths=stream.worker_deaths,
                    requests=stop.of_this_rank(),
                )
                stop.observe(outcome.requests)
                quarantine.record(state.step, batch.bad)
                evaluating = evaluation is not None and evaluation.due(state.step, config.train.steps)
                if watch is not None:
                    watch.record(
                        state.step,
                        outcome.figures,
                        learning_rate,
                        waited,
                        bad_samples=state.bad_samples,
                        skipped_steps=state.skipped_steps,
                        worker_deaths=outcome.worker_deaths,
                        evaluation_follows=evaluating,
                    )
                bad_share.observe(state.step, state.bad_samples, batch.bad)
                if evaluation is not None and evaluating:
                    scores = evaluation.score(state.learner.features, device)
                    if watch is not None and scores is not None:
                        watch.record_evaluation(state.step, scores)
                if state.step % config.checkpoint.every_steps == 0:
                    saved_step = _save(checkpoints, state, stream, stop)
            if saved_step != state.step:
                _save(checkpoints, state, stream, stop)
        except RuntimeError as error:
            if distributed.lost_rank(error):
                what = f"another process of the run is gone ({_first_words(error)})"
                raise LostRank(f"{what}: the same command goes on from the last checkpoint") from error
            raise
        finally:
            stop.close()
            batches.close()
            stream.close()
            if watch is not None:
                watch.close()
        finished_now = state.step >= config.train.steps
        last = checkpoints.newest() if finished_now else None
        result: dict[str, Any] = {}
        if watch is not None:
            result = _result(state, watch)
            if last is not None:
                result["exports"] = [_export(config, run, last.tensors("model/backbone."), state.step)]
            run.write_result(result)
            _conclude(config, result)
            if not finished_now:
                print(f"the same command goes on from {run.checkpoints}")
        progress = start_step is None or state.step > start_step
        return Result(0 if finished_now else EXIT_STOPPED, result, again=first and stop.again and progress)


def _decoder(config: TrainConfig) -> Resolved:
    """What makes the crops: what the first rank decides, and every rank must have installed."""
    installed = installed_decoders()
    decoder: Resolved | None = None
    with distributed.together():
        if distributed.rank() == 0:
            recorded = (recorded_data(config.run_dir) or {}).get("decoder")
            decoder = resolve_decoder(config, recorded=recorded, installed=installed)
    agreed: Resolved = distributed.of_first_rank(decoder)
    with distributed.together():
        require_decoder(agreed.value, installed)
    return agreed


def _initial_weights(config: TrainConfig, *, fresh: bool) -> dict[str, Tensor] | None:
    """The weights that the backbone starts from, if any; refuses what cannot be built before a file is written.

    Raises:
        UserError: a shape that is no RegNet, or weights of another one.
    """
    architecture = build.learner(config, device=torch.device("meta")).backbone.architecture()
    if config.train.init_from is None or not fresh:
        return None  # a run that goes on has better weights, and may outlive the file
    weights = load_exported(Path(config.train.init_from))
    if weights.architecture != architecture:
        raise UserError(
            f"train.init_from={config.train.init_from} holds another architecture ({weights.architecture})",
            f"weights fit the network that they were trained in, and this run's is {architecture}",
            "set backbone.name (and strides) to the file's, or leave train.init_from out",
        )
    return weights.tensors


def _evaluation(config: TrainConfig) -> OnlineEvaluation | None:
    settings = config.evaluation
    if not settings.every_steps:
        return None
    train, val = (ShardList.open(patterns, reading=reading(config.data)) for patterns in (settings.train, settings.val))
    check_cache(train)
    check_cache(val)
    return OnlineEvaluation(
        train,
        val,
        every_steps=settings.every_steps,
        image_size=config.data.large.size,
        limits=build.image_limits(config.data),
        max_bank_images=settings.max_train_images,
        max_query_images=settings.max_val_images,
        k=settings.k,
        temperature=settings.temperature,
        dtype=build.precision_of(config)[0],
    )


def _watch(config: TrainConfig, run: RunDirectory, state: TrainState, stream: DataStream) -> Watch:
    return Watch(
        run,
        start_step=state.step,
        total_steps=config.train.steps,
        chance=state.learner.objective.chance,
        log_every_steps=config.train.log_every_steps,
        global_batch_size=config.train.global_batch_size,
        epochs=stream.epochs,
    )


def _stop_request(config: TrainConfig) -> StopRequest:
    end = slurm.job_end_time() if distributed.rank() == 0 else None
    if end is None and slurm.job_id() is not None and config.launch.name == "slurm":
        end = time.time() + 60 * config.launch.time_limit_minutes  # SLURM does not answer; the job is seconds old
    deadline = None if end is None else end - config.launch.stop_before_end_seconds
    return StopRequest(deadline=deadline, patient=slurm.job_id() is not None)


def _save(checkpoints: CheckpointStore, state: TrainState, stream: DataStream, stop: StopRequest) -> int:
    began = time.perf_counter()
    # What one rank has found is replaced by all of them from here on, and by whoever goes on from here.
    for found in distributed.gather_objects(sorted(stream.quarantine)):
        stream.add_to_quarantine(found)
    position = {"step": state.step, "batch_index": state.batch_index, "quarantine": sorted(stream.quarantine)}
    checkpoints.save(state.step, state_tensors(state), position)
    stop.save_seconds = time.perf_counter() - began
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
    ranks = distributed.world_size()
    where = device.type if ranks == 1 else f"{ranks} x {device.type}"
    print(
        f"{run.folder}: {config.backbone.name} ({weights / 1e6:.2f} M weights) on {where}, "
        f"{config.train.precision}, {many(stream.samples, 'image')}, batches of {config.train.global_batch_size}, "
        f"{many(config.train.steps, 'step')} ({stream.epochs(config.train.steps):.1f} epochs)"
    )
    for key, (value, reason) in resolved.items():
        if reason != "given":
            shares = value.items() if isinstance(value, Mapping) else ()
            print(f"  {key} = {', '.join(f'{name} {images}' for name, images in shares) or value}: {reason}")
    remote, remote_bytes = stream.remote_shards
    if remote:
        cache = reading(config.data)
        kept = f"kept in {cache.cache_folder}, at most {config.data.cache_gb:g} GB" if cache.cache_bytes else "not kept"
        print(f"  {many(remote, 'remote shard')} ({said(remote_bytes)}), {kept}")
    if state.step:
        print(f"  going on from step {state.step:,}")
    every, left = config.train.log_every_steps, config.train.steps - state.step
    print(f"  first news after {many(min(every - state.step % every, left), 'step')}", flush=True)


def _conclude(config: TrainConfig, result: dict[str, Any]) -> None:
    scores = f", kNN top-1 {result['knn_top1']:.1%}" if "knn_top1" in result else ""
    loss = "not finite" if result["loss"] is None else f"{result['loss']:.3f}"
    print(
        f"{result['state']}: {many(result['steps'], 'step')} in {duration(result['seconds'])}, "
        f"loss {loss} (chance {result['chance']:.3f}){scores}"
    )
    if bad := result["bad_samples"]:
        print(f"{many(bad, 'bad image')} replaced (quarantine/rank-*.jsonl)")
    tells = result["steps"] >= max(_FEWEST_STEPS, config.train.steps // 10)  # the warm-up is over
    if tells and result["loss"] is not None and result["loss"] > 0.98 * result["chance"]:
        print("the loss has not left chance: too few steps yet, or docs/troubleshooting.md, first section")
    for weights in result["exports"]:
        print(f"weights for timm: {weights}")


def _result(state: TrainState, watch: Watch) -> dict[str, Any]:
    result: dict[str, Any] = {
        "state": "finished" if state.step >= watch.total_steps else "stopped",
        "steps": state.step,
        "seconds": watch.seconds,
        "loss": watch.last_loss,
        "chance": state.learner.objective.chance,
        "skipped_steps": int(state.skipped_steps),
        "bad_samples": int(state.bad_samples),
        "worker_deaths": watch.worker_deaths,
        "exports": [],
    }
    return result | (watch.last_evaluation or {})


def _export(config: TrainConfig, run: RunDirectory, tensors: dict[str, Tensor], step: int) -> str:
    run.exports.mkdir(exist_ok=True)
    backbone = build.saved_backbone(config, tensors)
    weights = export_timm(backbone, run.exports / "regnety.safetensors", image_size=config.data.large.size, step=step)
    return str(weights.resolve())


def _first_words(error: BaseException) -> str:
    """What gloo and NCCL say, without the line of their code before it and the advice after it."""
    return re.sub(r"^\[[^\]]*:\d+\] ", "", str(error)).partition(". ")[0].partition("\n")[0] or type(error).__name__

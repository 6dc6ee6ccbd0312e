"""Is a training step of seer as fast as one written from public parts?

    python benchmarks/bench_step.py                                  # tiny and 400mf, all rows: minutes
    python benchmarks/bench_step.py --model tiny --out step.json
    python benchmarks/bench_step.py --quick --model tiny             # does it run at all

One step on a CPU, from float crops (2 of 96 pixels and 4 of 48 an image) to new weights. Ours is `train_step` of
`seer.training.step` with LARC. The baseline is in this file: timm's RegNetY, one forward a resolution, SwAV's loss and
loop as published (facebookresearch/swav), LARC a tensor at a time as in apex, torch's SGD. Both start with the same
weights and get the same batch, precision and memory format; before anything is timed they must give the same losses.

The contenders of a row take turns in each round, and a ratio is the median of the rounds' ratios. Process CPU time
decides: other processes disturb it less than the wall clock.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import gc
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from machine import machine
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from seer import build
from seer.config import ObjectiveConfig, TrainConfig
from seer.files import write_atomically
from seer.observe.progress import Progress
from seer.observe.watch import Watch
from seer.run_directory import RunDirectory
from seer.training.state import TrainState, fresh_state
from seer.training.step import StepSettings, set_learning_rate, train_step

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from torchvision_shim import make_torchvision_importable

LARGE_CROPS, LARGE_SIZE, SMALL_CROPS, SMALL_SIZE = 2, 96, 4, 48
WARM_UP_STEPS = 2
CPU = torch.device("cpu")
OBJECTIVES = {
    "tiny": ObjectiveConfig(  # as experiment=demo
        prototypes=64, embedding_size=64, head_hidden_sizes=[256], epsilon=0.02
    ),
    "400mf": ObjectiveConfig(  # as experiment=small
        prototypes=256, embedding_size=128, head_hidden_sizes=[1024], epsilon=0.02
    ),
}

Step = Callable[[], float]
"""Takes one step on the batch that it was made for; returns the loss, or 0 where there is none."""


class Layout(NamedTuple):
    """Precision and memory format that both sides get."""

    precision: str
    channels_last: bool

    @property
    def label(self) -> str:
        return f"{self.precision} {'channels_last' if self.channels_last else 'contiguous'}"

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def autocast(self) -> torch.autocast:
        return torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.precision == "bf16")


LAYOUTS = [Layout("fp32", False), Layout("fp32", True), Layout("bf16", False), Layout("bf16", True)]
PLAIN = LAYOUTS[0]  # what torch and timm do when nobody says otherwise


# --- ours ---


def configuration(model: str, batch: int, precision: str) -> TrainConfig:
    """The defaults, for this network and batch."""
    config = TrainConfig(run_dir="unused")
    config.backbone.name = model
    config.objective = dataclasses.replace(OBJECTIVES[model])
    config.train.global_batch_size = batch
    config.train.precision = precision
    config.data.large.count, config.data.large.size = LARGE_CROPS, LARGE_SIZE
    config.data.small.count, config.data.small.size = SMALL_CROPS, SMALL_SIZE
    return config


def default_layout() -> Layout:
    """What seer does on a CPU when nobody says otherwise."""
    return Layout(TrainConfig().train.precision, build.channels_last(CPU))


def learning_rate(config: TrainConfig) -> float:
    return config.optimizer.base_learning_rate * config.train.global_batch_size / 256


def our_state(config: TrainConfig, layout: Layout) -> tuple[TrainState, StepSettings]:
    state = fresh_state(config, device=CPU, strategy="single", learning_rate=learning_rate(config))
    state.learner.backbone.to(memory_format=layout.memory_format)
    _, autocast = build.precision_of(config)
    settings = StepSettings(
        device=CPU,
        autocast=autocast,
        channels_last=layout.channels_last,
        photometric=build.photometric_of(config, CPU),
        average_statistics=not config.parallel.sync_batchnorm,
    )
    return state, settings


def our_step(state: TrainState, settings: StepSettings, rate: float, crops: list[Tensor]) -> Step:
    """The bare loop: the learning rate, the step, no observer."""

    def step() -> float:
        set_learning_rate(state.optimizer, rate)
        return train_step(state, crops, settings).figures["loss"].item()

    return step


def our_backbone(state: TrainState, layout: Layout, crops: list[Tensor]) -> Step:
    """Only the backbone's forward and backward of that step: the same crops, gradients of the same shapes."""
    backbone = state.learner.backbone
    with torch.no_grad(), layout.autocast():
        gradients = [torch.full_like(features, 1e-3) for features in backbone(crops)]

    def step() -> float:
        backbone.train()
        with layout.autocast():
            features = backbone(crops)
        backbone.zero_grad(set_to_none=True)
        torch.autograd.backward(features, gradients)
        return 0.0

    return step


def our_observed_step(
    state: TrainState, settings: StepSettings, rate: float, crops: list[Tensor], watch: Watch
) -> Step:
    """The step with the observers of a run behind it."""

    def step() -> float:
        set_learning_rate(state.optimizer, rate)
        outcome = train_step(state, crops, settings)
        counts = {"bad_samples": state.bad_samples, "skipped_steps": state.skipped_steps}
        watch.record(state.step, outcome.figures, rate, 0.0, worker_deaths=outcome.worker_deaths, **counts)
        return outcome.figures["loss"].item()

    return step


def open_watch(config: TrainConfig, state: TrainState, open_files: ExitStack) -> Watch:
    """Observers that write each step, ten times as often as by default, into a run directory that goes away."""
    folder = Path(open_files.enter_context(tempfile.TemporaryDirectory()))
    run = open_files.enter_context(RunDirectory.open(folder / "run", dataclasses.asdict(config)))
    stdout = open_files.enter_context((folder / "stdout").open("w"))
    lines = Console(file=stdout, soft_wrap=True, highlight=False)
    chance = state.learner.objective.chance
    watch = Watch(
        run,
        start_step=0,
        total_steps=config.train.steps,
        chance=chance,
        log_every_steps=1,
        global_batch_size=config.train.global_batch_size,
        epochs=lambda step: step / 1000,
        progress=Progress(config.train.steps, chance, lines),
    )
    open_files.callback(watch.close)
    return watch


# --- the baseline, from public parts ---


class PublicSwAV(nn.Module):
    """timm's RegNetY with SwAV's head; takes the initial weights of ours."""

    def __init__(self, learner: build.Learner) -> None:
        super().__init__()
        depth, w0, wa, wm, group_width = learner.backbone.shape.parameters
        make_torchvision_importable()
        import timm

        self.backbone = timm.create_model(
            "regnety_002", depth=depth, w0=w0, wa=wa, wm=wm, group_size=group_width, num_classes=0
        )
        self.backbone.load_state_dict(learner.backbone.state_dict())
        self.head = copy.deepcopy(learner.objective.head)  # torch's Linear, BatchNorm1d and ReLU, nothing of ours
        self.prototypes = copy.deepcopy(learner.objective.prototypes)

    def forward(self, crops: list[Tensor]) -> Tensor:
        features = torch.cat([self.backbone(resolution) for resolution in crops])
        return self.prototypes(F.normalize(self.head(features), dim=1))


@torch.no_grad()
def public_sinkhorn(scores: Tensor, epsilon: float, iterations: int) -> Tensor:
    """Assignments (N, K) of scores (N, K), as published: the whole matrix is rescaled again and again."""
    plan = torch.exp(scores / epsilon).t()
    prototypes, samples = plan.shape
    plan /= plan.sum()
    for _ in range(iterations):
        plan /= plan.sum(dim=1, keepdim=True)
        plan /= prototypes
        plan /= plan.sum(dim=0, keepdim=True)
        plan /= samples
    return (plan * samples).t()


def public_loss(scores: Tensor, images: int, settings: ObjectiveConfig) -> Tensor:
    """SwAV's loss of scores (crops x N, K), crop by crop."""
    per_crop = scores.split(images)
    loss = scores.new_zeros(())
    for assigned in range(LARGE_CROPS):
        assignments = public_sinkhorn(per_crop[assigned].detach(), settings.epsilon, settings.iterations)
        others = [crop for index, crop in enumerate(per_crop) if index != assigned]
        swapped = scores.new_zeros(())
        for crop in others:
            swapped -= (assignments * F.log_softmax(crop / settings.temperature, dim=1)).sum(dim=1).mean()
        loss += swapped / len(others)
    return loss / LARGE_CROPS


class PublicLARC:
    """torch's SGD behind gradients that are scaled tensor by tensor, the norms compared in Python (as apex does)."""

    def __init__(
        self, parameters: list[nn.Parameter], *, lr: float, momentum: float, decay: float, trust: float
    ) -> None:
        self._sgd = torch.optim.SGD(parameters, lr=lr, momentum=momentum)
        self._decay, self._trust = decay, trust

    def zero_grad(self) -> None:
        self._sgd.zero_grad()

    @torch.no_grad()
    def step(self) -> None:
        for group in self._sgd.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                weight_norm, gradient_norm = torch.norm(weight), torch.norm(weight.grad)
                if weight_norm != 0 and gradient_norm != 0:
                    rate = self._trust * weight_norm / (gradient_norm + weight_norm * self._decay + 1e-8)
                    weight.grad += self._decay * weight
                    weight.grad *= rate
        self._sgd.step()


def public_step(config: TrainConfig, layout: Layout, crops: list[Tensor], learner: build.Learner) -> Step:
    network = PublicSwAV(learner).train()
    network.backbone.to(memory_format=layout.memory_format)
    optimizer = PublicLARC(
        list(network.parameters()),
        lr=learning_rate(config),
        momentum=config.optimizer.momentum,
        decay=config.optimizer.weight_decay,
        trust=config.optimizer.trust_coefficient,
    )
    images = len(crops[0]) // LARGE_CROPS

    def step() -> float:
        with torch.no_grad():
            network.prototypes.weight.copy_(F.normalize(network.prototypes.weight, dim=1))
        with layout.autocast():
            scores = network(crops)
        loss = public_loss(scores.float(), images, config.objective)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


# --- measuring ---


class Seconds(NamedTuple):
    cpu: float
    wall: float


def timed(step: Step) -> Seconds:
    cpu, wall = time.process_time(), time.perf_counter()
    step()
    return Seconds(time.process_time() - cpu, time.perf_counter() - wall)


def take_turns(contenders: dict[str, Step], rounds: int) -> dict[str, list[Seconds]]:
    """Seconds of each contender in each round; each round begins with another one."""
    times: dict[str, list[Seconds]] = {name: [] for name in contenders}
    names = list(contenders)
    gc.collect()
    for index in range(rounds):
        first = index % len(names)
        for name in names[first:] + names[:first]:
            times[name].append(timed(contenders[name]))
    return times


def check_same_losses(model: str, layout: Layout, ours: Step, baseline: Step) -> None:
    """Takes the warm-up steps; both sides must do the same work, or their times say nothing."""
    # bf16 rounds scores to 3 digits, and epsilon 0.02 multiplies the error by 50 before the assignments are made.
    tolerance = 1e-3 if layout.precision == "fp32" else 5e-2
    for number in range(WARM_UP_STEPS):
        own, public = ours(), baseline()
        if not math.isclose(own, public, rel_tol=tolerance):
            sys.exit(f"{model}, {layout.label}, step {number}: our loss {own:.6f}, the baseline's {public:.6f}")


def ratio(times: list[Seconds], reference: list[Seconds], clock: str) -> float:
    """Median over rounds of times / reference."""
    return statistics.median(
        getattr(own, clock) / getattr(other, clock) for own, other in zip(times, reference, strict=True)
    )


def median(times: list[Seconds], clock: str) -> float:
    return statistics.median(getattr(seconds, clock) for seconds in times)


def measure(model: str, batch: int, rounds: int) -> dict[str, Any]:
    """All rows of one model, and the two shares at the default layout."""
    default = default_layout()
    # One layout after the other: oneDNN keeps 1024 compiled kernels, four layouts in turn have more, and then whoever
    # comes first in a layout compiles anew in each round.
    times = {layout: measure_layout(model, layout, batch, rounds, shares=layout == default) for layout in LAYOUTS}
    bare = times[default]["ours"]
    rows = {layout.label: row(times[layout]["ours"], times[layout]["baseline"], batch) for layout in LAYOUTS}
    return {
        "rows": rows | {"each at its defaults": row(bare, times[PLAIN]["baseline"], batch)},
        "outside_backbone_share": 1 - ratio(times[default]["backbone"], bare, "cpu"),
        "observer_overhead": ratio(times[default]["observed"], bare, "cpu") - 1,
    }


def measure_layout(model: str, layout: Layout, batch: int, rounds: int, *, shares: bool) -> dict[str, list[Seconds]]:
    """Seconds of `ours` and `baseline`, and where shares are asked for of `backbone` and `observed`."""
    generator = torch.Generator().manual_seed(0)
    crops = [
        torch.randn(count * batch, 3, size, size, generator=generator).contiguous(memory_format=layout.memory_format)
        for count, size in ((LARGE_CROPS, LARGE_SIZE), (SMALL_CROPS, SMALL_SIZE))
    ]
    config = configuration(model, batch, layout.precision)
    rate = learning_rate(config)
    state, settings = our_state(config, layout)
    contenders = {
        "baseline": public_step(config, layout, crops, state.learner),
        "ours": our_step(state, settings, rate, crops),
    }
    check_same_losses(model, layout, contenders["ours"], contenders["baseline"])
    with ExitStack() as open_files:
        if shares:
            watched, _ = our_state(config, layout)
            watch = open_watch(config, watched, open_files)
            contenders["backbone"] = our_backbone(state, layout, crops)
            contenders["observed"] = our_observed_step(watched, settings, rate, crops, watch)
            for name in ("backbone", "observed"):
                contenders[name]()
        return take_turns(contenders, rounds)


def row(ours: list[Seconds], baseline: list[Seconds], batch: int) -> dict[str, float]:
    """Images a second of both and the ratio, by both clocks."""
    found = {}
    for clock in Seconds._fields:
        found[f"ours_{clock}_images_per_s"] = batch / median(ours, clock)
        found[f"baseline_{clock}_images_per_s"] = batch / median(baseline, clock)
        found[f"{clock}_ratio"] = ratio(baseline, ours, clock)
    return found


# --- telling ---


def table(model: str, found: dict[str, Any], title: str) -> Table:
    shown = Table(title=title)
    shown.add_column(model)
    for heading in ("ours, images/CPU s", "baseline", "ratio", "ratio by wall"):
        shown.add_column(heading, justify="right")
    for label, row in found["rows"].items():
        shown.add_row(
            label,
            f"{row['ours_cpu_images_per_s']:.1f}",
            f"{row['baseline_cpu_images_per_s']:.1f}",
            f"{row['cpu_ratio']:.2f}",
            f"{row['wall_ratio']:.2f}",
        )
    return shown


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=list(OBJECTIVES), default=list(OBJECTIVES))
    parser.add_argument("--batch", type=int, default=32, help="images a step (default 32)")
    parser.add_argument("--rounds", type=int, default=15, help="steps of each contender (default 15)")
    # With several threads those that wait for the others spin, which counts as CPU time.
    parser.add_argument("--threads", type=int, default=1, help="of torch (default 1; more only on a quiet machine)")
    parser.add_argument("--quick", action="store_true", help="batch 8, two rounds: it runs, the times mean little")
    parser.add_argument("--out", type=Path, help="write everything that was measured as JSON")
    given = parser.parse_args()
    if given.quick:
        given.batch, given.rounds = 8, 2
    return given


def main() -> None:
    given = arguments()
    torch.set_num_threads(given.threads)
    console = Console()
    found = {}
    for model in given.model:
        found[model] = measure(model, given.batch, given.rounds)
        title = f"batch {given.batch}, {given.threads} threads, medians of {given.rounds} rounds"
        console.print(table(model, found[model], title))
        console.print(
            f"{model}: {found[model]['outside_backbone_share']:.1%} of the step lies outside the backbone's forward "
            f"and backward; observers that write each step add {found[model]['observer_overhead']:.1%}"
        )
    fair = [layout.label for layout in LAYOUTS]
    told: dict[str, Any] = {
        f"{model}_ratio": round(min(found[model]["rows"][label]["cpu_ratio"] for label in fair), 3) for model in found
    }
    told["outside_backbone_share"] = {model: round(found[model]["outside_backbone_share"], 4) for model in found}
    told["observer_overhead"] = round(max(found[model]["observer_overhead"] for model in found), 4)
    if given.out:
        run = {
            "command": sys.argv,
            "date": date.today().isoformat(),
            "machine": machine("timm"),
            "threads": given.threads,
        }
        everything = run | {"batch": given.batch, "rounds": given.rounds, "models": found, "summary": told}
        write_atomically(given.out, (json.dumps(everything, indent=2) + "\n").encode())
    print(json.dumps(told))


if __name__ == "__main__":
    main()

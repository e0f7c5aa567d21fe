"""The training loop: a batch enters, meets the mixtures, goes back, the hook averages, it is written down.

Every random draw of a step comes from generators seeded by (seed, epoch, batch, rank), so a resumed run goes
on exactly, and two runs that differ in the method alone see the same images.
"""

from __future__ import annotations

import math
import os
import random
import resource
import signal
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from itertools import zip_longest
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import broadcast, gather_object
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from ewavit.diagnostics import expert_spread
from ewavit.errors import EwavitError
from ewavit.moe import moe_layers
from ewavit.replicas import clip_grad_norm_, load_stacked_state_dict, stacked_state_dict
from ewavit.routing import scale_auxiliary_loss
from ewavit.streaming import expert_metadata
from ewavit.surgery import collapsed, dense_state_dict
from ewavit.theory import SpreadPrediction
from ewavit.training import report
from ewavit.training.augmentation import Mix
from ewavit.training.batches import Batch, entropy
from ewavit.training.building import (
    build_model,
    build_optimizer,
    build_scheduler,
    expand_by_recipe,
    expert_averaging,
    model_settings,
    set_grad_checkpointing,
)
from ewavit.training.checkpoint import (
    CURRENT,
    PREVIOUS,
    Checkpoint,
    load_checkpoint,
    save_checkpoint,
    save_tensors,
)
from ewavit.training.data import open_recipe_data
from ewavit.training.evaluation import Metrics, evaluate_batches, predictions
from ewavit.training.export import Mixture, ModelCard
from ewavit.training.processes import start_accelerator, started_again, told_of_lost_processes
from ewavit.training.recipe import Recipe
from ewavit.training.weight_average import WeightAverage, weight_average

OBSERVE_EVERY = 20  # optimizer steps between two measurements of the gradient noise


@dataclass(frozen=True)
class Result:
    """A finished run: its folder, the last epoch's row of `summary.csv`, and the collapsed model's file."""

    run: Path
    row: report.Row
    model_file: Path


class Interrupted(Exception):
    """The run was stopped by a signal after its checkpoint was written."""

    def __init__(self, run: Path, signal_number: int) -> None:
        super().__init__(f"stopped; go on with: ewavit train --resume {run}")
        self.exit_status = 128 + signal_number


@dataclass
class Progress:
    """How far a run is; `batch` counts within the epoch, `update` optimizer steps in all."""

    epoch: int = 0
    batch: int = 0
    update: int = 0
    loss_sum: float = 0.0
    loss_count: int = 0
    lr: float = 0.0  # of the latest step
    seconds: float = 0.0  # spent in training steps
    rows: list[report.Row] = field(default_factory=list)


def train(recipe: Recipe) -> Result:
    """Train a model from its first step and leave `recipe.output/name/`.

    Raises:
        EwavitError: wrong input, a loss that is not finite, or a disk that is full.
        ProcessLost: another process of the run ended.
        Interrupted: SIGINT or SIGTERM; the checkpoint is written.

    Started again by `torchrun --max-restarts`, it resumes the run of its name from the last checkpoint.
    """
    if recipe.name is None and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0:
        raise EwavitError("a run that torchrun may restart is found by its name: give --name")
    if recipe.name is not None and started_again():
        run = Path(recipe.output) / recipe.name
        if any((run / folder).exists() for folder in (CURRENT, PREVIOUS)) and _is_run_of(recipe, run):
            return resume(run)
    run = _run_folder(recipe)
    return _trained(recipe, run, start_accelerator(recipe, run))


def resume(run: Path, **changes: Any) -> Result:
    """Go on with a run from its last whole checkpoint, exactly as if it had not stopped.

    Args:
        run: the run's folder.
        changes: settings that do not change the result: where the data is, how many workers read it.

    Raises:
        EwavitError: no run or no whole checkpoint there, or the run is finished.
    """
    checkpoint = load_checkpoint(run)
    recipe = replace(Recipe.from_dict(checkpoint.facts["recipe"], str(checkpoint.path)), **changes)
    model_file = run / "model.safetensors"
    if checkpoint.facts["progress"]["epoch"] >= recipe.epochs and model_file.exists():
        if started_again():
            return Result(run, checkpoint.facts["progress"]["rows"][-1], model_file)
        raise EwavitError(f"{run} is finished after {recipe.epochs} epochs: there is nothing to resume")
    accelerator = start_accelerator(recipe, run)
    if checkpoint.warning and accelerator.is_main_process:
        report.say(f"warning: {checkpoint.warning}")
    return _trained(recipe, run, accelerator, checkpoint)


def _is_run_of(recipe: Recipe, run: Path) -> bool:
    """Whether a run has these settings; of replicas the processes give the number of experts."""
    saved = Recipe.from_dict(load_checkpoint(run).facts["recipe"], str(run))
    return saved == (replace(recipe, experts=saved.experts) if recipe.placement == "replicas" else recipe)


def _trained(
    recipe: Recipe, run: Path, accelerator: Accelerator, checkpoint: Checkpoint | None = None
) -> Result:
    with told_of_lost_processes(accelerator, run):
        return _Run(recipe, run, accelerator, checkpoint).train()


class _Run:
    """Everything that one run needs, built from its recipe and, when resumed, its checkpoint."""

    def __init__(
        self, recipe: Recipe, run: Path, accelerator: Accelerator, checkpoint: Checkpoint | None = None
    ) -> None:
        if recipe.placement == "replicas":
            recipe = replace(recipe, experts=accelerator.num_processes)
            if recipe.experts == 1:
                raise EwavitError("--placement replicas takes one process for each expert: use torchrun")
        self.recipe, self.folder, self.accelerator = recipe, run, accelerator
        self.data = open_recipe_data(
            recipe, accelerator.device, accelerator.process_index, accelerator.num_processes
        )
        inputs = self.data.inputs
        self.updates_per_epoch = self.data.batches_per_epoch // recipe.grad_accum_steps
        if self.updates_per_epoch == 0:
            raise EwavitError(
                f"{self.data.num_train} training {inputs.kind} are fewer than one optimizer step takes "
                f"(--batch-size {recipe.batch_size} x --grad-accum-steps {recipe.grad_accum_steps} x "
                f"{accelerator.num_processes} processes): choose a smaller --batch-size"
            )
        if inputs.num_points is not None and (recipe.mixup or recipe.cutmix):
            raise EwavitError("--mixup and --cutmix mix images: leave them out for point clouds")
        if inputs.num_points is not None and recipe.batch_size == 1:
            raise EwavitError(
                "--batch-size 1 leaves the point transformer's BatchNorm no variance: choose more"
            )
        _seed_all(recipe.seed)
        name, kwargs = model_settings(recipe, inputs)
        dense, settings = build_model(
            name,
            inputs,
            pretrained=recipe.pretrained and checkpoint is None,
            initial_checkpoint=None if checkpoint else recipe.initial_checkpoint,
            **kwargs,
        )
        self.card = ModelCard.of(name, settings, recipe.data, self.data)
        if recipe.placement == "replicas":
            dense.to(accelerator.device)  # where the processes can send it to each other
        plain = expand_by_recipe(dense, recipe, inputs.sample()).to(accelerator.device)
        if recipe.grad_checkpointing:
            set_grad_checkpointing(plain)
        optimizer = build_optimizer(plain, recipe)
        self.scheduler = build_scheduler(optimizer, recipe, self.updates_per_epoch)
        self.average = weight_average(recipe, plain)
        self.averaging = expert_averaging(plain, recipe, self.updates_per_epoch)
        if self.averaging is not None:
            self.averaging.attach(optimizer)
        self.prediction = None
        predictable = SpreadPrediction.supports(optimizer) and not recipe.average_moments
        predictable = predictable and recipe.top_k is None  # a router's experts differ by more than noise
        predictable = predictable and recipe.placement == "local"
        if self.averaging is not None and predictable:
            self.prediction = SpreadPrediction(plain, optimizer, self.averaging)
        self.progress = Progress()
        self.plain = plain
        self.raw_optimizer = optimizer
        if checkpoint is not None:
            self._restore(checkpoint)
        if recipe.compile:
            plain.compile()
        self.model, self.optimizer = accelerator.prepare(plain, optimizer)
        self.loss_scale = torch.full((), 1 / recipe.grad_accum_steps, device=accelerator.device)
        if recipe.top_k is not None:
            scale = self.loss_scale
            scale_auxiliary_loss(plain, lambda loss: loss * scale)
        self.mixup = None
        if recipe.mixup or recipe.cutmix:
            self.mixup = Mix(recipe.mixup, recipe.cutmix, self.data.num_classes)

    def train(self) -> Result:
        """Train to the last epoch, evaluating and saving after each."""
        recipe, progress, main = self.recipe, self.progress, self.accelerator.is_main_process
        if main:
            self.folder.mkdir(parents=True, exist_ok=True)
            recipe.save(self.folder / "args.yaml")
            report.say(self._opening())
        if recipe.tensorboard:
            self.accelerator.init_trackers("tensorboard")
        with self._signals() as received:
            while progress.epoch < recipe.epochs:
                row = self._train_epoch(received)
                progress.epoch, progress.batch = progress.epoch + 1, 0
                progress.loss_sum, progress.loss_count = 0.0, 0
                if self.average is not None:
                    self.average.after_epoch(progress.epoch)
                    if progress.epoch == recipe.epochs:
                        self._complete_average(self.average, row)
                if progress.epoch % recipe.val_interval and progress.epoch < recipe.epochs:
                    continue
                row |= self._evaluate()
                progress.rows.append(row)
                if main:
                    report.say(report.epoch_line(row, recipe.epochs))
                    report.write_summary(progress.rows, self.folder / "summary.csv")
                self.accelerator.log(row, step=progress.epoch)
                self._save()
                if received and progress.epoch < recipe.epochs:
                    raise Interrupted(self.folder, received[0])
        return self._finish()

    def _train_epoch(self, received: list[int]) -> report.Row:
        recipe, progress = self.recipe, self.progress
        self.model.train()
        batches = self._training_batches(progress.epoch, start=progress.batch)
        begun, first_batch = time.perf_counter(), progress.batch
        losses: deque[tuple[int, Tensor]] = deque()  # with the step that each belongs to
        total = self.updates_per_epoch * recipe.grad_accum_steps
        title = f"epoch {progress.epoch + 1}/{recipe.epochs}"
        with report.progress_bar(title, total, progress.batch, self.accelerator.is_main_process) as advance:
            while progress.batch < total:
                for micro_batch in range(recipe.grad_accum_steps):
                    last = micro_batch == recipe.grad_accum_steps - 1
                    with nullcontext() if last else self.accelerator.no_sync(self.model):
                        losses.append((progress.update + 1, self._forward_backward(batches)))
                    progress.batch += 1
                self._update()
                while len(losses) > recipe.grad_accum_steps:  # one step late, so that a GPU never waits
                    advance(self._count(*losses.popleft()))
                due = recipe.recovery_interval and progress.update % recipe.recovery_interval == 0
                if received or (due and progress.batch < total):
                    self._settle(losses)
                    self._save()
                if received:
                    raise Interrupted(self.folder, received[0])
            self._settle(losses)
        seconds = time.perf_counter() - begun
        progress.seconds += seconds
        images_per_batch = recipe.batch_size * self.accelerator.num_processes
        images = (total - first_batch) * images_per_batch
        spread = expert_spread(self.plain)
        predicted = self.prediction.relative() if self.prediction is not None else {}
        self._gather_loss()
        return {
            "epoch": progress.epoch,
            "images": (progress.epoch + 1) * total * images_per_batch,
            "seconds": progress.seconds,
            "train_loss": progress.loss_sum / max(progress.loss_count, 1),
            "lr": progress.lr,
            "share_rate": self.averaging.share_rate if self.averaging else 0.0,
            "expert_spread": fmean(spread.values()) if spread else 0.0,
            **({"predicted_spread": fmean(predicted.values())} if predicted else {}),
            "images_per_second": images / seconds,
            "peak_memory_mib": _peak_memory_mib(self.accelerator.device),
            **{f"spread/{layer}": value for layer, value in spread.items()},
            **report.routing_columns(self.plain),
        }

    def _training_batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """An epoch's batches, each drawn, and then trained on, from generators seeded for it alone."""
        batches = self.data.train_batches(epoch, start)
        for batch in range(start, self.updates_per_epoch * self.recipe.grad_accum_steps):
            _seed_all(self.recipe.seed, epoch, batch, self.accelerator.process_index)
            images, targets = next(batches)
            if self.mixup is not None:
                images, targets = self.mixup(images, targets)
            yield images, targets

    def _loss(self, model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(model(images), targets, label_smoothing=self.recipe.smoothing)

    def _forward_backward(self, batches: Iterator[Batch]) -> Tensor:
        if (scaler := self.accelerator.scaler) is not None:
            share = torch.full_like(self.loss_scale, 1 / self.recipe.grad_accum_steps)
            self.loss_scale.copy_(scaler.scale(share))
        loss = self._loss(self.model, *next(batches))
        self.accelerator.backward(loss / self.recipe.grad_accum_steps)
        return loss.detach()

    def _update(self) -> None:
        if self.recipe.clip_grad is not None and self.recipe.placement == "replicas":
            clip_grad_norm_(self.plain, self.recipe.clip_grad)
        elif self.recipe.clip_grad is not None:
            self.accelerator.clip_grad_norm_(self.model.parameters(), self.recipe.clip_grad)
        groups = self.raw_optimizer.param_groups
        self.progress.lr = max(group["lr"] / group.get("lr_scale", 1.0) for group in groups)
        if self.prediction is not None and self.progress.update % OBSERVE_EVERY == 0:
            scaler = self.accelerator.scaler if self.recipe.clip_grad is None else None  # clipping unscales
            self.prediction.observe(1.0 if scaler is None else scaler.get_scale())
        self.optimizer.step()  # the averaging follows, in its hook
        if self.prediction is not None:
            self.prediction.step()
        self.optimizer.zero_grad()
        self.progress.update += 1
        held = self.average is not None and self.average.holds_learning_rate(self.progress.epoch)
        if self.scheduler is not None and not held:
            self.scheduler.step_update(self.progress.update)
        if self.average is not None:
            self.average.after_step(self.progress.update)

    def _settle(self, losses: deque[tuple[int, Tensor]]) -> None:
        """Count the losses that are left and stop if the weights are not finite: such are never saved."""
        while losses:
            self._count(*losses.popleft())
        if not math.isfinite(float(get_total_norm(self.plain.parameters()))):
            raise self._diverged(f"the weights are not finite after step {self.progress.update}")

    def _count(self, step: int, loss: Tensor) -> float:
        """Add a batch's loss to the epoch's; stop if it is not finite."""
        value = float(loss)
        if not math.isfinite(value):
            raise self._diverged(f"the loss is {value} at step {step}")
        self.progress.loss_sum += value
        self.progress.loss_count += 1
        return value

    def _diverged(self, what: str) -> EwavitError:
        has_checkpoint = (self.folder / "checkpoint").exists()
        kept = f"the last good checkpoint is in {self.folder}" if has_checkpoint else "no checkpoint yet"
        return EwavitError(
            f"{what}, in epoch {self.progress.epoch + 1}: lower --lr, lengthen --warmup-epochs or set "
            f"--clip-grad ({kept})"
        )

    def _gather_loss(self) -> None:
        """Make the main process's loss sum that of all processes; the others start from zero again."""
        if self.accelerator.num_processes == 1:
            return
        progress, accelerator = self.progress, self.accelerator
        local = torch.tensor([progress.loss_sum, progress.loss_count], device=accelerator.device)
        total, count = accelerator.reduce(local, "sum").tolist()
        progress.loss_sum, progress.loss_count = (
            (total, int(count)) if accelerator.is_main_process else (0.0, 0)
        )

    def _evaluate(self) -> report.Row:
        def measure(model: nn.Module) -> Metrics:
            for buffer in model.buffers():  # BatchNorm's: each process has its own, the first one's are saved
                broadcast(buffer)
            with self.accelerator.autocast(), self._deployed(model):
                return evaluate_batches(
                    self.data.voting(model.eval()),
                    self.data.eval_batches(),
                    self.data.num_classes,
                    self.accelerator.device,
                    self.data.categories,
                )

        metrics = measure(self.plain)
        row = metrics.row()
        if self.average is not None:
            averaged = measure(self.average.module) if self.average.ready else metrics
            row |= {"average_loss": averaged.loss, "average_top1": averaged.top1}
        return row

    def _deployed(self, model: nn.Module) -> AbstractContextManager[Any]:
        """Within, a model in eval mode is what will be deployed: a routed one may have to be collapsed."""
        return collapsed(model) if self.recipe.top_k and self.recipe.collapse else nullcontext()

    def _complete_average(self, average: WeightAverage, row: report.Row) -> None:
        """Let the average learn what it has to from further epochs of training images, and count them."""

        def loss(model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
            with self.accelerator.autocast():
                return self._loss(model, images, targets)

        begun = time.perf_counter()
        row["images"] += average.finish(
            lambda extra: self._training_batches(self.recipe.epochs + extra), loss
        )
        self.progress.seconds += time.perf_counter() - begun
        row["seconds"] = self.progress.seconds

    def _write_predictions(self) -> None:
        """Leave the final weights' prediction for every evaluation input, but not for every point of one."""
        counts = self.plain if self.average is None else self.average.module
        batches = () if self.data.categories else self.data.eval_batches()
        with self.accelerator.autocast(), self._deployed(counts):
            mine = predictions(self.data.voting(counts.eval()), batches)
        shares = gather_object([mine])  # rank r has every so-many-th image from the r-th on
        if self.accelerator.is_main_process:
            rows = [row for group in zip_longest(*shares) for row in group if row is not None]
            report.write_predictions(rows, self.folder / "predictions.csv")
            self.data.picture(rows, self.folder / "predictions.png")

    def _save(self) -> None:
        self._gather_loss()
        state = stacked_state_dict(self.plain, self.raw_optimizer)
        average = self.average.state_dict() if self.average else None
        if average is not None and self.average is not None:
            average["module"] = stacked_state_dict(self.average.module).get("model")
        if not self.accelerator.is_main_process:
            return
        scaler = self.accelerator.scaler
        training = {
            "optimizer": state["optimizer"],
            "averaging": self.averaging.state_dict() if self.averaging else None,
            "prediction": self.prediction.state_dict() if self.prediction else None,
            "average": average,
            "scaler": scaler.state_dict() if scaler is not None else None,
        }
        facts = {
            "recipe": asdict(self.recipe),
            "card": asdict(self.card),
            "progress": asdict(self.progress),
            "layers": list(moe_layers(self.plain)),
            "processes": self.accelerator.num_processes,
        }
        metadata = self.card.metadata() | expert_metadata(self.plain)
        save_checkpoint(self.folder, state["model"], training, facts, metadata)

    def _restore(self, checkpoint: Checkpoint) -> None:
        processes = self.accelerator.num_processes
        if (saved := checkpoint.facts.get("processes", processes)) != processes:
            raise EwavitError(
                f"{checkpoint.path} is of a run in {saved} processes, whose steps and learning rates go by "
                f"that number, and here are {processes}: start as many"
            )
        layers = list(moe_layers(self.plain))
        if checkpoint.facts["layers"] != layers:
            raise EwavitError(
                f"{checkpoint.path} has {len(checkpoint.facts['layers'])} mixtures "
                f"({', '.join(checkpoint.facts['layers'])}), this model {len(layers)}: it is another model's"
            )
        training = checkpoint.training
        state = {"model": checkpoint.model, "optimizer": training["optimizer"]}
        try:
            load_stacked_state_dict(self.plain, state, self.raw_optimizer)
        except RuntimeError as problem:
            first = str(problem).strip().splitlines()[-1].strip()
            raise EwavitError(f"{checkpoint.path} is the checkpoint of another model ({first})") from None
        if self.averaging is not None:
            self.averaging.load_state_dict(training["averaging"])
        if self.prediction is not None:
            self.prediction.load_state_dict(training["prediction"])
        if self.average is not None:
            load_stacked_state_dict(self.average.module, {"model": training["average"]["module"]})
            mine = training["average"] | {"module": self.average.module.state_dict()}
            self.average.load_state_dict(mine)
        if training["scaler"] is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(training["scaler"])
        self.progress = Progress(**checkpoint.facts["progress"])
        if not self.accelerator.is_main_process:
            self.progress.loss_sum, self.progress.loss_count = 0.0, 0

    def _finish(self) -> Result:
        row, model_file = self.progress.rows[-1], self.folder / "model.safetensors"
        self._write_predictions()
        state_of = nn.Module.state_dict if self.recipe.keeps_experts else dense_state_dict
        weights = state_of(self.plain)  # by all: replicas meet for it
        averaged = None if self.average is None else state_of(self.average.module)
        if self.accelerator.is_main_process:
            if self.recipe.keeps_experts:
                self.card = replace(self.card, mixture=Mixture.of(self.plain))
            title = f"{self.folder.name}: {self.card.model} on {self.data.name}"
            report.draw_curves(self.progress.rows, self.folder / "curves.png", title)
            if averaged is not None:
                card = replace(self.card, top1=row["average_top1"])
                average_file = self.folder / "model-average.safetensors"
                save_tensors(averaged, average_file, card.metadata())
            card = replace(self.card, top1=row["eval_top1"])
            save_tensors(weights, model_file, card.metadata())
            skipped = f", {self.data.bad_images} unreadable images skipped" if self.data.bad_images else ""
            kind = f"{'held-out' if self.recipe.holdout else 'test'} {self.data.inputs.kind}"
            report.say(f"top-1 {row['eval_top1']:.2f} % on {self.data.num_eval:,} {kind}{skipped}")
            if self.average is not None:
                report.say(f"top-1 {row['average_top1']:.2f} % of the averaged weights, {average_file}")
            what = "the mixture of experts" if self.recipe.keeps_experts else "the plain model"
            report.say(f"{what} is {model_file}; load it with\n\n{card.loading_code(model_file)}\n")
            report.say(f"and give it {card.input_text()}")
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()
        return Result(self.folder, row, model_file)

    def _opening(self) -> str:
        data, recipe, layers = self.data, self.recipe, moe_layers(self.plain)
        mixtures = "1 mixture" if len(layers) == 1 else f"{len(layers)} mixtures"
        router = f", top-{recipe.k} router" if recipe.top_k else ""
        method = f"{mixtures} of {recipe.experts} experts{router}" if layers else "dense"
        resumed = f", resumed at epoch {self.progress.epoch + 1}, batch {self.progress.batch}"
        return (
            f"{self.folder}: {self.card.model} on {data.num_train:,} {data.inputs.kind} of {data.name} "
            f"({data.inputs.size}, {len(data.classes)} classes), {method}, "
            f"{self.accelerator.device}{resumed if self.progress.update else ''}"
        )

    @contextmanager
    def _signals(self) -> Iterator[list[int]]:
        """Collect SIGINT and SIGTERM, so that the step ends and is saved; processes of a group just end."""
        received: list[int] = []
        if self.accelerator.num_processes > 1:
            yield received
            return
        handlers = {}
        with suppress(ValueError):  # only the main thread may set handlers
            for number in (signal.SIGINT, signal.SIGTERM):
                handlers[number] = signal.signal(number, lambda signum, frame: received.append(signum))
        try:
            yield received
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)


def _peak_memory_mib(device: torch.device) -> float:
    """The largest memory held so far, on the GPU or else by this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def _run_folder(recipe: Recipe) -> Path:
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    run = Path(recipe.output) / (recipe.name or f"{stamp}-{recipe.model or 'vit_tiny'}")
    if (run / "checkpoint").exists() or (run / "model.safetensors").exists():
        raise EwavitError(f"{run} holds a run already: choose another --name, or go on with --resume {run}")
    if run.exists() and not run.is_dir():
        raise EwavitError(f"{run} is a file: choose another --output or --name")
    return run


def _seed_all(seed: int, *more: int) -> None:
    """Seed torch, numpy and random from (seed, ...), the same on every machine."""
    state = int(entropy(seed, *more).generate_state(1)[0])
    random.seed(state)
    np.random.seed(state)
    torch.manual_seed(state)

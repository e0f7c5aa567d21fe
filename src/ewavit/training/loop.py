"""The training loop: a batch enters, meets the mixtures, goes back, the hook averages, it is written down.

Every random draw of a step comes from generators seeded by (seed, epoch, batch, rank), so a resumed run goes
on exactly, and two runs that differ in the method alone see the same images.
"""

from __future__ import annotations

import math
import os
import time
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from ewavit.core.branches import branch_shares, limit_branches_
from ewavit.core.diagnostics import collapse_gap, expert_spread
from ewavit.core.distributed import clip_grad_norm_
from ewavit.core.moe import moe_layers
from ewavit.core.routing import scale_auxiliary_loss
from ewavit.core.surgery import collapsed
from ewavit.data.batches import Batch, seed_all
from ewavit.data.relabelled import with_classes
from ewavit.errors import Diverged, EwavitError, Refused
from ewavit.files import remove
from ewavit.tasks.choice import task_for
from ewavit.tasks.sheet import draw_images
from ewavit.tasks.task import Metrics
from ewavit.training import report
from ewavit.training.building import check_recipe_with_data
from ewavit.training.card import ModelCard
from ewavit.training.checkpoint import Checkpoint, load_checkpoint
from ewavit.training.evaluation import Listing, evaluate_batches, predictions
from ewavit.training.export import save_best, save_models
from ewavit.training.losses import training_loss
from ewavit.training.opening import open_recipe_data
from ewavit.training.places import given_spec, spec_of_file
from ewavit.training.processes import (
    Interrupted,
    StopSignals,
    start_accelerator,
    started_again,
    told_of_lost_processes,
)
from ewavit.training.progress import RunProgress
from ewavit.training.recipe import Recipe
from ewavit.training.retention import Retention
from ewavit.training.run_folder import RunFolder
from ewavit.training.state import TrainingState
from ewavit.training.trackers import Trackers
from ewavit.training.weight_average import WeightAverage

OBSERVE_EVERY = 20  # optimizer steps between two measurements of the gradient noise


@dataclass(frozen=True)
class Result:
    """A finished run: its folder, the last epoch's row of `summary.csv`, and the collapsed model's file."""

    run: Path
    row: report.Row
    model_file: Path


def train(recipe: Recipe) -> Result:
    """Train a model from its first step and leave `recipe.output/name/`.

    Raises:
        Refused: the settings cannot work here; found before the first step.
        Diverged: the loss or the weights are not finite.
        EwavitError: other wrong input, or a disk that is full.
        ProcessLost: another process of the run ended.
        Interrupted: SIGINT or SIGTERM; the checkpoint is written.

    Started again by `torchrun --max-restarts`, it resumes the run of its name from the last checkpoint.
    """
    if recipe.distill_from is not None and Path(recipe.distill_from).exists():  # found from anywhere later
        recipe = replace(recipe, distill_from=str(Path(recipe.distill_from).absolute()))
    if recipe.name is None and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0:
        raise EwavitError("a run that torchrun may restart is found by its name: give --name")
    if recipe.name is not None and started_again():
        run = Path(recipe.output) / recipe.name
        if RunFolder(run).has_checkpoint and _is_run_of(recipe, run):
            return resume(run, **given_spec(recipe.data))
    try:
        run = _run_folder(recipe)
        made = _built(recipe, run, start_accelerator(recipe, run))
    except EwavitError as problem:
        raise Refused(str(problem)) from problem
    return _trained(made, fresh=True)


def resume(run: Path, **changes: Any) -> Result:
    """Go on with a run from its last whole checkpoint, exactly as if it had not stopped.

    Args:
        run: the run's folder.
        changes: settings that do not change the result: where the data is, how many workers read it.

    Raises:
        EwavitError: no run or no whole checkpoint there, or the run is finished.
    """
    main = os.environ.get("RANK", "0") == "0"
    with RunFolder(run).locked() if main and RunFolder(run).has_checkpoint else nullcontext():
        return _resume(run, changes, main)


def _resume(run: Path, changes: dict[str, Any], main: bool) -> Result:
    checkpoint, files = load_checkpoint(run), RunFolder(run)
    recipe = Recipe.from_dict(checkpoint.facts["recipe"], str(checkpoint.path))
    card = ModelCard.from_dict(checkpoint.facts["card"], str(checkpoint.path))
    if "data" not in changes:
        changes["data"] = spec_of_file(recipe.data, card.absolute_data)
    recipe = replace(recipe, **changes)
    if files.model.exists() and (recipe.early_stop or checkpoint.facts["progress"]["epoch"] >= recipe.epochs):
        damage = files.damage()
        if not damage and started_again():
            return Result(run, checkpoint.facts["progress"]["rows"][-1], files.model)
        if not damage:
            done = checkpoint.facts["progress"]["epoch"]
            raise EwavitError(f"{run} is finished after {done} epochs: there is nothing to resume")
        best_is_named = (files.damage(files.best) or "").startswith(files.best.name)
        if recipe.keep_best and files.best.exists() and best_is_named:
            raise EwavitError(
                f"{files.best} is damaged, and a finished run cannot write it again: remove it, then resume"
            )
        if main:
            report.say(f"warning: {run} is damaged ({damage}): its files are written again")
    accelerator = start_accelerator(recipe, run)
    if checkpoint.warning and main:
        report.say(f"warning: {checkpoint.warning}")
        if checkpoint.path == files.previous_checkpoint and files.checkpoint.exists():
            remove(files.damaged_checkpoint)  # a new checkpoint must not push the whole one out
            os.replace(files.checkpoint, files.damaged_checkpoint)
    return _trained(_built(recipe, run, accelerator, checkpoint))


def _is_run_of(recipe: Recipe, run: Path) -> bool:
    """Whether a run has these settings; of replicas the processes give the number of experts."""
    saved = Recipe.from_dict(load_checkpoint(run).facts["recipe"], str(run))
    return saved == (replace(recipe, experts=saved.experts) if recipe.placement == "replicas" else recipe)


def _built(
    recipe: Recipe, run: Path, accelerator: Accelerator, checkpoint: Checkpoint | None = None
) -> TrainingRun:
    with told_of_lost_processes(accelerator, run):
        return TrainingRun(recipe, run, accelerator, checkpoint)


def _trained(run: TrainingRun, fresh: bool = False) -> Result:
    locks = fresh and run.accelerator.is_main_process
    with (
        told_of_lost_processes(run.accelerator, run.folder),
        run.files.locked() if locks else nullcontext(),
    ):
        if locks:
            _check_unused(run.folder)  # another start may have been faster
        return run.train()


class TrainingRun:
    """One run: its data, task, model and optimizer, built from a recipe and, when resumed, a checkpoint.

    Args:
        recipe: the settings.
        run: the run's folder.
        accelerator: of the processes that train.
        checkpoint: where to go on; None starts at the first step.

    Attributes:
        state: the model, the optimizer and everything else that training changes.
        progress: epoch, batch and optimizer steps done.

    Raises:
        EwavitError: wrong settings, data that cannot be read, or another run's checkpoint.
    """

    def __init__(
        self, recipe: Recipe, run: Path, accelerator: Accelerator, checkpoint: Checkpoint | None = None
    ) -> None:
        if recipe.placement == "replicas":
            recipe = replace(recipe, experts=accelerator.num_processes)
            if recipe.experts == 1:
                raise EwavitError("--placement replicas takes one process for each expert: use torchrun")
        self.recipe, self.folder, self.accelerator = recipe, run, accelerator
        self.files = RunFolder(run)
        device, processes = accelerator.device, accelerator.num_processes
        self.task = task_for(recipe.data, recipe.task)
        card = None if checkpoint is None else ModelCard.from_dict(checkpoint.facts["card"])
        self.data = open_recipe_data(recipe, device, accelerator.process_index, processes, card)
        if (
            card is not None and self.task.fixed_classes
        ):  # the data may have moved, and its folders may sort otherwise
            self.data = with_classes(self.data, card.classes)
        check_recipe_with_data(recipe, self.data, processes)
        self.updates_per_epoch = self.data.batches_per_epoch // recipe.grad_accum_steps
        seed_all(recipe.seed)
        self.state = TrainingState.build(recipe, self.data, accelerator, self.updates_per_epoch, checkpoint)
        self.progress, self.average = self.state.progress, self.state.average
        if self.progress.batch > self._batches_per_epoch:
            raise EwavitError(
                f"{run} was stopped after batch {self.progress.batch} of an epoch, and here an epoch has "
                f"{self._batches_per_epoch}: give the data of the run with --data"
            )
        if recipe.compile:
            self.state.model.compile()
        self.model, self.optimizer = accelerator.prepare(self.state.model, self.state.optimizer)
        self.loss_scale = torch.full((), 1 / recipe.grad_accum_steps, device=device)
        if recipe.top_k is not None:
            scale = self.loss_scale
            scale_auxiliary_loss(self.state.model, lambda loss: loss * scale)
        self.criterion = training_loss(recipe, self.task, self.data, device, self.state.criterion)
        self.retention = None
        if recipe.retain is not None:
            self.retention = Retention(recipe, self.state.card, processes, device)
        self.mixing = self.task.mixing(recipe.mixup, recipe.cutmix, self.data.num_classes)
        self._signals = StopSignals(run, accelerator)
        self._listing: Listing | None = None  # of the last evaluation
        self._losses: deque[tuple[int, Tensor]] = deque()  # not counted yet, with the step of each
        at_a_time = recipe.batch_size * processes
        self.shown = RunProgress(recipe, self._batches_per_epoch, at_a_time, self.task.kind)

    def train(self) -> Result:
        """Train to the last epoch, evaluating and saving after each."""
        recipe, progress, main = self.recipe, self.progress, self.accelerator.is_main_process
        if main:
            self.folder.mkdir(parents=True, exist_ok=True)
            recipe.save(self.files.args)
            layers = moe_layers(self.state.model)
            opening = report.opening(self.folder, self.state.card, self.data, recipe, len(layers))
            for note in self.data.notes:
                report.say(f"note: {note}")
            resumed = f", resumed at epoch {progress.epoch + 1}, batch {progress.batch}"
            if progress.pending is not None:
                resumed = f", resumed at the evaluation of epoch {progress.epoch}"
            report.say(f"{opening}, {self.accelerator.device}{resumed if progress.update else ''}")
        self.trackers = Trackers(recipe, self.files, progress.epoch, main)
        with self._signals.collected(), self.trackers:
            while progress.pending is not None or not self._is_over():
                if progress.pending is None:
                    row = self._train_epoch()
                    progress.epoch, progress.batch = progress.epoch + 1, 0
                    progress.loss_sum, progress.loss_count = 0.0, 0
                    if self.average is not None:
                        self.average.after_epoch(progress.epoch)
                    if progress.epoch % recipe.val_interval and progress.epoch < recipe.epochs:
                        continue
                    progress.pending = row
                self._judge_epoch(progress.pending)
            return self._finish()

    def after_step(self) -> None:
        """Follow an optimizer step: write the recovery checkpoint, stop at a signal. Tests observe here."""
        due = self.recipe.recovery_interval and self.progress.update % self.recipe.recovery_interval == 0
        stop = self._signals.after_step()
        if stop or (due and self.progress.batch < self._batches_per_epoch):
            self._settle()
            self.state.save(self.folder)
        if stop:
            raise Interrupted(self.folder, stop)

    @property
    def _batches_per_epoch(self) -> int:
        return self.updates_per_epoch * self.recipe.grad_accum_steps

    def _train_epoch(self) -> report.Row:
        recipe, progress = self.recipe, self.progress
        self.model.train()
        batches = self.training_batches(progress.epoch, start=progress.batch)
        begun, first_batch, total = time.perf_counter(), progress.batch, self._batches_per_epoch
        self._losses.clear()
        main = self.accelerator.is_main_process
        with self.shown.epoch(progress.epoch, progress.batch, main) as advance:
            while progress.batch < total:
                for micro_batch in range(recipe.grad_accum_steps):
                    last = micro_batch == recipe.grad_accum_steps - 1
                    with nullcontext() if last else self.accelerator.no_sync(self.model):
                        self._losses.append((progress.update + 1, self._forward_backward(batches)))
                    progress.batch += 1
                self._update()
                while len(self._losses) > recipe.grad_accum_steps:  # one step late, so that a GPU never waits
                    advance(self._count(*self._losses.popleft()))
                self.after_step()
            self._settle()
        seconds = time.perf_counter() - begun
        progress.seconds += seconds
        per_batch = recipe.batch_size * self.accelerator.num_processes
        inputs = (total - first_batch) * per_batch
        spread = expert_spread(self.state.model)
        predicted = self.state.prediction.relative() if self.state.prediction is not None else {}
        self.state.gather_loss()
        return {
            "epoch": progress.epoch,
            self.task.kind: (progress.epoch + 1) * total * per_batch,
            "seconds": progress.seconds,
            "train_loss": progress.loss_sum / max(progress.loss_count, 1),
            "lr": progress.lr,
            "share_rate": self.state.averaging.share_rate if self.state.averaging else 0.0,
            "expert_spread": fmean(spread.values()) if spread else 0.0,
            **({"predicted_spread": fmean(predicted.values())} if predicted else {}),
            f"{self.task.kind}_per_second": inputs / seconds,
            "peak_memory_mib": report.peak_memory_mib(self.accelerator.device),
            **{f"spread/{layer}": value for layer, value in spread.items()},
            **report.routing_columns(self.state.model),
            **{f"branch/{layer}": share for layer, share in branch_shares(self.state.model).items()},
        }

    def training_batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """An epoch's batches; the generators are seeded for each batch before it is drawn and trained on."""
        batches = self.data.train_batches(epoch, start)
        for batch in range(start, self._batches_per_epoch):
            seed_all(self.recipe.seed, epoch, batch, self.accelerator.process_index)
            inputs, targets = next(batches)
            if self.mixing is not None:
                inputs, targets = self.mixing(inputs, targets)
            yield inputs, targets

    def _loss(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        return self.criterion(inputs, model(inputs), targets)

    def _forward_backward(self, batches: Iterator[Batch]) -> Tensor:
        if (scaler := self.accelerator.scaler) is not None:
            share = torch.full_like(self.loss_scale, 1 / self.recipe.grad_accum_steps)
            self.loss_scale.copy_(scaler.scale(share))
        loss = self._loss(self.model, *next(batches))
        self.accelerator.backward(loss / self.recipe.grad_accum_steps)
        return loss.detach()

    def _update(self) -> None:
        if self.recipe.clip_grad is not None and self.recipe.placement == "replicas":
            clip_grad_norm_(self.state.model, self.recipe.clip_grad)
        elif self.recipe.clip_grad is not None:
            self.accelerator.clip_grad_norm_(self.model.parameters(), self.recipe.clip_grad)
        groups = self.state.optimizer.param_groups
        self.progress.lr = max(group["lr"] / group.get("lr_scale", 1.0) for group in groups)
        if self.state.prediction is not None and self.progress.update % OBSERVE_EVERY == 0:
            scaler = self.accelerator.scaler if self.recipe.clip_grad is None else None  # clipping unscales
            self.state.prediction.observe(1.0 if scaler is None else scaler.get_scale())
        self.optimizer.step()  # the averaging follows, in its hook
        if self.recipe.branch:
            steps = self.recipe.epochs * self.updates_per_epoch
            limit_branches_(self.state.model, 1 - (self.progress.update + 1) / steps)
        if self.state.prediction is not None:
            self.state.prediction.step()
        self.optimizer.zero_grad()
        self.progress.update += 1
        held = self.average is not None and self.average.holds_learning_rate(self.progress.epoch)
        if self.state.scheduler is not None and not held:
            self.state.scheduler.step_update(self.progress.update)
        if self.average is not None:
            self.average.after_step(self.progress.update)

    def _settle(self) -> None:
        """Count the losses that are left and stop if the weights are not finite: such are never saved."""
        while self._losses:
            self._count(*self._losses.popleft())
        if not math.isfinite(float(get_total_norm(self.state.model.parameters()))):
            raise self._diverged(f"the weights are not finite after step {self.progress.update}")

    def _count(self, step: int, loss: Tensor) -> float:
        """Add a batch's loss to the epoch's; stop if it is not finite."""
        value = float(loss)
        if not math.isfinite(value):
            raise self._diverged(f"the loss is {value} at step {step}")
        self.progress.loss_sum += value
        self.progress.loss_count += 1
        return value

    def _diverged(self, what: str) -> Diverged:
        saved = self.files.has_checkpoint
        kept = f"the last good checkpoint is in {self.folder}" if saved else "no checkpoint yet"
        return Diverged(
            f"{what}, in epoch {self.progress.epoch + 1}: lower --lr, lengthen --warmup-epochs or set "
            f"--clip-grad ({kept})"
        )

    def _judge_epoch(self, row: report.Row) -> None:
        """Evaluate and save after an epoch. A signal ends the evaluation; a resumed run starts it anew."""
        progress, last = self.progress, self.progress.epoch == self.recipe.epochs
        row = dict(row)
        try:
            with self._signals.raised():
                if self.average is not None and last:
                    self._complete_average(self.average, row)
                row |= self._evaluate(last)
        except Interrupted:
            self.state.save(self.folder)
            raise
        progress.rows.append(row)
        progress.pending = None
        main = self.accelerator.is_main_process
        if self.recipe.keep_best and self._best() == len(progress.rows) - 1:
            deployed = self.state.model if self.average is None else self.average.module
            save_best(self.folder, self.state.card, self.recipe, row, deployed, write=main)
        if main:
            report.say(report.epoch_line(row, self.recipe.epochs, self.task))
            report.write_summary(progress.rows, self.files.summary)
        self.trackers.log(row, progress.epoch)
        self.state.save(self.folder)
        if main and self.recipe.checkpoint_hist:
            self.files.keep_checkpoint(progress.epoch, self.recipe.checkpoint_hist)
        if not last:
            self._signals.check()

    def _best(self) -> int:
        """The number of the evaluation that was best by `--keep-best`, or by the task's metric."""
        column, rows = self.recipe.keep_best or self.task.judge.column, self.progress.rows
        prefix = "average" if f"average_{column}" in rows[-1] else "eval"
        sign = -1 if column == "loss" else self.task.judge.sign
        return max(range(len(rows)), key=lambda number: (sign * rows[number][f"{prefix}_{column}"], -number))

    def _is_over(self) -> bool:
        """Whether all epochs are done, or the last evaluations were no better than one before."""
        if self.progress.epoch >= self.recipe.epochs:
            return True
        patience, evaluations = self.recipe.early_stop, len(self.progress.rows)
        return 0 < patience < evaluations and self._best() < evaluations - patience

    def _evaluate(self, last: bool) -> report.Row:
        counts = self.state.model if self.average is None else self.average.module

        def measure(model: nn.Module) -> Metrics:
            for buffer in model.buffers():  # BatchNorm's: each process has its own, the first one's are saved
                broadcast(buffer)
            with self.accelerator.autocast(), self._deployed(model):
                meter = self.task.meter(self.data, self.accelerator.device)
                if last and model is counts:
                    meter = self._listing = Listing(meter, self.data, self.task)
                batches = self._signals.until(self.data.eval_batches())
                return evaluate_batches(self.data.voting(model.eval()), batches, meter)

        metrics = measure(self.state.model)
        row = metrics.row()
        if self.average is not None:
            averaged = measure(self.average.module) if self.average.ready else metrics
            row |= {f"average_{column}": averaged[column] for column in ("loss", self.task.judge.column)}
        if self.retention is not None:
            ready = self.average is not None and self.average.ready
            with self.accelerator.autocast(), self._deployed(self.state.model):
                row["eval_retained"] = self.retention.accuracy(self.state.model)
            if self.average is not None:
                module = self.average.module if ready else self.state.model
                with self.accelerator.autocast(), self._deployed(module):
                    row["average_retained"] = self.retention.accuracy(module)
        return row

    def _deployed(self, model: nn.Module) -> AbstractContextManager[Any]:
        """Within, a model in eval mode is what will be deployed: a routed one may have to be collapsed."""
        return collapsed(model) if self.recipe.is_routed and self.recipe.collapse else nullcontext()

    def _complete_average(self, average: WeightAverage, row: report.Row) -> None:
        """Let the average learn what it has to from further training epochs, and count their inputs."""

        def loss(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
            with self.accelerator.autocast():
                return self._loss(model, inputs, targets)

        begun = time.perf_counter()
        seen = average.finish(lambda extra: self.training_batches(self.recipe.epochs + extra), loss)
        row[self.task.kind] += seen
        self.progress.seconds += time.perf_counter() - begun
        row["seconds"] = self.progress.seconds

    def _finish(self) -> Result:
        """Leave what the run was for: the weights as files, every prediction, the curves."""
        row, main = self.progress.rows[-1], self.accelerator.is_main_process
        held = self.recipe.holdout or self.recipe.test_on_rest
        judged_on = f"{'held-out' if held else 'test'} {self.task.kind}"
        with self._signals.raised():
            card = self._write_files(row, judged_on, main)
        if main:
            report.say(report.closing(self.folder, card, self.data, row, judged_on))
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()
        return Result(self.folder, row, self.files.model)

    def _write_files(self, row: report.Row, judged_on: str, main: bool) -> ModelCard:
        """The last files of a run, the model after all others; returns the card of the model."""
        model = self.state.model
        averaged = None if self.average is None else self.average.module
        counts = model if averaged is None else averaged
        predict = self.data.voting(counts.eval())
        with self.accelerator.autocast(), self._deployed(counts):
            listing = self._listing  # None: stopped early, or resumed after the last evaluation
            found = predictions(predict, self.data, self.task) if listing is None else listing.gathered()
        card = self.state.card
        if main and (share := max(branch_shares(counts).values(), default=0.0)) > 0:
            change = collapse_gap(counts, card.sample(8).to(self.accelerator.device)).output
            report.say(
                f"note: a branch still has weight {share:.3g}: without it the output differs by {change:.1%}"
            )
        if main:
            classes, file = self.data.classes, self.files.predictions
            report.write_predictions(self.task, found, file, classes, self.recipe.data)
            with self._deployed(counts):
                self.task.picture(self.data, found, predict, self.files.picture)
            if self.recipe.log and not self.files.picture.exists():
                draw_images(self.data, found, self.files.picture)
            self.trackers.picture(self.files.picture, self.progress.epoch)
            title = f"{self.folder.name}: {card.model} on {self.data.name}"
            judge = self.task.judge
            report.draw_curves(self.progress.rows, self.files.curves, title, judged_on, judge)
        return save_models(self.folder, card, self.recipe, row, model, averaged, write=main)


def _run_folder(recipe: Recipe) -> Path:
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    run = Path(recipe.output) / (recipe.name or f"{stamp}-{recipe.model or 'vit_tiny'}")
    _check_unused(run)
    return run


def _check_unused(run: Path) -> None:
    if RunFolder(run).is_used:
        raise EwavitError(f"{run} holds a run already: choose another --name, or go on with --resume {run}")
    if run.exists() and not run.is_dir():
        raise EwavitError(f"{run} is a file: choose another --output or --name")

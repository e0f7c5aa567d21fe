"""What a run carries from step to step, and its way into a checkpoint and back."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ewavit.core.averaging import ExpertAveraging
from ewavit.core.checkpoint_files import expert_metadata
from ewavit.core.distributed import load_stacked_state_dict, stacked_state_dict
from ewavit.core.moe import moe_layers
from ewavit.data.batches import Data
from ewavit.errors import EwavitError
from ewavit.tasks.block_diagonal import group_ffns
from ewavit.tasks.choice import task_for
from ewavit.tasks.task import LossOptions
from ewavit.training.building import (
    build_optimizer,
    build_scheduler,
    expand_by_recipe,
    expert_averaging,
    freeze,
    model_settings,
    set_grad_checkpointing,
)
from ewavit.training.card import ModelCard
from ewavit.training.card_check import no_larger_than
from ewavit.training.checkpoint import DAMAGE, Checkpoint, Progress, save_checkpoint
from ewavit.training.prediction import SpreadPrediction
from ewavit.training.recipe import Recipe
from ewavit.training.report import say
from ewavit.training.run_folder import weights_of
from ewavit.training.seal import digest, said
from ewavit.training.weight_average import WeightAverage, weight_average


@dataclass
class TrainingState:
    """The parts of a run that training changes: `model` and `optimizer` as they are without accelerate.

    Nothing of `scheduler` is saved: it goes by the number of steps.
    """

    recipe: Recipe
    accelerator: Accelerator
    card: ModelCard
    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: Any  # timm's; None for a constant learning rate
    averaging: ExpertAveraging | None  # of the experts, attached to the optimizer
    prediction: SpreadPrediction | None
    average: WeightAverage | None
    progress: Progress = field(default_factory=Progress)
    criterion: nn.Module | None = None  # the task's loss, if it has a state
    teacher: str | None = None  # digest of the teacher's file, if it is a file

    @classmethod
    def build(
        cls,
        recipe: Recipe,
        data: Data,
        accelerator: Accelerator,
        updates_per_epoch: int,
        checkpoint: Checkpoint | None = None,
    ) -> TrainingState:
        """The state of a run at its first step, or where a checkpoint left it, on the run's device.

        Raises:
            EwavitError: no such model, settings that do not fit it, or another run's checkpoint.
        """
        if not (recipe.pretrained or recipe.initial_checkpoint or checkpoint):
            _check_random(recipe)
        name, kwargs = model_settings(recipe, data.inputs)
        limit = no_larger_than(checkpoint.model, str(checkpoint.path)) if checkpoint else nullcontext()
        with limit:
            dense, settings = task_for(recipe.data, recipe.task).build_model(
                name,
                data.inputs,
                pretrained=recipe.pretrained and checkpoint is None,
                initial_checkpoint=None if checkpoint else recipe.initial_checkpoint,
                say=say if accelerator.is_main_process else None,
                **kwargs,
            )
        group_ffns(dense, recipe.ffn_groups)
        freeze(dense, recipe.freeze)
        card = ModelCard.of(name, settings, recipe.data, data, recipe.data_dir, recipe.task)
        card = replace(card, ffn_groups=recipe.ffn_groups, point_features=recipe.point_features)
        if recipe.placement == "replicas":
            dense.to(accelerator.device)  # where the processes can send it to each other
        if recipe.grad_checkpointing:
            set_grad_checkpointing(dense)  # copies of the whole model take it with them
        model = expand_by_recipe(dense, recipe, data.inputs.sample()).to(accelerator.device)
        optimizer = build_optimizer(model, recipe)
        scheduler = build_scheduler(optimizer, recipe, updates_per_epoch)
        average = weight_average(recipe, model)
        averaging = expert_averaging(model, recipe, updates_per_epoch)
        prediction = None
        if averaging is not None:
            averaging.attach(optimizer)
            # A router's experts differ by more than noise.
            predictable = SpreadPrediction.supports(optimizer) and recipe.router == "random"
            if predictable and recipe.placement == "local":
                prediction = SpreadPrediction(model, optimizer, averaging)
        state = cls(recipe, accelerator, card, model, optimizer, scheduler, averaging, prediction, average)
        state.criterion = _criterion(recipe, accelerator.device)
        if recipe.distill_from is not None and (file := weights_of(Path(recipe.distill_from))).is_file():
            state.teacher = digest(file)
        if checkpoint is not None:
            state._restore(checkpoint)
        return state

    def gather_loss(self) -> None:
        """Make the main process's loss sum that of all processes; the others start from zero again."""
        if self.accelerator.num_processes == 1:
            return
        progress, accelerator = self.progress, self.accelerator
        local = torch.tensor([progress.loss_sum, progress.loss_count], device=accelerator.device)
        total, count = accelerator.reduce(local, "sum").tolist()
        progress.loss_sum, progress.loss_count = (
            (total, int(count)) if accelerator.is_main_process else (0.0, 0)
        )

    def save(self, run: Path) -> None:
        """Write a run's checkpoint; all processes call this, the main one writes."""
        self.gather_loss()
        state = stacked_state_dict(self.model, self.optimizer)
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
            **({"criterion": self.criterion.state_dict()} if self.criterion is not None else {}),
            "scaler": scaler.state_dict() if scaler is not None else None,
        }
        facts = {
            "recipe": asdict(self.recipe),
            "card": asdict(self.card),
            "progress": asdict(self.progress),
            "layers": list(moe_layers(self.model)),
            "processes": self.accelerator.num_processes,
            **({"teacher": self.teacher} if self.teacher else {}),
        }
        metadata = self.card.metadata() | expert_metadata(self.model)
        save_checkpoint(run, state["model"], training, facts, metadata)

    def _restore(self, checkpoint: Checkpoint) -> None:
        processes = self.accelerator.num_processes
        if (saved := checkpoint.facts.get("processes", processes)) != processes:
            raise EwavitError(
                f"{checkpoint.path} is of a run in {saved} processes, whose steps and learning rates go by "
                f"that number, and here are {processes}: start as many"
            )
        layers = list(moe_layers(self.model))
        if checkpoint.facts["layers"] != layers:
            theirs, mine = (", ".join(names) or "none" for names in (checkpoint.facts["layers"], layers))
            raise EwavitError(
                f"{checkpoint.path} is the checkpoint of another model: its mixtures are {theirs}, this "
                f"model's are {mine}"
            )
        if self.teacher and checkpoint.facts.get("teacher", self.teacher) != self.teacher:
            raise EwavitError(
                f"--distill-from {self.recipe.distill_from} is another model than the run learned from: put "
                "that one back, or start a new run"
            )
        try:
            self._restore_parts(checkpoint.model, checkpoint.training)
        except EwavitError:
            raise
        except RuntimeError as problem:
            first = str(problem).strip().splitlines()[-1].strip()
            raise EwavitError(f"{checkpoint.path} is the checkpoint of another model ({first})") from None
        except DAMAGE as problem:
            raise EwavitError(
                f"{checkpoint.path} is damaged ({said(problem)}): remove it, and the one before it is used"
            ) from None
        self.progress = Progress(**checkpoint.facts["progress"])
        if not self.accelerator.is_main_process:
            self.progress.loss_sum, self.progress.loss_count = 0.0, 0

    def _restore_parts(self, model: dict[str, Tensor], training: Any) -> None:
        load_stacked_state_dict(
            self.model, {"model": model, "optimizer": training["optimizer"]}, self.optimizer
        )
        if self.averaging is not None:
            self.averaging.load_state_dict(training["averaging"])
        if self.prediction is not None:
            self.prediction.load_state_dict(training["prediction"])
        if self.average is not None:
            load_stacked_state_dict(self.average.module, {"model": training["average"]["module"]})
            mine = training["average"] | {"module": self.average.module.state_dict()}
            self.average.load_state_dict(mine)
        if self.criterion is not None:
            self.criterion.load_state_dict(training["criterion"])
        if training["scaler"] is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(training["scaler"])


def _check_random(recipe: Recipe) -> None:
    """Refuse what makes no sense with random first weights."""
    remedy = "and here they are random: give --pretrained or --initial-checkpoint"
    if recipe.router == "hybrid" and recipe.experts > 1:
        raise EwavitError(f"--router hybrid freezes the first FFNs, {remedy}")
    if recipe.toward_start:
        raise EwavitError(f"--toward-start {recipe.toward_start} goes back to the first weights, {remedy}")


def _criterion(recipe: Recipe, device: torch.device) -> nn.Module | None:
    """The loss with a state of the recipe's task, if it has one."""
    options = LossOptions(recipe.margin, recipe.koleo, recipe.memory)
    criterion = task_for(recipe.data, recipe.task).criterion(options)
    return None if criterion is None else criterion.to(device)

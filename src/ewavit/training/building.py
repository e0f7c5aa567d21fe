"""From a recipe and the data's facts to a timm model, dense or expanded."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable
from typing import Any

import timm
import torch
from timm.optim import create_optimizer_v2, get_optimizer_info, list_optimizers
from timm.scheduler import create_scheduler_v2
from torch import Tensor, nn

from ewavit.core.averaging import (
    CosineRamp,
    Early,
    ExpertAveraging,
    LinearRamp,
    Schedule,
    looks_at_whole_tensors,
)
from ewavit.core.branches import ChannelCovariance, add_branch
from ewavit.core.ffn import FFN, select_ffns
from ewavit.core.moe import moe_layers
from ewavit.core.surgery import expand
from ewavit.data.batches import Data, Inputs
from ewavit.errors import EwavitError, first_line
from ewavit.tasks.choice import OWN_SETTINGS, task_for
from ewavit.training.recipe import Recipe, settings
from ewavit.training.setting import flag


def model_inputs(recipe: Recipe, data: Data | None = None) -> Inputs:
    """The inputs of a recipe's model.

    Args:
        recipe: the settings.
        data: the images or clouds; without them the images that timm's weights were made for.

    Raises:
        EwavitError: the data of the recipe are of another kind than its task needs.
    """
    if data is not None:
        return data.inputs
    config = timm.get_pretrained_cfg((recipe.model or "").split(".")[0])
    in_chans, img_size = config.input_size[:2] if config else (3, 224)
    classes = config.num_classes if config else 1000
    side, task = recipe.img_size or img_size, task_for(recipe.data, recipe.task)
    return task.inputs(classes, in_chans, side, recipe.num_points or 1024)


def model_settings(recipe: Recipe, inputs: Inputs) -> tuple[str, dict[str, Any]]:
    """The model's name and keyword arguments; without a name a small one that fits the inputs."""
    kwargs = recipe.parsed("model_kwargs")
    if recipe.drop_path is not None:
        kwargs["drop_path_rate"] = recipe.drop_path
    if recipe.model is None:
        return task_for(recipe.data, recipe.task).default_model(inputs, kwargs)
    return recipe.model, kwargs


def expand_by_recipe(model: nn.Module, recipe: Recipe, sample: Tensor | None = None) -> nn.Module:
    """Expand a model as the recipe says; one expert leaves it dense.

    Args:
        model: dense, changed in place.
        recipe: the settings.
        sample: one image (1, channels, height, width), to check that a batch has a unit for every expert.

    Raises:
        EwavitError: nothing to expand, or more experts than units in a batch.
    """
    if recipe.experts == 1:
        return _branched(model, recipe)
    chosen = select_ffns(model, recipe.select, recipe.unit)
    replicas = recipe.placement == "replicas"
    if replicas and (unfit := [ffn for ffn in chosen if not ffn.stackable]):
        raise EwavitError(
            f"{unfit[0].name} ({unfit[0].class_name}) cannot be stacked, as a checkpoint of replicas needs: "
            "choose others with --select"
        )
    if sample is not None and not replicas:
        for name, per_image in units_by_layer(model, chosen, sample, recipe.unit).items():
            unit = recipe.unit if name else "image"
            if recipe.experts > per_image * recipe.batch_size:
                raise EwavitError(
                    f"--experts {recipe.experts} is more than the {per_image * recipe.batch_size} "
                    f"{unit}s of a batch in {name or 'the model'}: take fewer experts or a larger "
                    "--batch-size"
                )
    # Optimizers that use a whole tensor train N matrices; replicas have one each already.
    defaults = get_optimizer_info(recipe.opt).defaults if recipe.opt in list_optimizers() else None
    settings = {**(defaults or {}), **recipe.parsed("opt_kwargs")}
    separate = looks_at_whole_tensors(recipe.opt, settings) and not replicas
    expand(
        model,
        recipe.experts,
        select=recipe.select if chosen[0].module is model else [ffn.name for ffn in chosen],
        unit=recipe.unit,
        router=recipe.routing,
        experts="separate" if separate else "auto",
        placement=recipe.placement,
    )
    return _branched(model, recipe)


def _branched(model: nn.Module, recipe: Recipe) -> nn.Module:
    return model if recipe.branch is None else add_branch(model, ChannelCovariance())


def expert_averaging(model: nn.Module, recipe: Recipe, updates_per_epoch: int) -> ExpertAveraging | None:
    """The averaging that a recipe asks for, not attached yet; None for a dense model."""
    if recipe.experts == 1:
        return None
    ramp = LinearRamp if recipe.ramp_shape == "linear" else CosineRamp
    last = round((1.0 if recipe.early is None else recipe.early) * recipe.epochs * updates_per_epoch)
    schedule: Schedule = ramp(recipe.share_rate, round(recipe.ramp * last))
    if recipe.early is not None:
        schedule = Early(schedule, last)
    return ExpertAveraging(model, schedule, every=recipe.average_every)


def check_recipe_with_data(recipe: Recipe, data: Data, processes: int) -> None:
    """Check that so many processes can train by a recipe on such data.

    Raises:
        EwavitError: an epoch has no whole optimizer step, or the task cannot take what the recipe asks for.
    """
    task = task_for(recipe.data, recipe.task)
    if data.batches_per_epoch < recipe.grad_accum_steps:
        raise EwavitError(
            f"{data.num_train} training {task.kind} are fewer than one optimizer step takes "
            f"(--batch-size {recipe.batch_size} x --grad-accum-steps {recipe.grad_accum_steps} x "
            f"{processes} processes): choose a smaller --batch-size"
        )
    if task.no_mixing and (recipe.mixup or recipe.cutmix):
        raise EwavitError(task.no_mixing)
    if recipe.keep_best not in (None, "loss", task.judge.column):
        raise EwavitError(f"--keep-best {recipe.keep_best} is unknown: choose {task.judge.column} or loss")
    defaults = {setting.name: setting.default for setting in settings() if setting.name in OWN_SETTINGS}
    for name, default in defaults.items():
        if name not in task.own_settings and (value := getattr(recipe, name)) != default:
            raise EwavitError(f"--{flag(name)} {value} is not for {task.name}: leave it out")
    fewest, why = task.fewest_per_batch
    if recipe.batch_size < fewest:
        raise EwavitError(f"--batch-size {recipe.batch_size} {why}")


def freeze(model: nn.Module, pattern: str | None) -> None:
    """Stop the training of parameters whose name begins with a regular expression.

    Raises:
        EwavitError: it fits no parameter, or all.
    """
    if pattern is None:
        return
    chosen = [p for name, p in model.named_parameters() if re.match(pattern, name)]
    names = [name for name, _ in model.named_parameters()]
    if not chosen or len(chosen) == len(names):
        raise EwavitError(
            f"--freeze {pattern!r} fits {'all' if chosen else 'none'} of the {len(names)} parameters, "
            f"{names[0]} to {names[-1]}: give another"
        )
    for parameter in chosen:
        parameter.requires_grad_(False)


def set_grad_checkpointing(model: nn.Module) -> None:
    """Let a timm model recompute its blocks' activations in the backward pass.

    Raises:
        EwavitError: the model cannot.
    """
    try:
        model.set_grad_checkpointing()  # type: ignore[operator]
    except (AttributeError, AssertionError):
        raise EwavitError(
            f"{type(model).__name__} has no activation checkpointing: leave out --grad-checkpointing"
        ) from None


def build_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """The optimizer that a recipe asks for, over a model that is expanded and on its device.

    Raises:
        EwavitError: timm does not know it or refuses its settings, its package is not installed, or it needs
            second derivatives.
    """
    fused = {"fused": True} if recipe.opt in ("adam", "adamw") else {}  # one pass over the weights

    def made(of: nn.Module) -> torch.optim.Optimizer:
        built: torch.optim.Optimizer = create_optimizer_v2(
            of,
            opt=recipe.opt,
            lr=recipe.lr,
            weight_decay=recipe.weight_decay,
            momentum=recipe.momentum,
            layer_decay=recipe.layer_decay,
            **{**fused, **recipe.parsed("opt_kwargs")},
        )
        return built

    try:
        if recipe.opt_kwargs:
            _try_step(made, next(model.parameters()).device)
        optimizer = made(model)
    except Exception as problem:  # optimizers of several packages raise what they like
        close = difflib.get_close_matches(recipe.opt, list_optimizers(), 3)
        hint = f"did you mean {', '.join(close)}?" if recipe.opt not in close and close else "choose another"
        given = f" --opt-kwargs {recipe.opt_kwargs}" if recipe.opt_kwargs else ""
        raise EwavitError(
            f"timm could not build the optimizer of --opt {recipe.opt}{given} ({first_line(problem)}): {hint}"
        ) from None
    if getattr(optimizer, "is_second_order", False):
        raise EwavitError(
            f"--opt {recipe.opt} needs second derivatives, and training computes only first ones: choose "
            "another optimizer, e.g. adamw"
        )
    if recipe.expert_lr != 1.0:
        _scale_expert_lr(optimizer, model, recipe.expert_lr)
        if recipe.sched == "none":
            for group in optimizer.param_groups:
                group["lr"] *= group.get("lr_scale", 1.0)
    return optimizer


def build_scheduler(optimizer: torch.optim.Optimizer, recipe: Recipe, updates_per_epoch: int) -> Any:
    """timm's schedule for `step_update`; None for a constant learning rate.

    Raises:
        EwavitError: timm refuses the settings.
    """
    if recipe.sched == "none":
        return None

    def made(of: torch.optim.Optimizer) -> Any:
        return create_scheduler_v2(
            of,
            sched=recipe.sched,
            num_epochs=recipe.epochs,
            warmup_epochs=min(recipe.warmup_epochs, recipe.epochs // 2),
            warmup_lr=recipe.warmup_lr,
            min_lr=recipe.min_lr,
            decay_epochs=recipe.decay_epochs,
            decay_rate=recipe.decay_rate,
            step_on_epochs=False,
            updates_per_epoch=updates_per_epoch,
            **recipe.parsed("sched_kwargs"),
        )[0]

    try:
        if recipe.sched_kwargs:
            _try_schedule(made, recipe, recipe.epochs * updates_per_epoch)
        return made(optimizer)
    except Exception as problem:  # also a division by zero or an overflow
        given = f" --sched-kwargs {recipe.sched_kwargs}" if recipe.sched_kwargs else ""
        raise EwavitError(
            f"timm could not build the schedule of --sched {recipe.sched}{given} ({first_line(problem)}): "
            "choose other settings"
        ) from None


def _try_step(made: Callable[[nn.Module], torch.optim.Optimizer], device: torch.device) -> None:
    """Let an optimizer of a small layer do a step: some arguments are read only then."""
    layer = nn.Linear(2, 2, device=device)
    layer(torch.ones(1, 2, device=device)).sum().backward()
    made(layer).step()


def _try_schedule(made: Callable[[torch.optim.Optimizer], Any], recipe: Recipe, updates: int) -> None:
    """Ask a schedule for some of its learning rates: some arguments are read only then.

    Raises:
        ValueError: a learning rate is negative or not finite, or noise would be drawn for too long.
    """
    kwargs = recipe.parsed("sched_kwargs")
    width, spread = kwargs.get("noise_pct", 0.67), kwargs.get("noise_std", 1.0)
    if width <= 0 or width < 0.01 * abs(spread):  # timm draws again until the noise is below `noise_pct`
        raise ValueError(f"noise_pct {width} is too small for noise_std {spread}")
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=recipe.lr)
    schedule = made(optimizer)
    for update in sorted({1, *(updates * part // 32 for part in range(1, 32))}):
        schedule.step_update(update)
        if not 0 <= (lr := optimizer.param_groups[0]["lr"]) < math.inf:
            raise ValueError(f"the learning rate becomes {lr} at step {update}")


def _scale_expert_lr(optimizer: torch.optim.Optimizer, model: nn.Module, factor: float) -> None:
    """Give the experts of a model groups of their own, whose learning rate timm's schedules multiply."""
    experts = {id(p) for moe in moe_layers(model).values() for p in moe.experts.parameters()}
    for group in list(optimizer.param_groups):
        mine = [parameter for parameter in group["params"] if id(parameter) in experts]
        if not mine:
            continue
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in experts]
        scale = group.get("lr_scale", 1.0) * factor
        optimizer.add_param_group(group | {"params": mine, "lr_scale": scale})


def ffn_input_shapes(model: nn.Module, ffns: list[FFN], sample: Tensor) -> dict[str, torch.Size]:
    """The shape of each FFN's input for one image (1, channels, height, width), by name.

    A split FFN gives two.
    """
    shapes: dict[str, torch.Size] = {}
    handles = []
    for ffn in (layer for each in ffns for layer in each.layers):

        def note(module: nn.Module, inputs: tuple[Tensor, ...], name: str = ffn.name) -> None:
            shapes[name] = inputs[0].shape

        handles.append(ffn.module.register_forward_pre_hook(note))
    training = model.training
    with torch.no_grad():
        model.eval()(sample)
    model.train(training)
    for handle in handles:
        handle.remove()
    return shapes


def units_by_layer(model: nn.Module, ffns: list[FFN], sample: Tensor, unit: str) -> dict[str, int]:
    """How many units of one image each FFN deals to its experts, by name; a split FFN gives two.

    Args:
        model: dense.
        ffns: of the model.
        sample: one image (1, channels, height, width).
        unit: "token" or "image"; copies of the whole model get images.
    """
    shapes = ffn_input_shapes(model, ffns, sample)
    if unit == "image":
        return dict.fromkeys(shapes, 1)
    return {name: units_per_image(model, name, shape) if name else 1 for name, shape in shapes.items()}


def units_per_image(model: nn.Module, name: str, shape: torch.Size) -> int:
    """Tokens in an FFN's input of this shape for one image."""
    first = next(m for m in model.get_submodule(name).modules() if isinstance(m, nn.Linear | nn.Conv2d))
    dim = first.in_features if isinstance(first, nn.Linear) else first.in_channels
    return shape.numel() // dim

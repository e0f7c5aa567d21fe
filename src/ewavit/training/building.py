"""From a recipe and the data's facts to a timm model, dense or expanded."""

from __future__ import annotations

import difflib
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import load_state_dict
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import Tensor, nn

from ewavit.core.averaging import CosineRamp, Early, ExpertAveraging, LinearRamp, Schedule
from ewavit.core.ffn import FFN
from ewavit.core.moe import moe_layers
from ewavit.core.surgery import expand, select_ffns
from ewavit.data.batches import Data, Inputs
from ewavit.errors import EwavitError
from ewavit.points.transformer import MODELS as POINT_MODELS
from ewavit.points.transformer import create_point_model, load_point_checkpoint
from ewavit.training.recipe import Recipe

MOST_PATCHES = 4096
FEWEST_PATCHES = 4


def build_model(
    name: str,
    inputs: Inputs,
    *,
    pretrained: bool = False,
    initial_checkpoint: str | None = None,
    **kwargs: Any,
) -> tuple[nn.Module, dict[str, Any]]:
    """A model that fits the data, checked with one forward pass, and the settings it was built with.

    Args:
        name: any timm model name, or for point clouds one of `ewavit.points.transformer.MODELS`.
        inputs: classes and shape of the data.
        pretrained: load timm's weights.
        initial_checkpoint: load this file of the same model, with its head if the class counts agree.
        kwargs: handed to timm or the point transformer.

    Raises:
        EwavitError: unknown model, too few points, patches that do not fit the image, settings it refuses,
            weights that are missing or of another model.
    """
    if inputs.num_points is not None:
        return _point_model(name, inputs, pretrained, initial_checkpoint, kwargs)
    img_size = inputs.img_size
    if name in POINT_MODELS:
        raise EwavitError(
            f"{name} is for point clouds: give --data solids or modelnet10:PATH, or another --model"
        )
    if not timm.is_model(name.split(".")[0]):
        close = difflib.get_close_matches(name, timm.list_models(), 3)
        hint = f"did you mean {', '.join(close)}?" if close else "timm.list_models() names them all"
        raise EwavitError(f"timm has no model {name!r}: {hint}")
    _check_patches(kwargs.get("patch_size"), img_size)
    settings = {
        "num_classes": inputs.num_classes, "in_chans": inputs.in_chans, "img_size": img_size, **kwargs
    }  # fmt: skip
    if initial_checkpoint is not None:
        model = _from_file(name, initial_checkpoint, settings)
    else:
        model = _create(name, settings, pretrained=pretrained)
    patch_embed = getattr(model, "patch_embed", None)
    _check_patches(getattr(patch_embed, "patch_size", None), img_size)
    try:
        with torch.no_grad():
            was_training = model.training
            model.eval()(inputs.sample())
            model.train(was_training)
    except (RuntimeError, AssertionError, ValueError) as problem:
        raise EwavitError(
            f"{name} cannot take {img_size}x{img_size} images ({_first_line(problem)}): "
            "choose another --img-size, --model or --model-kwargs"
        ) from None
    return model, settings


def _point_model(
    name: str, inputs: Inputs, pretrained: bool, initial_checkpoint: str | None, kwargs: dict[str, Any]
) -> tuple[nn.Module, dict[str, Any]]:
    if pretrained:
        raise EwavitError("--pretrained fetches timm's weights: give a point model an --initial-checkpoint")
    settings = {"num_classes": inputs.num_classes, **kwargs}
    model = create_point_model(name, **settings)
    if initial_checkpoint is not None:
        load_point_checkpoint(model, initial_checkpoint)
    with torch.no_grad():
        model.eval()(inputs.sample())
    return model.train(), settings


def model_inputs(recipe: Recipe, data: Data | None = None) -> Inputs:
    """What a recipe's model is for.

    Args:
        recipe: the settings.
        data: the images or clouds; without them the images that timm's weights were made for.
    """
    if data is not None:
        return replace(data.inputs, img_size=recipe.img_size or data.img_size)
    config = timm.get_pretrained_cfg((recipe.model or "").split(".")[0])
    in_chans, img_size = config.input_size[:2] if config else (3, 224)
    return Inputs(config.num_classes if config else 1000, in_chans, recipe.img_size or img_size)


def model_settings(recipe: Recipe, inputs: Inputs) -> tuple[str, dict[str, Any]]:
    """The model's name and keyword arguments; without a name a small one that fits the inputs."""
    kwargs = recipe.parsed_model_kwargs()
    if recipe.drop_path is not None:
        kwargs["drop_path_rate"] = recipe.drop_path
    if inputs.num_points is not None:
        return recipe.model or ("point_transformer_seg_s" if inputs.parts else "point_transformer_s"), kwargs
    if recipe.model is None:
        kwargs.setdefault("patch_size", _fitting_patch(inputs.img_size))
    return recipe.model or "vit_tiny_patch16_224", kwargs


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
        return model
    chosen = select_ffns(model, recipe.select, recipe.unit)
    replicas = recipe.placement == "replicas"
    if replicas and (unfit := [ffn for ffn in chosen if not ffn.stackable]):
        raise EwavitError(
            f"{unfit[0].name} ({unfit[0].class_name}) cannot be stacked, as a checkpoint of replicas needs: "
            "choose others with --select"
        )
    if sample is not None and not replicas:
        for name, shape in ffn_input_shapes(model, chosen, sample).items():
            per_image = 1 if recipe.unit == "image" else units_per_image(model, name, shape)
            if recipe.experts > per_image * recipe.batch_size:
                raise EwavitError(
                    f"--experts {recipe.experts} is more than the {per_image * recipe.batch_size} "
                    f"{recipe.unit}s of a batch in {name}: take fewer experts or a larger --batch-size"
                )
    return expand(
        model,
        recipe.experts,
        select=[ffn.name for ffn in chosen],
        unit=recipe.unit,
        router=recipe.top_k,
        placement=recipe.placement,
    )


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
    """See that so many processes can train by a recipe on such data.

    Raises:
        EwavitError: an epoch has no whole optimizer step, or clouds cannot take what the recipe asks for.
    """
    inputs = data.inputs
    if data.batches_per_epoch < recipe.grad_accum_steps:
        raise EwavitError(
            f"{data.num_train} training {inputs.kind} are fewer than one optimizer step takes "
            f"(--batch-size {recipe.batch_size} x --grad-accum-steps {recipe.grad_accum_steps} x "
            f"{processes} processes): choose a smaller --batch-size"
        )
    if inputs.num_points is not None and (recipe.mixup or recipe.cutmix):
        raise EwavitError("--mixup and --cutmix mix images: leave them out for point clouds")
    if inputs.num_points is not None and recipe.batch_size == 1:
        raise EwavitError("--batch-size 1 leaves the point transformer's BatchNorm no variance: choose more")


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
        EwavitError: timm does not know it, or refuses its settings.
    """
    fused = {"fused": True} if recipe.opt in ("adam", "adamw") else {}  # one pass over the weights
    try:
        optimizer: torch.optim.Optimizer = create_optimizer_v2(
            model,
            opt=recipe.opt,
            lr=recipe.lr,
            weight_decay=recipe.weight_decay,
            momentum=recipe.momentum,
            layer_decay=recipe.layer_decay,
            **fused,
        )
    except (AssertionError, ValueError, KeyError) as problem:
        raise EwavitError(f"timm could not build the optimizer {recipe.opt!r} ({problem})") from None
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
    try:
        scheduler, _ = create_scheduler_v2(
            optimizer,
            sched=recipe.sched,
            num_epochs=recipe.epochs,
            warmup_epochs=min(recipe.warmup_epochs, recipe.epochs // 2),
            warmup_lr=recipe.warmup_lr,
            min_lr=recipe.min_lr,
            decay_epochs=recipe.decay_epochs,
            decay_rate=recipe.decay_rate,
            step_on_epochs=False,
            updates_per_epoch=updates_per_epoch,
        )
    except (AssertionError, ValueError) as problem:
        raise EwavitError(f"timm could not build the schedule {recipe.sched!r} ({problem})") from None
    return scheduler


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
    """The shape of each FFN's input for one image (1, channels, height, width), by the FFN's name."""
    shapes: dict[str, torch.Size] = {}
    handles = []
    for ffn in ffns:

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


def units_per_image(model: nn.Module, name: str, shape: torch.Size) -> int:
    """Tokens in an FFN's input of this shape for one image."""
    first = next(m for m in model.get_submodule(name).modules() if isinstance(m, nn.Linear | nn.Conv2d))
    dim = first.in_features if isinstance(first, nn.Linear) else first.in_channels
    return shape.numel() // dim


def _create(name: str, settings: dict[str, Any], **more: Any) -> nn.Module:
    """`timm.create_model`; drops `img_size` from the settings of a model that works at any size."""
    try:
        try:
            model: nn.Module = timm.create_model(name, **settings, **more)
        except TypeError as problem:
            if "img_size" not in str(problem):
                raise
            settings.pop("img_size")
            model = timm.create_model(name, **settings, **more)
        return model
    except (TypeError, ValueError, AssertionError, RuntimeError, OSError) as problem:
        given = ", ".join(f"{key}={value}" for key, value in settings.items())
        raise EwavitError(f"timm could not build {name} with {given}: {_first_line(problem)}") from None


def _from_file(name: str, file: str, settings: dict[str, Any]) -> nn.Module:
    """The model with a file's weights, loaded strictly; the head is new if the file has other classes."""
    if not Path(file).is_file():
        raise EwavitError(f"no file {file}: give --initial-checkpoint the weights of a {name}")
    try:
        weights = load_state_dict(file)
    except Exception as problem:  # whatever a damaged or foreign file makes the readers raise
        raise EwavitError(f"{file} cannot be read as weights ({_first_line(problem)})") from None
    config = timm.get_pretrained_cfg(name.split(".")[0])
    head = getattr(config, "classifier", None)
    head_weight = weights.get(f"{head}.weight") if isinstance(head, str) else None
    num_classes = settings["num_classes"]
    classes = num_classes if head_weight is None else head_weight.shape[0]
    overlay = {"state_dict": weights, "num_classes": classes}
    stem = (
        weights.get(f"{config.first_conv}.weight") if config and isinstance(config.first_conv, str) else None
    )
    if stem is not None:
        overlay["input_size"] = (stem.shape[1], *config.input_size[1:])
    try:
        settings["num_classes"] = classes
        model = _create(name, settings, pretrained=True, pretrained_cfg_overlay=overlay)
        settings["num_classes"] = num_classes
    except EwavitError as problem:
        raise EwavitError(f"{file} does not hold the weights of {name}: {problem}") from None
    if classes != num_classes:
        model.reset_classifier(num_classes)  # type: ignore[operator]
    return model


def _fitting_patch(img_size: int) -> int:
    """The divisor of the image side that gives the number of patches per side closest to eight."""
    divisors = [patch for patch in range(1, img_size + 1) if img_size % patch == 0]
    return min(divisors, key=lambda patch: abs(img_size / patch - 8))


def _check_patches(patch_size: Any, img_size: int) -> None:
    patch = patch_size[0] if isinstance(patch_size, tuple | list) else patch_size
    if not isinstance(patch, int):
        return
    fitting = [p for p in range(1, img_size + 1) if img_size % p == 0]
    fitting = [p for p in fitting if FEWEST_PATCHES <= (img_size // p) ** 2 <= MOST_PATCHES]
    patches = (img_size // patch) ** 2 if patch > 0 else 0
    if patch <= 0 or img_size % patch or not FEWEST_PATCHES <= patches <= MOST_PATCHES:
        if patch > 0 and patches > MOST_PATCHES:
            why = f"is too small for {img_size}x{img_size} images ({patches:,} patches)"
        elif patch > 0 and patches >= FEWEST_PATCHES:
            why = f"does not divide {img_size}x{img_size} images"
        else:
            why = (
                f"is too large for {img_size}x{img_size} images" if patch > 0 else "is not a number of pixels"
            )
        choices = ", ".join(map(str, fitting))
        remedy = (
            f"give --model-kwargs patch_size=N with N one of {choices}" if choices else "use larger images"
        )
        raise EwavitError(f"patch size {patch} {why}: {remedy}")


def _first_line(problem: BaseException) -> str:
    lines = str(problem).strip().splitlines()
    return lines[0][:200] if lines else type(problem).__name__

"""Models of timm for images of any size: built, checked with one forward pass, loaded from files."""

from __future__ import annotations

import difflib
import inspect
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from ewavit.data.batches import ImageInputs
from ewavit.data.weight_files import check_finite
from ewavit.errors import EwavitError, first_line
from ewavit.points.transformer import MODELS as POINT_MODELS
from ewavit.tasks.weights import Fitted, LoadReport, fit, misfit

MOST_PATCHES = 4096
FEWEST_PATCHES = 4
# timm's own arguments; those of an architecture are what is left.
_LOADING = {
    *inspect.signature(timm.create_model).parameters,
    *inspect.signature(timm.models.build_model_with_cfg).parameters,
    "features_only", "out_indices", "feature_cls", "pruned",
}  # fmt: skip
_REACHES = re.compile(r"(?:^|_)(?:pretrained|checkpoint|cache|url|file|filename|dir|hub|hf)(?:_|$)")
SMP = "smp:"  # before a name of segmentation-models-pytorch
_NAME, _WORD = re.compile(r"\w+(?:\.\w+)?", re.ASCII), re.compile(r"[\w.+-]{0,100}", re.ASCII)
_MOST_LAYERS = 10_000
_LARGEST, _LONGEST, _DEEPEST = 2**20, 1000, 4  # of the numbers, lists and levels in a model's arguments
WEIGHTS, CONFIG = "model.safetensors", "config.json"  # of a folder that timm loads


def build_timm_model(
    name: str,
    inputs: ImageInputs,
    pretrained: bool,
    initial_checkpoint: str | None,
    say: Callable[[str], None] | None,
    kwargs: dict[str, Any],
) -> tuple[nn.Module, dict[str, Any]]:
    """Build a timm model for the images; arguments as in `Task.build_model`.

    Returns:
        The model and its settings.

    Raises:
        EwavitError: the model is unknown, its patches do not fit the images, its settings do not work, or the
            weights are missing or of another model.
    """
    img_size = inputs.img_size
    check_timm_model(name, kwargs)
    settings = {
        "num_classes": inputs.num_classes, "in_chans": inputs.in_chans, "img_size": img_size, **kwargs
    }  # fmt: skip
    model = start(name, settings, img_size, pretrained, initial_checkpoint, say)
    try:
        with torch.no_grad():
            was_training = model.training
            output = model.eval()(inputs.sample())
            model.train(was_training)
    except Exception as problem:  # models raise what they like for images or settings that do not fit
        raise EwavitError(
            f"{name} cannot take {img_size}x{img_size} images ({first_line(problem)}): "
            "choose another --img-size, --model or --model-kwargs"
        ) from None
    if not isinstance(output, torch.Tensor) or output.shape != (1, inputs.num_classes):
        raise EwavitError(
            f"{name} gives no logits for {inputs.num_classes} classes: choose another --model or "
            "--model-kwargs"
        )
    return model, settings


def start(
    name: str,
    settings: dict[str, Any],
    img_size: int,
    pretrained: bool,
    initial_checkpoint: str | None,
    say: Callable[[str], None] | None,
) -> nn.Module:
    """A timm model with its first weights, whose patches fit images of this size.

    Raises:
        EwavitError: the patches do not fit, the settings do not work, or the weights are of another model.
    """
    check_patches(settings.get("patch_size"), img_size)
    if initial_checkpoint is not None:
        model, report = from_file(name, initial_checkpoint, settings)
        if say is not None:
            say("\n".join(report.lines()))
    else:
        model = create(name, settings, pretrained=pretrained)
    check_patches(getattr(getattr(model, "patch_embed", None), "patch_size", None), img_size)
    return model


def check_timm_model(name: str, settings: Mapping[str, Any]) -> None:
    """Refuse a name or settings that are more than an architecture's: timm would read files or the network.

    Args:
        name: a name of timm's registry, with or without a tag.
        settings: numbers and words, and lists and dicts of them, by the names of a constructor's arguments.

    Raises:
        EwavitError: it names the wrong one.
    """
    if name in POINT_MODELS:
        raise EwavitError(
            f"{name} is for point clouds: give --data solids or modelnet10:PATH, or another --model"
        )
    if name.startswith(SMP):
        raise EwavitError(f"{name[:100]} is for --task segmentation: give that, or another --model")
    if not _NAME.fullmatch(name) or not timm.is_model(name.split(".")[0]):
        close = difflib.get_close_matches(name[:100], timm.list_models(), 3)
        hint = f"did you mean {', '.join(close)}?" if close else "timm.list_models() lists all models"
        raise EwavitError(f"timm has no model {name[:100]!r}: {hint}")
    check_settings(settings)


def create_timm_model(name: str, settings: Mapping[str, Any]) -> nn.Module:
    """Create a timm model with fresh weights from its name and settings, as `build_timm_model` returned them.

    Raises:
        EwavitError: they are more than an architecture's, or do not work.
    """
    check_timm_model(name, settings)
    return create(name, dict(settings))


def check_settings(settings: Mapping[str, Any], depth: int = 0) -> None:
    """Refuse arguments of a model that are not plain numbers and words, or have a name of timm's loading.

    Raises:
        EwavitError: it names the wrong argument.
    """
    for key, value in settings.items():
        if not isinstance(key, str) or not key.isidentifier() or key in _LOADING or _REACHES.search(key):
            raise EwavitError(f"{str(key)[:100]!r} is no argument of an architecture: leave it out")
        values = value if isinstance(value, list | tuple) else (value,)
        if depth > _DEEPEST or len(values) > _LONGEST or not all(_is_plain(each, depth) for each in values):
            raise EwavitError(
                f"{key}={repr(value)[:100]} is no plain setting of a model: give numbers up to "
                f"{_LARGEST:,}, words, or lists of them"
            )
        counted = values if "depth" in key or "layers" in key else ()
        if any(isinstance(each, int | float) and each > _MOST_LAYERS for each in counted):
            raise EwavitError(f"{key}={value} is out of range: give at most {_MOST_LAYERS:,} layers")


def _is_plain(value: Any, depth: int) -> bool:
    """Whether a value is a number in range, a word, or a list or dict of them."""
    if isinstance(value, dict | list | tuple):
        check_settings(value if isinstance(value, dict) else {"list": value}, depth + 1)
        return True
    if isinstance(value, str):
        return _WORD.fullmatch(value) is not None
    return value is None or (isinstance(value, int | float) and abs(value) <= _LARGEST)


def create(name: str, settings: dict[str, Any], **more: Any) -> nn.Module:
    """Call `timm.create_model`; `img_size` is removed from `settings` if the model does not know it."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Initializing zero-element tensors")  # the check names these
            try:
                model: nn.Module = timm.create_model(name, **settings, **more)
            except TypeError as problem:
                if "img_size" not in str(problem):
                    raise
                settings.pop("img_size")
                model = timm.create_model(name, **settings, **more)
        return model
    except Exception as problem:  # constructors raise what they like, e.g. ZeroDivisionError for no heads
        given = ", ".join(f"{key}={value}" for key, value in settings.items())
        raise EwavitError(f"timm could not build {name} with {given}: {first_line(problem)}") from None


def from_file(name: str, file: str, settings: dict[str, Any]) -> tuple[nn.Module, LoadReport]:
    """Build a model with the weights of a file; heads are new where the file has none for the classes."""
    config = timm.get_pretrained_cfg(name.split(".")[0])
    classifier = getattr(config, "classifier", None) or ()
    heads = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    num_classes = settings["num_classes"]
    with torch.random.fork_rng(devices=[]):  # a fresh head is drawn for the model that is returned, not here
        own = create(name, settings).state_dict()
    fitted = fit(file, own, heads, num_classes)
    check_finite(fitted.weights, own, file)
    overlay = {"state_dict": dict(fitted.weights), "num_classes": fitted.num_classes}
    first_conv = config.first_conv if config and isinstance(config.first_conv, str) else None
    if (stem := fitted.weights.get(f"{first_conv}.weight")) is not None:
        overlay["input_size"] = (stem.shape[1], *config.input_size[1:])
    try:
        stored = {**settings, "num_classes": fitted.num_classes}
        model = create(name, stored, pretrained=True, pretrained_cfg_overlay=overlay)
    except EwavitError:
        raise EwavitError(
            f"{file} does not hold the weights of {name} with these settings "
            f"({misfit(fitted, own, heads)}): {_remedy(fitted)}"
        ) from None
    if fitted.num_classes != num_classes:
        model.reset_classifier(num_classes)  # type: ignore[operator]
    return model, fitted.report


def _remedy(fitted: Fitted) -> str:
    if any("embeddings.cls_token" in key for key in fitted.weights):
        return "these are transformers' names, which are not converted: give timm's file of the model"
    return "choose the --model and --model-kwargs of the file"


def as_arguments(values: Mapping[str, Any]) -> str:
    """Values as the arguments of a call in Python code."""
    return ", ".join(f"{key}={value!r}" for key, value in values.items())


def is_timm_folder(file: Path) -> bool:
    """Whether timm loads the folder of a weights file as `local-dir:FOLDER`."""
    return file.name == WEIGHTS and (file.parent / CONFIG).is_file()


def timm_config(
    name: str, settings: Mapping[str, Any], classes: Sequence[str], pretrained_cfg: Mapping[str, Any]
) -> dict[str, Any]:
    """The `config.json` beside `model.safetensors`; timm and transformers read both, as from a model hub.

    Args:
        name: timm's name of the model, with or without a tag.
        settings: what `timm.create_model` takes beside the name.
        classes: names of the classes.
        pretrained_cfg: how to prepare images, under timm's names.
    """
    config = timm.get_pretrained_cfg(name)
    known = {} if config is None else {key: getattr(config, key) for key in ("first_conv", "classifier")}
    settings = {key: value for key, value in settings.items() if key != "num_classes"}
    return {
        "architecture": name.split(".")[0],
        "num_classes": len(classes),
        "label_names": list(classes),
        "model_args": settings,
        "pretrained_cfg": {"custom_load": False, "num_classes": len(classes), **known, **pretrained_cfg},
    }


def transform_code(pretrained_cfg: Mapping[str, Any]) -> str:
    """Python lines that make the evaluation `transform`: torchvision's, or timm's for the mode "border"."""
    side, mode = pretrained_cfg["input_size"][-1], pretrained_cfg["crop_mode"]
    if mode not in ("center", "squash"):
        imports = "from PIL import ImageOps\nfrom timm.data import create_transform\n"
        return f"{imports}transform = create_transform({as_arguments(pretrained_cfg)})"
    resized = math.floor(side / pretrained_cfg["crop_pct"])
    size = resized if mode == "center" else (resized, resized)
    interpolation = pretrained_cfg["interpolation"].upper()
    return (
        "from PIL import ImageOps\n"
        "from torchvision import transforms as T\n"
        "transform = T.Compose([\n"
        f"    T.Resize({size}, T.InterpolationMode.{interpolation}), T.CenterCrop({side}),\n"
        f"    T.ToTensor(), T.Normalize({pretrained_cfg['mean']}, {pretrained_cfg['std']}),\n"
        "])"
    )


def fitting_patch(img_size: int) -> int:
    """The patch size, a divisor of `img_size` in pixels, that gives nearly eight patches per side."""
    divisors = [patch for patch in range(1, img_size + 1) if img_size % patch == 0]
    return min(divisors, key=lambda patch: abs(img_size / patch - 8))


def check_patches(patch_size: Any, img_size: int) -> None:
    """Refuse a patch size that does not divide the image's side, or gives too few or too many patches.

    Raises:
        EwavitError: with the sizes that fit.
    """
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

"""Models of segmentation-models-pytorch: `smp:ARCHITECTURE:ENCODER`, such as `smp:segformer:mit_b0`."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

import timm
import torch
from torch import nn

from ewavit.errors import EwavitError, first_line
from ewavit.tasks.timm_models import SMP, check_settings

_OF_TIMM = "tu-"  # before the name of an encoder from timm
_SHAPE = ("num_classes", "in_chans", "img_size")
_OWN = ("activation", "aux_params")  # they change what the model returns


def library() -> Any:
    """Import segmentation-models-pytorch.

    Raises:
        EwavitError: it is not installed.
    """
    try:
        import segmentation_models_pytorch
    except ModuleNotFoundError:
        raise EwavitError(
            f"--model {SMP}... needs segmentation-models-pytorch: pip install 'ewavit[smp]'"
        ) from None
    return segmentation_models_pytorch


def create_smp_model(name: str, settings: Mapping[str, Any], pretrained: bool = False) -> nn.Module:
    """Create a model of segmentation-models-pytorch.

    Args:
        name: `smp:ARCHITECTURE:ENCODER`; an encoder `tu-NAME` is timm's model of that name.
        settings: `num_classes`, `in_chans` and `img_size`, and further arguments of the architecture.
        pretrained: load the encoder's weights, which the library downloads.

    Raises:
        EwavitError: there is no such model, or it does not work with these settings.
    """
    if missing := [key for key in _SHAPE if key not in settings]:
        raise EwavitError(f"{name} has no {missing[0]} among its settings: give a card with all of them")
    if given := [key for key in settings if key in _OWN]:
        raise EwavitError(f"{given[0]} changes what {name} returns: leave it out")
    architecture, encoder = _parts(name)
    classes, in_chans, side = (settings[key] for key in _SHAPE)
    arguments = _arguments(encoder, settings)
    weights = "imagenet" if pretrained else None
    try:
        model: nn.Module = library().create_model(
            architecture, encoder, weights, in_chans, classes, **arguments
        )
        sample = torch.zeros(1, in_chans, side, side, device=next(model.parameters()).device)
        with torch.no_grad():
            shape = tuple(model.eval()(sample).shape)
        if shape != (1, classes, side, side):
            raise ValueError(f"its output has the shape {shape}")
    except Exception as problem:  # the library and its encoders raise what they like
        raise EwavitError(
            f"{name} does not work with {side}x{side} images and these settings ({first_line(problem)}): "
            "choose another --model, --img-size or --model-kwargs"
        ) from None
    model.pretrained_cfg = {}  # type: ignore[assignment]  # as timm's models have
    return model.train()


def _arguments(encoder: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What the library takes beside names, channels and classes."""
    more = {key: value for key, value in settings.items() if key not in _SHAPE}
    check_settings(more)
    if encoder.startswith(_OF_TIMM) and timm.get_pretrained_cfg(encoder[3:]).fixed_input_size:
        more["img_size"] = settings["img_size"]
    return more


def _parts(name: str) -> tuple[str, str]:
    """Architecture and encoder of a name.

    Raises:
        EwavitError: the library has no such architecture or encoder.
    """
    architecture, _, encoder = name.removeprefix(SMP).partition(":")
    smp = library()
    known: tuple[tuple[str, Any], ...] = (
        (architecture, smp.MODEL_ARCHITECTURES_MAPPING),
        (encoder, smp.encoders.encoders),
    )
    for word, names in known:
        if word in names or (word.startswith(_OF_TIMM) and timm.is_model(word[3:].split(".")[0])):
            continue
        close = difflib.get_close_matches(word[:100], list(names), 3)
        hint = f"did you mean {', '.join(close)}?" if close else f"give {SMP}segformer:mit_b0, for example"
        raise EwavitError(f"segmentation-models-pytorch has no {word[:100]!r}: {hint}")
    return architecture, encoder


def smp_preparation(name: str) -> dict[str, Any]:
    """How the images of an encoder's weights were normalised, as fields of `DataOptions`.

    Raises:
        EwavitError: the library cannot say it, offline for one.
    """
    _, encoder = _parts(name)
    if encoder.startswith(_OF_TIMM):
        config = timm.get_pretrained_cfg(encoder[3:])
        return {"mean": config.mean, "std": config.std}
    try:
        found = library().encoders.get_preprocessing_params(encoder, "imagenet")
    except Exception as problem:  # the hub's client raises many things
        raise EwavitError(
            f"the weights of {encoder} could not be loaded ({first_line(problem)}): leave out --pretrained"
        ) from None
    return {"mean": tuple(found["mean"]), "std": tuple(found["std"])}


def smp_code(name: str, settings: Mapping[str, Any]) -> str:
    """Python lines that make the model `model` with fresh weights, without ewavit."""
    architecture, encoder = _parts(name)
    words = "".join(f", {key}={value!r}" for key, value in _arguments(encoder, settings).items())
    shape = f"in_channels={settings['in_chans']}, classes={settings['num_classes']}"
    return (
        "import segmentation_models_pytorch as smp\n"
        f"model = smp.create_model({architecture!r}, {encoder!r}, None, {shape}{words}).eval()"
    )
